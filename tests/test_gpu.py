"""The Triton kernels on a real GPU: accuracy in 16 bit, and everything that the interpreter cannot show.

    python -m pytest -m gpu                                                          all of it
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest -m gpu -k "float64 or nan"
    compute-sanitizer --tool racecheck python -m pytest -m gpu -k "float64 or nan"
    TRITON_INTERPRET=1 python -m pytest tests/test_gpu.py -k "not 5000 and (1-t or 9-2 or 97 or 77 or nan_ or elementwise_a)"

memcheck goes without PyTorch's pool, inside of which a kernel may leave its tensors unseen. The last line needs no GPU: in half a
minute and in fp16, the interpreter shows that some of the tests themselves work.

Accuracy is measured against float64, beside PyTorch's own op on the same 16-bit inputs: the root-mean-square error may be at most
1.1 times its error, the largest single error twice that.
"""

import gc
import importlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import evaluate
import kernels
import sample
import train
from data.countdown import Countdown
from kernels import reference
from nanomrt import checkpoint, sampler
from nanomrt.config import ALGORITHMS, SUPERVISED, load_config
from nanomrt.cudagraph import Recording
from nanomrt.model import Llama, ModelConfig, Packed, rotary
from nanomrt.report import read_jsonl
from nanomrt.rollout import roll_out, training_sampling
from nanomrt.run import read_command_line
from nanomrt.warmstart import warm_start

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HALF = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float16,)  # the interpreter is silently wrong in bf16
TINY = Path(__file__).parents[1] / "config/tiny.py"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                                  reason="no CUDA device: these tests are for a GPU")]


@pytest.fixture(autouse=True)
def kernels_on_a_cpu(monkeypatch) -> None:
    """In the interpreter the kernels take the place of the reference, to which a CPU's tensors go."""
    if DEVICE == "cpu":
        fused = {name: getattr(kernels, f"fused_{name}") for name in kernels.__all__ if name != "logits"}
        monkeypatch.setattr(kernels, "reference", SimpleNamespace(**fused))


PACKS = {"one": (1,), "ragged": (17, 0, 127, 1, 129), "empty ends": (0, 0, 64, 0, 5, 0), "long": (4096, 129, 1)}
RAGGED = PACKS["ragged"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = HALF[0]) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)


def pack(lengths: Sequence[int], H: int = 4, K: int = 2, D: int = 64, dtype: torch.dtype = HALF[0]) -> list[Tensor]:
    """Random q, k, v and upstream gradient."""
    return [randn(sum(lengths), heads, D, seed=i, dtype=dtype) for i, heads in enumerate((H, K, K, H))]


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    return kernels.fused_attention(q, k, v, starts, max(lengths))


def vocabulary(N: int = 200, C: int = 128, V: int = 1000, dtype: torch.dtype = HALF[0]) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, weight and targets, the first and the last token among them."""
    targets = torch.randint(V, (N,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(2))
    targets[0], targets[-1] = 0, V - 1
    return randn(N, C, dtype=dtype), randn(V, C, seed=1, dtype=dtype) * (2 * C**-0.5), targets


def branches(limits: Sequence[Sequence[int]], L: int, t: int, K: int = 2, G: int = 3, D: int = 64,
             dtype: torch.dtype = HALF[0]) -> list[Tensor]:
    """Arguments of branch_attention: branch m of segment s sees the first limits[s][m] of L entries, and 1 to t of its own."""
    S, M, R = len(limits), max(map(len, limits)), sum(map(len, limits))
    places = torch.tensor([s * M + m for s, seen in enumerate(limits) for m in range(len(seen))])
    place = places[torch.randperm(R, generator=torch.Generator().manual_seed(0))].to(DEVICE)  # (R,) rows in any order
    group = torch.zeros(S * M, dtype=torch.int64, device=DEVICE)
    group[place] = torch.arange(R, device=DEVICE)
    limit = torch.tensor([[*seen, *[-1] * (M - len(seen))] for seen in limits], dtype=torch.int32, device=DEVICE)  # (S,M)
    positions = torch.arange(L, dtype=torch.int32, device=DEVICE).expand(S, L).contiguous()
    q, prefix_k, prefix_v, own_k, own_v = (randn(*shape, D, seed=i, dtype=dtype) for i, shape in enumerate(
        ((R, K * G), (S, K, L), (S, K, L), (R, K, t), (R, K, t))))
    length = t - torch.arange(R, device=DEVICE) % t
    return [q, prefix_k, prefix_v, positions, limit, group.view(S, M), place, own_k, own_v, length]


def norm_turn_gate(x: Tensor, weight: Tensor, gate: Tensor, ops=kernels) -> Tensor:
    """All elementwise ops on x (N,H,D): normalised, turned, gated."""
    N, _, D = x.shape
    cos, sin = rotary(N, D, 10_000.0, x.device).unbind(1)
    return ops.swiglu(gate, ops.rotate(ops.rms_norm(x, weight, 1e-6, gate.dtype), cos, sin))


FORKS = [[700, 3, 0], [1300] * 17, [1]]  # entries that each branch of three segments sees


def with_gradients(function: Callable[..., Tensor | tuple], inputs: Sequence[Tensor], *upstream: Tensor) -> list[Tensor]:
    """What a function returns, and the gradients of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def every_op(lengths: Sequence[int] = RAGGED) -> list[Tensor]:
    """Outputs of all ops, and gradients of those that have one, on fixed inputs."""
    *inputs, upstream = pack(lengths)
    hidden, weight, targets = vocabulary()
    g, e = randn(200, seed=8).float(), randn(200, seed=9).float()
    heads, gates, grad = pack((500,), 3, 3, 128)[:3]
    return [*with_gradients(norm_turn_gate, (heads, 1 + randn(128, seed=4).float(), gates), grad),
            kernels.fused_branch_attention(*branches(FORKS, 1300, 600)),
            *with_gradients(lambda *x: attend(*x, lengths), inputs, upstream),
            *with_gradients(lambda h, w: kernels.fused_token_logprobs(h, w, targets, 0.7), (hidden, weight), g, e)]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_as_exact(mine: Sequence[Tensor], peer: Sequence[Tensor], exact: Sequence[Tensor], floor: float = 1e-5) -> None:
    """Errors against `exact`, beside those of `peer`. The floor is that of numbers around 1; it grows with larger ones."""
    for i, (a, b, truth) in enumerate(zip(mine, peer, exact, strict=True)):
        a, b = ((x.double() - truth).abs() for x in (a, b))
        rms = lambda x: float(x.square().mean().sqrt())
        least = floor * max(rms(truth), 1.0)
        assert rms(a) <= 1.1 * rms(b) + least, f"result {i}: error {rms(a):.2e}, PyTorch's {rms(b):.2e}"
        assert a.max() <= 2 * b.max() + 10 * least, f"result {i}: largest error {a.max():.2e}, PyTorch's {b.max():.2e}"


