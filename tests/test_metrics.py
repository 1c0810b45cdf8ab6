"""Closed forms, brute force and known distributions for every number that an evaluation reports."""

import math
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomrt.metrics import (
    auc,
    bootstrap,
    empirical_best,
    maj_at_k,
    normalised_regret,
    pass_at_k,
    ratio,
    regret_to_maj,
)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c in range(n + 1):
        right = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            share = np.mean([any(subset) for subset in combinations(right, k)])
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_1_is_the_accuracy_and_large_counts_are_exact():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5)


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (4, 5, 1), (4, 2, 0), (4, -1, 1)])
def test_pass_at_k_rejects_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="need 1 <= k <= n"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("answers", ["a", "ab", "aab", "aabb", "abcc", "aabbc", "abcde", "aaabbb"])
@pytest.mark.parametrize("truth", "abz")
def test_majority_is_the_mean_over_orders_in_which_the_first_of_the_tied_wins(answers, truth):
    winners = [Counter(order).most_common(1)[0][0] for order in permutations(answers)]  # ties: the first one seen
    expected = np.mean([winner == truth for winner in winners])
    assert maj_at_k(list(answers), [float(a == truth) for a in answers]) == pytest.approx(expected)


def test_majority_without_votes_is_wrong_and_silence_does_not_vote():
    assert maj_at_k([None, None], [0.0, 0.0]) == 0.0
    assert maj_at_k([None, None, "a"], [0.0, 0.0, 1.0]) == 1.0


GRID = [0, 9, 18, 27, 54]


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("horizon", [1, 9, 20, 54])
def test_regret_of_a_constant_is_one_minus_it_and_of_an_oracle_zero(p, horizon):
    assert normalised_regret(GRID, [p] * 5, horizon) == pytest.approx(1 - p)


@pytest.mark.parametrize("horizon", [5, 18, 30, 54])
def test_regret_of_a_line_is_exact_at_every_horizon(horizon):
    line = np.array(GRID) / 54
    assert normalised_regret(GRID, line, horizon) == pytest.approx(1 - horizon / 108)


def test_regret_of_a_step():
    step = [0, 0, 1, 1, 1]  # the trapezoid rule rises from 9 to 18
    assert normalised_regret(GRID, step, 54) == pytest.approx((9 + 4.5) / 54)
    assert normalised_regret(GRID, step, 9) == 1
    earlier = [0, 1, 1, 1, 1]
    assert normalised_regret(GRID, earlier, 54) < normalised_regret(GRID, step, 54)  # being right sooner counts


def test_regret_is_linear_in_the_curve_so_the_mean_over_problems_is_that_of_the_mean_curve():
    J = np.random.default_rng(0).random((6, 2, 5))
    regret = normalised_regret(GRID, J, 40)
    assert regret.shape == (6, 2)
    assert regret.mean() == pytest.approx(normalised_regret(GRID, J.mean((0, 1)), 40))


@pytest.mark.parametrize("budgets, horizon", [([1, 2], 2), ([0, 2, 2], 2), ([0, 2], 3), ([0, 2], 0)])
def test_regret_rejects_a_grid_that_does_not_reach(budgets, horizon):
    with pytest.raises(ValueError, match="increase from 0 to the horizon"):
        normalised_regret(budgets, [0.5] * len(budgets), horizon)


@pytest.mark.parametrize("p, q", [(0.2, 0.2), (0.2, 0.7), (0.9, 0.4)])
@pytest.mark.parametrize("extra, horizon", [(10, 5), (10, 10), (10, 54), (60, 54)])
def test_regret_to_a_constant_majority(p, q, extra, horizon):
    """The comparator goes from p to q while its further answers are paid for, and stays there."""
    on_the_way = min(extra, horizon)
    reached = p + (q - p) * on_the_way / extra
    area = (p + reached) / 2 * on_the_way + q * (horizon - on_the_way)
    assert regret_to_maj(GRID, np.full(5, p), np.full(5, q), extra, horizon) == pytest.approx(area / horizon - p)


