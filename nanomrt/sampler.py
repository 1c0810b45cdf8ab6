"""Sampling with a cache: every row is a branch of a shared prefix.

    prefill      prompts               -> Segments   (keys and values of whole sequences, one segment each)
    generate     segments + branches   -> Samples    (each branch: a segment, a position in it, some forced tokens)
    Samples.segments()                 -> Segments   (prefix and new tokens joined, ready to be branched again)

A rollout branches from its prompt, a forced stop from its trace, a continuation from a cut: one function serves all three
and no prefix is computed twice. A branch reads its segment up to its position and keeps a suffix of its own. Prefixes are
ragged, but all suffixes of a call have the same length at each step, so there is no padding and no per-row mask there.
Rows that finish leave: the live ones are swapped to the front and the step shrinks with them.

The distribution sampled from is the one the loss scores: softmax(logits / temperature) and nothing else. top-k and top-p
exist for `sample.py`. Forced tokens are context, never actions; `Samples.is_action` tells them apart.
Dimension key: S segments, R branches, L cached prefix tokens, T suffix tokens, K key/value heads, D head dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from nanomrt.model import Llama, Packed, mixed_precision

EMPTY = 2**30  # the position of a cache entry that holds nothing: no branch reaches so far


@dataclass(frozen=True)
class Segments:
    """Keys and values of S cached sequences. An entry is visible to a branch at position p if its own position is < p."""

    keys: Tensor  # (layers,S,K,L,D)
    values: Tensor  # (layers,S,K,L,D)
    positions: Tensor  # (S,L) int64, EMPTY where an entry holds nothing


@dataclass(frozen=True)
class Branches:
    """Where each of R rows starts: it sees segment[r] before position[r], then the forced tokens, then its own."""

    segment: Tensor  # (R,) int64
    position: Tensor  # (R,) int64, also the position of the first forced token
    forced: Tensor  # (R,F) int64, F >= 1, padded with -1 on the right; at least one token per row starts the sampling

    @classmethod
    def of(cls, segment: Sequence[int], position: Sequence[int], forced: Sequence[Sequence[int]], device) -> "Branches":
        width = max(map(len, forced))
        padded = [[*row, *[-1] * (width - len(row))] for row in forced]
        return cls(*(torch.tensor(x, dtype=torch.int64, device=device) for x in (segment, position, padded)))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    replace: tuple[int, int] | None = None  # (a, b): b stands where a was drawn; to look at, not to train on


@dataclass(frozen=True)
class Samples:
    """What `generate` returns, in the order of its branches."""

    tokens: Tensor  # (R,T) int64: forced tokens, then the sampled ones, then 0
    is_action: Tensor  # (R,T) bool: sampled by the policy
    logprobs: Tensor  # (R,T) fp32: log-probability of each action, 0 elsewhere
    lengths: Tensor  # (R,) int64: tokens that count in each row, forced ones included
    stopped: Tensor  # (R,) bool: ended with a stop token; otherwise cut off at max_new_tokens
    prefix: Segments
    branches: Branches
    cache: "BranchCache"

    @property
    def generated(self) -> int:
        """Tokens drawn, for the ledger."""
        return int(self.is_action.sum())

    def rows(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    def segments(self) -> Segments:
        """Each row's whole context as one segment: what it saw of its prefix, then its own tokens."""
        segment, start = self.branches.segment, self.branches.position[:, None]  # (R,), (R,1)
        T, slot = self.cache.length, self.cache.slot_of_row()
        known = (self.lengths - self.stopped.long())[:, None]  # (R,1) a stop token was never fed: it has no entry
        step = torch.arange(T, device=start.device)  # (T,)
        seen = self.prefix.positions[segment]  # (R,L)
        return Segments(
            torch.cat([self.prefix.keys[:, segment], self.cache.keys[:, slot, :, :T]], dim=3),
            torch.cat([self.prefix.values[:, segment], self.cache.values[:, slot, :, :T]], dim=3),
            torch.cat([seen.masked_fill(seen >= start, EMPTY),
                       (start + step).masked_fill(step >= known, EMPTY)], dim=1))


