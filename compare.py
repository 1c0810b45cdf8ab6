"""Which method is best, and how sure is that? Trains what is missing, evaluates it on the same problems, writes one table.

    python compare.py config/study.py --algorithms grpo,mrt_online,length_penalty --seeds 3
    python compare.py config/study.py --algorithms grpo,mrt_online,mrt_online+alpha=2 --seeds 0,1 --split validation
    python compare.py config/small.py --algorithms small_grpo,mrt_online --seeds 5

An arm is an algorithm, or the name of a config file beside this one (`small_grpo`), perhaps with keys of its own
(`mrt_online+alpha=2`); the first arm is the baseline; any other `--key=value` holds for all. Runs of one seed share their warm
start. Every finished run is one file in results/<config's name>/: what has one isn't trained again (if its config was another, a
warning says so), and an interrupted run goes on where it was. Methods are compared three ways, because they spend differently:

    equal steps     after all steps
    equal tokens    when as many tokens have been sampled, forks included, as the baseline samples in all its steps
    equal time      when as much time has been spent; on a CPU that is the process's own CPU time, on one thread

Between two checkpoints values are interpolated linearly. An arm that never gets so far is shown at its end. Intervals are 95 %
bootstrap intervals over seeds and problems, both drawn with replacement; a difference is paired: same seeds, same problems.
"""

import argparse
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np

import train
from data.countdown import Countdown
from evaluate import COLOURS, distinct, evaluate_policy
from nanomrt import checkpoint, report
from nanomrt.config import (
    ALGORITHMS,
    RunConfig,
    UserError,
    differences,
    load_config,
    parse_arm,
    parse_overrides,
    read_config,
    run_name,
)
from nanomrt.metrics import ratio
from nanomrt.run import choose_device, device_of
from nanomrt.warmstart import cached_warm_start, warm_folder

RESAMPLES = 1000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path, help="a config file, such as config/study.py")
    parser.add_argument("--algorithms", required=True, help="arms, separated by commas; the first is the baseline")
    parser.add_argument("--seeds", default="3", help="how many, or which: 3 is 0,1,2 and 3, is seed 3 alone")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="validation: to choose between settings")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time (default: one per core, or one on a GPU)")
    parser.add_argument("--report", action="store_true", help="train nothing: what the runs that are there say")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--name", default="comparison", help="of the table and the figures")
    args, rest = parser.parse_known_args(argv)
    folder = args.results / args.config.stem
    try:
        seeds = parse_seeds(args.seeds)
        shared = parse_overrides(rest)
        jobs = [Job.of(args.config, arm, seed, shared, folder, args.split)
                for arm in args.algorithms.split(",") for seed in seeds]
    except ValueError as error:
        raise UserError(str(error)) from None
    runs = [job.run for job in jobs]
    for run in runs:
        if runs.count(run) > 1:
            raise UserError(f"--algorithms={args.algorithms} --seeds={args.seeds} name the run {run.name} twice: leave one out")
    folder.mkdir(parents=True, exist_ok=True)
    if args.report:
        baseline, jobs = jobs[0].arm, [job for job in jobs if job.result.is_file()]
        if not jobs or jobs[0].arm != baseline:
            raise UserError(f"{folder} has no such run of {baseline}, the baseline: leave out --report to train it, or name "
                            "another arm first")
    for job in jobs:
        if job.result.is_file() and (changed := differences(json.loads(job.result.read_text())["config"], job.config)):
            print(f"warning: {job.result} was made with {changed}; remove it to train it anew", file=sys.stderr)
    run_all([job for job in jobs if not job.result.is_file()], args.jobs)
    arms: dict[str, list[dict]] = {}
    for job in jobs:
        arms.setdefault(job.arm, []).append(json.loads(job.result.read_text()))
    text = tables(arms)
    print(text)
    name = f"{args.name}{jobs[0].setting}"
    (folder / f"{name}.md").write_text(text + "\n")
    for kind, draw in (("curves", curves_figure), ("budget", budgets_figure), ("frontier", frontier_figure)):
        draw(folder / f"{name}-{kind}.png", arms)
    print(f"\n{folder}: {name}.md, {name}-curves.png, {name}-budget.png, {name}-frontier.png")
    return 0


