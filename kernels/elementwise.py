"""What lies between the matrix products: RMSNorm, rotary positions and SwiGLU, forward and backward. The Triton twins of
`reference.rms_norm`, `reference.rotate` and `reference.swiglu`.

None of them computes much; their time is that of the numbers which they move. PyTorch runs each as several kernels, and every one
writes a tensor that the next one reads again: 40 bytes for a rotated bf16 number where reading and writing it takes 4. Here each
is one kernel forward and one backward. All arithmetic is in fp32; results are rounded once.

RMSNorm of a row x of C numbers, with weight w, upstream gradient g, and sums and means over the row:

    (1) r = 1 / sqrt(mean x² + eps)     n = x r     y = n w
    (2) dx = r (g w - n mean(g w n))    as dr/dx_i = -r² n_i / C; but for eps, n's length is fixed: g w's part along n drops out
    (3) dw = sum over rows of g n

Rotation turns each pair (a, b) = (x_i, x_{i+D/2}) of a head by the angle of its position:

    (4) a' = a cos - b sin     b' = b cos + a sin     backward turns g by the angle's negative

SwiGLU of a gate and an input, with s = 1 / (1 + exp(-gate)):

    (5) y = gate s up
    (6) dgate = g up s (1 + gate (1 - s))     dup = g gate s

Backward computes r, n and s once more: they take no memory between the passes, and arithmetic is free here.

                 C numbers (or D/2 pairs)
    rows  ROWS [x x x x x x x x x x x x x]     a program owns ROWS whole rows, TILE numbers or one row: their sums stay in its
          ROWS [x x x x x x x x x x x x x]     registers. For (3) it walks down SPAN such tiles and leaves one partial sum;
               …                               PyTorch adds those up, always in one order.

Dimension key: N rows (of a rotation: tokens, with H rows each), C width, H heads, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers that four warps hold, 16 a thread: two loads of 16 bytes in 16 bit, and few registers
SPAN = 8  # tiles behind one partial sum of (3): enough programs to fill a GPU, few enough sums to add


# --- Device code ---


@triton.jit(do_not_specialize=["N"])
def rms_norm_kernel(x, weight, y, N, C, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(1) for ROWS rows."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place, inside = rows[:, None].to(tl.int64) * C + columns[None, :], (rows < N)[:, None] & (columns < C)[None, :]
    numbers = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(numbers * numbers, 1) / C + eps)
    tl.store(y + place, (numbers * r[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def rms_norm_backward_kernel(x, weight, g, dx, part, N, C, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """(2) for SPAN · ROWS rows, and their part of (3)."""
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
    dw = tl.zeros([COLUMNS], tl.float32)
    for tile in tl.range(SPAN):
        rows = (tl.program_id(0) * SPAN + tile) * ROWS + tl.arange(0, ROWS)
        place, inside = rows[:, None].to(tl.int64) * C + columns[None, :], (rows < N)[:, None] & (columns < C)[None, :]
        numbers = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        r = tl.where(rows < N, tl.rsqrt(tl.sum(numbers * numbers, 1) / C + eps), 0.0)  # infinite where eps is 0 and no row
        n, gw = numbers * r[:, None], upstream * w[None, :]
        along = tl.sum(gw * n, 1) / C
        tl.store(dx + place, ((gw - n * along[:, None]) * r[:, None]).to(dx.dtype.element_ty), mask=inside)  # (2)
        dw += tl.sum(upstream * n, 0)  # (3)
    tl.store(part + tl.program_id(0).to(tl.int64) * C + columns, dw, mask=columns < C)


@triton.jit(do_not_specialize=["rows_in_all"])
def rotate_kernel(x, cos, sin, y, rows_in_all, H, D, cos_stride, sin_stride,
                  SIGN: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """(4) for ROWS heads, of whichever tokens; SIGN -1 turns back."""
    rows, pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAIRS)
    half = D // 2
    inside = (rows < rows_in_all)[:, None] & (pair < half)[None, :]
    place = rows[:, None].to(tl.int64) * D + pair[None, :]
    token = (rows // H)[:, None].to(tl.int64)
    c = tl.load(cos + token * cos_stride + pair[None, :], mask=inside, other=0.0)
    s = tl.load(sin + half + token * sin_stride + pair[None, :], mask=inside, other=0.0) * SIGN  # the first half is negative
    a = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + half + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + half + place, (b * c + a * s).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate, up, y, size, BLOCK: tl.constexpr):
    """(5) for BLOCK numbers. Sizes that 16 divides have a binary of their own, which moves 16 bytes at a time."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    a = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(gate, up, g, dgate, dup, size, BLOCK: tl.constexpr):
    """(6) for BLOCK numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    a = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(dgate + place, (upstream * b * s * (1 + a * (1 - s))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + place, (upstream * a * s).to(dup.dtype.element_ty), mask=inside)


# --- Host code ---


def tile_of(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile for rows of this width, and the warps that hold it. The backward pass of a norm wider
    than 8,192 has more than their registers: it spills."""
    columns = triton.next_power_of_2(width)
    return max(TILE // columns, 1), columns, min(max(4 * columns // TILE, 4), 16)


@torch.library.custom_op("nanomrt::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """(1): x (…,C) over the root of its mean square, times weight (C,); computed in fp32, returned in `dtype`."""
    if x.shape[-1] != len(weight):
        raise ValueError(f"x {tuple(x.shape)} has rows of {x.shape[-1]} numbers, but there are {len(weight)} weights")
    x, weight, C = x.contiguous(), weight.contiguous(), len(weight)
    y, N = torch.empty_like(x, dtype=dtype), x.numel() // C
    rows, columns, warps = tile_of(C)
    if N:
        rms_norm_kernel[triton.cdiv(N, rows),](x, weight, y, N, C, eps, ROWS=rows, COLUMNS=columns, num_warps=warps)
    return y


@torch.library.custom_op("nanomrt::rms_norm_backward", mutates_args=())
def rms_norm_backward(x: Tensor, weight: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(2) and (3): the gradients of x and weight."""
    x, weight, g, C = x.contiguous(), weight.contiguous(), g.contiguous(), len(weight)
    dx, N = torch.empty_like(x), x.numel() // C
    rows, columns, warps = tile_of(C)
    part = torch.empty(triton.cdiv(N, rows * SPAN), C, dtype=torch.float32, device=x.device)
    if N:
        rms_norm_backward_kernel[len(part),](x, weight, g, dx, part, N, C, eps, ROWS=rows, COLUMNS=columns, SPAN=SPAN,
                                             num_warps=warps)
    return dx, part.sum(0).to(weight.dtype)


@torch.library.custom_op("nanomrt::rotate", mutates_args=())
def turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """(4) of x (N,H,D) by the angles of cos and sin (N,1,D), or by their negatives."""
    x, (N, H, D) = x.contiguous(), x.shape
    if D % 2:
        raise ValueError(f"x {tuple(x.shape)}: numbers are turned in pairs, so D={D} must be even")
    if not cos.shape == sin.shape == (N, 1, D):
        raise ValueError(f"x {tuple(x.shape)} needs cos and sin ({N}, 1, {D}), not {tuple(cos.shape)} and {tuple(sin.shape)}: "
                         "expand them, which copies nothing")
    cos, sin = (angles if angles.stride(-1) == 1 else angles.contiguous() for angles in (cos, sin))
    y = torch.empty_like(x)
    rows, pairs, warps = tile_of(D // 2)
    if x.numel():
        rotate_kernel[triton.cdiv(N * H, rows),](x, cos, sin, y, N * H, H, D, cos.stride(0), sin.stride(0),
                                                 SIGN=-1 if back else 1, ROWS=rows, PAIRS=pairs, num_warps=warps)
    return y


@torch.library.custom_op("nanomrt::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(5): silu(gate) · up, of two tensors of one shape."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} of {gate.dtype} and up {tuple(up.shape)} of {up.dtype} must be alike")
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        swiglu_kernel[triton.cdiv(y.numel(), TILE),](gate, up, y, y.numel(), BLOCK=TILE)
    return y


@torch.library.custom_op("nanomrt::swiglu_backward", mutates_args=())
def swiglu_backward(gate: Tensor, up: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(6)."""
    gate, up, g = gate.contiguous(), up.contiguous(), g.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if g.numel():
        swiglu_backward_kernel[triton.cdiv(g.numel(), TILE),](gate, up, g, dgate, dup, g.numel(), BLOCK=TILE)
    return dgate, dup


# --- The operators: shapes for torch.compile, gradients for autograd ---

rms_norm.register_fake(lambda x, weight, eps, dtype: torch.empty_like(x.contiguous(), dtype=dtype))
rms_norm_backward.register_fake(lambda x, weight, g, eps: (torch.empty_like(x.contiguous()), torch.empty_like(weight)))
turn.register_fake(lambda x, cos, sin, back: torch.empty_like(x.contiguous()))
swiglu.register_fake(lambda gate, up: torch.empty_like(gate.contiguous()))
swiglu_backward.register_fake(lambda gate, up, g: (torch.empty_like(gate.contiguous()), torch.empty_like(up.contiguous())))


def _save_norm(ctx, inputs, output):
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _save_turn(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


rms_norm.register_autograd(lambda ctx, g: (*rms_norm_backward(*ctx.saved_tensors, g, ctx.eps), None, None),
                           setup_context=_save_norm)
turn.register_autograd(lambda ctx, g: (turn(g, *ctx.saved_tensors, not ctx.back), None, None, None), setup_context=_save_turn)
swiglu.register_autograd(lambda ctx, g: swiglu_backward(*ctx.saved_tensors, g), setup_context=_save_swiglu)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i+D/2}) of x (N,H,D) turned by its angle; cos and sin (N,1,D) as `model.rotary` makes them."""
    return turn(x, cos, sin, False)
