"""What the policy does with a task: roll out traces, force answers at chosen points, cut and continue.

This is where problems, tokens and verdicts meet; `mrt.py` only ever sees the tensors of a `Batch`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.task import Task
from nanomrt.config import RunConfig
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
    samples: Samples | None  # the sampler's record; its tokens are the tail of each row's. None: nobody sampled them

    def response(self, row: int) -> list[int]:
        return self.tokens[row][self.prompt_length[row] :]

    def responses(self) -> list[list[int]]:
        return [self.response(row) for row in range(len(self.tokens))]

    def batch(self, device: torch.device | str = "cpu") -> Batch:
        """The flat tensors that the loss reads, on the sampler's device or, without one, on `device`. Tokens before the branch
        are context and carry no log-prob. What nobody sampled is learned as a whole: every token after the prompt."""
        samples, device = self.samples, self.samples.tokens.device if self.samples else device
        lengths = torch.tensor([len(row) for row in self.tokens], device=device)  # (B,)
        if samples:
            step = torch.arange(samples.tokens.shape[1], device=device)
            real = step < samples.lengths[:, None]  # (B,T)
            where = ((lengths.cumsum(0) - samples.lengths)[:, None] + step)[real]  # the samples' place on the flat axis
            spread = lambda x: torch.zeros(int(lengths.sum()), dtype=x.dtype, device=device).index_copy(0, where, x[real])
            is_action, finished = spread(samples.is_action), samples.stopped
            logprob = spread(samples.logprobs.where(samples.is_action, 0.0))
        else:
            is_action = torch.tensor([t >= n for row, n in zip(self.tokens, self.prompt_length) for t in range(len(row))],
                                     device=device)
            logprob, finished = torch.zeros(is_action.shape, device=device), torch.ones_like(lengths, dtype=torch.bool)
        return Batch(tokens=torch.tensor([token for row in self.tokens for token in row], device=device), lengths=lengths,
                     is_action=is_action, logprob=logprob, reward=torch.tensor(self.reward, device=device),
                     prompt_id=torch.tensor(self.prompt_id, device=device), finished=finished)


def branch(model: Llama, prefix: Segments, segment: Sequence[int], contexts: Sequence[Sequence[int]],
           forced: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None, keep: bool = True) -> Samples:
    """Sample after contexts[r] + forced[r], reusing the cache of segment[r], which must begin with contexts[r].

    A row without forced tokens is given its context's last token once more: something has to produce the first logits.
    """
    given = [list(tokens) or [context[-1]] for context, tokens in zip(contexts, forced)]
    starts = [len(context) - (not tokens) for context, tokens in zip(contexts, forced)]
    return generate(model, prefix, Branches.of(segment, starts, given, model.device, generator), sampling, keep=keep)


def grade(task: Task, problems: Sequence, responses: Sequence[Sequence[int]]) -> list[float]:
    """The verdicts. Raises ValueError if one is no finite number: it would be in the advantage of its whole group."""
    texts = task.texts(responses)
    verdicts = [task.grade(problem, text) for problem, text in zip(problems, texts)]
    for row, verdict in enumerate(verdicts):
        if not math.isfinite(verdict):
            raise ValueError(f"row {row}: {type(task).__name__}.grade says {verdict} of {texts[row]!r}, an answer to "
                             f"{problems[row]}; a verdict must be a finite number")
    return verdicts


def continue_from(model: Llama, task: Task, problems: Sequence, prefix: Segments, segment: Sequence[int],
                  contexts: Sequence[list[int]], forced: Sequence[list[int]], prompt_id: Sequence[int],
                  sampling: Sampling, generator: torch.Generator | None) -> Rollouts:
    """Rows that go on from `contexts` (prompt and maybe part of a trace), with their verdicts."""
    samples = branch(model, prefix, segment, contexts, forced, sampling, generator)
    tokens = [[*context[:start], *row] for context, start, row in
              zip(contexts, samples.branches.position.tolist(), samples.rows())]
    return graded(task, problems, prompt_id, tokens, samples)


def graded(task: Task, problems: Sequence, prompt_id: Sequence[int], tokens: Sequence[list[int]],
           samples: Samples | None = None) -> Rollouts:
    """Traces (prompt and response) with their verdicts. Without `samples` nobody sampled them as they stand."""
    prompt_length = [len(task.prompt(problem)) for problem in problems]
    reward = grade(task, problems, [row[n:] for row, n in zip(tokens, prompt_length)])
    return Rollouts(list(problems), list(prompt_id), list(tokens), prompt_length, reward, samples)


def roll_out(model: Llama, task: Task, problems: Sequence, group_size: int, sampling: Sampling,
             generator: torch.Generator | None) -> Rollouts:
    """`group_size` rollouts of each problem; every prompt is prefilled once."""
    prompts = [task.prompt(problem) for problem in problems]
    owner = [i for i in range(len(problems)) for _ in range(group_size)]
    return continue_from(model, task, [problems[i] for i in owner], prefill(model, prompts), owner,
                         [prompts[i] for i in owner], [[]] * len(owner), owner, sampling, generator)


@dataclass(frozen=True)
class Forked:
    """What branches say about n places in traces: forced answers for J, continuations for V."""

    J: Tensor  # (n,) fp32, mean verdict on the branches of each place
    branches: list[list[tuple[list[int], float]]]  # (n,forks) each, forced tokens included, and its verdict; [] if forks = 0
    generated: int  # tokens, for the ledger


def force_answers(model: Llama, task: Task, rollouts: Rollouts, row: Sequence[int], position: Sequence[int], forks: int,
                  temperature: float, generator: torch.Generator | None) -> Forked:
    """J at each (row, position): stop the thinking there, answer `forks` times, take the mean verdict; 0: `weigh_answers`."""
    if forks == 0:
        return weigh_answers(model, task, rollouts, row, position, temperature)
    room = [task.answer_tokens] * len(row)
    return fork(model, task, rollouts, row, position, task.forced_stop, room, forks, temperature, generator)


def go_on(model: Llama, task: Task, rollouts: Rollouts, row: Sequence[int], position: Sequence[int], config: RunConfig,
          generator: torch.Generator) -> Forked:
    """V at each (row, position): go on `forks` times, with what is left of training's budget, and take the mean verdict."""
    most = training_sampling(task, config).max_new_tokens
    room = [max(most - p + rollouts.prompt_length[r], 1) for r, p in zip(row, position)]
    return fork(model, task, rollouts, row, position, [], room, config.forks, config.temperature, generator)


