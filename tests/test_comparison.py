"""nanomrt/comparison.py: values between checkpoints, intervals and tables of runs whose values are known."""

import math

import numpy as np
import pytest

from nanomrt import comparison


def run(arm: str, seed: int, *points: tuple[int, int, float, list[float], list[float]]) -> dict:
    """A run's file: points of (step, tokens, seconds, right, tokens per problem)."""
    return {"arm": arm, "config": {"seed": seed, "thinking_budget": 10}, "device": "CPU", "points": [
        {"step": step, "tokens": tokens, "seconds": seconds, "curve": [[0, 0.1], [10, 0.5]], "thinking_tokens": 7.0,
         "habits": {"attempts": step / 10, "loops": 0.25}, "ood": {"right": [x / 2 for x in right]},
         "per_problem": {"right": right, "tokens": spent, "regret to 10": [1 - x for x in right]}}
        for step, tokens, seconds, right, spent in points]}


GRPO = [run("grpo", seed, (0, 0, 0.0, [0.0, 0.0], [10.0, 10.0]), (10, 100, 4.0, [1.0, 0.0], [20.0, 40.0])) for seed in (0, 1)]
MRT = [run("mrt", seed, (0, 0, 0.0, [0.0, 0.0], [10.0, 10.0]), (10, 200, 2.0, [1.0, 1.0], [20.0, 20.0])) for seed in (0, 1)]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Enough for tables whose values are looked at, and not their intervals."""
    monkeypatch.setattr(comparison, "RESAMPLES", 10)


def test_values_between_checkpoints_are_interpolated():
    """Half way in tokens, half way in everything; beyond the end, the end; at 0, the warm start."""
    half = comparison.values_at(MRT, "tokens", 100)
    assert half["right"].tolist() == [[0.5, 0.5]] * 2 and half["tokens"].tolist() == [[15.0, 15.0]] * 2
    assert comparison.values_at(MRT, "tokens", 1e9)["right"].tolist() == [[1.0, 1.0]] * 2
    assert comparison.values_at(MRT, "step", 0)["right"].tolist() == [[0.0, 0.0]] * 2
    assert comparison.values_at(MRT, "step", 10)["right"].tolist() == [[1.0, 1.0]] * 2
    assert comparison.spent_at(MRT[0], "seconds", 1.0, "tokens") == 100


def test_tokens_per_right_answer_is_a_ratio_of_totals():
    """Not a mean of ratios: a problem that is never solved would make that infinite."""
    statistic, _ = comparison.METRICS["tokens per right answer"]
    assert statistic(comparison.values_at(GRPO, "step", 10)) == 60.0
    assert statistic(comparison.values_at(GRPO, "step", 0)) == float("inf")


def test_the_interval_is_that_of_the_mean_of_seeds_and_problems(monkeypatch):
    """Of independent seeds and problems with effects of std a and b, the mean's std is sqrt(a²/S + b²/P)."""
    monkeypatch.setattr(comparison, "RESAMPLES", 1000)
    rng = np.random.default_rng(1)
    S, P, a, b = 40, 400, 0.05, 0.4
    x = {"right": rng.normal(0, a, (S, 1)) + rng.normal(0, b, (1, P))}
    value, low, high = comparison.interval(lambda v: v["right"].mean(), x)
    assert value == x["right"].mean()
    assert high - low == pytest.approx(2 * 1.96 * (a**2 / S + b**2 / P) ** 0.5, rel=0.15)


@pytest.mark.parametrize("S", [2, 3, 5])
def test_few_seeds_do_not_look_surer_than_they_are(S, monkeypatch):
    """The mean of S seeds has variance 1/S, and so have the resamples, on average over what the seeds could have been."""
    monkeypatch.setattr(comparison, "RESAMPLES", 50)
    rng, means = np.random.default_rng(2), []
    for _ in range(200):
        comparison.interval(lambda v: means.append(v["right"].mean()) or 0.0, {"right": rng.normal(0, 1, (S, 1))})
    resampled = np.reshape(means, (200, 51))[:, :-1]  # the last one is that of all seeds
    assert resampled.var(axis=1).mean() == pytest.approx(1 / S, rel=0.15)


