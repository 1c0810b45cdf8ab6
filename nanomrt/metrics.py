"""What an evaluation reports, as pure functions of counts and curves.

    pass@k = 1 - C(n-c, k) / C(n, k)                c of n samples are right                                (1)
    regret = 1/H · integral_0^H (c(b) - J(b)) db    J(b): accuracy when thinking is stopped at b tokens     (2)

Regret rewards a policy for being right *early*, not only at the end of its budget. It depends on the comparator c:

    oracle          c = 1, right without thinking. A constant curve p has regret 1 - p.
    [maj@p]_j       stop after b tokens and take the majority of p answers. That costs p - 1 answers more than J(b), so its curve
                    stands (p - 1) · a tokens to the right, a to an answer; up to there, a line from J(0). Negative regret: to
                    think on was worth more than to vote.                                                  (3)
    empirical best  c = the largest J at any budget up to H, of all the runs compared: what is known to be within reach. (4)

Every reported number gets a 95 % percentile bootstrap over problems. Samples of one problem are not independent, so they
are resampled together: the rows of `bootstrap` are problems.
Left out: maj@k for k below the number of samples (a mean over subsets), and intervals that correct the bootstrap's bias.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """(1): the probability that k of n samples, drawn without replacement, hold at least one of the c right ones.

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 0, 4), pass_at_k(4, 3, 2)
    (0.5, 0.0, 1.0)
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"need 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}: pass@k takes at least k samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # (1) comb is 0 when fewer than k samples are wrong


def maj_at_k(answers: Sequence[Hashable | None], right: Sequence[float]) -> float:
    """Accuracy of the commonest of all k answers; of tied answers one is chosen at random, and this is the expectation.

    An answer is right or wrong wherever it stands. None is no answer and has no vote; without any vote it is 0.

    >>> maj_at_k(["a", "b", "a", None], [0, 1, 0, 0]), maj_at_k(["a", "b"], [0, 1]), maj_at_k([None], [0])
    (0.0, 0.5, 0.0)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    verdict = dict(zip(answers, right))
    tied = [verdict[answer] for answer, count in votes.items() if count == max(votes.values())]
    return sum(tied) / len(tied) if tied else 0.0


def normalised_regret(budgets: Sequence[float], J: Sequence | np.ndarray, horizon: float) -> np.ndarray:
    """(2) against the oracle, by the trapezoid rule, with J interpolated linearly at the horizon. Against another comparator it
    is the difference between J's regret and the comparator's.

    budgets: increasing from 0, tokens; J: (…, len(budgets)) in 0..1. Returns (…), in 0..1.

    >>> float(normalised_regret([0, 10, 20], [0.0, 1.0, 1.0], 20)), float(normalised_regret([0, 10], [0.0, 1.0], 5))
    (0.25, 0.75)
    """
    b, J = np.asarray(budgets, dtype=float), np.asarray(J, dtype=float)
    if b[0] != 0 or (np.diff(b) <= 0).any() or not 0 < horizon <= b[-1]:
        raise ValueError(f"need budgets that increase from 0 to the horizon {horizon} or beyond, not {list(budgets)}")
    i = int(np.searchsorted(b, horizon))  # b[i-1] < horizon <= b[i]
    share = (horizon - b[i - 1]) / (b[i] - b[i - 1])
    J_horizon = J[..., i - 1] + share * (J[..., i] - J[..., i - 1])  # (…)
    b, J = np.append(b[:i], horizon), np.concatenate([J[..., :i], J_horizon[..., None]], axis=-1)  # (i+1,), (…,i+1)
    return 1 - ((J[..., 1:] + J[..., :-1]) / 2 * np.diff(b)).sum(-1) / horizon  # (2)


def regret_to_maj(budgets: Sequence[float], J: np.ndarray, maj: np.ndarray, extra: float, horizon: float) -> np.ndarray:
    """(3): maj (…, len(budgets)) is the majority's accuracy after as much thinking as J's, `extra` the tokens of the p - 1 more
    answers. Returns (…), in -1..1.

    >>> float(regret_to_maj([0, 10, 20], np.array([0.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0]), 10, 20))
    0.5
    """
    stands = [0, *(b + extra for b in budgets)]
    comparator = np.concatenate([J[..., :1], maj], axis=-1)  # (…,len(budgets)+1)
    return normalised_regret(budgets, J, horizon) - normalised_regret(stands, comparator, horizon)  # (3)


def empirical_best(curves: Sequence[tuple[Sequence[float], Sequence[float]]], horizon: float) -> float:
    """The comparator of (4): the largest J of some (budgets, J), up to the horizon.

    >>> empirical_best([([0, 10, 20], [0.1, 0.4, 0.3]), ([0, 20], [0.0, 1.0])], 10)
    0.5
    """
    return max(max([float(np.interp(horizon, b, J)), *(value for at, value in zip(b, J) if at <= horizon)]) for b, J in curves)


def auc(values: Sequence[float], right: Sequence[float]) -> float:
    """The probability that a right one has the larger value than a wrong one; of equals, half. Without both kinds it is 1/2.

    >>> auc([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0]), auc([0.3], [1])
    (0.875, 0.5)
    """
    values, right = np.asarray(values, dtype=float), np.asarray(right) > 0
    ours, theirs = values[right], np.sort(values[~right])
    if not len(ours) or not len(theirs):
        return 0.5
    behind = [np.searchsorted(theirs, ours, side) for side in ("left", "right")]  # wrong ones below, and below or equal
    return float(np.mean(behind) / len(theirs))


def ratio(columns: np.ndarray) -> float:
    """The first column's sum over the second's, (n,2) -> a number: a ratio of totals, such as tokens per right answer.

    A mean of ratios would divide by the zero of every problem that is never solved. With nothing to divide by it is inf.

    >>> ratio(np.array([[30.0, 1.0], [50.0, 3.0], [40.0, 0.0]])), ratio(np.array([[30.0, 0.0]]))
    (30.0, inf)
    """
    total, count = columns.sum(0)
    return float(total / count) if count else math.inf


def bootstrap(per_problem_values: Sequence | np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean,
              resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """A statistic of all problems with its 95 % percentile interval: {"value", "low", "high"}.

    per_problem_values: (n, …), a row per problem; `statistic` maps such an array, rows drawn with replacement, to a number.
    One seed gives the same resamples to every statistic of the same problems.

    >>> bootstrap([0.0, 1.0] * 50)
    {'value': 0.5, 'low': 0.4, 'high': 0.6}
    """
    values = np.asarray(per_problem_values, dtype=float)
    if not len(values):
        raise ValueError("an interval over problems needs at least one problem")
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    # inverted_cdf takes one of the resampled statistics instead of a point between two: inf among them stays harmless.
    low, high = np.quantile([statistic(values[rows]) for rows in drawn], [0.025, 0.975], method="inverted_cdf")
    return {"value": float(statistic(values)), "low": float(low), "high": float(high)}
