"""Fused causal attention over packed sequences, forward and backward: the Triton twin of `reference.attention`.

The (T,T) scores never leave the chip. A program owns one tile of queries and walks over the keys with an *online softmax*:
for a row of scaled scores s, its running maximum m, normaliser l and output o absorb one tile of keys after the other,

    (1) m' = max(m, max_n s_n)
    (2) l' = 2^(m-m') l + sum_n 2^(s_n-m')
    (3) o' = 2^(m-m') o + sum_n 2^(s_n-m') v_n        at the end: out = o / l, and lse = m + log2 l is kept

Backward recomputes p = 2^(s-lse) instead of storing it. out = P V, so dP = dO Vᵀ (ᵀ transposes); the softmax's Jacobian takes
away the mean. dS is the gradient of QKᵀ/sqrt(D), which is s ln 2:

    (4) delta = sum_n p_n dp_n = dO · out              one number per query: the sum over keys is not needed
    (5) dS = P ∘ (dP - delta)
    (6) dQ = dS K / sqrt(D)        (7) dV = Pᵀ dO        (8) dK = dSᵀ Q / sqrt(D)

(6) sums over keys and (7, 8) over queries, so they are two kernels with opposite loops. Each tile of a result has one owner
that adds in a fixed order: no atomics, the same bits on every run. Tiles start where their sequence starts, so a sequence's
bits do not depend on its neighbours in the pack either:

      keys:    0   1   2   3
    queries 0 [x]  .   .   .     x  on the diagonal: masked, in BM/BN tiles; rows past the sequence's end are read as zeros
            1 [o]  x   .   .     o  wholly visible: no mask, and on sm_90 and sm_100 the copy engine (TMA) loads it
            2 [o]  o   x   .     .  never visited
            3 [o]  o   o   x     [ ] a column, which a program of dK and dV walks down; forward and dQ walk along a row. The
                                 end may cut its last queries off: those are read like x

Scores carry log2(e) / sqrt(D), because the hardware computes 2^x and not e^x. On sm_90 at D 128 this saves 29 % of the forward
loop's instructions, unmasked tiles 30 %, the copy engine 11 % (at D 64 it adds to the loop of dK and dV: 334, not 314; NOTES.md,
what each trick buys). Left out: dropout, biases, windows.
Dimension key: N packed tokens, H query heads, K key/value heads, G = H/K, D head dim; BM queries and BN keys in a tile.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.hardware import LN2, LOG2E, descriptor, tiles_for

# --- Device code ---


@triton.jit
def load_rows(x, row, end, column, ROWS: tl.constexpr, D: tl.constexpr, GUARD: tl.constexpr):
    """(ROWS,D) of one head of x = (pointer, row stride, descriptor or None). GUARD reads rows from `end` on as zeros: they
    are another sequence's, or nobody's, and not even finite perhaps."""
    if GUARD or x[2] is None:
        rows = row + tl.arange(0, ROWS)
        where = x[0] + rows[:, None].to(tl.int64) * x[1] + (column + tl.arange(0, D))[None, :]
        if GUARD:
            tile = tl.load(where, mask=(rows < end)[:, None], other=0.0)
        else:
            tile = tl.load(where)
    else:
        tile = x[2].load([row, column])
    return tile


@triton.jit
def load_numbers(x, row, end, other, ROWS: tl.constexpr, GUARD: tl.constexpr):
    """(ROWS,) of x, one number per row; GUARD reads `other` from `end` on."""
    where = x + row + tl.arange(0, ROWS)  # one address and offsets: Triton 3.6 keeps ROWS of them for x + (row + …)
    if GUARD:
        tile = tl.load(where, mask=row + tl.arange(0, ROWS) < end, other=other)
    else:
        tile = tl.load(where)
    return tile


@triton.jit
def store_rows(pointer, stride, row, end, column, tile, ROWS: tl.constexpr, D: tl.constexpr):
    rows = row + tl.arange(0, ROWS)
    where = pointer + rows[:, None].to(tl.int64) * stride + (column + tl.arange(0, D))[None, :]
    tl.store(where, tile.to(pointer.dtype.element_ty), mask=(rows < end)[:, None])


@triton.jit
def bounds(cu_seqlens):
    """Where this program's sequence starts and ends. The grid has one more than the pack: an empty one behind the last."""
    b, B = tl.program_id(1), tl.num_programs(1) - 1
    return tl.load(cu_seqlens + b).to(tl.int32), tl.load(cu_seqlens + min(b + 1, B)).to(tl.int32)


