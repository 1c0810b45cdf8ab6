"""Sampling with a cache: every row is a branch of a shared prefix.

    prefill      prompts               -> Segments   (keys and values of whole sequences, one segment each)
    generate     segments + branches   -> Samples    (each branch: a segment, a position in it, some forced tokens, a seed)
    Samples.segments                   -> Segments   (prefix and new tokens joined, ready to be branched again)

A rollout branches from its prompt, a forced stop from its trace, a continuation from a cut: one function serves all three
and no prefix is computed twice. A branch reads its segment up to its position and keeps a suffix of its own. At most
`max_rows` branches are sampled at a time: a slot whose row has finished is taken by a waiting row, and once nobody waits the
step shrinks with the rows that are left.

Row r's t-th token is drawn with a number that is a hash of (seed[r], t), so what it says depends neither on its neighbours
nor on when it got its slot, but for the last bits of a library's matrix products, which may depend on how many rows there are.
The distribution is the one the loss scores: softmax(logits / temperature) and nothing else. top-k and top-p exist for
`sample.py`. Forced tokens are context, never actions; `Samples.is_action` tells them apart.

On a GPU a decoding step is recorded as a CUDA graph and replayed until slots change hands (`cudagraph.py`).

Left out: paged caches (a segment is contiguous) and prompts split between two forward passes.
Dimension key: S segments, R branches, n slots, L cached prefix tokens, T suffix tokens, K key/value heads, D head dim,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import kernels
from nanomrt.config import UserError
from nanomrt.cudagraph import recording
from nanomrt.model import Attend, Llama, Packed, compute_dtype, mixed_precision, packs

EMPTY = 2**30  # the position of a cache entry that holds nothing: no branch reaches so far
SHORTEST = 16  # entries that attention reads at least: a CPU's softmax is ten times slower over fewer than a vector holds
MOST_ROWS = {"cpu": 512, "cuda": 8192}  # at a time: more rows' activations don't stay in a CPU's L2
CHECK_EVERY = {"cpu": 1, "cuda": 16}  # steps between two looks at who has finished: on a GPU a look waits for the device
READ_STEP = {"cpu": 16, "cuda": 512}  # suffixes are read up to a multiple of this: on a GPU another shape is another recording
GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64


class NoRoom(UserError):
    """What is asked for doesn't fit in memory."""


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
    seed: Tensor  # (R,) int64, of the row's random numbers; two rows with one seed draw the same ones

    @classmethod
    def of(cls, segment: Sequence[int], position: Sequence[int], forced: Sequence[Sequence[int]], device,
           generator: torch.Generator | None = None) -> "Branches":
        """Seeds are drawn from `generator`; without one all are 0, which is enough for greedy sampling. Raises ValueError if a
        row has no forced token."""
        if not all(map(len, forced)):
            raise ValueError("a branch needs a forced token to begin with: branch one token earlier, and give that one again")
        width, R = max(map(len, forced), default=1), len(forced)
        padded = [[*row, *[-1] * (width - len(row))] for row in forced]
        seed = torch.randint(2**63 - 1, (R,), generator=generator) if generator else torch.zeros(R, dtype=torch.int64)
        return cls(*(torch.as_tensor(x, dtype=torch.int64, device=device) for x in (segment, position, padded, seed)))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy."""

    max_new_tokens: int | Tensor  # a Tensor (R,) gives each row its own budget
    stop: tuple[int | tuple[int, ...], ...]  # ids, or sequences of ids, that end a row which says them
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    instead: tuple[int, int] | None = None  # (a, b): b stands where a was drawn; who trains leaves b out, for nobody chose it


@dataclass(frozen=True)
class Samples:
    """What `generate` returns, in the order of its branches."""

    tokens: Tensor  # (R,T) int64: forced tokens, then the sampled ones, then 0
    is_action: Tensor  # (R,T) bool: sampled by the policy
    logprobs: Tensor  # (R,T) fp32: log-probability of each token but the first, whose logits are not computed; 0 elsewhere
    lengths: Tensor  # (R,) int64: tokens that count in each row, forced ones included
    stopped: Tensor  # (R,) bool: ended with a stop token or sequence; otherwise cut off at max_new_tokens
    branches: Branches
    contexts: Segments | None  # R segments: what each row saw of its prefix, then its own tokens; None if not kept

    @property
    def generated(self) -> int:
        """Tokens drawn, for the ledger."""
        return int(self.is_action.sum())

    def rows(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    def segments(self) -> Segments:
        """Each row's whole context as one segment, but for a stop token that ended it: that was never fed."""
        if self.contexts is None:
            raise ValueError("these rows can't be branched: they were generated with keep=False")
        return self.contexts


