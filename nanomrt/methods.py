"""The family of methods, side by side: who is in a step's batch, what is measured inside of it, and how it is credited.

    method          rollouts                                   value of a context                credit (nanomrt/mrt.py)
    sft             search traces of the warm start            -                                 all of it is right
    star            the policy's traces                        -                                 the right ones are right
    grpo            the policy's traces                        -                                 outcome
    length_penalty  the policy's traces                        -                                 outcome minus a price on tokens
    mrt_online      the policy's traces                        J at every boundary               outcome + progress
    mrt             from a cut, half stopped, half going on    J there and one episode later     outcome + progress
    mrt_b           going on from a first attempt              J of that attempt                 outcome + what it gained
    mrt_star        traces cut where J is largest              J at every boundary               the right ones are right
    vineppo         the policy's traces                        V at every boundary               V after - V before
    anytime         the policy's traces                        J at every boundary               accuracy at all later budgets

J stops the thinking and takes an answer; V lets the policy go on to its end. A new idea is one more line in METHODS, a function
that gathers a batch, or one in `mrt.py` that credits it, or both; and its name in nanomrt/config.py, in `ALGORITHMS` and, beside
the keys that it reads, in `READ_BY`.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from data.task import Task
from nanomrt import mrt
from nanomrt.config import RunConfig
from nanomrt.model import Llama
from nanomrt.mrt import Batch, Episodes, episodes_between
from nanomrt.rollout import (
    Rollouts,
    boundaries,
    continue_from,
    example,
    force_answers,
    go_on,
    graded,
    roll_out,
    training_sampling,
)


@dataclass(frozen=True)
class Gathered:
    """What one step learns from."""

    rollouts: Rollouts
    batch: Batch
    episodes: Episodes | None  # None: nothing was measured inside of the rollouts
    trace_tokens: int  # generated, for the ledger
    fork_tokens: int = 0
    fork_seconds: float = 0.0  # wall clock of the forks
    forced: int = 0  # so many rows of the batch, the last ones, are those of `forced_on`, behind the rollouts

    def metrics(self) -> dict[str, float | None]:
        """What a step line says about the rollouts: means over rollouts, or over episodes for `progress`."""
        own, E = len(self.batch.lengths) - self.forced, self.episodes
        batch = self.batch.take(torch.arange(own, device=self.batch.lengths.device))
        if E is not None:
            E = Episodes(*(getattr(E, field.name)[E.row < own] for field in fields(E)))
        mean = lambda x: float(x.float().mean()) if len(x) else 0.0
        metrics = {"reward": mean(batch.reward), "finished": mean(batch.finished), "J_first": None, "J_last": None,
                   "progress": None, "episodes": None,
                   "response_tokens": int(batch.is_action.sum()) / len(batch.lengths)}
        if E is not None:
            metrics["episodes"] = len(E.row) / len(batch.lengths)
        if E is not None and len(E.row):  # J of nothing is unknown, not 0
            first, last = E.row != E.row.roll(1), E.row != E.row.roll(-1)
            first[:1], last[-1:] = True, True
            metrics |= {"J_first": mean(E.J_before[first]), "J_last": mean(E.J_after[last]), "progress": mean(E.progress())}
        return metrics

    def example(self, task) -> dict:
        """The batch's first rollout with an episode, and its values if they were measured at just its boundaries (the prefix form
        knows two of them)."""
        E, row, J, measured_at = self.episodes, 0, [], []
        if E is not None and len(E.row):
            row, first = int(E.row[0]), int(self.batch.offset[E.row[0]])
            J = E.J_before[:1].tolist() + E.J_after[E.row == row].tolist()
            measured_at = [int(E.start[0]) - first, *(E.end[E.row == row] - first).tolist()]
        start = self.rollouts.prompt_length[row]
        ends = [start + end for end in task.episode_ends(self.rollouts.response(row))]
        return example(task, self.rollouts, row, J if measured_at == [start, *ends] else [])


# --- Gathering: (model, task, problems, config, generator) -> Gathered ---


def traces(model: Llama, task: Task, problems: Sequence, config: RunConfig, generator: torch.Generator) -> Gathered:
    """The policy's own traces and their verdicts, nothing inside."""
    rollouts = roll_out(model, task, problems, config.group_size, training_sampling(task, config), generator)
    return Gathered(rollouts, rollouts.batch(), None, rollouts.samples.generated)


