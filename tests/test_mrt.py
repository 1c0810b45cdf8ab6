"""The specification of nanomrt/mrt.py: the facts that a correct MRT satisfies, by enumeration, brute force and closed form.

The test bed has no network. A tabular softmax policy over V = 3 tokens writes sequences of T = 3; all 27 are enumerated, so
every expectation below is exact. An urn with one right candidate in N gives J in closed form.
"""

import math
from itertools import accumulate, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomrt.config import RunConfig, TokenCounts, load_config
from nanomrt.mrt import (
    Batch,
    Episodes,
    anytime_credit,
    clipped_loss,
    discounted_credit,
    episodes_between,
    group_advantage,
    group_has_advantage,
    kl_penalty,
    length_with_gradient,
    normalise,
    progress_credit,
    token_weights,
)

V, T, G = 3, 3, 2
SEQUENCES = torch.tensor(list(product(range(V), repeat=T)))  # (27,3)
PLAIN = dict(gamma=0.0, J_discount=1.0, advantage_norm="mean", progress_norm="none", repeat_penalty=0.0)


def advantages(batch, episodes, **options):
    return progress_credit(batch, episodes, SimpleNamespace(**options))


def make_batch(lengths, rewards, prompt_ids, *, prompt=1, finished=None, logprob=None) -> Batch:
    """Rollouts of these lengths, each with `prompt` context tokens in front of its actions."""
    lengths = torch.tensor(lengths)
    place = torch.cat([torch.arange(n) for n in lengths.tolist()])
    N = int(lengths.sum())
    return Batch(torch.arange(N), lengths, place >= prompt, torch.zeros(N) if logprob is None else logprob,
                 torch.as_tensor(rewards, dtype=torch.float32), torch.tensor(prompt_ids),
                 torch.ones(len(lengths), dtype=torch.bool) if finished is None else torch.tensor(finished))


def make_episodes(batch: Batch, ends: list[list[int]], J: list[list[float]], prompt: int = 1):
    """Episodes that end at these places of each rollout; J[r] holds J_0 … J_T."""
    row = [r for r, row_ends in enumerate(ends) if row_ends for _ in range(len(row_ends) + 1)]
    place = [p for row_ends in ends if row_ends for p in (prompt, *row_ends)]
    row = torch.tensor(row, dtype=torch.int64)
    values = torch.tensor([x for r, row_ends in enumerate(ends) if row_ends for x in J[r]], dtype=torch.float32)
    return episodes_between(row, batch.offset[row] + torch.tensor(place, dtype=torch.int64), values)


# --- The tabular policy ---


@pytest.fixture
def theta() -> torch.Tensor:
    """Logits for the next token after each of the 1 + 3 + 9 prefixes."""
    return torch.randn(13, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def prefix_index(sequence: torch.Tensor) -> torch.Tensor:
    """(·,3) rows of the table that a sequence visits."""
    a, b = sequence[:, 0], sequence[:, 1]
    return torch.stack([torch.zeros_like(a), 1 + a, 4 + 3 * a + b], dim=1)


def sequence_logprobs(theta: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """(·,3) log-probability of each token."""
    return theta.log_softmax(-1)[prefix_index(sequence)].gather(2, sequence[..., None]).squeeze(2)


REWARD = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0])  # of each sequence
J_TABLE = torch.rand(13, generator=torch.Generator().manual_seed(1)).double()  # of each prefix; episode 1 is one token, 2 is two


