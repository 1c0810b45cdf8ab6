"""The real kernels under Triton's interpreter, against float64: TRITON_INTERPRET=1 python -m pytest tests/interpreted.py

In fp32 and fp16: the interpreter is silently wrong in bf16. `tests/test_triton.py` runs this file in a process of its own.
"""

import importlib
import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
import train
from kernels import bench, hardware, reference
from kernels import profile as step_profile
from kernels.attention import attention, attention_backward, attention_forward
from kernels.decode import branch_attention
from kernels.elementwise import rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward, turn
from kernels.logprob import logprobs_backward, logprobs_forward, token_logprobs, token_loss
from nanomrt.config import load_config
from nanomrt.model import Llama
from nanomrt.mrt import Batch
from nanomrt.run import Run
from nanomrt.sampler import Branches, Sampling, generate, prefill

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: what a kernel leaves unwritten shows
HALF, FULL = torch.float16, torch.float32
TOLERANCE = {FULL: 2e-5, HALF: 4e-3}  # of the largest element: sums of fp32 products; operands, p and results rounded to 2^-11
IN_HALF = pytest.mark.parametrize("dtype", ["fp16", "fp16, sm_90"], indirect=True)


@pytest.fixture(params=["fp32", "fp16", "fp16, sm_90"])
def dtype(request, monkeypatch) -> torch.dtype:
    """Of the operands, with the tiles for them; those of sm_90 are larger and come by tensor descriptors."""
    if request.param == "fp16, sm_90":
        monkeypatch.setattr(hardware, "generation", lambda device: "hopper")
    return FULL if request.param == "fp32" else HALF


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = FULL) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(mine: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert mine.shape == exact.shape and mine.isfinite().all()
    scale = exact.abs().max().clamp(min=0.05) if exact.numel() else 1.0
    torch.testing.assert_close(mine.double(), exact.double(), rtol=0, atol=float(TOLERANCE[dtype] * scale))


# --- attention ---


def pack(lengths, H: int, K: int, D: int, dtype: torch.dtype = FULL, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v of a pack, its cu_seqlens and an upstream gradient."""
    N = sum(lengths)
    inputs = [randn(N, heads, D, seed=seed + i, dtype=dtype) for i, heads in enumerate((H, K, K))]
    return inputs, torch.tensor([0, *lengths]).cumsum(0), randn(N, H, D, seed=seed + 3, dtype=dtype)


def forward_and_gradients(function, inputs, starts, longest: int, upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, starts, longest)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("lengths, H, K, D", [
    ((1, 17, 127), 1, 1, 16), ((129, 0, 1), 3, 1, 32), ((200,), 1, 1, 32), ((0, 64, 200, 0), 2, 1, 64), ((5, 20), 6, 1, 16),
    ((33,), 7, 1, 32), ((40, 3), 2, 1, 80), ((17, 20), 2, 2, 96), ((170,), 2, 1, 128), ((150,), 1, 1, 256), ((1, 1, 1), 2, 2, 16),
    ((200,), 2, 1, 8), ((33, 6), 4, 1, 16),
], ids=str)
def test_attention_and_its_gradients(lengths, H, K, D, dtype):
    """Output, dQ, dK and dV equal the reference in float64, for ragged packs, shared heads and any head dim."""
    inputs, starts, upstream = pack(lengths, H, K, D, dtype)
    mine = forward_and_gradients(attention, inputs, starts, max(lengths), upstream)
    exact = forward_and_gradients(reference.attention, [x.double() for x in inputs], starts, max(lengths), upstream.double())
    for a, b in zip(mine, exact, strict=True):
        assert_near(a, b, dtype)


@pytest.mark.parametrize("D, T", [(16, 200), (128, 100)])
def test_attention_with_the_tiles_of_sm_100(D, T, monkeypatch):
    """Those of dK and dV that sm_90 doesn't share, on the diagonal, below it and cut off by the end."""
    monkeypatch.setattr(hardware, "generation", lambda device: "blackwell")
    inputs, starts, upstream = pack((T,), 1, 1, D, HALF)
    mine = forward_and_gradients(attention, inputs, starts, T, upstream)
    exact = forward_and_gradients(reference.attention, [x.double() for x in inputs], starts, T, upstream.double())
    for a, b in zip(mine, exact, strict=True):
        assert_near(a, b, HALF)


@pytest.mark.parametrize("lengths, N", [((20, 0, 5), 100), ((0,), 5), ((70,), 400), ((200, 3), 700)], ids=str)
def test_tokens_behind_the_last_sequence_are_zeros(lengths, N, dtype):
    """In the result and in all gradients, even if they are poisoned; the sequences have the bits that they have without. One
    program per head clears them or, where the longest sequence needs several, these in turn."""
    inputs, starts, upstream = pack(lengths, 2, 1, 16, dtype)
    tail = lambda x: torch.cat([x, x.new_full((N - len(x), *x.shape[1:]), torch.nan)])
    mine = forward_and_gradients(attention, [tail(x) for x in inputs], starts, max(lengths), tail(upstream))
    for a, b in zip(mine, forward_and_gradients(attention, inputs, starts, max(lengths), upstream), strict=True):
        assert torch.equal(a[: len(b)], b) and not a[len(b) :].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NaN and infinity, which are meant to be there
@IN_HALF
def test_attention_of_a_sequence_does_not_depend_on_its_pack(dtype):
    """Alone or between others, even poisoned ones: the same bits on every run, forward and backward."""
    inputs, starts, upstream = pack((40, 133, 20), 2, 1, 16, dtype)
    alone = forward_and_gradients(attention, [x[40:173] for x in inputs], torch.tensor([0, 133]), 133, upstream[40:173])
    poison = [x.clone() for x in (*inputs, upstream)]
    for x in poison:
        x[:40], x[173:] = torch.nan, torch.inf
    for given in ((*inputs, upstream), poison):
        packed = forward_and_gradients(attention, given[:3], starts, 200, given[3])
        assert all(torch.equal(a, b[40:173]) for a, b in zip(alone, packed, strict=True))


@IN_HALF
def test_attention_takes_views_and_writes_to_none(dtype):
    """q, k and v sliced out of one tensor, in another order, at odd addresses; strided starts; an expanded upstream gradient."""
    wide = randn(50, 8, 16, dtype=dtype)
    before = wide.clone()
    upstream = randn(50, 1, 16, seed=9, dtype=dtype).expand(50, 4, 16)
    starts, strided = torch.tensor([0, 20, 50]), torch.tensor([[0, 9], [20, 9], [50, 9]])[:, 0]
    slices = (wide[:, :4], wide[:, 4:6], wide[:, 6:])
    other_order = (wide.mT.contiguous().mT[:, :4], *wide[:, 1:5].split(2, 1))
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in slices]
    for inputs in (slices, other_order, shifted):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves, strided, 30)
        mine = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
        exact = forward_and_gradients(reference.attention, [x.double() for x in inputs], starts, 30, upstream.double())
        for a, b in zip(mine, exact, strict=True):
            assert_near(a, b, dtype)
    assert torch.equal(wide, before)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the mask of the diagonal comes after the exponential
