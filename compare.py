"""Which method is best, and how sure is that? Trains what is missing, evaluates it on the same problems, writes one table.

    python compare.py config/study.py --algorithms grpo,mrt_online,length_penalty --seeds 3
    python compare.py config/study.py --algorithms grpo,mrt_online,mrt_online+alpha=2 --seeds 0,1 --split validation
    python compare.py config/small.py --algorithms small_grpo,mrt_online --seeds 5

An arm is an algorithm, or the name of a config file beside this one (`small_grpo`), perhaps with keys of its own
(`mrt_online+alpha=2`); the first arm is the baseline; any other `--key=value` holds for all. --labels "GRPO,MRT" renames the arms
in tables and figures. Runs of one seed share their warm start, unless an arm's keys give it another: the row `warm start` is the
baseline's, and a gain is over the arm's own. Every finished run is one file in results/<config's name>/: what has one isn't
trained again (if its config was another, a warning says so), and an interrupted run goes on where it was. Methods are compared
three ways, because they spend differently:

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
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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
    KEYS,
    TASK_KEYS,
    RunConfig,
    UserError,
    complete,
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
TAKEN = {  # keys with a place of their own, and which
    "seed": "--seeds says which, and --seeds=4, is seed 4 alone",
    "algorithm": "name it in --algorithms, as an arm",
    "threads": "on a CPU every run has one, so that CPU times compare",
}
# What all arms must have in common: the problems, and how they are measured.
MEASURED = (*TASK_KEYS, "thinking_budget", "eval_problems", "eval_samples", "eval_budget")
GATES = tuple(name for name in KEYS if name.startswith("gate_"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("config", type=Path, help="a config file, such as config/study.py")
    parser.add_argument("--algorithms", required=True, help="arms, separated by commas; the first is the baseline")
    parser.add_argument("--labels", help="what tables and figures call the arms, separated by commas (default: as they are)")
    parser.add_argument("--seeds", default="3", help="how many, or which: 3 is 0,1,2 and 3, is seed 3 alone")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="validation: to choose between settings")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time (default: one per core, or one on a GPU)")
    parser.add_argument("--report", action="store_true", help="train nothing: what the runs that are there say")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--name", default="comparison", help="of the table and the figures")
    args, rest = parser.parse_known_args(argv)
    folder, names = args.results / args.config.stem, args.algorithms.split(",")
    labels = [label.strip() for label in args.labels.split(",")] if args.labels else names
    if args.jobs < 0:
        raise UserError(f"--jobs={args.jobs}: give how many runs go on at a time, or leave it out")
    try:
        seeds = parse_seeds(args.seeds)
        shared = parse_overrides(rest)
        jobs = [Job.of(args.config, arm, seed, shared, folder, args.split) for arm in names for seed in seeds]
    except ValueError as error:
        raise UserError(str(error)) from None
    runs = [job.run for job in jobs]
    for run in runs:
        if runs.count(run) > 1:
            raise UserError(f"--algorithms={args.algorithms} --seeds={args.seeds} name the run {run.name} twice: leave one out")
    if not len(labels) == len(set(labels)) == len(names):
        raise UserError(f"--labels={args.labels}: give {len(names)} that differ, one for each of {args.algorithms}")
    if args.report:
        jobs = [job for job in jobs if job.result.is_file()]
        if not jobs or jobs[0].arm != names[0]:
            raise UserError(f"{folder} has no such run of {names[0]}, the baseline: leave out --report to train it, or name "
                            "another arm first")
    for job in jobs:
        if changed := differences(job.made_with, job.config):
            print(f"warning: {job.result} was made with {changed}; remove it to train it anew", file=sys.stderr)
    agree(jobs, MEASURED, "runs are compared by the same measurements: give such a key to all, as --key=value")
    folder.mkdir(parents=True, exist_ok=True)
    run_all([job for job in jobs if not job.result.is_file()], args.jobs)
    arms: dict[str, list[dict]] = {}
    for job in jobs:
        arms.setdefault(labels[names.index(job.arm)], []).append(json.loads(job.result.read_text()))
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
        name, own = parse_arm(arm)
        sibling = config_path.with_name(f"{name}.py")
        of_file = name not in ALGORITHMS and sibling.is_file()
        for key, reason in TAKEN.items():
            if key in shared or key in own and not (of_file and key == "algorithm"):
                raise ValueError(f"{key} can't be set for {arm if key in own else 'all arms'}: {reason}")
        if of_file:
            config_path = sibling
        else:
            own["algorithm"] = name
        overrides = {**shared, **own, "seed": str(seed)}
        if device_of(load_config(config_path, overrides)) == "cpu":
            overrides["threads"] = "1"
        config = load_config(config_path, overrides)
        result = f"{arm}-seed={seed}{setting}.json".replace("/", "_")
        return cls(arm, config_path, overrides, config, split, setting, folder / result)

    @property
    def run(self) -> Path:
        return Path(self.config.out_dir) / run_name(self.config_path, self.overrides)

    @property
    def made_with(self) -> dict:
        """The config of its result, or that with which it will be made."""
        if not self.result.is_file():
            return asdict(self.config)
        return complete(json.loads(self.result.read_text())["config"])


def agree(jobs: Sequence[Job], keys: Sequence[str], reason: str) -> None:
    """Raises UserError with the reason unless these keys are the same for all jobs."""
    expected = jobs[0].made_with
    for job in jobs:
        values = job.made_with
        if unlike := [key for key in keys if values[key] != expected[key]]:
            mine, theirs = (", ".join(f"{key}={made[key]}" for key in unlike) for made in (values, expected))
            raise UserError(f"{job.result.stem} has {mine}, but {jobs[0].result.stem} has {theirs}: {reason}")


def run_all(jobs: list[Job], processes: int) -> None:
    """Every job in a process of its own, `processes` at a time, the warm starts that they share first. After a failure or Ctrl-C
    no job begins any more; it raises at once, but the program ends when those under way have, so nothing of them is lost."""
    from tqdm import tqdm

    if not jobs:
        return
    processes = processes or (os.cpu_count() if device_of(jobs[0].config) == "cpu" else 1)
    by_start: dict[Path, list[Job]] = {}
    for job in jobs:
        by_start.setdefault(shared_start(job), []).append(job)
    for group in by_start.values():
        agree(group, GATES, "runs with the same warm start have the same gates for it: give such a key to all, as --key=value")
    ready: list[tuple[Callable[[Job], None], Job]] = [(train_warm_start, group[0]) for group in by_start.values()]
    running: dict[Future, tuple[Callable[[Job], None], Job]] = {}
    steps = sum(job.config.steps for job in jobs)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent)
    try:
        with tqdm(total=steps, unit="step", desc="all runs") as bar:
            while ready or running:
                while ready and len(running) < processes:  # a pool wouldn't give back all that it was given
                    work, job = ready.pop(0)
                    running[pool.submit(work, job)] = work, job
                for future in wait(running, 1.0, FIRST_COMPLETED).done:
                    work, job = running.pop(future)
                    future.result()  # raises what the job raised
                    if work is train_warm_start:
                        ready += [(run_job, other) for other in by_start[shared_start(job)]]
                bar.update(sum(steps_done(job) for job in jobs) - bar.n)
    except KeyboardInterrupt:
        raise UserError("interrupted: the same command goes on with it") from None
    finally:
        pool.shutdown(wait=False)
        if running:
            print(f"nothing more begins; {len(running)} under way end first", file=sys.stderr)


def end_with_parent() -> None:
    """This process ends when the one that started it has. Else the runs of a killed comparison would go on, beside the same ones
    that the next comparison resumes. A run that is killed goes on from its last checkpoint.

    Ctrl-C reaches every process. Here only training heeds it, after its step: a pool one of whose processes ends, ends them all.
    """

    def follow() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def steps_done(job: Job) -> int:
    """Finished RL steps of a run, for the progress bar."""
    path = job.run / "metrics.jsonl"
    return len(report.read_jsonl(path)) - 1 if path.is_file() else 0


def shared_start(job: Job) -> Path:
    """What two runs have in common if they begin with the same policy."""
    return Path(job.config.init_from) if job.config.init_from else warm_folder(job.config)


def train_warm_start(job: Job) -> None:
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

    def measured(folder: Path, split: str) -> dict:
        try:
            model = checkpoint.load_model(folder, device)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{error}; or remove {job.run}, and the same command trains it anew") from None
        return evaluate_policy(model, task, distinct(task, split, config.eval_problems, "eval"), config, "eval", brief=True)

    points = []
    for step, folder in folders.items():
        section = measured(folder, job.split)
        points.append({"step": step, **spent[step], "thinking_tokens": section["mean_thinking_tokens"]["value"],
                       "curve": [[row["budget"], round(row["J"]["value"], 4)] for row in section["budget_curve"]],
                       "habits": section["habits"], "per_problem": section["per_problem"]})
    harder = {name: measured(folders[step], "ood")["per_problem"] for name, step in (("ood_start", 0), ("ood", step))}
    return {"arm": job.arm, **made, "points": points, **harder}


# --- Reading: what a comparison says ---

Values = dict[str, np.ndarray]  # of one arm: a name -> (seeds, problems)
METRICS: dict[str, tuple[Callable[[Values], float], int]] = {  # name: (statistic, digits)
    "accuracy": (lambda v: v["right"].mean(), 3),
    "tokens per right answer": (lambda v: ratio(np.stack([v["tokens"].ravel(), v["right"].ravel()], 1)), 1),
}
AXES = {"step": ("Equal steps", "steps"), "tokens": ("Equal tokens", "sampled tokens"), "seconds": ("Equal time", "seconds")}


def metrics_of(run: dict) -> dict[str, tuple[Callable[[Values], float], int]]:
    """METRICS, and the regret to each horizon that was measured, which is the same for all runs."""
    regrets = [name for name in run["points"][0]["per_problem"] if name.startswith("regret")]
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


def interval(statistic: Callable[..., float], *arms: Values) -> tuple[float, float, float]:
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
    baseline, *others = arms
    metrics = metrics_of(arms[baseline][0])
    end = {axis: float(np.mean([run["points"][-1][axis] for run in arms[baseline]])) for axis in AXES}
    text = []
    for axis, (title, unit) in AXES.items():
        if not end[axis]:
            text.append(f"### {title}\n\n{baseline} has no {unit} that another arm could be equal to.")
            continue
        rows = [["warm start", *values_row(arms[baseline], axis, 0, metrics)]]
        rows += [[arm, *values_row(runs, axis, end[axis], metrics)] for arm, runs in arms.items()]
        text.append(table(f"{title}: {end[axis]:,.0f} {unit}",
                          ["method", "seeds", *metrics, "accuracy, OOD", "steps", "tokens", "seconds"], rows))
    devices = sorted({run["device"] for runs in arms.values() for run in runs})
    if len(devices) > 1:
        text.append(f"Warning: times can't be compared, they are those of {' and '.join(devices)}.")
    rows = [row for arm in others for row in difference_rows(arm, arms[arm], arms[baseline], end, metrics)]
    text.append(table(f"Differences from {baseline}",
                      ["method", "at equal", *metrics, "accuracy, OOD", "gain in accuracy, times"], rows))
    curves = {arm: [run["points"][at]["curve"] for run in runs] for arm, at, runs, _ in ends(arms)}
    text.append(table("Accuracy when stopped after so many thinking tokens, after all steps",
                      ["method", *(f"{budget:.0f}" for budget, _ in curves[baseline][0])],
                      [[arm, *(f"{J:.3f}" for J in np.mean(of, axis=0)[:, 1])] for arm, of in curves.items()]))
    habits = {arm: [run["points"][at]["habits"] for run in runs] for arm, at, runs, _ in ends(arms)}
    first, *later = sum(habits.values(), [])
    names = [name for name in first if all(name in other for other in later)]  # runs of an older commit know fewer
    text.append(table("Habits after all steps", ["method", *names],
                      [[arm, *(f"{np.mean([seed[name] for seed in of]):.2f}" for name in names)] for arm, of in habits.items()]))
    return "\n\n".join(text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([f"### {title}", "", lines[0], "|" + "---|" * len(columns), *lines[1:]])


def values_row(runs: Sequence[dict], axis: str, place: float, metrics: dict) -> list[str]:
    """An arm where it has spent so much, after its name. OOD problems are answered at the start and after all steps only, and by
    runs of an older commit after all steps."""
    values, which = values_at(runs, axis, place), "ood" if place else "ood_start"
    measured = axis == "step" and all(which in run for run in runs)
    harder = cell(METRICS["accuracy"], out_of_distribution(runs, which)) if measured else ""
    spent = [np.mean([spent_at(run, axis, place, other) for run in runs]) for other in AXES]
    return [str(len(runs)), *(cell(metric, values) for metric in metrics.values()), harder, *(f"{x:,.0f}" for x in spent)]


def difference_rows(arm: str, runs: Sequence[dict], baseline: Sequence[dict], end: dict[str, float],
                    metrics: dict) -> Iterator[list[str]]:
    """An arm against the baseline, paired by seeds, where the baseline ends on each axis."""
    pairs = [(a, b) for a in runs for b in baseline if a["config"]["seed"] == b["config"]["seed"]]
    if not pairs:
        yield [arm, "no seed in common", *[""] * (len(metrics) + 2)]
        return
    mine, theirs = zip(*pairs)
    for axis in filter(end.get, AXES):
        a, a_start, b, b_start = (values_at(of, axis, place) for of in (mine, theirs) for place in (end[axis], 0))
        harder = map(out_of_distribution, (mine, theirs))
        yield [arm, AXES[axis][1], *(cell(difference(metric), a, b, sign="+") for metric in metrics.values()),
               cell(difference(METRICS["accuracy"]), *harder, sign="+") if axis == "step" else "",
               cell((gains, 2), a, a_start, b, b_start)]


def out_of_distribution(runs: Sequence[dict], which: str = "ood") -> Values:
    return {"right": np.stack([np.array(run[which]["right"]) for run in runs])}


def difference(metric: tuple[Callable[[Values], float], int]) -> tuple[Callable[[Values, Values], float], int]:
    """Of a metric of two arms."""
    statistic, digits = metric
    return lambda mine, theirs: statistic(mine) - statistic(theirs), digits


def gains(mine: Values, my_start: Values, theirs: Values, their_start: Values) -> float:
    """How many times as much accuracy one arm has gained, each since its own start, as another; of a gain that is none, inf."""
    a, a_start, b, b_start = (values["right"].mean() for values in (mine, my_start, theirs, their_start))
    return (a - a_start) / (b - b_start) if b > b_start else math.inf


def spent_at(run: dict, axis: str, place: float, other: str) -> float:
    """How much of `other` a run has spent where `axis` is `place`."""
    points = run["points"]
    return float(np.interp(place, [point[axis] for point in points], [point[other] for point in points]))


def cell(metric: tuple[Callable[..., float], int], *arms: Values, sign: str = "") -> str:
    statistic, digits = metric
    value, low, high = interval(statistic, *arms)
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f} {high:{sign}.{digits}f}]"


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


def learning_curves(runs: Sequence[dict], axis: str, statistic: Callable[[Values], float]) -> tuple[np.ndarray, np.ndarray]:
    """What each run of an arm has spent and the statistic, at every step where any of them was measured: two (steps, seeds)."""
    steps = sorted({point["step"] for run in runs for point in run["points"]})
    return (np.array([[spent_at(run, "step", step, axis) for run in runs] for step in steps]),
            np.array([[statistic(values_at([run], "step", step)) for run in runs] for step in steps]))


def curves_figure(path: Path, arms: dict[str, list[dict]]) -> None:
    """Accuracy and tokens per right answer against steps, sampled tokens and time: the mean over seeds, and each seed."""
    figure = report.blank_figure(13, 6)
    axes = figure.subplots(2, 3, sharey="row")
    for i, (arm, runs) in enumerate(arms.items()):
        colour, dashes, marker = look(i)
        for row, (statistic, _) in enumerate(METRICS.values()):
            for column, (axis, unit) in enumerate((("step", 1), ("tokens", 1e6), ("seconds", 1))):
                x, y = learning_curves(runs, axis, statistic)
                axes[row, column].plot(x / unit, y, color=colour, alpha=0.2, linewidth=0.8)
                axes[row, column].plot(x.mean(1) / unit, y.mean(1), dashes, color=colour, label=arm, linewidth=1.8, marker=marker,
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
        (y, *ys), (x, *xs) = (interval(statistic, values) for statistic, _ in METRICS.values())
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