def boundary_J(sequence: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """(·,3): J_0 of the empty prefix, J_1 after the first token, J_2 = the reward."""
    index = prefix_index(sequence)
    return torch.stack([J_TABLE[index[:, 0]], J_TABLE[index[:, 1]], reward.double()], dim=1)


def expected_gradient(theta: torch.Tensor, alpha: float, **changed) -> torch.Tensor:
    """Of the code's loss for groups of two, summed over all 27 · 27 groups with their probabilities."""
    pair = torch.cartesian_prod(torch.arange(27), torch.arange(27))  # (729,2)
    rows = pair.flatten()  # (1458,) a sequence each; neighbours form a group
    tokens = SEQUENCES[rows]
    logprob = sequence_logprobs(theta, tokens)  # (1458,3)
    p = sequence_logprobs(theta, SEQUENCES).sum(1).exp().detach()[pair].prod(1)  # (729,)
    batch = make_batch([1 + T] * len(rows), REWARD[rows], [i // 2 for i in range(len(rows))])
    episodes = make_episodes(batch, [[2, 4]] * len(rows), boundary_J(tokens, REWARD[rows]).tolist())
    advantage = advantages(batch, episodes, alpha=alpha, **PLAIN | changed)[batch.is_action].double()
    weight = p.repeat_interleave(2 * T) / (2 * T)
    loss = clipped_loss(logprob.flatten(), logprob.flatten().detach(), advantage, weight, 0.2, 0.2)
    return torch.autograd.grad(loss, theta)[0]


def exact_gradient(theta: torch.Tensor, alpha: float, credit, share: float = 1 - 1 / G) -> torch.Tensor:
    """Of -(1/T)·[share·E[reward] + alpha·sum_j E_old[credit_j · log-ratio of episode j]], by enumeration."""
    logprob = sequence_logprobs(theta, SEQUENCES)  # (27,3)
    p = logprob.sum(1).exp()
    outcome = share * (p * REWARD.double()).sum()
    c = credit(boundary_J(SEQUENCES, REWARD))  # (27,2)
    episode = torch.stack([logprob[:, 0], logprob[:, 1] + logprob[:, 2]], dim=1)  # (27,2)
    bonus = (p.detach()[:, None] * c * episode).sum()
    return torch.autograd.grad(-(outcome + alpha * bonus) / T, theta)[0]


def own(J):
    return J[:, 1:] - J[:, :-1]


def to_go(J):
    return J[:, -1:] - J[:, :-1]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-7) -> bool:
    return bool((a - b).abs().max() < tolerance)


def test_the_gradient_of_grpo_is_the_policy_gradient(theta):
    assert close(expected_gradient(theta, alpha=0.0), exact_gradient(theta, 0.0, own))


def test_the_gradient_of_mrt_credits_each_episode_with_its_own_progress(theta):
    assert close(expected_gradient(theta, alpha=0.7), exact_gradient(theta, 0.7, own))


SHIPPED = {"GRPO's schedule": RunConfig(), "small.py": load_config(Path(__file__).parents[1] / "config/small.py")}


@pytest.mark.parametrize("shipped", SHIPPED.values(), ids=SHIPPED)
def test_what_the_shipped_credit_climbs(theta, shipped):
    """In pairs mean_std gives the outcome's own gradient. J before an episode is a baseline; so is the mean of progress, if all
    traces have equally many episodes. What is left, over the batch's std: E[(d - gamma) J_j + gamma (d - gamma) J_{j+1} + … +
    gamma^{T-j} d J_T], d = J_discount."""
    d, gamma, J = shipped.J_discount, shipped.gamma, boundary_J(SEQUENCES, REWARD)  # (27,3)
    progress = d * J[:, 1:] - J[:, :-1]
    centred = progress - (progress.mean() if shipped.progress_norm == "mean_std" else 0.0)
    ahead = lambda J: torch.stack([(d - gamma) * J[:, 1] + gamma * d * J[:, 2], d * J[:, 2]], dim=1)
    exact = exact_gradient(theta, shipped.alpha / centred.square().mean().sqrt(), ahead, share=1.0)
    assert close(expected_gradient(theta, shipped.alpha, **{name: getattr(shipped, name) for name in PLAIN}), exact, 1e-6)


@pytest.mark.parametrize("G", [2, 3, 12])
@pytest.mark.parametrize("p", [0.05, 0.4])
def test_a_groups_std_weighs_problems_by_their_difficulty(G, p):
    """The expected gradient of mean_std is that of p, the probability of being right, times E[std of a group] / (p (1 - p)): in
    pairs 1 and the policy gradient, in larger groups the more the rarer right or wrong is. Of the mean it is 1 - 1/G at any p."""
    p = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    right = torch.tensor(list(product((0.0, 1.0), repeat=G)), dtype=torch.float64)  # (2^G,G)
    logp = (right * p + (1 - right) * (1 - p)).log()
    weight, group = logp.detach().sum(1).exp(), torch.arange(2**G).repeat_interleave(G)
    factor = (weight * right.std(1, correction=0)).sum() / (p * (1 - p)).detach()
    for norm, expected in (("mean", 1 - 1 / G), ("mean_std", factor), *([("mean_std", 1.0)] if G == 2 else [])):
        A = group_advantage(right.flatten(), group, norm).view(-1, G)
        (got,) = torch.autograd.grad((weight * (A * logp).mean(1)).sum(), p, retain_graph=True)
        assert got.item() == pytest.approx(float(expected), rel=1e-4)


# --- The nine facts ---


def test_fact_1_progress_telescopes():
    """Summed over a trace it is J_T - J_0: as one scalar per trace, MRT would be GRPO with a constant."""
    batch = make_batch([8, 6], [1, 0], [0, 0])
    episodes = make_episodes(batch, [[3, 5, 8], [4, 6]], [[0.1, 0.5, 0.25, 1.0], [0.1, 0.75, 0.0]])
    total = torch.zeros(2).index_add(0, episodes.row, episodes.progress())
    torch.testing.assert_close(total, torch.tensor([0.9, -0.1]))


def test_fact_2_a_bonus_per_rollout_is_normalised_away():
    """f + alpha·(f - J_prefix) with one prefix per group: mean and std normalisation remove alpha altogether."""
    f, prompt_id = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0]), torch.tensor([0] * 4 + [1] * 4)
    J_prefix = torch.tensor([0.3] * 4 + [0.6] * 4)
    plain = group_advantage(f, prompt_id, "mean_std")
    for alpha in (0.5, 1.0, 8.0):
        torch.testing.assert_close(group_advantage(f + alpha * (f - J_prefix), prompt_id, "mean_std"), plain, atol=1e-4, rtol=0)