@pytest.mark.parametrize("level", [-120.0, 80.0])
def test_attention_with_extreme_scores(level, dtype):
    """A common shift of all scores changes no softmax, even where e^score is 0 or infinite."""
    k, v, upstream = ((randn(65, 1, 16, seed=i) * 32).round() / 32 for i in range(3))  # both k are exact in fp16
    results = [forward_and_gradients(attention, [x.to(dtype) for x in (torch.ones_like(k), keys, v)], torch.tensor([0, 64, 65]),
                                     64, upstream.to(dtype)) for keys in (k, k + level / 4)]  # q·k / sqrt(16) moves by `level`
    tolerance = 1e-3 if dtype == FULL else 1e-2  # dQ is a sum of large keys with weights of sum 0, which fp16 rounds
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_attention_of_nothing():
    """A pack without tokens."""
    inputs, starts, upstream = pack((0, 0), 2, 1, 16)
    assert [len(x) for x in forward_and_gradients(attention, inputs, starts, 0, upstream)] == [0, 0, 0, 0]


TWO = torch.tensor([0, 2])


@pytest.mark.parametrize("change, starts, longest, message", [
    (lambda q, k, v: (q[:, :3], k, v), TWO, 2, "3 query heads can't share 2 key/value heads: H must be a multiple of K"),
    (lambda q, k, v: (q, k, v[:, :1]), TWO, 2, r"needs k and v \(2, K, 16\), not \(2, 2, 16\) and \(2, 1, 16\)"),
    (lambda q, k, v: (q, k[:1], v[:1]), TWO, 2, r"not \(1, 2, 16\) and \(1, 2, 16\)"),
    (lambda q, k, v: (q.half(), k, v), TWO, 2, "are torch.float16, torch.float32 and torch.float32: cast them to one of"),
    (lambda q, k, v: (q.double(), k.double(), v.double()), TWO, 2, "cast them to one of float16, bfloat16 and float32"),
    (lambda q, k, v: pack((2,), 1, 1, 257)[0], TWO, 2, "head_dim=257 is over 256"),
    (lambda q, k, v: (q, k, v), torch.zeros(65_536, dtype=torch.int64), 2, "65535 sequences .* lower micro_batch_tokens"),
    (lambda q, k, v: (q, k, v), TWO[:1], 2, "0 sequences"),
    (lambda q, k, v: (q, k, v), TWO, 2**20, "max_seqlen=1048576 are more tiles .* the longest length, up to 1048560"),
    (lambda q, k, v: (q, k, v), torch.zeros(65_535, dtype=torch.int64), 2**18, "65534 sequences .* more tiles than a grid has"),
])
def test_attention_refuses_what_it_cannot_do(change, starts, longest, message):
    """Heads, shapes and types that it would misread; sizes that it has no tiles or no grid for."""
    with pytest.raises(ValueError, match=message):
        attention(*change(*pack((2,), 4, 2, 16)[0]), starts, longest)


# --- log-probabilities ---


def logprob_case(N: int, C: int, V: int, dtype: torch.dtype = FULL) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    targets[0], targets[-1] = 0, V - 1
    return randn(N, C, dtype=dtype), randn(V, C, seed=1, dtype=dtype) * 0.3, targets


def exact_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def assert_exact_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, g: float, e: float) -> Tensor:
    """And exact gradients of hidden states and weights, for random upstream gradients times g and e. Returns log p."""
    N, V, dtype = len(hidden), len(weight), hidden.dtype
    upstream = (g * randn(N, seed=5), e * randn(N, seed=6))
    results = []
    for function, cast in ((token_logprobs, lambda x: x.clone()), (exact_logprobs, Tensor.double)):
        leaves = [cast(x).requires_grad_() for x in (hidden, weight)]
        out = function(*leaves, targets, temperature)
        results.append([*out, *torch.autograd.grad(out, leaves, [x.to(out[0].dtype) for x in upstream])])
    (logprob, entropy, *gradients), (exact_logprob, exact_entropy, *exact_gradients) = results
    torch.testing.assert_close(logprob.double(), exact_logprob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=1e-5, rtol=1e-5)
    assert (logprob <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(V) + 1e-6).all()
    for a, b in zip(gradients, exact_gradients, strict=True):
        assert_near(a, b, dtype)
    return logprob.detach()