def parse_seeds(text: str) -> list[int]:
    """'3' -> [0, 1, 2], '3,' -> [3], '0,4' -> [0, 4]. Raises ValueError with an example."""
    words = text.rstrip(",").split(",")
    if not all(word.isdecimal() for word in words) or text == "0":
        raise ValueError(f"--seeds={text}: give a number of seeds, such as 3, or the seeds themselves, such as 0,1,4 or 3,")
    return [int(word) for word in words] if "," in text else list(range(int(text)))


# --- Running ---


@dataclass(frozen=True)
class Job:
    """One run of one arm."""

    arm: str
    config_path: Path  # the comparison's, or that of the arm
    overrides: dict[str, str]
    config: RunConfig
    split: str
    setting: str  # what is unlike the config file for all arms, and the split: part of every name, so that nothing is mixed up
    result: Path  # where its file goes

    @classmethod
    def of(cls, config_path: Path, arm: str, seed: int, shared: dict[str, str], folder: Path, split: str) -> "Job":
        setting = run_name(config_path, shared).removeprefix(config_path.stem) + ("" if split == "test" else f"-{split}")
        name, *keys = arm.split("+")
        own, sibling = parse_overrides([f"--{key}" for key in keys]), config_path.with_name(f"{name}.py")
        if name not in ALGORITHMS and sibling.is_file():
            config_path = sibling
        else:
            own = {"algorithm": name, **own}
        overrides = {**shared, **own, "seed": str(seed)}
        if device_of(load_config(config_path, overrides)) == "cpu":
            overrides["threads"] = "1"
        config = load_config(config_path, overrides)
        return cls(arm, config_path, overrides, config, split, setting, folder / f"{arm}-seed={seed}{setting}.json")

    @property
    def run(self) -> Path:
        return Path(self.config.out_dir) / run_name(self.config_path, self.overrides)


def run_all(jobs: list[Job], processes: int) -> None:
    """Every job in a process of its own, `processes` at a time, the warm starts that they share first."""
    from tqdm import tqdm

    if not jobs:
        return
    processes = processes or (os.cpu_count() if device_of(jobs[0].config) == "cpu" else 1)
    first = {shared_start(job): job for job in jobs}  # any job that begins there knows how to make it
    steps = sum(job.config.steps for job in jobs)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent)
    with pool, tqdm(total=steps, unit="step", desc="all runs") as bar:
        waiting = {pool.submit(warm_start, job): [other for other in jobs if shared_start(other) == start]
                   for start, job in first.items()}
        running = dict.fromkeys(waiting)
        while running:
            for future in [f for f in running if f.done()]:
                del running[future]
                future.result()  # raises what the job raised
                running |= dict.fromkeys(pool.submit(run_job, job) for job in waiting.pop(future, ()))
            bar.update(sum(steps_done(job) for job in jobs) - bar.n)
            time.sleep(1)


def end_with_parent() -> None:
    """This process ends when the one that started it has. Else the runs of a killed comparison would go on, beside the same ones
    that the next comparison resumes. A run that is killed goes on from its last checkpoint."""

    def wait() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def steps_done(job: Job) -> int:
    """Finished RL steps of a run, for the progress bar."""
    path = job.run / "metrics.jsonl"
    return len(report.read_jsonl(path)) - 1 if path.is_file() else 0


def shared_start(job: Job) -> Path:
    """What two runs have in common if they begin with the same policy."""
    return Path(job.config.init_from) if job.config.init_from else warm_folder(job.config)


def warm_start(job: Job) -> None:
    """Train and cache a warm start, so that no two of the runs that share it do."""
    if not job.config.init_from:
        cached_warm_start(train.checked_task(job.config), job.config, choose_device(job.config), False)


