"""Meta Reinforcement Fine-Tuning: episodes, J, progress, credit and the loss, on flat packed tensors.

A trace is cut into episodes z_1 … z_T. J_j is the probability that an answer forced after episode j is right, estimated
from `forks` forced answers; by default from a single greedy one, so it is 0 or 1; with forks = 0 it is computed instead, summed
over the right answers as the warm start writes them. Equations, whose numbers stand on the lines that compute them:

    (0) A_outcome  = (reward - its group's mean) / the group's std          GRPO: the same for every token of a rollout
    (1) progress_j = d · J_j - J_{j-1}                                      negative progress is kept; d, `J_discount`, is ours
    (2) credit_j   = sum_{i>=j} gamma^{i-j} normalised progress_i           gamma = 0: an episode's own progress only
    (3) A_j        = A_outcome + alpha · credit_j                           every token of episode j; the answer's have A_outcome
    (4) loss       = - sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t),   r_t = pi(a_t) / pi_old(a_t), w_t: `loss_norm`

The tokens of episode j can't change J_{j-1}, so on average their bonus rewards (d - gamma) J_j + gamma (d - gamma) J_{j+1} + … +
gamma^{T-j} d J_T: being right after the episode and, discounted, after later ones.
alpha = 0 is (0), GRPO. What makes MRT different is that credit stays with the episode that made the progress (arXiv 2503.07572).
Progress is normalised over the batch. Centred, it puts a price on an episode that changes nothing, the mean; config/small.py does
not centre, and charges 1 - d where the answer is known.
Forced tokens and prompts are context: they have no action mask, no advantage and no loss.

The other members of the family stand beside it: each is one credit function (batch, episodes, config) -> A (N,), and
`nanomrt/methods.py` says whose rollouts it reads.
Dimension key: N packed tokens, n actions of some rollouts, B rollouts, E episodes of all rollouts, P prompts, C thinking budget.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanomrt.config import RunConfig


@dataclass(frozen=True)
class Batch:
    """Rollouts on one flat token axis, with everything that the loss needs."""

    tokens: Tensor  # (N,) int64
    lengths: Tensor  # (B,) int64, tokens of each rollout, prompt included
    is_action: Tensor  # (N,) bool, what is learned: sampled by the policy, or written for it to imitate
    logprob: Tensor  # (N,) fp32, as the sampler recorded it (the trainer's, after `importance_weighted`), 0 where no action
    reward: Tensor  # (B,) fp32
    prompt_id: Tensor  # (B,) int64
    finished: Tensor  # (B,) bool, False: cut off

    @property
    def row(self) -> Tensor:
        """(N,) the rollout of each token."""
        return torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(self.lengths)

    @property
    def offset(self) -> Tensor:
        """(B,) the first token of each rollout."""
        return self.lengths.cumsum(0) - self.lengths

    def flat(self, rows: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Where the tokens of these rollouts lie on the flat axis, rollout after rollout; with lengths (B,) the first so many of
        each."""
        lengths = (self.lengths if lengths is None else lengths)[rows]
        start = (self.offset[rows] - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return start + torch.arange(len(start), device=start.device)

    def take(self, rows: Tensor, lengths: Tensor | None = None) -> "Batch":
        """The batch of these rollouts; with lengths (B,) each is cut after so many tokens; `reward` stays the whole rollout's."""
        lengths = self.lengths if lengths is None else lengths
        flat = self.flat(rows, lengths)
        return Batch(self.tokens[flat], lengths[rows], self.is_action[flat], self.logprob[flat], self.reward[rows],
                     self.prompt_id[rows], self.finished[rows])


@dataclass(frozen=True)
class Episodes:
    """The E episodes of a batch, rollout after rollout, first to last. For vineppo J is V, the mean reward of going on. For
    mrt_b the one episode is all that follows the first attempt, and J_after is the verdict."""

    row: Tensor  # (E,) int64, ascending
    start: Tensor  # (E,) int64, first token on the flat axis
    end: Tensor  # (E,) int64, one past the last token
    J_before: Tensor  # (E,) fp32, probability of a right answer if thinking stops before it
    J_after: Tensor  # (E,) fp32, and after it: the next episode's J_before, the same estimate

    def progress(self, discount: float = 1.0) -> Tensor:
        """(E,)"""
        return discount * self.J_after - self.J_before  # (1)


def episodes_between(row: Tensor, boundary: Tensor, J: Tensor) -> Episodes:
    """Neighbouring boundaries of one rollout enclose an episode and share their J.

    row, boundary (on the flat axis) and J: (E + rollouts with an episode,), rollout after rollout.
    """
    same = row[:-1] == row[1:]
    return Episodes(row[1:][same], boundary[:-1][same], boundary[1:][same], J[:-1][same], J[1:][same])


def group_advantage(reward: Tensor, prompt_id: Tensor, norm: str) -> Tensor:
    """Reward minus a baseline from its group; exactly 0, not rounding noise, where a group's rewards are equal. (B,) -> (B,).

    mean: minus the group's mean (Dr. GRPO; Liu et al., arXiv 2503.20783); mean_std: and divided by the group's population std
    (GRPO; Shao et al., arXiv 2402.03300); rloo: minus the mean of the *other* rollouts, which is `mean` times G/(G-1) and makes
    the estimate unbiased (Ahmadian et al., arXiv 2402.14740).

    >>> group_advantage(torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.tensor([7, 7, 3, 3]), "mean")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    _, group, size = prompt_id.unique(return_inverse=True, return_counts=True)
    mean = lambda x: torch.zeros(len(size), dtype=x.dtype, device=x.device).index_add(0, group, x) / size
    # In fp64 the mean of equal rewards is that reward. In fp32 it may be off by rounding, which a std as small would blow up.
    centred = reward.double() - mean(reward.double())[group]  # (0)
    if norm == "mean_std":
        centred = centred / (mean(centred**2).sqrt()[group] + 1e-6)  # (0)
    if norm == "rloo":
        centred = centred * (size / (size - 1).clamp(min=1))[group]
    return centred.to(reward.dtype)


def discounted_credit(progress: Tensor, row: Tensor, gamma: float) -> Tensor:
    """(2): an episode's own progress plus gamma times the next one's credit in the same rollout. (E,) -> (E,).

    With d = 1 and gamma = 1 the credit is J_T - J_{j-1}: the outcome with a better baseline. If progress is centred, earlier
    episodes also pay the price of each later one.

    >>> discounted_credit(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 0, 1]), 0.5)
    tensor([3., 4., 4., 8.])
    """
    if gamma == 0:
        return progress
    credit, rows = progress.tolist(), row.tolist()
    for j in reversed(range(len(credit) - 1)):
        if rows[j] == rows[j + 1]:
            credit[j] += gamma * credit[j + 1]  # (2)
    return torch.tensor(credit, dtype=progress.dtype, device=progress.device)


def normalise(progress: Tensor, norm: str) -> Tensor:
    """Progress relative to that of the batch's other episodes. (E,) -> (E,).

    none: as it is; std: divided by its root mean square, so that an episode without progress costs nothing; mean_std: minus its
    mean first, so that an episode costs the mean progress.
    """
    if norm == "none" or len(progress) == 0:
        return progress
    if norm == "mean_std":
        progress = progress - progress.mean()
    return progress / (progress.square().mean().sqrt() + 1e-6)


def spread(batch: Batch, episodes: Episodes, credit: Tensor) -> Tensor:
    """Give each episode's credit to its tokens. (E,) -> (N,), 0 outside of episodes."""
    if not len(credit):
        return torch.zeros(len(batch.tokens), device=batch.tokens.device)
    token = torch.arange(len(batch.tokens), device=credit.device)  # (N,)
    which = (torch.searchsorted(episodes.start, token, right=True) - 1).clamp(min=0)  # (N,) last episode begun by then
    inside = (token >= episodes.start[which]) & (token < episodes.end[which])
    return torch.where(inside, credit[which], 0.0)