@pytest.mark.parametrize("N, C, V, temperature, g, e", [
    (130, 40, 97, 0.7, 1, 1), (130, 40, 97, 0.7, 1, 0), (130, 40, 97, 0.7, 0, 1), (130, 40, 97, 0.7, 0, 0),
    (5, 16, 2, 1.0, 1, 1), (3, 33, 129, 1.0, 1, 1), (66, 70, 2100, 2.0, 1, 1),
])
def test_logprobs_and_their_gradients(N, C, V, temperature, g, e, dtype):
    """log p, entropy and the gradients of hidden states and weights, for upstream gradients of either or both."""
    assert_exact_logprobs(*logprob_case(N, C, V, dtype), temperature, g, e)


@pytest.mark.parametrize("dtype", ["fp16, sm_90"], indirect=True)
def test_logprobs_of_a_real_vocabulary(dtype):
    """That of Qwen, 151,936 tokens: 75 tiles in each split. The normaliser that log p implies makes of all logits probabilities
    whose sum is 1."""
    hidden, weight, targets = logprob_case(2, 16, 151_936, dtype)
    logprob = assert_exact_logprobs(hidden, weight, targets, 1.0, 1, 1)
    z = hidden.double() @ weight.double().T
    lse = z.gather(1, targets[:, None]) - logprob[:, None]
    assert ((z - lse).exp().sum(1) - 1).abs().max() < 1e-5


def test_probabilities_sum_to_one_and_gradients_to_zero(dtype):
    """Over all targets p is 1; and a shift of all logits has no gradient, but for the rounding of each token's to fp16."""
    hidden, weight, _ = logprob_case(4, 16, 300, dtype)
    logprob, _ = token_logprobs(hidden[:1].expand(300, -1), weight, torch.arange(300), 0.7)
    assert abs(logprob.double().exp().sum() - 1) < 1e-5
    leaf = weight.requires_grad_()
    logprob, entropy = token_logprobs(torch.ones(1, 16, dtype=dtype), leaf, torch.tensor([7]), 1.0)
    gradient = torch.autograd.grad((logprob + entropy).sum(), leaf)[0]
    assert gradient.double().sum(0).abs().max() < (1e-6 if dtype == FULL else 1e-3)


@pytest.mark.parametrize("level", [-120.0, 80.0])
def test_logits_far_from_zero(level, dtype):
    """A common shift of all logits changes nothing; equal logits are uniform; one large logit is certain."""
    hidden, weight, targets = logprob_case(9, 15, 97, dtype)
    ones = lambda x, value: torch.cat([x, x.new_full((len(x), 1), value)], 1)
    for a, b in zip(token_logprobs(ones(hidden, 1.0), ones(weight, level), targets, 1.0),
                    exact_logprobs(hidden, weight, targets, 1.0), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-5)
    one, weight = torch.ones(2, 1, dtype=dtype), torch.zeros(97, 1, dtype=dtype)
    logprob, entropy = token_logprobs(one, weight + level, targets[:2], 1.0)
    torch.testing.assert_close(torch.stack([-logprob, entropy]), torch.full((2, 2), math.log(97)))
    weight[4] = 200.0
    logprob, entropy = token_logprobs(one, weight, torch.tensor([4, 1]), 1.0)
    assert logprob.tolist() == [0.0, -200.0] and entropy.tolist() == [0.0, 0.0]


@IN_HALF
def test_a_row_does_not_depend_on_the_batch(dtype):
    """The same bits alone, among 150 rows and on a second run; a target outside of the vocabulary is NaN in its row only, and in
    its gradient."""
    hidden, weight, targets = logprob_case(150, 24, 333, dtype)
    many = token_logprobs(hidden, weight, targets, 0.8)
    for rows in (slice(0, 150), slice(149, 150), slice(60, 70)):
        few = token_logprobs(hidden[rows], weight, targets[rows], 0.8)
        assert all(torch.equal(a[rows], b) for a, b in zip(many, few, strict=True))
    targets[3], targets[5], targets[7] = 333, -1, 2**32 + 5
    leaf = hidden.requires_grad_()
    logprob, _ = token_logprobs(leaf, weight, targets, 0.8)
    gradient = torch.autograd.grad(logprob, leaf, torch.ones(150))[0]
    assert logprob.isnan().nonzero().flatten().tolist() == gradient.isnan().any(1).nonzero().flatten().tolist() == [3, 5, 7]


def test_frozen_tied_and_sliced_arguments(dtype, monkeypatch):
    """No gradient for what is frozen; a tied weight gets both of its gradients; views; small chunks of the vocabulary."""
    hidden, weight, targets = logprob_case(20, 16, 700, dtype)
    wide = torch.cat([hidden, hidden], 1)
    h, w = wide[:, 16:].requires_grad_(), weight.clone().requires_grad_()
    strided = torch.stack([targets, targets * 0], 1)[:, 0]
    loss = lambda h, w, f=token_logprobs: (f(h, w, strided, 1.0)[0] * randn(20, seed=3)).sum()
    both = torch.autograd.grad(loss(h, w), (h, w))
    monkeypatch.setattr(importlib.import_module("kernels.logprob"), "WORKSPACE", 20 * 4 * 256)  # three chunks of 256 tokens
    tolerance = dict(atol=1e-6, rtol=1e-6 if dtype == FULL else 2e-3)  # chunks of dhidden are added up in another order
    torch.testing.assert_close(torch.autograd.grad(loss(h, w.detach()), h)[0], both[0], **tolerance)
    torch.testing.assert_close(torch.autograd.grad(loss(h.detach(), w), w)[0], both[1], **tolerance)
    tied = [torch.autograd.grad(loss(x[targets].mul(1), x, f), x)[0] for f, x in (
        (token_logprobs, weight.clone().requires_grad_()), (exact_logprobs, weight.double().requires_grad_()))]
    assert_near(tied[0], tied[1], dtype)


