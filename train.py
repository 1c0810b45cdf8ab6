"""Train a policy that thinks in episodes to reach right answers with fewer tokens.

    python train.py config/small.py                     from nothing: data, warm start, MRT, evaluation, figures
    python train.py config/small_grpo.py                outcome reward only: GRPO, the baseline
    python train.py config/small.py --seed=1            any key can be set so
    python train.py config/small.py --resume            go on after an interruption, exactly
    python train.py --help                              every key

Read next: nanomrt/mrt.py, the algorithm. `update` below is where RL takes its gradients.
"""

import math
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import kernels
from data import Task, load_task
from data.task import SPLITS
from evaluate import budget_figure, evaluate_splits, summary_table
from nanomrt import checkpoint, report
from nanomrt.config import SUPERVISED, RunConfig, UserError, command
from nanomrt.files import write_json
from nanomrt.methods import METHODS
from nanomrt.model import Llama, Packed, micro_batches
from nanomrt.mrt import (
    Batch,
    clipped_loss,
    group_has_advantage,
    kl_penalty,
    length_with_gradient,
    likelihood_loss,
    token_weights,
)
from nanomrt.rollout import examples
from nanomrt.run import Run, choose_device, finished, generator_for, provenance, read_command_line
from nanomrt.warmstart import cached_warm_start, check_context


def main(argv: list[str]) -> int:
    config, folder, flags = read_command_line(argv)
    resume = "--resume" in flags
    if resume and finished(folder):
        print(f"{folder} is finished: python evaluate.py {folder} measures it again")
        return 0
    device = choose_device(config)
    run = Run(config, folder, device)
    task = checked_task(config)
    generation = {"eos_token_id": task.close_answer, "temperature": config.temperature, "do_sample": True}

    with run.timed("warm_start"):
        start = (run.start if resume else None) or (
            Path(config.init_from) if config.init_from else cached_warm_start(task, config, device, "--force" in flags))
    model = starting_policy(start, task, config, device)
    method = METHODS[config.algorithm]
    reference = checkpoint.load_model(start, device) if config.kl_coef else None  # the policy that the KL pulls back to
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=config.weight_decay, fused=True)
    run.begin(start, model, optimizer, resume)

    while run.step < config.steps and not run.interrupted:
        # 1. Gather: sample traces, and measure what each of their episodes changed.
        problems = task.problems("train", config.prompts_per_step, f"{config.seed}/{run.step}")
        with run.timed("trace"):
            gathered = method.gather(model, task, problems, config, generator_for(config.seed, "sample", run.step))
        with run.timed("update"):
            # 2. Credit: what each token is worth. MRT: the outcome to all, progress to those of the episode that made it.
            ref_logprob = rescore(reference, gathered.batch, config) if reference else None  # (N,)
            batch = with_k1_penalty(gathered.batch, ref_logprob, config)
            advantage = method.credit(batch, gathered.episodes, config)  # (N,)
            batch, advantage, mismatch = importance_weighted(model, batch, advantage, config)
            # 3. Learn, by a clipped policy-gradient step on each minibatch.
            learned = update(model, optimizer, batch, advantage, ref_logprob, run) | mismatch
        # 4. Write it down.
        run.record(gathered, learned)
        if run.step % config.sample_every == 0 or run.step == config.steps:
            run.show(gathered.example(task))
        del gathered  # its cache is as large as the next step's
        if run.step % config.save_every == 0:
            run.save(model, task.tokenizer, generation, optimizer)

    run.save(model, task.tokenizer, generation, optimizer)
    run.end()
    if run.step < config.steps:
        again = shlex.join(["python", "train.py", *(word for word in argv if word != "--resume"), "--resume"])
        print(f"stopped after step {run.step}; go on with: {again}")
        return 130
    finish(run, task, model, checkpoint.load_model(start, device))
    return 0


def checked_task(config: RunConfig) -> Task:
    """The task of a config. Raises UserError if it is impossible, or a split has no problems: now, and not after training."""
    task = load_task(config)
    for split in SPLITS:
        task.problems(split, 1, "is there one?")
    return task


def starting_policy(folder: Path, task: Task, config: RunConfig, device: str) -> Llama:
    """The model of a checkpoint folder. Raises UserError if there is none, or its vocabulary or context doesn't fit the task."""
    model = checkpoint.load_model(folder, device)
    if model.config.vocab_size != len(task.tokenizer):
        raise UserError(f"{folder} has a vocabulary of {model.config.vocab_size}, the task one of {len(task.tokenizer)}: " +
                        ("init_from takes a checkpoint of nanomrt; for a pretrained model there is warm_from" if config.warm_from
                         else "set the task's keys (max_value above all) as they were when it was trained"))
    check_context(model, folder, config)
    return model


