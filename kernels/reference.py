"""What each kernel computes, in plain PyTorch: the specification, and the path that a CPU runs.

A reader who wants to know what an operation means reads it here; the Triton twins must agree with these lines.
Dimension key: B sequences, T tokens, C width, H query heads, K key/value heads, D head dim, V vocabulary, N packed
tokens, R branches (rows being sampled), S prefix segments, M branches of a segment, L cached tokens, t tokens of a branch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention inside each packed sequence. q (N,H,D), k and v (N,K,D), cu_seqlens (B+1,) -> (N,H,D)."""
    (N, H, _), K = q.shape, k.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads can't share {K} key/value heads: H must be a multiple of K")
    starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]  # (B,1)
    step = torch.arange(max_seqlen, device=q.device)  # (T,)
    if not N:
        return torch.zeros_like(q)
    # Padding repeats a sequence's last token; it lies after every real key of its row, so the causal mask hides it.
    take = torch.minimum(starts + step, starts + lengths - 1).clamp(min=0)  # (B,T) where each padded token reads from
    pad = lambda x: x.index_select(0, take.flatten()).unflatten(0, take.shape).transpose(1, 2)  # (B,·,T,D)
    k, v = (pad(x).repeat_interleave(H // K, dim=1) for x in (k, v))  # (B,H,T,D)
    out = F.scaled_dot_product_attention(pad(q), k, v, is_causal=True).transpose(1, 2)  # (B,T,H,D)
    out = out.flatten(0, 1).index_select(0, (step < lengths).flatten().nonzero().squeeze(1))  # (N,H,D) but for a tail
    tail = N - int(cu_seqlens[-1])  # tokens behind the last sequence: zeros
    return F.pad(out, (0, 0, 0, 0, 0, tail)) if tail else out


def branch_attention(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, positions: Tensor, limit: Tensor, group: Tensor,
                     place: Tensor, suffix_k: Tensor, suffix_v: Tensor, length: Tensor) -> Tensor:
    """One new token per branch against the prefix it shares and the suffix it owns. q (R,H,D) -> (R,H,D).

    prefix_k, prefix_v (S,K,L,D): cached segments, all of it finite; positions (S,L) of their entries; limit (S,M): the m-th
    branch of a segment sees the entries at positions below it (-1 where there is no branch); group (S,M): that branch's
    row (any row where there is none); place (R,): a row's index in the flattened group; suffix_k, suffix_v (R,K,t,D), all
    of it finite: the branch's own tokens, of which length (R,) >= 1 count, this one included.
    """
    (R, H, D), (S, K, L, _), M, t = q.shape, prefix_k.shape, group.shape[1], suffix_k.shape[2]
    G, heads = H // K, torch.arange(K, device=q.device)
    asks = (group[:, None] * K + heads[:, None]).flatten()  # (S·K·M,) the row and key/value head of each branch of a segment
    answer = ((place // M)[:, None] * K + heads) * M + (place % M)[:, None]  # (R,K) where each row and head stands among them
    q = (q * D**-0.5).view(R, K, G, D)
    # The rows of a segment read it once, together: one matrix product per segment instead of one vector product per row.
    together = q.flatten(0, 1).index_select(0, asks).view(S, K, M * G, D)
    unseen = torch.where(positions[:, None] < limit[..., None], 0.0, -1e30)  # (S,M,L)
    scores = (together @ prefix_k.mT).float().view(S, K, M, G, L).add_(unseen[:, None, :, None])
    p, lse = _softmax_and_lse(scores)  # (S,K,M,G,L), (S,K,M,G,1)
    out = p.view(S, K, M * G, L).to(q.dtype) @ prefix_v  # (S,K,M·G,D)
    lse, out = (x.view(S * K * M, G, -1).index_select(0, answer.flatten()).view(R, K, G, -1) for x in (lse, out))
    beyond = torch.where(torch.arange(t, device=q.device) < length[:, None], 0.0, -1e30)  # (R,t)
    own_p, own_lse = _softmax_and_lse((q @ suffix_k.mT).float().add_(beyond[:, None, None]))  # (R,K,G,t), (R,K,G,1)
    share = torch.sigmoid(lse - own_lse).to(q.dtype)  # the prefix's part of the whole softmax; 0 where none of it is seen
    return torch.lerp(own_p.to(q.dtype) @ suffix_v, out, share).reshape(R, H, D)


def _softmax_and_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and log-sum-exp over the last axis. The largest p is exp(max - lse), which spares a second pass of exps."""
    p = scores.softmax(dim=-1)
    return p, scores.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log()


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature), both (N,) in fp32.

    hidden (N,C), weight (V,C), targets (N,) int64.
    """
    logp = ((hidden @ weight.T).float() / temperature).log_softmax(dim=-1)  # (N,V)
    logprob = logp.gather(1, targets[:, None]).squeeze(1)  # (N,)
    return logprob, -(logp.exp() * logp).sum(dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (…,C) over the root of its mean square, times weight (C,); computed in fp32, returned in `dtype`."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (N,H,D) by its angle: cos (N,1,D) twice the same half, sin (N,1,D) first with the
    other sign. In fp32, returned in x's dtype."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of two tensors of one shape."""
    return F.silu(gate) * up
