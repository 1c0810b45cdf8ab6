"""Watch a trained policy think, and stop it whenever you like.

    python sample.py out/small --prompt "3 7 4 target 25"             the thinking as it is made, then the answer
    python sample.py out/small --prompt "3 7 4 target 25" --progress  and after every episode J, from forced answers
    python sample.py out/small --budget 18,54,108                     one trace, stopped at several budgets side by side

A budget counts thinking tokens. When it is used up, the policy is forced to answer. Without --prompt a test problem is drawn.
One seed is one trace: neither --progress nor a smaller budget changes what is thought up to there.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from data import Task, load_task
from nanomrt import checkpoint
from nanomrt.config import RunConfig, UserError, command
from nanomrt.model import Llama
from nanomrt.rollout import branch
from nanomrt.run import generator_for, open_run
from nanomrt.sampler import Sampling, Segments, prefill


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, such as out/small, or one of its checkpoints")
    parser.add_argument("--prompt", help="numbers and a target, such as '3 7 4 target 25'; of GSM8K '… #### 7'")
    parser.add_argument("--budget", default="", help="thinking tokens; several, separated by commas, are shown side by side")
    parser.add_argument("--progress", action="store_true", help="show J after every episode")
    parser.add_argument("--forks", type=int, default=8, help="forced answers per J (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the likeliest k tokens only; 0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)

    check(args)
    model, task, config = load_run(args.run, args.device)
    problem = task.parse(args.prompt) if args.prompt is not None else task.problems("test", 1, args.seed)[0]
    try:
        budgets = sorted(int(word) for word in (args.budget or str(config.thinking_budget)).split(","))
    except ValueError:
        raise UserError(f"--budget={args.budget!r} must be whole numbers of tokens, such as 54 or 18,54,108") from None
    room = model.config.max_position_embeddings - len(task.prompt(problem)) - len(task.forced_stop) - task.answer_tokens
    if not 0 <= budgets[0] <= budgets[-1] <= room:
        raise UserError(f"--budget must lie in 0..{room}: the model's context holds no more")
    sampling = Sampling(1, (), args.temperature, args.top_k, args.top_p)
    prompt = task.prompt(problem)

    def answers(thinking: list[int], cache: Segments, count: int, stage: str) -> list[list[int]]:
        """`count` answers forced after `thinking`; `stage` names the random numbers that they draw. The last token before them is
        given once more: a `<try>` that used up the budget was never fed."""
        *context, last = prompt + thinking
        generator = generator_for(args.seed, stage, len(thinking))
        limit = replace(sampling, max_new_tokens=task.answer_tokens, stop=(task.close_answer,))
        samples = branch(model, cache, [0] * count, [context] * count, [[last, *task.forced_stop]] * count, limit, generator)
        return [row[1:] for row in samples.rows()]

    def right(row: list[int]) -> float:
        return task.grade(problem, *task.texts([row]))

    def J(thinking: list[int], cache: Segments) -> str:
        if not args.progress:
            return ""
        return f"J {sum(map(right, answers(thinking, cache, args.forks, 'forks'))) / args.forks:.2f}"

    thinking, cache = [], prefill(model, [prompt])
    print(f"{task.show(prompt):<50} {J(thinking, cache)}")
    for episode, cache in think(model, task, prompt, budgets[-1], sampling, args.seed):
        thinking = thinking + episode
        print(f"  {task.show(episode):<48} {J(thinking, cache)}", flush=True)
    if len(budgets) > 1:
        print(f"\n{'budget':>6} {'used':>6}  answer")
    for budget in budgets:
        stopped = thinking[:budget]
        [row] = answers(stopped, cache, 1, "answer")
        verdict = "right" if right(row) else "wrong"
        print(f"{budget:>6} {len(stopped):>6}  " if len(budgets) > 1 else "  ", f"{task.show(row)}   {verdict}", sep="")
    sys.stdout.flush()  # a reader who has left is noticed here, and not at exit
    return 0


def think(model: Llama, task: Task, prompt: list[int], budget: int, sampling: Sampling,
          seed: int) -> Iterator[tuple[list[int], Segments]]:
    """Each episode as soon as it is complete (or the budget is used up), with a cache of all tokens before its last one.

    Each piece draws from a generator of its own, so that the budget does not change what is thought before it is used up.
    """
    opening = (task.open_episode, task.go_back)
    context, episode, cache = list(prompt), [], prefill(model, [prompt])
    left = budget
    while left:
        limit = replace(sampling, max_new_tokens=left, stop=(*opening, task.close_thinking, task.close_answer))
        generator = generator_for(seed, "think", len(context))
        samples = branch(model, cache, [0], [context], [[]], limit, generator)
        new, cache = samples.rows()[0][1:], samples.segments()  # the first token is the context's last one, given again
        left -= len(new)
        context = context + new
        *rest, mark = new if samples.stopped[0] else [*new, None]
        episode = episode + rest
        if episode:
            yield episode, cache
        if mark not in opening:
            return
        episode = [mark]
    if episode:  # the budget ends with a `<try>`
        yield episode, cache


def check(args: argparse.Namespace) -> None:
    """Raises UserError for a number that nothing can be sampled with."""
    rules = [(0 <= args.temperature < float("inf"), f"--temperature={args.temperature} must be 0 (greedy) or more"),
             (args.top_k >= 0, f"--top-k={args.top_k} must be 0 (off) or more"),
             (0 < args.top_p <= 1, f"--top-p={args.top_p} must lie in 0..1, above 0; 1 is off"),
             (args.forks >= 1, f"--forks={args.forks} must be at least 1"),
             (args.device == "cpu" or torch.cuda.is_available(), "--device=cuda, but PyTorch sees no GPU: use --device=cpu")]
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def load_run(run: Path, device: str) -> tuple[Llama, Task, RunConfig]:
    """The newest good checkpoint of a run, or the one that `run` names itself; its task and its config."""
    chosen = run if (run / "model.safetensors").is_file() else None
    config, folder = open_run(run.resolve().parent.parent if chosen else run, chosen)  # run/checkpoints/step-000060
    return checkpoint.load_model(folder, device), load_task(config, folder), config


if __name__ == "__main__":
    try:
        command(main)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere, in silence