class CachingAttention:
    """`Packed` attention that writes each layer's keys and values (N,K,D) to their places (sequence, step) of a cache."""

    def __init__(self, packed: Packed, keys: Tensor, values: Tensor, place: tuple[Tensor, Tensor]):
        self.packed, self.keys, self.values, self.place = packed, keys, values, place

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[layer].transpose(1, 2)[self.place] = new  # (S,L,K,D) at N places
        return self.packed(layer, q, k, v)


@torch.no_grad()
def prefill(model: Llama, prompts: Sequence[Sequence[int]], max_tokens: int = 32768) -> Segments:
    """Cache S token sequences in packed forward passes of at most `max_tokens` (or of one prompt that is longer). Raises
    ValueError if there are none, or they don't fit in memory."""
    if not prompts or not all(map(len, prompts)):
        raise ValueError("prefill needs at least one prompt, and a token in each")
    device, lengths = model.device, [len(prompt) for prompt in prompts]
    step = torch.arange(max(*lengths, SHORTEST), device=device)  # (L,)
    inside = step < torch.tensor(lengths, device=device)[:, None]  # (S,L)
    needed, room = len(prompts) * len(step) * bytes_per_token(model), cache_room(device)
    if needed > room:
        raise NoRoom(f"caching {len(prompts)} prompts of up to {len(step)} tokens takes {needed / 1e9:.2f} GB, but there is "
                     f"room for {room / 1e9:.2f} GB: give fewer or shorter prompts at a time")
    keys, values = (new_cache(model, len(prompts), len(step)) for _ in range(2))
    for pack in packs(lengths, max_tokens):
        some = slice(pack.start, pack.stop)
        packed = Packed.of(torch.tensor(lengths[some], device=device))
        tokens = torch.tensor([token for prompt in prompts[some] for token in prompt], device=device)  # (N,)
        place = inside[some].nonzero(as_tuple=True)  # (N,), (N,)
        model(tokens, packed.position_ids, CachingAttention(packed, keys[:, some], values[:, some], place))
    return Segments(keys, values, step.expand_as(inside).masked_fill(~inside, EMPTY))


def new_cache(model: Llama, rows: int, length: int) -> Tensor:
    """Zeros (layers,rows,K,length,D): entries that hold nothing are read, too, with weight 0."""
    config, device = model.config, model.device
    return torch.zeros(config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim,
                       dtype=compute_dtype(device), device=device)


def laid_out(whole: Tensor, length: int) -> Tensor:
    """The beginning of a cache's memory (layers,rows,K,·,D) as a cache of `length` tokens a row."""
    layers, rows, K, _, D = whole.shape
    return whole.flatten()[: layers * rows * K * length * D].view(layers, rows, K, length, D)


def moved(whole: Tensor, cache: Tensor, length: int) -> Tensor:
    """The rows of a cache that is laid out in `whole`, with room for `length` tokens each, in the same memory."""
    new, (layers, n, _, before, _) = laid_out(whole, length), cache.shape
    if length == before:
        return cache
    for layer in range(layers) if length < before else reversed(range(layers)):  # none is written over before it has moved
        new[layer, :n, :, :before] = cache[layer, :, :, :length].clone()
    return new[:, :n]


def bytes_per_token(model: Llama) -> int:
    """What one token's keys and values take in all layers."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * compute_dtype(model.device).itemsize


def cache_room(device: torch.device) -> int:
    """Bytes that caches may take now: of what is free, a fifth is left to activations."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, in PyTorch's hands
        free = torch.cuda.mem_get_info(device)[0] + held
    else:
        free = available_memory()
    return free * 4 // 5


