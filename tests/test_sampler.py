"""The sampler: whatever is cached, shared, forked, swapped or stopped early, every row equals the row computed from scratch."""

import weakref
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.countdown import Countdown
from nanomrt import sampler
from nanomrt.config import RunConfig
from nanomrt.cudagraph import Recording
from nanomrt.model import Llama, Packed
from nanomrt.rollout import Rollouts, boundaries, branch, continue_from, force_answers, roll_out
from nanomrt.sampler import (
    EMPTY,
    Branches,
    Samples,
    Sampling,
    Segments,
    distribution,
    draw,
    generate,
    prefill,
    random_numbers,
    truncate,
)

PROMPT_LENGTHS = (7, 1, 12, 3, 5)


@pytest.fixture
def model(config) -> Llama:
    """A small Llama with large embeddings and a head of its own: what it says depends on the context and is far from uniform."""
    model = Llama(replace(config, tie_word_embeddings=False)).initialise(generator(0))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
        model.lm_head.weight.mul_(15)
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(lengths: Sequence[int], seed: int = 0, V: int = 117) -> list[list[int]]:
    return [torch.randint(1, V, (n,), generator=generator(seed + i)).tolist() for i, n in enumerate(lengths)]


def fork(model: Llama, prefix: Segments, segment: Sequence[int], contexts: Sequence[Sequence[int]], sampling: Sampling,
         seed: int = 0, forced: Sequence[Sequence[int]] | None = None) -> Samples:
    """Branch row r from segment[r] after contexts[r], with forced tokens."""
    return branch(model, prefix, segment, contexts, forced or [[]] * len(segment), sampling, generator(seed))


def groups(size: int) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Ragged prompts, `size` rows of each in mixed order: prompts, each row's prompt, each row's context."""
    prompts = random_rows(PROMPT_LENGTHS)
    owner = [i % len(prompts) for i in range(len(prompts) * size)]
    return prompts, owner, [prompts[i] for i in owner]


def branches_of(owner: Sequence[int], contexts: Sequence[Sequence[int]], seed: int = 0) -> Branches:
    """A row for each context, which must be what its segment holds."""
    return Branches.of(owner, [len(c) - 1 for c in contexts], [c[-1:] for c in contexts], "cpu", generator(seed))


def take(branches: Branches, rows: Sequence[int]) -> Branches:
    return Branches(*(getattr(branches, f.name)[list(rows)] for f in fields(Branches)))


def whole(samples: Samples, contexts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each row's context and tokens as one sequence."""
    return [[*context[:start], *row] for context, start, row in
            zip(contexts, samples.branches.position.tolist(), samples.rows(), strict=True)]


@torch.no_grad()
def logps(model: Llama, rows: Sequence[Sequence[int]], temperature: float = 1.0) -> list[Tensor]:
    """From scratch, no cache: for each row (T,V), log-probabilities of the token *after* each position."""
    packed = Packed.of(torch.tensor([len(row) for row in rows]))
    hidden = model(torch.tensor([token for row in rows for token in row]), packed.position_ids, packed)
    return list((hidden @ model.head.T / temperature).log_softmax(-1).split([len(row) for row in rows]))


def assert_rescored(model: Llama, samples: Samples, rows: Sequence[list[int]], temperature: float = 1.0) -> None:
    """Recorded log-probs are those of the whole sequence scored from scratch, forced tokens' as well. Only the first token's,
    which was never predicted, is 0, and what lies behind a row's end."""
    for r, (row, table) in enumerate(zip(rows, logps(model, rows, temperature), strict=True)):
        start, length = int(samples.branches.position[r]), int(samples.lengths[r])
        assert len(row) == start + length and row[start:] == samples.tokens[r, :length].tolist()
        for t in range(samples.tokens.shape[1]):
            assert samples.is_action[r, t] <= (0 < t < length)
            if 0 < t < length:
                assert abs(samples.logprobs[r, t] - table[start + t - 1, row[start + t]]) < 1e-5
            else:
                assert samples.logprobs[r, t] == 0


def checksum(*parts) -> list:
    return [(x.clone(), x._version) for part in parts for x in (part.keys, part.values, part.positions)]


def unchanged(before: list, *parts) -> bool:
    now = [x for part in parts for x in (part.keys, part.values, part.positions)]
    return all(torch.equal(copy, x) and version == x._version for (copy, version), x in zip(before, now, strict=True))


# --- Cached equals uncached ---


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_recorded_logprobs_are_those_of_the_scored_distribution(model, temperature):
    """Ragged prompts, several branches each: sampling with a cache records what a packed forward pass scores."""
    prompts = random_rows(PROMPT_LENGTHS)
    owner = [i for i in range(len(prompts)) for _ in range(4)]
    contexts = [prompts[i] for i in owner]
    samples = fork(model, prefill(model, prompts), owner, contexts, Sampling(20, (5, 6, 7), temperature))
    assert_rescored(model, samples, whole(samples, contexts), temperature)
    assert samples.generated > 100 and len(set(map(tuple, samples.rows()))) > 15


def test_greedy_is_the_argmax_of_rescoring(model):
    """Temperature 0 takes the likeliest token of the whole context at each step."""
    prompts = random_rows(PROMPT_LENGTHS)
    samples = fork(model, prefill(model, prompts), range(5), prompts, Sampling(15, (5,), 0.0))
    for row, table, prompt in zip(whole(samples, prompts), logps(model, whole(samples, prompts)), prompts, strict=True):
        assert row[len(prompt) :] == table.argmax(-1)[len(prompt) - 1 : -1].tolist()
    assert_rescored(model, samples, whole(samples, prompts))


def test_a_row_of_a_ragged_batch_is_the_row_alone(model):
    """Neither other prompts nor their lengths change what a row says."""
    prompts = random_rows(PROMPT_LENGTHS)
    sampling = Sampling(15, (5,), 0.0)
    together = fork(model, prefill(model, prompts), range(5), prompts, sampling)
    for r, prompt in enumerate(prompts):
        alone = fork(model, prefill(model, [prompt]), [0], [prompt], sampling)
        assert alone.rows()[0] == together.rows()[r]


def test_the_order_of_prompts_and_branches_does_not_matter(model):
    """Shuffled segments and interleaved branches give the same greedy rows."""
    prompts = random_rows(PROMPT_LENGTHS)
    owner, order = [2, 0, 2, 4, 1, 3, 0, 2], [3, 1, 4, 0, 2]
    sampling = Sampling(10, (5,), 0.0)
    a = fork(model, prefill(model, prompts), owner, [prompts[i] for i in owner], sampling)
    b = fork(model, prefill(model, [prompts[i] for i in order]), [order.index(i) for i in owner],
             [prompts[i] for i in owner], sampling)
    assert a.rows() == b.rows()