@pytest.mark.parametrize("N, C", [(50, 16), (5, 40)], ids=["many tokens", "wide"])
def test_temporaries_fit_the_workspace(N, C, monkeypatch):
    """dz and the products of (8) are cut into parts of at most WORKSPACE bytes, and the gradients are those of one part."""
    logprob = importlib.import_module("kernels.logprob")
    hidden, weight, targets = logprob_case(N, C, 600, HALF)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    gradients = lambda loss: torch.autograd.grad(loss, (hidden, weight))
    two = lambda: gradients(token_logprobs(hidden, weight, targets, 1.0)[0].sum())
    whole, write_dz, product, sizes, shapes = two(), logprob.write_dz, logprob.product, [], []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        result = product(a, b)
        sizes.extend((a.nbytes, result.nbytes))
        return result

    monkeypatch.setattr(logprob, "write_dz", lambda dz, *rest: shapes.append(tuple(dz.shape)) or write_dz(dz, *rest))
    monkeypatch.setattr(logprob, "product", counted)
    monkeypatch.setattr(logprob, "WORKSPACE", 256 * max(2 * N, 4 * C))
    for a, b in zip(two(), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=2e-3)
    assert shapes == [(N, 256), (N, 256), (N, 88)] and max(sizes) == logprob.WORKSPACE
    shapes.clear()
    monkeypatch.setattr(logprob, "WORKSPACE", 128 * 608 * 2)  # logits of 128 tokens, in rows of whole 32 bytes
    token_loss(hidden.repeat(150 // N, 1), weight, targets.repeat(150 // N), 1.0, lambda logprob, *_: logprob.sum())
    assert shapes == [(128, 600), (22, 600)]


@pytest.mark.parametrize("change, message", [
    (lambda h, w, t: (h.half(), w, t), "hidden is torch.float16 and weight torch.float32: cast both to one of"),
    (lambda h, w, t: (h.double(), w.double(), t), "cast both to one of float16, bfloat16 and float32"),
    (lambda h, w, t: (h, w[:, :7], t), r"hidden \(4, 8\) needs weight \(V, 8\) and targets \(4,\), not \(9, 7\) and \(4,\)"),
    (lambda h, w, t: (h, w, t[:3]), r"not \(9, 8\) and \(3,\)"),
    (lambda h, w, t: (h, w, t.float()), "targets are torch.float32: they number tokens, in int64"),
])
def test_logprobs_refuse_what_they_would_misread(change, message):
    for function in (token_logprobs, lambda *x: token_loss(*x, lambda logprob, entropy, rows: logprob.sum())):
        with pytest.raises(ValueError, match=message):
            function(*change(*logprob_case(4, 8, 9)), 1.0)


def test_one_pass_equals_two(dtype, monkeypatch):
    """token_loss, in parts of 128 rows: loss, log p and entropy, and the gradients of twice the loss."""
    monkeypatch.setattr(importlib.import_module("kernels.logprob"), "ONE_PASS_ROWS", 128)
    hidden, weight, targets = logprob_case(150, 24, 333, dtype)
    A, old = randn(150, seed=7), randn(150, seed=8)
    loss_of = lambda logprob, entropy, rows: (A[rows] * (logprob - old[rows]).exp()).mean() + 0.1 * entropy.sum()
    parts = [slice(i, i + 128) for i in (0, 128)]
    sum_of = lambda logprob, entropy: sum(loss_of(logprob[rows], entropy[rows], rows) for rows in parts)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss, logprob, entropy = token_loss(*leaves, torch.stack([targets, targets * 0], 1)[:, 0], 0.8, loss_of)
    exact_leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = exact_logprobs(*exact_leaves, targets, 0.8)
    for a, b in ((loss, sum_of(*exact)), (logprob, exact[0]), (entropy, exact[1])):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)
    tolerance = 2e-5 if dtype == FULL else 1e-2  # one pass keeps its logits in fp16: 2^-11 of |z|
    gradients, twice = (torch.autograd.grad(2 * loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, gradients, twice))
    for a, b in zip(gradients, torch.autograd.grad(2 * sum_of(*exact), exact_leaves), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=float(tolerance * b.abs().max()))
    for i, leaf in enumerate(leaves):  # the other one is frozen
        given = [x if x is leaf else x.detach() for x in leaves]
        again = token_loss(*given, targets, 0.8, loss_of)[0]
        assert torch.equal(again, loss) and torch.equal(torch.autograd.grad(2 * again, leaf)[0], gradients[i])
    with pytest.raises(RuntimeError, match="once_differentiable"):  # its gradients are numbers, and not functions
        gradient = torch.autograd.grad(loss**2, leaves, create_graph=True)[0]
        gradient.sum().backward()
    monkeypatch.setattr(importlib.import_module("kernels.logprob"), "write_dz", None)  # nobody needs a gradient now
    assert not token_loss(hidden, weight, targets, 0.8, loss_of)[0].requires_grad
    with torch.no_grad():
        assert torch.equal(token_loss(*leaves, targets, 0.8, loss_of)[0], loss)


def test_one_pass_in_fp32_is_exact_under_autocast():
    """Which would round the products (7) and (8) to bf16."""
    hidden, weight, targets = logprob_case(5, 24, 33)
    gradients = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = token_loss(*leaves, targets, 1.0, lambda logprob, entropy, rows: (logprob * logprob).sum())[0]
        gradients.append(torch.autograd.grad(loss, leaves))
    assert all(map(torch.equal, *gradients))


def test_the_default_type_is_not_that_of_the_results():
    """A program that loads its model in 16 bit sets it; log p and entropy stay fp32, with the same bits."""
    case = logprob_case(5, 16, 97, HALF)
    expected = token_logprobs(*case, 1.0)
    torch.set_default_dtype(HALF)
    try:
        found = token_logprobs(*case, 1.0)
    finally:
        torch.set_default_dtype(FULL)
    assert all(map(torch.equal, found, expected)) and found[0].dtype == FULL


# --- norms, rotations, SwiGLU ---


def angles(N: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin (N,1,D) of random angles, as `model.rotary` makes them: views of one tensor."""
    angle = 3 * randn(N, 1, D // 2, seed=7).double()
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1).float().unbind(1)


def check(function, exact_function, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Result and gradients of `function`, for a random upstream gradient, against `exact_function` in float64."""
    upstream, found = None, []
    for f, cast in ((function, lambda x: x.clone()), (exact_function, Tensor.double)):
        leaves = [cast(x).requires_grad_() for x in inputs]
        out = f(*leaves)
        upstream = randn(*out.shape, seed=9, dtype=out.dtype) if upstream is None else upstream.double()
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for a, b in zip(*found, strict=True):
        assert_near(a, b, dtype)


PLAIN = pytest.mark.parametrize("dtype", ["fp32", "fp16"], indirect=True)  # no matrix products: the same on all devices


@PLAIN
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (37, 128), (3, 4, 32), (2, 2048), (9, 1536), (130, 20), (2, 5000)], ids=str)
def test_rms_norm_and_its_gradients(shape, dtype):
    """Of the last axis, with the residual stream's fp32 or 16 bit coming in and `dtype` going out; many tiles and one row."""
    weight = 1 + randn(shape[-1], seed=1) / 4

    def exact(x, w):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w

    for x in (randn(*shape), randn(*shape, dtype=dtype)):
        check(lambda x, w: rms_norm(x, w, 1e-5, dtype), exact, [x, weight], dtype)