def available_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the CPU's programs can have without swapping, as Linux says of the machine and of its container (control groups,
    version 2); elsewhere 8 GiB are taken for free."""
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 8 * 2**30)
    most = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    if most != "max":
        used, stat = (group / "memory.current").read_text(), (group / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))  # files that can be let go
        free = min(free, max(int(most) - int(used) + cached, 0))
    return free


def fitting_rows(model: Llama, prefix: Segments, R: int, T: int, keep: bool) -> int:
    """How many rows can be sampled at a time with suffixes of T tokens. Raises ValueError if not even one."""
    token, free = bytes_per_token(model), cache_room(model.device)
    row = T * token + 3 * 4 * model.config.vocab_size  # its cache; its logits, log-probs and their cumulative distribution
    if len(prefix.positions) > 1:
        free -= prefix.positions.numel() * token  # a copy of the prefixes still in use
    kept = R * (prefix.positions.shape[1] + T) * token if keep else 0
    fitting = (free - kept) // row
    if fitting < 1:
        raise NoRoom(f"a row of {T} new tokens takes {row / 1e9:.2f} GB and keeping {R} rows {kept / 1e9:.2f} GB, "
                     f"but there is room for {free / 1e9:.2f} GB: sample fewer rows at a time or lower the budget of new "
                     "tokens, as prompts_per_step, group_size, thinking_budget and eval_budget say")
    return min(fitting, R, MOST_ROWS[model.device.type])


class Slots:
    """The n rows that are sampled now: the cache of their suffixes, and the `Attend` of a decoding step.

    A finished row's slot goes to the next row that waits; when none does, the last slot's row moves up into it.
    """

    def __init__(self, model: Llama, prefix: Segments, branches: Branches, T: int, max_rows: int, keep: bool):
        self.prefix, self.branches, self.T = prefix, branches, T
        S, segment = len(prefix.positions), branches.segment
        # Rows of one segment side by side, and those first that see most: what is long shouldn't come last.
        reach = torch.zeros(S, dtype=torch.int64, device=segment.device).scatter_reduce(0, segment, branches.position, "amax")
        order = (reach[segment] * S + segment).argsort(descending=True, stable=True)  # (R,)
        self.row, self.waiting = order[:max_rows], order[max_rows:]  # (n,) the row in each slot
        self.grows = segment.device.type == "cpu"  # on a GPU a recorded step needs its addresses
        # Keys and values (layers,n,K,T,D): their memory, with room for T in whole vectors, and how they lie in it now.
        self.whole = tuple(new_cache(model, len(self.row), -(-T // SHORTEST) * SHORTEST) for _ in range(2))
        self.keys, self.values = (laid_out(cache, SHORTEST) if self.grows else cache for cache in self.whole)
        self.contexts = None
        if keep:
            self.contexts = tuple(new_cache(model, len(segment), prefix.positions.shape[1] + T) for _ in range(2))
            for wholes, caches in zip(self.contexts, (prefix.keys, prefix.values)):
                for whole, cache in zip(wholes, caches):  # layer by layer, or what is gathered would take as much again
                    whole[:, :, : cache.shape[2]] = cache[segment]
        self.longest = self.read = 0  # no suffix is longer; what attention reads of each
        self.chosen, self.shared = torch.arange(S, device=segment.device), prefix  # (S,) the segments that are read, and they
        self._share()

    def reserve(self, tokens: int) -> bool:
        """Suffixes may grow by `tokens` now. Returns whether attention reads more of them than before, or less.

        On a CPU rows lie side by side as far as they are read: over gaps the products wait for memory, three times as long.
        """
        before, by = self.read, READ_STEP[self.keys.device.type]
        self.longest = min(self.longest + tokens, self.T)
        self.read = min(max(-(-self.longest // by) * by, SHORTEST), self.whole[0].shape[3])
        if self.grows:
            self.keys, self.values = map(moved, self.whole, (self.keys, self.values), (self.read, self.read))
        return self.read != before

    def feed(self, length: Tensor) -> Attend:
        """The `Attend` of each row's next token, at place length (n,) of its suffix. Not kept here: the tensors of a recorded
        step live with its graph."""
        _, n, K, capacity, _ = self.keys.shape
        place_of_new = (torch.arange(n * K, device=length.device).view(n, K) * capacity + length[:, None]).flatten()
        return partial(self.attend, length, place_of_new)

    def attend(self, length: Tensor, place_of_new: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]  # (n,K,T,D)
        for cache, new in ((keys, k), (values, v)):
            cache.flatten(0, 2).index_copy_(0, place_of_new, new.flatten(0, 1))
        own = (cache[:, :, : self.read] for cache in (keys, values))
        return kernels.branch_attention(q, self.shared_keys[layer], self.shared_values[layer], self.positions, self.limit,
                                        self.group, self.place, *own, length + 1)

    def turn_over(self, rows: "Rows") -> bool:
        """Finished rows leave. Their slots go to rows that wait; those that stay free are closed by the rows of the last slots.
        Returns whether anything changed.

        Of 6 slots those of 1, 3 and 5 have finished, and row 9 waits: slot 1 takes row 9, so 4 slots remain; 3 is a hole among
        them, and the row of slot 4 moves into it.
        """
        done = rows.done[self.row]  # (n,)
        count, n = int(done.sum()), len(self.row)  # here, and only here, the loop waits for the device
        if count == 0 or count * (32 if len(self.waiting) else 8) < n:
            return False  # moving rows pays from an eighth of the slots on, or a thirty-second if rows wait
        left = done.nonzero().squeeze(1)
        if self.contexts is not None:
            self._keep(left)
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        n -= count - len(taken)
        busy = ~done
        busy[left[: len(taken)]] = True
        self.row = self.row.index_copy(0, left[: len(taken)], taken)
        holes, movers = (~busy[:n]).nonzero().squeeze(1), busy[n:].nonzero().squeeze(1) + n
        self.row[holes] = self.row[movers]
        for cache in (self.keys[:, :, :, : self.longest], self.values[:, :, :, : self.longest]):
            cache[:, holes] = cache[:, movers]
        self.row, self.keys, self.values = self.row[:n], self.keys[:, :n], self.values[:, :n]
        if n:
            self.longest = int(rows.last[self.row].max())
            self._share()
        return True

    def _keep(self, slot: Tensor) -> None:
        """Put the suffixes of these slots behind their prefixes."""
        first = self.prefix.positions.shape[1]
        for whole, cache in zip(self.contexts, (self.keys, self.values)):
            whole[:, self.row[slot], :, first : first + self.longest] = cache[:, slot, :, : self.longest]

    def _share(self) -> None:
        """Group the rows by segment, so that each segment is read once for all of its branches.

        Segments that nobody needs are left out by copying the others. That pays once they are half of what is read.
        """
        segment, position = self.branches.segment[self.row], self.branches.position[self.row]  # (n,)
        used = segment.unique()  # in order, as `chosen` is
        if 2 * len(used) <= len(self.chosen) or not bool(torch.isin(used, self.chosen).all()):
            self.shared = self.shared_keys = self.shared_values = None  # the last copy makes room for this one
            self.chosen, whole = used, self.prefix
            self.shared = Segments(whole.keys[:, used], whole.values[:, used], whole.positions[used])
        segment, S = torch.searchsorted(self.chosen, segment), len(self.chosen)  # (n,) where each row's stands among them
        size, order = segment.bincount(minlength=S), segment.argsort(stable=True)  # (S,), (n,)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size)[segment[order]]
        M = int(size.max())
        self.place = segment * M + rank  # (n,)
        self.group = torch.zeros(S * M, dtype=torch.int64, device=order.device)
        self.group[self.place] = torch.arange(len(order), device=order.device)
        self.group = self.group.view(S, M)  # (S,M) rows of each segment; unused places name row 0
        self.limit = torch.full((S * M,), -1, dtype=torch.int32, device=order.device)
        self.limit[self.place] = position.int()
        self.limit = self.limit.view(S, M)  # (S,M) what each of them sees of it
        seen = (self.shared.positions < self.limit.amax(1)[:, None]).any(0)  # (L,) by anybody
        L = max(int((seen * torch.arange(1, len(seen) + 1, device=seen.device)).max()), SHORTEST)
        self.positions = self.shared.positions[:, :L].int()
        self.shared_keys, self.shared_values = (  # (layers,S,K,L,D)
            cache[..., :L, :] for cache in (self.shared.keys, self.shared.values))


@dataclass
class Rows:
    """All R rows while they are sampled. Rows that wait, sample and have ended differ only in `last` and `done`."""

    position: Tensor  # (R,) of the first forced token
    given: Tensor  # (R,) forced tokens
    ends: Tensor  # (R,) the length at which a row is cut off
    uniform: Tensor  # (R,T+1) the random number that each token is drawn with
    tokens: Tensor  # (R,T+1) forced, then drawn; the last column is where a full row writes nothing
    logprobs: Tensor  # (R,T+1)
    last: Tensor  # (R,) index of the token that is fed next; all before it are cached
    done: Tensor  # (R,) bool
    stopped: Tensor  # (R,) bool

    @classmethod
    def of(cls, branches: Branches, sampling: Sampling) -> "Rows":
        (R, F), device = branches.forced.shape, branches.forced.device
        given = (branches.forced >= 0).sum(1)
        ends = given + sampling.max_new_tokens
        step = torch.arange(int(ends.max()) + 1, device=device)  # (T+1,)
        tokens = torch.zeros(R, len(step), dtype=torch.int64, device=device)
        tokens[:, : F] = branches.forced[:, : len(step)].clamp(min=0)
        nothing = torch.zeros(R, dtype=torch.bool, device=device)
        return cls(branches.position, given, ends, random_numbers(branches.seed[:, None], step), tokens,
                   torch.zeros(tokens.shape, device=device), torch.zeros_like(given), nothing, nothing.clone())

    def samples(self, branches: Branches, prefix: Segments, contexts: tuple[Tensor, Tensor] | None) -> Samples:
        lengths = self.last + 1
        step = torch.arange(self.tokens.shape[1] - 1, device=lengths.device)  # (T,)
        is_action = (step >= self.given[:, None]) & (step < lengths[:, None])
        segments = None
        if contexts:
            start, cached = self.position[:, None], (lengths - self.stopped.long())[:, None]  # (R,1) a stop was never fed
            seen = prefix.positions[branches.segment]  # (R,L)
            segments = Segments(*contexts, torch.cat([seen.masked_fill(seen >= start, EMPTY),
                                                      (start + step).masked_fill(step >= cached, EMPTY)], dim=1))
        return Samples(self.tokens[:, :-1], is_action, self.logprobs[:, :-1], lengths, self.stopped, branches, segments)


def decode(model: Llama, head: Tensor, rows: Rows, slots: Slots, stop: Tensor, sampling: Sampling) -> None:
    """Feed one token of every slot's row and write down its next one. No line waits for the device or knows a row by name."""
    row, at = slots.row, rows.last[slots.row]  # (n,)
    hidden = model(rows.tokens[row, at], rows.position[row] + at, slots.feed(at))  # (n,C)
    logp = distribution(kernels.logits(hidden, head), sampling)  # (n,V)
    at = at + 1
    forced, full = at < rows.given[row], at == rows.ends[row]
    going = ~(rows.done[row] | full)  # a finished row repeats its last step until its slot is taken
    token = torch.where(forced, rows.tokens[row, at], draw(logp, rows.uniform[row, at], sampling))
    rows.tokens[row, at] = token * going
    rows.logprobs[row, at] = logp.gather(1, token[:, None]).squeeze(1).masked_fill(~going, 0.0)
    stopped = going & ends_with(stop, rows.tokens, row, at, rows.given[row])
    rows.stopped[row] |= stopped
    rows.done[row] |= stopped | full
    rows.last[row] += going