def test_prefill_keeps_each_token_once(model):
    """Positions 0 … n-1 of each prompt, EMPTY behind them."""
    segments = prefill(model, random_rows((3, 1, 20)))
    assert segments.positions.tolist() == [[*range(n), *[EMPTY] * (20 - n)] for n in (3, 1, 20)]
    assert segments.keys.shape == segments.values.shape == (2, 3, 2, 20, 8)


@pytest.mark.parametrize("max_tokens", [1, 8, 13, 28])
def test_prefill_in_parts(model, max_tokens):
    """However many forward passes the prompts are shared out to: the same cache."""
    prompts = random_rows(PROMPT_LENGTHS)
    parts, whole = prefill(model, prompts, max_tokens), prefill(model, prompts)
    assert torch.equal(parts.positions, whole.positions)
    for mine, exact in ((parts.keys, whole.keys), (parts.values, whole.values)):
        torch.testing.assert_close(mine, exact, atol=1e-5, rtol=1e-4)


# --- Forks ---


def traces(model: Llama) -> tuple[Samples, list[list[int]]]:
    """45 ragged traces in 20 slots, of which most stop early: slots have been refilled and rows moved. Also whole sequences."""
    prompts, owner, contexts = groups(9)
    sampling = Sampling(24, tuple(range(40, 52)), 1.0)
    samples = generate(model, prefill(model, prompts), branches_of(owner, contexts, 1), sampling, max_rows=20)
    assert samples.stopped.any() and not samples.stopped.all()
    return samples, whole(samples, contexts)


def cuts(samples: Samples, rows: list[list[int]]) -> tuple[list[int], list[int]]:
    """(row, position) of every third place of every trace up to where its cache ends: after its last fed token."""
    places = [(r, p) for r, row in enumerate(rows) for p in range(1 + r % 3, len(row) + 1 - int(samples.stopped[r]), 3)]
    return [r for r, _ in places], [p for _, p in places]


@pytest.mark.parametrize("forced", [[], [9], [9, 10, 11]], ids=["nothing forced", "one forced", "three forced"])
def test_a_fork_equals_flat_scoring(model, forced):
    """Branches at many positions of many traces score as from scratch, and do not touch what they branch from."""
    samples, rows = traces(model)
    parent = samples.segments()
    row, position = cuts(samples, rows)
    contexts = [rows[r][:p] for r, p in zip(row, position, strict=True)]
    before = checksum(parent)
    children = fork(model, parent, row, contexts, Sampling(6, (5,), 1.0), seed=2, forced=[forced] * len(row))
    sequences = whole(children, contexts)
    for sequence, context in zip(sequences, contexts, strict=True):
        assert sequence[: len(context) + len(forced)] == context + forced
    assert_rescored(model, children, sequences)
    assert unchanged(before, parent)


def test_branches_of_branches_of_branches(model):
    """segments() of branches are segments again: a third and a fourth generation score as from scratch."""
    samples, rows = traces(model)
    for depth in range(3):
        row, position = (x[depth::5] for x in cuts(samples, rows))
        contexts = [rows[r][:p] for r, p in zip(row, position, strict=True)]
        forced = [[9, 10, 11][: i % 4] for i in range(len(row))]  # ragged
        parent = samples.segments()
        before = checksum(parent)
        samples = fork(model, parent, row, contexts, Sampling(8, tuple(range(40, 52)), 1.0), seed=depth, forced=forced)
        rows = whole(samples, contexts)
        assert_rescored(model, samples, rows)
        assert unchanged(before, parent)


def test_segments_hold_each_context_exactly(model):
    """Keys and values of a row's segment, in order of position, are those of a prefill of its whole sequence."""
    samples, rows = traces(model)
    segments, fresh = samples.segments(), prefill(model, rows)
    for r, row in enumerate(rows):
        known = len(row) - int(samples.stopped[r])  # a stop token is never fed
        filled = (segments.positions[r] < EMPTY).nonzero().squeeze(1)
        assert segments.positions[r][filled].tolist() == list(range(known))
        for mine, exact in ((segments.keys, fresh.keys), (segments.values, fresh.values)):
            torch.testing.assert_close(mine[:, r, :, filled], exact[:, r, :, :known], atol=1e-5, rtol=1e-4)


# --- Forced tokens, stopping, lengths ---


def test_forced_tokens_are_never_actions(model):
    """Ragged forced tokens: not counted as generated, and each row still draws its full share."""
    prompts = random_rows(PROMPT_LENGTHS)
    forced = [[9], [9, 10, 11, 12], [9, 10], [9, 10, 11], [12]]
    samples = fork(model, prefill(model, prompts), range(5), prompts, Sampling(7, ()), forced=forced)
    assert samples.generated == 5 * 7 == int(samples.is_action.sum())
    for r, given in enumerate(forced):
        assert samples.rows()[r][: len(given)] == given
        assert samples.is_action[r].tolist() == [len(given) <= t < len(given) + 7 for t in range(samples.tokens.shape[1])]
        assert samples.lengths[r] == len(given) + 7 and not samples.stopped[r]
        assert (samples.logprobs[r][samples.is_action[r]] < 0).all()
    assert_rescored(model, samples, whole(samples, prompts))


def test_a_forced_stop_token_does_not_stop(model):
    """Only what the policy says ends a row."""
    prompts = random_rows((4, 6))
    samples = fork(model, prefill(model, prompts), range(2), prompts, Sampling(5, (9,), 0.0), forced=[[9], [3, 9]])
    assert (samples.lengths - torch.tensor([1, 2]) >= 1).all()
    for row, given in zip(samples.rows(), ([9], [3, 9]), strict=True):
        assert row[: len(given)] == given and 9 not in row[len(given) : -1]


@pytest.mark.parametrize("stop_ids", [(0,), (0, 30, 31, 32), tuple(range(20, 60))], ids=len)
def test_finish_reasons(model, stop_ids):
    """stopped: the last token, and no other action, is a stop id; not stopped: exactly max_new_tokens actions, none a stop id.

    Id 0 is also what pads the token tensor: the lengths decide what counts, not the value.
    """
    prompts = random_rows(PROMPT_LENGTHS)
    owner = [i % 5 for i in range(60)]
    contexts = [prompts[i] for i in owner]
    samples = fork(model, prefill(model, prompts), owner, contexts, Sampling(15, stop_ids, 1.3), seed=3)
    for r, row in enumerate(samples.rows()):
        actions = row[1:]  # the first token is the context's last
        assert samples.tokens[r, len(row) :].eq(0).all() and not samples.is_action[r, len(row) :].any()
        assert not set(actions[:-1]) & set(stop_ids)
        assert bool(samples.stopped[r]) == (actions[-1] in stop_ids)
        assert samples.stopped[r] or len(actions) == 15
    assert samples.generated == int(samples.lengths.sum()) - 60
    assert samples.stopped.any() and (len(stop_ids) > 10 or not samples.stopped.all())


