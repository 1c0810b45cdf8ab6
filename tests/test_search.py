"""Test-time methods against closed forms and brute force: subsets, the beam's survivors, what a sliding window holds."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from test_evaluate import SOLVED, UNSOLVED, Scripted

from evaluate import sample_chunk
from nanomrt import search
from nanomrt.config import RunConfig
from nanomrt.metrics import maj_at_k, pass_at_k
from nanomrt.model import Packed
from nanomrt.rollout import roll_out, training_sampling
from nanomrt.run import generator_for
from nanomrt.search import (
    CHOICES,
    Attempt,
    Sample,
    Trace,
    at_equal_tokens,
    beam_search,
    best_by_v,
    commonest,
    expanded,
    last_closed,
    linearised,
    measure,
    over_subsets,
    sampled,
    survivors,
    window,
)
from nanomrt.verifier import Verifier

RUN = RunConfig(thinking_budget=36, eval_budget=54, trace_max_attempts=4, device="cpu")
NONE = -math.inf


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Judge:
    """Believes a rule, and remembers what it was asked."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def values(self, tokens):
        self.asked.append([list(row) for row in tokens])
        return [self.rule(row) for row in tokens]


# --- Choosing among samples ---

SAMPLES = [Sample("a", 1.0, 0.3), Sample("b", 0.0, 0.9), Sample("a", 1.0, 0.6), Sample(None, 0.0, NONE), Sample("c", 0.0, 0.1),
           Sample("d", 1.0, 0.7)]


@pytest.mark.parametrize("n", range(1, 7))
def test_choices_over_subsets_are_what_their_closed_forms_say(n):
    right = [sample.right for sample in SAMPLES]
    assert over_subsets(CHOICES["oracle"], SAMPLES, n) == pytest.approx(pass_at_k(6, 3, n))
    ranked = sorted(SAMPLES, key=lambda sample: sample.v)  # the i-th lowest is the best of n if the others lie below it
    best = sum(math.comb(i, n - 1) * sample.right for i, sample in enumerate(ranked)) / math.comb(6, n)
    assert over_subsets(CHOICES["best_of_n"], SAMPLES, n) == pytest.approx(best)
    voted = [maj_at_k([s.answer for s in some], [s.right for s in some]) for some in combinations(SAMPLES, n)]
    assert over_subsets(CHOICES["majority"], SAMPLES, n) == pytest.approx(np.mean(voted))
    assert all(over_subsets(choice, SAMPLES, 1) == pytest.approx(np.mean(right)) for choice in CHOICES.values())


def test_a_choice_without_an_answer_is_wrong_and_ties_are_shared():
    silent = [Sample(None, 0.0, NONE)] * 3
    assert {choice(silent) for choice in CHOICES.values()} == {0.0}
    assert best_by_v([Sample("a", 1.0, 0.8), Sample("b", 0.0, 0.8), Sample("c", 1.0, 0.2)]) == 0.5


# --- Beam search ---


def test_survivors_are_the_best_and_the_unfinished_among_them_fill_the_beam():
    a, b, c, d = (Trace([i], i, v, done) for i, (v, done) in enumerate([(0.2, False), (0.9, True), (0.5, False), (0.5, False)]))
    assert survivors([a, b, c, d], 3) == [b, c, d] and survivors([a], 3) == [a]
    assert expanded([b, c, d], 6) == [c, d, c, d, c]  # the finished one holds a place
    assert expanded([c], 4) == [c] * 4 and expanded([a, c], 2) == [a, c]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("closes, ready", [(20, 15), (36, 30), (37, 30), (1000, 0)])
def test_a_beam_of_a_policy_without_choice_is_its_rollout_n_times(task, closes, ready, n):
    """In time, at the last moment, one token too late, never: the verdict is that of a rollout, and all tokens are counted."""
    policy, problems = Scripted(task, closes, ready), [SOLVED, UNSOLVED]
    rollouts = roll_out(policy, task, problems, 1, training_sampling(task, RUN), seeded())
    verdict, spent = beam_search(policy, Judge(lambda row: 0.5), task, problems, RUN, n, seeded())
    assert verdict == rollouts.reward
    assert spent == [n * len(rollouts.response(row)) for row in range(2)]


