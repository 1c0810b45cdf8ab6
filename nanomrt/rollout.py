"""What the policy does with a task: roll out traces, force answers at chosen points, cut and continue.

This is where problems, tokens and verdicts meet; `mrt.py` only ever sees the tensors of a `Batch`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomrt.config import RunConfig
from nanomrt.model import Llama
from nanomrt.mrt import Batch, Episodes, episodes_between
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
        spread = lambda x: torch.zeros(int(lengths.sum()), dtype=x.dtype, device=device).index_copy(0, where, x[real])
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
    """Sample after contexts[r] + forced[r], reusing the cache of segment[r], which must begin with contexts[r].

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

    Every fork branches from its trace's cache. Equal contexts have equal J and are asked once: all rollouts of a prompt share
    J_0, and many share their first attempt. Returns J (len(row),) fp32 and the number of tokens generated.
    """
    if not row:
        return torch.zeros(0), 0
    contexts = [tuple(rollouts.tokens[r][:p]) for r, p in zip(row, position)]
    asked = {context: r for context, r in zip(contexts, row)}  # each context, and a row that has it cached
    rows = [r for r in asked.values() for _ in range(forks)]
    sampling = Sampling(task.answer_tokens, (task.stop,), temperature)
    samples = branch(model, rollouts.samples.segments(), rows, [context for context in asked for _ in range(forks)],
                     [task.forced_stop] * len(rows), sampling, generator)
    verdicts = torch.tensor(grade(task, [rollouts.problems[r] for r in rows], samples.rows())).view(-1, forks).mean(1)
    J = dict(zip(asked, verdicts.tolist()))
    return torch.tensor([J[context] for context in contexts], device=model.head.device), samples.generated


def boundaries(task, rollouts: Rollouts) -> tuple[list[int], list[int]]:
    """Row and position of b_0 … b_T of every rollout that has an episode: where J is estimated."""
    row, position = [], []
    for r, start in enumerate(rollouts.prompt_length):
        ends = task.episode_ends(rollouts.response(r))
        if ends:
            row += [r] * (len(ends) + 1)
            position += [start, *(start + end for end in ends)]
    return row, position


@dataclass(frozen=True)
class Collected:
    """What one RL step learns from."""

    rollouts: Rollouts
    batch: Batch
    episodes: Episodes | None  # None: no progress was measured
    trace_tokens: int  # generated, for the ledger
    fork_tokens: int
    seconds: dict[str, float]  # wall clock of sampling traces and of forcing answers

    def metrics(self) -> dict[str, float | None]:
        """What a step line says about the rollouts: means over rollouts, or over episodes for `progress`."""
        batch, E = self.batch, self.episodes
        mean = lambda x: float(x.float().mean()) if len(x) else 0.0
        metrics = {"reward": mean(batch.reward), "finished": mean(batch.finished), "J_first": None, "J_last": None,
                   "progress": None, "episodes": None,
                   "response_tokens": int(batch.is_action.sum()) / len(batch.lengths)}
        if E is not None:
            first, last = E.row != E.row.roll(1), E.row != E.row.roll(-1)
            first[:1], last[-1:] = True, True
            metrics |= {"J_first": mean(E.J_before[first]), "J_last": mean(E.J_after[last]), "progress": mean(E.progress),
                        "episodes": len(E.row) / len(batch.lengths)}
        return metrics

    def example(self, task) -> dict:
        """The batch's first rollout with an episode, and its J if it is known at every boundary (in the prefix form it is
        known at two)."""
        E, row, J = self.episodes, 0, []
        if E is not None and len(E.row):
            row = int(E.row[0])
            J = E.J_before[:1].tolist() + E.J_after[E.row == row].tolist()
        episodes = len(task.episode_ends(self.rollouts.response(row)))
        return example(task, self.rollouts, row, J if len(J) == episodes + 1 else [])


def training_sampling(task, config: RunConfig) -> Sampling:
    """How training samples: room for the thinking budget and an answer, temperature and nothing else."""
    new_tokens = config.thinking_budget + len(task.forced_stop) + task.answer_tokens
    return Sampling(new_tokens, (task.stop,), config.temperature)


def collect(model: Llama, task, problems: Sequence, config: RunConfig, generator: torch.Generator) -> Collected:
    """The batch of the configured algorithm: who is in it, and how J changed over its episodes."""
    sampling = training_sampling(task, config)
    form = prefix_form if config.algorithm == "mrt" else whole_traces
    began = time.perf_counter()
    rollouts, row, position, known, trace_tokens = form(model, task, problems, config, sampling, generator)
    batch = rollouts.batch()
    traced = time.perf_counter()
    if config.algorithm == "grpo" or config.alpha == 0 or not row:
        return Collected(rollouts, batch, None, trace_tokens, 0, {"trace": traced - began})
    ask = [i for i, J in enumerate(known) if J is None]
    estimated, fork_tokens = force_answers(model, task, rollouts, [row[i] for i in ask], [position[i] for i in ask],
                                           config.forks, config.fork_temperature, generator)
    J = torch.tensor([0.0 if J is None else J for J in known], device=batch.reward.device)
    J[ask] = estimated
    row, position = torch.tensor(row, device=J.device), torch.tensor(position, device=J.device)
    episodes = episodes_between(row, batch.offset[row] + position, J)
    seconds = {"trace": traced - began, "fork": time.perf_counter() - traced}
    return Collected(rollouts, batch, episodes, trace_tokens, fork_tokens, seconds)


def whole_traces(model, task, problems, config, sampling, generator):
    """GRPO and MRT's on-policy form: whole traces, and every boundary of each. J is not known yet anywhere."""
    rollouts = roll_out(model, task, problems, config.group_size, sampling, generator)
    row, position = boundaries(task, rollouts)
    return rollouts, row, position, [None] * len(row), rollouts.samples.generated


