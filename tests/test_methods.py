"""The ten ways of gathering a batch: what is context and what is action, where J or V is asked for, and what it costs."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data.countdown import Countdown
from nanomrt import rollout
from nanomrt.config import RunConfig
from nanomrt.methods import METHODS, Gathered
from nanomrt.model import Llama
from nanomrt.rollout import force_answers

PROBLEMS, GROUP = 8, 4


class Verdicts(Countdown):
    """A task whose verdict a random model can earn: the parity of a hash of what is said after the thinking."""

    def grade(self, problem, response: str) -> float:
        _, close, answer = response.rpartition("</think>")
        return float(bool(close) and zlib.crc32(f"{problem} {answer}".encode()) % 2)


@pytest.fixture
def task() -> Countdown:
    return Verdicts()


@pytest.fixture
def model(config, task) -> Llama:
    """What it says depends on the context and is far from uniform: often `<try>`, sometimes `</think>` or `</answer>`."""
    model = Llama(replace(config, tie_word_embeddings=False)).initialise(generator(0))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
        model.lm_head.weight.mul_(15)
        model.lm_head.weight[task.open_episode] *= 2.5
        model.lm_head.weight[[task.close_thinking, task.stop]] *= 1.5
    return model


@pytest.fixture
def asked(monkeypatch) -> list[SimpleNamespace]:
    """Every call of the sampler, in order: whose context, what was forced, what was drawn."""
    calls, branch = [], rollout.branch

    def spy(model, prefix, segment, contexts, forced, sampling, generator):
        samples = branch(model, prefix, segment, contexts, forced, sampling, generator)
        calls.append(SimpleNamespace(contexts=[list(x) for x in contexts], forced=list(map(list, forced)), sampling=sampling,
                                     samples=samples, drawn=[n[m].tolist() for n, m in zip(samples.tokens, samples.is_action)]))
        return samples

    monkeypatch.setattr(rollout, "branch", spy)
    return calls


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(algorithm: str, **keys) -> RunConfig:
    return RunConfig(**dict(algorithm=algorithm, prompts_per_step=PROBLEMS, group_size=GROUP, thinking_budget=40) | keys)


def gather(model: Llama, task: Countdown, config: RunConfig, seed: int = 0) -> Gathered:
    problems = task.problems("train", config.prompts_per_step, 0)
    return METHODS[config.algorithm].gather(model, task, problems, config, generator(seed))


def actions(gathered: Gathered) -> list[list[bool]]:
    """Of each row."""
    return [part.tolist() for part in gathered.batch.is_action.split(gathered.batch.lengths.tolist())]


def episodes(gathered: Gathered) -> list[tuple[int, int, int, float, float]]:
    """(row, start, end, value before, value after), places counted from the row's first token."""
    E, offset = gathered.episodes, gathered.batch.offset
    columns = (E.row, E.start - offset[E.row], E.end - offset[E.row], E.J_before, E.J_after)
    return list(zip(*(x.tolist() for x in columns), strict=True))


# --- What alpha = 0 saves ---


@pytest.mark.parametrize("algorithm", ["mrt_online", "mrt", "mrt_b"])
def test_alpha_zero_asks_for_nothing(model, task, asked, algorithm):
    """Without a bonus J has no reader: no fork, no episode, and the credit is the outcome's."""
    config = settings(algorithm, alpha=0.0)
    gathered = gather(model, task, config)
    assert gathered.episodes is None and gathered.fork_tokens == 0
    assert gathered.trace_tokens == sum(call.samples.generated for call in asked)
    credit = METHODS[algorithm].credit(gathered.batch, None, config)
    assert torch.equal(credit, METHODS["grpo"].credit(gathered.batch, None, config)) and credit.any()


def test_what_has_no_bonus_does_not_heed_alpha(model, task):
    """vineppo, anytime and mrt_star measure their values whatever alpha is."""
    for algorithm in ("vineppo", "anytime", "mrt_star"):
        zero, one = (gather(model, task, settings(algorithm, alpha=alpha)) for alpha in (0.0, 1.0))
        assert zero.fork_tokens == one.fork_tokens > 0
        before, after = (METHODS[algorithm].credit(x.batch, x.episodes, settings(algorithm, alpha=alpha))
                         for x, alpha in ((zero, 0.0), (one, 1.0)))
        assert torch.equal(before, after) and after.any()


# --- vineppo ---


def test_V_is_the_mean_verdict_of_going_on_within_what_training_allows(model, task, asked):
    """V asks each different context at a boundary once, `forks` times; what has not answered where training would have cut the
    whole trace off is wrong, however right it becomes later."""
    config = settings("vineppo", forks=3, fork_temperature=1.0)
    gathered, (_, call) = gather(model, task, config), asked
    assert call.sampling == asked[0].sampling and not any(call.forced) and call.sampling.temperature == config.temperature
    problem, V, too_late = {}, {}, 0
    for r, row in enumerate(gathered.rollouts.tokens):
        for end in range(len(row)):
            problem[tuple(row[:end])] = r
    for i, (context, drawn) in enumerate(zip(call.contexts, call.drawn, strict=True)):
        assert context == call.contexts[i - i % 3]
        r = problem[tuple(context)]
        response = (context + drawn)[gathered.rollouts.prompt_length[r] :]
        right = task.grade(gathered.rollouts.problems[r], task.tokenizer.decode(response))
        too_late += right and len(response) > call.sampling.max_new_tokens
        right *= len(response) <= call.sampling.max_new_tokens
        V[tuple(context)] = V.get(tuple(context), 0) + right / 3
    assert too_late > 3 and len(call.contexts) == 3 * len(V)
    for r, start, end, before, after in episodes(gathered):
        row = gathered.rollouts.tokens[r]
        assert before == pytest.approx(V[tuple(row[:start])])
        assert after == pytest.approx(V[tuple(row[:end])] if end < len(row) else gathered.rollouts.reward[r])


# --- sft and mrt_star ---


def test_what_nobody_sampled_lies_where_the_model_is(task):
    """The batch of written traces, and J of no place at all; "meta" stands for any device but the default."""
    elsewhere = SimpleNamespace(head=torch.empty(1, device="meta"))
    batch = gather(elsewhere, task, settings("sft")).batch
    assert {x.device.type for x in vars(batch).values()} == {"meta"}
    assert force_answers(elsewhere, task, None, [], [], 1, 0.0, None).J.device.type == "meta"
