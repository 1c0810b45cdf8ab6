"""log p(target) and entropy of softmax(hidden @ weight.mT / T), T the temperature, without ever storing the logits: the Triton
twin of `reference.token_logprobs`.

With 16k tokens and a vocabulary of 152k the logits would take 10 GB in fp32. Forward computes them tile by tile and keeps four
numbers per token. In base 2, z = (hidden · w) log2(e) / T, over one tile of the vocabulary after the other:

    (1) m' = max(m, max_v z_v)                             running maximum
    (2) l' = 2^(m-m') l + sum_v 2^(z_v-m')                 normaliser
    (3) t' = 2^(m-m') (t + (m-m') l) + sum_v 2^(z_v-m') (z_v-m')
                                                           sum of p log p, from m: the entropy of logits around 80 is as exact as
                                                           around 0 (1.3e-6), where sum p z - m would be off by 1.9e-5
    (4) log2 p(y) = z_y - m - log2 l          (5) entropy = log2 l - t/l          both times ln 2

The vocabulary is cut into SPLITS parts, so that 2,112 rows fill the 132 multiprocessors of an H100, and not 16,896;
`merge_kernel` joins the parts in their order. Neither depends on how many rows there are, so a row's bits don't either.

Backward, for upstream gradients g of log p and e of the entropy, recomputes the logits of one chunk of the vocabulary at a time:

    (6) dz_v = (g [v=y] - p_v (g + e (ln p_v + entropy))) / T       the gradient of hidden · w_v
    (7) dhidden = sum over chunks of dz @ weight[chunk]    (8) dweight[chunk] = dzᵀ @ hidden

(6) is written in the precision of the inputs, b bytes a number; (7) and (8) are library products in fp32. Neither dz, (N,chunk),
nor the product of (8), (chunk,C), takes more than WORKSPACE bytes, unless 256 tokens do:

    (9) chunk = WORKSPACE / max(b N, 4 C)                  in steps of 256

   vocabulary  |  split 0  |  split 1  |  …      forward: a program owns BM rows of one split and walks to the right
    rows   BM  [o o o o o] [o o o o o]           o: one BM x BV tile of logits, C/BK products deep, gone once absorbed
           BM  [o o o o o] [o o o o o]           programs that run together share a column: the weight is read once

`token_loss` is the one-pass mode: a policy-gradient loss is a function of each token's log p alone, so g and e are known as soon
as a few thousand tokens have theirs. It keeps those tokens' logits (in fp16: bf16 would cost 4 % of p at |z| = 20), turns them
into dz in place and multiplies on: 6 N V C operations instead of 8, for 6 % less time on an H100 (N 16,384, C 1536, V 151,936,
2,048 tokens at a time; this WORKSPACE has room for 1,664, whose 104 programs leave a fifth of an H100 idle). Training doesn't use
it: `train.update` makes its loss of the log-probs that `token_logprobs` returns, on any device, and has none to hand in.

Left out: bias, soft capping, label smoothing. Dimension key: N rows, C width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.hardware import LN2, LOG2E, descriptor, tiles_for

SPLITS = 8  # of the vocabulary; fixed, or a row's bits would depend on the batch
WORKSPACE = 512 * 1024**2  # bytes of a temporary: dz or stored logits, and the fp32 product of (8)
ONE_PASS_ROWS = 2048  # tokens whose logits are kept until their loss is known; fewer if these take more than WORKSPACE


# --- Device code ---


@triton.jit
def load_tile(x, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS,COLUMNS) of the matrix x = (pointer, row stride, descriptor or None); zeros outside of (rows,columns)."""
    if x[2] is None:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        where = x[0] + r[:, None].to(tl.int64) * x[1] + c[None, :]
        tile = tl.load(where, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    else:
        tile = x[2].load([row, column])
    return tile


@triton.jit
def logits_tile(hidden, weight, row, token, N, V, C, scale, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """(BM,BV) logits in base 2, accumulated in fp32."""
    z = tl.zeros([BM, BV], tl.float32)
    for k in tl.range(0, C, BK):
        h = load_tile(hidden, row, k, N, C, BM, BK)
        w = load_tile(weight, token, k, V, C, BV, BK)
        z = tl.dot(h, w.T, z, input_precision="ieee")
    return z * scale


@triton.jit(do_not_specialize=["N"])
def forward_kernel(hidden, weight, h_desc, w_desc, targets, part_m, part_l, part_t, target_z, stored,
                   h_stride, w_stride, z_stride, N, V, C, scale, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """(1-3) of one split for BM rows, z of the targets that lie in it, and all of z where `stored` is a tensor."""
    row, split = tl.program_id(0) * BM, tl.program_id(1)
    h, w = (hidden, h_stride, h_desc), (weight, w_stride, w_desc)
    rows = row + tl.arange(0, BM)
    target = tl.load(targets + rows, mask=rows < N, other=-1)
    target = tl.where(target < V, target, -1)  # outside of the vocabulary: found nowhere
    width = tl.cdiv(tl.cdiv(V, BV), tl.num_programs(1)) * BV  # of a split
    m, l, t = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for token in range(split * width, min(split * width + width, V), BV):
        z = logits_tile(h, w, row, token, N, V, C, scale, BM, BV, BK)  # (BM,BV)
        tokens = token + tl.arange(0, BV)
        of_target = tl.sum(tl.where(tokens[None, :] == target[:, None], z, 0.0), 1)
        tl.store(target_z + rows, of_target, mask=(token <= target) & (target < token + BV))
        if stored is not None:
            place = stored + rows[:, None].to(tl.int64) * z_stride + tokens[None, :]
            tl.store(place, z.to(stored.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < V)[None, :])
        z = tl.where((tokens < V)[None, :], z, -1e30)
        m_new = tl.maximum(m, tl.max(z, 1))  # (1)
        z -= m_new[:, None]
        p, shrink = tl.exp2(z), tl.exp2(m - m_new)
        t = shrink * (t + (m - m_new) * l) + tl.sum(p * z, 1)  # (3)
        l = shrink * l + tl.sum(p, 1)  # (2)
        m = m_new
    part = split * N + rows
    tl.store(part_m + part, m, mask=rows < N)
    tl.store(part_l + part, l, mask=rows < N)
    tl.store(part_t + part, t, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def merge_kernel(part_m, part_l, part_t, target_z, logprob, entropy, lse, N, SPLITS: tl.constexpr, BM: tl.constexpr):
    """The splits joined by (1-3), from the first to the last; then (4) and (5)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    real = rows < N
    m, l, t = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for split in tl.static_range(SPLITS):
        part = split * N + rows
        m_part = tl.load(part_m + part, mask=real, other=0.0)
        l_part = tl.load(part_l + part, mask=real, other=1.0)
        t_part = tl.load(part_t + part, mask=real, other=0.0)
        m_new = tl.maximum(m, m_part)
        shrink, shrink_part = tl.exp2(m - m_new), tl.exp2(m_part - m_new)
        t = shrink * (t + (m - m_new) * l) + shrink_part * (t_part + (m_part - m_new) * l_part)
        l = shrink * l + shrink_part * l_part
        m = m_new
    z = tl.load(target_z + rows, mask=real, other=0.0)
    tl.store(logprob + rows, (z - m - tl.log2(l)) * LN2, mask=real)  # (4)
    tl.store(entropy + rows, (tl.log2(l) - t / l) * LN2, mask=real)  # (5)
    tl.store(lse + rows, m + tl.log2(l), mask=real)


@triton.jit(do_not_specialize=["N", "first"])
def dz_kernel(hidden, weight, h_desc, w_desc, targets, lse, entropy, g, e, dz, stored, h_stride, w_stride, dz_stride, z_stride,
              N, V, C, first, scale, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """(6) for BM rows and BV tokens, from `first` on; from z as it was stored, or computed once more."""
    row, token = tl.program_id(0) * BM, first + tl.program_id(1) * BV
    rows, tokens = row + tl.arange(0, BM), token + tl.arange(0, BV)
    real = rows < N
    inside = real[:, None] & (tokens < V)[None, :]
    if stored is None:
        z = logits_tile((hidden, h_stride, h_desc), (weight, w_stride, w_desc), row, token, N, V, C, scale, BM, BV, BK)
    else:
        z = tl.load(stored + rows[:, None].to(tl.int64) * z_stride + tokens[None, :], mask=inside, other=0.0).to(tl.float32)
    target = tl.load(targets + rows, mask=real, other=-1)
    known = (target >= 0) & (target < V)
    target = target.to(tl.int32)  # as tokens are, or each of them would widen
    row_lse = tl.load(lse + rows, mask=real, other=0.0)
    row_g, row_e = tl.load(g + rows, mask=real, other=0.0), tl.load(e + rows, mask=real, other=0.0)
    row_g = tl.where(known, row_g, float("nan"))  # log p of another target is no number, and neither is its gradient
    row_entropy = tl.load(entropy + rows, mask=real, other=0.0)
    log2_p = z - row_lse[:, None]
    d = -tl.exp2(log2_p) * (row_g[:, None] + row_e[:, None] * (log2_p * LN2 + row_entropy[:, None]))
    d += tl.where(tokens[None, :] == target[:, None], row_g[:, None], 0.0)
    place = dz + rows[:, None].to(tl.int64) * dz_stride + (tokens - first)[None, :]
    tl.store(place, (d * (scale * LN2)).to(dz.dtype.element_ty), mask=inside)  # scale · ln 2 = 1 / T


# --- Host code ---


class Tile(NamedTuple):
    BM: int
    BV: int
    BK: int
    num_warps: int
    num_stages: int


# The largest tiles found that spill no register; tests/compiled.py compiles every one of them.
TILES = {
    "hopper": Tile(128, 256, 64, 8, 3),  # 16 bit, 227 KiB of shared memory for a program
    "blackwell": Tile(128, 128, 64, 8, 4),  # the same; on sm_90, too, where z is stored as well
    "narrow": Tile(128, 128, 32, 8, 3),  # 16 bit, 99 KiB: everything else
    "fp32": Tile(64, 64, 16, 8, 1),  # exact products on the ordinary cores: for checks, not for speed
}
STORED = Tile(16, 256, 64, 4, 1)  # dz from stored logits: no products, only reading and writing


def tile_of(x: Tensor, stored: bool = False) -> Tile:
    table = tiles_for(x)
    return TILES["blackwell" if stored and table == "hopper" else table]


def check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError for what the kernels would misread."""
    (N, C), shapes = hidden.shape, (tuple(weight.shape), tuple(targets.shape))
    if shapes != ((len(weight), C), (N,)):
        raise ValueError(f"hidden ({N}, {C}) needs weight (V, {C}) and targets ({N},), not {shapes[0]} and {shapes[1]}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast both to one of float16, bfloat16 and float32")
    if targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype}: they number tokens, in int64")


def at_a_time(most: int, row_bytes: int, step: int) -> int:
    """Rows of a part, a multiple of `step`: as many as WORKSPACE holds, but at least one step and no more than `most` rows
    fill."""
    return max(min(WORKSPACE // row_bytes // step, triton.cdiv(most, step)), 1) * step


def matrix(x: Tensor) -> Tensor:
    """x with its rows where the copy engine can find them: 16 bytes apart, or a multiple of that; copied if they are not."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if aligned and x.stride(0) >= x.shape[1] and x.stride(1) == 1:  # expanded rows are not apart
        return x
    return x.new_empty(len(x), triton.cdiv(x.shape[1], 8) * 8)[:, : x.shape[1]].copy_(x)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):  # which would round the product of two fp32 matrices
        return a.float() @ b.float()


def statistics(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, stored: Tensor | None) -> list[Tensor]:
    """log p, entropy and log-sum-exp (base 2) of each row, (N,) fp32. Fills `stored` (N,V) with z, if it is given."""
    (N, C), V = hidden.shape, len(weight)
    fp32 = lambda *shape: torch.empty(shape, dtype=torch.float32, device=hidden.device)
    part_m, part_l, part_t = fp32(SPLITS, N), fp32(SPLITS, N), fp32(SPLITS, N)
    target_z = fp32(N).fill_(torch.nan)  # stays so for a target outside of the vocabulary
    logprob, entropy, lse = fp32(N), fp32(N), fp32(N)
    if N:
        tile = tile_of(hidden, stored is not None)
        forward_kernel[triton.cdiv(N, tile.BM), SPLITS](
            hidden, weight, descriptor(hidden, tile.BM, tile.BK), descriptor(weight, tile.BV, tile.BK), targets, part_m, part_l,
            part_t, target_z, stored, hidden.stride(0), weight.stride(0), 0 if stored is None else stored.stride(0), N, V, C,
            LOG2E / temperature, **tile._asdict())
        merge_kernel[triton.cdiv(N, 128),](part_m, part_l, part_t, target_z, logprob, entropy, lse, N, SPLITS=SPLITS, BM=128)
    return [logprob, entropy, lse]


def write_dz(dz: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor,
             temperature: float, first: int, stored: Tensor | None) -> None:
    """(6) for the tokens from `first` on, as many as dz (N,·) has columns; from `stored`, if it is given."""
    (N, C), V, tile = hidden.shape, len(weight), tile_of(hidden) if stored is None else STORED
    dz_kernel[triton.cdiv(N, tile.BM), triton.cdiv(dz.shape[1], tile.BV)](
        hidden, weight, descriptor(hidden, tile.BM, tile.BK), descriptor(weight, tile.BV, tile.BK), targets, lse, entropy, g, e,
        dz, stored, hidden.stride(0), weight.stride(0), dz.stride(0), 0 if stored is None else stored.stride(0), N, V, C, first,
        LOG2E / temperature, **tile._asdict())


# --- Two passes: backward computes the logits once more ---


@torch.library.custom_op("nanomrt::token_logprobs", mutates_args=())
def logprobs_forward(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p, entropy and log-sum-exp (base 2), (N,) fp32."""
    logprob, entropy, lse = statistics(matrix(hidden), matrix(weight), targets, temperature, None)
    return logprob, entropy, lse


@torch.library.custom_op("nanomrt::token_logprobs_backward", mutates_args=())
def logprobs_backward(hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor,
                      temperature: float, need_hidden: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """dhidden (N,C) and dweight (V,C); the one that nobody needs is left out, as a tensor of no rows."""
    (N, C), V = hidden.shape, len(weight)
    hidden, weight = matrix(hidden), matrix(weight)
    dhidden = torch.zeros((N if need_hidden else 0, C), dtype=torch.float32, device=hidden.device)
    dweight = weight.new_zeros(V if need_weight else 0, C)
    chunk = at_a_time(V, max(N * hidden.element_size(), 4 * C), 256)  # (9)
    workspace = hidden.new_empty(N, chunk)
    for first in range(0, V if N else 0, chunk):
        part = slice(first, min(first + chunk, V))
        dz = workspace[:, : part.stop - first]
        write_dz(dz, hidden, weight, targets, lse, entropy, g, e, temperature, first, None)
        if need_hidden:
            dhidden += product(dz, weight[part])  # (7)
        if need_weight:
            dweight[part] = product(dz.T, hidden)  # (8)
    return dhidden.to(hidden.dtype), dweight


@logprobs_forward.register_fake
def _(hidden, weight, targets, temperature):
    return tuple(hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))


@logprobs_backward.register_fake
def _(hidden, weight, targets, lse, entropy, g, e, temperature, need_hidden, need_weight):
    C = hidden.shape[1]
    return hidden.new_empty(len(hidden) if need_hidden else 0, C), weight.new_empty(len(weight) if need_weight else 0, C)


def _save(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    _, entropy, lse = output
    ctx.save_for_backward(*tensors, lse, entropy)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g, e, _):
    hidden, weight, targets, lse, entropy = ctx.saved_tensors
    g, e = (torch.zeros_like(lse) if x is None else x.contiguous() for x in (g, e))
    needs = ctx.needs_input_grad[:2]
    gradients = logprobs_backward(hidden, weight, targets, lse, entropy, g, e, ctx.temperature, *needs)
    return *(x if needed else None for x, needed in zip(gradients, needs)), None, None


logprobs_forward.register_autograd(_differentiate, setup_context=_save)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature), both (N,) in fp32.

    hidden (N,C) and weight (V,C) of one type, fp16, bf16 or fp32; targets (N,) int64. Raises ValueError for other types and
    shapes; log p of a target outside of the vocabulary is NaN, as is its gradient: an error would have to wait for the device.
    """
    check(hidden, weight, targets)
    logprob, entropy, _ = logprobs_forward(hidden, weight, targets.contiguous(), temperature)
    return logprob, entropy


# --- One pass: the loss is known while the logits are at hand ---

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]  # log p (n,), entropy (n,), which rows these are -> scalar


def token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, loss_of: TokenLoss) -> tuple[Tensor, ...]:
    """The sum of `loss_of` over parts of the rows, and each row's log p and entropy (N,), without gradient.

    Like `loss_of(*token_logprobs(…), slice(0, N))`, if that is a sum over tokens: each token's part may depend on its own log p
    and entropy only. It is called under autograd, once per ONE_PASS_ROWS tokens, or fewer if their logits wouldn't fit into
    WORKSPACE. The gradients of hidden and weight are complete when this returns.
    """
    check(hidden, weight, targets)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # then no gradient is needed, and none computed
    return _OnePass.apply(hidden, weight, targets.contiguous(), temperature, loss_of)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, loss_of):
        (N, C), V, (need_hidden, need_weight) = hidden.shape, len(weight), ctx.needs_input_grad[:2]
        dtype, h, w = hidden.dtype, matrix(hidden.detach()), matrix(weight.detach())
        dhidden = torch.empty((N if need_hidden else 0, C), dtype=dtype, device=h.device)
        dweight = torch.zeros((V if need_weight else 0, C), dtype=torch.float32, device=h.device)
        loss, logprob, entropy = (torch.zeros(size, dtype=torch.float32, device=h.device) for size in ((), N, N))
        half = torch.float32 if dtype == torch.float32 else torch.float16
        width = triton.cdiv(V, 16) * 16
        count = at_a_time(ONE_PASS_ROWS, width * half.itemsize, 128)
        buffer = torch.empty(min(N, count), width, dtype=half, device=h.device)
        for first in range(0, N, count):
            rows = slice(first, min(first + count, N))
            z = buffer[: rows.stop - first]
            logprob[rows], entropy[rows], lse = statistics(h[rows], w, targets[rows], temperature, z)
            with torch.enable_grad():
                p, s = logprob[rows].detach().requires_grad_(), entropy[rows].detach().requires_grad_()
                part = loss_of(p, s, rows)
                g, e = torch.autograd.grad(part, (p, s), materialize_grads=True)
            loss += part.detach()
            if not (need_hidden or need_weight):
                continue
            dz = z.view(dtype)[:, :V]  # in place: each number is read, then written over
            write_dz(dz, h[rows], w, targets[rows], lse, entropy[rows], g.contiguous(), e.contiguous(), temperature, 0, z)
            if need_hidden:
                dhidden[rows] = product(dz, w)  # (7)
            for columns in torch.arange(V).split(at_a_time(16_384, 4 * C, 256)) if need_weight else ():  # (8): fp32, in parts
                part = slice(int(columns[0]), int(columns[-1]) + 1)
                dweight[part] += product(dz[:, part].T, h[rows])
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        ctx.mark_non_differentiable(logprob, entropy)
        return loss, logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        dhidden, dweight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        return *(grad * x if needed else None for x, needed in zip((dhidden, dweight), needs)), None, None, None