def fork(model: Llama, task: Task, rollouts: Rollouts, row: Sequence[int], position: Sequence[int], forced: list[int],
         room: Sequence[int], forks: int, temperature: float, generator: torch.Generator | None) -> Forked:
    """`forks` branches of at most `room` new tokens at each (row, position), from its trace's cache.

    Equal contexts have equal values and are asked once: all rollouts of a prompt share J_0, and many share their first attempt.
    """
    if not row:
        return Forked(torch.zeros(0, device=model.device), [], 0)
    contexts = [tuple(rollouts.tokens[r][:p]) for r, p in zip(row, position)]
    asked = {context: i for i, context in enumerate(contexts)}  # each context, and a place where it is cached
    which = [i for i in asked.values() for _ in range(forks)]  # the place of each branch
    rows = [row[i] for i in which]
    sampling = Sampling(torch.tensor([room[i] for i in which], device=model.device), (task.close_answer,), temperature)
    samples = branch(model, rollouts.samples.segments(), rows, [contexts[i] for i in which], [forced] * len(rows), sampling,
                     generator, keep=False)
    answers = samples.rows()
    verdicts = list(zip(answers, grade(task, [rollouts.problems[r] for r in rows], answers)))
    own = {context: verdicts[i * forks : (i + 1) * forks] for i, context in enumerate(asked)}
    branches = [own[context] for context in contexts]
    J = [sum(verdict for _, verdict in some) / forks for some in branches]
    return Forked(torch.tensor(J, device=model.device), branches, samples.generated)


def weigh_answers(model: Llama, task: Task, rollouts: Rollouts, row: Sequence[int], position: Sequence[int],
                  temperature: float) -> Forked:
    """J without sampling, at each (row, position): the summed probability of the right answers as the warm start writes them. The
    mean of ever more forced answers comes to this, or to more if the policy also writes right answers in other ways. There are no
    branches; the ledger counts the tokens weighed."""
    contexts = [tuple(rollouts.tokens[r][:p]) for r, p in zip(row, position)]
    J = dict.fromkeys(contexts, 0.0)
    cases = [(r, context, answer) for context, r in dict(zip(contexts, row)).items()
             for answer in task.right_answers(rollouts.problems[r])]
    if cases:
        rows, asked, answers = zip(*cases)
        samples = branch(model, rollouts.samples.segments(), rows, asked, [task.forced_stop + answer for answer in answers],
                         Sampling(0, (), temperature), None, keep=False)
        logprob = samples.logprobs[:, len(task.forced_stop) :].sum(1)  # (R,) of the answer; what was forced before it is given
        for context, p in zip(asked, logprob.exp().tolist()):
            J[context] += p
    tokens = sum(len(answer) for _, _, answer in cases)
    return Forked(torch.tensor([J[context] for context in contexts], device=model.device), [], tokens)


def boundaries(task: Task, rollouts: Rollouts) -> tuple[list[int], list[int]]:
    """Row and position of b_0 … b_T of every rollout that has an episode: where J is estimated."""
    row, position = [], []
    for r, start in enumerate(rollouts.prompt_length):
        ends = task.episode_ends(rollouts.response(r))
        if ends:
            row += [r] * (len(ends) + 1)
            position += [start, *(start + end for end in ends)]
    return row, position


def training_sampling(task: Task, config: RunConfig) -> Sampling:
    """How training samples: room for the thinking budget and an answer, temperature and nothing else."""
    new_tokens = config.thinking_budget + task.forced_tokens
    return Sampling(new_tokens, (task.close_answer,), config.temperature)


def example(task: Task, rollouts: Rollouts, row: int, J: Sequence[float]) -> dict:
    """One rollout for the eye: prompt, episodes, J at b_0 … b_T (or nothing), answer, verdict."""
    response = rollouts.response(row)
    ends = task.episode_ends(response)
    return {"prompt": task.show(rollouts.tokens[row][: rollouts.prompt_length[row]]),
            "episodes": [task.show(response[a:b]) for a, b in zip([0, *ends], ends)], "J": [float(x) for x in J],
            "answer": task.show(response[ends[-1] if ends else 0 :]), "reward": rollouts.reward[row]}


def examples(model: Llama, task: Task, problems: Sequence, config: RunConfig, generator: torch.Generator) -> list[dict]:
    """A rollout of each problem with J at every boundary, whatever the algorithm of the run."""
    rollouts = roll_out(model, task, problems, 1, training_sampling(task, config), generator)
    row, position = boundaries(task, rollouts)
    J = force_answers(model, task, rollouts, row, position, config.forks, config.fork_temperature, generator).J
    return [example(task, rollouts, r, [x for owner, x in zip(row, J.tolist()) if owner == r]) for r in range(len(problems))]
