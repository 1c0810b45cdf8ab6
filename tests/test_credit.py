"""The credit functions of nanomrt/mrt.py: by hand, against loops, as exact policy gradients, and on the urn.

The exact gradients use the test bed of test_mrt.py: a tabular policy over 3 tokens that writes 3 of them, all 27 sequences (or
all groups of two) enumerated. Here the first two tokens are an episode each and the third is the answer, so the forced answers
J or the values V are a table over the 1 + 3 + 9 prefixes.
"""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mrt import J_TABLE, REWARD, SEQUENCES, close, make_batch, make_episodes, prefix_index, sequence_logprobs

from nanomrt import methods
from nanomrt.config import READ_BY, TokenCounts
from nanomrt.methods import METHODS, Gathered, after_an_attempt, prefix_form
from nanomrt.mrt import (
    Batch,
    Episodes,
    anytime_credit,
    clipped_loss,
    group_advantage,
    imitation_credit,
    likelihood_loss,
    outcome_credit,
    plain_credit,
    prefix_bonus_credit,
    progress_credit,
    repeated,
    short_outcome_credit,
    value_credit,
    value_over_tokens,
)
from nanomrt.rollout import Forked, graded

G = 2
CREDITS = [outcome_credit, short_outcome_credit, progress_credit, prefix_bonus_credit, value_credit, anytime_credit,
           imitation_credit, plain_credit]


ATTEMPTS_OF_3, ATTEMPTS_OF_9 = (TokenCounts(prompt=0, attempt=n, answer=0, trace=0) for n in (3, 9))


def options(**changed) -> SimpleNamespace:
    return SimpleNamespace(**dict(alpha=1.0, gamma=0.0, J_discount=1.0, advantage_norm="mean", progress_norm="none",
                                  length_penalty=0.5, thinking_budget=10, repeat_penalty=0.0,
                                  token_counts=ATTEMPTS_OF_9) | changed)


def per_row(batch: Batch, credit: torch.Tensor) -> list[list[float]]:
    """The credit of each row's actions."""
    return [part[act].tolist() for part, act in zip(credit.split(batch.lengths.tolist()),
                                                    batch.is_action.split(batch.lengths.tolist()))]


def example() -> tuple[Batch, Episodes]:
    """Two rollouts of one prompt (one token). The first fails, then solves, then answers (2 tokens) right; the second makes one
    attempt and answers wrong."""
    batch = make_batch([8, 5], [1, 0], [0, 0])
    return batch, make_episodes(batch, [[3, 6], [4]], [[0.25, 0.0, 1.0], [0.25, 0.5]])


# --- By hand ---


@given(st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=9), min_size=1, max_size=4),
       st.integers(1, 3))
def test_repeated_is_what_a_walk_through_each_rollout_has_seen(rows, n):
    """Against sets of n-grams: other rollouts do not count, nor do n-grams with a token that is no action (a tenth of them)."""
    flat = [token for row in rows for token in row]
    batch = Batch(torch.tensor([token for token, _ in flat]), torch.tensor([len(row) for row in rows]),
                  torch.tensor([act > 0 for _, act in flat]), *[None] * 4)
    expected = []
    for row in rows:
        seen, again = set(), [False] * len(row)
        for t in range(len(row) - n + 1):
            gram = tuple(token for token, _ in row[t : t + n])
            if all(act for _, act in row[t : t + n]):
                again[t : t + n] = [True] * n if gram in seen else again[t : t + n]
                seen.add(gram)
        expected += again
    assert repeated(batch, n).tolist() == expected


def test_a_price_on_repetition_is_paid_where_it_happens():
    """Of two attempts of 3 tokens (used = 1), the second says the first one again: its tokens pay, no others, and progress is
    added to that as to any outcome. Whoever repeats nothing pays nothing."""
    batch, episodes = example()
    again = Batch(torch.tensor([9, 1, 2, 3, 1, 2, 3, 8, 9, 1, 2, 3, 8]), *[getattr(batch, name) for name in (
        "lengths", "is_action", "logprob", "reward", "prompt_id", "finished")])
    without, price = options(), options(repeat_penalty=0.25, token_counts=ATTEMPTS_OF_3)
    for credit in (outcome_credit, progress_credit):
        paid = credit(again, episodes, without) - credit(again, episodes, price)
        assert per_row(batch, paid) == [[0, 0, 0, 0.25, 0.25, 0.25, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("norm, right, wrong", [
    ("mean", 2 / 3, -1 / 3), ("mean_std", math.sqrt(2), -math.sqrt(1 / 2)), ("rloo", 1, -1 / 2)])
def test_outcome_by_hand(norm, right, wrong):
    """One right of three: minus the mean 1/3; over the std sqrt(2)/3; minus the mean of the other two. Every action has it."""
    batch = make_batch([3, 2, 4], [1, 0, 0], [5, 5, 5])
    credit = outcome_credit(batch, None, options(advantage_norm=norm))
    assert per_row(batch, credit) == [pytest.approx([right] * 2, rel=1e-4), pytest.approx([wrong], rel=1e-4),
                                      pytest.approx([wrong] * 3, rel=1e-4)]


def test_discounted_progress_by_hand():
    """J_discount = 0.9: a failure costs nothing, a solution gains 0.9, checking it again costs 0.1, and losing it all of it."""
    batch = make_batch([12], [0], [0])
    episodes = make_episodes(batch, [[3, 5, 7, 9]], [[0.0, 0.0, 1.0, 1.0, 0.0]])
    row = per_row(batch, progress_credit(batch, episodes, options(J_discount=0.9)))[0]
    assert row[0:8:2] == pytest.approx([0.0, 0.9, -0.1, -1.0])


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5])
def test_discounted_progress_is_a_shaping_reward(discount):
    """Credit that looks ahead with the same discount telescopes to discount^n · J_T - J_before with n episodes to go: what is
    worth reaching stays the same, only sooner (Ng, Harada and Russell)."""
    J = [0.25, 0.5, 0.0, 1.0, 0.75]
    batch = make_batch([12], [0], [0])
    episodes = make_episodes(batch, [[3, 5, 7, 9]], [J])
    row = per_row(batch, progress_credit(batch, episodes, options(J_discount=discount, gamma=discount)))[0]
    expected = [discount ** (4 - j) * J[4] - J[j] for j in range(4)]
    assert row[0:8:2] == pytest.approx(expected, abs=1e-6)


