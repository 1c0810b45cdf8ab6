"""How good is a policy at every thinking budget? One run, or several side by side.

    python evaluate.py out/small                                   test and OOD problems; a table and a figure
    python evaluate.py out/small out/small-alpha=0.0 --figure mrt-against-grpo.png
    python evaluate.py out/small --test-time                       and what more tokens per problem can buy (nanomrt/search.py)

Three questions, each answered with a 95 % interval over problems:
- As trained: accuracy, tokens per right answer (those of whole responses), pass@k and maj@k of rollouts under the training
  budget. A rollout that has not answered by then scores 0, as in training.
- Stopped: J(b), the accuracy of a greedy answer forced after b thinking tokens, for a grid of b that reaches past the
  training budget, and the regret (metrics.py) of this curve: to an oracle, to a majority of answers, and to the best J of all
  runs on the command line.
- Forced to go on (extrapolation): the same curve when every `</think>` is replaced by a new attempt. Does the policy make
  use of budgets that it was never trained with?

Dimension key: B rollouts, P problems, G samples per problem, b budgets of the grid.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Task, load_task
from nanomrt import checkpoint, report, search
from nanomrt.config import TASK_KEYS, RunConfig, UserError, command
from nanomrt.files import write_json
from nanomrt.metrics import bootstrap, empirical_best, maj_at_k, normalised_regret, pass_at_k, ratio, regret_to_maj
from nanomrt.model import Llama
from nanomrt.rollout import Rollouts, force_answers, roll_out, training_sampling
from nanomrt.run import choose_device, generator_for, open_run
from nanomrt.verifier import cached_verifier

ATTEMPTS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16)  # the grid of budgets, in attempts
ROWS = 512  # rollouts sampled at a time: bounds the memory, does not change what is estimated
VOTES = 4  # p of [maj@p]_j
PROBLEM_KEYS = ("task", *(name for keys in TASK_KEYS.values() for name in keys), "eval_problems")  # which are asked


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Evaluate runs: a table, a figure, and `test` and `ood` in summary.json.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, such as out/small")
    parser.add_argument("--figure", type=Path, help="where to draw (default: figures/budget.png in the first run)")
    parser.add_argument("--test-time", action="store_true",
                        help="votes, a verifier's choice, beam search and endless thinking; trains the verifier if need be")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the run's own")
    args = parser.parse_args(argv)
    figure = args.figure or args.runs[0] / "figures" / "budget.png"
    opened = [open_run(run) for run in args.runs]  # complain before the first of several evaluations, not after it
    for run in args.runs:
        report.check_writable(run)
    report.check_figure(figure)
    names = [run.name for run in args.runs]
    labels = [run.name if names.count(run.name) == 1 else str(run) for run in args.runs]
    agree({label: asdict(config) for label, (config, _) in zip(labels, opened)}, PROBLEM_KEYS,
          "runs are compared by the same problems, so evaluate these two apart")
    summaries, folders = {}, {}
    for run, label, (config, folder) in zip(args.runs, labels, opened):
        config = replace(config, device=args.device or config.device)
        model, task = checkpoint.load_model(folder, choose_device(config)), load_task(config, folder)
        sections = evaluate_splits(model, task, config, ["test", "ood"], bars=True)
        if args.test_time:
            verifier = cached_verifier(run, folder, model, task, config, bar="verifier")
            sections["test_time"] = search.measure(model, verifier, task, distinct(task, "test", config.eval_problems, "eval"),
                                                   config, "eval", bar="test time")
        summaries[label], folders[label] = update_summary(run / "summary.json", sections), run
    for split in ("test", "ood"):  # the best of all is known only now
        for label, section in against_best({label: summary[split] for label, summary in summaries.items()}).items():
            summaries[label] = update_summary(folders[label] / "summary.json", {split: section})
    print(summary_table(summaries))
    budget_figure(figure, {label: summary["test"] for label, summary in summaries.items()})
    print(f"\n{figure}")
    if args.test_time:
        for label, summary in summaries.items():
            figure = folders[label] / "figures" / "test_time.png"
            print(f"\n{label}, test problems\n{search_table(summary['test_time'])}\n\n{figure}")
            search_figure(figure, summary["test_time"], summary["test"]["budget_curve"])
    return 0


def agree(runs: dict[str, dict], keys: Sequence[str], reason: str) -> None:
    """Raises UserError with the reason unless these keys of the runs' configs are the same for all. runs: {name: config}."""
    first, expected = next(iter(runs.items()))
    for name, values in runs.items():
        if unlike := [key for key in keys if values[key] != expected[key]]:
            mine, theirs = (", ".join(f"{key}={config[key]}" for key in unlike) for config in (values, expected))
            raise UserError(f"{name} has {mine}, but {first} has {theirs}: {reason}")