def score(model: Llama, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob and entropy (n,) of every action of a batch under `model`, and where those actions lie (n,)."""
    packed = Packed.of(batch.lengths)
    hidden = model(batch.tokens, packed.position_ids, packed)  # (N,C)
    action = batch.is_action.nonzero().squeeze(1)  # (n,)
    # hidden[t-1] predicts token t; an action is never a sequence's first token.
    return *kernels.token_logprobs(hidden[action - 1], model.head, batch.tokens[action], temperature), action


@torch.no_grad()
def rescore(model: Llama, batch: Batch, config: RunConfig) -> Tensor:
    """Log-probs (N,) of a whole batch under `model`, 0 where no action."""
    rescored = torch.zeros_like(batch.logprob)
    for rows in micro_batches(batch.lengths, config.micro_batch_tokens):
        logprob, _, action = score(model, batch.take(rows), config.temperature)
        rescored[batch.flat(rows)[action]] = logprob
    return rescored


def with_k1_penalty(batch: Batch, ref_logprob: Tensor | None, config: RunConfig) -> Batch:
    """The batch with the KL to the reference taken from its rewards, if that is the estimator; otherwise as it is."""
    if not config.k1_in_reward:
        return batch
    k1 = torch.zeros_like(batch.reward).index_add(0, batch.row, batch.logprob - ref_logprob)  # (B,)
    return replace(batch, reward=batch.reward - config.kl_coef * k1)


def importance_weighted(model: Llama, batch: Batch, advantage: Tensor, config: RunConfig) -> tuple[Batch, Tensor, dict]:
    """Truncated importance sampling, for a sampler that rounds in its own way: the batch with the trainer's log-probs, advantages
    (N,) times min(pi_trainer / pi_sampler, importance_cap), and how far apart both were, which `update` can't see any more. As it
    was if the cap is 0."""
    if not config.importance_cap:
        return batch, advantage, {}
    trainer = rescore(model, batch, config)
    difference = trainer - batch.logprob
    return (replace(batch, logprob=trainer), advantage * difference.exp().clamp(max=config.importance_cap),
            apart([difference[batch.is_action]]))


def apart(differences: list[Tensor]) -> dict[str, float]:
    """Mean, 99th percentile and maximum of |trainer's log-prob - sampler's| over all tokens of some parts (n,); 0 without any."""
    difference = torch.cat(differences).abs() if differences else torch.zeros(1)
    return {"mean_logprob_diff": float(difference.mean()), "max_logprob_diff": float(difference.max()),
            "p99_logprob_diff": float(difference.kthvalue(math.ceil(0.99 * len(difference))).values)}


def update(model: Llama, optimizer: torch.optim.Optimizer, batch: Batch, advantage: Tensor, ref_logprob: Tensor | None,
           run: Run) -> dict[str, float]:
    """`epochs` passes over the batch in `minibatches` optimiser steps each; returns what a row of metrics.jsonl says of them."""
    config, seen, differences = run.config, Counter(), []
    minibatches = shuffled(batch, advantage, config, generator_for(config.seed, "update", run.step))
    for index, minibatch in enumerate(minibatches):
        weight = torch.zeros_like(advantage)  # (N,)
        weight[batch.flat(minibatch)] = token_weights(batch.take(minibatch), config.loss_norm, config.thinking_budget,
                                                      config.truncated)
        # What no gradient comes from is not computed: rollouts without an advantage, and what follows a rollout's last one. But a
        # KL pulls at every action.
        length = length_with_gradient(batch, weight * advantage if ref_logprob is None else weight)  # (B,)
        minibatch = minibatch[length[minibatch] > 0]
        optimizer.zero_grad(set_to_none=True)
        for part in micro_batches(length[minibatch], config.micro_batch_tokens):
            rows = minibatch[part]
            logprob, entropy, action = score(model, batch.take(rows, length), config.temperature)  # (n,)
            at = batch.flat(rows, length)[action]  # (n,) the same actions on the batch's axis
            # What is imitated has no ratio: who wrote it, and how likely it was then, doesn't matter.
            old = logprob.detach() if config.algorithm in SUPERVISED else batch.logprob[at]
            loss = loss_of(logprob, old, advantage[at], weight[at], None if ref_logprob is None else ref_logprob[at], config)
            loss.backward()
            seen.update(observed(loss.detach(), logprob.detach(), old, entropy.detach(), config))
            # Before the first step both distributions are the same, so this is the sampler's error. (Where `old` isn't the
            # sampler's it is 0: `importance_weighted` has measured the error then, and what is imitated has none.)
            if index == 0:
                differences.append(logprob.detach() - old)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip))
        seen["grad_norm"] += norm
        if run.accept_gradient(norm):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, run.step * config.epochs * config.minibatches + index)
            optimizer.step()
    run.ledger["update"] += seen["tokens"]
    per_step, per_token = len(minibatches), max(seen["tokens"], 1)
    return {"loss": seen["loss"] / per_step, "entropy": seen["entropy"] / per_token,
            "clip_fraction": seen["clipped"] / per_token, "grad_norm": seen["grad_norm"] / per_step,
            "learning_rate": optimizer.param_groups[0]["lr"], **apart(differences)}


def shuffled(batch: Batch, advantage: Tensor, config: RunConfig, generator: torch.Generator) -> list[Tensor]:
    """The rows of each optimiser step, pass after pass, each in an order of its own; equal_groups=skip leaves rows out."""
    kept = group_has_advantage(batch, advantage)  # (B,)
    if config.equal_groups == "keep" or not kept.any():  # if nobody has an advantage, a KL still pulls at everybody
        kept = torch.ones_like(kept)
    parts = []
    for _ in range(config.epochs):
        order = torch.randperm(len(batch.lengths), generator=generator).to(batch.lengths.device)
        parts += order[kept[order]].chunk(config.minibatches)  # fewer if few rows are left
    return parts


def loss_of(logprob: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, ref_logprob: Tensor | None,
            config: RunConfig) -> Tensor:
    """The loss of some actions, a scalar; every tensor (n,)."""
    if config.algorithm in SUPERVISED:
        loss = likelihood_loss(logprob, advantage, weight)
    else:
        loss = clipped_loss(logprob, old, advantage, weight, config.clip_low, config.clip_high)
    if ref_logprob is not None:
        loss = loss + config.kl_coef * (weight * kl_penalty(logprob, old, ref_logprob, config.kl_estimator)).sum()
    return loss


def observed(loss: Tensor, logprob: Tensor, old: Tensor, entropy: Tensor, config: RunConfig) -> dict[str, float]:
    """Sums over some actions, for the step line."""
    ratio = (logprob - old).exp()
    clipped = (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
    return {"loss": float(loss), "entropy": float(entropy.sum()), "clipped": int(clipped.sum()), "tokens": len(logprob)}


def learning_rate(config: RunConfig, done: int) -> float:
    """Of the optimiser step after `done` others: a linear rise, and a linear fall to `learning_rate_end` at the run's end."""
    rise = min(1.0, (done + 1) / max(config.warmup_steps, 1))
    fall = 1 - (1 - config.learning_rate_end) * done / (config.steps * config.epochs * config.minibatches)
    return config.learning_rate * rise * fall


def finish(run: Run, task: Task, model: Llama, warm: Llama) -> None:
    """Evaluate the warm start and the trained policy, draw the figures, write the summary and show both."""
    with run.timed("evaluation"):
        before = evaluate_splits(warm, task, run.config, ["test"], brief=True)
        after = evaluate_splits(model, task, run.config, ["test"]) | evaluate_splits(model, task, run.config, ["ood"], brief=True)
        shown = task.problems("test", 24, "traces")
        traces = examples(model, task, shown, run.config, generator_for(run.config.seed, "traces", run.step))
    summary = {"warm_start": before["test"], **after, "ledger": run.ledger, "seconds": run.seconds, **provenance(run)}
    write_json(run.folder / "summary.json", summary)
    name = run.folder.name
    print(summary_table({name: summary}))
    report.traces_page(run.folder / "traces.html", f"{name}: rollouts of test problems", traces)
    figures = run.folder / "figures"
    figures.mkdir(exist_ok=True)
    report.training_figure(figures / "training.png", {name: report.read_jsonl(run.folder / "metrics.jsonl")[1:]})
    budget_figure(figures / "budget.png", {"warm start": before["test"], name: after["test"]})
    print(f"\n{run.folder}: summary.json, figures/, traces.html; try: python sample.py {run.folder} --progress")


if __name__ == "__main__":
    try:
        command(main)
    except KeyboardInterrupt:
        print("stopped; --resume goes on with a run that has begun", file=sys.stderr)
        sys.exit(130)
