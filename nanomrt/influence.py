"""Who moves a decision? After every episode a policy goes on or stops: which tokens' credit moves that, and where.

    python -m nanomrt.influence out/small --algorithms grpo,mrt_online,length_penalty
    python -m nanomrt.influence out/small --checkpoint out/warm-1d8da5eaf5

Places are the ends of episodes, of two kinds: an answer forced there is right, or it is wrong. Let d be the mean log-odds of
stopping at the places of one kind. A policy-gradient step changes the parameters by eta · sum_t w_t A_t grad log pi(a_t), so d by

    eta · sum_t w_t A_t i_t,      i_t = grad d · grad log pi(a_t)                                                  (1)

i_t, the influence of a token on d, is what no credit can choose: the network shares its parameters among all contexts. One pass
measures it for all tokens: go a little along grad d, and see whose log-probs rise.

    i_t = (log pi_{theta + h grad d}(a_t) - log pi_{theta - h grad d}(a_t)) / 2h + O(h²)                           (2)

The sum (1) over a group of tokens is what this group does to d: the decisions that d is made of, those of the other kind, and all
other tokens. eta is chosen to make a step of length STEP, because AdamW's steps have nearly the same length whatever the
gradient's; but it scales every parameter by itself, and (1) does not.
Dimension key: N packed tokens, B rollouts, E episodes, n places of a kind, C width, P problems.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import kernels
from data import load_task
from nanomrt.config import KEYS, RunConfig, UserError, command, parse_arm, refuse_unread, with_overrides
from nanomrt.methods import METHODS, Gathered, traces, traces_for_progress, traces_with_J
from nanomrt.metrics import bootstrap
from nanomrt.model import Llama, Packed, micro_batches
from nanomrt.mrt import Batch, likelihood_loss, token_weights
from nanomrt.run import generator_for, open_run
from train import rescore, score, starting_policy

STEP = 0.01  # length of the gradient step, in parameter space
RISE = 0.02  # how much (2) moves d, to first order: well above rounding, and h² is small
CREDIT_KEYS = {"alpha", "gamma", "J_discount", "progress_norm", "advantage_norm", "repeat_penalty", "length_penalty", "loss_norm",
               "truncated"}  # others shape rollouts and J, which all arms have in common
KINDS = ("wrong", "right")  # an answer forced at a place


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Which tokens' credit makes a policy stop, or go on, and where.")
    parser.add_argument("run", type=Path, help="a run's folder, such as out/small")
    parser.add_argument("--checkpoint", type=Path, help="the policy (default: the run's newest), such as a warm start's folder")
    parser.add_argument("--algorithms", default="grpo,mrt_online", help="credits, as for compare.py: grpo,mrt_online+alpha=2")
    parser.add_argument("--problems", type=int, default=64, help="train problems, with a group of rollouts each")
    args = parser.parse_args(argv)
    if args.problems < 1:
        raise UserError(f"--problems={args.problems}: ask for at least one")
    config, folder = open_run(args.run, args.checkpoint)
    arms = {arm: arm_config(config, arm) for arm in args.algorithms.split(",")}
    task = load_task(config, folder)
    problems = task.problems("train", args.problems, "influence")
    model = starting_policy(folder, task, config, "cpu")  # in fp32: (2) is a small difference, and bf16 would round it away
    gathered = traces_with_J(model, task, problems, config, generator_for(config.seed, "influence", 0))
    print(table(model, gathered, task.close_thinking, config, arms))
    return 0


def arm_config(config: RunConfig, arm: str) -> RunConfig:
    """The config of 'mrt_online+alpha=2'. Raises UserError unless its credit is given to whole traces."""
    algorithm, keys = parse_arm(arm)
    config = with_overrides(config, {"algorithm": algorithm, **keys})
    refuse_unread(config, [name for name in keys if getattr(config, name) != KEYS[name].default])  # a run's own may be taken back
    if other := keys.keys() - CREDIT_KEYS:
        raise UserError(f"{arm}: the arms credit the same rollouts, so {', '.join(sorted(other))} can't differ")
    possible = [name for name, method in METHODS.items() if method.gather in (traces, traces_with_J, traces_for_progress)]
    if config.algorithm not in possible:
        raise UserError(f"{config.algorithm} learns from other rollouts than whole traces; possible: {', '.join(possible)}")
    return config


def decisions(gathered: Gathered) -> dict[str, Tensor]:
    """(N,) bool for each kind: the token with which the policy goes on after an episode, or stops."""
    batch, episodes = gathered.batch, gathered.episodes
    made = episodes.end < (batch.offset + batch.lengths)[episodes.row]  # (E,) the others were cut off
    place, right = episodes.end[made], episodes.J_after[made] >= 0.5
    masks = {kind: torch.zeros_like(batch.is_action) for kind in KINDS}
    masks["right"][place[right]] = True
    masks["wrong"][place[~right]] = True
    return masks


def grad_log_odds(model: Llama, batch: Batch, places: Tensor, stop: int, config: RunConfig) -> list[Tensor]:
    """grad d, in the shapes of the parameters; `places` (N,) bool."""
    model.zero_grad(set_to_none=True)
    for part in micro_batches(batch.lengths, config.micro_batch_tokens):
        micro, here = batch.take(part), places[batch.flat(part)].nonzero().squeeze(1)  # (n,) of this part
        packed = Packed.of(micro.lengths)
        hidden = model(micro.tokens, packed.position_ids, packed)  # (N,C)
        logprob, _ = kernels.token_logprobs(hidden[here - 1], model.head, torch.full_like(here, stop), config.temperature)
        logprob = logprob.clamp(max=-1e-6)  # log-odds of certainty are infinite
        ((logprob - torch.log1p(-logprob.exp())).sum() / places.sum()).backward()
    return taken_gradient(model)


def grad_loss(model: Llama, batch: Batch, value: Tensor, config: RunConfig) -> list[Tensor]:
    """grad of - sum_t value_t log pi(a_t); value (N,)."""
    model.zero_grad(set_to_none=True)
    for part in micro_batches(batch.lengths, config.micro_batch_tokens):
        logprob, _, action = score(model, batch.take(part), config.temperature)
        likelihood_loss(logprob, value[batch.flat(part)][action], torch.ones_like(logprob)).backward()
    return taken_gradient(model)


def taken_gradient(model: Llama) -> list[Tensor]:
    """What backward passes have summed up, in the shapes of the parameters, 0 where they left nothing; the model forgets it."""
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return gradient


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Of two directions in parameter space."""
    return sum(float((x * y).sum()) for x, y in zip(a, b))