def need_memory(gigabytes: float) -> None:
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests left in PyTorch's hands would not count as free
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB, {free:.0f} GB are free")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- Accuracy ---


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's attention of q (H,T,D) over k and v (K,·,D); softmax written out for float64, which the fused kernels refuse."""
    q, k, v = (x[None].repeat_interleave(len(q) // len(x), 1) for x in (q, k, v))  # (1,H,·,D)
    if q.dtype != torch.float64:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):  # the peer rounds as fused kernels do
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0] if q.numel() else q[0]
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=DEVICE).triu(1) & causal
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v)[0]


def sdpa_of_pack(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sequence by sequence."""
    parts = zip(*(x.transpose(0, 1).split(list(lengths), 1) for x in (q, k, v)))
    return torch.cat([sdpa(*part, causal=True) for part in parts], 1).transpose(0, 1)


def sdpa_of_branches(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, positions: Tensor, limit: Tensor, group: Tensor,
                     place: Tensor, own_k: Tensor, own_v: Tensor, length: Tensor) -> Tensor:
    """Row by row, over what it sees."""
    rows = []
    for r, (s, m) in enumerate(divmod(at, group.shape[1]) for at in place.tolist()):
        seen = positions[s] < limit[s, m]
        k, v = (torch.cat([a[s][:, seen], b[r][:, : length[r]]], 1) for a, b in ((prefix_k, own_k), (prefix_v, own_v)))
        rows.append(sdpa(q[r][:, None], k, v, causal=False)[:, 0])
    return torch.stack(rows)


def check_attention(lengths: Sequence[int], H: int, K: int, D: int, dtype: torch.dtype) -> None:
    *inputs, upstream = pack(lengths, H, K, D, dtype)
    mine = with_gradients(lambda *x: attend(*x, lengths), inputs, upstream)
    peer = with_gradients(lambda *x: sdpa_of_pack(*x, lengths), inputs, upstream)
    exact = with_gradients(lambda *x: sdpa_of_pack(*x, lengths), [x.double() for x in inputs], upstream.double())
    assert_as_exact(mine, peer, exact)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 128, 256])
def test_attention_against_float64_by_head_dim(D, dtype):
    check_attention(RAGGED, 4, 2, D, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("G", [1, 3, 4, 6, 7])
def test_attention_against_float64_by_group(G, dtype):
    check_attention(RAGGED, 2 * G, 2, 64, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("D", [64, 128])
def test_attention_against_float64_by_lengths(name, D, dtype):
    check_attention(PACKS[name], 4, 2, D, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("limits, L, t, K, G, D", [
    (FORKS, 1300, 600, 2, 3, 64), (FORKS, 1300, 1, 1, 7, 128), ([[40] * 64], 40, 8, 2, 1, 80), ([[0, 0], [0]], 5, 513, 1, 4, 32),
    ([[511, 512, 513]], 513, 9, 2, 6, 256), ([[9]], 9, 1, 2, 2, 16),
], ids=str)
def test_decoding_against_float64(limits, L, t, K, G, D, dtype):
    arguments = branches(limits, L, t, K, G, D, dtype)
    exact = sdpa_of_branches(*(x.double() if x.dtype == dtype else x for x in arguments))
    assert_as_exact([kernels.fused_branch_attention(*arguments)], [sdpa_of_branches(*arguments)], [exact])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("N, C, V", [(1, 64, 97), (200, 128, 1000), (127, 896, 151936), (129, 80, 32003), (33, 64, 129920)])
def test_logprobs_against_float64(N, C, V, dtype):
    """log p and entropy, beside float32 logits of the same 16-bit inputs; the gradients, beside those of 16-bit logits."""
    hidden, weight, targets = vocabulary(N, C, V, dtype)
    upstream = randn(2, N, seed=5).double()

    def naive(h, w, out_dtype):
        z = h.to(out_dtype) @ w.to(out_dtype).T / 0.7
        logp = z.log_softmax(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    mine = with_gradients(lambda h, w: kernels.fused_token_logprobs(h, w, targets, 0.7), (hidden, weight), *upstream.float())
    exact = with_gradients(lambda h, w: naive(h, w, torch.float64), (hidden.double(), weight.double()), *upstream)
    peer = naive(hidden, weight, torch.float32)
    half = with_gradients(lambda h, w: reference.token_logprobs(h, w, targets, 0.7), (hidden, weight), *upstream.float())
    assert (mine[0] <= 0).all() and (mine[1] >= 0).all() and (mine[1] <= math.log(V) + 1e-5).all()
    assert (mine[0].double() - exact[0]).abs().max() < 2e-4
    assert_as_exact(mine[:2], peer, exact[:2], floor=5e-6)  # tensor cores cut off what they add: about 9e-6 of log p around 10
    assert_as_exact(mine, half, exact)
    # And not only better than theirs: two roundings to 16 bit, of dz and of the result.
    for a, truth in zip(mine[2:], exact[2:], strict=True):
        assert (a.double() - truth).norm() <= torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("V", [97, 129920, 151936])
def test_probabilities_over_the_vocabulary_sum_to_one(V, dtype):
    """A row for every token: no tile of a real vocabulary is left out or counted twice."""
    hidden, weight, _ = vocabulary(1, 64, V, dtype)
    logprob, _ = kernels.fused_token_logprobs(hidden.expand(V, -1), weight, torch.arange(V, device=DEVICE), 0.7)
    assert abs(logprob.double().exp().sum() - 1) < 1e-4


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 1, 10), (300, 3, 128), (129, 2, 80), (70, 1, 1536), (5000, 1, 256)], ids=str)
def test_elementwise_against_float64(shape, dtype):
    """Each op by itself, result and gradients; the residual stream is fp32, as in the model."""
    x, gate, upstream = (randn(*shape, seed=i, dtype=dtype) for i in range(3))
    cos, sin = rotary(shape[0], shape[2], 10_000.0, x.device).unbind(1)

    def exact_rotate(x):
        a, b = x.chunk(2, -1)
        c, s = (y.chunk(2, -1)[1].double() for y in (cos, sin))
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    cases = [
        (lambda ops, x, w: ops.rms_norm(x, w, 1e-6, dtype),
         lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w,
         (x.float(), 1 + randn(shape[2], seed=3).float())),
        (lambda ops, x: ops.rotate(x, cos, sin), exact_rotate, (x,)),
        (lambda ops, *x: ops.swiglu(*x), lambda gate, up: gate * gate.sigmoid() * up, (x, gate)),
    ]
    for run, exact, inputs in cases:
        mine, peer = (with_gradients(partial(run, ops), inputs, upstream) for ops in (kernels, reference))
        assert_as_exact(mine, peer, with_gradients(exact, [x.double() for x in inputs], upstream.double()))


def test_float32_is_exact():
    """fp32 products are not TF32 ones."""
    check_attention(RAGGED, 4, 2, 64, torch.float32)
    hidden, weight, targets = vocabulary(dtype=torch.float32)
    logp = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert (kernels.fused_token_logprobs(hidden, weight, targets, 1.0)[0].double() - logp).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_one_pass_equals_two_passes(dtype):
    """log p and entropy to 1e-5. The gradients differ by what rounding the logits to fp16 costs."""
    from kernels.logprob import token_loss

    hidden, weight, targets = vocabulary(4500, 128, 1003, dtype)  # three parts, the last one cut off
    g, e = randn(4500, seed=5).float(), randn(4500, seed=6).float()
    loss = lambda logprob, entropy, rows: (g[rows] * logprob + e[rows] * entropy).sum()
    two = with_gradients(lambda h, w: kernels.fused_token_logprobs(h, w, targets, 0.7), (hidden, weight), g, e)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    total, logprob, entropy = token_loss(*leaves, targets, 0.7, loss)
    one = torch.autograd.grad(total, leaves)
    for a, b in zip((logprob, entropy), two[:2], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    for a, b in zip(one, two[2:], strict=True):
        assert (a - b).float().norm() <= 2 * torch.finfo(dtype).eps * b.float().norm()


# --- The same bits ---


def test_a_second_run_has_the_same_bits():
    first = every_op()
    assert all(same_bits(first, every_op()) for _ in range(3))


@pytest.mark.parametrize("D, lengths", [(64, (300, 1, 129, 0, 517)), (128, (300, 1, 129, 0, 517)), (16, (70, 1, 0, 33))],
                         ids=["64", "128", "few"])
def test_neighbours_do_not_change_a_sequence(D, lengths):
    """Alone or in a pack: the same bits, in the result and in the gradients."""
    *inputs, upstream = pack(lengths, D=D)
    whole = with_gradients(lambda *x: attend(*x, lengths), inputs, upstream)
    start = 0
    for T in filter(None, lengths):
        part = [x[start : start + T] for x in (*inputs, upstream)]
        alone = with_gradients(lambda *x, T=T: attend(*x, (T,)), part[:3], part[3])
        assert same_bits(alone, [x[start : start + T] for x in whole])
        start += T


@pytest.mark.parametrize("part", [1, 7, 64, 130])
def test_other_rows_do_not_change_a_row(part):
    """log p and entropy of a row are the same bits in any batch."""
    hidden, weight, targets = vocabulary(300)
    whole = kernels.fused_token_logprobs(hidden, weight, targets, 0.7)
    alone = kernels.fused_token_logprobs(hidden[170 : 170 + part], weight, targets[170 : 170 + part], 0.7)
    assert same_bits(alone, [x[170 : 170 + part] for x in whole])


def test_other_tokens_do_not_change_a_token():
    """Normed, turned and gated alone or among others: the same bits, in the result and in the gradients."""
    heads, gates, upstream = pack((300,), 3, 3, 128)[:3]
    weight = 1 + randn(128, seed=4).float()
    whole = with_gradients(lambda x, y: norm_turn_gate(x, weight, y), (heads, gates), upstream)
    alone = with_gradients(lambda x, y: norm_turn_gate(x, weight, y), (heads[:7], gates[:7]), upstream[:7])
    assert same_bits(alone, [x[:7] for x in whole])


@pytest.mark.parametrize("D", [64, 128])
def test_other_branches_do_not_change_a_branch(D):
    """A row alone gives the bits that it gives among 64, wherever it stands, and whether others make its prefix longer or not."""
    limits = [[600, *range(20, 63)], [1100] * 20]
    arguments = q, k, v, positions, limit, group, place, own_k, own_v, length = branches(limits, 1100, 30, D=D)
    together = kernels.fused_branch_attention(*arguments)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for m in (0, 1, 43):
        row, seen = group[0, m, None], limits[0][m]
        alone = kernels.fused_branch_attention(q[row], k[:1, :, :seen], v[:1, :, :seen], positions[:1, :seen], limit[:1, m, None],
                                               zero[None], zero, own_k[row], own_v[row], length[row])
        assert torch.equal(together[row], alone)


# --- Memory that nobody wrote ---


def poison() -> None:
    """Fill what the allocator will hand out next with NaN."""
    big = [torch.full((2**26,), torch.nan, device=DEVICE) for _ in range(4)]
    small = [torch.full((2**k,), torch.nan, device=DEVICE) for k in range(8, 18) for _ in range(16)]
    del big, small


def test_nan_in_fresh_memory_reaches_nothing():
    clean = every_op()
    poison()
    poisoned = every_op()
    assert all(x.isfinite().all() for x in poisoned) and same_bits(clean, poisoned)


@pytest.mark.parametrize("lengths", [(127, 64, 65), (1, 17, 1), (128, 3, 128)])
def test_nan_neighbours_reach_nothing(lengths):
    """The middle sequence is NaN everywhere; the others' results and gradients keep their bits."""
    *inputs, upstream = pack(lengths)
    clean = with_gradients(lambda *x: attend(*x, lengths), inputs, upstream)
    middle = slice(lengths[0], lengths[0] + lengths[1])
    for x in (*inputs, upstream):
        x[middle] = torch.nan
    dirty = with_gradients(lambda *x: attend(*x, lengths), inputs, upstream)
    for a, b in zip(clean, dirty, strict=True):
        assert same_bits((a[: middle.start], a[middle.stop :]), (b[: middle.start], b[middle.stop :]))


@pytest.mark.parametrize("lengths, N", [((1, 17, 127), 154), ((64,), 73), ((0,), 9), ((200,), 600)])
def test_nan_behind_the_last_sequence_reaches_nothing(lengths, N):
    """Tokens of no sequence have zeros for results and gradients, whatever they held and memory held, and change no bit."""
    own = sum(lengths)
    *inputs, upstream = pack((N,))
    clean = with_gradients(lambda *x: attend(*x, lengths), [x[:own] for x in inputs], upstream[:own])
    for x in (*inputs, upstream):
        x[own:] = torch.nan
    poison()
    found = with_gradients(lambda *x: attend(*x, lengths), inputs, upstream)
    assert same_bits([x[:own] for x in found], clean) and not any(x[own:].any() for x in found)


def test_a_nan_row_stays_a_row():
    hidden, weight, targets = vocabulary()
    clean = kernels.fused_token_logprobs(hidden, weight, targets, 1.0)
    hidden[50] = torch.nan
    other = torch.arange(200, device=DEVICE) != 50
    for a, b in zip(clean, kernels.fused_token_logprobs(hidden, weight, targets, 1.0), strict=True):
        assert torch.equal(a[other], b[other]) and b[50].isnan()


@pytest.mark.parametrize("C", [128, 100, 77])
def test_views_and_odd_widths(C):
    """Rows that the copy engine cannot address: odd strides, odd widths, storage that begins anywhere, one row for all."""
    hidden, weight, targets = vocabulary(64, C, 300)
    expected = kernels.fused_token_logprobs(hidden, weight, targets, 1.0)
    wide = torch.zeros(64, 2 * C + 3, device=DEVICE, dtype=hidden.dtype)
    wide[:, 1 : C + 1] = hidden
    shifted = torch.zeros(300 * C + 1, device=DEVICE, dtype=hidden.dtype)[1:].view(300, C).copy_(weight)
    spread = torch.stack([targets, targets * 0], 1)[:, 0]  # stride 2
    assert same_bits(expected, kernels.fused_token_logprobs(wide[:, 1 : C + 1], shifted, spread, 1.0))
    same_row = hidden[:1].expand(64, -1)
    assert same_bits(*(kernels.fused_token_logprobs(h, weight, targets, 1.0) for h in (same_row, same_row.contiguous())))
    q, k, v, _ = pack((40, 24))
    same_key = k[:1].expand(64, -1, -1)
    assert same_bits(*([attend(q, key, v, (40, 24))] for key in (same_key, same_key.contiguous())))
    moved = [torch.zeros(x.numel() + 1, device=DEVICE, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    assert same_bits([attend(q, k, v, (40, 24))], [attend(*moved, (40, 24))])
    gated = lambda x, w, gate: kernels.swiglu(kernels.rms_norm(x, w, 1e-6, gate.dtype), gate)
    one, scale = torch.ones(1, device=DEVICE, dtype=hidden.dtype).expand(64, C), weight[0].float()
    expected = with_gradients(gated, (hidden, scale, hidden), one)
    found = with_gradients(lambda wide, flat: gated(wide[:, 1 : C + 1], scale, flat[1:].view(64, C)),
                           (wide, torch.cat([one[0, :1], hidden.flatten()])), one)
    assert same_bits((expected[0], expected[1], expected[3]), (found[0], found[1][:, 1 : C + 1], found[2][1:].view(64, C)))


# --- Sizes over 2^31 ---


def test_more_than_2_31_logits():
    """N·V over 2^31, though WORKSPACE never holds so many: the last rows equal the same rows alone, forward to the bit and
    backward to rounding."""
    need_memory(8)
    N, V = 14_500, 151_936
    assert N * V > 2**31
    hidden, weight, targets = vocabulary(N, 64, V)
    g = randn(N, seed=5).float()
    both = lambda h, t: lambda x: kernels.fused_token_logprobs(x, weight, t, 1.0)[0]
    logprob, grad = with_gradients(both(hidden, targets), (hidden,), g)
    alone, alone_grad = with_gradients(both(hidden[-64:], targets[-64:]), (hidden[-64:],), g[-64:])
    assert torch.equal(logprob[-64:], alone)
    assert (grad[-64:] - alone_grad).float().norm() <= 0.01 * alone_grad.float().norm()


@pytest.mark.parametrize("large", ["hidden", "weight"])
def test_logprob_inputs_over_2_31_elements(large):
    """Offsets into hidden states and weight are 64 bit wide, here and in the gradients."""
    need_memory(40)
    N, V = (2**20 + 128, 256) if large == "hidden" else (128, 2**20 + 128)
    hidden, weight, targets = vocabulary(N, 2048, V)
    assert max(hidden.numel(), weight.numel()) > 2**31
    targets[-64:] = V - 1
    g = torch.ones(N, device=DEVICE)
    results = with_gradients(lambda h, w: kernels.fused_token_logprobs(h, w, targets, 1.0)[0], (hidden, weight), g)
    logp = (hidden[-64:].float() @ weight.float().T).log_softmax(-1)
    torch.testing.assert_close(results[0][-64:], logp[:, -1], atol=1e-3, rtol=1e-4)
    dz = -logp.exp()
    dz[:, -1] += 1
    dhidden = dz @ weight.float()
    assert (results[1][-64:] - dhidden).norm() <= 0.01 * dhidden.norm()
    assert results[2][-1].isfinite().all() and results[2][-1].any()


def test_attention_inputs_over_2_31_elements():
    """The last sequence of a pack with over 2^31 query elements equals itself alone, gradients too."""
    need_memory(35)
    T, B, H, K, D = 1024, 1040, 16, 2, 128
    q, k, v, upstream = pack((T,) * B, H, K, D)
    assert q.numel() > 2**31
    whole = with_gradients(lambda *x: attend(*x, (T,) * B), (q, k, v), upstream)
    alone = with_gradients(lambda *x: attend(*x, (T,)), [x[-T:] for x in (q, k, v)], upstream[-T:])
    assert same_bits([x[-T:] for x in whole], alone)


def test_elementwise_over_2_31_elements():
    """The last rows equal the same rows alone, gradients too."""
    need_memory(45)
    N, C = 2**20 + 128, 2048
    x, upstream, weight = randn(N, C), randn(N, C, seed=1), torch.ones(C, device=DEVICE)
    assert x.numel() > 2**31
    cos, sin = rotary(2, C, 10_000.0, x.device)[1:].unbind(1)
    for f in (lambda x: kernels.rms_norm(x, weight, 1e-6, x.dtype), lambda x: kernels.swiglu(x, x.detach()),
              lambda x: kernels.rotate(x[:, None], *(y.expand(len(x), 1, C) for y in (cos, sin)))[:, 0]):
        whole, alone = with_gradients(f, (x,), upstream), with_gradients(f, (x[-64:],), upstream[-64:])
        assert same_bits([y[-64:] for y in whole], alone)


def test_a_cache_over_2_31_elements():
    """The last segment of the cache and the last row's suffix give what they give alone."""
    need_memory(16)
    S, K, L, D = 2049, 2, 4096, 128
    arguments = q, k, v, positions, limit, group, place, own_k, own_v, length = branches([[L]] * S, L, 5, K, 2, D)
    assert k.numel() > 2**31
    row, zero = group[-1], torch.zeros(1, dtype=torch.int64, device=DEVICE)
    together = kernels.fused_branch_attention(*arguments)
    alone = kernels.fused_branch_attention(q[row], k[-1:], v[-1:], positions[-1:], limit[-1:], zero[None], zero, own_k[row],
                                           own_v[row], length[row])
    assert torch.equal(together[row], alone)


# --- How the device is driven ---


def test_cuda_graphs():
    """Forward of all ops is captured once and replayed with other inputs."""
    q, k, v, _ = pack(RAGGED)
    hidden, weight, targets = vocabulary()
    cached = branches(FORKS, 1300, 600)
    starts, norm = torch.tensor([0, *RAGGED], device=DEVICE).cumsum(0), torch.ones(64, device=DEVICE)
    run = lambda: (norm_turn_gate(q, norm, q), kernels.fused_attention(q, k, v, starts, max(RAGGED)),
                   kernels.fused_branch_attention(*cached), *kernels.fused_token_logprobs(hidden, weight, targets, 1.0))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in (q, k, v, hidden, *cached[:3]):
        x.copy_(randn(*x.shape, seed=11))
    graph.replay()
    assert same_bits([x.clone() for x in captured], run())


def test_another_stream():
    """Kernels go to the current stream: they see what was written there, after a long wait."""
    *new, upstream = pack(RAGGED)
    expected = with_gradients(lambda *x: attend(*x, RAGGED), new, upstream)
    hidden, weight, targets = vocabulary()
    expected += kernels.fused_token_logprobs(hidden, weight, targets, 1.0)
    norm = torch.ones(64, device=DEVICE)
    expected += with_gradients(norm_turn_gate, (new[0], norm, new[0]), upstream)
    old, old_hidden = [torch.full_like(x, torch.nan) for x in new], torch.full_like(hidden, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        for x, y in zip((*old, old_hidden), (*new, hidden), strict=True):
            x.copy_(y)
        found = with_gradients(lambda *x: attend(*x, RAGGED), old, upstream)
        found += kernels.fused_token_logprobs(old_hidden, weight, targets, 1.0)
        found += with_gradients(norm_turn_gate, (old[0], norm, old[0]), upstream)
    torch.cuda.synchronize()
    assert same_bits(expected, found)


def test_the_host_never_waits():
    """Forward and backward of the training ops, the one-pass loss, and decoding enqueue their work and return."""
    from kernels.logprob import token_loss

    q, k, v, upstream = (x.requires_grad_() for x in pack(RAGGED))
    hidden, weight, targets = vocabulary()
    hidden, weight, cached = hidden.requires_grad_(), weight.requires_grad_(), branches(FORKS, 1300, 600)
    starts, norm = torch.tensor([0, *RAGGED], device=DEVICE).cumsum(0), torch.ones(64, device=DEVICE, requires_grad=True)

    def step():
        (norm_turn_gate(q, norm, q) * upstream.detach()).sum().backward()
        (kernels.fused_attention(q, k, v, starts, max(RAGGED)) * upstream.detach()).sum().backward()
        logprob, entropy = kernels.fused_token_logprobs(hidden, weight, targets, 1.0)
        (logprob + entropy).sum().backward()
        token_loss(hidden, weight, targets, 1.0, lambda logprob, entropy, rows: logprob.sum())[0].backward()
        kernels.fused_branch_attention(*cached)

    step()
    with no_synchronisation():
        step()


def test_compile_without_a_graph_break():
    """torch.compile(fullgraph=True) of a function with every op that has a gradient, at two sizes."""
    cos, sin = rotary(256, 64, 10_000.0, torch.device(DEVICE)).unbind(1)
    norm = torch.ones(64, device=DEVICE)

    def function(q, k, v, weight, starts, longest, targets):
        q = kernels.rotate(kernels.rms_norm(q, norm, 1e-6, q.dtype), cos[: len(q)], sin[: len(q)])
        out = kernels.fused_attention(q, k, kernels.swiglu(v, v), starts, longest)
        return kernels.fused_token_logprobs(out.flatten(1) * 2, weight, targets, 1.0)

    compiled = torch.compile(function, fullgraph=True)
    for lengths in ((17, 0, 127), (40, 60)):
        q, k, v, _ = pack(lengths)
        weight, N = randn(500, q[0].numel(), seed=7) * 0.1, len(q)
        targets, starts = torch.arange(N, device=DEVICE), torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
        rest, upstream = (starts, max(lengths), targets), randn(2, N, seed=5).float()
        eager, fast = (with_gradients(lambda *x, f=f, rest=rest: f(*x, *rest), (q, k, v, weight), *upstream)
                       for f in (function, compiled))
        for a, b in zip(eager, fast, strict=True):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_activation_checkpointing():
    """Recomputing the forward pass in backward changes no bit."""
    from torch.utils.checkpoint import checkpoint

    *inputs, upstream = pack(RAGGED)
    plain = with_gradients(lambda *x: attend(*x, RAGGED), inputs, upstream)
    saved = with_gradients(lambda *x: checkpoint(attend, *x, RAGGED, use_reentrant=False), inputs, upstream)
    assert same_bits(plain, saved)
    inputs = [inputs[0], torch.ones(64, device=DEVICE), inputs[0]]
    plain = with_gradients(norm_turn_gate, inputs, upstream)
    saved = with_gradients(lambda *x: checkpoint(norm_turn_gate, *x, use_reentrant=False), inputs, upstream)
    assert same_bits(plain, saved)


def test_twenty_sizes_compile_each_kernel_once():
    """No number of tokens, sequences, rows or cached entries is a compile-time constant."""
    modules = [importlib.import_module(f"kernels.{name}") for name in ("attention", "logprob", "decode", "elementwise")]
    kernels_ = [x for module in modules for name, x in vars(module).items() if name.endswith("_kernel")]
    compiled = lambda: [sum(len(caches[0]) for caches in x.device_caches.values()) for x in kernels_]

    def run(N: int):
        q, k, v, upstream = pack((N // 2, N - N // 2))
        with_gradients(lambda *x: attend(*x, (N // 2, N - N // 2)), (q, k, v), upstream)
        hidden, weight, targets = vocabulary(N)
        ones = torch.ones(N, device=DEVICE)
        with_gradients(lambda h, w: kernels.fused_token_logprobs(h, w, targets, 1.0)[0], (hidden, weight), ones)
        kernels.fused_branch_attention(*branches([[N] * (N % 5 + 1)] * (N % 3 + 1), N, N))
        with_gradients(norm_turn_gate, (q, ones.new_ones(64), q), upstream)

    run(128)
    before = compiled()
    assert len(kernels_) == 13 and all(before)
    for N in [2, 16, 17, *(100 + 37 * i for i in range(17))]:
        run(N)
    assert compiled() == before


# --- The model ---


@pytest.fixture
def model(config) -> Llama:
    wide = replace(config, hidden_size=128, intermediate_size=256, head_dim=32)
    return Llama(wide).initialise(torch.Generator().manual_seed(0)).to(DEVICE)


def rescored(model: Llama, task, seed: int) -> Tensor:
    """|log p of the trainer - log p of the sampler| for every sampled token."""
    run = load_config(TINY)
    problems = task.problems("train", 16, seed)
    batch = roll_out(model, task, problems, 4, training_sampling(task, run), torch.Generator().manual_seed(seed)).batch()
    packed, action = Packed.of(batch.lengths), batch.is_action.nonzero().squeeze(1)
    with torch.no_grad():
        hidden = model(batch.tokens, packed.position_ids, packed)
        logprob, _ = kernels.token_logprobs(hidden[action - 1], model.head, batch.tokens[action], run.temperature)
    return (logprob - batch.logprob[action]).abs()


def test_the_trainer_scores_what_the_sampler_drew(model, task):
    """Before and after a large optimiser step: neither side works with stale weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(2):
        difference = rescored(model, task, seed)
        assert difference.mean() <= 0.01 and difference.quantile(0.99) <= 0.1
        tokens = torch.randint(1, model.config.vocab_size, (64,), device=DEVICE)
        packed = Packed.of(torch.tensor([64], device=DEVICE))
        hidden = model(tokens, packed.position_ids, packed)
        (-kernels.token_logprobs(hidden[:-1], model.head, tokens[1:], 1.0)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_learning_is_that_of_a_cpu():
    """Thirty warm-start steps on the device end at the CPU's loss, within 5 %."""
    run = replace(load_config(TINY), warm_steps=30)
    task = Countdown(run)
    shape = {f.name: getattr(run, f.name) for f in fields(ModelConfig) if hasattr(run, f.name)}

    def final_loss(device: str) -> float:
        model = Llama(ModelConfig(vocab_size=len(task.tokenizer), **shape)).initialise(torch.Generator().manual_seed(0))
        losses = [float(loss) for loss in warm_start(model.to(device), task, run)]
        assert losses[0] > losses[-1]
        return sum(losses[-5:]) / 5

    assert final_loss(DEVICE) == pytest.approx(final_loss("cpu"), rel=0.05)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """The words of a short run in a folder where all of them share their warm start."""
    return [str(TINY), f"--device={DEVICE}", "--warm_steps=20", "--steps=2", "--save_every=1", "--eval_problems=4",
            "--max_position_embeddings=256", f"--out_dir={tmp_path_factory.mktemp('runs')}"]


@pytest.mark.parametrize("words", [[f"--algorithm={name}"] for name in ALGORITHMS] + [
    ["--kl_coef=0.1"], ["--importance_cap=2"], ["--repeat_penalty=0.5"], ["--forks=4", "--fork_temperature=1"]], ids=str)
def test_every_method_trains(runs, words):
    """From rollouts to the evaluation of the trained policy; sampler and trainer agree as far as bf16 does."""
    words = [*runs, *words]
    config, folder, _ = read_command_line(words)
    assert train.main(words) == 0
    rows = read_jsonl(folder / "metrics.jsonl")[1:]
    assert len(rows) == 2 and all(math.isfinite(row["grad_norm"]) and row["skipped"] == 0 for row in rows)
    if config.algorithm not in SUPERVISED:
        assert max(row["max_logprob_diff"] for row in rows) < 0.5


def test_a_run_resumes_is_evaluated_and_speaks(runs, capsys):
    """Every other command on a run of the device: going on after a loss, the test-time methods, a sample."""
    words = [*runs, "--seed=1"]
    _, folder, _ = read_command_line(words)
    assert train.main(words) == 0
    last, metrics = folder / "checkpoints/step-000002", read_jsonl(folder / "metrics.jsonl")
    shutil.rmtree(last)
    assert train.main([*words, "--resume"]) == 0
    assert checkpoint.damage(last) is None and len(read_jsonl(folder / "metrics.jsonl")) == len(metrics)
    evaluate.main([str(folder), "--test-time"])
    sample.main([str(folder), "--device", DEVICE, "--progress"])
    assert "J " in capsys.readouterr().out


@pytest.mark.parametrize("most_rows", [8, 8192])
def test_a_recorded_step_has_the_bits_of_the_step(model, task, monkeypatch, most_rows):
    """CUDA graphs replayed while slots are refilled, against every kernel launched by itself; and they keep no memory."""
    monkeypatch.setitem(sampler.MOST_ROWS, "cuda", most_rows)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    # Not the graph itself: one that is kept here keeps its memory.
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))

    def sampled() -> list[Tensor]:
        run, problems = load_config(TINY), task.problems("train", 16, 0)
        samples = roll_out(model, task, problems, 4, training_sampling(task, run), torch.Generator().manual_seed(0)).samples
        return [samples.tokens, samples.logprobs, samples.lengths, samples.stopped, samples.contexts.positions]

    recorded = [sampled() for _ in range(3)]
    assert len(replays) > 10
    held = torch.cuda.memory_reserved()
    for _ in range(10):
        sampled()
    assert torch.cuda.memory_reserved() <= held
    monkeypatch.setattr(Recording, "capture", lambda self: None)
    assert all(same_bits(sampled(), found) for found in recorded)


def test_interrupted_sampling_leaves_the_device_usable(model, task, monkeypatch):
    """Ctrl-C in the middle of a capture: what follows computes, and captures, as ever."""
    run, problems = load_config(TINY), task.problems("train", 16, 0)
    sample = lambda: roll_out(model, task, problems, 4, training_sampling(task, run), torch.Generator().manual_seed(0)).samples
    expected, decode, calls = sample(), sampler.decode, []

    def interrupted(*arguments):
        decode(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sampler, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample()
    monkeypatch.setattr(sampler, "decode", decode)
    assert same_bits([expected.tokens, expected.logprobs], [(again := sample()).tokens, again.logprobs])


def test_the_trainer_scores_what_refilled_slots_drew(model, task, monkeypatch):
    """64 rows in eight slots, with suffixes of different lengths side by side."""
    monkeypatch.setitem(sampler.MOST_ROWS, "cuda", 8)
    difference = rescored(model, task, 3)
    assert difference.mean() <= 0.01 and difference.quantile(0.99) <= 0.1