def test_a_cold_policys_beam_of_one_is_its_rollout(task, model):
    """The same tokens from the same caches: at temperature 1e-6 nothing is left to chance."""
    cold, problems = replace(RUN, temperature=1e-6), task.problems("test", 4, 0)
    rollouts = roll_out(model, task, problems, 1, training_sampling(task, cold), seeded())
    judge = Judge(lambda row: 0.5)
    verdict, spent = beam_search(model, judge, task, problems, cold, 1, seeded(1))
    assert verdict == rollouts.reward and spent == [len(rollouts.response(row)) for row in range(4)]
    seen = [row for rows in judge.asked for row in rows]
    assert all(any(row == whole[: len(row)] or whole == row[: len(whole)] for whole in rollouts.tokens) for row in seen)


def test_only_the_best_partial_traces_are_gone_on_from(task, model):
    """A judge that likes small token sums and no answers: what it sees next always extends one of the two that it liked best."""
    judge = Judge(lambda row: 0.0 if row[-1] == task.close_answer else 1 / (1 + sum(row)))
    problem = task.problems("test", 1, 0)
    prompt = task.prompt(problem[0])
    _, [spent] = beam_search(model, judge, task, problem, RUN, 4, seeded(3))
    assert len(judge.asked) > 3 and [len(rows) for rows in judge.asked[:2]] == [4, 4]
    for before, after in zip(judge.asked, judge.asked[1:]):
        best = sorted(before, key=judge.rule, reverse=True)[:2]
        assert all(any(row[: len(seen)] == seen for seen in best) for row in after)
    assert max(map(len, judge.asked[-1])) <= len(prompt) + RUN.thinking_budget + 10 + task.attempt_tokens
    assert spent >= sum(len(row) - len(prompt) for row in judge.asked[0])


class Torn(Scripted):
    """Half of the time it answers after 20 tokens, wrongly, and else after 30, rightly."""

    def __init__(self, task):
        super().__init__(task, 30, 25)

    def __call__(self, tokens, positions, attend):
        logits = super().__call__(tokens, positions, attend)
        return logits + (positions == 6 + 20).float()[:, None] * 100 * self.head[self.task.close_thinking]


def test_a_beam_ends_with_its_best_trace_and_its_verdict(task):
    """A judge that loves an answer ends the search as soon as there is one; one that hates it hopes for the others to the end."""
    verdict, spent = {}, {}
    for love in (1.0, 0.0):
        judge = Judge(lambda row, love=love: love if row[-1] == task.close_answer else 0.5)
        [verdict[love]], [spent[love]] = beam_search(Torn(task), judge, task, [SOLVED], RUN, 4, seeded(3))
    assert verdict == {1.0: 0.0, 0.0: 1.0} and spent[1.0] < spent[0.0]


class Hasty(Scripted):
    """Half of the time it begins an answer, right as it may be, in its thinking: `<answer> </think> ( 3 * 7 ) + 4 </answer>`."""

    def next_word(self, word, position):
        said = {("<answer>", 7): "</think>", ("</think>", 8): "("}  # a prompt takes 7
        return said.get((word, position)) or super().next_word(word, position)

    def __call__(self, tokens, positions, attend):
        logits = super().__call__(tokens, positions, attend)
        begins = (positions == 6).float()[:, None]
        return logits + begins * 100 * self.head[self.task.open_answer]


