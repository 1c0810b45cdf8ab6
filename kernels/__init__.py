"""The operations that decide the speed of nanomrt, behind one name each: Triton on a CUDA device, else `reference`, which says
what they mean."""

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import branch_attention

try:
    from kernels.attention import attention as fused_attention
    from kernels.logprob import token_logprobs as fused_token_logprobs
except ImportError:  # no Triton for this platform, and so no CUDA either
    fused_attention, fused_token_logprobs = reference.attention, reference.token_logprobs

__all__ = ["attention", "branch_attention", "logits", "token_logprobs"]


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention inside each packed sequence. q (N,H,D), k and v (N,K,D), cu_seqlens (B+1,) -> (N,H,D)."""
    return (fused_attention if q.is_cuda else reference.attention)(q, k, v, cu_seqlens, max_seqlen)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature), both (N,) in fp32."""
    return (fused_token_logprobs if hidden.is_cuda else reference.token_logprobs)(hidden, weight, targets, temperature)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (N,C) @ weight.T -> (N,V) in fp32: what the sampler draws from must be as exact as what the loss scores."""
    lower = hidden.is_cuda and hidden.dtype != torch.float32
    return torch.mm(hidden, weight.T, out_dtype=torch.float32) if lower else hidden @ weight.T