def test_fact_3_a_baseline_of_the_context_has_the_outcome_gradient(theta):
    """E[(reward - J_prefix) · grad log pi] = E[reward · grad log pi], with the prefix after the first token."""
    logprob = sequence_logprobs(theta, SEQUENCES)
    p, after = logprob.detach().sum(1, keepdim=True).exp(), logprob[:, 1:]  # (27,1), (27,2) the tokens after the prefix
    J = J_TABLE[prefix_index(SEQUENCES)[:, 1]]
    gradient = lambda A: torch.autograd.grad(clipped_loss(after, after.detach(), A[:, None], p, 0.2, 0.2), theta,
                                             retain_graph=True)[0]
    assert close(gradient(REWARD - J), gradient(REWARD.double()), 1e-12)
    assert gradient(REWARD.double()).abs().max() > 1e-2


def mixed_group_gradient(p_continue: torch.Tensor, p_stop: torch.Tensor, decision: torch.Tensor | None, m_t: int, m_c: int):
    """The loss of a group whose first m_t rows are forced to stop, in expectation over right and wrong answers.

    Each row's only action is its answer, right with its own probability. `decision`, if given, is the log-odds of stopping,
    whose token is trained too.
    """
    loss, n = 0.0, m_t + m_c
    for outcome in product((0, 1), repeat=n):
        q = torch.stack([p_stop if i < m_t else p_continue for i in range(n)])
        right = torch.tensor(outcome, dtype=torch.float64)
        logp = (right * q + (1 - right) * (1 - q)).log()
        A = group_advantage(right, torch.zeros(n, dtype=torch.int64), "mean")
        actions = logp
        if decision is not None:
            stop, go_on = torch.nn.functional.logsigmoid(decision), torch.nn.functional.logsigmoid(-decision)
            actions = logp + torch.stack([stop if i < m_t else go_on for i in range(n)])
        loss = loss + logp.sum().exp().detach() * (A * actions).sum()
    return loss