def run_job(job: Job) -> None:
    """Train, or go on training; then evaluate every checkpoint; its file appears whole, at the end."""
    words = [str(job.config_path), *(f"--{name}={value}" for name, value in job.overrides.items())]
    job.run.parent.mkdir(parents=True, exist_ok=True)
    begun, threads = job.run / "config.json", job.config.threads
    try:
        before = read_config(begun) if begun.is_file() else job.config
        if before.threads != threads:
            raise ValueError(f"it wasn't trained with threads={threads}, so its CPU time can't be compared")
        if changed := differences(asdict(before), job.config):
            raise ValueError(f"it was trained with {changed}")
    except ValueError as error:
        raise UserError(f"{job.run} is there, but {error}: remove it, or train elsewhere with --out_dir=out/compare") from None
    if not (job.run / "summary.json").is_file():
        with open(f"{job.run}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
            code = train.main(words + ["--resume"] * begun.is_file())
        if code:
            raise UserError(f"{job.run} was interrupted: the same command goes on with it")
    report.write_json(job.result, evaluated(job), indent=None)


def evaluated(job: Job) -> dict:
    """The run's file: where it comes from, and a point per checkpoint, from the warm start (step 0) to the end."""
    config, (made, *rows) = job.config, report.read_jsonl(job.run / "metrics.jsonl")
    task, device = Countdown(config), choose_device(config)
    spent = {0: {"tokens": 0, "seconds": 0.0}} | {
        row["step"]: {"tokens": row["trace_tokens"] + row["fork_tokens"],
                      "seconds": row["seconds_cpu"] if device == "cpu" else row["seconds_total"]} for row in rows}
    folders = {0: Path(made.pop("start"))}
    folders |= {int(path.name.split("-")[1]): path for path in sorted((job.run / "checkpoints").glob("step-*"))}
    problems, points = distinct(task, job.split, config.eval_problems, "eval"), []
    for step, folder in folders.items():
        section = evaluate_policy(checkpoint.load_model(folder, device), task, problems, config, "eval", brief=True)
        points.append({"step": step, **spent[step], "thinking_tokens": section["mean_thinking_tokens"]["value"],
                       "curve": [[row["budget"], round(row["J"]["value"], 4)] for row in section["budget_curve"]],
                       "habits": section["habits"], "per_problem": section["per_problem"]})
    # The last folder is the trained policy's.
    harder = evaluate_policy(checkpoint.load_model(folder, device), task, distinct(task, "ood", config.eval_problems, "eval"),
                             config, "eval", brief=True)
    return {"arm": job.arm, **made, "points": points, "ood": harder["per_problem"]}


# --- Reading: what a comparison says ---

Values = dict[str, np.ndarray]  # of one arm: a name -> (seeds, problems)
METRICS: dict[str, tuple[Callable[[Values], float], int]] = {  # name: (statistic, digits)
    "accuracy": (lambda v: v["right"].mean(), 3),
    "tokens per right answer": (lambda v: ratio(np.stack([v["tokens"].ravel(), v["right"].ravel()], 1)), 1),
}


def metrics_of(values: Values) -> dict[str, tuple[Callable[[Values], float], int]]:
    """METRICS, and the regret to each horizon that was measured."""
    regrets = [name for name in values if name.startswith("regret")]
    return METRICS | {name: (lambda v, name=name: v[name].mean(), 3) for name in regrets}


def values_at(runs: Sequence[dict], axis: str, place: float) -> Values:
    """Every run's per-problem values where `axis` (step, tokens or seconds) is `place`, or at its end if it ends before."""
    rows = []
    for run in runs:
        points = run["points"]
        x = [point[axis] for point in points]
        b = min(int(np.searchsorted(x, place)), len(x) - 1)
        a, share = max(b - 1, 0), 1.0
        if 0 < b and place < x[b]:
            share = (place - x[a]) / (x[b] - x[a])
        rows.append({name: (1 - share) * np.array(points[a]["per_problem"][name]) + share * np.array(values)
                     for name, values in points[b]["per_problem"].items()})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def bootstrap(statistic: Callable[..., float], *arms: Values) -> tuple[float, float, float]:
    """Value and 95 % interval of a statistic of one or more arms: seeds and problems are drawn with replacement, the same ones
    for every arm. The arms must have the same seeds."""
    rng = np.random.default_rng(0)
    S, P = next(iter(arms[0].values())).shape
    drawn = []
    for _ in range(RESAMPLES):
        seeds, problems = rng.integers(S, size=S), rng.integers(P, size=P)
        drawn.append(statistic(*({name: x[seeds][:, problems] for name, x in arm.items()} for arm in arms)))
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    return float(statistic(*arms)), float(low), float(high)


def tables(arms: dict[str, list[dict]]) -> str:
    """Markdown: each arm at equal steps, tokens and time, its differences from the first one, what it knows when it is stopped
    early, and how it searches."""
    baseline = next(iter(arms))
    end = {axis: float(np.mean([run["points"][-1][axis] for run in arms[baseline]])) for axis in ("step", "tokens", "seconds")}
    unit = {"step": "steps", "tokens": "sampled tokens", "seconds": "seconds"}
    text = []
    for axis, title in (("step", "Equal steps"), ("tokens", "Equal tokens"), ("seconds", "Equal time")):
        start = values_at(arms[baseline], axis, 0)
        names = metrics_of(start)
        lines = [f"### {title}: {end[axis]:,.0f} {unit[axis]}", "",
                 f"| method | seeds | {' | '.join(names)} | accuracy, OOD | steps | tokens | seconds |",
                 "|---|---|" + "---|" * (len(names) + 4)]
        lines.append(line("warm start", start, names, len(arms[baseline]), "", (0, 0, 0)))
        for arm, runs in arms.items():
            reached = [np.mean([spent_at(run, axis, end[axis], other) for run in runs]) for other in unit]
            harder = cell(METRICS["accuracy"], out_of_distribution(runs)) if axis == "step" else ""
            lines.append(line(arm, values_at(runs, axis, end[axis]), names, len(runs), harder, reached))
        text += [*lines, ""]
    text += [f"### Differences from {baseline}", "",
             f"| method | at equal | {' | '.join(names)} | accuracy, OOD | gain in accuracy, times |",
             "|---|---|" + "---|" * (len(names) + 2)]
    for arm, runs in list(arms.items())[1:]:
        pairs = [(a, b) for a in arms[baseline] for b in runs if a["config"]["seed"] == b["config"]["seed"]]
        if not pairs:
            text.append(f"| {arm} | no seed in common |{' |' * (len(names) + 2)}")
            continue
        theirs, mine = ([pair[i] for pair in pairs] for i in (0, 1))
        for axis in unit:
            start, *reached = values_at(theirs, axis, 0), *(values_at(runs, axis, end[axis]) for runs in (mine, theirs))
            cells = [cell(difference(metric), *reached, sign="+") for metric in names.values()]
            cells.append(cell(difference(METRICS["accuracy"]), *map(out_of_distribution, (mine, theirs)), sign="+")
                         if axis == "step" else "")
            cells.append(cell((gains, 2), start, *reached))
            text.append(f"| {arm} | {unit[axis]} | {' | '.join(cells)} |")
    budgets = [budget for budget, _ in arms[baseline][0]["points"][0]["curve"]]
    text += ["", "### Accuracy when stopped after so many thinking tokens, after all steps", "",
             f"| method | {' | '.join(f'{budget:.0f}' for budget in budgets)} |", "|---|" + "---|" * len(budgets)]
    for arm, at, runs, _ in ends(arms):
        curve = np.mean([run["points"][at]["curve"] for run in runs], axis=0)[:, 1]  # over seeds
        text.append(f"| {arm} | {' | '.join(f'{J:.3f}' for J in curve)} |")
    habits = {arm: [run["points"][at]["habits"] for run in runs] for arm, at, runs, _ in ends(arms)}
    first, *others = sum(habits.values(), [])
    names = [name for name in first if all(name in other for other in others)]  # runs of an older commit know fewer
    text += ["", "### Habits after all steps", "", f"| method | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for arm, seeds in habits.items():
        text.append(f"| {arm} | {' | '.join(f'{np.mean([seed[name] for seed in seeds]):.2f}' for name in names)} |")
    return "\n".join(text)


def out_of_distribution(runs: Sequence[dict]) -> Values:
    return {"right": np.stack([np.array(run["ood"]["right"]) for run in runs])}


def difference(metric: tuple[Callable[[Values], float], int]) -> tuple[Callable[[Values, Values], float], int]:
    """Of a metric of two arms."""
    statistic, digits = metric
    return lambda mine, theirs: statistic(mine) - statistic(theirs), digits


def gains(start: Values, mine: Values, theirs: Values) -> float:
    """How many times as much accuracy one arm has gained since the start as another; of a gain that is none, inf."""
    begin, a, b = (values["right"].mean() for values in (start, mine, theirs))
    return (a - begin) / (b - begin) if b > begin else math.inf


def spent_at(run: dict, axis: str, place: float, other: str) -> float:
    """How much of `other` a run has spent where `axis` is `place`."""
    points = run["points"]
    return float(np.interp(place, [point[axis] for point in points], [point[other] for point in points]))


def cell(metric: tuple[Callable[..., float], int], *arms: Values, sign: str = "") -> str:
    statistic, digits = metric
    value, low, high = bootstrap(statistic, *arms)
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f} {high:{sign}.{digits}f}]"