def test_padding_value_inside_a_row_counts(model):
    """When 0 is an ordinary token that the policy draws, it is an action like any other and is scored."""
    prompts = random_rows(PROMPT_LENGTHS)
    owner = [i % 5 for i in range(40)]
    contexts = [prompts[i] for i in owner]
    samples = fork(model, prefill(model, prompts), owner, contexts, Sampling(20, (0,)), seed=4)
    freely = fork(model, prefill(model, prompts), owner, contexts, Sampling(20, ()), seed=4)
    drawn = [row.index(0) for row in freely.rows() if 0 in row[:-1]]
    assert drawn and all(len(row) == 21 for row in freely.rows())
    assert_rescored(model, freely, whole(freely, contexts))
    for stopped, free in zip(samples.rows(), freely.rows(), strict=True):
        assert stopped == (free[: free.index(0) + 1] if 0 in free else free)


@pytest.mark.parametrize("budget", [0, 1])
def test_smallest_budgets(model, budget):
    """max_new_tokens = 0 only feeds the forced tokens, and 1 draws one; both can be branched from."""
    prompts = random_rows(PROMPT_LENGTHS)
    forced = [[9], [9, 10, 11], [9, 10], [9], [12]]
    samples = fork(model, prefill(model, prompts), range(5), prompts, Sampling(budget, ()), forced=forced)
    assert samples.generated == 5 * budget and samples.lengths.tolist() == [len(row) + budget for row in forced]
    rows = whole(samples, prompts)
    children = fork(model, samples.segments(), range(5), rows, Sampling(4, ()), forced=[[8]] * 5)
    assert_rescored(model, children, whole(children, rows))


def test_too_long_for_the_context_is_an_error(model):
    """One token too many raises with both numbers before anything is computed; exactly full works."""
    prompt = random_rows((56,))
    room = 256 - 56
    with pytest.raises(ValueError, match="the context holds 256 tokens, this needs 257: lower the budget or raise"):
        fork(model, prefill(model, prompt), [0], prompt, Sampling(room + 1, ()))
    assert len(whole(fork(model, prefill(model, prompt), [0], prompt, Sampling(room, ())), prompt)[0]) == 256


@pytest.mark.parametrize("budgets", [(3, 0, 8, 1, 5), (6, 6, 6, 6, 6)])
def test_every_row_may_have_its_own_budget(model, budgets):
    """A row with budget b says the first b tokens of what it says with the largest one."""
    prompts, owner, contexts = groups(1)
    prefix, branches = prefill(model, prompts), branches_of(owner, contexts)
    free = generate(model, prefix, branches, Sampling(max(budgets), ()))
    samples = generate(model, prefix, branches, Sampling(torch.tensor(budgets), ()))
    assert samples.rows() == [row[: 1 + b] for row, b in zip(free.rows(), budgets, strict=True)]
    assert samples.generated == sum(budgets) and not samples.stopped.any()
    assert_rescored(model, samples, whole(samples, contexts))


def test_stop_sequences(model):
    """A row ends where one of the sequences is complete for the first time; its beginnings and its parts do not end it."""
    prompts, owner, contexts = groups(8)
    prefix, branches = prefill(model, prompts), branches_of(owner, contexts)
    free = generate(model, prefix, branches, Sampling(20, ())).rows()
    stops = (tuple(free[0][3:6]), tuple(free[1][2:4]), free[2][9], tuple(free[3][1:2]), (999,))
    samples = generate(model, prefix, branches, Sampling(20, stops))

    def end(row: list[int]) -> int | None:
        """Where the first stop ends; row[0] was given."""
        sequences = [list(stop) if isinstance(stop, tuple) else [stop] for stop in stops]
        ends = (t for t in range(2, len(row) + 1) if any(row[max(t - len(s), 1) : t] == s for s in sequences))
        return next(ends, None)

    assert samples.rows() == [row[: end(row)] for row in free]
    assert samples.stopped.tolist() == [end(row) is not None for row in free]
    assert samples.stopped.any() and not samples.stopped.all() and len(samples.rows()[0]) <= 6


def test_a_stop_sequence_has_to_be_said_whole(model):
    """Its first token forced and its second drawn: that is not what the policy said."""
    prompts, owner, contexts = groups(1)
    prefix, one = prefill(model, prompts), Sampling(6, (), 0.0)
    free = fork(model, prefix, owner, contexts, one, forced=[[9]] * 5)
    stops = tuple((9, row[1]) for row in free.rows())
    assert fork(model, prefix, owner, contexts, replace(one, stop=stops), forced=[[9]] * 5).rows() == free.rows()


def test_rows_that_were_not_kept_cannot_be_branched(model):
    prompts, owner, contexts = groups(1)
    samples = generate(model, prefill(model, prompts), branches_of(owner, contexts), Sampling(3, ()), keep=False)
    with pytest.raises(ValueError, match="can't be branched: .* keep=False"):
        samples.segments()


def test_what_does_not_fit_is_an_error_that_names_the_fix(model, monkeypatch):
    """One row, what is kept and a copy of the prefixes have to fit; otherwise as many rows as fit are sampled at a time."""
    prompts, owner, contexts = groups(4)
    prefix, branches = prefill(model, prompts), branches_of(owner, contexts)
    T, token = 1 + 9, 2 * 2 * 2 * 8 * 4  # tokens of a suffix; bytes of its keys and values: 2 layers, 2 heads, 8 wide, fp32
    row = T * token + 3 * 4 * model.config.vocab_size  # with three numbers for each token that may be next
    exact = generate(model, prefix, branches, Sampling(9, ())).rows()
    copied = len(prompts) * 16
    monkeypatch.setattr(sampler, "cache_room", lambda device: (copied + 20 * (16 + T)) * token + 3 * row)
    assert sampler.fitting_rows(model, prefix, 20, T, True) == 3 and sampler.fitting_rows(model, prefix, 20, T, False) == 20
    assert generate(model, prefix, branches, Sampling(9, ())).rows() == exact
    monkeypatch.setattr(sampler, "cache_room", lambda device: (copied + 20 * (16 + T)) * token + row - 1)
    with pytest.raises(ValueError, match="there is room for .* GB: sample fewer rows at a time or lower the budget"):
        generate(model, prefix, branches, Sampling(9, ()))
    monkeypatch.setattr(sampler, "cache_room", lambda device: len(prompts) * 16 * token)
    prefill(model, prompts)
    monkeypatch.setattr(sampler, "cache_room", lambda device: len(prompts) * 16 * token - 1)
    with pytest.raises(ValueError, match="caching 5 prompts of up to 16 tokens takes .* GB: give fewer or shorter prompts"):
        prefill(model, prompts)


