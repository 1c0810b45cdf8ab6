"""Test-time methods: spend more tokens on a problem, with a policy that stays as it is.

    majority     N rollouts, their commonest answer (Wang et al., arXiv 2203.11171)
    best_of_n    N rollouts, the answer of largest v (nanomrt/verifier.py; Cobbe et al., arXiv 2110.14168)
    oracle       N rollouts, right if any is: pass@N, what a perfect verifier would make of them
    beam         N partial traces of a problem; after every episode half of them stay, those of largest v, and are gone on from
                 (Snell et al., arXiv 2408.03314)
    linearised   one trace of as many attempts as we like, longer than the context: it sees its last episodes only (Qu et al.,
                 arXiv 2503.07572). Every attempt is asked for its answer and the commonest is taken; `linearised_last`: the
                 answer to the last attempt after which the policy would have stopped by itself

Compared at what they cost, in generated tokens per problem: those of traces that a beam drops and of answers that lose a vote
count. The verifier generates nothing: it reads what is there, and reading is not counted.
Left out: votes weighted by the verifier, and look-ahead.
Dimension key: P problems, R rows sampled together.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.task import Task
from nanomrt.config import RunConfig
from nanomrt.metrics import auc, bootstrap, maj_at_k, ratio
from nanomrt.model import Llama
from nanomrt.rollout import branch, grade, roll_out, training_sampling
from nanomrt.run import generator_for
from nanomrt.sampler import Sampling, prefill
from nanomrt.verifier import Verifier

COUNTS = (1, 2, 4, 8)  # N
ATTEMPTS = (1, 2, 4, 8, 16, 32, 64)  # of a linearised trace
WINDOW = 4  # episodes that it sees
ROWS = 512  # rows sampled at a time: bounds the memory


# --- Choosing among finished rollouts ---


class Sample(NamedTuple):
    """A rollout as a choice sees it."""

    answer: str | None  # None: it has none
    right: float
    v: float  # -inf without an answer


def best_by_v(samples: Sequence[Sample]) -> float:
    """The verdict on the sample that the verifier believes most; the mean over those that are tied."""
    best = max(sample.v for sample in samples)
    tied = [sample.right for sample in samples if sample.v == best]
    return sum(tied) / len(tied)


CHOICES: dict[str, Callable[[Sequence[Sample]], float]] = {
    "majority": lambda samples: maj_at_k([sample.answer for sample in samples], [sample.right for sample in samples]),
    "best_of_n": best_by_v,
    "oracle": lambda samples: max(sample.right for sample in samples),
}


def over_subsets(choice: Callable[[Sequence[Sample]], float], samples: Sequence[Sample], n: int) -> float:
    """What a choice among n of these samples is worth: the mean over all subsets, which wastes none of them."""
    return float(np.mean([choice(some) for some in combinations(samples, n)]))


# --- Beam search over episodes ---


class Trace(NamedTuple):
    """One of a problem's traces, as far as it is."""

    tokens: list[int]  # prompt included
    row: int  # where it is cached
    v: float
    done: bool  # it has ended, or is out of budget; v = -inf if it has no answer


def survivors(traces: Sequence[Trace], keep: int) -> list[Trace]:
    """The `keep` traces of largest v, best first; of equals, those that stand first."""
    return sorted(traces, key=lambda trace: -trace.v)[:keep]


def expanded(beam: Sequence[Trace], n: int) -> list[Trace]:
    """What is gone on from: the unfinished traces of a beam in turn, as often as finished ones leave room among n."""
    going = [trace for trace in beam if not trace.done]
    return [going[i % len(going)] for i in range(n - len(beam) + len(going))]