def traces_with_J(model, task, problems, config, generator) -> Gathered:
    """The policy's own traces, and J at every boundary."""
    gathered = traces(model, task, problems, config, generator)
    return measured(gathered, *boundaries(task, gathered.rollouts), stopping(model, task, config, generator))


def traces_for_progress(model, task, problems, config, generator) -> Gathered:
    """As `traces_with_J`, with `forced_on`; but with alpha = 0 nothing reads J, and none is measured."""
    if config.alpha == 0:
        return traces(model, task, problems, config, generator)
    gathered = traces_with_J(model, task, problems, config, generator)
    return with_forced_on(gathered, model, task, config, generator) if config.forced_on else gathered


def with_forced_on(gathered, model, task, config, generator) -> Gathered:
    """Some of the traces that stopped (a share, `forced_on`) are in the batch once more, behind the others: forced to go on from
    there to the end of the budget. So a policy learns what to do where it would have stopped, which it hardly ever sees.

    What was before the stop is context, and so is every `<try>`: it may stand for a `</think>`. Each is a group of its own, so it
    has progress and no outcome. `J_discount` charges going on where the answer is known, and nobody here has chosen to: progress
    is J_discount · (J after - J before), and what changes nothing costs nothing (NOTES.md has what happens if it does)."""
    rollouts, close, sampling = gathered.rollouts, task.close_thinking, training_sampling(task, config)
    chosen = (torch.rand(len(rollouts.tokens), generator=generator) < config.forced_on).tolist()  # (B,)
    rows, contexts, room = [], [], []  # of those that go on: whose trace, as far as it thought, and how many tokens are left
    for r, start in enumerate(rollouts.prompt_length):
        stop = start + task.thinking_tokens(rollouts.response(r))
        left = start + sampling.max_new_tokens - stop
        if chosen[r] and rollouts.tokens[r][stop : stop + 1] == [close] and left > task.forced_tokens:
            rows.append(r)
            contexts.append(rollouts.tokens[r][:stop])
            room.append(left - 1)
    if not rows:
        return gathered
    sampling = replace(sampling, max_new_tokens=torch.tensor(room, device=model.device), instead=(close, task.open_episode))
    more = continue_from(model, task, [rollouts.problems[r] for r in rows], rollouts.samples.segments(), rows, contexts,
                         [[task.open_episode]] * len(rows), range(len(rollouts.tokens), len(rollouts.tokens) + len(rows)),
                         sampling, generator)
    samples = more.samples
    more = replace(more, samples=replace(samples, is_action=samples.is_action & (samples.tokens != task.open_episode)))
    batch = replace(more.batch(), finished=torch.ones(len(rows), dtype=torch.bool, device=model.device))  # nobody cut them off
    new = [(r, place) for r, place in zip(*boundaries(task, more)) if place >= len(contexts[r])]  # from the stop on
    forced = measured(Gathered(more, batch, None, samples.generated), [r for r, _ in new], [place for _, place in new],
                      stopping(model, task, config, generator))
    uncharged = replace(forced.episodes, J_before=config.J_discount * forced.episodes.J_before)
    return joined(gathered, replace(forced, episodes=uncharged))


def joined(a: Gathered, b: Gathered) -> Gathered:
    """The batches and episodes of both, a's first. The rollouts stay a's: b's rows are counted as forced."""
    rows, tokens = len(a.batch.lengths), len(a.batch.tokens)
    later = replace(b.episodes, row=b.episodes.row + rows, start=b.episodes.start + tokens, end=b.episodes.end + tokens)
    cat = lambda x, y: type(x)(*(torch.cat([getattr(x, field.name), getattr(y, field.name)]) for field in fields(x)))
    return replace(a, batch=cat(a.batch, b.batch), episodes=cat(a.episodes, later), trace_tokens=a.trace_tokens + b.trace_tokens,
                   fork_tokens=a.fork_tokens + b.fork_tokens, fork_seconds=a.fork_seconds + b.fork_seconds,
                   forced=len(b.batch.lengths))