@torch.no_grad()
def influences(model: Llama, batch: Batch, direction: Sequence[Tensor], config: RunConfig) -> Tensor:
    """i_t of every token for the d whose gradient is `direction`, by (2): (N,), 0 where no action. The model is as it was."""
    h, kept = RISE / dot(direction, direction), [p.clone() for p in model.parameters()]

    def log_probs(step: float) -> Tensor:
        for p, old, way in zip(model.parameters(), kept, direction):
            p.copy_(old + step * way)
        return rescore(model, batch, config)

    ahead, behind = log_probs(h), log_probs(-h)
    for p, old in zip(model.parameters(), kept):
        p.copy_(old)
    return (ahead - behind) / (2 * h)  # (2)


def contributions(model: Llama, gathered: Gathered, kinds: dict[str, Tensor], ways: dict[str, list[Tensor]],
                  config: RunConfig, arms: dict[str, RunConfig]) -> dict[str, dict[str, dict]]:
    """(1) for each kind of place, credit and group of tokens, eta included: {"value", "low", "high"}, intervals over problems.

    kinds: the decisions, (N,) bool each; ways: their grad d. A's mean over a group is taken off first. On average this changes
    nothing, since E[grad log pi] = 0, and it is most of the noise.
    """
    batch = gathered.batch
    influence = {kind: influences(model, batch, way, config) for kind, way in ways.items()}  # (N,) each
    _, problem = batch.prompt_id[batch.row].unique(return_inverse=True)  # (N,)
    P = int(problem.max()) + 1
    found: dict[str, dict[str, dict]] = {kind: {} for kind in KINDS}
    for arm, own in arms.items():
        weight = token_weights(batch, own.loss_norm, own.thinking_budget, own.truncated)  # (N,)
        advantage = METHODS[own.algorithm].credit(batch, gathered.episodes, own)  # (N,)
        gradient = grad_loss(model, batch, weight * advantage, own)
        eta = STEP / max(dot(gradient, gradient) ** 0.5, 1e-12)
        for kind, other in zip(KINDS, reversed(KINDS)):
            here, there = kinds[kind], kinds[other]
            parts = {}
            for name, mask in (("decisions there", here), (f"decisions where it is {other}", there),
                               ("other tokens", batch.is_action & ~here & ~there)):
                centred = advantage - (weight * advantage * mask).sum() / (weight * mask).sum().clamp(min=1e-12)
                parts[name] = torch.zeros(P).index_add(0, problem, eta * weight * centred * influence[kind] * mask)  # (P,)
            parts = {"all tokens": torch.stack(list(parts.values())).sum(0), **parts}
            found[kind][arm] = {name: bootstrap(P * part.numpy()) for name, part in parts.items()}
    return found


def table(model: Llama, gathered: Gathered, stop: int, config: RunConfig, arms: dict[str, RunConfig]) -> str:
    """Markdown: how often the policy stops, how much both decisions are one, and (1) for every credit."""
    batch, kinds = gathered.batch, decisions(gathered)
    for kind, places in kinds.items():
        if not places.any():
            raise UserError(f"there is no place where a forced answer is {kind}: ask for more --problems")
    ways = {kind: grad_log_odds(model, batch, places, stop, config) for kind, places in kinds.items()}
    wrong, right = ways.values()
    cosine = dot(wrong, right) / (dot(wrong, wrong) * dot(right, right)) ** 0.5
    stops = {kind: float((batch.tokens[places] == stop).float().mean()) for kind, places in kinds.items()}
    text = [f"{len(batch.lengths)} rollouts, {float(batch.reward.mean()):.3f} of them right. The policy stops at "
            + " and at ".join(f"{stops[kind]:.3f} of the {int(places.sum())} places where a forced answer is {kind}"
                              for kind, places in kinds.items())
            + f". The gradients of these two decisions have cosine {cosine:.2f}.", ""]
    for kind, rows in contributions(model, gathered, kinds, ways, config, arms).items():
        names = list(next(iter(rows.values())))
        text += [f"What a step of length {STEP} adds to the log-odds of stopping where a forced answer is {kind}, by the tokens "
                 "that add it:", "", f"| credit | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        text += [f"| {arm} | " + " | ".join(f"{x['value']:+.3f} [{x['low']:+.3f} {x['high']:+.3f}]" for x in row.values()) + " |"
                 for arm, row in rows.items()]
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    command(main)