def test_prefixes_are_read_where_they_are_until_half_are_of_no_use(model):
    """Six prompts, two rows each: a copy of three of them is made when the rows of the others have finished, and not before."""
    prefix = prefill(model, [[i, 1, 2, 3] for i in range(6)])
    branches = Branches.of([r // 2 for r in range(12)], [4] * 12, [[5]] * 12, "cpu")
    slots = sampler.Slots(model, prefix, branches, 4, 12, keep=False)
    rows, where = sampler.Rows.of(branches, Sampling(3, ())), lambda: slots.shared_keys.untyped_storage().data_ptr()
    own, left = prefix.keys.untyped_storage().data_ptr(), []
    for i in range(5):
        rows.done[2 * i : 2 * i + 2] = True
        assert slots.turn_over(rows) and (where() == own) == (i < 2)
        left.append(slots.shared_keys.shape[1])
    assert left == [6, 6, 3, 3, 1]


def test_a_row_that_waits_gets_the_first_slot_that_is_free(model):
    """Of 24: one that has finished is replaced. When nobody waits, slots are closed once an eighth of them is idle."""
    prefix = prefill(model, [[1, 2, 3, 4]])
    branches = Branches.of([0] * 26, [4] * 26, [[5]] * 26, "cpu")
    slots, rows = sampler.Slots(model, prefix, branches, 4, 24, keep=False), sampler.Rows.of(branches, Sampling(3, ()))
    turned = []
    for r in range(5):
        rows.done[r] = True
        turned.append((slots.turn_over(rows), len(slots.row), len(slots.waiting)))
    assert turned == [(True, 24, 1), (True, 24, 0), (False, 24, 0), (False, 24, 0), (True, 21, 0)]
    assert sorted(slots.row.tolist()) == list(range(5, 26))


def test_what_would_be_sampled_wrongly_is_refused(model):
    """A branch behind what is cached, as after the token that ended a row; nothing to begin with; less than no budget."""
    prompts, owner, contexts = groups(1)
    prefix, branches = prefill(model, prompts), branches_of(owner, contexts)
    ended = generate(model, prefix, branches, Sampling(3, tuple(range(model.config.vocab_size))))  # whatever is said, it ends
    last = ended.branches.position + ended.lengths  # behind the token that ended each row
    after = lambda back: replace(branches, segment=torch.arange(len(last)), position=last - back)
    generate(model, ended.segments(), after(1), Sampling(1, ()))
    with pytest.raises(ValueError, match="begins behind what its segment holds: .* give it again"):
        generate(model, ended.segments(), after(0), Sampling(1, ()))
    for sampling in (Sampling(-1, ()), Sampling(torch.arange(len(last)) - 1, ()), Sampling(1, (3, ()))):
        with pytest.raises(ValueError, match="max_new_tokens must be at least 0, and a stop sequence must have a token"):
            generate(model, prefix, branches, sampling)
    with pytest.raises(ValueError, match="a branch needs a forced token to begin with"):
        Branches.of([0, 0], [3, 3], [[7], []], "cpu")
    for nothing in ([], [[1, 2], []]):
        with pytest.raises(ValueError, match="prefill needs at least one prompt, and a token in each"):
            prefill(model, nothing)


def test_a_cpu_reads_all_of_its_suffixes(model):
    """They grow as far as they are read, in steps of 16, and shrink again; what they hold stays."""
    prompts, owner, contexts = groups(1)
    slots = sampler.Slots(model, prefill(model, prompts), branches_of(owner, contexts), 40, 60, keep=False)
    sizes, n = [], len(owner)
    for step in range(40):
        slots.reserve(1)
        slots.keys[:, :, :, step], slots.values[:, :, :, step] = step, -step
        assert slots.read == slots.keys.shape[3] == slots.values.shape[3]
        sizes.append(slots.read)
    assert sizes == [16] * 16 + [32] * 16 + [48] * 8
    slots.longest = 20
    assert slots.reserve(1) and slots.keys.shape[:4] == (2, n, 2, 32)
    assert (slots.keys[0, 0, 0, :, 0] == torch.arange(32)).all() and (slots.values[1, -1, 1, :, 7] == -torch.arange(32)).all()


def test_caches_may_take_four_fifths_of_what_is_free(monkeypatch):
    """On a GPU that is the driver's free memory and what PyTorch holds unused; on a CPU what Linux calls available."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 10_000))
    assert sampler.cache_room(torch.device("cuda")) == 400
    monkeypatch.setattr(sampler, "available_memory", lambda: 1000)
    assert sampler.cache_room(torch.device("cpu")) == 800


def test_available_memory(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:    7000 kB\n")
    assert sampler.available_memory(meminfo, tmp_path) == 7000 * 1024
    assert sampler.available_memory(tmp_path / "none", tmp_path) == 8 * 2**30  # another operating system
    for name, text in (("max", "5000000\n"), ("current", "4000000\n"), ("stat", "file 900\ninactive_file 300\nslab 5\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert sampler.available_memory(meminfo, tmp_path) == 1000300  # a container's
    (tmp_path / "memory.max").write_text("max\n")
    assert sampler.available_memory(meminfo, tmp_path) == 7000 * 1024
    assert sampler.available_memory() > 2**26  # this machine's


# --- Randomness ---


def splitmix(x: int) -> int:
    """The published mixer, in whole numbers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
def test_random_numbers_are_a_hash_of_seed_and_step(seed):
    """Bit for bit what whole numbers give."""
    numbers = random_numbers(torch.tensor([seed]), torch.arange(50))
    expected = [splitmix(splitmix(seed % 2**64) + step * 0x9E3779B97F4A7C15) >> 40 for step in range(50)]
    assert numbers.dtype == torch.float32 and (numbers.double() * 2**24).tolist() == expected


SEEDS = {"consecutive": torch.arange(512), "random": torch.randint(2**63 - 1, (512,), generator=generator(3)),
         "one bit": (1 << torch.arange(512) % 63) + torch.arange(512) // 63}


@pytest.mark.parametrize("seeds", SEEDS)
def test_random_numbers_are_uniform_and_independent(seeds):
    """Every bit is fair, numbers fall evenly, and so do pairs of neighbours in steps and in seeds: 5 standard deviations."""
    numbers = random_numbers(SEEDS[seeds][:, None], torch.arange(256))  # (512,256)
    bits = (numbers.double() * 2**24).long()[..., None] >> torch.arange(24) & 1
    n = numbers.numel()
    assert ((bits.double().mean((0, 1)) - 0.5).abs() < 5 * 0.5 / n**0.5).all() and 0 <= numbers.min() <= numbers.max() < 1

    def chi_square_is_fine(cell: Tensor, cells: int) -> bool:
        expected = cell.numel() / cells
        chi_square = ((cell.flatten().bincount(minlength=cells) - expected) ** 2 / expected).sum()
        return abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5

    assert chi_square_is_fine((numbers * 1024).long(), 1024)
    cell = (numbers * 16).long()
    assert chi_square_is_fine(cell[:, :-1] * 16 + cell[:, 1:], 256) and chi_square_is_fine(cell[:-1] * 16 + cell[1:], 256)


def test_the_same_seed_gives_the_same_samples(model):
    """Bit for bit; another seed gives others; the global generator is not touched."""
    prompts = random_rows(PROMPT_LENGTHS)
    state = torch.get_rng_state()
    a, b, c = (fork(model, prefill(model, prompts), range(5), prompts, Sampling(12, (5,)), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs) and not torch.equal(a.tokens, c.tokens)


def test_a_row_depends_on_its_seed_alone(model):
    """Any subset in any order, row by row or in parts, from fewer segments: each row says what it says among all 60, with
    log-probs that differ by the rounding of matrix products of another size, and no more."""
    prompts, owner, contexts = groups(12)
    prefix, branches, sampling = prefill(model, prompts), branches_of(owner, contexts, 5), Sampling(12, tuple(range(30, 40)))
    together = generate(model, prefix, branches, sampling)
    rows = together.rows()
    assert len(set(map(tuple, rows))) > 50 and len(set(map(len, rows))) > 5
    order = torch.randperm(60, generator=generator()).tolist()
    for part in (order, order[:7], order[7:24], *([r] for r in order[:5])):
        alone = generate(model, prefix, take(branches, part), sampling)
        assert alone.rows() == [rows[r] for r in part]
        torch.testing.assert_close(alone.logprobs, together.logprobs[part, : alone.logprobs.shape[1]], atol=1e-5, rtol=0)
    again = [r for r in range(60) if owner[r] == 2]
    alone = replace(take(branches, again), segment=torch.zeros(12, dtype=torch.int64))
    assert generate(model, prefill(model, [prompts[2]]), alone, sampling).rows() == [rows[r] for r in again]


@pytest.mark.parametrize("max_rows, stop", [(1, tuple(range(20, 100))), (3, tuple(range(30, 40))), (16, ()), (16, (5, 6)),
                                            (59, tuple(range(20, 100)))])
def test_refilled_slots_change_nothing(model, max_rows, stop, monkeypatch):
    """Rows that wait for a slot say, score and cache what they do when all start at once, however often the loop looks."""
    prompts, owner, contexts = groups(12)
    prefix, branches = prefill(model, prompts), branches_of(owner, contexts, 6)
    sampling = Sampling(torch.arange(60) % 13, stop)
    together = generate(model, prefix, branches, sampling)
    monkeypatch.setitem(sampler.CHECK_EVERY, "cpu", 1 + max_rows % 5)
    refilled = generate(model, prefix, branches, sampling, max_rows=max_rows)
    for name in ("tokens", "is_action", "lengths", "stopped"):
        assert torch.equal(getattr(refilled, name), getattr(together, name))
    torch.testing.assert_close(refilled.logprobs, together.logprobs, atol=1e-5, rtol=0)
    a, b = refilled.segments(), together.segments()
    assert torch.equal(a.positions, b.positions)
    for mine, exact in ((a.keys, b.keys), (a.values, b.values)):
        hidden = (a.positions == EMPTY)[None, :, None, :, None]
        torch.testing.assert_close(mine.masked_fill(hidden, 0), exact.masked_fill(hidden, 0), atol=1e-5, rtol=1e-4)


class Tape(TorchDispatchMode):
    """A CUDA graph for a CPU: the calls of a step, made again on the same memory, whatever the host has in mind by then. What
    makes the host wait for a result, or copies a number of its own to the device, fails as it does under capture."""

    WAITS = ("_local_scalar_dense", "nonzero", "unique", "equal", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function.name().startswith("aten::index") and any(x.dtype == torch.bool for x in tree_leaves(args[1:2])
                                                                  if isinstance(x, Tensor))
        assert not masks and not any(name in function.name() for name in self.WAITS), f"{function} makes the host wait"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, tree_leaves(out)))
        return out

    def replay(self) -> None:
        for function, args, kwargs, outs in self.calls:
            for out, new in zip(outs, tree_leaves(function(*args, **kwargs)), strict=True):
                if out.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    out.copy_(new)  # the others are views, or were written in place


class Taped(Recording):
    """A recording on a CPU, its own graph."""

    def __init__(self, step):
        super().__init__(step, pool="a CPU's")
        self.captures = self.replays = 0

    def capture(self) -> "Taped":
        with Tape() as self.tape:
            self.step()
        self.captures, self.done = self.captures + 1, True
        return self

    def replay(self) -> None:
        if not self.done:  # a tape has run when it is recorded, a graph hasn't
            self.tape.replay()
            self.replays += 1
        self.done = False


@pytest.mark.parametrize("max_rows, budgets, read_by", [(16, range(13), 512), (60, [40], 16), (59, range(6), 1)], ids=str)
def test_a_recorded_step_is_the_step(model, max_rows, budgets, read_by, monkeypatch):
    """Replayed while slots are refilled, moved up and outgrow what attention reads: every row is what it is step by step."""
    prompts, owner, contexts = groups(12)
    prefix, branches = prefill(model, prompts), branches_of(owner, contexts, 6)
    sampling = Sampling(torch.tensor([budgets[r % len(budgets)] for r in range(60)]), (30, 31, 32) if len(budgets) > 1 else ())
    step_by_step = generate(model, prefix, branches, sampling)
    for name, value in (("CHECK_EVERY", 7), ("READ_STEP", read_by)):
        monkeypatch.setitem(getattr(sampler, name), "cpu", value)
    made = []
    monkeypatch.setattr(sampler, "recording", lambda step, device: nullcontext(made.append(Taped(step)) or made[0]))
    recorded = generate(model, prefix, branches, sampling, max_rows=max_rows)
    assert made[0].captures >= 2 and made[0].replays >= 8
    for name in ("tokens", "is_action", "lengths", "stopped"):
        assert torch.equal(getattr(recorded, name), getattr(step_by_step, name))
    torch.testing.assert_close(recorded.logprobs, step_by_step.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_capture_without_room_is_tried_once_more(failures):
    """After what PyTorch caches has been freed; a second failure is the user's to know."""
    said, errors = [], [torch.OutOfMemoryError("full")] * failures

    class Full(Recording):
        def capture(self):
            said.append("capture")
            if errors:
                raise errors.pop()
            return SimpleNamespace(replay=lambda: said.append("replay"))

    step = Full(lambda: said.append("step"), "a pool")
    step()
    with pytest.raises(torch.OutOfMemoryError) if failures == 2 else nullcontext():
        step()
        step()
    assert said == ["step", *["capture"] * min(failures + 1, 2), *["replay"] * 2 * (failures < 2)]
    step.restart()
    step()
    assert said[-1] == "step"


def test_a_graph_stays_until_the_next_is_captured():
    """PyTorch captures nothing in a pool none of whose graphs lives; and of two, the older one is of no more use."""
    alive, seen = weakref.WeakSet(), []

    class Graph:
        replay = lambda self: None

    class Watched(Recording):
        def capture(self):
            seen.append(len(alive))
            alive.add(graph := Graph())
            return graph

    step = Watched(lambda: None, "a pool")
    for _ in range(3):
        step()
        step()
        step.restart()
        step.restart()
    assert seen == [0, 1, 1] and len(alive) == 1
    step.forget()
    assert not alive and step.pool is None


def test_fresh_weights_after_an_optimiser_step(model):
    """Nothing of the weights survives a call."""
    prompts, owner, contexts = groups(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(2):
        samples = fork(model, prefill(model, prompts), owner, contexts, Sampling(8, ()), seed)
        assert_rescored(model, samples, whole(samples, contexts))
        model.head[:, : len(prompts)].square().mean().backward()
        packed = Packed.of(torch.tensor([5]))
        model(torch.arange(5), packed.position_ids, packed).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("stop", [tuple(range(30, 34)), tuple(range(30, 40)), tuple(range(20, 100))],
                         ids=len)
def test_a_row_does_not_depend_on_when_others_finish(model, stop):
    """Rows that leave early are the beginnings of what they say when nobody stops: moving rows in the cache moves no sample."""
    prompts, owner, contexts = groups(10)
    prefix = prefill(model, prompts)
    early = fork(model, prefix, owner, contexts, Sampling(20, stop), seed=5)
    never = fork(model, prefix, owner, contexts, Sampling(20, ()), seed=5)
    assert early.stopped.any() and not never.stopped.any()
    for a, b, la, lb in zip(early.rows(), never.rows(), early.logprobs, never.logprobs, strict=True):
        end = next((t + 1 for t, token in enumerate(b) if t and token in stop), len(b))
        assert a == b[:end]
        torch.testing.assert_close(la[:end], lb[:end], atol=1e-5, rtol=0)


def test_frequencies_of_draw():
    """4·10^5 draws from eight probabilities at temperature 0.7: chi-square within five standard deviations of its mean."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -1.5, -3.0, 3.0])
    n = 400_000
    logp = distribution(logits.expand(n, -1), Sampling(1, (), 0.7))
    ids = draw(logp, random_numbers(torch.arange(n), torch.tensor(7)), Sampling(1, (), 0.7))
    p = (logits.double() / 0.7).softmax(0)
    torch.testing.assert_close(logp[0].double(), p.log(), atol=1e-5, rtol=1e-5)
    chi_square = ((ids.bincount(minlength=8) - n * p) ** 2 / (n * p)).sum()
    assert chi_square < 7 + 5 * (2 * 7) ** 0.5


def test_draw_inverts_the_cumulative_distribution():
    """p = 1/2, 1/4, 1/4: [0, 1/2) gives 0, [1/2, 3/4) gives 1, [3/4, 1) gives 2."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(6, -1)
    ids = draw(logits, torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-24]), Sampling(1, ()))
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]


def test_ids_of_probability_zero_are_never_drawn():
    """Not in 10^5 draws, nor with the smallest and largest uniform number, wherever in the vocabulary they lie."""
    logits = torch.zeros(64)
    forbidden = torch.tensor([0, 1, 17, 40, 62, 63])
    logits[forbidden] = -torch.inf
    uniform = torch.rand(100_000, generator=generator())
    uniform[:3] = torch.tensor([0.0, 1 - 2**-24, 2**-24])
    ids = draw(logits.log_softmax(-1).expand(len(uniform), -1), uniform, Sampling(1, ()))
    assert not torch.isin(ids, forbidden).any() and ids.unique().numel() == 58


TABLE = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.3, 0.05, 0.15, 0.5]])