def traces_with_V(model, task, problems, config, generator) -> Gathered:
    """The policy's own traces, and V at every boundary; after the answer it is the reward. The answer is the last episode."""
    gathered = traces(model, task, problems, config, generator)
    rollouts, row, position, known = gathered.rollouts, [], [], []
    for r, start in enumerate(rollouts.prompt_length):
        ends = [end for end in task.episode_ends(rollouts.response(r)) if start + end < len(rollouts.tokens[r])]
        row += [r] * (len(ends) + 2)
        position += [start, *(start + end for end in ends), len(rollouts.tokens[r])]
        known += [None] * (len(ends) + 1) + [rollouts.reward[r]]
    value = lambda *where: go_on(model, task, *where, config, generator)
    return measured(gathered, row, position, value, known)


def prefix_form(model, task, problems, config, generator) -> Gathered:
    """MRT's prefix form (Qu et al., arXiv 2503.07572): each row cuts its problem's trace of T episodes after j of them, j uniform
    in 0..T-1; from there, half of a group is forced to answer now and half goes on, and progress is the first new episode's,
    J_{j+1} - J_j. In the paper it is implicit: rewards are normalised over a prefix's traces, and a trace is paid at its end.
    With decision_in_loss the forced `</think>` is learned like the other half's decision to go on; what was forced after it never
    is."""
    G, base = config.group_size, roll_out(model, task, problems, 1, training_sampling(task, config), generator)
    owner = [i for i in range(len(problems)) for _ in range(G)]
    pick, cut = torch.rand(len(owner), generator=generator).tolist(), []
    for i, share in zip(owner, pick):
        places = [0, *task.episode_ends(base.response(i))[:-1]]  # 0 … T-1 episodes stay
        cut.append(base.prompt_length[i] + places[int(share * len(places))])
    stopped = [r % G < G // 2 for r in range(len(owner))]
    # A row that stops is fed the token before its cut once more, so that the forced `</think>` after it has a log-prob.
    contexts = [base.tokens[i][: c - stop] for i, c, stop in zip(owner, cut, stopped)]
    forced = [[base.tokens[i][c - 1], *task.forced_stop] if stop else [] for i, c, stop in zip(owner, cut, stopped)]
    rollouts = continue_from(model, task, [problems[i] for i in owner], base.samples.segments(), owner, contexts, forced, owner,
                             training_sampling(task, config), generator)
    tokens = base.samples.generated + rollouts.samples.generated
    if config.decision_in_loss:
        decided = torch.zeros_like(rollouts.samples.is_action)
        decided[:, 1] = torch.tensor(stopped, device=decided.device)  # after the token that was given again: the forced </think>
        rollouts = replace(rollouts, samples=replace(rollouts.samples, is_action=rollouts.samples.is_action | decided))
    row, position = [], []
    for r, start in enumerate(rollouts.prompt_length):
        new = [start + end for end in task.episode_ends(rollouts.response(r)) if start + end > cut[r]]
        if new and not stopped[r]:
            row += [r, r]
            position += [cut[r], new[0]]
    gathered = Gathered(rollouts, rollouts.batch(), None, tokens)
    return gathered if config.alpha == 0 else measured(gathered, row, position, stopping(model, task, config, generator))


def after_an_attempt(model, task, problems, config, generator) -> Gathered:
    """MRT's backtracking form (arXiv 2503.07572): every row makes an attempt of its own, z_1, and goes on from there; z_1 is
    context, not action. What follows is one episode: from J(z_1) to the verdict."""
    sampling = training_sampling(task, config)
    one = replace(sampling, max_new_tokens=task.attempt_tokens)
    base = roll_out(model, task, problems, config.group_size, one, generator)
    cut = [start + (task.episode_ends(base.response(r)) or [0])[0] for r, start in enumerate(base.prompt_length)]
    rows = range(len(cut))
    rollouts = continue_from(model, task, base.problems, base.samples.segments(), rows,
                             [base.tokens[r][: cut[r]] for r in rows], [[]] * len(cut), base.prompt_id, sampling, generator)
    gathered = Gathered(rollouts, rollouts.batch(), None, base.samples.generated + rollouts.samples.generated)
    if config.alpha == 0:
        return gathered
    where = [(r, place, known) for r in rows for place, known in ((cut[r], None), (len(rollouts.tokens[r]), rollouts.reward[r]))]
    row, position, known = map(list, zip(*where))
    return measured(gathered, row, position, stopping(model, task, config, generator), known)


def best_prefixes(model, task, problems, config, generator) -> Gathered:
    """MRT's STaR form (arXiv 2503.07572): every trace is cut at b_j, j the earliest argmax of J_j, and goes on with a right
    answer forced there. A trace without one stays as it is, and so does its verdict. The paper's J is the mean of 20 sampled
    answers (`forks`, `fork_temperature`); of a single greedy one, a lucky guess is an argmax."""
    gathered = traces(model, task, problems, config, generator)
    rollouts, (row, position) = gathered.rollouts, boundaries(task, gathered.rollouts)
    began = time.perf_counter()
    forced = force_answers(model, task, rollouts, row, position, config.forks, config.fork_temperature, generator)
    best: dict[int, int] = {}  # of each trace: where J is largest
    for i, r in enumerate(row):
        if r not in best or forced.J[i] > forced.J[best[r]]:
            best[r] = i
    tokens = list(rollouts.tokens)
    for r, i in best.items():
        right = [answer for answer, verdict in forced.branches[i] if verdict == 1]
        if right:
            tokens[r] = rollouts.tokens[r][: position[i]] + right[0]
    kept = graded(task, rollouts.problems, rollouts.prompt_id, tokens)
    batch = kept.batch(model.device)
    return Gathered(kept, batch, None, gathered.trace_tokens, forced.generated, time.perf_counter() - began)


def search_traces(model, task, problems, config, generator) -> Gathered:
    """What the warm start learns from, flaws included: `group_size` traces of each problem, none of them sampled."""
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    owner = [i for i in range(len(problems)) for _ in range(config.group_size)]
    tokens = [task.prompt(problems[i]) + task.warm_trace(problems[i], rng)[0] for i in owner]
    rollouts = graded(task, [problems[i] for i in owner], owner, tokens)
    return Gathered(rollouts, rollouts.batch(model.device), None, 0)


def stopping(model: Llama, task: Task, config: RunConfig, generator: torch.Generator) -> Callable:
    """How J is asked for: (rollouts, row, position) -> Forked."""
    return lambda *where: force_answers(model, task, *where, config.forks, config.fork_temperature, generator)


def measured(gathered: Gathered, row: list[int], position: list[int], value: Callable,
             known: Sequence[float | None] | None = None) -> Gathered:
    """With the episodes between these boundaries; `value` is asked for what isn't `known`."""
    began, known = time.perf_counter(), known or [None] * len(row)
    ask = [i for i, x in enumerate(known) if x is None]
    forked = value(gathered.rollouts, [row[i] for i in ask], [position[i] for i in ask])
    device = gathered.batch.reward.device
    J = torch.tensor([x or 0.0 for x in known], device=device)  # (len(row),)
    J[ask] = forked.J
    at = torch.tensor(row, dtype=torch.int64, device=device)
    place = gathered.batch.offset[at] + torch.tensor(position, dtype=torch.int64, device=device)
    return replace(gathered, episodes=episodes_between(at, place, J), fork_tokens=gathered.fork_tokens + forked.generated,
                   fork_seconds=gathered.fork_seconds + time.perf_counter() - began)


# --- The family ---


class Method(NamedTuple):
    gather: Callable[..., Gathered]
    credit: Callable[[Batch, Episodes | None, RunConfig], Tensor]  # (N,)


METHODS = {
    "sft": Method(search_traces, mrt.plain_credit),
    "star": Method(traces, mrt.imitation_credit),
    "grpo": Method(traces, mrt.outcome_credit),
    "length_penalty": Method(traces, mrt.short_outcome_credit),
    "mrt_online": Method(traces_for_progress, mrt.progress_credit),
    "mrt": Method(prefix_form, mrt.progress_credit),
    "mrt_b": Method(after_an_attempt, mrt.prefix_bonus_credit),
    "mrt_star": Method(best_prefixes, mrt.imitation_credit),
    "vineppo": Method(traces_with_V, mrt.value_credit),
    "anytime": Method(traces_with_J, mrt.anytime_credit),
}