def ends_with(stop: Tensor, tokens: Tensor, row: Tensor, at: Tensor, given: Tensor) -> Tensor:
    """(n,) whether tokens[row] up to and with `at` end with a stop sequence (Q,W) of which no token was given."""
    place = at[:, None] + torch.arange(1 - stop.shape[1], 1, device=at.device)  # (n,W)
    last = torch.where(place >= given[:, None], tokens[row[:, None], place.clamp(min=0)], -2)  # (n,W)
    return ((last[:, None] == stop) | (stop < 0)).all(2).any(1)  # (n,Q,W)


@torch.no_grad()
def generate(model: Llama, prefix: Segments, branches: Branches, sampling: Sampling, max_rows: int | None = None,
             keep: bool = True) -> Samples:
    """Sample every branch until it says a stop or has drawn `max_new_tokens`.

    max_rows: how many rows at a time; None is as many as do well and fit in memory. keep: whether samples can be branched again.
    Raises ValueError for a branch behind its segment's end, a context longer than the model's, and (NoRoom) what doesn't fit.
    """
    cached = (prefix.positions < EMPTY).sum(1)[branches.segment]  # (R,)
    if bool((branches.position > cached).any()):
        raise ValueError("a branch begins behind what its segment holds: the token that ended a row was never fed, so branch "
                         "before it, and give it again")
    if int(torch.as_tensor(sampling.max_new_tokens).min()) < 0 or () in sampling.stop:
        raise ValueError("max_new_tokens must be at least 0, and a stop sequence must have a token")
    rows, device, head = Rows.of(branches, sampling), prefix.keys.device, model.head
    T, needed = rows.tokens.shape[1] - 1, int((rows.position + rows.ends).max())
    if needed > model.config.max_position_embeddings:
        raise ValueError(f"the context holds {model.config.max_position_embeddings} tokens, this needs {needed}: "
                         "lower the budget or raise max_position_embeddings")
    stops = [(ids,) if isinstance(ids, int) else ids for ids in sampling.stop]
    width = max(map(len, stops), default=1)
    stop = torch.tensor([(*[-1] * (width - len(ids)), *ids) for ids in stops], dtype=torch.int64, device=device).view(-1, width)
    max_rows = min(max_rows or len(rows.ends), fitting_rows(model, prefix, len(rows.ends), T, keep))
    slots, steps = Slots(model, prefix, branches, T, max_rows, keep), min(CHECK_EVERY[device.type], T)
    once = lambda: decode(model, head, rows, slots, stop, sampling)
    with mixed_precision(device), recording(once, device) as step:
        while len(slots.row):
            if slots.reserve(steps):
                step.restart()
            for _ in range(steps):
                step()
            if slots.turn_over(rows):
                step.restart()
    return rows.samples(branches, prefix, slots.contexts)