# --- Measuring ---


def evaluate_splits(model: Llama, task: Task, config: RunConfig, splits: Iterable[str], brief: bool = False,
                    bars: bool = False) -> dict[str, dict]:
    """A section for each split. The seed is fixed, so that every run of a task answers the same problems."""
    return {split: evaluate_policy(model, task, distinct(task, split, config.eval_problems, "eval"), config, "eval", brief,
                                   split if bars else "") for split in splits}


def distinct(task: Task, split: str, count: int, seed: int | str) -> list:
    """`count` different problems of a split; fewer if twice as many draws find nothing new."""
    draws, found, known = count, {}, -1
    while known < len(found) < count:
        known = len(found)
        for problem in task.problems(split, draws, seed):
            found.setdefault(problem.key, problem)
        draws *= 2
    return list(found.values())[:count]


def evaluate_policy(model: Llama, task: Task, problems: Sequence, config: RunConfig, seed: int | str,
                    brief: bool = False, bar: str = "") -> dict:
    """A section of summary.json. Every measured leaf is {"value", "low", "high"}; `tokens` of a curve and `habits` are plain
    means; `per_problem` holds means over a problem's samples, for whoever compares runs.

    `brief` leaves out the two measurements that cost most: majorities of forced answers, and extrapolation. `bar` is what a
    progress bar is called; '' draws none. Tokens per right answer is inf if no answer is right.
    """
    if not problems:
        raise ValueError("evaluate_policy needs at least one problem")
    P, G, chunk = len(problems), config.eval_samples, max(1, ROWS // config.eval_samples)
    grid, starts = budget_grid(task, config), range(0, P, chunk)
    parts = [sample_chunk(model, task, problems[start : start + chunk], config, grid, generator_for(seed, "evaluate", start),
                          brief)
             for start in tqdm(starts, desc=bar, disable=not bar)]
    of = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    of = {name: column.reshape(P, G, *column.shape[1:]) for name, column in of.items()}  # (P,G) or (P,G,b)
    right, J = of["right"], of["J"]
    votes = [[text or None for text in row] for row in of["vote"].tolist()]
    horizons = sorted({h for h in (config.thinking_budget // 2, config.thinking_budget, config.eval_budget) if h > 0})
    section = {
        "problems": P, "samples": G, "thinking_budget": config.thinking_budget,
        "accuracy": bootstrap(right.mean(1)),
        "tokens_per_correct": bootstrap(np.stack([of["tokens"].sum(1), right.sum(1)], axis=1), ratio),
        "mean_thinking_tokens": bootstrap(of["thinking"].mean(1)),
        "pass_at_k": {str(k): bootstrap([pass_at_k(G, int(c), k) for c in right.sum(1)])
                      for k in sorted({2**i for i in range(G.bit_length())} | {G})},
        "maj_at_k": {str(G): bootstrap([maj_at_k(votes[p], right[p]) for p in range(P)])},
        "budget_curve": curve(grid, J, of["spent"]),
        "regret": {str(h): bootstrap(normalised_regret(grid, J.mean(1), h)) for h in horizons},
        "per_problem": rounded({"right": right.mean(1), "tokens": of["tokens"].mean(1),
                                **{f"regret to {h}": normalised_regret(grid, J.mean(1), h) for h in horizons}}),
        "habits": task.habits([problem for problem in problems for _ in range(G)], of["response"].flatten().tolist(),
                              config.thinking_budget),
    }
    if not brief:
        more = (VOTES - 1) * task.forced_tokens  # what a majority costs more than one answer
        to_maj = {h: regret_to_maj(grid, J.mean(1), of["maj"].mean(1), more, h) for h in horizons}
        section |= {
            "maj_curve": curve(grid, of["maj"], of["spent"] + more),
            "regret_to_maj": {str(h): bootstrap(values) for h, values in to_maj.items()},
            "extrapolation": curve(grid, of["J_on"], of["spent_on"]),
        }
        section["per_problem"] |= rounded({f"maj: regret to {h}": values for h, values in to_maj.items()})
    return against_best({"this policy": section})["this policy"]


def against_best(sections: dict[str, dict]) -> dict[str, dict]:
    """The same sections with `regret_to_best`: the best J of all that `best_of` names is the comparator. The intervals are those
    of the policies, with the comparator taken as it was measured."""
    curves = [([row["budget"] for row in section["budget_curve"]], [row["J"]["value"] for row in section["budget_curve"]])
              for section in sections.values()]
    ahead = lambda regret, h: {name: x - (1 - empirical_best(curves, int(h))) for name, x in regret.items()}
    return {label: section | {"regret_to_best": {h: ahead(regret, h) for h, regret in section["regret"].items()},
                              "best_of": list(sections)}
            for label, section in sections.items()}


def budget_grid(task: Task, config: RunConfig) -> list[int]:
    """The budgets at which thinking is stopped, in tokens: 0, some whole attempts, and the largest budget itself."""
    reach = max(config.eval_budget, config.thinking_budget)
    return sorted({n * task.attempt_tokens for n in ATTEMPTS if n * task.attempt_tokens < reach} | {reach})


def rounded(columns: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Columns (P,) for a JSON file."""
    return {name: [round(float(x), 4) for x in values] for name, values in columns.items()}


def curve(grid: Sequence[int], J: np.ndarray, spent: np.ndarray) -> list[dict]:
    """One row per budget; J and spent (P,G,b)."""
    return [{"budget": b, "tokens": float(spent[..., i].mean()), "J": bootstrap(J[..., i].mean(1))}
            for i, b in enumerate(grid)]


def sample_chunk(model: Llama, task: Task, problems: Sequence, config: RunConfig, grid: Sequence[int],
                 generator: torch.Generator, brief: bool) -> dict[str, np.ndarray]:
    """What is measured of G rollouts of each problem: columns with a row per rollout, (B,), or (B,b) along the grid."""
    training = training_sampling(task, config)
    cap, answer = training.max_new_tokens, task.forced_tokens
    # One pass serves all numbers of free rollouts: cut at `cap` tokens, a longer rollout has the distribution of a training
    # rollout. If it stops later than that, the cut one holds no complete answer and scores 0.
    free = replace(training, max_new_tokens=grid[-1] + answer)
    on = replace(free, instead=(task.close_thinking, task.open_episode))
    same = generator.clone_state()  # the same random numbers: both passes are the same rollouts up to the first `</think>`
    rollouts = roll_out(model, task, problems, config.eval_samples, free, generator)
    responses = rollouts.responses()
    length = np.array([len(response) for response in responses])  # (B,)
    thinking = np.array([task.thinking_tokens(response) for response in responses])  # (B,)
    J, spent = stopped_at(model, task, rollouts, grid, 1, 0.0, generator)  # (B,b)
    columns = {}
    if not brief:
        columns["maj"], _ = stopped_at(model, task, rollouts, grid, VOTES, config.temperature, generator)  # (B,b)
        extended = roll_out(model, task, problems, config.eval_samples, on, same)
        columns["J_on"], spent_on = stopped_at(model, task, extended, grid, 1, 0.0, same)  # (B,b)
        columns["spent_on"] = spent_on + answer
    return {
        "right": np.array(rollouts.reward) * (length <= cap),
        "tokens": length.clip(max=cap),
        "thinking": thinking.clip(max=cap),
        "vote": np.array([task.answer(response[:cap]) for response in responses]),
        "response": np.fromiter((response[:cap] for response in responses), dtype=object),
        "J": J, "spent": spent + answer,  # an answer counts at its full allowance, which a well-formed one uses up
        **columns,
    }


def stopped_at(model: Llama, task: Task, rollouts: Rollouts, grid: Sequence[int], votes: int, temperature: float,
               generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The verdict on the majority of `votes` answers forced after b thinking tokens or at their end, and the tokens until then:
    (B,b). A majority of one greedy answer is J."""
    thinking = np.array([task.thinking_tokens(response) for response in rollouts.responses()])  # (B,)
    spent = np.minimum(thinking[:, None], np.array(grid))  # (B,b)
    position = (spent + np.array(rollouts.prompt_length)[:, None]).flatten().tolist()
    row = np.arange(len(spent)).repeat(len(grid)).tolist()
    forked = force_answers(model, task, rollouts, row, position, votes, temperature, generator)
    won = [maj_at_k([task.answer(answer) or None for answer, _ in branches], [verdict for _, verdict in branches])
           for branches in forked.branches]
    return np.array(won).reshape(spent.shape), spent


# --- Showing ---


def update_summary(path: Path, sections: dict[str, dict]) -> dict:
    """Put `sections` into summary.json, keep its other keys, and return all of it. The file is replaced in one step."""
    summary = (json.loads(path.read_text()) if path.is_file() else {}) | sections
    write_json(path, summary)
    return summary


def summary_table(summaries: dict[str, dict]) -> str:
    """A line per run and section (warm_start, test, ood), each number with its interval. {label: summary} -> text."""
    lines = [(label, name, summary[name]) for label, summary in summaries.items()
             for name in ("warm_start", "test", "ood") if name in summary]
    horizons = sorted({h for _, _, section in lines for h in section["regret"]}, key=int)
    rows = [("run", "problems", "accuracy", "tokens per right", "thinking tokens", *(f"regret to {h}" for h in horizons))]
    rows += [(label, name, show(section["accuracy"], 3), show(section["tokens_per_correct"], 1),
              show(section["mean_thinking_tokens"], 1), *(show(section["regret"].get(h), 3) for h in horizons))
             for label, name, section in lines]
    return aligned(rows)


def search_table(section: dict) -> str:
    """A line per method and N (or attempts of a linearised trace), with what it costs."""
    rows = [("method", "N", "accuracy", "tokens per problem", "tokens per right", "majority for as many")]
    rows += [(name, n, show(at["accuracy"], 3), f"{at['tokens']:.1f}", show(at["tokens_per_correct"], 1),
              "-" if at["majority"] is None else f"{at['majority']:.3f}")
             for name, by_n in section["methods"].items() for n, at in by_n.items()]
    return aligned(rows)


def show(leaf: dict | None, digits: int) -> str:
    return f"{leaf['value']:.{digits}f} [{leaf['low']:.{digits}f} {leaf['high']:.{digits}f}]" if leaf else "-"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def budget_figure(path: Path, sections: dict[str, dict]) -> None:
    """Accuracy against thinking budget, runs overlaid: stopped (solid, its regret shaded) and forced to go on (dashed)."""
    figure = report.blank_figure(7.5, 4.5)
    axes = figure.subplots()
    for (label, section), colour in zip(sections.items(), report.COLOURS * (1 + len(sections) // len(report.COLOURS))):
        for name, style, text in (("budget_curve", "-", label), ("extrapolation", "--", None)):
            if name not in section:
                continue  # a brief section
            budget = [row["budget"] for row in section[name]]
            value, low, high = ([row["J"][key] for row in section[name]] for key in ("value", "low", "high"))
            axes.plot(budget, value, style, color=colour, label=text, linewidth=1.8, marker="o", markersize=3)
            if name == "budget_curve":
                axes.fill_between(budget, low, high, color=colour, alpha=0.2, linewidth=0)
                axes.fill_between(budget, value, 1, color=colour, alpha=0.04, linewidth=0)
    for budget in sorted({section["thinking_budget"] for section in sections.values()}):
        axes.axvline(budget, color="0.4", linewidth=1, linestyle=":")
        axes.text(budget, 0.985, " training budget", color="0.4", fontsize=8, va="top")
    axes.plot([], [], "--", color="0.4", label="thinking forced to go on")
    axes.fill_between([], [], color="0.4", alpha=0.12, linewidth=0, label="regret: what an oracle is ahead")
    axes.set(xlabel="thinking budget b, tokens", ylabel="accuracy of an answer forced at b, J(b)", ylim=(0, 1))
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    save_figure(figure, path)


def search_figure(path: Path, section: dict, budget_curve: Sequence[dict]) -> None:
    """Accuracy against generated tokens per problem: every method, and the policy alone, stopped at its budgets."""
    figure = report.blank_figure(7.5, 4.5)
    axes = figure.subplots()
    methods = {name: list(by_n.values()) for name, by_n in section["methods"].items()}
    alone = [{"tokens": row["tokens"], "accuracy": row["J"]} for row in budget_curve]
    for (name, points), colour in zip({"the policy alone, stopped": alone, **methods}.items(), ("#000000", *report.COLOURS)):
        tokens = [point["tokens"] for point in points]
        value, low, high = ([point["accuracy"][key] for point in points] for key in ("value", "low", "high"))
        axes.plot(tokens, value, "--" if name == "oracle" else "-", color=colour, label=name.replace("_", " "), linewidth=1.8,
                  marker="o", markersize=3)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.1, linewidth=0)
    axes.set(xlabel="generated tokens per problem", ylabel="accuracy", ylim=(0, 1), xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    command(main)