def beam_search(model: Llama, verifier: Verifier, task: Task, problems: Sequence, config: RunConfig, n: int,
                generator: torch.Generator) -> tuple[list[float], list[int]]:
    """The verdict on each problem's answer, and the tokens generated for it: (P,), (P,).

    A round samples one episode, with the token that opens what comes next, or the answer. A problem is over when the best of
    its traces has answered. A trace has a rollout's budget; whoever exceeds it has no answer.
    """
    prompts, keep = [task.prompt(problem) for problem in problems], max(1, n // 2)
    openings = (task.open_episode, task.go_back, task.close_thinking)
    limit = training_sampling(task, config)
    episode = Sampling(task.attempt_tokens + 1, (*openings, task.close_answer), limit.temperature)
    room = lambda p, tokens: len(prompts[p]) + limit.max_new_tokens - len(tokens)  # until a rollout would be cut off
    cache = prefill(model, prompts)
    beams = {p: [Trace(prompt, p, 0.0, False)] for p, prompt in enumerate(prompts)}  # of the problems that go on
    verdict, spent = [0.0] * len(problems), [0] * len(problems)
    while beams:
        going = [(p, trace) for p, beam in beams.items() for trace in expanded(beam, n)]  # (R,)
        most = torch.tensor([min(room(p, trace.tokens), episode.max_new_tokens) for p, trace in going], device=model.device)
        samples = branch(model, cache, [trace.row for _, trace in going], [trace.tokens for _, trace in going],
                         [[]] * len(going), replace(episode, max_new_tokens=most), generator)
        cache = samples.segments()
        grown = [trace.tokens + row[1:] for (_, trace), row in zip(going, samples.rows())]  # its first token was there before
        # v of the episode that has ended: whatever was opened after it comes later.
        values = verifier.values([tokens[:-1] if tokens[-1] in openings else tokens for tokens in grown])
        pool = {p: [trace for trace in beam if trace.done] for p, beam in beams.items()}
        for row, ((p, trace), tokens, v) in enumerate(zip(going, grown, values)):
            spent[p] += len(tokens) - len(trace.tokens)
            done = room(p, tokens) == 0 or tokens[-1] == task.close_answer
            lost = done and not task.answer(tokens[len(prompts[p]) :])
            pool[p].append(Trace(tokens, row, -np.inf if lost else v, done))
        beams = {p: survivors(traces, keep) for p, traces in pool.items()}
        for p, (best, *_) in list(beams.items()):
            if best.done:
                if best.v > -np.inf:
                    verdict[p] = grade(task, [problems[p]], [best.tokens[len(prompts[p]) :]])[0]
                del beams[p]
    return verdict, spent


# --- Linearised: a trace that is longer than its context ---


def window(ends: Sequence[int], keep: int, room: int) -> int:
    """Where the context begins, in thinking tokens: it holds the last `keep` whole episodes, or as many as `room` tokens hold.

    ends: where each episode so far ends. What is in the context next to the prompt is thinking[window(…):].

    >>> window([9, 18, 23, 32], 2, 100), window([9, 18, 23, 32], 2, 13), window([9, 18], 4, 100), window([], 4, 100)
    (18, 23, 0, 0)
    """
    starts = [0, *ends]
    return next(start for start in starts[max(0, len(ends) - keep) :] if starts[-1] - start <= room)


class Attempt(NamedTuple):
    """One attempt of a linearised trace."""

    tokens: int  # generated for it, without an answer
    answer: str | None  # a greedy one, forced after it
    right: float
    closed: bool  # the policy would have stopped thinking after it


def linearised(model: Llama, task: Task, problems: Sequence, config: RunConfig, attempts: int, keep: int,
               generator: torch.Generator) -> list[list[Attempt]]:
    """`attempts` attempts at each problem, one trace each: (P,attempts). What is sampled after an episode is the token that opens
    the next one, `<try>` or `<back>`; if the policy closes its thinking, a new attempt is opened instead."""
    prompts, thinking = [task.prompt(problem) for problem in problems], [[] for _ in problems]
    ends: list[list[int]] = [[] for _ in problems]
    opening = [task.open_episode for _ in problems]
    again = (task.open_episode, task.go_back)
    episode = Sampling(task.attempt_tokens, (*again, task.close_thinking, task.close_answer), config.temperature)
    answer = Sampling(task.answer_tokens, (task.close_answer,), 0.0)
    tail = 1 + task.attempt_tokens + task.forced_tokens  # of an attempt, next to prompt and window
    found: list[list[Attempt]] = [[] for _ in problems]
    rows = range(len(problems))
    for _ in range(attempts):
        contexts = []
        for r in rows:
            room = model.config.max_position_embeddings - len(prompts[r]) - tail
            contexts.append([*prompts[r], *thinking[r][window(ends[r], keep, room) :], opening[r]])
        samples = branch(model, prefill(model, contexts), rows, contexts, [[]] * len(rows), episode, generator)
        new = [row[1:] for row in samples.rows()]  # the opening was there before
        kept = [some[:-1] if stopped else some for some, stopped in zip(new, samples.stopped.tolist())]
        forced = branch(model, samples.segments(), rows, [context + some for context, some in zip(contexts, kept)],
                        [task.forced_stop] * len(rows), answer, generator).rows()
        verdicts = grade(task, problems, forced)
        for r in rows:
            drawn = new[r][-1] if len(kept[r]) < len(new[r]) else task.open_episode
            found[r].append(Attempt(len(new[r]), task.answer(forced[r]) or None, verdicts[r],
                                    drawn in (task.close_thinking, task.close_answer)))
            thinking[r] += [opening[r], *kept[r]]
            ends[r].append(len(thinking[r]))
            opening[r] = drawn if drawn in again else task.open_episode
    return found


def commonest(attempts: Sequence[Attempt], answer_tokens: int) -> tuple[float, int]:
    """The verdict on the commonest answer of these attempts, and its tokens: every attempt was asked."""
    return (maj_at_k([attempt.answer for attempt in attempts], [attempt.right for attempt in attempts]),
            sum(attempt.tokens + answer_tokens for attempt in attempts))


def last_closed(attempts: Sequence[Attempt], answer_tokens: int) -> tuple[float, int]:
    """The verdict on the answer to the last attempt after which the policy would have stopped, or to the last of all, and its
    tokens: one answer."""
    chosen = next((attempt for attempt in reversed(attempts) if attempt.closed), attempts[-1])
    return chosen.right, sum(attempt.tokens for attempt in attempts) + answer_tokens


# --- Measuring ---


def measure(model: Llama, verifier: Verifier, task: Task, problems: Sequence, config: RunConfig, seed: int | str,
            bar: str = "") -> dict:
    """The section `test_time` of summary.json: {method: {N, or attempts: accuracy, tokens per problem and per right answer, and
    the accuracy of a majority for as many tokens}}.

    `bar` is what a progress bar is called; '' draws none.
    """
    step = max(1, ROWS // max(COUNTS))
    starts, answer = range(0, len(problems), step), task.forced_tokens
    measured: dict[str, dict[int, list[tuple[float, float]]]] = {}  # (verdict, tokens) of each problem
    add = lambda name, n, rows: measured.setdefault(name, {}).setdefault(n, []).extend(rows)
    answers: list[Sample] = []
    for start in tqdm(starts, desc=bar, disable=not bar):
        some = problems[start : start + step]
        groups, tokens = sampled(model, verifier, task, some, config, generator_for(seed, "samples", start))
        answers += [sample for group in groups for sample in group if sample.answer is not None]
        for n in COUNTS:
            for name, choice in CHOICES.items():
                add(name, n, [(over_subsets(choice, group, n), n * mean) for group, mean in zip(groups, tokens)])
            add("beam", n, zip(*beam_search(model, verifier, task, some, config, n, generator_for(seed, f"beam/{n}", start))))
        traces = linearised(model, task, some, config, max(ATTEMPTS), WINDOW, generator_for(seed, "linearised", start))
        for n in ATTEMPTS:
            add("linearised", n, [commonest(trace[:n], answer) for trace in traces])
            add("linearised_last", n, [last_closed(trace[:n], answer) for trace in traces])
    methods = {name: {str(n): costed(np.array(rows)) for n, rows in by_n.items()} for name, by_n in measured.items()}
    return {
        "problems": len(problems), "window": WINDOW,
        "verifier_auc": auc([sample.v for sample in answers], [sample.right for sample in answers]),
        "methods": {name: {n: at | {"majority": at_equal_tokens(methods["majority"], at["tokens"])} for n, at in by_n.items()}
                    for name, by_n in methods.items()},
    }


def at_equal_tokens(by_n: dict[str, dict], tokens: float) -> float | None:
    """The accuracy that a method has for so many tokens, between its two neighbouring N; None beyond what was measured."""
    spent, accuracy = [at["tokens"] for at in by_n.values()], [at["accuracy"]["value"] for at in by_n.values()]
    return float(np.interp(tokens, spent, accuracy)) if spent[0] <= tokens <= spent[-1] else None


def sampled(model: Llama, verifier: Verifier, task: Task, problems: Sequence, config: RunConfig,
            generator: torch.Generator) -> tuple[list[list[Sample]], list[float]]:
    """max(COUNTS) rollouts of each problem, (P,N), and the mean of their tokens, (P,)."""
    N = max(COUNTS)
    rollouts = roll_out(model, task, problems, N, training_sampling(task, config), generator)
    values = verifier.values(rollouts.tokens)
    responses = rollouts.responses()
    samples = [Sample(answer or None, right, v if answer else -np.inf)
               for answer, right, v in zip(map(task.answer, responses), rollouts.reward, values)]
    return ([samples[i : i + N] for i in range(0, len(samples), N)],
            [sum(map(len, responses[i : i + N])) / N for i in range(0, len(samples), N)])


def costed(rows: np.ndarray) -> dict:
    """(P,2) verdicts and tokens -> what is reported of them."""
    return {"accuracy": bootstrap(rows[:, 0]), "tokens": float(rows[:, 1].mean()),
            "tokens_per_correct": bootstrap(rows[:, ::-1], ratio)}