def test_short_outcome_by_hand():
    """Half a reward per budget of 10: right after 4 and 8 tokens is worth 0.8 and 0.6, wrong 0 at any length."""
    batch = make_batch([5, 9, 3, 10], [1, 1, 0, 0], [0] * 4)
    credit = short_outcome_credit(batch, None, options())
    assert [row[0] for row in per_row(batch, credit)] == pytest.approx([0.45, 0.25, -0.35, -0.35])


def test_progress_by_hand():
    """Outcome 1/2 or -1/2; progress -0.25 and 1 or 0.25; alpha = 2; the answer has the outcome alone."""
    batch, episodes = example()
    assert per_row(batch, progress_credit(batch, episodes, options(alpha=2.0))) == [
        [0.0, 0.0, 2.5, 2.5, 2.5, 0.5, 0.5], [0.0, 0.0, 0.0, -0.5]]
    assert per_row(batch, progress_credit(batch, episodes, options(alpha=2.0, gamma=0.5))) == [  # -0.25 + 1/2
        [1.0, 1.0, 2.5, 2.5, 2.5, 0.5, 0.5], [0.0, 0.0, 0.0, -0.5]]


def test_prefix_bonus_by_hand():
    """f + 2 (f - J(z_1)) with J(z_1) = 1/4, 3/4, 1/2: 2.5, 1.5 and -1, mean 1. z_1 is context and has no credit."""
    batch = make_batch([6, 5, 5], [1, 1, 0], [0] * 3, prompt=3)
    episodes = make_episodes(batch, [[6], [5], [5]], [[0.25, 1], [0.75, 1], [0.5, 0]], prompt=3)
    credit = prefix_bonus_credit(batch, episodes, options(alpha=2.0))
    assert per_row(batch, credit) == [[1.5] * 3, [0.5] * 2, [-2.0] * 2] and not credit[~batch.is_action].any()


def test_value_by_hand():
    """V from 1/2 to 1/4 to 1, and then the answer is wrong after all: -1/4, 3/4, -1; no outcome beside it."""
    batch = make_batch([8], [0], [0])
    episodes = make_episodes(batch, [[3, 6, 8]], [[0.5, 0.25, 1, 0]])
    assert per_row(batch, value_credit(batch, episodes, options())) == [[-0.25] * 2 + [0.75] * 3 + [-1.0] * 2]


def test_anytime_by_hand():
    """C = 10. Rollout 1: J = .25, .25, 0, 0, 0, then 1 (solved, and then the answer) for five: R(0) = .55, R(2) = R(5) = .5.
    Rollout 2: .25 three times, then the wrong answer's 0: R(0) = .075, R(2) = .025, R(3) = R(5) = 0."""
    batch, episodes = example()
    past, shared = lambda s, mean: s / 10 * mean * (10 - s) / 10, lambda s, mean: (1 - s / 10) * mean
    one = [0.55 - 0.3125] * 2 + [0.5 - past(2, 0.25) - shared(2, 0.2625)] * 3 + [0.5 - past(5, 0.1) - shared(5, 0.25)] * 2
    two = [0.075 - 0.3125] * 3 + [0.0 - past(3, 0.25) - shared(3, 0.25)]
    assert per_row(batch, anytime_credit(batch, episodes, options())) == [pytest.approx(one), pytest.approx(two)]
    J, s = value_over_tokens(batch, episodes, 10)
    assert J.tolist() == [[0.25] * 2 + [0.0] * 3 + [1.0] * 6, [0.25] * 3 + [0.0] * 8]
    assert per_row(batch, s) == [[0, 0, 2, 2, 2, 5, 5], [0, 0, 0, 3]]


def test_imitation_by_hand():
    """star and mrt_star: 1 for every action of what is right; sft: 1 for every action."""
    batch, _ = example()
    assert per_row(batch, imitation_credit(batch, None, options())) == [[1.0] * 7, [0.0] * 4]
    assert per_row(batch, plain_credit(batch, None, options())) == [[1.0] * 7, [1.0] * 4]


