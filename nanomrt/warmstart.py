"""The warm start: supervised learning of search traces, and the gates that it must pass before RL begins.

RL from a policy that can't check its own attempts teaches nothing, so what matters is measured on its own samples first:
are intermediate results right, does `yes` mean yes, and does an answer follow from a solved trace?

Batches are drawn in random order and the loss is divided by a constant: batches sorted by length, each averaged over its
own tokens, would weigh short traces more and teach the model to stop early.
"""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

import kernels
from nanomrt.config import RunConfig
from nanomrt.model import Llama, Packed


def pack(rows: list[list[int]], device) -> tuple[Tensor, Tensor, Packed]:
    """Sequences side by side: tokens (N,), position_ids (N,) and the attention that keeps them apart."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])  # (B+1,)
    tokens = torch.tensor([token for row in rows for token in row], device=device)  # (N,)
    position_ids = torch.arange(len(tokens), device=device) - cu_seqlens[:-1].repeat_interleave(lengths)  # (N,)
    return tokens, position_ids, Packed(cu_seqlens, int(lengths.max()))


def warm_optimizers(model: Llama, config: RunConfig) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for everything else: embeddings are no linear maps, norms no matrices."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    other = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    return [torch.optim.Muon(hidden, lr=config.warm_muon_lr, weight_decay=0.0),
            torch.optim.AdamW(other, lr=config.warm_adamw_lr, weight_decay=0.0, betas=(0.9, 0.95))]


def warm_start(model: Llama, task, config: RunConfig) -> Iterator[float]:
    """Train `model` in place; yields the loss of each step."""
    device = model.head.device
    rng = random.Random(f"{config.seed}/warm")
    problems = task.problems("train", config.warm_steps * config.warm_batch, f"{config.seed}/warm")
    optimizers = warm_optimizers(model, config)
    peak = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    scale = 1 / (config.warm_batch * config.thinking_budget)  # the constant normaliser
    for step in range(config.warm_steps):
        rows, weights = [], []
        for problem in problems[step * config.warm_batch : (step + 1) * config.warm_batch]:
            prompt, (response, weight) = task.prompt(problem), task.warm_trace(problem, rng)
            rows.append(prompt + response)
            weights += [0.0] * len(prompt) + weight
        tokens, position_ids, attend = pack(rows, device)
        weight = torch.tensor(weights, device=device)  # (N,)
        learned = weight.nonzero().squeeze(1)  # never a sequence's first token
        hidden = model(tokens, position_ids, attend)  # (N,C)
        logprob, _ = kernels.token_logprobs(hidden[learned - 1], model.head, tokens[learned], 1.0)
        loss = -(logprob * weight[learned]).sum() * scale
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        done = step / config.warm_steps
        decay = min(1.0, (step + 1) / 20, (1 - done) / 0.5)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, lr in zip(groups, peak):
            group["lr"] = lr * decay
        for optimizer in optimizers:
            optimizer.step()
        yield float(loss.detach())