def test_rms_norm_of_rows_large_small_and_zero():
    """Scaling a row scales nothing, until eps counts; a row of zeros has no direction."""
    x, weight = randn(3, 40), torch.ones(40)
    normed = rms_norm(torch.cat([x, x * 1e6, x * 0]), weight, 1e-12, FULL)
    torch.testing.assert_close(normed[:3], normed[3:6])
    assert not normed[6:].any()
    torch.testing.assert_close(rms_norm(x * 1e-6, weight, 1.0, FULL), x * 1e-6)
    zero = torch.zeros(2, 40, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(rms_norm(zero, weight, 1e-6, FULL).sum(), zero)[0], torch.full((2, 40), 1e3))


@PLAIN
@pytest.mark.parametrize("N, H, D", [(1, 1, 2), (7, 3, 32), (130, 2, 16), (5, 12, 128), (4, 1, 20), (3, 2, 256)])
def test_rotation_and_its_gradient(N, H, D, dtype):
    """Against sines and cosines of pairs written out; turned and turned back is where it was."""
    cos, sin = angles(N, D)

    def exact(x):
        a, b = x.chunk(2, -1)
        c, s = cos[..., : D // 2].double(), sin[..., D // 2 :].double()
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    x = randn(N, H, D, dtype=dtype)
    check(lambda x: rotate(x, cos, sin), exact, [x], dtype)
    assert_near(turn(rotate(x, cos, sin), cos, sin, True), x, dtype)
    assert_near(rotate(x, cos.contiguous(), sin.mT.contiguous().mT), exact(x.double()), dtype)


@PLAIN
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2048,), (41, 50), (3, 2048)], ids=str)
def test_swiglu_and_its_gradients(shape, dtype):
    """Gates from -40 to 40 among them, where the sigmoid is 0 or 1."""
    gate = randn(*shape, dtype=dtype) * 3
    gate.view(-1)[:2] = torch.tensor([40.0, -40.0])[: gate.numel()]
    check(swiglu, lambda gate, up: gate / (1 + (-gate).exp()) * up, [gate, randn(*shape, seed=1, dtype=dtype)], dtype)


def test_elementwise_kernels_take_views_and_write_to_none():
    """Every second number or weight, swapped axes, an expanded upstream gradient: what contiguous tensors give, bit for bit."""
    wide, weight = randn(6, 4, 64), randn(64, seed=1)[::2]
    cos, sin = angles(6, 32)
    before = wide.clone()
    assert torch.equal(rms_norm(wide[..., :32], weight, 1e-6, FULL), rms_norm(wide[..., :32], weight.contiguous(), 1e-6, FULL))
    for f in (lambda x: rms_norm(x, weight, 1e-6, FULL), lambda x: rotate(x, cos, sin), lambda x: swiglu(x, x)):
        for view in (wide[..., ::2], wide[..., :32].transpose(0, 1).contiguous().transpose(0, 1)):
            results = []
            for x in (view, view.contiguous()):
                leaf = x.detach().requires_grad_()
                out = f(leaf)
                results.append((out, torch.autograd.grad(out, leaf, torch.ones(1).expand_as(out))[0]))
            assert all(map(torch.equal, *results))
    assert torch.equal(wide, before)


def test_elementwise_kernels_of_nothing_and_of_frozen_weights():
    """No token; and a weight or an input without a gradient."""
    weight, (cos, sin) = torch.ones(16, requires_grad=True), angles(0, 16)
    empty = torch.ones(0, 2, 16, requires_grad=True)
    out = swiglu(rotate(rms_norm(empty, weight, 1e-6, FULL), cos, sin), empty)
    gradients = torch.autograd.grad(out.sum(), (empty, weight))
    assert gradients[0].shape == (0, 2, 16) and not gradients[1].any()
    x = randn(3, 16)
    loss = rms_norm(x, weight, 1e-6, FULL).sum() + rms_norm(x.requires_grad_(), weight.detach(), 1e-6, FULL).sum()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (x, weight)))