@pytest.mark.parametrize("m_t, m_c", [(1, 1), (2, 2), (1, 3)])
def test_fact_4_a_mixed_group_has_no_progress_term_unless_the_decision_is_trained(m_t, m_c):
    """(1 - 1/G)(m_c · grad J_continue + m_t · grad J_stop); the stop logit receives (m_c m_t / G)(J_stop - J_continue)."""
    J_c, J_s, decision = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.4, 0.3))
    n = m_t + m_c
    g_c, g_s = torch.autograd.grad(mixed_group_gradient(J_c, J_s, None, m_t, m_c), (J_c, J_s))
    assert g_c.item() == pytest.approx((1 - 1 / n) * m_c) and g_s.item() == pytest.approx((1 - 1 / n) * m_t)
    (g,) = torch.autograd.grad(mixed_group_gradient(J_c, J_s, decision, m_t, m_c), decision)
    assert g.item() == pytest.approx(m_c * m_t / n * (0.4 - 0.7))


def test_fact_5_return_to_go_has_the_outcome_gradient(theta):
    """gamma = 1 gives J_T - J_{j-1}: the bonus gradient is that of alpha · E[J_T], which is E[reward] here."""
    bonus = (expected_gradient(theta, 1.0, gamma=1.0) - expected_gradient(theta, 0.0)) * T
    p = sequence_logprobs(theta, SEQUENCES).sum(1).exp()
    assert close(bonus, torch.autograd.grad(-(p * REWARD).sum(), theta)[0])


def test_fact_6_own_progress_is_another_objective(theta):
    """gamma = 0 is the gradient of sum_j E_{context from the old policy}[J_j]: success right after one's own episode."""
    bonus = (expected_gradient(theta, 1.0) - expected_gradient(theta, 0.0)) * T
    logprob = sequence_logprobs(theta, SEQUENCES)
    old, J = logprob.detach(), boundary_J(SEQUENCES, REWARD)
    first = (logprob[:, 0].exp() * old[:, 1:].sum(1).exp() * J[:, 1]).sum()  # only episode 1 follows the new policy
    second = (old[:, 0].exp() * logprob[:, 1:].sum(1).exp() * J[:, 2]).sum()
    assert close(bonus, torch.autograd.grad(-(first + second), theta)[0])
    assert not close(expected_gradient(theta, 1.0), expected_gradient(theta, 1.0, gamma=1.0), 1e-3)


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=5), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=50, deadline=None)
def test_fact_7_one_family(values, gamma):
    """credit_j = sum_{i>=j} gamma^{i-j} x_i inside each rollout: progress, or P_i J_i at gamma = 1 (anytime)."""
    row = torch.tensor([r for r, xs in enumerate(values) for _ in xs])
    flat = torch.tensor([x for xs in values for x in xs], dtype=torch.float64)
    expected = [sum(gamma ** (i - j) * xs[i] for i in range(j, len(xs))) for xs in values for j in range(len(xs))]
    torch.testing.assert_close(discounted_credit(flat, row, gamma), torch.tensor(expected, dtype=torch.float64))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 4), st.data())
