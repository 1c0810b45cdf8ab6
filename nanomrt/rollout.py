"""What the policy does with a task: roll out traces, force answers at chosen points, cut and continue.

This is where problems, tokens and verdicts meet; `mrt.py` only ever sees the tensors of a `Batch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomrt.model import Llama
from nanomrt.mrt import Batch
from nanomrt.sampler import Branches, Samples, Sampling, Segments, generate, prefill


@dataclass(frozen=True)
class Rollouts:
    """B traces. A row's tokens are its prompt, then its response (which may begin with a prefix that it did not sample)."""

    problems: list  # (B,) the problem of each row
    prompt_id: list[int]  # (B,) rows of one prompt are one group
    tokens: list[list[int]]  # (B,) prompt and response
    prompt_length: list[int]  # (B,)
    reward: list[float]  # (B,) verdict on the response
    samples: Samples  # the sampler's record; its tokens are the tail of each row's

    def response(self, row: int) -> list[int]:
        return self.tokens[row][self.prompt_length[row] :]

    def batch(self) -> Batch:
        """The flat tensors that the loss reads. Tokens before the branch are context and carry no log-prob."""
        device = self.samples.tokens.device
        lengths = torch.tensor([len(row) for row in self.tokens], device=device)  # (B,)
        step = torch.arange(self.samples.tokens.shape[1], device=device)
        real = step < self.samples.lengths[:, None]  # (B,T)
        where = ((lengths.cumsum(0) - self.samples.lengths)[:, None] + step)[real]  # the samples' place on the flat axis
        spread = lambda x: torch.zeros(int(lengths.sum()), dtype=x.dtype, device=device).index_copy(0, where, x[real])  # noqa: E731
        return Batch(
            tokens=torch.tensor([token for row in self.tokens for token in row], device=device),
            lengths=lengths,
            is_action=spread(self.samples.is_action),
            logprob=spread(self.samples.logprobs),
            reward=torch.tensor(self.reward, device=device),
            prompt_id=torch.tensor(self.prompt_id, device=device),
            finished=self.samples.stopped)


def branch(model: Llama, prefix: Segments, segment: Sequence[int], contexts: Sequence[Sequence[int]],
           forced: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None) -> Samples:
    """Sample after contexts[r] + forced[r], reusing the cache of segment[r], which holds contexts[r].

    A row without forced tokens is given its context's last token once more: something has to produce the first logits.
    """
    starts = [len(context) - (not given) for context, given in zip(contexts, forced)]
    given = [list(given) or [context[-1]] for context, given in zip(contexts, forced)]
    return generate(model, prefix, Branches.of(segment, starts, given, model.head.device), sampling, generator)


def grade(task, problems: Sequence, responses: Sequence[Sequence[int]]) -> list[float]:
    return [task.grade(problem, text) for problem, text in zip(problems, task.tokenizer.decode_batch(responses))]


def continue_from(model: Llama, task, problems: Sequence, prefix: Segments, segment: Sequence[int],
                  contexts: Sequence[list[int]], forced: Sequence[list[int]], prompt_id: Sequence[int],
                  sampling: Sampling, generator: torch.Generator | None) -> Rollouts:
    """Rows that go on from `contexts` (prompt and maybe part of a trace), with their verdicts."""
    samples = branch(model, prefix, segment, contexts, forced, sampling, generator)
    tokens = [[*context[:start], *row] for context, start, row in
              zip(contexts, samples.branches.position.tolist(), samples.rows())]
    prompt_length = [len(task.prompt(problem)) for problem in problems]
    reward = grade(task, problems, [row[n:] for row, n in zip(tokens, prompt_length)])
    return Rollouts(list(problems), list(prompt_id), tokens, prompt_length, reward, samples)


def roll_out(model: Llama, task, problems: Sequence, group_size: int, sampling: Sampling,
             generator: torch.Generator | None) -> Rollouts:
    """`group_size` rollouts of each problem; every prompt is prefilled once."""
    prompts = [task.prompt(problem) for problem in problems]
    owner = [i for i in range(len(problems)) for _ in range(group_size)]
    return continue_from(model, task, [problems[i] for i in owner], prefill(model, prompts), owner,
                         [prompts[i] for i in owner], [[]] * len(owner), owner, sampling, generator)


def force_answers(model: Llama, task, rollouts: Rollouts, row: Sequence[int], position: Sequence[int], forks: int,
                  temperature: float, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """J at each (row, position): stop the thinking there, answer `forks` times, take the mean verdict.

    Every fork branches from its trace's cache. Returns J (len(row),) fp32 and the number of tokens generated.
    """
    if not row:
        return torch.zeros(0), 0
    rows = [r for r in row for _ in range(forks)]
    contexts = [rollouts.tokens[r][:p] for r, p in zip(row, position) for _ in range(forks)]
    sampling = Sampling(task.answer_tokens, (task.stop,), temperature)
    samples = branch(model, rollouts.samples.segments(), rows, contexts, [task.forced_stop] * len(rows), sampling, generator)
    verdicts = grade(task, [rollouts.problems[r] for r in rows], samples.rows())
    return torch.tensor(verdicts).view(-1, forks).mean(1).to(model.head.device), samples.generated


def boundaries(task, rollouts: Rollouts) -> tuple[list[int], list[int]]:
    """Row and position of b_0 … b_T of every rollout that has an episode: where J is estimated."""
    row, position = [], []
    for r, start in enumerate(rollouts.prompt_length):
        ends = task.episode_ends(rollouts.response(r))
        if ends:
            row += [r] * (len(ends) + 1)
            position += [start, *(start + end for end in ends)]
    return row, position