def test_regret_to_majorities_that_are_no_better_than_one_answer_is_what_their_price_costs():
    line = np.array(GRID) / 54
    for extra, horizon in ((9, 54), (27, 54), (3, 20)):  # the comparator is the same line, `extra` later
        late = normalised_regret(GRID, line, horizon) - (1 - (horizon - extra) ** 2 / 2 / 54 / horizon)
        assert regret_to_maj(GRID, line, line, extra, horizon) == pytest.approx(late) and late < 0


def test_regret_to_majorities_by_brute_force():
    J, maj = np.random.default_rng(0).random((2, 7, 5))
    t = np.linspace(0, 40, 400_001)
    for i in range(7):
        ahead = np.interp(t, [0, *(b + 6 for b in GRID)], [J[i, 0], *maj[i]]) - np.interp(t, GRID, J[i])
        assert regret_to_maj(GRID, J, maj, 6, 40)[i] == pytest.approx(ahead.mean(), abs=1e-5)


def test_empirical_best_is_the_largest_value_of_any_curve_up_to_the_horizon():
    slow, fast = (GRID, [0.0, 0.1, 0.2, 0.3, 0.9]), ([0, 10, 54], [0.1, 0.5, 0.4])
    assert empirical_best([slow], 54) == 0.9 and empirical_best([slow, fast], 54) == 0.9
    assert empirical_best([slow, fast], 18) == 0.5  # reached at 10
    assert empirical_best([slow], 18) == 0.2
    assert empirical_best([fast], 5) == pytest.approx(0.3) == empirical_best([slow, fast], 5)  # between two budgets
    for horizon in (5, 18, 40, 54):
        best = empirical_best([slow, fast], horizon)
        assert all(best - (1 - normalised_regret(*curve, horizon)) >= 0 for curve in (slow, fast))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_auc_is_the_share_of_pairs_in_order(pairs):
    """Ties count half; without a pair it says nothing."""
    values, right = [value for value, _ in pairs], [float(is_right) for _, is_right in pairs]
    won = [(a > b) + (a == b) / 2 for a, good in pairs for b, other in pairs if good and not other]
    assert auc(values, right) == pytest.approx(sum(won) / len(won) if won else 0.5)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.exponential(2.0, size=(300, 60))
    intervals = [bootstrap(sample, resamples=200, seed=i) for i, sample in enumerate(samples)]
    covered = np.mean([interval["low"] <= 2.0 <= interval["high"] for interval in intervals])
    assert 0.89 <= covered <= 0.98


def test_bootstrap_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap(values)
    assert interval["value"] == pytest.approx(values.mean())
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(1).random(50)
    assert bootstrap(values) == bootstrap(list(values))
    assert bootstrap(values, seed=1) != bootstrap(values)


def test_bootstrap_of_a_ratio_resamples_both_columns_together():
    tokens, right = np.full(40, 30.0), np.tile([1.0, 0.0], 20)
    interval = bootstrap(np.stack([tokens, right], axis=1), ratio)
    accuracy = bootstrap(right)
    assert interval["value"] == 60
    assert interval["low"] == pytest.approx(30 / accuracy["high"])
    assert interval["high"] == pytest.approx(30 / accuracy["low"], rel=0.1)
    proportional = np.stack([2 * right, right], axis=1)
    assert bootstrap(proportional, ratio) == {"value": 2, "low": 2, "high": 2}


def test_bootstrap_of_one_problem_of_none_and_of_nothing_right():
    assert bootstrap([0.25]) == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert bootstrap([[10.0, 0.0]] * 3, ratio) == {"value": math.inf, "low": math.inf, "high": math.inf}
    rarely = bootstrap([[10.0, 0.0]] * 3 + [[10.0, 1.0]], ratio)  # some resamples hold no right answer
    assert rarely["value"] == 40 and rarely["high"] == math.inf and not math.isnan(rarely["low"])
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap([])