@triton.jit
def clear_tail(pointer, stride, row, N, column, ROWS: tl.constexpr, D: tl.constexpr):
    """Zeros from `row` on, by the programs of the empty sequence: nobody else writes to tokens behind the last one."""
    if tl.program_id(1) == tl.num_programs(1) - 1:
        for first in tl.range(row + tl.program_id(2) * ROWS, N, tl.num_programs(2) * ROWS):
            store_rows(pointer, stride, first, N, column, tl.zeros([ROWS, D], tl.float32), ROWS, D)


@triton.jit
def absorb(m, l, o, q, k, v, first, key, end, column, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
           DIAGONAL: tl.constexpr):
    """One tile of keys into the running softmax of a tile of queries."""
    tile_k = load_rows(k, key, end, column, BN, D, DIAGONAL)
    s = tl.dot(q, tile_k.T, input_precision="ieee")  # (BM,BN), not scaled yet: the exponent's multiply-add does it
    if DIAGONAL:
        s = tl.where((key + tl.arange(0, BN))[None, :] <= (first + tl.arange(0, BM))[:, None], s, -1e30)
    m_new = tl.maximum(m, tl.max(s, 1) * scale)  # (1)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)  # (2)
    tile_v = load_rows(v, key, end, column, BN, D, DIAGONAL)
    o = tl.dot(p.to(tile_v.dtype), tile_v, o * shrink[:, None], input_precision="ieee")  # (3)
    return m_new, l, o