def test_what_is_said_inside_the_thinking_is_no_answer(task):
    """It gets no vote and cannot be chosen, however much the verifier believes it: as for the reward, there is no answer."""
    policy, hasty = Hasty(task, 20, 15), [task.open_answer, task.close_answer]
    judge = Judge(lambda row: 1.0 if row[7:8] + row[-1:] == hasty else 0.5)
    [group], _ = sampled(policy, judge, task, [SOLVED], RUN, seeded())
    assert set(group) == {Sample(None, 0.0, NONE), Sample("( 3 * 7 ) + 4", 1.0, 0.5)}
    assert [CHOICES[name](group) for name in ("majority", "best_of_n")] == [1.0, 1.0]
    assert beam_search(policy, judge, task, [SOLVED], RUN, 8, seeded(1))[0] == [1.0]
    chunk = sample_chunk(policy, task, [SOLVED], replace(RUN, eval_samples=8), [54], generator_for(0, "test", 0), True)
    assert set(chunk["vote"]) == {"", "( 3 * 7 ) + 4"}


def test_beams_of_several_problems_do_not_mix(task, model):
    problems = task.problems("test", 3, 1)
    judge = Judge(lambda row: 1 / (1 + sum(row)))
    verdict, spent = beam_search(model, judge, task, problems, RUN, 2, seeded())
    assert len(verdict) == len(spent) == 3 and min(spent) > 0
    prompts = [task.prompt(problem) for problem in problems]
    assert all(any(row[: len(prompt)] == prompt for prompt in prompts) for rows in judge.asked for row in rows)
    assert (verdict, spent) == beam_search(model, Judge(judge.rule), task, problems, RUN, 2, seeded())
    greedy = replace(RUN, temperature=1e-6)  # no randomness is left: alone and together a problem has the same beams
    alone = [beam_search(model, Judge(judge.rule), task, [problem], greedy, 2, seeded()) for problem in problems]
    assert beam_search(model, Judge(judge.rule), task, problems, greedy, 2, seeded()) == tuple(map(list, zip(
        *((right[0], tokens[0]) for right, tokens in alone))))


def test_a_beam_is_judged_before_what_opens_the_next_episode(task):
    """This policy says nothing but `<try>`: its first episode is empty, its second one is one of them."""
    judge, prompt = Judge(lambda row: 0.5), task.prompt(SOLVED)
    beam_search(Scripted(task, 20, 15), judge, task, [SOLVED], RUN, 2, seeded())
    assert judge.asked[:3] == [[prompt + [task.open_episode] * n] * 2 for n in range(3)]


# --- The window of a linearised trace ---


@pytest.mark.parametrize("keep", range(5))
@pytest.mark.parametrize("room", [0, 1, 5, 9, 20, 1000])
def test_a_window_is_the_longest_run_of_last_whole_episodes_that_fits(keep, room):
    for lengths in ([], [9], [9, 9, 9], [1, 20, 3], [5, 4, 9, 1, 1, 6]):
        ends = np.cumsum(lengths).tolist()
        fitting = [k for k in range(min(keep, len(lengths)) + 1) if sum(lengths[len(lengths) - k :]) <= room]
        assert window(ends, keep, room) == sum(lengths) - sum(lengths[len(lengths) - max(fitting) :])


@pytest.fixture
def contexts(monkeypatch) -> list[list[list[int]]]:
    """What was put before the policy in each round."""
    seen, prefill = [], search.prefill
    monkeypatch.setattr(search, "prefill", lambda model, rows: seen.append(list(map(list, rows))) or prefill(model, rows))
    return seen


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_linearised_trace_sees_its_prompt_and_its_last_episodes_and_outgrows_the_context(task, model, contexts, keep):
    problems = task.problems("test", 2, 0)
    found = linearised(model, task, problems, RUN, 45, keep, seeded())
    assert [len(trace) for trace in found] == [45, 45]
    assert all(sum(attempt.tokens for attempt in trace) > model.config.max_position_embeddings for trace in found)
    for r, problem in enumerate(problems):
        prompt, episodes = task.prompt(problem), []
        for before, after, attempt in zip(contexts, contexts[1:], found[r]):
            now, following = before[r], after[r]
            assert now[: len(prompt)] == prompt and now[-1] in (task.open_episode, task.go_back)
            assert now[len(prompt) : -1] == sum(episodes[max(0, len(episodes) - keep) :], [])
            if keep:  # the episode that was made of this context: its opening and what was sampled, without what opens the next
                new = following[len(prompt) : -1]
                start = sum(map(len, episodes[max(0, len(episodes) - keep + 1) :])) if keep > 1 else 0
                episodes.append(new[start:])
                assert episodes[-1][0] == now[-1] and attempt.tokens - (len(episodes[-1]) - 1) in (0, 1)