def random_numbers(seed: Tensor, step: Tensor) -> Tensor:
    """Uniform in [0, 1), a function of (seed, step) alone: the same bits on every device and in every batch. int64 -> fp32.

    The mixer is splitmix64's; products wrap around, which is what int64 does.
    """
    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & (2 ** (64 - bits) - 1)  # without the sign that >> drags in

    def mixed(x: Tensor) -> Tensor:
        x = x + GOLDEN
        x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
        x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
        return x ^ shifted(x, 31)

    return shifted(mixed(mixed(seed) + step * GOLDEN), 40).float() * 2**-24


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The log-probabilities (n,V) that tokens are drawn from and recorded with. logits (n,V) fp32."""
    if sampling.temperature == 0:
        return logits.log_softmax(dim=-1)
    return truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p).log_softmax(dim=-1)


def draw(logp: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token per row by inverting the cumulative distribution. logp (n,V), uniform (n,) -> ids (n,)."""
    if sampling.temperature == 0:
        ids = logp.argmax(dim=-1)
    else:
        cdf = logp.exp().cumsum(dim=-1)
        ids = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(1)
    if sampling.instead:
        ids = ids.masked_fill(ids == sampling.instead[0], sampling.instead[1])
    return ids


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k likeliest tokens and outside the smallest set that holds top_p of the probability."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p  # likelier tokens hold as much already
        logits = logits.masked_fill(torch.empty_like(beyond).scatter(1, index, beyond), -torch.inf)
    return logits