def repeated(batch: Batch, n: int) -> Tensor:
    """(N,) bool: the tokens of every n-gram of actions that stands earlier in the same rollout, too.

    >>> once = Batch(torch.tensor([5, 6, 7, 5, 6]), torch.tensor([5]), torch.ones(5) > 0, *[None] * 4)
    >>> repeated(once, n=2)
    tensor([False, False, False,  True,  True])
    """
    N = len(batch.tokens)
    begin = torch.arange(max(N - n + 1, 0), device=batch.tokens.device)  # every place where n tokens follow
    within = batch.row[begin] == batch.row[begin + n - 1]
    begin = begin[within & batch.is_action.unfold(0, n, 1).all(1)] if len(begin) else begin  # (M,)
    span = begin[:, None] + torch.arange(n, device=begin.device)  # (M,n)
    _, gram = torch.cat([batch.row[begin, None], batch.tokens[span]], 1).unique(dim=0, return_inverse=True)  # (M,) which it is
    first = torch.full_like(begin, N).scatter_reduce(0, gram, begin, "amin")[gram]  # (M,) where it stands first
    again = torch.zeros_like(batch.is_action)
    again[span[begin > first]] = True
    return again


# --- Credit: a method's A for every token, (N,), 0 where the policy did not act ---


def outcome_credit(batch: Batch, episodes: Episodes | None, config: RunConfig) -> Tensor:
    """GRPO: A = reward, relative to its group. Shao et al., arXiv 2402.03300; its other forms are `advantage_norm`.

    With `repeat_penalty`, minus that for every token of an n-gram that the same rollout has written before (Yeo et al., arXiv
    2502.03373), n being the length of an attempt. An n-gram may begin anywhere, so a repeat also charges the
    tokens just before it if they equal those before the first copy: mostly the `no` of the attempt before.
    """
    advantage = group_advantage(batch.reward, batch.prompt_id, config.advantage_norm)[batch.row]  # (N,)
    if config.repeat_penalty:
        advantage = advantage - config.repeat_penalty * repeated(batch, n=config.token_counts.attempt)
    return advantage * batch.is_action