@pytest.mark.parametrize("top_k, top_p, kept", [
    (0, 1.0, {0.5, 0.3, 0.15, 0.05}), (1, 1.0, {0.5}), (2, 1.0, {0.5, 0.3}), (3, 1.0, {0.5, 0.3, 0.15}),
    (9, 1.0, {0.5, 0.3, 0.15, 0.05}),  # more than there are
    (0, 0.01, {0.5}), (0, 0.4, {0.5}), (0, 0.6, {0.5, 0.3}), (0, 0.79, {0.5, 0.3}), (0, 0.9, {0.5, 0.3, 0.15}),
    (0, 0.99, {0.5, 0.3, 0.15, 0.05}),
    (2, 0.6, {0.5}),  # of the two that are left, 0.5 / 0.8 = 0.625 suffices
    (2, 0.7, {0.5, 0.3}),
])
def test_truncation(top_k, top_p, kept):
    """The likeliest k, then the fewest that hold top_p of what is left; the rest has probability 0, in every row's own order."""
    expected = torch.where(torch.isin(TABLE, torch.tensor(sorted(kept))), TABLE, 0.0)
    logits, before = TABLE.log(), TABLE.log()
    cut = truncate(logits, top_k, top_p)
    torch.testing.assert_close(cut.softmax(-1), expected / expected.sum(1, keepdim=True))
    assert (cut.softmax(-1) == 0).equal(expected == 0) and torch.equal(logits, before)
    uniform = torch.rand(4000, generator=generator())
    sampling = Sampling(1, (), 1.0, top_k, top_p)
    logp = distribution(TABLE[:1].log(), sampling)
    torch.testing.assert_close(logp[0], (expected[0] / expected[0].sum()).log())
    ids = draw(logp.expand(4000, -1), uniform, sampling)
    assert set(TABLE[0, ids.unique()].tolist()) == set(TABLE[0][expected[0] > 0].tolist())