def test_a_window_shrinks_where_the_context_ends(task, model, contexts):
    """With all episodes kept, the longest context leaves room for an attempt, the forced stop and an answer, and no more."""
    problem = task.problems("test", 1, 0)
    linearised(model, task, problem, RUN, 40, 1000, seeded())
    longest = max(len(rows[0]) for rows in contexts)
    free = model.config.max_position_embeddings - longest - task.attempt_tokens - len(task.forced_stop) - task.answer_tokens
    assert 0 <= free < task.attempt_tokens + 1


def greedy(model, tokens: list[int], limit: int, stops: tuple[int, ...]) -> list[int]:
    """What a policy most likely writes next, by a whole forward pass for every token."""
    new: list[int] = []
    while len(new) < limit and not (new and new[-1] in stops):
        packed = Packed.of(torch.tensor([len(tokens) + len(new)]))
        hidden = model(torch.tensor(tokens + new), packed.position_ids, packed)
        new.append(int((hidden[-1] @ model.head.T).argmax()))
    return new


def test_attempts_and_answers_come_from_what_the_window_holds(task, model, contexts):
    """A cold policy's linearised trace, token by token, against forward passes over the contexts that it was shown."""
    cold, [problem] = replace(RUN, temperature=1e-4), task.problems("test", 1, 0)
    [trace] = linearised(model, task, [problem], cold, 4, 2, seeded())
    marks = (task.open_episode, task.go_back, task.close_thinking, task.close_answer)
    with torch.no_grad():
        for [context], attempt in zip(contexts, trace):
            new = greedy(model, context, task.attempt_tokens, marks)
            kept = new[:-1] if new[-1] in marks else new
            answer = greedy(model, context + kept + task.forced_stop, task.answer_tokens, (task.close_answer,))
            assert attempt.tokens == len(new) and attempt.closed == (new[-1] in marks[2:])
            assert attempt.answer == (task.answer(task.forced_stop + answer) or None)


def test_a_policy_that_would_stop_is_made_to_try_again_and_that_is_noted(task):
    """One that closes at once, and one that opens one attempt after the other."""
    found = linearised(Scripted(task, 0, 0), task, [SOLVED, UNSOLVED], RUN, 3, 2, seeded())
    right = Attempt(1, "( 3 * 7 ) + 4", 1.0, True)
    assert found == [[right] * 3, [right._replace(right=0.0)] * 3]
    [going] = linearised(Scripted(task, 100, 0), task, [SOLVED], RUN, 3, 2, seeded())
    assert [attempt.closed for attempt in going] == [False] * 3


def test_votes_and_last_words_of_a_linearised_trace():
    a, b, c = Attempt(9, "a", 0.0, False), Attempt(5, "b", 1.0, True), Attempt(7, None, 0.0, False)
    assert commonest([a, b, b, c], 10) == (1.0, 66) and commonest([a, b], 10) == (0.5, 34) and commonest([c], 10) == (0.0, 17)
    assert last_closed([a, b, c], 10) == (1.0, 31)
    assert last_closed([b, a._replace(closed=True), c], 10) == (0.0, 31)
    assert last_closed([b._replace(closed=False), a], 10) == (0.0, 24)  # it would never have stopped: the last of all


def test_attempts_of_a_linearised_trace_are_sampled_and_their_answers_greedy(task, model, monkeypatch):
    drawn, branch = [], search.branch
    monkeypatch.setattr(search, "branch", lambda *args: drawn.append(args[5].temperature) or branch(*args))
    linearised(model, task, task.problems("test", 2, 0), replace(RUN, temperature=0.7), 2, 2, seeded())
    assert drawn == [0.7, 0.0] * 2


# --- Measuring ---