@pytest.mark.parametrize("S, covered", [(2, [0.95, 0.90, 1 / 2]), (3, [0.95, 0.92, 3 / 4]), (5, [0.95, 0.93, 0.86])])
def test_how_often_an_interval_covers_the_truth(S, covered, monkeypatch):
    """95 % if seeds have no share in the variance of the mean, little less at a half. If it is theirs alone, the interval of 2 or
    3 seeds reaches from the worst of them to the best and covers in 1 - 2/2^S of all cases, and 5 are not enough either."""
    monkeypatch.setattr(comparison, "RESAMPLES", 500)
    rng, P, trials, drawn = np.random.default_rng(1), 80, 2000, []
    count = lambda v: drawn.append(np.bincount(v["which"].ravel(), minlength=S * P)) or 0.0
    comparison.interval(count, {"which": np.arange(S * P).reshape(S, P)})  # the same resamples for all data of this shape
    weight = np.array(drawn[:-1]) / sum(drawn[0])  # (resamples,S·P); the last one was that of all
    for share, expected in zip((0, 0.5, 1), covered, strict=True):
        x = rng.normal(0, (share * S) ** 0.5, (S, 1, trials)) + rng.normal(0, ((1 - share) * P) ** 0.5, (P, trials))  # truth: 0
        low, high = np.quantile(weight @ x.reshape(S * P, trials), [0.025, 0.975], axis=0, method="inverted_cdf")
        assert comparison.interval(lambda v: v["right"].mean(), {"right": x[..., 0]})[1:] == pytest.approx((low[0], high[0]))
        assert ((low <= 0) & (0 <= high)).mean() == pytest.approx(expected, abs=0.025)


def test_a_paired_difference_does_not_see_what_both_arms_share():
    """The same seeds and problems are drawn for both: an arm that is better by .1 everywhere is better by .1 in every draw."""
    x = {"right": np.random.default_rng(0).random((3, 50))}
    better = {"right": x["right"] + 0.1}
    difference = comparison.interval(lambda v, w: v["right"].mean() - w["right"].mean(), better, x)
    assert difference == pytest.approx((0.1, 0.1, 0.1))


def test_habits_that_an_older_run_does_not_know_are_left_out():
    """Beside a run of before `fooled` was measured, nobody's is shown."""
    newer = [dict(run, points=[dict(point, habits=point["habits"] | {"fooled": 0.5}) for point in run["points"]]) for run in MRT]
    habits = lambda arms: comparison.tables(arms).split("### Habits after all steps")[1]
    assert "fooled" in habits({"mrt": newer}) and "0.50 |" in habits({"mrt": newer})
    for arms in ({"grpo": GRPO, "mrt": newer}, {"mrt": newer, "grpo": GRPO}):
        assert "fooled" not in habits(arms) and "| attempts | loops |" in habits(arms)


def with_points(runs: list[dict], *changes: dict) -> list[dict]:
    """The same runs with keys added to each of their points; those that are None are taken away."""
    return [dict(run, points=[{key: value for key, value in (point | change).items() if value is not None}
                              for point, change in zip(run["points"], changes, strict=True)]) for run in runs]


def cells(text: str, arm: str, column: str) -> list[str]:
    """Of a column of the tables, in the rows of an arm, from top to bottom."""
    tables = [part.strip().splitlines()[2:] for part in text.split("###")[1:]]
    rows = [(header.split(" | "), row.split(" | ")) for header, _, *rows in tables for row in rows]
    return [row[header.index(column)].split(" [")[0].strip() for header, row in rows
            if row[0] == f"| {arm}" and column in header]


def test_out_of_distribution_as_on_the_test_problems():
    """Interpolated between two checkpoints that were asked, and empty where one of them was not."""
    text = comparison.tables({"grpo": GRPO, "mrt": MRT})
    assert cells(text, "mrt", "accuracy, OOD") == ["0.500", "0.250", "0.500", "+0.250", "+0.000", "+0.250"]
    asked_at_the_end = with_points(MRT, {"ood": None}, {})
    text = comparison.tables({"grpo": GRPO, "mrt": asked_at_the_end})
    assert cells(text, "mrt", "accuracy, OOD") == ["0.500", "", "0.500", "+0.250", "", "+0.250"]
    assert cells(comparison.tables({"mrt": asked_at_the_end}), "warm start", "accuracy, OOD") == ["", "", ""]


def test_beyond_the_end_and_other_comparators_where_they_were_measured():
    """Here J is .5 at most and 1 in the grid's end; regret to an oracle is .5, so to the best J it is 0. A majority has its own
    values. A warm start that was asked less is left out."""
    more = {"extrapolation": [[0, 0.1], [10, 0.3]]}
    runs = with_points(GRPO, {}, more)
    for run in runs:
        run["points"][-1]["per_problem"] = run["points"][-1]["per_problem"] | {"maj: regret to 10": [0.25, 0.0]}
    text = comparison.tables({"grpo": runs, "mrt": MRT})
    *_, forced, comparators, _ = text.split("###")
    assert "forced to go on" in forced and forced.count("| grpo |") == 1 and "| mrt |" not in forced + comparators
    assert "| grpo | 0.100 | 0.300 |" in forced and "warm start" not in forced + comparators
    assert [cells(text, "grpo", column)[-1] for column in ("an oracle", "the best J of these methods")] == ["0.500", "0.000"]
    assert "| 0.125 [" in comparators
    assert "forced to go on" not in comparison.tables({"mrt": MRT})