# --- Against loops, on ragged batches ---


@st.composite
def whole_traces(draw) -> tuple[Batch, Episodes | None]:
    """Rollouts with 0 to 4 episodes, an answer of 0 to 3 tokens (0: cut off while thinking), in up to three groups."""
    rows, values = draw(st.integers(1, 6)), st.sampled_from([0.0, 0.25, 0.5, 1.0])
    ends = [sorted(draw(st.sets(st.integers(2, 12), max_size=4))) for _ in range(rows)]
    lengths = [max(e[-1] if e else 2, 2) + draw(st.integers(0, 3)) for e in ends]
    J = [[draw(values) for _ in range(len(e) + 1)] for e in ends]
    batch = make_batch(lengths, [draw(st.sampled_from([0.0, 1.0])) for _ in ends], [draw(st.integers(0, 2)) for _ in ends])
    return batch, make_episodes(batch, ends, J)


def own_episodes(batch: Batch, episodes: Episodes, r: int) -> list[tuple[int, int, float, float]]:
    """(start, end, J before, J after) of rollout r, in tokens after the prompt of one."""
    begin = int(batch.offset[r]) + 1
    columns = (episodes.start - begin, episodes.end - begin, episodes.J_before, episodes.J_after)
    return list(zip(*(x[episodes.row == r].tolist() for x in columns), strict=True))


@given(whole_traces(), st.sampled_from([6, 10, 20]))
@settings(max_examples=40, deadline=None)
def test_anytime_token_by_token(traces, C):
    """J after t tokens, its integral from s to C (one summand per token), the mean before s and the group's mean, in loops."""
    batch, episodes = traces
    B = len(batch.lengths)
    J, thinking = [], []
    for r in range(B):
        own = own_episodes(batch, episodes, r)
        thinking.append(min(own[-1][1], C) if own else 0)
        J.append([])
        for t in range(C):
            value = own[0][2] if own else 0.0
            for _, end, _, after in own:
                value = after if t >= end else value
            J[r].append(value if t < thinking[r] else float(batch.reward[r]))
    R = lambda r, s: sum(J[r][s:]) / C
    expected = []
    for r in range(B):
        group, row = [i for i in range(B) if batch.prompt_id[i] == batch.prompt_id[r]], []
        for t in range(int(batch.lengths[r]) - 1):
            s = min(next((start for start, end, *_ in own_episodes(batch, episodes, r) if start <= t < end), thinking[r]), C)
            past = sum(J[r][:s]) / s if s else 0.0
            row.append(R(r, s) - s / C * past * (C - s) / C - (1 - s / C) * sum(R(i, s) for i in group) / len(group))
        expected.append(row)
    got = per_row(batch, anytime_credit(batch, episodes, options(thinking_budget=C)))
    assert got == [pytest.approx(row, abs=1e-5) for row in expected]


@given(whole_traces())
@settings(max_examples=25, deadline=None)
def test_value_and_prefix_bonus_in_loops(traces):
    """vineppo: every token has its own episode's difference. mrt_b: reward + alpha · (sum of differences), minus the group's
    mean of the same. Also: nobody writes to its arguments, and context has no credit."""
    batch, episodes = traces
    before = [x.clone() for x in (*vars(batch).values(), *vars(episodes).values())]
    for function in CREDITS:
        assert not function(batch, episodes, options())[~batch.is_action].any()
    assert all(map(torch.equal, before, (*vars(batch).values(), *vars(episodes).values())))
    value, total = [], []
    for r, length in enumerate(batch.lengths.tolist()):
        own = own_episodes(batch, episodes, r)
        value.append([next((after - b for start, end, b, after in own if start <= t < end), 0.0) for t in range(length - 1)])
        total.append(float(batch.reward[r]) + 0.5 * sum(after - b for _, _, b, after in own))
    assert per_row(batch, value_credit(batch, episodes, options())) == value
    for r, row in enumerate(per_row(batch, prefix_bonus_credit(batch, episodes, options(alpha=0.5)))):
        group = [total[i] for i in range(len(total)) if batch.prompt_id[i] == batch.prompt_id[r]]
        assert row == pytest.approx([total[r] - sum(group) / len(group)] * len(row), abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(0, 3)), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_rloo_is_the_exact_leave_one_out_mean(rows):
    """Reward minus the mean of the others of its group; alone in a group it is 0."""
    reward, group = torch.tensor([r for r, _ in rows]), torch.tensor([g for _, g in rows])
    for i, got in enumerate(group_advantage(reward, group, "rloo").tolist()):
        others = [rows[k][0] for k in range(len(rows)) if k != i and rows[k][1] == rows[i][1]]
        assert got == pytest.approx(rows[i][0] - sum(others) / len(others) if others else 0.0, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 18), st.booleans()), min_size=2, max_size=8), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_being_short_pays_only_for_who_is_right(rows, penalty):
    """All wrong answers of a group have one advantage, whatever their length, and 0 if nobody is right; no right answer is worth
    less than a wrong one, also beyond the budget and at the full penalty; of two right ones the shorter isn't worth less."""
    batch = make_batch([n + 1 for n, _ in rows], [float(right) for _, right in rows], [0] * len(rows))
    A = [row[0] for row in per_row(batch, short_outcome_credit(batch, None, options(length_penalty=penalty)))]
    wrong, right = ([(n, a) for (n, good), a in zip(rows, A) if good == kind] for kind in (False, True))
    assert len({a for _, a in wrong}) <= 1 and (right or not any(A))
    assert all(a >= b for _, a in right for _, b in wrong)
    assert all(a >= b for n, a in right for m, b in right if n < m)
    if penalty == 0:
        assert A == [row[0] for row in per_row(batch, outcome_credit(batch, None, options()))]