def short_outcome_credit(batch: Batch, episodes: Episodes | None, config: RunConfig) -> Tensor:
    """GRPO with a price on tokens: reward · (1 - length_penalty · min(1, tokens / thinking_budget)). Only right answers pay: else
    the shortest wrong answer would be the best of a group that finds none. After Arora and Zanette, arXiv 2502.04463, who charge
    a right answer by how long it is among the right ones of its problem."""
    tokens = torch.zeros_like(batch.reward).index_add(0, batch.row, batch.is_action.float())  # (B,)
    reward = batch.reward * (1 - config.length_penalty * (tokens / config.thinking_budget).clamp(max=1))
    return group_advantage(reward, batch.prompt_id, config.advantage_norm)[batch.row] * batch.is_action


def progress_credit(batch: Batch, episodes: Episodes | None, config: RunConfig) -> Tensor:
    """MRT: A_j = A_outcome + alpha · credit_j, (3), with progress normalised over the batch. Qu et al., arXiv 2503.07572.

    J_discount < 1 is ours: J is a potential, and progress its shaping reward with a discount (Ng, Harada and Russell, 1999). To
    go on costs 1 - J_discount where the answer is known and nothing where it isn't; progress_norm=std adds no other price.
    """
    advantage = outcome_credit(batch, episodes, config)
    if episodes is None:
        return advantage
    progress = normalise(episodes.progress(config.J_discount), config.progress_norm)  # (E,)
    credit = discounted_credit(progress, episodes.row, config.gamma)  # (E,)
    return advantage + config.alpha * spread(batch, episodes, credit) * batch.is_action  # (3)


def prefix_bonus_credit(batch: Batch, episodes: Episodes | None, config: RunConfig) -> Tensor:
    """MRT's backtracking form: reward + alpha · (reward - J(z_1)) for all that follows the first attempt z_1, relative to the
    group. The rows of a group begin with attempts of their own, or the bonus would cancel with the group's mean. Qu et al., arXiv
    2503.07572, where z_1 is a failed attempt; here it may be right, and going on is worth nothing then."""
    if episodes is None:
        return outcome_credit(batch, episodes, config)
    bonus = torch.zeros_like(batch.reward).index_add(0, episodes.row, episodes.progress())  # (B,)
    reward = batch.reward + config.alpha * bonus
    return group_advantage(reward, batch.prompt_id, config.advantage_norm)[batch.row] * batch.is_action


def value_credit(batch: Batch, episodes: Episodes, config: RunConfig) -> Tensor:
    """VinePPO: A_j = V(c_j) - V(c_{j-1}), where V is the mean reward of *continuing* and V after the last token the reward
    itself. Over a rollout it sums to reward - V(c_0), the outcome, and no other term is needed. That is `progress_norm` none, or
    std up to a factor; centred, every episode has a price as well. Kazemnejad et al., arXiv 2410.01679."""
    difference = normalise(episodes.progress(), config.progress_norm)  # (E,)
    return spread(batch, episodes, difference) * batch.is_action


def anytime_credit(batch: Batch, episodes: Episodes, config: RunConfig) -> Tensor:
    """Budget relative policy optimisation: A = R(s) - baseline, R(s) = 1/C · integral_s^C J(t) dt, for the tokens of an episode
    that starts after s thinking tokens; C is the thinking budget. Qi et al., arXiv 2505.13438.

    R(0) is 1 - regret, the accuracy at a budget drawn uniformly from 0..C. The baseline is part what the rollout's own past
    lets expect and part its group's mean: s/C · (mean J before s) · (C-s)/C + (1 - s/C) · (group's mean of R(s)).
    """
    C, device = config.thinking_budget, batch.tokens.device
    J, s = value_over_tokens(batch, episodes, C)  # (B,C+1), (N,)
    t, so_far = torch.arange(C + 1, device=device), J.cumsum(1)  # (C+1,), (B,C+1)
    ahead, past = (so_far[:, C - 1 : C] - so_far + J) / C, (so_far - J) / t.clamp(min=1)  # (B,C+1) R, and the mean J before
    _, group, size = batch.prompt_id.unique(return_inverse=True, return_counts=True)
    shared = ahead.new_zeros(len(size), C + 1).index_add(0, group, ahead) / size[:, None]  # (P,C+1)
    baseline = t / C * past * (C - t) / C + (1 - t / C) * shared[group]  # (B,C+1)
    return (ahead - baseline)[batch.row, s] * batch.is_action