@triton.jit(do_not_specialize=["N"])
def forward_kernel(q, k, v, k_desc, v_desc, out, lse, cu_seqlens, q_stride, k_stride, v_stride, N, scale,
                   G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    head, H = tl.program_id(0), tl.num_programs(0)
    start, end = bounds(cu_seqlens)
    first = start + (tl.num_programs(2) - 1 - tl.program_id(2)) * BM  # longest rows first: .4 % idle, not 6
    if first >= end:
        clear_tail(out, H * D, end, N, head * D, BM, D)
        return
    k_rows, v_rows, column = (k, k_stride, k_desc), (v, v_stride, v_desc), head // G * D
    tile = load_rows((q, q_stride, None), first, end, head * D, BM, D, True)
    # -1e30 and not -inf: the difference of two infinities is no number. Not 0: it would bury very negative scores.
    m, l, o = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    for key in tl.range(start, first, BN):
        m, l, o = absorb(m, l, o, tile, k_rows, v_rows, first, key, end, column, scale, BM, BN, D, False)
    for key in tl.range(first, min(first + BM, end), BN, num_stages=1):
        m, l, o = absorb(m, l, o, tile, k_rows, v_rows, first, key, end, column, scale, BM, BN, D, True)
    store_rows(out, H * D, first, end, head * D, o / l[:, None], BM, D)
    queries = first + tl.arange(0, BM)
    tl.store(lse + head.to(tl.int64) * N + queries, m + tl.log2(l), mask=queries < end)


@triton.jit
def add_dq(dq, q, grad, lse, delta, k, v, first, key, end, column, scale, BM: tl.constexpr, BN: tl.constexpr,
           D: tl.constexpr, DIAGONAL: tl.constexpr):
    """What one tile of keys adds to the dQ of a tile of queries."""
    tile_k = load_rows(k, key, end, column, BN, D, DIAGONAL)
    tile_v = load_rows(v, key, end, column, BN, D, DIAGONAL)
    p = tl.exp2(tl.dot(q, tile_k.T, input_precision="ieee") * scale - lse[:, None])  # (BM,BN)
    if DIAGONAL:
        p = tl.where((key + tl.arange(0, BN))[None, :] <= (first + tl.arange(0, BM))[:, None], p, 0.0)
    ds = p * (tl.dot(grad, tile_v.T, input_precision="ieee") - delta[:, None])  # (5)
    return tl.dot(ds.to(tile_k.dtype), tile_k, dq, input_precision="ieee")  # (6)


@triton.jit(do_not_specialize=["N"])
def dq_kernel(q, k, v, k_desc, v_desc, out, grad, lse, delta, dq, cu_seqlens, q_stride, k_stride, v_stride, N, scale,
              G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dQ, along a row as in the forward pass; writes delta (4) on the way, for the other kernel."""
    head, H = tl.program_id(0), tl.num_programs(0)
    start, end = bounds(cu_seqlens)
    first = start + (tl.num_programs(2) - 1 - tl.program_id(2)) * BM
    if first >= end:
        clear_tail(dq, H * D, end, N, head * D, BM, D)
        return
    k_rows, v_rows, column = (k, k_stride, k_desc), (v, v_stride, v_desc), head // G * D
    queries, of_head = first + tl.arange(0, BM), head.to(tl.int64) * N
    tile_grad = load_rows((grad, H * D, None), first, end, head * D, BM, D, True)
    tile_out = load_rows((out, H * D, None), first, end, head * D, BM, D, True)
    tile_delta = tl.sum(tile_grad.to(tl.float32) * tile_out.to(tl.float32), 1)  # (4)
    tl.store(delta + of_head + queries, tile_delta, mask=queries < end)
    tile_lse = tl.load(lse + of_head + queries, mask=queries < end, other=float("inf"))  # past the end: p = 0
    tile = load_rows((q, q_stride, None), first, end, head * D, BM, D, True)
    tile_dq = tl.zeros([BM, D], tl.float32)
    for key in tl.range(start, first, BN):
        tile_dq = add_dq(tile_dq, tile, tile_grad, tile_lse, tile_delta, k_rows, v_rows, first, key, end, column, scale,
                         BM, BN, D, False)
    for key in tl.range(first, min(first + BM, end), BN, num_stages=1):
        tile_dq = add_dq(tile_dq, tile, tile_grad, tile_lse, tile_delta, k_rows, v_rows, first, key, end, column, scale,
                         BM, BN, D, True)
    store_rows(dq, H * D, first, end, head * D, tile_dq * (scale * LN2), BM, D)  # scale is log2(e) / sqrt(D)


@triton.jit
def add_dkdv(dk, dv, k, v, q, grad, lse, delta, first, query, end, column, scale, BM: tl.constexpr, BN: tl.constexpr,
             D: tl.constexpr, EDGE: tl.constexpr):
    """What one tile of queries adds to the dK and dV of a tile of keys. Scores stand transposed here: (BN,BM)."""
    tile_q = load_rows(q, query, end, column, BM, D, EDGE)
    tile_grad = load_rows(grad, query, end, column, BM, D, EDGE)
    tile_lse = load_numbers(lse, query, end, float("inf"), BM, EDGE)  # past the end: p = 0
    p = tl.exp2(tl.dot(k, tile_q.T, input_precision="ieee") * scale - tile_lse[None, :])  # (BN,BM)
    if EDGE:
        p = tl.where((first + tl.arange(0, BN))[:, None] <= (query + tl.arange(0, BM))[None, :], p, 0.0)
    dv = tl.dot(p.to(tile_grad.dtype), tile_grad, dv, input_precision="ieee")  # (7)
    tile_delta = load_numbers(delta, query, end, 0.0, BM, EDGE)  # late: p needs the registers until here
    ds = p * (tl.dot(v, tile_grad.T, input_precision="ieee") - tile_delta[None, :])  # (5)
    dk = tl.dot(ds.to(tile_q.dtype), tile_q, dk, input_precision="ieee")  # (8)
    return dk, dv


@triton.jit(do_not_specialize=["N"])
def dkdv_kernel(q, k, v, q_desc, grad_desc, grad, lse, delta, dk, dv, cu_seqlens, q_stride, k_stride, v_stride, N, scale,
                G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dK and dV of a tile of keys: down its column, for each of the G query heads that share it."""
    shared, K = tl.program_id(0), tl.num_programs(0)
    start, end = bounds(cu_seqlens)
    first = start + tl.program_id(2) * BN  # the first tiles are seen by most queries: they go first
    if first >= end:
        clear_tail(dk, K * D, end, N, shared * D, BN, D)
        clear_tail(dv, K * D, end, N, shared * D, BN, D)
        return
    q_rows, grad_rows = (q, q_stride, q_desc), (grad, K * G * D, grad_desc)
    tile_k = load_rows((k, k_stride, None), first, end, shared * D, BN, D, True)
    tile_v = load_rows((v, v_stride, None), first, end, shared * D, BN, D, True)
    tile_dk, tile_dv = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    below = first + BN  # queries from here on see every key of this tile
    whole = max(below, first + (end - first) // BM * BM)  # and from here on their tile is cut off by the end
    for g in range(G):
        head = shared * G + g
        h_lse, h_delta, column = lse + head.to(tl.int64) * N, delta + head.to(tl.int64) * N, head * D
        for query in tl.range(first, min(below, end), BM, num_stages=1):
            tile_dk, tile_dv = add_dkdv(tile_dk, tile_dv, tile_k, tile_v, q_rows, grad_rows, h_lse, h_delta, first, query, end,
                                        column, scale, BM, BN, D, True)
        for query in tl.range(below, whole, BM):
            tile_dk, tile_dv = add_dkdv(tile_dk, tile_dv, tile_k, tile_v, q_rows, grad_rows, h_lse, h_delta, first, query, end,
                                        column, scale, BM, BN, D, False)
        for query in tl.range(whole, end, BM, num_stages=1):
            tile_dk, tile_dv = add_dkdv(tile_dk, tile_dv, tile_k, tile_v, q_rows, grad_rows, h_lse, h_delta, first, query, end,
                                        column, scale, BM, BN, D, True)
    store_rows(dk, K * D, first, end, shared * D, tile_dk * (scale * LN2), BN, D)
    store_rows(dv, K * D, first, end, shared * D, tile_dv, BN, D)


# --- Host code ---

LONGEST = 65_535 * 16  # tokens that the tiles of a grid's third axis reach: none has fewer than 16 rows


class Tile(NamedTuple):
    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By kernel and head dim: the largest tiles found that spill no register on what they are for; tests/compiled.py compiles all. BN
# divides BM in the kernels that walk along a row, and BM divides BN in the one that walks down a column.
TILES = {
    "hopper": {  # 16 bit, 227 KiB of shared memory for a program: sm_90
        "forward": {16: (128, 128, 8, 2), 32: (128, 128, 8, 2), 64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        "dq": {16: (128, 64, 8, 2), 32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 16, 8, 2)},
        "dkdv": {16: (64, 128, 8, 2), 32: (64, 128, 8, 2), 64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 32, 8, 2)},
    },
    "narrow": {  # 16 bit, 99 KiB: everything else
        "forward": {16: (128, 64, 8, 2), 32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "dq": {16: (128, 32, 8, 2), 32: (128, 32, 8, 2), 64: (128, 32, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        "dkdv": {16: (32, 128, 8, 2), 32: (32, 128, 8, 2), 64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
    },
    "fp32": {  # exact products on the ordinary cores: for checks, not for speed. dq of head dim 256 spills in any tile
        "forward": {16: (64, 32, 8, 1), 32: (32, 32, 8, 1), 64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
        "dq": {16: (32, 16, 8, 1), 32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        "dkdv": {16: (32, 64, 8, 1), 32: (32, 32, 8, 2), 64: (16, 64, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
}
TILES["blackwell"] = {  # sm_100: two of those of sm_90 spill
    **TILES["hopper"], "dkdv": {**TILES["hopper"]["dkdv"], 16: (64, 128, 8, 3), 128: (32, 64, 8, 2)},
}


def tile_of(name: str, q: Tensor) -> Tile:
    return Tile(*TILES[tiles_for(q)][name][q.shape[2]])


def rows_of(x: Tensor) -> Tensor:
    """x (N,heads,D) with the heads of a token side by side and rows where the copy engine can find them; copied if not so."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    apart = x.stride(0) >= x.shape[1] * x.shape[2]  # expanded rows are not
    return x if aligned and apart and x.stride()[1:] == (x.shape[2], 1) else x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("nanomrt::attention", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                      scale: float) -> tuple[Tensor, Tensor]:
    """out (N,H,D) and lse (H,N), base 2, in fp32."""
    (N, H, D), K = q.shape, k.shape[1]
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    out, lse, tile = q.new_empty(N, H, D), q.new_empty(H, N, dtype=torch.float32), tile_of("forward", q)
    if N:
        forward_kernel[H, len(cu_seqlens), triton.cdiv(max_seqlen, tile.BM)](
            q, k, v, descriptor(k, tile.BN, D), descriptor(v, tile.BN, D), out, lse, cu_seqlens,
            q.stride(0), k.stride(0), v.stride(0), N, scale * LOG2E, G=H // K, D=D, **tile._asdict())
    return out, lse


@torch.library.custom_op("nanomrt::attention_backward", mutates_args=())
def attention_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, cu_seqlens: Tensor,
                       max_seqlen: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dQ (N,H,D), dK and dV (N,K,D)."""
    (N, H, D), K = q.shape, k.shape[1]
    q, k, v, grad = rows_of(q), rows_of(k), rows_of(v), rows_of(grad.contiguous())
    dq, dk, dv, delta = q.new_empty(N, H, D), k.new_empty(N, K, D), v.new_empty(N, K, D), torch.empty_like(lse)
    shared = (cu_seqlens, q.stride(0), k.stride(0), v.stride(0), N, scale * LOG2E)
    if N:
        tile = tile_of("dq", q)
        dq_kernel[H, len(cu_seqlens), triton.cdiv(max_seqlen, tile.BM)](
            q, k, v, descriptor(k, tile.BN, D), descriptor(v, tile.BN, D), out, grad, lse, delta, dq, *shared,
            G=H // K, D=D, **tile._asdict())
        tile = tile_of("dkdv", q)
        dkdv_kernel[K, len(cu_seqlens), triton.cdiv(max_seqlen, tile.BN)](
            q, k, v, descriptor(q, tile.BM, D), descriptor(grad, tile.BM, D), grad, lse, delta, dk, dv, *shared,
            G=H // K, D=D, **tile._asdict())
    return dq, dk, dv


@attention_forward.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@attention_backward.register_fake
def _(q, k, v, out, lse, grad, cu_seqlens, max_seqlen, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # nobody differentiates lse


def _differentiate(ctx, grad, _):
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    gradients = attention_backward(q, k, v, out, lse, grad, cu_seqlens, ctx.max_seqlen, ctx.scale)
    return *gradients, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention inside each packed sequence. q (N,H,D), k and v (N,K,D), cu_seqlens (B+1,) -> (N,H,D).

    All of one type, fp16, bf16 or fp32; kernels/__init__.py says what cu_seqlens and max_seqlen have to be. A head dim that is no
    power of two is filled up with zeros, which costs a copy. Raises ValueError for other types, shapes that don't fit, more than
    65,534 sequences, one that may be longer than LONGEST, more tiles than a grid has, and a head dim over 256.
    """
    (N, H, D), K, B = q.shape, k.shape[1], len(cu_seqlens) - 1
    if H % K:
        raise ValueError(f"{H} query heads can't share {K} key/value heads: H must be a multiple of K")
    if not k.shape == v.shape == (N, K, D):
        raise ValueError(f"q {tuple(q.shape)} needs k and v ({N}, K, {D}), not {tuple(k.shape)} and {tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: cast them to one of float16, bfloat16 and float32")
    if D > 256:
        raise ValueError(f"head_dim={D} is over 256, the largest that the attention kernel has tiles for")
    if not 1 <= B <= 65_534:  # rows of a grid, but for the one behind them
        raise ValueError(f"{B} sequences in one pack, which holds 1 to 65,534: lower micro_batch_tokens")
    if max_seqlen > LONGEST or H * (B + 1) * triton.cdiv(max_seqlen, 16) >= 2**31:  # programs are counted in 32 bits
        raise ValueError(f"{B} sequences of max_seqlen={max_seqlen} are more tiles than a grid has: pass the longest length, "
                         f"up to {LONGEST}, or pack fewer")
    fill = max(16, triton.next_power_of_2(D)) - D
    if fill:
        q, k, v = (F.pad(x, (0, fill)) for x in (q, k, v))
    longest = max(max_seqlen, 1)  # a tail alone needs a program, too
    out, _ = attention_forward(q, k, v, cu_seqlens.contiguous(), longest, D**-0.5)
    return out[..., :D]