class BranchCache:
    """The suffixes' keys and values, and the `Attend` of a decoding step.

    Slots 0 … live-1 hold the rows that still sample. `row` names the row in each slot; `keep` swaps rows, so that nothing
    is copied for the rows that stay and the finished rows' suffixes survive for later branches.
    """

    def __init__(self, prefix: Segments, branches: Branches, capacity: int):
        layers, _, K, _, D = prefix.keys.shape
        R, device = len(branches.segment), prefix.keys.device
        self.prefix, self.branches = prefix, branches
        self.keys = prefix.keys.new_zeros(layers, R, K, capacity, D)
        self.values = torch.zeros_like(self.keys)
        self.row = torch.arange(R, device=device)  # (R,) the row in each slot
        self.live, self.length = R, 0
        self._share()

    def slot_of_row(self) -> Tensor:
        return self.row.argsort()  # the inverse of a permutation

    def keep(self, active: Tensor) -> None:
        """Go on with the slots where `active` (live,) is true; they move to the front."""
        count = int(active.sum())
        holes, movers = (~active[:count]).nonzero().squeeze(1), active[count:].nonzero().squeeze(1) + count
        for tensor in (self.keys[:, :, :, : self.length], self.values[:, :, :, : self.length], self.row[None]):
            a, b = tensor[:, holes], tensor[:, movers]  # copies
            tensor[:, holes], tensor[:, movers] = b, a
        self.live = count
        self._share()

    def _share(self) -> None:
        """Group the live rows by segment, so that each segment is read once for all of its branches."""
        row = self.row[: self.live]
        segment, position = self.branches.segment[row], self.branches.position[row]  # (R,)
        used, segment, size = segment.unique(return_inverse=True, return_counts=True)
        order = segment.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size)[segment[order]]
        M = int(size.max()) if len(row) else 0
        self.place = segment * M + rank  # (R,)
        self.group = torch.zeros(len(used) * M, dtype=torch.int64, device=row.device)
        self.group[self.place] = torch.arange(len(row), device=row.device)
        self.group = self.group.view(len(used), M)  # (S,M) live rows of each used segment; unused places name row 0
        limit = torch.zeros_like(self.group.flatten())
        limit[self.place] = position
        seen = self.prefix.positions[used][:, None] < limit.view(len(used), M)[..., None]  # (S,M,L)
        self.unseen = torch.where(seen, 0.0, -1e30)
        whole = len(used) == len(self.prefix.positions)  # then nothing has to be copied
        self.shared_keys = self.prefix.keys if whole else self.prefix.keys[:, used]
        self.shared_values = self.prefix.values if whole else self.prefix.values[:, used]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, t = self.live, self.length
        self.keys[layer, :n, :, t], self.values[layer, :n, :, t] = k, v
        return kernels.branch_attention(q, self.shared_keys[layer], self.shared_values[layer], self.unseen, self.group,
                                        self.place, self.keys[layer, :n, :, : t + 1], self.values[layer, :n, :, : t + 1])


class Recorder:
    """`Packed` attention that keeps each layer's keys and values (N,K,D)."""

    def __init__(self, packed: Packed):
        self.packed, self.keys, self.values = packed, [], []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        return self.packed(layer, q, k, v)


@torch.no_grad()
def prefill(model: Llama, prompts: Sequence[Sequence[int]]) -> Segments:
    """Cache S token sequences in one packed forward pass."""
    device = model.head.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (S,)
    packed = Packed.of(lengths)
    step = torch.arange(packed.max_seqlen, device=device)  # (L,)
    inside = step < lengths[:, None]  # (S,L)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)  # (N,)
    attend = Recorder(packed)
    model(tokens, packed.position_ids, attend)
    spread = torch.zeros(inside.shape, dtype=torch.int64, device=device)
    spread[inside] = torch.arange(len(tokens), device=device)  # (S,L) where each entry lies on the flat axis
    keys, values = (torch.stack([x[spread].transpose(1, 2) for x in kept]) for kept in (attend.keys, attend.values))
    return Segments(keys, values, step.expand_as(inside).masked_fill(~inside, EMPTY))