OTHER = {"alpha": 3.0, "gamma": 0.5, "J_discount": 0.5, "progress_norm": "std", "advantage_norm": "rloo", "repeat_penalty": 0.5,
         "length_penalty": 0.9}


@pytest.mark.parametrize("key", OTHER)  # those of gathering and of the loss: tests/test_methods.py
def test_the_methods_that_are_said_to_read_a_key_are_those_whose_credit_heeds_it(key):
    """The command line refuses it for the others."""
    batch, whole = example()
    batch = replace(batch, tokens=0 * batch.tokens)  # whoever minds repetition has something to mind
    one = make_episodes(batch, [[3], [4]], [[0.25, 0.0], [0.25, 0.75]])
    heeding = set()
    for name, method in METHODS.items():
        episodes = one if method.gather in (prefix_form, after_an_attempt) else whole
        plain, other = (method.credit(batch, episodes, options(token_counts=ATTEMPTS_OF_3, **keys))
                        for keys in ({}, {key: OTHER[key]}))
        if not torch.equal(plain, other):
            heeding.add(name)
    assert heeding == set(READ_BY[key])


def test_likelihood_loss():
    """-sum w A log p, and -w A its gradient; on policy that is the gradient of the clipped loss, off policy it is not."""
    logprob = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    A, w = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 0.25, 0.25])
    loss = likelihood_loss(logprob, A, w)
    assert loss.item() == pytest.approx(0.5 + 0.25)
    grad = lambda loss: torch.autograd.grad(loss, logprob)[0].tolist()
    assert grad(loss) == pytest.approx([-0.5, 0.0, -0.5])
    assert grad(clipped_loss(logprob, logprob.detach(), A, w, 0.2, 0.2)) == pytest.approx([-0.5, 0.0, -0.5])
    assert grad(clipped_loss(logprob, logprob.detach() - 1, A, w, 0.2, 0.2)) == [0.0, 0.0, 0.0]  # beyond the clip


# --- Exact gradients ---