def test_the_tables_say_what_the_runs_say():
    """Equal tokens stop MRT half way, equal time and steps don't; differences are MRT minus the baseline."""
    text = comparison.tables({"grpo": GRPO, "mrt": MRT})
    steps, tokens, seconds, differences, budgets, habits = text.split("###")[1:]
    rows = lambda part, arm: [row.split(" | ") for row in part.splitlines() if row.startswith(f"| {arm} |")]
    assert rows(steps, "mrt")[0][2].startswith("1.000") and rows(tokens, "mrt")[0][2].startswith("0.500")
    assert rows(seconds, "mrt")[0][2].startswith("1.000") and "100 sampled tokens" in tokens and "4 seconds" in seconds
    assert [row[2].split()[0] for row in rows(differences, "mrt")] == ["+0.500", "+0.000", "+0.500"]
    assert [rows(habits, arm)[0][1:] for arm in ("warm start", "mrt")] == [["0.00", "0.25 |"], ["1.00", "0.25 |"]]
    assert [row[-1].split()[0] for row in rows(differences, "mrt")] == ["2.00", "1.00", "2.00"]  # GRPO gains .5
    assert "| method | 0 | 10 |" in budgets and rows(budgets, "mrt")[0][1:] == ["0.100", "0.500 |"]
    assert not rows(differences, "grpo") and len(rows(steps, "warm start")) == 1


def test_of_a_baseline_that_gains_nothing_no_gain_is_a_multiple():
    """And no loss either."""
    start, end = (comparison.values_at(MRT, "step", place) for place in (0, 10))
    assert comparison.gains(end, start, start, start) == math.inf and comparison.gains(start, start, end, start) == 0
    assert math.isnan(comparison.gains(start, start, start, start)) and math.isnan(comparison.gains(start, end, start, start))


def test_an_interval_is_that_of_the_draws_for_which_there_is_a_value(monkeypatch):
    """One problem of three is solved, by both arms. In draws without it both prices are infinite, and have no difference."""
    monkeypatch.setattr(comparison, "RESAMPLES", 1000)
    mine, theirs = ({"right": np.array([[1.0, 0.0, 0.0]]), "tokens": np.full((1, 3), each)} for each in (20.0, 10.0))
    price = comparison.difference(comparison.METRICS["tokens per right answer"])
    value, low, high = comparison.interval(price[0], mine, theirs)
    assert value == 30 and (low, high) == (10, 30)  # all three draws are it, or one of them is
    unsolved = {"right": np.zeros((1, 3)), "tokens": np.ones((1, 3))}
    assert comparison.cell(price, unsolved, unsolved, sign="+") == "-" and comparison.cell(price, mine, None) == ""
    assert comparison.cell(price, mine, unsolved, sign="+") == "-inf [-inf -inf]"


@pytest.mark.parametrize("undefined, known", [(0.45, True), (0.55, False)])
def test_most_draws_must_be_defined(monkeypatch, undefined, known):
    """An interval of the few draws for which a statistic means something would be too narrow."""
    monkeypatch.setattr(comparison, "RESAMPLES", 100)
    calls = iter([math.nan] * round(100 * undefined) + [1.0] * 100)
    text = comparison.cell((lambda arm: next(calls), 2), {"right": np.zeros((2, 3))})
    assert text == ("1.00 [1.00 1.00]" if known else "-")


def test_an_arm_gains_over_its_own_start():
    """From .5 to 1 it has gained as much as the baseline from 0 to .5, though it ends .5 ahead."""
    ahead = [run("mrt", seed, (0, 0, 0.0, [1.0, 0.0], [9.0, 9.0]), (10, 100, 4.0, [1.0, 1.0], [9.0, 9.0])) for seed in (0, 1)]
    row = comparison.tables({"grpo": GRPO, "mrt": ahead}).split("### Differences")[1].splitlines()[4]
    assert "+0.500 [" in row and "| 1.00 [" in row


def test_nothing_is_equal_to_no_tokens():
    """A supervised baseline samples nothing: no table, no differences there, and a line that says why."""
    sft = [dict(run, points=[dict(point, tokens=0) for point in run["points"]]) for run in GRPO]
    text = comparison.tables({"sft": sft, "mrt": MRT})
    _, tokens, seconds, differences, *_ = text.split("###")[1:]
    assert tokens == " Equal tokens\n\nsft has no sampled tokens that another arm could be equal to.\n\n"
    assert "| mrt |" in seconds and "| mrt | steps |" in differences and "| mrt | sampled tokens |" not in differences


def test_times_of_different_devices_are_shown_with_a_warning():
    """One line, and only then."""
    warning = "Warning: times can't be compared, they are those of CPU and H100."
    assert warning in comparison.tables({"grpo": GRPO, "mrt": [dict(run, device="H100") for run in MRT]})
    assert "Warning" not in comparison.tables({"grpo": GRPO, "mrt": MRT})