@pytest.mark.parametrize("op, message", [
    (lambda x: rms_norm(x, x.new_ones(8), 1e-6, FULL), "rows of 16 numbers, but there are 8 weights"),
    (lambda x: rotate(x, *(angle[:1] for angle in angles(4, 16))), r"needs cos and sin \(4, 1, 16\), not \(1, 1, 16\)"),
    (lambda x: rotate(x, *angles(4, 8)), r"not \(4, 1, 8\)"),
    (lambda x: rotate(x[..., :15], *(angle[..., :15] for angle in angles(4, 16))), "D=15 must be even"),
    (lambda x: swiglu(x, x[:1]), "must be alike"),
    (lambda x: swiglu(x, x.half()), "must be alike"),
])
def test_shapes_that_do_not_fit_are_an_error(op, message):
    """The reference would broadcast some of them; a kernel would read past the end."""
    with pytest.raises(ValueError, match=message):
        op(randn(4, 2, 16))


# --- the operators ---


def test_the_operators_are_well_registered():
    """Schema, fake implementation and autograd registration of all of them, as torch.compile relies on them."""
    (q, k, v), starts, grad = pack((3, 4), 2, 1, 16)
    hidden, weight, targets = logprob_case(5, 16, 20)
    out, lse = attention_forward(q, k, v, starts, 4, 0.25)
    _, entropy, row_lse = logprobs_forward(hidden, weight, targets, 1.0)
    g = randn(5)
    for operator, arguments in ((attention_forward, (q, k, v, starts, 4, 0.25)),
                                (attention_backward, (q, k, v, out, lse, grad, starts, 4, 0.25)),
                                (logprobs_forward, (hidden, weight, targets, 1.0)),
                                (logprobs_backward, (hidden, weight, targets, row_lse, entropy, g, g, 1.0, True, True)),
                                (rms_norm, (q, torch.ones(16), 1e-6, HALF)),
                                (rms_norm_backward, (q, torch.ones(16), q.half(), 1e-6)), (turn, (q, *angles(7, 16), False)),
                                (swiglu, (q, q)), (swiglu_backward, (q, q, q))):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def score(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, starts: Tensor, longest: int, targets: Tensor,
          cos: Tensor, sin: Tensor) -> Tensor:
    """A model of one layer that uses every operator with a gradient."""
    q, v = rotate(rms_norm(q, weight[0, :16], 1e-6, FULL), cos, sin), swiglu(v, v)
    logprob, entropy = token_logprobs(attention(q, k, v, starts, longest).flatten(1), weight, targets, 1.0)
    return (logprob * targets + entropy).sum()


def score_case(lengths) -> tuple[list[Tensor], tuple]:
    (q, k, v), starts, _ = pack(lengths, 2, 1, 16)
    leaves = [x.requires_grad_() for x in (q, k, v, randn(50, 32, seed=5))]
    return leaves, (starts, max(lengths), torch.arange(sum(lengths)), *angles(sum(lengths), 16))


def test_backward_twice():
    """The same bits a second time: nothing is used up, written over or left to chance."""
    leaves, rest = score_case((7, 5))
    loss = score(*leaves, *rest)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_activation_checkpointing():
    """Forward computed once more in backward: the same bits."""
    leaves, rest = score_case((7, 5))
    plain = torch.autograd.grad(score(*leaves, *rest), leaves)
    saved = torch.autograd.grad(checkpoint(score, *leaves, *rest, use_reentrant=False), leaves)
    assert all(map(torch.equal, plain, saved))


def test_compile_without_a_graph_break():
    """torch.compile sees through the operators, forward and backward, at several sizes."""
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    for lengths in ((7, 5), (3, 0, 9)):
        leaves, rest = score_case(lengths)
        eager, traced = (torch.autograd.grad(f(*leaves, *rest), leaves) for f in (score, compiled))
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# --- decoding ---


def branch_case(limits: list[list[int]], L: int, t: int, K: int, G: int, D: int, dtype: torch.dtype):
    """Branches that see positions below limits[s][m] of L entries, of which every seventh is empty, rows in shuffled order, the
    first with t tokens of its own, the others with fewer; and what plain attention makes of it."""
    S, M, R = len(limits), max(map(len, limits)), sum(map(len, limits))
    row = torch.randperm(R, generator=torch.Generator().manual_seed(0)).tolist()
    group, place, limit = torch.zeros(S, M, dtype=torch.int64), torch.zeros(R, dtype=torch.int64), torch.full((S, M), -1)
    empty = torch.arange(L) % 7 == 3
    positions = ((~empty).cumsum(0) - 1).masked_fill(empty, 2**30).expand(S, L).contiguous()
    q, own = randn(R, K * G, D, dtype=dtype), [randn(R, K, t + 3, D, seed=i, dtype=dtype)[:, :, :t] for i in (1, 2)]
    length = t - torch.arange(R) * 17 % t
    prefix, exact = [randn(S, K, L, D, seed=i, dtype=dtype) for i in (3, 4)], torch.zeros(R, K * G, D, dtype=torch.float64)
    for s, seen in enumerate(limits):
        hidden = positions[s] >= max(seen)
        prefix[0][s, :, hidden], prefix[1][s, :, hidden] = 100.0, 1e4  # nobody sees these
        for m, n in enumerate(seen):
            r = row.pop()
            group[s, m], place[r], limit[s, m] = r, s * M + m, n
            keys, values = (torch.cat([a[s, :, positions[s] < n], b[r, :, : length[r]]], 1).double().repeat_interleave(G, 0)
                            for a, b in zip(prefix, own))
            exact[r] = ((keys @ q[r].double()[:, :, None]).squeeze(-1) / D**0.5).softmax(-1)[:, None].matmul(values).squeeze(1)
    return (q, *prefix, positions, limit, group, place, *own, length), exact