@pytest.fixture
def theta() -> torch.Tensor:
    """Logits for the next token after each of the 1 + 3 + 9 prefixes."""
    return torch.randn(13, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()


def gradient(theta: torch.Tensor, objective: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(objective, theta, retain_graph=True)[0]


def probability(theta: torch.Tensor) -> torch.Tensor:
    return sequence_logprobs(theta, SEQUENCES).sum(1).exp()  # (27,)


def values_of(theta: torch.Tensor) -> torch.Tensor:
    """(13,) V of every prefix: the probability that going on ends right."""
    p, index = probability(theta).detach(), prefix_index(SEQUENCES)  # (27,), (27,3)
    reach, right = (torch.zeros(13).double().index_add(0, index.flatten(), x.repeat_interleave(3)) for x in (p, p * REWARD))
    return right / reach


def expected_gradient(theta: torch.Tensor, credit, table: torch.Tensor, ends: tuple[int, ...], **keys) -> torch.Tensor:
    """Of sum over tokens A log pi in a group of two, over all 27 · 27 groups with their probabilities. Per rollout.

    ends: of the episodes, 1 + tokens; a boundary's value is `table` of the prefix, or the reward at the end.
    """
    pair = torch.cartesian_prod(torch.arange(27), torch.arange(27))  # (729,2)
    rows, n = pair.flatten(), 2 * 729
    logprob = sequence_logprobs(theta, SEQUENCES[rows])  # (n,3)
    at_boundary = torch.cat([table[prefix_index(SEQUENCES)], REWARD[:, None]], dim=1)[rows]  # (n,4) after 0 … 3 tokens
    batch = make_batch([4] * n, REWARD[rows], [i // 2 for i in range(n)])
    episodes = make_episodes(batch, [list(ends)] * n, at_boundary[:, [0, *(end - 1 for end in ends)]].tolist())
    A = credit(batch, episodes, options(**keys))[batch.is_action].double().view(n, 3)
    weight = probability(theta).detach()[pair].prod(1).repeat_interleave(2) / 2  # (n,)
    return gradient(theta, (weight[:, None] * A * logprob).sum())


def test_rloo_has_the_policy_gradient_itself(theta):
    """And the group's mean (1 - 1/G) of it."""
    exact = gradient(theta, (probability(theta) * REWARD).sum())
    assert close(expected_gradient(theta, outcome_credit, J_TABLE, (2, 3), advantage_norm="rloo"), exact, 1e-6)
    assert close(expected_gradient(theta, outcome_credit, J_TABLE, (2, 3)), (1 - 1 / G) * exact, 1e-6)


def test_length_penalty_has_the_gradient_of_its_reward(theta):
    """Sequences that end with their first token 2, or after three: (1 - 1/G) of the gradient of E[right · (1 - tokens/2/10)]."""
    ended = sorted({tuple(s[: s.index(2) + 1] if 2 in s else s) for s in SEQUENCES.tolist()})  # 1 + 2 + 12
    reward = torch.tensor([(3 * sum(s) + len(s)) % 2 for s in ended], dtype=torch.float32)
    logp = theta.log_softmax(-1)
    index = lambda s: [0, *([1 + s[0]] if len(s) > 1 else []), *([4 + 3 * s[0] + s[1]] if len(s) > 2 else [])]
    logprob = [torch.stack([logp[i, token] for i, token in zip(index(s), s)]) for s in ended]  # ragged
    p = torch.stack([x.sum() for x in logprob]).exp()
    old = p.tolist()
    assert p.sum().item() == pytest.approx(1) and len(ended) == 15 and 0 < reward.mean() < 1
    pairs = list(product(range(15), repeat=2))
    batch = make_batch([1 + len(ended[i]) for pair in pairs for i in pair], reward[torch.tensor(pairs).flatten()],
                       [k for k in range(len(pairs)) for _ in "ab"])
    A = short_outcome_credit(batch, None, options())[batch.is_action].double()
    weight = torch.cat([torch.full((len(ended[i]),), old[a] * old[b] / 2) for a, b in pairs for i in (a, b)])
    got = gradient(theta, (weight * A * torch.cat([logprob[i] for pair in pairs for i in pair])).sum())
    tokens = torch.tensor([len(s) for s in ended])
    assert close(got, (1 - 1 / G) * gradient(theta, (p * reward * (1 - 0.5 * tokens / 10)).sum()), 1e-6)


def test_vineppo_with_the_true_V_has_the_policy_gradient_itself(theta):
    """E[sum_j (V_j - V_{j-1}) grad log pi(z_j)] = grad E[reward], with no 1 - 1/G; with another V it hasn't."""
    exact = gradient(theta, (probability(theta) * REWARD).sum())
    assert close(expected_gradient(theta, value_credit, values_of(theta), (2, 3, 4)), exact, 1e-6)
    assert not close(expected_gradient(theta, value_credit, J_TABLE, (2, 3, 4)), exact, 1e-2)


def test_anytime_climbs_the_accuracy_at_a_uniformly_drawn_budget(theta):
    """What is exact: episode j's own gradient E[R(s_j) grad log pi(z_j)] arrives times 1 - (1 - s_j/C)/G. The past and the others
    of the group are baselines; the rollout's own share 1/G of its group's mean isn't one, and it counts less the later it is.
    So, as with the mean in GRPO, only the first episode's share is the usual 1 - 1/G, and as G grows all become 1: then the sum
    is the gradient of E[R(0)], the accuracy at a uniform budget."""
    C = 4  # J after 0, 1, 2 tokens, and the reward once the third, the answer, is due: t = 2 on
    J = J_TABLE[prefix_index(SEQUENCES)]  # (27,3)
    R = torch.stack([J[:, 0] + J[:, 1] + 2 * REWARD, J[:, 1] + 2 * REWARD, 2 * REWARD], dim=1) / C  # (27,3) R(0), R(1), R(2)
    p, logprob = probability(theta), sequence_logprobs(theta, SEQUENCES)
    share = lambda G: 1 - (1 - torch.arange(3) / C) / G  # (3,) s_j = 0, 1, 2
    exact = lambda share: gradient(theta, (p.detach()[:, None] * share * R * logprob).sum())
    assert close(exact(share(torch.inf)), gradient(theta, (p * R[:, 0]).sum()), 1e-12)
    assert close(expected_gradient(theta, anytime_credit, J_TABLE, (2, 3), thinking_budget=C), exact(share(G)), 1e-6)


def test_the_backtracking_bonus_is_a_baseline_of_the_context(theta):
    """mrt_b: z_1, the first token, is context. J(z_1) drops out of the expectation and (1 + alpha)(1 - 1/G) times the outcome's
    gradient after z_1 is left: the bonus changes the variance, and which z_1 weighs more once a std divides."""
    def climbing(alpha: float) -> torch.Tensor:
        pair = torch.cartesian_prod(torch.arange(27), torch.arange(27))
        rows, n = pair.flatten(), 2 * 729
        batch = make_batch([4] * n, REWARD[rows], [i // 2 for i in range(n)], prompt=2)
        J_1 = J_TABLE[prefix_index(SEQUENCES[rows])[:, 1]]
        episodes = make_episodes(batch, [[4]] * n, list(zip(J_1.tolist(), REWARD[rows].tolist())), prompt=2)
        A = prefix_bonus_credit(batch, episodes, options(alpha=alpha))[batch.is_action].double().view(n, 2)
        weight = probability(theta).detach()[pair].prod(1).repeat_interleave(2) / 2
        return gradient(theta, (weight[:, None] * A * sequence_logprobs(theta, SEQUENCES[rows])[:, 1:]).sum())

    after = sequence_logprobs(theta, SEQUENCES)[:, 1:].sum(1)
    exact = gradient(theta, (probability(theta).detach() * REWARD * after).sum())
    for alpha in (0.0, 1.0, 3.0):
        assert close(climbing(alpha), (1 + alpha) * (1 - 1 / G) * exact, 1e-6)


def test_attempts_of_ones_own_keep_alpha_from_cancelling():
    """Fact 2 for mrt_b: if all rows of a group began with one z_1, mean and std would remove alpha altogether."""
    def credit(alpha: float, J: list[float]) -> torch.Tensor:
        batch = make_batch([4] * 4, [1, 0, 1, 0], [0] * 4)
        episodes = make_episodes(batch, [[4]] * 4, [[before, f] for before, f in zip(J, (1, 0, 1, 0))])
        return prefix_bonus_credit(batch, episodes, options(alpha=alpha, advantage_norm="mean_std"))

    torch.testing.assert_close(credit(1.0, [0.3] * 4), credit(0.0, [0.3] * 4), atol=1e-4, rtol=0)
    assert not close(credit(1.0, [0.0, 0.5, 1.0, 0.5]), credit(0.0, [0.0, 0.5, 1.0, 0.5]), 0.1)


def test_the_prefix_form_adds_the_new_episodes_progress_to_a_mixed_group(theta):
    """mrt, a stopped and a continuing row after one cut: (1 - 1/G)(grad J_stop + grad J_continue), and alpha times the gradient
    of J right after the continuing row's first token, its new episode, from the old policy."""
    alpha, answer = 0.7, torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)  # logits of the forced answer
    right, pairs = torch.tensor([1.0, 0.0, 0.0]), list(product(range(3), range(27)))
    stop, go_on = (torch.tensor(x) for x in zip(*pairs))  # (81,) each
    rewards = torch.stack([right[stop], REWARD[go_on]], dim=1).flatten()
    lengths = [4, 5] * 81  # prompt, prefix, forced token, answer; prompt, prefix, three tokens
    plain = make_batch(lengths, rewards, [i // 2 for i in range(162)], prompt=2)
    forced = torch.tensor([False, False, True, False] + [False] * 5).repeat(81)
    batch = Batch(*(x & ~forced if name == "is_action" else x for name, x in vars(plain).items()))
    J = [[0.4, float(J_TABLE[1 + SEQUENCES[i, 0]])] for i in go_on]
    episodes = make_episodes(batch, [[], [3]] * 81, [x for own in J for x in ([], own)], prompt=2)
    A = progress_credit(batch, episodes, options(alpha=alpha))[batch.is_action].double().view(81, 4)
    logprob = torch.cat([answer.log_softmax(0)[stop][:, None], sequence_logprobs(theta, SEQUENCES)[go_on]], dim=1)  # (81,4)
    weight = logprob.detach().sum(1).exp()
    loss, p = (weight[:, None] * A * logprob).sum(), probability(theta)
    g_answer, g_theta = torch.autograd.grad(loss, (answer, theta))
    assert close(g_answer, 0.5 * torch.autograd.grad((answer.softmax(0) * right).sum(), answer)[0], 1e-6)
    after_one = (theta[0].softmax(0) * J_TABLE[1:4]).sum()
    assert close(g_theta, gradient(theta, 0.5 * (p * REWARD).sum() + alpha * after_one), 1e-6)


@pytest.mark.parametrize("m_t, m_c", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("trained", [False, True], ids=["decision masked", "decision trained"])
def test_fact_4_the_decision_token_of_a_mixed_group(m_t, m_c, trained):
    """Rows are: prompt, stop or go on, answer. With the decision in the loss its logit, the log-odds of stopping, receives
    (m_c m_t / G)(J_stop - J_continue); masked, nothing. The answers' gradient is that of fact 4 in both cases."""
    J_c, J_s, logit = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.4, 0.3))
    n, total = m_t + m_c, 0.0
    decision = [torch.nn.functional.logsigmoid(logit if i < m_t else -logit) for i in range(n)]
    for outcome in product((0.0, 1.0), repeat=n):
        plain = make_batch([3] * n, outcome, [0] * n)
        batch = Batch(*(x & (torch.arange(3 * n) % 3 != 1) if name == "is_action" and not trained else x
                        for name, x in vars(plain).items()))
        A = outcome_credit(batch, None, options()).double().view(n, 3)
        q = [J_s if i < m_t else J_c for i in range(n)]
        answer = [(x if right else 1 - x).log() for x, right in zip(q, outcome)]
        weight = torch.stack(answer).sum().exp().detach()
        total = total + weight * sum(A[i, 1] * decision[i] + A[i, 2] * answer[i] for i in range(n))
    g_c, g_s, g = (x.item() for x in torch.autograd.grad(total, (J_c, J_s, logit)))
    assert (g_c, g_s) == pytest.approx(((1 - 1 / n) * m_c, (1 - 1 / n) * m_t))
    assert g == pytest.approx(m_c * m_t / n * (0.4 - 0.7) if trained else 0.0, abs=1e-6)


def test_star_climbs_the_likelihood_of_what_is_right(theta):
    """E_old[right · log p]; on policy its gradient is the policy gradient, without any baseline."""
    batch = make_batch([4] * 27, REWARD, [0] * 27)
    A = imitation_credit(batch, None, options())[batch.is_action].double()
    p, logprob = probability(theta), sequence_logprobs(theta, SEQUENCES)
    got = gradient(theta, likelihood_loss(logprob.flatten(), A, p.detach().repeat_interleave(3)))
    assert close(got, -gradient(theta, (p.detach() * REWARD * logprob.sum(1)).sum()), 1e-12)
    assert close(got, -gradient(theta, (p * REWARD).sum()), 1e-12)


def test_mrt_star_climbs_the_likelihood_of_its_earliest_right_answers(monkeypatch):
    """Its own gathering, over all 27 traces times the 27 ways to answer once after 0, 1 and 2 tokens, forced by `stop`: the
    gradient of E_old[miss(c) · log pi(c, stop, a)] over right answers a ~ mu(.|c), of which the part of a is that of J(c), plus
    E_old[miss(z) · log pi(z)] over right traces z. miss is the product of 1 - J over all boundaries before."""
    stop, contexts = 2, [c for n in range(4) for c in product(range(3), repeat=n)]  # 1 + 3 + 9 + 27
    logit = torch.randn(40, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    table, log = {c: i for i, c in enumerate(contexts)}, logit.log_softmax(1)
    logp = lambda tokens, begin=0, log=log: sum(log[table[tokens[:t]], tokens[t]] for t in range(begin, len(tokens)))
    p = lambda tokens, begin=0: math.exp(logp(tokens, begin, log.detach()))
    right = lambda tokens: float((2 * sum(tokens) + len(tokens) * tokens[-1]) % 3 == 0)
    answers = lambda c: [(*c, stop, a) for a in range(3)]
    miss = lambda c: math.prod(1 - sum(p(y, t + 1) for y in answers(c[:t]) if right(y)) for t in range(len(c)))

    said = [(z, forced) for z in contexts[13:] for forced in product(range(3), repeat=3)]  # 729 rows
    branch = lambda r, place: ([stop, a := said[r][1][place - 1]], right((*said[r][0][: place - 1], stop, a)))
    task = SimpleNamespace(prompt=lambda problem: [9], texts=lambda rows: rows,
                           grade=lambda problem, response: right(response), episode_ends=lambda response: [1, 2])
    traces = Gathered(graded(task, [0] * 729, [0] * 729, [[9, *z] for z, _ in said]), None, None, 0)
    forced = lambda model, task, rollouts, *where: [[branch(*at)] for at in zip(*where[:2])]
    monkeypatch.setattr(methods, "traces", lambda *_: traces)
    monkeypatch.setattr(methods, "force_answers", lambda *arguments: Forked(
        torch.tensor([verdict for [(_, verdict)] in forced(*arguments)]), forced(*arguments), 0))
    gathered = METHODS["mrt_star"].gather(SimpleNamespace(device="cpu"), task, None, options(forks=1, fork_temperature=1.0), None)
    rows = [tuple(gathered.rollouts.response(r)) for r in range(729)]
    logprob = torch.stack([logp(row[: t + 1], t) for row in rows for t in range(len(row))])
    A = METHODS["mrt_star"].credit(gathered.batch, None, options())[gathered.batch.is_action].double()
    weight = [p(z) * math.prod(p((*z[:t], stop, a), t + 1) for t, a in enumerate(forced)) for z, forced in said]
    weight = torch.tensor(weight).repeat_interleave(torch.tensor(list(map(len, rows))))

    exact = sum(p(c) * miss(c) * p(y, len(c) + 1) * logp(y) for c in contexts[:13] for y in answers(c) if right(y))
    exact = exact + sum(p(z) * miss(z) * logp(z) for z in contexts[13:] if right(z))
    assert close(gradient(logit, likelihood_loss(logprob, A, weight)), -gradient(logit, exact), 1e-6)
    assert {len(row) for row in rows} == {2, 3, 4} and 0 < gathered.batch.reward.mean() < 1


def test_sft_climbs_the_likelihood_of_everything(theta):
    """Of traces from anywhere, here uniform: the gradient of the cross-entropy, 0 for whoever is uniform already."""
    A = plain_credit(batch := make_batch([4] * 27, REWARD, [0] * 27), None, options())[batch.is_action].double()
    loss = lambda theta: likelihood_loss(sequence_logprobs(theta, SEQUENCES).flatten(), A, torch.full((81,), 1 / 27))
    assert close(gradient(theta, loss(theta)), -gradient(theta, sequence_logprobs(theta, SEQUENCES).sum(1).mean()), 1e-6)
    uniform = torch.zeros(13, 3, dtype=torch.float64, requires_grad=True)
    assert close(gradient(uniform, loss(uniform)), torch.zeros(13, 3), 1e-6)


# --- VinePPO against MRT on the urn: N candidates, one right; T draws, each an episode of one token; then the answer ---


def urn(hits: list[int], T: int, value) -> tuple[Batch, Episodes]:
    """A rollout per entry, which finds the right candidate at that draw (beyond T: never). value(j, found) after j draws; once
    the answer is given it is the reward."""
    batch = make_batch([T + 2] * len(hits), [float(hit <= T) for hit in hits], [0] * len(hits))
    values = [[*(value(j, hit <= j) for j in range(T + 1)), float(hit <= T)] for hit in hits]
    return batch, make_episodes(batch, [list(range(2, T + 3))] * len(hits), values)


@pytest.mark.parametrize("N, T", [(3, 3), (6, 4), (12, 5)])
def test_urn_progress_is_what_a_draw_finds_and_value_what_it_does_to_the_odds(N, T):
    """Without repeats. MRT credits the hit with 1 and a miss with 0: 1/N in expectation, J_j = j/N. VinePPO's V is 1 once found,
    (T-j)/(N-j) before: a miss costs (N-T)/((N-j)(N-j+1)), a hit earns what was missing, (N-T)/(N-j+1), and the expectation is 0
    at every draw. With T = N success is certain and VinePPO credits nothing at all."""
    hits = list(range(1, N + 1))  # equally likely
    batch, episodes = urn(hits, T, lambda j, found: float(found))
    progress = progress_credit(batch, episodes, options()) - outcome_credit(batch, None, options())
    rows = torch.tensor(per_row(batch, progress))[:, :T]  # (N,T)
    assert close(rows, torch.eye(N)[:, :T], 1e-6) and close(rows.mean(0), torch.full((T,), 1 / N))
    J = torch.tensor([[float(hit <= j) for j in range(T + 1)] for hit in hits]).mean(0)
    torch.testing.assert_close(J, torch.arange(T + 1) / N)

    batch, episodes = urn(hits, T, lambda j, found: 1.0 if found else (T - j) / (N - j) if j < N else 0.0)
    value = torch.tensor(per_row(batch, value_credit(batch, episodes, options())))  # (N,T+1)
    for hit, row in zip(hits, value):
        for j in range(1, T + 1):
            miss, found = -(N - T) / ((N - j) * (N - j + 1)) if j < N else 0.0, (N - T) / (N - j + 1)
            assert row[j - 1].item() == pytest.approx(miss if j < hit else found if j == hit else 0.0, abs=1e-6)
        assert row.sum().item() == pytest.approx((hit <= T) - T / N, abs=1e-6)  # the outcome, minus V_0
    assert close(value.mean(0), torch.zeros(T + 1), 1e-6) and (T < N or not value.any())


def test_urn_with_repeats():
    """Every draw anew: V before it is found is 1 - (1 - 1/N)^(T-j), so a miss costs (1 - 1/N)^(T-j) / N. MRT: 0, as ever."""
    N, T = 4, 5
    batch, episodes = urn([3, T + 1], T, lambda j, found: 1.0 if found else 1 - (1 - 1 / N) ** (T - j))
    found, never = per_row(batch, value_credit(batch, episodes, options()))
    misses = [-((1 - 1 / N) ** (T - j)) / N for j in range(1, T + 1)]
    assert never == pytest.approx([*misses, 0.0], abs=1e-6)
    assert found == pytest.approx([*misses[:2], (1 - 1 / N) ** (T - 2), 0, 0, 0], abs=1e-6)


def test_trying_what_has_failed_again_costs_vineppo_a_draw_and_mrt_nothing():
    """N = 5, T = 3: a miss, the same candidate once more, another miss. With d = 1 candidate excluded V falls from
    2/4 to 1/4 by the repeat, 1/(N - d) a draw; progress is 0: what MRT has against repeats is the tokens that they take."""
    batch, episodes = urn([9], 3, lambda j, found: [3 / 5, 2 / 4, 1 / 4, 0.0][j])
    assert per_row(batch, value_credit(batch, episodes, options())) == [pytest.approx([-1 / 10, -1 / 4, -1 / 4, 0.0])]
    batch, episodes = urn([9], 3, lambda j, found: 0.0)
    assert per_row(batch, progress_credit(batch, episodes, options())) == [[0.0] * 4]


# --- The trap list: solving and stopping > solving and rambling > failing ---


@pytest.mark.parametrize("credit, keys", [
    (progress_credit, {}), (progress_credit, {"progress_norm": "mean_std", "advantage_norm": "mean_std"}),
    (progress_credit, {"progress_norm": "std"}), (anytime_credit, {})], ids=["mrt", "mrt, both by std", "mrt, std", "anytime"])
def test_solving_and_stopping_ranks_above_rambling_above_failing(credit, keys):
    """By the mean credit of a rollout's tokens. Each has attempts of 3 tokens and an answer of 3; the second is the solution."""
    batch = make_batch([10, 16, 16], [1, 1, 0], [0, 0, 0])
    episodes = make_episodes(batch, [[4, 7], [4, 7, 10, 13], [4, 7, 10, 13]], [[0, 0, 1], [0, 0, 1, 1, 1], [0] * 5])
    given = credit(batch, episodes, options(thinking_budget=18, **keys))
    stops, rambles, fails = (sum(row) / len(row) for row in per_row(batch, given))
    assert stops > rambles > fails