def value_over_tokens(batch: Batch, episodes: Episodes, C: int) -> tuple[Tensor, Tensor]:
    """J after t thinking tokens, t = 0..C, (B,C+1): the last boundary's, and the reward once the answer is given; and for every
    token (N,) the t at which its episode, or the answer, begins. For whole traces."""
    J = batch.reward[:, None].repeat(1, C + 1).cpu()  # (B,C+1) the verdict, but while an episode is being thought
    s = torch.zeros(len(batch.tokens), dtype=torch.int64)
    response = (batch.offset + batch.lengths).index_add(0, batch.row, -batch.is_action.long()).tolist()  # its first token
    last = (batch.offset + batch.lengths).tolist()
    for r, start, end, J_before in zip(*(x.tolist() for x in (episodes.row, episodes.start, episodes.end, episodes.J_before))):
        t, after = (min(place - response[r], C) for place in (start, end))  # in thinking tokens
        J[r, t:after] = J_before
        s[start:end], s[end : last[r]] = t, after  # the answer, if this was the last episode
    return J.to(batch.reward.device), s.to(batch.reward.device)


def imitation_credit(batch: Batch, episodes: Episodes | None, config: RunConfig) -> Tensor:
    """Supervised learning of what is right: A = reward in {0, 1}, no baseline. Zelikman et al. (STaR), arXiv 2203.14465."""
    return batch.reward[batch.row] * batch.is_action


def plain_credit(batch: Batch, episodes: Episodes | None, config: RunConfig) -> Tensor:
    """Supervised fine-tuning (SFT): everything is right, A = 1, so the loss is -sum_t w_t log pi(a_t)."""
    return batch.is_action.float()


# --- Loss ---


def group_has_advantage(batch: Batch, advantage: Tensor) -> Tensor:
    """(B,) bool: whether any token of a rollout's group has an advantage. Of outcomes that are all equal none has: DAPO skips
    such a group."""
    return torch.isin(batch.prompt_id, batch.prompt_id[batch.row[advantage != 0]])


def length_with_gradient(batch: Batch, value: Tensor) -> Tensor:
    """(B,) the tokens of each rollout up to the last whose value, w_t A_t of (4), is not 0: what follows has no gradient, and
    attention is causal, so no gradient passes through it either. value: (N,)."""
    place = torch.arange(1, len(batch.tokens) + 1, device=value.device) - batch.offset[batch.row]  # (N,) 1 is a rollout's first
    return torch.zeros_like(batch.lengths).scatter_reduce(0, batch.row, place * (value != 0), "amax")


def token_weights(batch: Batch, loss_norm: str, budget: int, truncated: str) -> Tensor:
    """w of (4), over a whole minibatch before it is split, so that no split changes the gradient. (N,), 0 off the loss.

    token: every token counts the same (DAPO; Yu et al., arXiv 2503.14476); sequence: every rollout counts the same (GRPO);
    constant: every token counts 1 / (rollouts · `budget`) (Dr. GRPO). Rollouts that were cut off are left
    out by truncated = mask (DAPO's overlong filtering).
    """
    counted = (batch.is_action & (batch.finished[batch.row] | (truncated == "zero"))).float()  # (N,)
    if loss_norm == "token":
        return counted / counted.sum().clamp(min=1)
    per_row = torch.zeros(len(batch.lengths), device=counted.device).index_add(0, batch.row, counted)  # (B,)
    rows = (per_row > 0).sum().clamp(min=1)
    return counted / rows / (per_row.clamp(min=1)[batch.row] if loss_norm == "sequence" else budget)


def clipped_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor, low: float, high: float) -> Tensor:
    """(4), a scalar; every argument (n,). On policy its value is minus the mean advantage, its gradient REINFORCE's."""
    ratio = (logprob - old_logprob).exp()
    return -(weight * torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)).sum()  # (4)


def likelihood_loss(logprob: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """Of the supervised methods, a scalar: every token's log-prob, as much as it is worth. Every argument (n,)."""
    return -(weight * advantage * logprob).sum()


def kl_penalty(logprob: Tensor, old_logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    """Per-token loss (n,) whose expected gradient on policy is that of KL(pi || ref).

    k2: half the squared log-ratio. k3: k3 times the importance ratio, and so off policy as well; without the ratio its gradient
    would be that of the forward KL(ref || pi). k1 has no gradient of its own (E[grad log pi] = 0), so `k1_reward` subtracts its
    sum over a rollout from the reward and this returns 0.
    """
    log_ratio = ref_logprob - logprob
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return (logprob - old_logprob).exp() * (log_ratio.exp() - 1 - log_ratio)
    return torch.zeros_like(logprob)