@pytest.mark.parametrize("dtype", ["fp32", "fp16"], indirect=True)  # one set of tiles for all devices
@pytest.mark.parametrize("limits, L, t, K, G, D", [
    ([[9], [4], [1]], 9, 1, 2, 2, 16), ([[150, 5, 70], [0, 64]], 150, 70, 2, 3, 16), ([[63, 65, 1, 130]], 130, 1, 1, 6, 40),
    ([[0, 0], [0]], 3, 65, 1, 1, 64), ([[20] * 13], 20, 2, 1, 7, 32), ([[33]], 40, 5, 1, 2, 256),
], ids=str)
def test_branch_attention_is_attention_over_what_a_row_sees(limits, L, t, K, G, D, dtype, monkeypatch):
    """Several chunks of prefix and suffix, branches at many positions, nothing visible at all."""
    monkeypatch.setattr(importlib.import_module("kernels.decode"), "CHUNK", 64)
    arguments, exact = branch_case(limits, L, t, K, G, D, dtype)
    assert_near(branch_attention(*arguments), exact, dtype)


def test_decoding_takes_views_and_writes_to_none():
    """Strided indices, queries and caches in other orders: the same bits, twice; inputs stay as they were."""
    arguments, _ = branch_case([[20, 5, 7], [9, 13]], 20, 4, 2, 3, 16, HALF)
    before = [x.clone() for x in arguments]
    spread = lambda x: torch.stack([x, x], -1)[..., 0]  # every second element of something larger
    swapped = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)  # tokens outside of heads
    q, k, v, *places, own_k, own_v, length = arguments
    views = (spread(q), swapped(k), swapped(v), *map(spread, places), swapped(own_k), swapped(own_v), spread(length))
    unlike = (q, k, swapped(v), *places, spread(own_k), spread(own_v), length)
    expected = branch_attention(*arguments)
    assert all(torch.equal(expected, branch_attention(*x)) for x in (arguments, views, unlike))
    assert all(map(torch.equal, before, arguments))


@pytest.mark.parametrize("level", [-120.0, 80.0])
def test_branch_attention_with_extreme_scores(level):
    """The same, on both sides of the border between prefix and suffix; and a side whose scores are far lower has no weight."""
    q, k, v, positions, limit, *indices, own_k, own_v, length = branch_case([[9, 4], [2]], 9, 3, 1, 2, 16, FULL)[0]
    q = torch.ones_like(q)
    run = lambda prefix, own, limit=limit: branch_attention(q, k + prefix / 4, v, positions, limit, *indices, own_k + own / 4,
                                                            own_v, length)
    torch.testing.assert_close(run(level, level), run(0.0, 0.0), atol=1e-3, rtol=1e-3)
    lower = run(level, 0.0) if level < 0 else run(0.0, level)
    alone = run(0.0, 0.0, limit.clamp(max=0))
    torch.testing.assert_close(lower, alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("change, message", [
    (dict(q=torch.ones(3, 3, 16)), "3 query heads can't share 2 key/value heads: H must be a multiple of K"),
    (dict(q=torch.ones(3, 2, 257)), "head_dim=257 is over 256"),
    (dict(prefix_k=torch.ones(2, 2, 9, 8)), r"q \(3, 4, 16\) and prefix_k \(2, 2, 9, 8\) need prefix_k \(2, 2, 9, 16\)"),
    (dict(prefix_v=torch.ones(2, 2, 8, 16)), r"need prefix_v \(2, 2, 9, 16\), not \(2, 2, 8, 16\)"),
    (dict(positions=torch.zeros(2, 8, dtype=torch.int32)), r"need positions \(2, 9\), not \(2, 8\)"),
    (dict(limit=torch.zeros(1, 2, dtype=torch.int32)), r"need limit \(2, 2\), not \(1, 2\)"),
    (dict(group=torch.zeros(1, 2, dtype=torch.int64)), r"need group \(2, 2\), not \(1, 2\)"),
    (dict(place=torch.zeros(2, dtype=torch.int64)), r"need place \(3,\), not \(2,\)"),
    (dict(suffix_k=torch.ones(3, 1, 3, 16)), r"need suffix_k \(3, 2, 3, 16\), not \(3, 1, 3, 16\)"),
    (dict(suffix_v=torch.ones(3, 2, 2, 16)), r"need suffix_v \(3, 2, 3, 16\), not \(3, 2, 2, 16\)"),
    (dict(length=torch.ones(4, dtype=torch.int64)), r"need length \(3,\), not \(4,\)"),
])
def test_branch_attention_refuses_what_it_would_misread(change, message):
    """Or it would read past the end of what it was given."""
    names = ("q", "prefix_k", "prefix_v", "positions", "limit", "group", "place", "suffix_k", "suffix_v", "length")
    arguments = dict(zip(names, branch_case([[9, 4], [2]], 9, 3, 2, 2, 16, FULL)[0], strict=True))
    with pytest.raises(ValueError, match=message):
        branch_attention(**arguments | change)


def test_what_no_branch_sees_at_the_end_of_a_chunk_is_not_read(monkeypatch):
    """Not even NaN there reaches a row; and a longer neighbour in another tile or segment makes nobody read further."""
    monkeypatch.setattr(importlib.import_module("kernels.decode"), "CHUNK", 64)
    q, k, v, positions, *rest = arguments = branch_case([[50, 40, 9], [90, 8]], 150, 5, 1, 2, 16, FULL)[0]
    expected = branch_attention(*arguments)
    for x in (k, v):
        x[0, :, 64:], x[1, :, 128:] = torch.nan, torch.nan
        x[0, :, :64].masked_fill_((positions[0, :64] >= 50).cummin(0).values[:, None], torch.nan)
    assert torch.equal(branch_attention(*arguments), expected)


def test_places_without_a_branch_write_nothing():
    """Whichever row they name."""
    q, k, v, positions, limit, group, place, *own = arguments = branch_case([[9, 4, 5], [7]], 9, 2, 1, 2, 16, FULL)[0]
    expected, unused = branch_attention(*arguments), torch.ones(6, dtype=torch.bool)
    unused[place] = False
    unused = unused.view(2, 3)
    for row in range(4):
        named = group.masked_fill(unused, row)
        assert torch.equal(branch_attention(q, k, v, positions, limit, named, place, *own), expected)


def test_a_branch_does_not_depend_on_its_neighbours(monkeypatch):
    """A row alone gives the bits that it gives among others, whether others make the padded prefix
    or the suffixes longer or not."""
    monkeypatch.setattr(importlib.import_module("kernels.decode"), "CHUNK", 64)
    arguments, _ = branch_case([[70, 20, 90], [150, 3]], 150, 70, 1, 3, 16, HALF)
    q, k, v, positions, limit, group, place, own_k, own_v, length = arguments
    together = branch_attention(*arguments)
    r = int(group[0, 2])
    zero, one = torch.zeros(1, dtype=torch.int64), slice(r, r + 1)
    L, t = int((positions[0] < 90).nonzero().max()) + 1, int(length[r])
    alone = branch_attention(q[one], k[:1, :, :L], v[:1, :, :L], positions[:1, :L], limit[:1, 2:3], zero[None], zero,
                             own_k[one, :, :t], own_v[one, :, :t], length[one])
    assert torch.equal(together[r], alone[0])


# --- the model ---


@pytest.fixture
def small(config) -> Llama:
    """With norms on each head's queries and keys, and weights of some size."""
    return Llama(replace(config, qk_norm=True)).initialise(torch.Generator().manual_seed(3))


def with_both(function: Callable, monkeypatch) -> tuple:
    """What `function` returns with the reference, and with the kernels in its place."""
    fused = {name: getattr(kernels, f"fused_{name}") for name in kernels.__all__ if name != "logits"}
    expected = function()
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "reference", SimpleNamespace(**fused))
        return expected, function()


