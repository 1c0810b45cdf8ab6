"""What finished runs say side by side: tables with intervals, and figures.

A run is the file that `compare.py` writes of it: a point per checkpoint, the warm start first, with the values of every problem.
Methods are compared three ways, because they spend differently:

    equal steps     after all steps
    equal tokens    when as many tokens have been sampled, forks included, as the baseline samples in all its steps
    equal time      when as much time has been spent; on a CPU that is the process's own CPU time, on one thread

Between two checkpoints values are interpolated linearly. An arm that never gets so far is shown at its end. Intervals are 95 %
bootstrap intervals over seeds and problems, both drawn with replacement; a difference is paired: same seeds, same problems. Of S
seeds S - 1 are drawn: to draw S would make the variance between seeds too small by 1/S, with two seeds by half (Rao and Wu).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanomrt import report
from nanomrt.metrics import empirical_best, ratio
from nanomrt.report import COLOURS

RESAMPLES = 1000
Values = dict[str, np.ndarray]  # of one arm: a name -> (seeds, problems)
METRICS: dict[str, tuple[Callable[[Values], float], int]] = {  # name: (statistic, digits)
    "accuracy": (lambda v: v["right"].mean(), 3),
    "tokens per right answer": (lambda v: ratio(np.stack([v["tokens"].ravel(), v["right"].ravel()], 1)), 1),
}
CURVES = {  # of a point: [budget, J] along the grid of budgets
    "curve": "Accuracy when stopped after so many thinking tokens, after all steps",
    "extrapolation": "The same when thinking is forced to go on, a new episode in place of every end",
}
AXES = {"step": ("Equal steps", "steps"), "tokens": ("Equal tokens", "sampled tokens"), "seconds": ("Equal time", "seconds")}


def metrics_of(run: dict) -> dict[str, tuple[Callable[[Values], float], int]]:
    """METRICS, and the regret to each horizon that was measured, which is the same for all runs."""
    regrets = [name for name in run["points"][0]["per_problem"] if name.startswith("regret")]
    return METRICS | {name: (lambda v, name=name: v[name].mean(), 3) for name in regrets}


def values_at(runs: Sequence[dict], axis: str, place: float, problems: str = "per_problem") -> Values | None:
    """Every run's per-problem values where `axis` (step, tokens or seconds) is `place`, or at its end if it ends before. A value
    that one of the runs lacks there is left out. problems: "ood" for those of OOD; None if a run hasn't answered them there."""
    rows = [value_at(run["points"], axis, place, problems) for run in runs]
    if None in rows:
        return None
    return {name: np.stack([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}


def value_at(points: Sequence[dict], axis: str, place: float, problems: str) -> dict[str, np.ndarray] | None:
    """The same of the points of one run: name -> (problems,)."""
    x = [point[axis] for point in points]
    b = min(int(np.searchsorted(x, place)), len(x) - 1)  # x[b-1] < place <= x[b]
    a = b - 1 if 0 < b and place < x[b] else b
    if not all(problems in points[i] for i in (a, b)):
        return None
    share = (place - x[a]) / (x[b] - x[a]) if a < b else 0.0
    before, after = points[a][problems], points[b][problems]
    return {name: (1 - share) * np.array(before[name]) + share * np.array(after[name]) for name in before if name in after}


def interval(statistic: Callable[..., float], *arms: Values) -> tuple[float, float, float]:
    """Value and 95 % interval of a statistic of one or more arms: S - 1 seeds (see above) and P problems are drawn with
    replacement, the same ones for every arm. The arms must have the same seeds. A draw for which it is nan, undefined, is left
    out; if most are, there is no interval."""
    rng = np.random.default_rng(0)
    S, P = next(iter(arms[0].values())).shape
    drawn = []
    for _ in range(RESAMPLES):
        seeds, problems = rng.integers(S, size=max(S - 1, 1)), rng.integers(P, size=P)
        drawn.append(statistic(*({name: x[seeds][:, problems] for name, x in arm.items()} for arm in arms)))
    defined = [x for x in drawn if not math.isnan(x)]
    if len(defined) < RESAMPLES / 2:
        defined = [math.nan]
    low, high = np.quantile(defined, [0.025, 0.975], method="inverted_cdf")
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
    for name, title in CURVES.items():
        if curves := curves_of(arms, name):
            text.append(table(title, ["method", *(f"{budget:.0f}" for budget, _ in next(iter(curves.values()))[0])],
                              [[arm, *(f"{J:.3f}" for J in np.mean(of, axis=0)[:, 1])] for arm, of in curves.items()]))
    if rows := comparator_rows(arms):
        text.append(table("Regret within the training budget after all steps, by what it is measured against",
                          ["method", "an oracle", "the best J of these methods", "a majority of answers"], rows))
    habits = {arm: [run["points"][at]["habits"] for run in runs] for arm, at, runs, _ in ends(arms)}
    names = known_habits(arms)
    text.append(table("Habits after all steps", ["method", *names],
                      [[arm, *(f"{np.mean([seed[name] for seed in of]):.2f}" for name in names)] for arm, of in habits.items()]))
    return "\n\n".join(text)


def curves_of(arms: dict[str, list[dict]], name: str) -> dict[str, list]:
    """A curve of CURVES, of the warm start and of every arm at its end: (seeds, budgets, 2). An arm that lacks it is left out."""
    return {arm: [run["points"][at][name] for run in runs] for arm, at, runs, _ in ends(arms)
            if all(name in run["points"][at] for run in runs)}


def comparator_rows(arms: dict[str, list[dict]]) -> list[list[str]]:
    """The regret of the warm start and of every arm at its end against each comparator of nanomrt/metrics.py, where a majority
    was measured. The best J is that of a method's mean curve."""
    h, rows = next(iter(arms.values()))[0]["config"]["thinking_budget"], []
    oracle, maj = f"regret to {h}", f"maj: regret to {h}"
    best = empirical_best([np.mean(of, axis=0).T.tolist() for of in curves_of(arms, "curve").values()], h)
    for arm, at, runs, _ in ends(arms):
        values = values_at(runs, "step", max(run["points"][at]["step"] for run in runs))
        if maj in values:
            rows.append([arm, *(cell((lambda v, name=name, its=its: v[name].mean() - its, 3), values)
                                for name, its in ((oracle, 0), (oracle, 1 - best), (maj, 0)))])  # its: the comparator's regret
    return rows


def known_habits(arms: dict[str, list[dict]]) -> list[str]:
    """The habits that every run has counted: those of an older commit know fewer."""
    first, *others = (run["points"][0]["habits"] for runs in arms.values() for run in runs)
    return [name for name in first if all(name in other for other in others)]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([f"### {title}", "", lines[0], "|" + "---|" * len(columns), *lines[1:]])


def values_row(runs: Sequence[dict], axis: str, place: float, metrics: dict) -> list[str]:
    """An arm where it has spent so much, after its name."""
    values, harder = (values_at(runs, axis, place, problems) for problems in ("per_problem", "ood"))
    spent = [np.mean([spent_at(run, axis, place, other) for run in runs]) for other in AXES]
    return [str(len(runs)), *(cell(metric, values) for metric in metrics.values()), cell(METRICS["accuracy"], harder),
            *(f"{x:,.0f}" for x in spent)]


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
        harder = [values_at(of, axis, end[axis], "ood") for of in (mine, theirs)]
        yield [arm, AXES[axis][1], *(cell(difference(metric), a, b, sign="+") for metric in metrics.values()),
               cell(difference(METRICS["accuracy"]), *harder, sign="+"),
               cell((gains, 2), a, a_start, b, b_start)]


def difference(metric: tuple[Callable[[Values], float], int]) -> tuple[Callable[[Values, Values], float], int]:
    """Of a metric of two arms."""
    statistic, digits = metric
    return lambda mine, theirs: statistic(mine) - statistic(theirs), digits


def gains(mine: Values, my_start: Values, theirs: Values, their_start: Values) -> float:
    """How many times as much accuracy one arm has gained, each since its own start, as another; of a gain that is none, inf, or
    nan if neither has gained."""
    a, a_start, b, b_start = (values["right"].mean() for values in (mine, my_start, theirs, their_start))
    if b > b_start:
        return (a - a_start) / (b - b_start)
    return math.inf if a > a_start else math.nan


def spent_at(run: dict, axis: str, place: float, other: str) -> float:
    """How much of `other` a run has spent where `axis` is `place`."""
    points = run["points"]
    return float(np.interp(place, [point[axis] for point in points], [point[other] for point in points]))


def cell(metric: tuple[Callable[..., float], int], *arms: Values | None, sign: str = "") -> str:
    """A metric with its interval: empty if an arm wasn't measured, - if it isn't defined for what was."""
    if None in arms:
        return ""
    statistic, digits = metric
    value, low, high = interval(statistic, *arms)
    return "-" if math.isnan(value + low) else f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f} {high:{sign}.{digits}f}]"


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


