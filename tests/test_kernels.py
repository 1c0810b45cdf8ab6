"""The reference kernels against loops and closed forms in fp64. The Triton twins must agree with the reference."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kernels
from kernels.reference import attention, branch_attention, rms_norm, rotate, swiglu, token_logprobs

LENGTHS = {
    "one": (1,), "ragged": (1, 17, 127), "descending": (127, 17, 1), "equal": (5, 5, 5), "ones": (1, 1, 1),
    "empty first": (0, 4, 3), "empty inside": (4, 0, 0, 3), "empty last": (4, 3, 0), "only one real": (0, 6, 0),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starts_of(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def checksum(*tensors: Tensor) -> list:
    return [(x.clone(), x._version) for x in tensors]


def unchanged(before: list, *tensors: Tensor) -> bool:
    return all(torch.equal(copy, x) and version == x._version for (copy, version), x in zip(before, tensors, strict=True))


# --- attention ---


def slow_attention(q: Tensor, k: Tensor, v: Tensor, lengths) -> Tensor:
    """softmax(q·k / sqrt(D)) over the tokens of the same sequence up to this one, query by query, in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    (N, H, D), group, rows, start = q.shape, q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        for t in range(start, start + length):
            rows.append(torch.stack([torch.softmax(k[start : t + 1, h // group] @ q[t, h] / math.sqrt(D), 0)
                                     @ v[start : t + 1, h // group] for h in range(H)]))
        start += length
    assert start == N
    return torch.stack(rows)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_attention_is_causal_softmax_in_each_sequence(name, ratio):
    """Output and gradients of q, k, v equal the loop's, for ragged packs with lengths 0, 1, 17, 127 and shared heads."""
    lengths = LENGTHS[name]
    N, K, D = sum(lengths), 2, 8
    q, k, v = randn(N, K * ratio, D), randn(N, K, D, seed=1), randn(N, K, D, seed=2)
    upstream = randn(N, K * ratio, D, seed=3)
    before = checksum(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, starts_of(lengths), max(lengths))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = slow_attention(*exact, lengths)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(out, leaves, upstream),
                            torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=1e-4)
    attention(q, k, v, starts_of(lengths), max(lengths))
    assert unchanged(before, q, k, v)


def test_attention_gradcheck():
    """Numerical derivatives in fp64 agree."""
    q, k, v = (randn(6, heads, 4, seed=heads).double().requires_grad_() for heads in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, starts_of((2, 0, 1, 3)), 3), (q, k, v))


def test_a_larger_max_seqlen_changes_nothing():
    """max_seqlen is a bound, not a length."""
    q, k, v, starts = randn(9, 4, 8), randn(9, 2, 8, seed=1), randn(9, 2, 8, seed=2), starts_of((4, 5))
    torch.testing.assert_close(attention(q, k, v, starts, 5), attention(q, k, v, starts, 64), atol=1e-6, rtol=1e-6)


def test_tokens_behind_the_last_sequence_are_zeros():
    """In the result and in all gradients; the sequences don't notice them."""
    inputs, starts = (randn(9, 4, 8), randn(9, 2, 8, seed=1), randn(9, 2, 8, seed=2)), starts_of((4, 3))
    found = []
    for n in (7, 9):
        leaves = [x[:n].requires_grad_() for x in inputs]
        out = attention(*leaves, starts, 4)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for alone, mine in zip(*found, strict=True):
        assert len(mine) == 9 and torch.equal(mine[:7], alone) and not mine[7:].any()


def test_query_heads_that_cannot_be_shared_out_are_an_error():
    with pytest.raises(ValueError, match="3 query heads can't share 2 key/value heads: H must be a multiple of K"):
        attention(randn(2, 3, 4), randn(2, 2, 4), randn(2, 2, 4), starts_of((2,)), 2)


def test_no_value_crosses_a_sequence_or_the_present():
    """A huge key and value in one token reaches exactly the later tokens of its own sequence."""
    q, k, v, lengths = randn(12, 2, 4), randn(12, 2, 4, seed=1), randn(12, 2, 4, seed=2), (3, 5, 4)
    before = attention(q, k, v, starts_of(lengths), 5)
    k[5], v[5] = 1e4, 1e30  # token 5 is the third of the second sequence, which is 3 … 7
    after = attention(q, k, v, starts_of(lengths), 5)
    same = (before == after).flatten(1).all(1)
    assert same.tolist() == [not 5 <= t <= 7 for t in range(12)]


def test_a_nan_stays_in_its_sequence():
    """Padding is the sequence's own, and not of the next one: 0 times nan is nan."""
    q, k, v = (randn(9, 2, 4, seed=seed).requires_grad_() for seed in (0, 1, 2))
    with torch.no_grad():
        q[3:7], k[3:7], v[3:7] = (torch.nan,) * 3  # the second of (3, 4, 0, 2)
    out = attention(q, k, v, starts_of((3, 4, 0, 2)), 4)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for x in (out, *gradients):
        assert x[:3].isfinite().all() and x[7:].isfinite().all()
    assert out[3:7].isnan().all()


def test_attention_of_no_token():
    """There may be sequences, all of them empty, and max_seqlen is a bound."""
    leaves = [torch.zeros(0, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    assert attention(*leaves, starts_of((0, 0)), 5).shape == (0, 4, 4)


def test_attention_takes_views():
    """q, k and v may be slices of one wider tensor."""
    wide = randn(7, 8, 12)
    q, k, v = wide[:, :4, 2:10], wide[:, 4:6, ::2][..., :6], wide[:, 6:, :6]
    q = q[..., :6]
    assert not any(x.is_contiguous() for x in (q, k, v))
    torch.testing.assert_close(attention(q, k, v, starts_of((3, 4)), 4).double(), slow_attention(q, k, v, (3, 4)),
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", [-120.0, 80.0])
def test_attention_with_extreme_scores(level):
    """Scores around -120 (their log-sum-exp is far below -88.7) or +80, lengths 64 and 1: shifted scores change no softmax."""
    lengths, D = (64, 1, 64), 4
    q, k, v = torch.ones(129, 1, D), randn(129, 1, D), randn(129, 1, D, seed=1)
    shifted = k + level / math.sqrt(D)  # q·k / sqrt(D) moves by exactly `level`
    out = attention(q, shifted, v, starts_of(lengths), 64)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), slow_attention(q, k, v, lengths), atol=2e-4, rtol=2e-4)


# --- branch_attention ---


def branch_case(K: int, ratio: int, suffix: int, seed: int, limits: list[list[int]]):
    """Branches at limits[s] of segment s, in shuffled row order, with 1 … suffix tokens of their own. Entries that no branch may
    see hold huge numbers."""
    S, L, D, M = len(limits), 9, 8, max(map(len, limits))
    R = sum(map(len, limits))
    generator = torch.Generator().manual_seed(seed)
    row = torch.randperm(R, generator=generator).tolist()  # which row the next branch is
    prefix_k, prefix_v = randn(S, K, L, D, seed=seed + 1), randn(S, K, L, D, seed=seed + 2)
    group, place, owner = torch.zeros(S, M, dtype=torch.int64), torch.zeros(R, dtype=torch.int64), {}
    positions, limit = torch.arange(L).expand(S, L), torch.full((S, M), -1)
    for s, branches in enumerate(limits):
        seen_by_any = max(branches, default=0)
        prefix_k[s, :, seen_by_any:], prefix_v[s, :, seen_by_any:] = 1e4, 1e30
        for m, seen in enumerate(branches):
            r = row.pop()
            group[s, m], place[r], owner[r], limit[s, m] = r, s * M + m, (s, seen), seen
    q = randn(R, K * ratio, D, seed=seed + 3)
    own_k, own_v = randn(R, K, suffix + 2, D, seed=seed + 4), randn(R, K, suffix + 2, D, seed=seed + 5)
    length = torch.arange(R) % suffix + 1
    for r, n in enumerate(length.tolist()):
        own_k[r, :, n:], own_v[r, :, n:] = 1e4, 1e30
    return (q, prefix_k, prefix_v, positions, limit, group, place, own_k, own_v, length), owner


def slow_branch_attention(q, prefix_k, prefix_v, own_k, own_v, length, owner) -> Tensor:
    """Plain attention of each row over the keys that it sees, concatenated, in fp64."""
    rows = []
    for r in range(len(q)):
        s, limit = owner[r]
        group = q.shape[1] // prefix_k.shape[1]
        keys, values = (torch.cat([a[s, :, :limit], b[r, :, : length[r]]], dim=1).double().repeat_interleave(group, 0)
                        for a, b in ((prefix_k, own_k), (prefix_v, own_v)))  # (H,limit+t,D)
        scores = (keys @ q[r].double()[:, :, None]).squeeze(-1) / math.sqrt(q.shape[-1])  # (H,limit+t)
        rows.append((scores.softmax(-1)[:, None] @ values).squeeze(1))
    return torch.stack(rows)


LIMITS = {
    "one branch each": [[9], [4], [1]],
    "many branches at many positions": [[9, 1, 5, 5], [2], [7, 3]],
    "nothing visible": [[0, 9, 0], [0], [3, 0]],
    "nothing visible anywhere": [[0, 0], [0]],
    "a single row": [[6]],
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("K, ratio, suffix", [(1, 1, 1), (2, 2, 3), (2, 3, 1), (1, 4, 6)])
def test_branch_attention_is_attention_over_what_a_branch_sees(name, K, ratio, suffix):
    """Shared prefix and own suffix together equal plain attention over the concatenated visible keys; nothing else leaks in."""
    arguments, owner = branch_case(K, ratio, suffix, 0, LIMITS[name])
    q, prefix_k, prefix_v, *_, own_k, own_v, length = arguments
    before = checksum(*arguments)
    out = branch_attention(*arguments)
    expected = slow_branch_attention(q, prefix_k, prefix_v, own_k, own_v, length, owner)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert unchanged(before, *arguments)


def test_unused_places_of_a_group_are_never_read():
    """Places without a branch may name any row and see anything."""
    arguments, owner = branch_case(2, 2, 2, 0, LIMITS["many branches at many positions"])
    q, prefix_k, prefix_v, positions, limit, group, place, own_k, own_v, length = arguments
    used = torch.zeros(group.numel(), dtype=torch.bool)
    used[place] = True
    assert not used.all()
    other_group = torch.where(used.view_as(group), group, len(q) - 1)
    other_limit = torch.where(used.view_as(group), limit, 9)
    out = branch_attention(q, prefix_k, prefix_v, positions, other_limit, other_group, place, own_k, own_v, length)
    assert torch.equal(out, branch_attention(*arguments))


@pytest.mark.parametrize("level", [-120.0, 80.0])
@pytest.mark.parametrize("where", ["prefix", "suffix", "both"])
def test_branch_attention_with_extreme_scores(level, where):
    """Scores near -120 or +80 on one side or on both: the two softmaxes are joined without overflow or underflow."""
    arguments, owner = branch_case(1, 2, 3, 0, [[9, 4], [2]])
    q, prefix_k, prefix_v, *places, own_k, own_v, length = arguments
    q = torch.ones_like(q)
    shift = level / math.sqrt(q.shape[-1])
    prefix_k = prefix_k + shift * (where != "suffix")
    own_k = own_k + shift * (where != "prefix")
    out = branch_attention(q, prefix_k, prefix_v, *places, own_k, own_v, length)
    expected = slow_branch_attention(q, prefix_k, prefix_v, own_k, own_v, length, owner)
    torch.testing.assert_close(out.double(), expected, atol=2e-4, rtol=2e-4)


def test_branch_attention_in_fp16_of_a_row_that_sees_nothing_of_its_prefix():
    """-1e30 would be -inf there, and a softmax of nothing else nan."""
    arguments, _ = branch_case(1, 2, 3, 0, [[9, 0], [2]])
    arguments = [x.clamp(-100, 100) for x in arguments]  # what nobody sees is finite in fp16, too
    half = [x.half() if x.is_floating_point() else x for x in arguments]
    torch.testing.assert_close(branch_attention(*half).float(), branch_attention(*arguments), atol=2e-3, rtol=2e-3)


# --- token_logprobs ---


def slow_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
    """log p(target), entropy and p, row by row, from the definition in fp64."""
    z = hidden.double() @ weight.double().T / temperature
    p = (z - z.amax(1, keepdim=True)).exp()
    p = p / p.sum(1, keepdim=True)
    logp = z - z.amax(1, keepdim=True)
    logp = logp - logp.exp().sum(1, keepdim=True).log()
    return logp[torch.arange(len(z)), targets], -(p * logp).sum(1), p, logp


def logprob_case(N=33, C=16, V=97):
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))
    targets[:2] = torch.tensor([0, V - 1])
    return randn(N, C), randn(V, C, seed=1), targets


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_logprob_and_entropy(temperature):
    """Both equal fp64, log p <= 0, entropy in [0, log V]; the inputs stay as they were."""
    hidden, weight, targets = logprob_case()
    before = checksum(hidden, weight, targets)
    logprob, entropy = token_logprobs(hidden, weight, targets, temperature)
    expected_logprob, expected_entropy, _, _ = slow_logprobs(hidden, weight, targets, temperature)
    assert logprob.dtype == entropy.dtype == torch.float32 and logprob.shape == entropy.shape == targets.shape
    torch.testing.assert_close(logprob.double(), expected_logprob, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=2e-5, rtol=1e-5)
    assert (logprob <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(97)).all()
    assert unchanged(before, hidden, weight, targets)


def test_probabilities_sum_to_one():
    """Summed over all targets, p is 1."""
    hidden, weight, _ = logprob_case()
    logprob, _ = token_logprobs(hidden[:1].expand(97, -1), weight, torch.arange(97), 0.7)
    assert abs(logprob.double().exp().sum() - 1) < 1e-5


@pytest.mark.parametrize("V", [2, 97, 1000])
def test_uniform_logits(V):
    """Equal logits: log p = -log V and entropy = log V, at any temperature."""
    logprob, entropy = token_logprobs(randn(5, 4), torch.full((V, 4), 0.3), torch.arange(5) % V, 0.5)
    torch.testing.assert_close(logprob, torch.full((5,), -math.log(V)))
    torch.testing.assert_close(entropy, torch.full((5,), math.log(V)))


def test_a_certain_token():
    """One logit far above all others: log p = 0, entropy 0 and not NaN; the others' log p is the gap."""
    weight = torch.zeros(6, 1)
    weight[4] = 200.0
    logprob, entropy = token_logprobs(torch.ones(2, 1), weight, torch.tensor([4, 1]), 1.0)
    assert logprob.tolist() == [0.0, -200.0] and entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("level", [-120.0, 80.0])
def test_logits_far_from_zero(level):
    """All logits near -120 (log-sum-exp below -88.7) or near +80: a common shift changes nothing."""
    hidden, weight, targets = logprob_case(C=8)
    hidden, weight = torch.cat([hidden, torch.ones(33, 1)], 1), torch.cat([weight, torch.full((97, 1), level)], 1)
    logprob, entropy = token_logprobs(hidden, weight, targets, 1.0)
    expected = slow_logprobs(hidden[:, :-1], weight[:, :-1], targets, 1.0)
    torch.testing.assert_close(logprob.double(), expected[0], atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], atol=2e-4, rtol=1e-5)


def test_temperature_divides_the_logits():
    """Temperature T on hidden states h is temperature 1 on h / T."""
    hidden, weight, targets = logprob_case()
    for a, b in zip(token_logprobs(hidden, weight, targets, 4.0), token_logprobs(hidden / 4, weight, targets, 1.0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("g, h", [(1, 1), (1, 0), (0, 1), (0, 0)], ids=["both", "only log p", "only entropy", "neither"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradient_of_logprob_and_entropy(g, h, temperature):
    """dz_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy), through z = hidden @ weight.T / T, for random g and h."""
    hidden, weight, targets = logprob_case()
    g, h = g * randn(33, seed=5), h * randn(33, seed=6)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    mine = torch.autograd.grad(token_logprobs(*leaves, targets, temperature), leaves, (g, h))
    _, entropy, p, logp = slow_logprobs(hidden, weight, targets, temperature)
    onehot = torch.nn.functional.one_hot(targets, 97)
    dz = g.double()[:, None] * (onehot - p) - h.double()[:, None] * p * (logp + entropy[:, None])
    assert dz.sum(1).abs().max() < 1e-12
    torch.testing.assert_close(mine[0].double(), dz @ weight.double() / temperature, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(mine[1].double(), dz.T @ hidden.double() / temperature, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("target", [-1, 97])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    """Not a silent wrong number."""
    hidden, weight, targets = logprob_case()
    targets[3] = target
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        token_logprobs(hidden, weight, targets, 1.0)


# --- rms_norm, rotate, swiglu ---


def test_rms_norm_is_a_row_over_its_root_mean_square():
    """Number by number, in the type asked for; the inputs stay as they were."""
    x, weight = randn(3, 2, 7), randn(7, seed=1)
    before = checksum(x, weight)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        y = rms_norm(x, weight, 0.1, dtype)
        assert y.dtype == dtype
        for i, row in enumerate(x.view(6, 7).tolist()):
            root = math.sqrt(sum(number**2 for number in row) / 7 + 0.1)
            expected = torch.tensor([number / root * w for number, w in zip(row, weight.tolist())])
            torch.testing.assert_close(y.view(6, 7)[i].float(), expected, atol=tolerance, rtol=tolerance)
    assert unchanged(before, x, weight)


def test_rotation_turns_pairs():
    """A pair as a complex number, times e^(i angle)."""
    x, angle = randn(5, 3, 8), randn(5, 1, 4, seed=1)
    y = rotate(x, torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1))
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(torch.complex(*y.chunk(2, -1)), turned)


def test_swiglu_is_a_gate_times_its_sigmoid_times_the_input():
    gate, up = randn(4, 6) * 5, randn(4, 6, seed=1)
    for y, a, b in zip(swiglu(gate, up).flatten().tolist(), gate.flatten().tolist(), up.flatten().tolist(), strict=True):
        assert y == pytest.approx(a / (1 + math.exp(-a)) * b, rel=1e-5)


# --- Without Triton ---


def test_without_triton_a_cpu_computes_and_a_cuda_tensor_is_an_error():
    """Not the slow reference, silently. In a process of its own, where Triton can't be imported."""
    code = """import sys
sys.modules["triton"] = None
import torch, kernels
q = torch.ones(2, 1, 4)
assert torch.equal(kernels.attention(q, q, q, torch.tensor([0, 2]), 2), q)
for fused in (getattr(kernels, f"fused_{name}") for name in kernels.__all__ if name != "logits"):
    try:
        fused(q)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["on a CUDA device the kernels need Triton: pip install 'triton>=3.6'"] * 6


# --- which of the two is called ---


@pytest.mark.parametrize("name", [name for name in kernels.__all__ if name != "logits"])  # a library's product on both
def test_the_device_chooses(name, monkeypatch):
    """A tensor of a GPU goes to the Triton kernel, any other one to the reference, and every argument with it."""
    monkeypatch.setattr(kernels, f"fused_{name}", lambda *arguments: ("fused", *arguments))
    monkeypatch.setattr(kernels.reference, name, lambda *arguments: ("reference", *arguments))
    function = getattr(kernels, name)
    others = range(function.__code__.co_argcount - 1)
    for chosen, on_a_gpu in (("fused", True), ("reference", False)):
        x = SimpleNamespace(is_cuda=on_a_gpu)
        assert function(x, *others) == (chosen, x, *others)