def test_another_token_is_written_instead(model):
    """(a, b): wherever a would be drawn, b is written and fed on; a stop token replaced so does not stop."""
    prompts = random_rows(PROMPT_LENGTHS)
    owner = [i % 5 for i in range(40)]
    contexts, prefix = [prompts[i] for i in owner], prefill(model, prompts)
    plain = Sampling(15, (), 0.0)
    rows = fork(model, prefix, owner[:5], contexts[:5], plain).rows()
    common = max(range(117), key=lambda token: sum(row[1:].count(token) for row in rows))
    replaced = fork(model, prefix, owner[:5], contexts[:5], replace(plain, instead=(common, 3), stop=(common,)))
    changed = 0
    for row, other, context in zip(rows, replaced.rows(), contexts, strict=False):
        first = row[1:].index(common) + 1 if common in row[1:] else len(row)
        assert other[:first] == row[:first] and common not in other[1:] and len(other) == 16
        if first < len(row):
            assert other[first] == 3
            changed += 1
        table = logps(model, [[*context, *other[1:]]])[0].argmax(-1)[len(context) - 1 : -1].tolist()
        assert other[1:] == [3 if token == common else token for token in table]  # what follows, follows from b
    assert changed
    assert not replaced.stopped.any()


def test_a_sum_that_rounding_leaves_below_one_draws_no_id_beyond_the_vocabulary():
    """Of probabilities that sum to .75 the largest uniform number draws the last one, and half of the ids are the first one."""
    logp = torch.tensor([0.375, 0.375]).log().expand(3, -1)
    assert draw(logp, torch.tensor([1 - 2**-24, 0.49, 0.51]), Sampling(1, ())).tolist() == [1, 0, 1]