def measured_steps(runs: Sequence[dict]) -> list[int]:
    """Every step where any of the runs was measured: one that was interrupted has a checkpoint more than others."""
    return sorted({point["step"] for run in runs for point in run["points"]})


def learning_curves(runs: Sequence[dict], axis: str,
                    statistic: Callable[[Values], float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At every measured step: what each run of an arm has spent and its statistic, both (steps, seeds), and the statistic of all
    runs together, as in the tables, (steps,)."""
    steps = measured_steps(runs)
    return (np.array([[spent_at(run, "step", step, axis) for run in runs] for step in steps]),
            np.array([[statistic(values_at([run], "step", step)) for run in runs] for step in steps]),
            np.array([statistic(values_at(runs, "step", step)) for step in steps]))


def curves_figure(path: Path, arms: dict[str, list[dict]]) -> None:
    """Accuracy and tokens per right answer against steps, sampled tokens and time: of all seeds together, and of each."""
    figure = report.blank_figure(13, 6)
    axes = figure.subplots(2, 3, sharey="row")
    for i, (arm, runs) in enumerate(arms.items()):
        colour, dashes, marker = look(i)
        for row, (statistic, _) in enumerate(METRICS.values()):
            for column, (axis, unit) in enumerate((("step", 1), ("tokens", 1e6), ("seconds", 1))):
                x, y, together = learning_curves(runs, axis, statistic)
                axes[row, column].plot(x / unit, y, color=colour, alpha=0.2, linewidth=0.8)
                axes[row, column].plot(x.mean(1) / unit, together, dashes, color=colour, label=arm, linewidth=1.8, marker=marker,
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
    axes.axvline(next(iter(arms.values()))[0]["config"]["thinking_budget"], color="0.4", linewidth=1, linestyle=":")
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
        values = values_at(runs, "step", max(run["points"][at]["step"] for run in runs))
        (y, *ys), (x, *xs) = (interval(statistic, values) for statistic, _ in METRICS.values())
        axes.plot(xs, [y, y], color=colour, alpha=0.35, linewidth=1)
        axes.plot([x, x], ys, color=colour, alpha=0.35, linewidth=1)
        axes.plot(x, y, marker, color=colour, markersize=7, label=label)
    axes.set(xlabel="tokens per right answer", ylabel="accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def habits_figure(path: Path, arms: dict[str, list[dict]]) -> None:
    """How the policies think, step after step: the mean over seeds, and each seed. `habits` of its task says what is counted."""
    names = known_habits(arms)
    figure = report.blank_figure(13, 6)
    axes = figure.subplots(2, -(-len(names) // 2), sharex=True, squeeze=False)
    for panel, name in zip(axes.flat, names):
        panel.set_title(name, fontsize=9, loc="left")
        for i, (arm, runs) in enumerate(arms.items()):
            colour, dashes, _ = look(i)
            steps = measured_steps(runs)
            values = np.array([np.interp(steps, [point["step"] for point in run["points"]],
                                         [point["habits"][name] for point in run["points"]]) for run in runs])  # (seeds, steps)
            panel.plot(steps, values.T, color=colour, alpha=0.2, linewidth=0.8)
            panel.plot(steps, values.mean(0), dashes, color=colour, label=arm, linewidth=1.8)
        panel.set_ylim(0, None)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[len(names) :]:
        panel.set_axis_off()
    for panel in axes[1]:
        panel.set_xlabel("steps")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


FIGURES = {"curves": curves_figure, "budget": budgets_figure, "frontier": frontier_figure, "habits": habits_figure}