@settings(max_examples=30, deadline=None)
def test_fact_7_the_anytime_credit_is_made_of_P_times_J(lengths, left, data):
    """Of traces with the same episodes. P_i is the share of the C budgets that end while J_i is what is known; of the last one,
    the verdict, it is `left` / C. R_j = sum_{i>=j} P_i J_i is the code's own sum at gamma = 1, and A_j = R_j - (1 - s_j/C) ·
    [(R_0 - R_j) + the group's mean of R_j] with s_j tokens before."""
    C, ends, B = sum(lengths) + left, list(accumulate(lengths, initial=1)), data.draw(st.integers(1, 4))
    J = [[data.draw(st.sampled_from([0.0, 0.25, 1.0])) for _ in ends] for _ in range(B)]
    batch = make_batch([ends[-1] + 2] * B, [float(x[-1] > 0.5) for x in J], [0] * B)
    J = [[*x[:-1], verdict] for x, verdict in zip(J, batch.reward.tolist())]
    P, s = torch.tensor([*lengths, left]) / C, torch.tensor(ends) - 1
    row = torch.arange(B).repeat_interleave(len(ends))
    R = discounted_credit((P * torch.tensor(J)).flatten(), row, 1.0).view(B, -1)  # (B,T+1)
    A = R - (1 - s / C) * (R[:, :1] - R + R.mean(0))
    got = anytime_credit(batch, make_episodes(batch, [ends[1:]] * B, J), SimpleNamespace(thinking_budget=C))
    torch.testing.assert_close(got.view(B, -1)[:, torch.tensor(ends)], A)


@pytest.mark.parametrize("m, quoted", [(1, 0.71), (4, 0.35), (8, 0.25), (20, 0.16)])
def test_fact_8_noise_of_a_zero_progress_estimate(m, quoted):
    """The difference of two independent means of m verdicts at p = 1/2 has std sqrt(2 p (1 - p) / m), exactly."""
    p = torch.tensor([math.comb(m, k) * 0.5**m for k in range(m + 1)], dtype=torch.float64)  # of each mean of m verdicts
    J_before, J_after = torch.cartesian_prod(*2 * [torch.arange(m + 1, dtype=torch.float64) / m]).T
    progress = Episodes(*3 * [torch.arange(len(J_before))], J_before, J_after).progress()
    variance = (torch.outer(p, p).flatten() * progress**2).sum()
    assert variance.sqrt().item() == pytest.approx(math.sqrt(0.5 / m)) == pytest.approx(quoted, abs=0.005)


def test_fact_8_neighbours_share_one_estimate():
    batch = make_batch([9], [1], [0])
    episodes = make_episodes(batch, [[3, 5, 9]], [[0.0, 0.25, 0.5, 1.0]])
    assert torch.equal(episodes.J_before[1:], episodes.J_after[:-1])


def test_fact_9_injected_text_is_never_an_action():
    """Context in the middle of an episode (a forced stop, say) has neither advantage nor weight."""
    batch = make_batch([8], [1], [0])
    action = torch.tensor([False, True, True, True, False, False, True, True])
    batch = Batch(batch.tokens, batch.lengths, action, batch.logprob, batch.reward, batch.prompt_id, batch.finished)
    episodes = make_episodes(batch, [[6]], [[0.0, 1.0]])
    advantage = advantages(batch, episodes, alpha=1.0, **PLAIN)
    assert torch.equal(advantage, torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 0]))
    assert torch.equal(token_weights(batch, "token", 8, "zero") > 0, action)


# --- The urn ---


@pytest.mark.parametrize("N", [3, 12])
def test_urn_without_and_with_repeats(N):
    """J_j = j/N or 1 - (1 - 1/N)^j: progress is 1/N throughout, or shrinks by (1 - 1/N) with every draw."""
    j = torch.arange(N + 1, dtype=torch.float64)
    row, place = torch.zeros(N + 1, dtype=torch.int64), torch.arange(1, N + 2)
    fresh = episodes_between(row, place, j / N).progress()
    torch.testing.assert_close(fresh, torch.full((N,), 1 / N, dtype=torch.float64))
    repeating = episodes_between(row, place, 1 - (1 - 1 / N) ** j).progress()
    torch.testing.assert_close(repeating, (1 - 1 / N) ** j[:-1] / N)
    torch.testing.assert_close(discounted_credit(repeating, row[1:], 1.0), (1 - 1 / N) ** j[:-1] - (1 - 1 / N) ** N)