def test_truncation_is_that_of_the_distribution_at_its_temperature():
    """At temperature 1/2 the likeliest of .5, .3, .2 has 25/38: two thirds need a second token, and .65 doesn't."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = lambda top_p: distribution(logits, Sampling(1, (), 0.5, top_p=top_p)).exp()[0]
    torch.testing.assert_close(kept(0.65), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(kept(0.67), torch.tensor([25 / 34, 9 / 34, 0.0]))


# --- Rollouts ---


class Fingerprint(Countdown):
    """A task whose verdict is a hash of the text, so that a verdict shows which text was judged."""

    def grade(self, problem, response: str) -> float:
        return (zlib.crc32(f"{problem} {response}".encode()) % 997) / 997


@pytest.fixture
def rollouts(model) -> Rollouts:
    """40 traces of a talkative model: it often says `<try>`, and sometimes `</think>` and `</answer>`."""
    task = Fingerprint(RunConfig())
    with torch.no_grad():
        model.lm_head.weight[task.open_episode] *= 2
        model.lm_head.weight[[task.close_thinking, task.close_answer]] *= 1.3
    problems = task.problems("train", 10, 0)
    return roll_out(model, task, problems, 4, Sampling(40, (task.close_answer,), 1.0), generator(3))


def test_roll_out(rollouts):
    """group_size rows per problem, in order: prompt, response, verdict on the response, and the sampler's own record."""
    task = Fingerprint(RunConfig())
    problems = task.problems("train", 10, 0)
    assert rollouts.problems == [problem for problem in problems for _ in range(4)]
    assert rollouts.prompt_id == [i for i in range(10) for _ in range(4)]
    for r, problem in enumerate(rollouts.problems):
        n = rollouts.prompt_length[r]
        assert rollouts.tokens[r][:n] == task.prompt(problem) and rollouts.response(r) == rollouts.tokens[r][n:]
        assert rollouts.tokens[r][n - 1 :] == rollouts.samples.rows()[r]  # the prompt's last token starts the sampling
        assert rollouts.reward[r] == task.grade(problem, task.tokenizer.decode(rollouts.response(r)))


def test_batch_is_the_rollouts_laid_flat(rollouts, model):
    """Row after row; actions are exactly the responses; log-probs are those of scoring from scratch, and 0 on prompts."""
    batch = rollouts.batch()
    assert batch.tokens.tolist() == sum(rollouts.tokens, []) and batch.lengths.tolist() == list(map(len, rollouts.tokens))
    assert batch.prompt_id.tolist() == rollouts.prompt_id and torch.equal(batch.reward, torch.tensor(rollouts.reward))
    assert batch.finished.tolist() == [row[-1] == Fingerprint(RunConfig()).close_answer for row in rollouts.tokens]
    assert batch.finished.any() and not batch.finished.all()
    actions, logprobs = (x.split(batch.lengths.tolist()) for x in (batch.is_action, batch.logprob))
    for r, (row, table) in enumerate(zip(rollouts.tokens, logps(model, rollouts.tokens), strict=True)):
        n = rollouts.prompt_length[r]
        assert actions[r].tolist() == [t >= n for t in range(len(row))]
        scored = table[:-1].gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs[r][n:], scored[n - 1 :], atol=1e-5, rtol=0)
        assert (logprobs[r][:n] == 0).all()
    assert int(batch.is_action.sum()) == rollouts.samples.generated


def test_a_continuation_trains_only_what_it_added(rollouts, model):
    """A trace cut and continued, with or without forced tokens: prompt, kept prefix and forced tokens carry no action."""
    task = Fingerprint(RunConfig())
    cut = [n + (len(row) - n) // 2 for n, row in zip(rollouts.prompt_length, rollouts.tokens, strict=True)]
    contexts = [row[:p] for row, p in zip(rollouts.tokens, cut, strict=True)]
    forced = [task.forced_stop if r % 2 else [] for r in range(40)]
    more = continue_from(model, task, rollouts.problems, rollouts.samples.segments(), range(40), contexts, forced,
                         rollouts.prompt_id, Sampling(9, (task.close_answer,), 1.0), generator(4))
    batch = more.batch()
    actions, logprobs = (x.split(batch.lengths.tolist()) for x in (batch.is_action, batch.logprob))
    for r, (row, table) in enumerate(zip(more.tokens, logps(model, more.tokens), strict=True)):
        begin = cut[r] + len(forced[r])
        assert row[:begin] == contexts[r] + forced[r] and more.prompt_length[r] == rollouts.prompt_length[r]
        assert actions[r].tolist() == [t >= begin for t in range(len(row))]
        scored = table[:-1].gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs[r][begin:], scored[begin - 1 :], atol=1e-5, rtol=0)
        assert (logprobs[r][:begin] == 0).all()
        assert more.reward[r] == task.grade(more.problems[r], task.tokenizer.decode(row[more.prompt_length[r] :]))


def greedy_answers(model: Llama, task: Countdown, contexts: list[list[int]]) -> list[list[int]]:
    """What follows each context greedily, every token from scratch, up to the stop token or the room for an answer."""
    rows = [[*context, *task.forced_stop] for context in contexts]
    for _ in range(task.answer_tokens):
        open_rows = [r for r, row in enumerate(rows) if row[-1] != task.close_answer or len(row) == len(contexts[r]) + 2]
        for r, table in zip(open_rows, logps(model, [rows[r] for r in open_rows]), strict=True):
            rows[r] = [*rows[r], int(table[-1].argmax())]
    return [row[len(context) :] for row, context in zip(rows, contexts, strict=True)]


