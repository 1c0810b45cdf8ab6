"""The operations that decide the speed of nanomrt, behind one name each: Triton on a CUDA device, which must be the current one,
else `reference`, which says what they mean."""

import torch
from torch import Tensor

from kernels import reference

try:
    from kernels.attention import attention as fused_attention
    from kernels.decode import branch_attention as fused_branch_attention
    from kernels.elementwise import rms_norm as fused_rms_norm
    from kernels.elementwise import rotate as fused_rotate
    from kernels.elementwise import swiglu as fused_swiglu
    from kernels.logprob import token_logprobs as fused_token_logprobs
except ImportError as problem:  # no Triton for this platform, or one that is too old
    def without_triton(*_, reason: ImportError = problem):  # a default: the name `problem` ends with this block
        raise ImportError("on a CUDA device the kernels need Triton: pip install 'triton>=3.6'") from reason

    fused_attention = fused_branch_attention = fused_token_logprobs = without_triton
    fused_rms_norm = fused_rotate = fused_swiglu = without_triton

__all__ = ["attention", "branch_attention", "logits", "rms_norm", "rotate", "swiglu", "token_logprobs"]


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention inside each packed sequence. q (N,H,D), k and v (N,K,D), cu_seqlens (B+1,) -> (N,H,D).

    Sequence b, which may be empty, is tokens cu_seqlens[b] … cu_seqlens[b+1]-1. So cu_seqlens are integers that begin with 0,
    never fall and end with N or less: tokens behind the last one have zeros for results and gradients. max_seqlen is the length
    of the longest sequence, or more. None of this is checked, which would have to wait for the device: with other starts a kernel
    reads what is not its own; with a lower max_seqlen it leaves results unwritten, and makes gradients, those of earlier tokens
    too, from memory that nobody wrote.
    """
    return (fused_attention if q.is_cuda else reference.attention)(q, k, v, cu_seqlens, max_seqlen)


def branch_attention(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, positions: Tensor, limit: Tensor, group: Tensor,
                     place: Tensor, suffix_k: Tensor, suffix_v: Tensor, length: Tensor) -> Tensor:
    """One new token per row against a prefix that rows share and a suffix of its own. q (R,H,D) -> (R,H,D); the others are said
    in `reference`."""
    chosen = fused_branch_attention if q.is_cuda else reference.branch_attention
    return chosen(q, prefix_k, prefix_v, positions, limit, group, place, suffix_k, suffix_v, length)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature), both (N,) in fp32."""
    return (fused_token_logprobs if hidden.is_cuda else reference.token_logprobs)(hidden, weight, targets, temperature)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (N,C) @ weight.T -> (N,V) in fp32: what the sampler draws from must be as exact as what the loss scores."""
    lower = hidden.is_cuda and hidden.dtype != torch.float32
    return torch.mm(hidden, weight.T, out_dtype=torch.float32) if lower else hidden.float() @ weight.float().T


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (…,C) over the root of its mean square, times weight (C,); computed in fp32, returned in `dtype`."""
    return (fused_rms_norm if x.is_cuda else reference.rms_norm)(x, weight, eps, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x[i], x[i + D/2]) of x (N,H,D) turned by the angle of its position; cos and sin (N,1,D)."""
    return (fused_rotate if x.is_cuda else reference.rotate)(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of two tensors of one shape."""
    return (fused_swiglu if gate.is_cuda else reference.swiglu)(gate, up)