def test_an_update_of_the_model_through_the_kernels(small, tmp_path, monkeypatch):
    """Loss, entropy, gradients and new weights of a step of training, in two micro-batches, are the reference's."""
    lengths = torch.tensor([9, 14, 6])
    N, random = int(lengths.sum()), torch.Generator().manual_seed(1)
    is_action = torch.rand(N, generator=random) < 0.7
    is_action[[0, 9, 23]] = False  # first tokens
    batch = Batch(torch.randint(small.config.vocab_size, (N,), generator=random), lengths, is_action, torch.zeros(N),
                  torch.tensor([1.0, 0.0, 1.0]), torch.arange(3), torch.ones(3, dtype=torch.bool))
    config = replace(load_config(Path(__file__).parents[1] / "config/tiny.py"), minibatches=1, micro_batch_tokens=20)
    batch, advantage = replace(batch, logprob=train.rescore(small, batch, config)), randn(N, seed=2)

    def step() -> tuple[dict, list[Tensor]]:
        model = deepcopy(small)
        learned = train.update(model, torch.optim.SGD(model.parameters()), batch, advantage, None, Run(config, tmp_path, "cpu"))
        return learned, [x for parameter in model.parameters() for x in (parameter.grad, parameter.detach())]

    (learned, expected), (learned_too, found) = with_both(step, monkeypatch)
    assert learned["grad_norm"] > 0 and learned_too == pytest.approx(learned, rel=1e-4, abs=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_sampling_from_the_model_through_the_kernels(small, monkeypatch):
    """Prompts, branches of them at several positions, and branches of those: the reference's tokens, log-probs and caches."""
    def sample() -> list[Tensor]:
        branch = lambda *where: Branches.of(*where, "cpu", torch.Generator().manual_seed(4))
        prompts = prefill(small, [[5, 6], list(range(30, 50))])
        first = generate(small, prompts, branch([0, 1, 1], [2, 20, 11], [[1], [2], [3, 4]]), Sampling(3, stop=()), max_rows=2)
        second = generate(small, first.segments(), branch([1, 1], [21, 23], [[8], [9]]), Sampling(2, stop=()))
        caches = second.segments()
        return [first.tokens, second.tokens, first.logprobs, second.logprobs, caches.keys, caches.values]

    expected, found = with_both(sample, monkeypatch)
    assert all(map(torch.equal, found[:2], expected[:2]))
    for a, b in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# --- the programs that measure ---


def test_the_benchmark_calls_the_kernels(tmp_path):
    """Its dry run times each of them, forward and backward, as it does on a GPU; none is refused, and log p is right."""
    assert bench.main(["--dry-run", "--out", str(tmp_path)]) == 0
    rows = sum(json.loads((tmp_path / "kernels-dry-run-on-a-cpu.json").read_text())["rows"].values(), [])
    mine = [row for row in rows if row["provider"].startswith(bench.OURS)]
    assert len(mine) == 16 and "nanomrt, one pass" in {row["provider"] for row in mine}
    assert all(row["ms"] > 0 and row.get("error", 0) < 1e-5 for row in mine)


def test_the_profile_knows_the_kernels(tmp_path, monkeypatch):
    """Each operator's passes are in its group, under whatever name PyTorch records them."""
    monkeypatch.setattr(step_profile, "TINY", replace(step_profile.TINY, num_hidden_layers=1))
    with_both(lambda: step_profile.main(["--dry-run", "--out", str(tmp_path)]), monkeypatch)
    found = json.loads((tmp_path / "profile-dry-run-on-a-cpu.json").read_text())["operations"]
    assert {(row["operation"], row["group"]) for row in found if row["operation"].startswith("nanomrt::")} == {
        (f"nanomrt::{name}{way}", group) for name, group in (("attention", "attention"), ("token_logprobs", "log-probs"),
        ("rms_norm", "norms"), ("swiglu", "SwiGLU")) for way in ("", "_backward")} | {("nanomrt::rotate", "rotations")}