def prefix_form(model, task, problems, config, sampling, generator):
    """MRT's prefix form: cut one trace per problem after a random number of episodes; from there, half of the group is
    forced to answer now and half goes on. The forced half's mean verdict is J of the prefix, and what a continuing row
    gained by its first new episode is that episode's progress."""
    G, half = config.group_size, config.group_size // 2
    traces = roll_out(model, task, problems, 1, sampling, generator)
    starts = []
    for r, start in enumerate(traces.prompt_length):
        ends = task.episode_ends(traces.response(r))
        pick = int(torch.randint(max(len(ends), 1), (1,), generator=generator))  # 0 … T-1 episodes stay
        starts.append(start + ([0, *ends][pick]))
    owner = [i for i in range(len(problems)) for _ in range(G)]
    forced = [task.forced_stop if r % G < half else [] for r in range(len(owner))]
    rollouts = continue_from(model, task, [problems[i] for i in owner], traces.samples.segments(), owner,
                             [traces.tokens[i][: starts[i]] for i in owner], forced, owner, sampling, generator)
    row, position, known = [], [], []
    for r, i in enumerate(owner):
        new_ends = [end for end in task.episode_ends(rollouts.response(r)) if traces.prompt_length[i] + end > starts[i]]
        if not forced[r] and new_ends:
            J_prefix = sum(rollouts.reward[i * G : i * G + half]) / half
            row += [r, r]
            position += [starts[i], traces.prompt_length[i] + new_ends[0]]
            known += [J_prefix, None]
    return rollouts, row, position, known, traces.samples.generated + rollouts.samples.generated


def example(task, rollouts: Rollouts, row: int, J: Sequence[float]) -> dict:
    """One rollout for the eye: prompt, episodes, J at b_0 … b_T (or nothing), answer, verdict."""
    response = rollouts.response(row)
    ends = task.episode_ends(response)
    return {"prompt": task.show(rollouts.tokens[row][: rollouts.prompt_length[row]]),
            "episodes": [task.show(response[a:b]) for a, b in zip([0, *ends], ends)], "J": [float(x) for x in J],
            "answer": task.show(response[ends[-1] if ends else 0 :]), "reward": rollouts.reward[row]}


def examples(model: Llama, task, problems: Sequence, config: RunConfig, generator: torch.Generator) -> list[dict]:
    """A rollout of each problem with J at every boundary, whatever the algorithm of the run."""
    rollouts = roll_out(model, task, problems, 1, training_sampling(task, config), generator)
    row, position = boundaries(task, rollouts)
    J, _ = force_answers(model, task, rollouts, row, position, config.forks, config.fork_temperature, generator)
    return [example(task, rollouts, r, [x for owner, x in zip(row, J.tolist()) if owner == r]) for r in range(len(problems))]