def line(arm: str, values: Values, names: dict, seeds: int, ood: str, spent: Sequence[float]) -> str:
    cells = " | ".join(cell(metric, values) for metric in names.values())
    return f"| {arm} | {seeds} | {cells} | {ood} | " + " | ".join(f"{x:,.0f}" for x in spent) + " |"


# --- Figures ---


def look(i: int) -> tuple[str, str, str]:
    """Colour, dashes and marker of the i-th arm."""
    again = i // len(COLOURS)
    return COLOURS[i % len(COLOURS)], ("-", "--", ":")[again % 3], "os^"[again % 3]


def ends(arms: dict[str, list[dict]]) -> Iterator[tuple[str, int, list[dict], tuple[str, str, str]]]:
    """(label, which point of its runs, runs, look): the warm start, and every arm after all steps."""
    yield "warm start", 0, next(iter(arms.values())), ("0.5", "-", "o")
    for i, (arm, runs) in enumerate(arms.items()):
        yield arm, -1, runs, look(i)


def curves_figure(path: Path, arms: dict[str, list[dict]]) -> None:
    """Accuracy and tokens per right answer against steps, sampled tokens and time: the mean over seeds, and each seed."""
    figure = report.blank_figure(13, 6)
    axes = figure.subplots(2, 3, sharey="row")
    for i, (arm, runs) in enumerate(arms.items()):
        colour, dashes, marker = look(i)
        for column, (axis, unit) in enumerate((("step", 1), ("tokens", 1e6), ("seconds", 1))):
            x = np.array([[point[axis] / unit for point in run["points"]] for run in runs])  # (seeds, checkpoints)
            for row, (statistic, _) in enumerate(METRICS.values()):
                y = np.array([[statistic({k: np.array(v) for k, v in point["per_problem"].items()}) for point in run["points"]]
                              for run in runs])
                axes[row, column].plot(x.T, y.T, color=colour, alpha=0.2, linewidth=0.8)
                axes[row, column].plot(x.mean(0), y.mean(0), dashes, color=colour, label=arm, linewidth=1.8, marker=marker,
                                       markersize=3)
    for column, label in enumerate(("steps", "sampled tokens, forks included, millions", "seconds")):
        axes[1, column].set_xlabel(label)
    for row, name in enumerate(METRICS):
        axes[row, 0].set_ylabel(name)
    axes[1, 0].set_yscale("log")
    for panel in axes[1]:
        panel.yaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_minor_formatter("{x:.0f}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def budgets_figure(path: Path, arms: dict[str, list[dict]]) -> None:
    """J(b) of every arm at its end: the mean over seeds, and with few arms a band from the lowest seed to the highest. The star:
    where it stops by itself, on average."""
    many = len(arms) > 4
    figure = report.blank_figure(10 if many else 7.5, 4.5)
    axes = figure.subplots()
    for label, at, runs, (colour, dashes, marker) in ends(arms):
        curves = np.array([run["points"][at]["curve"] for run in runs])  # (seeds, budgets, 2)
        budget, J = curves[0, :, 0], curves[:, :, 1]
        axes.plot(budget, J.mean(0), dashes, color=colour, label=label, linewidth=1.8, marker=marker, markersize=3)
        if not many:
            axes.fill_between(budget, J.min(0), J.max(0), color=colour, alpha=0.12, linewidth=0)
        stops = [(run["points"][at]["thinking_tokens"], np.mean(run["points"][at]["per_problem"]["right"])) for run in runs]
        axes.plot(*np.mean(stops, axis=0), "*", color=colour, markersize=15, markeredgecolor="white")
    axes.plot([], [], "*", color="0.4", markersize=11, label="stops by itself: mean tokens, accuracy")
    axes.axvline(runs[0]["config"]["thinking_budget"], color="0.4", linewidth=1, linestyle=":")
    axes.set(xlabel="thinking budget b, tokens (dotted: the training budget)", ylabel="accuracy of an answer forced at b, J(b)",
             ylim=(0, None), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    if many:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def frontier_figure(path: Path, arms: dict[str, list[dict]]) -> None:
    """What an arm ends with: accuracy against the price of a right answer, both with their intervals. Better is up and left."""
    figure = report.blank_figure(8.5, 4.5)
    axes = figure.subplots()
    for label, at, runs, (colour, _, marker) in ends(arms):
        values = values_at(runs, "step", runs[0]["points"][at]["step"])
        (y, *ys), (x, *xs) = (bootstrap(statistic, values) for statistic, _ in METRICS.values())
        axes.plot(xs, [y, y], color=colour, alpha=0.35, linewidth=1)
        axes.plot([x, x], ys, color=colour, alpha=0.35, linewidth=1)
        axes.plot(x, y, marker, color=colour, markersize=7, label=label)
    axes.set(xlabel="tokens per right answer", ylabel="accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
