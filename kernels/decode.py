"""Attention of one new token per row over a prefix that rows share and a suffix of its own: the Triton twin of
`reference.branch_attention`.

Decoding is bound by memory: a query meets each cached key once, so the time is the time to read the cache. Two things help. The
branches of a segment are served together, so that 16 forks of one trace read it once and not 16 times: 2.9 times as fast as SDPA
without sharing (H100, 64 prefixes of 4096 entries, suffixes of 256). And the keys are cut into chunks of CHUNK entries, so that
few rows still fill a GPU. A program takes one chunk of one segment for a tile of its (branch, head) pairs and keeps, as in
`kernels/attention.py`,

    (1) lse_c = log2 sum_n 2^(s_n)        (2) out_c = sum_n 2^(s_n - lse_c) v_n        over the entries n that the row sees

A second kernel joins a row's chunks, prefix first, from the first to the last:

    (3) out = sum_c 2^(lse_c - lse) out_c,   lse = log2 sum_c 2^(lse_c)

       segment s      |  chunk 0  |  chunk 1  |        row r's suffix     |  chunk 0  |
    branch 0, head 0  | o o o o o | o o . . . |        head 0             | o o o     |     o seen, . hidden: a branch that
    branch 0, head 1  | o o o o o | o o . . . |        head 1             | o o o     |     left its segment early sees less
    branch 1, head 0  | o o o . . | . . . . . |

A chunk of which a row sees nothing has lse -1e30 and so the weight 0, exactly. Chunks and tiles do not depend on the batch, so a
row's bits don't either. A suffix is a segment that one branch uses and that ends at a length of its own: the same kernel serves
both.
Dimension key: R rows, S segments, M branches of a segment, L entries, H query heads, K key/value heads, G = H/K, D head dim;
BR (branch, head) pairs and BN entries in a tile, BD is D filled up to a power of two.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hardware import LOG2E

CHUNK = 512  # entries; fixed, or a row's bits would depend on the batch
NOWHERE = tl.constexpr(2**30)  # a position that nobody sees


# --- Device code ---


@triton.jit(do_not_specialize=["M", "L", "R", "first_part"])
def chunk_kernel(q, k, v, positions, limits, group, length, part_out, part_lse, stride_s, stride_k, stride_l, M, L, R, first_part,
                 scale, G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
                 BR: tl.constexpr, BN: tl.constexpr):
    """(1) and (2) of one chunk of a segment's key/value head, for BR of its (branch, head) pairs."""
    tiles = tl.cdiv(G if group is None else M * G, BR)  # those of one chunk run together, and find it in the L2 cache
    chunk = tl.program_id(1)
    of_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    segment, shared = of_head // K, of_head % K
    pair, d = tile * BR + tl.arange(0, BR), tl.arange(0, BD)
    branch, head, real = segment * M + pair // G, shared * G + pair % G, pair < M * G
    if group is None:
        row = branch  # a suffix: its segment's only branch
        end = min(chunk * CHUNK + CHUNK, tl.load(length + segment).to(tl.int32))
    else:
        row = tl.load(group + branch, mask=real, other=0).to(tl.int32)
        limit = tl.load(limits + branch, mask=real, other=-1)
        real &= limit >= 0  # a place without a branch names some row, too
        positions += segment.to(tl.int64) * L
        whole = chunk * CHUNK + tl.arange(0, CHUNK)
        seen_by_any = tl.load(positions + whole, mask=whole < L, other=NOWHERE) < tl.max(limit, 0)
        end = tl.max(tl.where(seen_by_any, whole + 1, 0), 0)  # what lies behind it is read for nobody
    tile_q = tl.load(q + (row * (K * G) + head)[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    m, l, o = tl.full([BR], -1e30, tl.float32), tl.zeros([BR], tl.float32), tl.zeros([BR, BD], tl.float32)
    first = segment.to(tl.int64) * stride_s + shared.to(tl.int64) * stride_k
    for n in tl.range(chunk * CHUNK, end, BN):
        entry = n + tl.arange(0, BN)
        where, inside = first + entry[:, None].to(tl.int64) * stride_l + d[None, :], (entry < end)[:, None] & (d < D)[None, :]
        tile_k = tl.load(k + where, mask=inside, other=0.0)
        if group is None:
            seen = (entry < end)[None, :]
        else:
            seen = tl.load(positions + entry, mask=entry < end, other=NOWHERE)[None, :] < limit[:, None]
        s = tl.where(seen, tl.dot(tile_q, tile_k.T, input_precision="ieee") * scale, -1e30)  # (BR,BN)
        m_new = tl.maximum(m, tl.max(s, 1))
        p, shrink = tl.exp2(s - m_new[:, None]), tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        tile_v = tl.load(v + where, mask=inside, other=0.0)
        o = tl.dot(p.to(tile_v.dtype), tile_v, o * shrink[:, None], input_precision="ieee")
        m = m_new
    l = tl.maximum(l, 1e-30)  # nothing was read
    part = ((first_part + chunk).to(tl.int64) * R + row) * (K * G) + head
    tl.store(part_lse + part, m + tl.log2(l), mask=real)  # (1)
    tl.store(part_out + part[:, None] * D + d[None, :], o / l[:, None], mask=real[:, None] & (d < D)[None, :])  # (2)


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(part_out, part_lse, out, parts, D: tl.constexpr, BD: tl.constexpr):
    """(3) for one head of one row."""
    R, H = tl.num_programs(0), tl.num_programs(1)
    here, d = tl.program_id(0).to(tl.int64) * H + tl.program_id(1), tl.arange(0, BD)
    m, l, o = tl.full([1], -1e30, tl.float32), tl.zeros([1], tl.float32), tl.zeros([BD], tl.float32)
    for part in range(parts):
        place = here + part * (R * H).to(tl.int64)
        lse = tl.load(part_lse + place)
        m_new = tl.maximum(m, lse)
        shrink, weight = tl.exp2(m - m_new), tl.exp2(lse - m_new)
        o = o * shrink + weight * tl.load(part_out + place * D + d, mask=d < D, other=0.0)
        l = l * shrink + weight
        m = m_new
    tl.store(out + here * D + d, (o / l).to(out.dtype.element_ty), mask=d < D)


# --- Host code ---


class Tile(NamedTuple):
    BR: int
    BN: int
    num_warps: int
    num_stages: int


def tile_of(q: Tensor, shared: bool) -> Tile:
    """Many rows meet a shared prefix, G rows a suffix. The largest tiles found that spill no register on sm_80, sm_90 and sm_100;
    tests/compiled.py compiles them."""
    if q.dtype == torch.float32:
        return Tile(16, 16, 8 if shared else 4, 1)
    wide = q.shape[2] > 128
    return Tile(64, 64, 8, 2) if shared and not wide else Tile(16, 32 if wide else 64, 4, 2)


def check(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, positions: Tensor, limit: Tensor, group: Tensor, place: Tensor,
          suffix_k: Tensor, suffix_v: Tensor, length: Tensor) -> None:
    """Raises ValueError for what the kernels would misread."""
    (R, H, D), (S, K, L, _), M, t = q.shape, prefix_k.shape, group.shape[1], suffix_k.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads can't share {K} key/value heads: H must be a multiple of K")
    if D > 256:
        raise ValueError(f"head_dim={D} is over 256, the largest that the decoding kernel has tiles for")
    for name, x, shape in (("prefix_k", prefix_k, (S, K, L, D)), ("prefix_v", prefix_v, (S, K, L, D)),
                           ("positions", positions, (S, L)), ("limit", limit, (S, M)), ("group", group, (S, M)),
                           ("place", place, (R,)),
                           ("suffix_k", suffix_k, (R, K, t, D)), ("suffix_v", suffix_v, (R, K, t, D)), ("length", length, (R,))):
        if x.shape != shape:
            raise ValueError(f"q {tuple(q.shape)} and prefix_k {tuple(prefix_k.shape)} need {name} {shape}, not {tuple(x.shape)}")


def alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v (·,K,·,D) with each value where its key is, and its D numbers side by side; copied if they lie otherwise."""
    return (k, v) if k.stride() == v.stride() and k.stride(3) == 1 else (k.contiguous(), v.contiguous())


def branch_attention(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, positions: Tensor, limit: Tensor, group: Tensor,
                     place: Tensor, suffix_k: Tensor, suffix_v: Tensor, length: Tensor) -> Tensor:
    """One new token per row against the prefix it shares and the suffix it owns. q (R,H,D) -> (R,H,D); no gradient.

    prefix_k, prefix_v (S,K,L,D), positions (S,L), limit and group (S,M), place (R,), suffix_k, suffix_v (R,K,t,D), length
    (R,): see `reference`, which alone reads `place`. Raises ValueError for shapes that don't fit and a head dim over 256.
    """
    check(q, prefix_k, prefix_v, positions, limit, group, place, suffix_k, suffix_v, length)
    (R, H, D), (S, K, L, _), M, t = q.shape, prefix_k.shape, group.shape[1], suffix_k.shape[2]
    prefix_parts, suffix_parts = triton.cdiv(L, CHUNK), triton.cdiv(t, CHUNK)
    part_out, part_lse = (torch.empty(prefix_parts + suffix_parts, R, H, *size, dtype=torch.float32, device=q.device)
                          for size in ((D,), ()))
    (prefix_k, prefix_v), (suffix_k, suffix_v) = alike(prefix_k, prefix_v), alike(suffix_k, suffix_v)
    q, out, BD = q.contiguous(), q.new_empty(R, H, D), max(16, triton.next_power_of_2(D))
    constants = dict(scale=D**-0.5 * LOG2E, G=H // K, K=K, D=D, BD=BD, CHUNK=CHUNK)
    if prefix_parts:
        tile = tile_of(q, shared=True)
        chunk_kernel[S * K * triton.cdiv(M * H // K, tile.BR), prefix_parts](
            q, prefix_k, prefix_v, positions.contiguous(), limit.contiguous(), group.contiguous(), None, part_out, part_lse,
            *prefix_k.stride()[:3], M, L, R, 0, **constants, **tile._asdict())
    tile = tile_of(q, shared=False)
    chunk_kernel[R * K * triton.cdiv(H // K, tile.BR), suffix_parts](
        q, suffix_k, suffix_v, None, None, None, length.contiguous(), part_out, part_lse, *suffix_k.stride()[:3], 1, t, R,
        prefix_parts, **constants, **tile._asdict())
    merge_kernel[R, H](part_out, part_lse, out, prefix_parts + suffix_parts, D=D, BD=BD, num_warps=1)
    return out
