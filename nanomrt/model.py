"""A Llama in one file: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameter names and config keys are Hugging Face's, so `load_state_dict(strict=True)` reads their checkpoints: Llama,
Qwen2 (`attention_bias`) and Qwen3 (`qk_norm`). Two deliberate differences:

- There is no batch axis. Tokens of all sequences lie on one flat axis N, and an `Attend` argument knows which of them
  see each other. Training, prefill and decoding are the same forward pass with another `Attend`; the module itself
  holds no cache and no mask.
- `forward` ends at the last hidden state. The head is applied by `kernels.token_logprobs`, only where it is needed.

Left out: dropout (the sampler and the trainer must see one distribution), RoPE scaling, mixture of experts.
Dimension key: N packed tokens, C width, H query heads, K key/value heads, D head dim, F feed-forward width, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

import kernels


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # bias on q, k and v, as in Qwen2
    qk_norm: bool = False  # RMSNorm on each head's q and k, as in Qwen3

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                             f"num_key_value_heads={self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of numbers")


class Attend(Protocol):
    """Who sees whom: called once per layer with q (N,H,D), k and v (N,K,D); returns (N,H,D)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Packed:
    """Whole sequences side by side, each causal in itself: training and prefill."""

    cu_seqlens: Tensor  # (B+1,) int64, where each sequence starts, and N at the end
    max_seqlen: int

    @classmethod
    def of(cls, lengths: Tensor) -> "Packed":
        """Sequences of these lengths (B,), one after the other."""
        return cls(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), int(lengths.max()))

    @property
    def position_ids(self) -> Tensor:
        """(N,) each token's place in its own sequence."""
        N, starts = int(self.cu_seqlens[-1]), self.cu_seqlens[:-1]
        return torch.arange(N, device=starts.device) - starts.repeat_interleave(self.cu_seqlens.diff())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, self.cu_seqlens, self.max_seqlen)


def packs(lengths: Sequence[int], limit: int) -> Iterator[range]:
    """Neighbouring sequences that share a forward pass: at most `limit` tokens, or one sequence that is longer."""
    first = total = 0
    for i, length in enumerate(lengths):
        if i > first and total + length > limit:
            yield range(first, i)
            first, total = i, 0
        total += length
    if len(lengths):
        yield range(first, len(lengths))


def micro_batches(lengths: Tensor, limit: int) -> list[Tensor]:
    """Rows in order of length, cut so that a part holds at most `limit` tokens (or one row). In order, because attention on a CPU
    pads a part's rows to the longest."""
    order = lengths.argsort(stable=True)
    return [order[part.start : part.stop] for part in packs(lengths[order].tolist(), limit)]


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matrix products run in: bf16 on a GPU (with fp32 sums), fp32 on a CPU, where bf16 is slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in `compute_dtype`; weights and residual stream stay fp32, or an update smaller than a bf16 step would be lost.
    The outermost context keeps the weights' bf16 copies, so a loop over forward passes opens one around itself."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@functools.lru_cache(maxsize=8)
def rotary(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """(cos, cos) and (-sin, sin) of the angles at each position, (length,2,1,D); pair i of D/2 turns by position · theta^(-2i/D).
    Made once, in float64: at position 1000 an fp32 angle may be off by 6e-5."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, device=device)[:, None, None] * frequency  # (length,1,D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)], dim=1).float()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """In fp32; returned in the type of the products that read it, or autocast would make a copy for each of them."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return kernels.rms_norm(x, self.weight, self.eps, dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = kernels.rotate(self.q_norm(q), cos, sin)  # (N,H,D)
        k = kernels.rotate(self.k_norm(k), cos, sin)  # (N,K,D)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))  # (N,C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, F, bias=False)
        self.up_proj = nn.Linear(C, F, bias=False)
        self.down_proj = nn.Linear(F, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))  # (N,C)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything but the head; the level that Hugging Face names `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """input_ids (N,) and position_ids (N,), below max_position_embeddings, -> last hidden states (N,C); `head` (V,C) turns them
    into logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> "Llama":
        """Draw the weights from `generator`, so that a run is a function of its seed. Returns the model."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 2:  # norms stay at 1
                std = 0.02 if "embed_tokens" in name or "lm_head" in name else weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= (2 * self.config.num_hidden_layers) ** 0.5  # 2 L branches are added: keep their sum's variance
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        return self

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def head(self) -> Tensor:
        """(V,C), in the type of the hidden states."""
        return self.lm_head.weight.to(compute_dtype(self.lm_head.weight.device))

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        x, c = self.model.embed_tokens(input_ids), self.config  # (N,C)
        cos, sin = rotary(c.max_position_embeddings, c.head_dim, c.rope_theta, x.device)[position_ids].unbind(1)  # (N,1,D)
        with mixed_precision(x.device):
            for block in self.model.layers:
                x = block(x, cos, sin, attend)
            return self.model.norm(x)  # (N,C)