def test_curves_of_runs_with_different_checkpoints_meet_at_every_step():
    """Where one was measured and another wasn't, that one is interpolated."""
    often = run("grpo", 1, (0, 0, 0.0, [0.0, 0.0], [9.0, 9.0]), (4, 70, 1.0, [1.0, 0.0], [9.0, 9.0]),
                (10, 100, 4.0, [1.0, 1.0], [9.0, 9.0]))
    x, y, together = comparison.learning_curves([GRPO[0], often], "tokens", lambda values: values["right"].mean())
    assert x.tolist() == [[0, 0], [40, 70], [100, 100]] and y.tolist() == [[0, 0], [0.2, 0.5], [0.5, 1]]
    assert together.tolist() == [0, 0.35, 0.75]
    _, price, together = comparison.learning_curves([GRPO[0], often], "step", comparison.METRICS["tokens per right answer"][0])
    assert price[-1].tolist() == [60, 9] and together[-1] == 26  # 78 tokens, 3 answers: as in the tables, and no mean of ratios


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are drawn."""
    figures, blank = [], comparison.report.blank_figure
    monkeypatch.setattr(comparison.report, "blank_figure", lambda *size: figures.append(blank(*size)) or figures[-1])
    return figures


@pytest.mark.parametrize("kind", comparison.FIGURES)
def test_every_figure_shows_runs_with_different_checkpoints(kind, drawn, tmp_path):
    """An interrupted run has one more than the others, and one may end later."""
    often = run("grpo", 1, (0, 0, 0.0, [0.0, 0.0], [10.0, 10.0]), (4, 70, 1.0, [1.0, 0.0], [9.0, 9.0]),
                (10, 100, 4.0, [1.0, 0.0], [9.0, 9.0]), (20, 200, 8.0, [1.0, 1.0], [20.0, 40.0]))
    comparison.FIGURES[kind](tmp_path / "figure.png", {"grpo": [GRPO[0], often], "mrt": MRT})
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    lines = [line for panel in drawn[0].axes for line in panel.lines if line.get_label() == "grpo"]  # of both runs
    shown = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines]
    if kind == "curves":
        assert shown[0] == ([0, 4, 10, 15], pytest.approx([0, 0.35, 0.5, 0.75]))  # one ends at 10, one at 20
        assert shown[3][1][-1] == 40  # 120 tokens, 3 answers; the mean of both ratios is 45
    elif kind == "habits":
        assert shown[0] == ([0, 4, 10, 20], pytest.approx([0, 0.4, 1, 1.5]))  # the first one stays where it ended
    elif kind == "frontier":
        assert shown == [([40], [0.75])]  # each run at its own end


def test_an_arm_without_a_seed_of_the_baseline_has_no_difference():
    """It is in the tables of values; what can't be paired isn't compared."""
    differences = comparison.tables({"grpo": GRPO[:1], "mrt": MRT[1:]}).split("###")[4]
    assert "| mrt | no seed in common |  |  |" in differences


def two_seeds() -> list[dict]:
    """Of one arm: the second run has spent three times as much, knows more when it is stopped early, and has other habits."""
    second = run("grpo", 1, (0, 0, 0.0, [0.0, 0.0], [10.0, 10.0]), (10, 300, 8.0, [1.0, 1.0], [20.0, 40.0]))
    points = [point | {"curve": [[0, 0.3], [10, 0.7]], "thinking_tokens": 9.0, "habits": {"attempts": 3.0, "loops": 0.75}}
              for point in second["points"]]
    return [GRPO[0], second | {"points": points}]


def test_tables_show_the_mean_of_the_seeds():
    """Also of what the baseline has spent, where the others are compared with it."""
    steps, tokens, seconds, differences, budgets, habits = comparison.tables({"grpo": two_seeds(), "mrt": MRT}).split("###")[1:]
    assert "Equal tokens: 200 sampled tokens" in tokens and "Equal time: 6 seconds" in seconds
    row = lambda part: next(line for line in part.splitlines() if line.startswith("| grpo |")).strip("| ").split(" | ")
    assert row(steps)[-3:] == ["10", "200", "6"]
    assert row(budgets)[1:] == ["0.200", "0.600"] and row(habits)[1:] == ["2.00", "0.50"]


def test_the_budget_figure_shows_the_mean_of_the_seeds(drawn, tmp_path):
    """Of their curves, and of where they stop by themselves."""
    comparison.budgets_figure(tmp_path / "figure.png", {"grpo": two_seeds()})
    _, _, curve, star, *_ = drawn[0].axes[0].lines
    assert curve.get_xydata().ravel().tolist() == pytest.approx([0, 0.2, 10, 0.6])
    assert star.get_xydata().ravel().tolist() == [8.0, 0.75]