@torch.no_grad()
def generate(model: Llama, prefix: Segments, branches: Branches, sampling: Sampling,
             generator: torch.Generator | None = None) -> Samples:
    """Sample every branch until a stop token or `max_new_tokens`. All randomness is drawn up front from `generator`
    (one uniform number per row and step), so a row's sample does not depend on when the others finish."""
    device, (R, F) = branches.segment.device, branches.forced.shape
    T = F + sampling.max_new_tokens  # a row with f forced tokens ends at f + max_new_tokens <= T
    furthest = int(branches.position.max()) + T
    if furthest > model.config.max_position_embeddings:
        raise ValueError(f"the context holds {model.config.max_position_embeddings} tokens, this needs {furthest}: "
                         "lower the budget or raise max_position_embeddings")
    uniform = torch.rand(T, R, generator=generator).to(device)
    stop_ids = torch.tensor(sampling.stop_ids, device=device)
    forced = (branches.forced >= 0).sum(1)  # (R,)
    ends = forced + sampling.max_new_tokens  # (R,) the length at which a row is cut off
    tokens = torch.zeros(R, T, dtype=torch.int64, device=device)
    tokens[:, :F] = branches.forced.clamp(min=0)
    logprobs = torch.zeros(R, T, device=device)
    lengths = forced.clone()
    stopped = torch.zeros(R, dtype=torch.bool, device=device)
    cache, head = BranchCache(prefix, branches, T), model.head
    active = torch.ones(R, dtype=torch.bool, device=device)  # (live,) of the slots, which still need a token

    with mixed_precision(device):
        while cache.live:
            t, row = cache.length, cache.row[: cache.live]
            hidden = model(tokens[row, t], branches.position[row] + t, cache)  # (live,C)
            cache.length += 1
            if t + 1 == T:
                break  # the rows that are left were cut off; their last token is cached now
            free = active & (forced[row] <= t + 1) & (ends[row] > t + 1)  # slots that draw their next token now
            drawn, logprob = draw(kernels.logits(hidden, head), uniform[t + 1, row], sampling)  # (live,), (live,)
            if sampling.replace:
                drawn = torch.where(drawn == sampling.replace[0], sampling.replace[1], drawn)
            at = row[free]
            tokens[at, t + 1], logprobs[at, t + 1] = drawn[free], logprob[free]
            lengths[at] += 1
            stop = free & torch.isin(drawn, stop_ids)
            stopped[row[stop]] = True
            active = active & ~stop & (ends[row] > t + 1)
            if int(active.sum()) <= 0.875 * cache.live:  # moving rows costs more than an idle eighth
                cache.keep(active)
                active = active.new_ones(cache.live)

    step = torch.arange(T, device=device)
    is_action = (step >= forced[:, None]) & (step < lengths[:, None])
    return Samples(tokens, is_action, logprobs, lengths, stopped, prefix, branches, cache)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution. logits (R,V), uniform (R,) -> ids and log-probs (R,)."""
    if sampling.temperature == 0:
        logp = logits.float().log_softmax(dim=-1)  # (R,V)
        ids = logp.argmax(dim=-1)
    else:
        logp = truncate(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p).log_softmax(dim=-1)
        cdf = logp.exp().cumsum(dim=-1)
        ids = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(1)
    return ids, logp.gather(1, ids[:, None]).squeeze(1)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k likeliest tokens and outside the smallest set that holds top_p of the probability."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        dropped = (p.cumsum(dim=-1) - p >= top_p).scatter(1, index, p.cumsum(dim=-1) - p >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