def test_a_section_counts_every_token_and_shows_its_progress(task, model, monkeypatch, capsys):
    monkeypatch.setattr(search, "COUNTS", (1, 2, 4))
    monkeypatch.setattr(search, "ATTEMPTS", (1, 3))
    problems, verifier = task.problems("test", 4, 0), Verifier.of(model)
    section = measure(model, verifier, task, problems, RUN, "a")
    assert list(section["methods"]) == ["majority", "best_of_n", "oracle", "beam", "linearised", "linearised_last"]
    for name in ("majority", "best_of_n", "oracle"):
        one, two, four = (section["methods"][name][n]["tokens"] for n in "124")
        assert two == pytest.approx(2 * one) and four == pytest.approx(4 * one)
    assert not capsys.readouterr().err
    monkeypatch.setattr(search, "ROWS", 8)  # two chunks
    assert measure(model, verifier, task, problems, RUN, "a", bar="test time")["problems"] == 4
    assert "test time: 100%" in (shown := capsys.readouterr().err) and "2/2" in shown


def test_accuracy_at_equal_tokens_lies_between_the_neighbours():
    by_n = {str(n): {"tokens": 50.0 * n, "accuracy": {"value": value}} for n, value in ((1, 0.2), (2, 0.4), (4, 0.5))}
    assert [at_equal_tokens(by_n, tokens) for tokens in (49, 50, 75, 150, 200, 201)] == [
        None, 0.2, pytest.approx(0.3), pytest.approx(0.45), 0.5, None]


def test_a_section_of_a_policy_that_solves_one_of_two_problems(task, monkeypatch):
    """It needs 30 tokens for a rollout; every method finds the one answer and pays for all of its copies."""
    monkeypatch.setattr(search, "ATTEMPTS", (1, 3))
    section = measure(Scripted(task, 20, 15), Judge(lambda row: 0.5), task, [SOLVED, UNSOLVED], RUN, 0)
    for name in ("majority", "best_of_n", "oracle", "beam"):
        for n in search.COUNTS:
            at = section["methods"][name][str(n)]
            assert (at["accuracy"]["value"], at["tokens"], at["tokens_per_correct"]["value"]) == (0.5, 30 * n, 60 * n)
    assert section["verifier_auc"] == 0.5 and section["problems"] == 2
    assert {at["majority"] for at in section["methods"]["beam"].values()} == {0.5}
    assert [section["methods"]["linearised"][n]["majority"] for n in "13"] == [None, 0.5]  # no majority is as cheap as 11 tokens
    assert [section["methods"]["linearised"][n]["tokens"] for n in "13"] == [11, 33]  # a token of an attempt, 10 of an answer
    assert [section["methods"]["linearised_last"][n]["tokens"] for n in "13"] == [11, 13]


def test_no_two_chunks_or_methods_share_their_random_numbers(task, monkeypatch):
    """Or one chunk's luck would be every chunk's."""
    monkeypatch.setattr(search, "COUNTS", (1, 2))
    monkeypatch.setattr(search, "ATTEMPTS", (1,))
    monkeypatch.setattr(search, "ROWS", 2)  # a chunk is one problem
    asked, make = [], search.generator_for
    monkeypatch.setattr(search, "generator_for", lambda *which: asked.append(which) or make(*which))
    measure(Scripted(task, 20, 15), Judge(lambda row: 0.5), task, [SOLVED, UNSOLVED], RUN, "a")
    assert len(set(asked)) == len(asked) == 2 * 4  # samples, a beam of 1 and of 2, linearised


def test_the_verifiers_auc_is_that_of_answers(task, monkeypatch):
    """One that believes the wrong problem's is wrong about every pair; who has no answer is in none."""
    monkeypatch.setattr(search, "COUNTS", (1, 8))
    monkeypatch.setattr(search, "ATTEMPTS", (1,))
    judge = Judge(lambda row: 0.1 if row[:7] == task.prompt(SOLVED) else 0.9)  # a prompt takes 7
    assert measure(Hasty(task, 20, 15), judge, task, [SOLVED, UNSOLVED], RUN, 0)["verifier_auc"] == 0.0
