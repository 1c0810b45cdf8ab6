"""An outcome verifier: the probability that a trace, whole or not, ends in a right answer (Cobbe et al., arXiv 2110.14168).

It is a copy of the policy with a linear layer on its last hidden state, trained on the policy's own rollouts of train problems:

    loss = - mean over rollouts and places of  verdict · log v + (1 - verdict) · log (1 - v),    v = sigmoid(w · h + b)     (1)

The places are the ends of all episodes and the end of the answer. At an answer v judges the answer; at a boundary it is V, the
chance that the policy will end right if it goes on: what a search over partial traces needs.
A copy, and all of it learns: the policy's own hidden state only has to tell the next token, and after `</answer>` there is none,
so a linear layer alone would find little there; and the policy stays what it was. It starts from the policy's weights, which
know the arithmetic. Every step draws new rollouts, so there is no epoch to overfit.
Left out: judging each step (a process verifier), and reading the policy's cache instead of the trace.
Dimension key: N packed tokens, C width, n scored places.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.task import Task
from nanomrt import checkpoint
from nanomrt.config import RunConfig
from nanomrt.model import Llama, ModelConfig, Packed, packs
from nanomrt.rollout import Rollouts, roll_out, training_sampling
from nanomrt.run import generator_for

STEPS = 60
PROBLEMS, SAMPLES = 32, 4  # of each step
LEARNING_RATE, OF_PRETRAINED = 1e-3, 1e-5
TOKENS = 16_384  # per forward pass: bounds the memory


class Verifier(Llama):
    """The policy's trunk and one more number per token; its parameters have the names of Hugging Face's classifiers."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)  # before it has learned anything, v is 1/2 everywhere
        nn.init.zeros_(self.score.bias)

    @classmethod
    def of(cls, policy: Llama) -> "Verifier":
        """A verifier that starts as the policy."""
        verifier = cls(policy.config).to(policy.device)
        verifier.load_state_dict(policy.state_dict() | verifier.score.state_dict(prefix="score."))
        return verifier

    def logits(self, tokens: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> Tensor:
        """log(v / (1 - v)) after the first `place` tokens of a sequence, for all of its places, sequence after sequence: (n,)."""
        device, lengths = self.device, torch.tensor([len(row) for row in tokens])
        packed = Packed.of(lengths.to(device))
        hidden = self(torch.tensor([token for row in tokens for token in row], device=device), packed.position_ids, packed)
        starts = (lengths.cumsum(0) - lengths).tolist()
        last = [start + place - 1 for start, some in zip(starts, places) for place in some]  # the last token read
        return self.score(hidden[torch.tensor(last, dtype=torch.int64, device=device)].float()).squeeze(1)  # (N,C) -> (n,)

    @torch.no_grad()
    def values(self, tokens: Sequence[Sequence[int]]) -> list[float]:
        """v after each whole sequence."""
        parts = packs([len(row) for row in tokens], TOKENS)
        found = [self.logits([tokens[i] for i in part], [[len(tokens[i])] for i in part]).sigmoid() for part in parts]
        return torch.cat(found).tolist() if found else []


def judged_places(task: Task, rollouts: Rollouts) -> list[list[int]]:
    """Where each rollout is judged, as counts of tokens: after every episode, and after the answer if there is one."""
    return [[start + end for end in task.episode_ends(rollouts.response(row))] + [len(tokens)] * (tokens[-1] == task.close_answer)
            for row, (start, tokens) in enumerate(zip(rollouts.prompt_length, rollouts.tokens))]


def train(verifier: Verifier, policy: Llama, task: Task, config: RunConfig, steps: int = STEPS) -> Iterator[float]:
    """Train in place on the policy's rollouts; yields the loss (1) of each step."""
    peak = OF_PRETRAINED if config.warm_from else LEARNING_RATE
    optimizer = torch.optim.AdamW(verifier.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 5) * (1 - step / steps)
        problems = task.problems("train", PROBLEMS, f"{config.seed}/verifier/{step}")
        rollouts = roll_out(policy, task, problems, SAMPLES, training_sampling(task, config),
                            generator_for(config.seed, "verifier", step))
        places, total = judged_places(task, rollouts), 0.0
        count = sum(map(len, places))
        optimizer.zero_grad(set_to_none=True)
        for part in packs([len(row) for row in rollouts.tokens], TOKENS):
            logits = verifier.logits([rollouts.tokens[i] for i in part], [places[i] for i in part])  # (n,)
            verdict = torch.tensor([rollouts.reward[i] for i in part for _ in places[i]], device=logits.device)  # (n,)
            loss = F.binary_cross_entropy_with_logits(logits, verdict, reduction="sum") / max(count, 1)  # (1)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(verifier.parameters(), 1.0)
        optimizer.step()
        yield total


def cached_verifier(run: Path, policy_folder: Path, policy: Llama, task: Task, config: RunConfig,
                    bar: str = "", steps: int = STEPS) -> Verifier:
    """The verifier of a policy from `run`/verifier if it is there and was trained on this very policy, else trained and saved.

    `bar` is what a progress bar is called; '' draws none.
    """
    folder, device = run / "verifier", policy.device
    trained_on = {"policy": json.loads((policy_folder / "manifest.json").read_text())["model.safetensors"], "steps": steps}
    if checkpoint.damage(folder) is None and json.loads((folder / "trainer.json").read_text()) == trained_on:
        return checkpoint.load_model(folder, device, Verifier)
    verifier = Verifier.of(policy)
    for _ in tqdm(train(verifier, policy, task, config, steps), bar, steps, disable=not bar, unit="step"):
        pass
    checkpoint.save(folder, verifier, task.tokenizer, {}, state=trained_on)
    return verifier