def test_forced_answers_are_the_greedy_answers_from_scratch(model, rollouts):
    """At every boundary, J is the verdict on what an uncached greedy decoder says after `</think> <answer>`.

    Among the traces are some that said `</answer>` while thinking: a stop token is never cached, so no boundary may lie
    behind it.
    """
    task = Fingerprint(RunConfig())
    places = list(zip(*boundaries(task, rollouts), strict=True))
    stray = [r for r, _ in places if rollouts.samples.stopped[r] and task.close_thinking not in rollouts.tokens[r]]
    assert len(places) > 50 and stray
    contexts = [rollouts.tokens[r][:p] for r, p in places]
    answers = greedy_answers(model, task, contexts)
    assert len(set(map(tuple, answers))) > 1
    forced = force_answers(model, task, rollouts, *zip(*places, strict=True), 1, 0.0, None)
    expected = [task.grade(rollouts.problems[r], task.tokenizer.decode(answer))
                for (r, _), answer in zip(places, answers, strict=True)]
    torch.testing.assert_close(forced.J, torch.tensor(expected), atol=1e-6, rtol=0)
    assert forced.branches == [[pair] for pair in zip(answers, expected, strict=True)]
    asked = {tuple(context): answer for context, answer in zip(contexts, answers, strict=True)}
    assert len(asked) < len(contexts)  # J_0 of a prompt is asked once for all of its rollouts
    assert forced.generated == sum(len(answer) - 2 for answer in asked.values())  # what was drawn counts, not what was forced


def test_rollouts_with_equal_contexts_share_their_forks(model, rollouts):
    """Also sampled answers: J_0 of a prompt is one estimate, not one per rollout."""
    row, position = boundaries(Fingerprint(RunConfig()), rollouts)
    J = force_answers(model, Fingerprint(RunConfig()), rollouts, row, position, 2, 1.0, generator()).J
    first = {}
    for r, p, value in zip(row, position, J.tolist(), strict=True):
        assert first.setdefault(tuple(rollouts.tokens[r][:p]), value) == value
    assert len(first) < len(row)


def test_several_forks_are_averaged_per_boundary(model, rollouts):
    """Forks that are all greedy average to the one greedy answer; the order of the boundaries is kept; tokens add up."""
    task = Fingerprint(RunConfig())
    row, position = (x[:40] for x in boundaries(task, rollouts))
    one = force_answers(model, task, rollouts, row, position, 1, 0.0, None)
    three = force_answers(model, task, rollouts, row, position, 3, 0.0, None)
    torch.testing.assert_close(one.J, three.J, atol=1e-6, rtol=0)
    assert three.generated == 3 * one.generated and len(set(one.J.tolist())) > 10
    sampled = force_answers(model, task, rollouts, row, position, 3, 1.0, generator()).J
    assert sampled.shape == one.J.shape and not torch.equal(sampled, one.J)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_exact_J_is_what_all_right_answers_have_in_probability(model, rollouts, temperature):
    """Without forks J is the sum over them of the product of their tokens' probabilities, everything from scratch; each context
    is asked once, and each of its answers' tokens counted."""
    task, (row, position) = Countdown(RunConfig()), (x[:60] for x in boundaries(Fingerprint(RunConfig()), rollouts))
    contexts, start = [rollouts.tokens[r][:p] for r, p in zip(row, position)], len(task.forced_stop)
    forked = force_answers(model, task, rollouts, row, position, 0, temperature, None)
    weighed = {}
    for r, context, J in zip(row, contexts, forked.J.tolist(), strict=True):
        answers = task.right_answers(rollouts.problems[r])
        tables = logps(model, [[*context, *task.forced_stop, *answer] for answer in answers], temperature)
        each = [table[len(context) + start - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()
                for table, answer in zip(tables, answers, strict=True)]
        assert abs(torch.stack(each).logsumexp(0) - torch.tensor(J, dtype=torch.float64).log()) < 1e-3
        weighed[tuple(context)] = sum(map(len, answers))
    assert len(weighed) < len(contexts) and forked.generated == sum(weighed.values()) and forked.branches == []


class FirstWord(Countdown):
    """A task that a number right behind `<answer>` solves, if it is a small one."""

    def right_answers(self, problem):
        return [[self.tokenizer.id(str(number))] for number in range(1, 60)]

    def grade(self, problem, text: str) -> float:
        return float(text.split()[2] in map(str, range(1, 60)))


def test_the_exact_J_is_the_mean_of_many_sampled_ones(model, rollouts):
    """Within four standard errors of 1000 answers at each of many places."""
    task, (row, position) = FirstWord(RunConfig()), (x[:12] for x in boundaries(Fingerprint(RunConfig()), rollouts))
    exact = force_answers(model, task, rollouts, row, position, 0, 1.0, None).J
    sampled = force_answers(model, task, rollouts, row, position, 1000, 1.0, generator()).J
    off = (sampled - exact) / (exact * (1 - exact) / 1000).sqrt()
    assert off.abs().max() < 4 and exact.max() - exact.min() > 0.2


@pytest.mark.parametrize("forks", [0, 2])
def test_no_boundary_costs_nothing(model, rollouts, forks):
    """No place to ask: no J, no token."""
    nothing = force_answers(model, Fingerprint(RunConfig()), rollouts, [], [], forks, 1.0, generator())
    assert nothing.J.shape == (0,) and nothing.generated == 0


def test_a_problem_without_an_answer_has_a_J_of_0(model, rollouts):
    """The user's own, in sample.py, may have none."""
    task, (row, position) = Countdown(RunConfig()), boundaries(Fingerprint(RunConfig()), rollouts)
    impossible = replace(rollouts, problems=[replace(problem, target=1) for problem in rollouts.problems])
    assert not task.right_answers(impossible.problems[0])
    assert force_answers(model, task, impossible, row, position, 0, 1.0, None).J.tolist() == [0.0] * len(row)


def test_boundaries_enclose_the_episodes(rollouts):
    """Each rollout with an episode contributes b_0 at the end of its prompt and one boundary per episode; others none."""
    task = Fingerprint(RunConfig())
    row, position = boundaries(task, rollouts)
    expected = []
    for r, n in enumerate(rollouts.prompt_length):
        ends = task.episode_ends(rollouts.response(r))
        expected += [(r, n), *((r, n + end) for end in ends)] if ends else []
    assert list(zip(row, position, strict=True)) == expected and len(set(row)) < 40


def test_generate_writes_to_none_of_its_arguments(model):
    """Prefix, branches and weights are only read."""
    prompts = random_rows(PROMPT_LENGTHS)
    branches = Branches.of(range(5), [3, 1, 2, 3, 0], [[9], [9, 8], [7], [7], [1]], "cpu", generator())
    prefix = prefill(model, prompts)
    before, weights = checksum(prefix), [weight.clone() for weight in model.parameters()]
    copies = [x.clone() for x in (branches.segment, branches.position, branches.forced, branches.seed)]
    generate(model, prefix, branches, Sampling(6, (5,)), max_rows=3)
    assert unchanged(before, prefix)
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(map(torch.equal, copies, (branches.segment, branches.position, branches.forced, branches.seed)))