def test_solving_and_stopping_ranks_above_rambling_above_failing():
    """By the mean advantage of a rollout's tokens."""
    batch = make_batch([10, 16, 16], [1, 1, 0], [0, 0, 0])
    episodes = make_episodes(batch, [[4, 7], [4, 7, 10, 13], [4, 7, 10, 13]],
                             [[0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    advantage = advantages(batch, episodes, alpha=1.0, **PLAIN | {"progress_norm": "mean_std"})
    stops, rambles, fails = (advantage[batch.row == r][1:].mean() for r in range(3))
    assert stops > rambles > fails


# --- Episodes and advantages on the flat axis ---


def test_alpha_zero_and_no_episodes_are_grpo_bit_for_bit():
    batch = make_batch([5, 9, 7], [1, 0, 0.3], [0, 0, 0])
    episodes = make_episodes(batch, [[3], [4, 9], []], [[0.1, 0.9], [0.2, 0.3, 0.4], []])
    for norm in ("mean", "mean_std"):
        options = PLAIN | {"advantage_norm": norm}
        grpo = advantages(batch, None, alpha=1.0, **options)
        assert torch.equal(grpo, advantages(batch, episodes, alpha=0.0, **options))
        assert torch.equal(grpo, group_advantage(batch.reward, batch.prompt_id, norm)[batch.row] * batch.is_action)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_gets_the_credit_of_its_own_episode(data):
    """Against a triple loop, on ragged batches with rollouts that have no episode, or text before and after."""
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=6))
    ends = [sorted(data.draw(st.sets(st.integers(2, n), max_size=4))) for n in lengths]
    J = [[data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for _ in range(len(e) + 1)] for e in ends]
    rewards = [data.draw(st.sampled_from([0.0, 1.0])) for _ in lengths]
    gamma = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    batch = make_batch(lengths, rewards, [r % 2 for r in range(len(lengths))])
    got = advantages(batch, make_episodes(batch, ends, J) if any(ends) else None, alpha=0.5, **PLAIN | {"gamma": gamma})

    outcome, expected = group_advantage(batch.reward, batch.prompt_id, "mean").tolist(), []
    for r, n in enumerate(lengths):
        starts = [1, *ends[r]]
        for place in range(n):
            A = outcome[r] if place >= 1 else 0.0
            for j, end in enumerate(ends[r]):
                if starts[j] <= place < end:
                    A += 0.5 * sum(gamma ** (i - j) * (J[r][i + 1] - J[r][i]) for i in range(j, len(ends[r])))
            expected.append(A)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_batches_can_be_taken_apart():
    """`take` keeps each rollout's tokens together, in the order asked for."""
    batch = make_batch([3, 5, 2], [0, 1, 2], [4, 5, 6])
    taken = batch.take(torch.tensor([2, 0]))
    assert taken.tokens.tolist() == [8, 9, 0, 1, 2] and taken.lengths.tolist() == [2, 3]
    assert taken.reward.tolist() == [2, 0] and taken.prompt_id.tolist() == [6, 4] and taken.offset.tolist() == [0, 2]


def test_arguments_are_not_written_to():
    batch = make_batch([5, 6], [1, 0], [0, 0])
    episodes = make_episodes(batch, [[3, 5], [4]], [[0.0, 0.5, 1.0], [0.0, 0.25]])
    before = [x.clone() for x in (*vars(batch).values(), *vars(episodes).values())]
    advantages(batch, episodes, alpha=1.0, gamma=0.5, J_discount=0.9, advantage_norm="mean_std", progress_norm="mean_std",
               repeat_penalty=0.5, token_counts=TokenCounts(0, 3, 0, 0))
    token_weights(batch, "sequence", 8, "mask")
    after = [*vars(batch).values(), *vars(episodes).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("norm, mean, std", [("none", 0.5, 0.5**0.5), ("mean_std", 0.0, 1.0), ("std", 0.5**0.5, 1.0)])
def test_progress_norms(norm, mean, std):
    x = normalise(torch.tensor([0.0, 0.0, 1.0, 1.0]), norm)
    assert x.mean().item() == pytest.approx(mean, abs=1e-5)
    assert x.square().mean().sqrt().item() == pytest.approx(std, abs=1e-4)
    assert normalise(torch.zeros(3), norm).tolist() == [0, 0, 0]


# --- Groups, weights, clipping, KL ---


def test_std_normalisation_is_a_difficulty_weight():
    """One solved of eight: advantage mass 1.75 when centred, 5.29 when also divided by the std."""
    reward, group = torch.tensor([1.0] + [0.0] * 7), torch.zeros(8, dtype=torch.int64)
    assert group_advantage(reward, group, "mean").abs().sum().item() == pytest.approx(1.75)
    assert group_advantage(reward, group, "mean_std").abs().sum().item() == pytest.approx(5.29, abs=0.005)


@pytest.mark.parametrize("size", [2, 7, 8, 12])
@pytest.mark.parametrize("norm", ["mean", "mean_std"])
def test_a_group_of_equal_rewards_has_exactly_no_advantage(size, norm):
    assert group_advantage(torch.full((size,), 0.35), torch.zeros(size, dtype=torch.int64), norm).tolist() == [0.0] * size


def test_groups_are_known_by_their_id_alone():
    """Shuffling the rows permutes the advantages."""
    g = torch.Generator().manual_seed(0)
    reward, ids, order = torch.rand(12, generator=g), torch.arange(12) % 3, torch.randperm(12, generator=g)
    torch.testing.assert_close(group_advantage(reward[order], ids[order], "mean_std"),
                               group_advantage(reward, ids, "mean_std")[order])


@pytest.mark.parametrize("norm, short, long", [
    ("token", 1 / 44, 1 / 44), ("sequence", 1 / 8, 1 / 80), ("constant", 1 / 100, 1 / 100)])
def test_weights_of_a_short_and_a_long_rollout(norm, short, long):
    """Lengths 4 and 40: per token 1/44; per sequence 1/2/4 and 1/2/40; constant 1/2/50."""
    weight = token_weights(make_batch([5, 41], [1, 0], [0, 0]), norm, 50, "zero")
    assert weight[1:5].tolist() == pytest.approx([short] * 4) and weight[6:].tolist() == pytest.approx([long] * 40)
    assert weight[0] == weight[5] == 0


def test_truncated_rollouts_train_with_zero_and_leave_with_mask():
    batch = make_batch([4, 6], [1, 0], [0, 0], finished=[True, False])
    assert (token_weights(batch, "token", 9, "zero") > 0).sum() == 8
    assert (token_weights(batch, "token", 9, "mask") > 0).nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_a_fully_masked_batch_has_loss_zero(norm):
    batch = make_batch([4, 6], [1, 0], [0, 0], finished=[False, False])
    weight = token_weights(batch, norm, 9, "mask")
    logprob = torch.zeros(10, requires_grad=True)
    loss = clipped_loss(logprob, torch.zeros(10), torch.ones(10), weight, 0.2, 0.2)
    loss.backward()
    assert loss == 0 and logprob.grad.tolist() == [0] * 10


@pytest.mark.parametrize("A, ratio, value, gradient", [
    (1.0, 1.0, -1.0, -1.0), (1.0, 1.25, -1.25, -1.25), (1.0, 1.5, -1.28, 0.0), (1.0, 0.5, -0.5, -0.5),
    (-1.0, 1.0, 1.0, 1.0), (-1.0, 1.5, 1.5, 1.5), (-1.0, 0.9, 0.9, 0.9), (-1.0, 0.5, 0.8, 0.0),
])
def test_clipping(A, ratio, value, gradient):
    """-min(r A, clip(r, 0.8, 1.28) A): a gain is cut off beyond the clip, a loss never."""
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = clipped_loss(logprob, torch.zeros(1), torch.tensor([A]), torch.ones(1), 0.2, 0.28)
    loss.backward()
    assert loss.item() == pytest.approx(value) and logprob.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_on_policy_the_gradient_is_reinforce():
    logprob = torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    A, w = torch.tensor([1.0, -2, 0, 3, -1, 0.5]), torch.full((6,), 1 / 6)
    clipped_loss(logprob, logprob.detach(), A, w, 0.2, 0.28).backward()
    torch.testing.assert_close(logprob.grad, -w * A)


def kl_gradients(estimator):
    """(expected gradient of the estimator under sampling from pi, gradient of KL(pi||ref), gradient of KL(ref||pi))."""
    g = torch.Generator().manual_seed(3)
    theta = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    logp = theta.log_softmax(0)
    p = logp.exp().detach()
    grad = lambda x: torch.autograd.grad(x, theta, retain_graph=True)[0]
    return (grad((p * estimator(logp, logp.detach(), ref)).sum()), grad((logp.exp() * (logp - ref)).sum()),
            grad((ref.exp() * (ref - logp)).sum()))


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_kl_in_the_loss_has_the_gradient_of_the_reverse_kl(name):
    got, reverse, _ = kl_gradients(lambda logp, old, ref: kl_penalty(logp, old, ref, name))
    assert close(got, reverse, 1e-12)


def test_what_is_wrong_with_the_other_kl_losses():
    """k1 has no gradient in the loss; k3 without the ratio follows the forward KL."""
    k1, reverse, _ = kl_gradients(lambda logp, old, ref: logp - ref)
    assert close(k1, torch.zeros(5), 1e-12) and not close(reverse, torch.zeros(5), 1e-2)
    bare, _, forward = kl_gradients(lambda logp, old, ref: (ref - logp).exp() - 1 - (ref - logp))
    assert close(bare, forward, 1e-12)
    none, _, _ = kl_gradients(lambda logp, old, ref: kl_penalty(logp, old, ref, "k1_reward") + 0 * logp)
    assert close(none, torch.zeros(5), 1e-12)


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_no_split_into_micro_batches_changes_the_gradient(norm):
    """Weights come from the whole batch, so parts of any size and order add up to the same."""
    g = torch.Generator().manual_seed(0)
    batch = make_batch([3, 9, 5, 7], [1, 0, 0, 1], [0, 0, 1, 1])
    N = int(batch.lengths.sum())
    logprob, old = torch.randn(N, generator=g).double(), torch.randn(N, generator=g).double()
    A, weight = torch.randn(N, generator=g).double(), token_weights(batch, norm, 8, "zero").double()

    def gradient(parts):
        x = logprob.clone().requires_grad_()
        for rows in parts:
            flat = batch.flat(torch.tensor(rows))
            clipped_loss(x[flat], old[flat], A[flat], weight[flat], 0.2, 0.28).backward()
        return x.grad

    whole = gradient([[0, 1, 2, 3]])
    for parts in ([[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2], [1, 3, 0]]):
        torch.testing.assert_close(gradient(parts), whole)


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_who_is_left_out_counts_in_no_denominator(norm):
    """The weights beside a rollout that was cut off and masked are those of the others alone."""
    batch = make_batch([4, 6, 3], [1, 0, 0], [0, 0, 0], finished=[True, False, True])
    others = token_weights(batch.take(torch.tensor([0, 2])), norm, 9, "mask").tolist()
    assert token_weights(batch, norm, 9, "mask").tolist() == [*others[:4], *[0.0] * 6, *others[4:]]


def test_a_loss_is_an_advantage_too():
    """What has only negative ones is neither cut away nor skipped; what has none is."""
    batch, value = make_batch([4, 3, 5], [0, 0, 0], [7, 7, 3]), torch.zeros(12)
    value[[1, 2]] = torch.tensor([0.5, -1.0])
    assert length_with_gradient(batch, value).tolist() == [3, 0, 0]
    assert group_has_advantage(batch, value.clamp(max=0)).tolist() == [True, True, False]
    value[11] = -0.5
    assert length_with_gradient(batch, value).tolist() == [3, 0, 5]
