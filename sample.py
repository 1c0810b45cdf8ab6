"""Watch a trained policy think, and stop it whenever you like.

    python sample.py out/small --prompt "3 7 4 target 25"             the thinking as it is made, then the answer
    python sample.py out/small --prompt "3 7 4 target 25" --progress  and after every episode J, from forced answers
    python sample.py out/small --budget 18,54,108                     one trace, stopped at several budgets side by side

A budget counts thinking tokens. When it is used up, the policy is forced to answer. Without --prompt a test problem is drawn.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from data.countdown import Countdown
from nanomrt import checkpoint
from nanomrt.config import RunConfig, UserError, read_config
from nanomrt.model import Llama
from nanomrt.rollout import branch
from nanomrt.sampler import Sampling, Segments, prefill


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, such as out/small")
    parser.add_argument("--prompt", help="numbers and a target, such as '3 7 4 target 25'")
    parser.add_argument("--budget", default="", help="thinking tokens; several, separated by commas, are shown side by side")
    parser.add_argument("--progress", action="store_true", help="show J after every episode")
    parser.add_argument("--forks", type=int, default=8, help="forced answers per J (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the likeliest k tokens only; 0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    model, task, config = load_run(args.run, args.device)
    try:
        problem = task.parse(args.prompt) if args.prompt else task.problems("test", 1, args.seed)[0]
        budgets = sorted(int(word) for word in (args.budget or str(config.thinking_budget)).split(","))
    except ValueError as error:
        raise UserError(str(error)) from None
    room = model.config.max_position_embeddings - len(task.prompt(problem)) - 2 * (len(task.forced_stop) + task.answer_tokens)
    if not 0 <= budgets[0] <= budgets[-1] <= room:
        raise UserError(f"--budget must lie in 0..{room}: the model's context holds no more")
    sampling = Sampling(1, (), args.temperature, args.top_k, args.top_p)
    generator = torch.Generator().manual_seed(args.seed)
    prompt = task.prompt(problem)

    def answers(thinking: list[int], cache: Segments, count: int) -> list[list[int]]:
        """`count` answers forced after `thinking`."""
        limit = replace(sampling, max_new_tokens=task.answer_tokens, stop_ids=(task.stop,))
        return branch(model, cache, [0] * count, [prompt + thinking] * count, [task.forced_stop] * count, limit, generator).rows()

    def right(row: list[int]) -> float:
        return task.grade(problem, task.tokenizer.decode(row))

    def J(thinking: list[int], cache: Segments) -> str:
        return f"J {sum(map(right, answers(thinking, cache, args.forks))) / args.forks:.2f}" if args.progress else ""

    thinking, cache = [], prefill(model, [prompt])
    print(f"{task.show(prompt):<50} {J(thinking, cache)}")
    for episode, cache in think(model, task, prompt, budgets[-1], sampling, generator):
        thinking = thinking + episode
        print(f"  {task.show(episode):<48} {J(thinking, cache)}", flush=True)
    if len(budgets) > 1:
        print(f"\n{'budget':>6} {'used':>6}  answer")
    for budget in budgets:
        stopped = thinking[:budget]
        [row] = answers(stopped, cache, 1)
        verdict = "right" if right(row) else "wrong"
        print(f"{budget:>6} {len(stopped):>6}  " if len(budgets) > 1 else "  ", f"{task.show(row)}   {verdict}", sep="")
    return 0


def think(model: Llama, task: Countdown, prompt: list[int], budget: int, sampling: Sampling,
          generator: torch.Generator) -> Iterator[tuple[list[int], Segments]]:
    """Each episode as soon as it is complete (or the budget is used up), with a cache that holds all tokens so far."""
    marks = (task.open_episode, task.close_thinking, task.stop)
    context, episode, cache = list(prompt), [], prefill(model, [prompt])
    left = budget
    while left:
        samples = branch(model, cache, [0], [context], [[]], replace(sampling, max_new_tokens=left, stop_ids=marks), generator)
        new, cache = samples.rows()[0][1:], samples.segments()  # the first token is the context's last one, given again
        left -= len(new)
        context = context + new
        if not samples.stopped[0]:
            yield episode + new, cache
            return
        *rest, mark = new
        episode = episode + rest
        if mark != task.open_episode:
            if episode:
                yield episode, cache
            return
        if episode:
            yield episode, cache
        episode = [mark]
    if episode:
        yield episode, cache


def load_run(run: Path, device: str) -> tuple[Llama, Countdown, RunConfig]:
    """The newest good checkpoint of a run, its task and its config."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run: it has no config.json; train one with python train.py config/small.py")
    try:
        config = read_config(run / "config.json")
        return checkpoint.load_model(checkpoint.newest(run / "checkpoints"), device), Countdown.from_config(config), config
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
