"""The verifier: where it judges, that packing changes nothing, that it learns, and that it is kept beside its policy only."""

import math
import random

import pytest
import torch

from nanomrt import checkpoint, verifier
from nanomrt.config import RunConfig
from nanomrt.rollout import graded
from nanomrt.verifier import Verifier, cached_verifier, judged_places, train

RUN = RunConfig(thinking_budget=18, eval_budget=18, trace_max_attempts=2, device="cpu")
ROWS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]


@pytest.fixture
def judge(model) -> Verifier:
    """A verifier that believes something: its score is no longer 0."""
    judge = Verifier.of(model)
    torch.nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(1))
    return judge


@pytest.fixture
def few(monkeypatch):
    """Steps of eight short rollouts."""
    monkeypatch.setattr(verifier, "PROBLEMS", 4)
    monkeypatch.setattr(verifier, "SAMPLES", 2)


def warm_rollouts(task, count: int):
    """Search traces of the warm start, right and wrong ones."""
    rng, problems = random.Random(0), task.problems("train", count, 0)
    return graded(task, problems, range(count), [task.prompt(p) + task.warm_trace(p, rng)[0] for p in problems])


def test_it_learns_from_training_problems_only(task, model, few, monkeypatch):
    """It chooses among answers to test problems later."""
    drawn, draws = set(), task.draws
    monkeypatch.setattr(task, "draws", lambda split, seed: drawn.add(split) or draws(split, seed))
    list(train(Verifier.of(model), model, task, RUN, 2))
    assert drawn == {"train"}


def test_it_starts_as_the_policy_that_knows_nothing_of_verdicts(model):
    start = Verifier.of(model)
    assert start.values(ROWS) == [0.5] * 3
    assert all(torch.equal(weight, start.state_dict()[name]) for name, weight in model.state_dict().items())


def test_it_judges_after_every_episode_and_after_a_complete_answer(task):
    prompt = task.prompt(task.problems("train", 1, 0)[0])
    responses = ["<try> 3 no <try> 4 yes </think> <answer> 3 </answer>", "<try> 3 no <try> 4", "</think> <answer> 3", "",
                 "</think> </answer>"]
    problems = task.problems("train", 1, 0) * len(responses)
    rollouts = graded(task, problems, range(len(responses)), [prompt + task.tokenizer.encode(text) for text in responses])
    n = len(prompt)
    assert judged_places(task, rollouts) == [[n + 3, n + 6, n + 10], [n + 3, n + 5], [], [], [n + 2]]


def test_a_place_is_judged_by_what_stands_before_it(judge):
    """Packed with others or alone, cut there or not: the same number, and it is the last token's."""
    logits = judge.logits(ROWS, [[1, 3, 5], [], [4, 2]])
    alone = [judge.logits([row[:place]], [[place]]) for row, place in
             ((ROWS[0], 1), (ROWS[0], 3), (ROWS[0], 5), (ROWS[2], 4), (ROWS[2], 2))]
    assert torch.allclose(logits, torch.cat(alone), atol=1e-5) and logits.std() > 0.01
    assert judge.logits(ROWS, [[], [], []]).shape == (0,)
    assert judge.values(ROWS) == pytest.approx(judge.logits(ROWS, [[5], [2], [4]]).sigmoid().tolist(), abs=1e-6)
    assert judge.values([]) == []


def test_values_do_not_depend_on_who_shares_a_pass(judge, monkeypatch):
    whole = judge.values(ROWS)
    monkeypatch.setattr(verifier, "TOKENS", 7)
    assert judge.values(ROWS) == pytest.approx(whole, abs=1e-6)


def test_its_first_loss_is_that_of_a_coin_and_it_learns_the_verdicts(task, model, monkeypatch):
    """On 24 traces, over and over; the policy stays what it was."""
    rollouts, before = warm_rollouts(task, 24), {name: weight.clone() for name, weight in model.state_dict().items()}
    assert 5 < sum(rollouts.reward) < 19
    monkeypatch.setattr(verifier, "roll_out", lambda *_: rollouts)
    monkeypatch.setattr(verifier, "LEARNING_RATE", 5e-3)
    judge = Verifier.of(model)
    losses = list(train(judge, model, task, RUN, 40))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.1
    believed = judge.values(rollouts.tokens)
    assert all((v > 0.5) == bool(right) for v, right in zip(believed, rollouts.reward))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_training_is_a_function_of_the_seed_and_memory_does_not_change_it(task, model, few, monkeypatch):
    def trained():
        judge = Verifier.of(model)
        return list(train(judge, model, task, RUN, 2)), judge.values(ROWS)

    first = trained()
    assert trained() == first
    monkeypatch.setattr(verifier, "TOKENS", 60)
    losses, values = trained()
    assert losses == pytest.approx(first[0], abs=1e-5) and values == pytest.approx(first[1], abs=1e-4)


def test_it_is_trained_once_for_each_policy(task, model, few, tmp_path, monkeypatch, capsys):
    checkpoint.save(tmp_path / "a", model, task.tokenizer, {})
    judge = cached_verifier(tmp_path, tmp_path / "a", model, task, RUN, steps=2)
    assert (tmp_path / "verifier" / "model.safetensors").is_file() and checkpoint.damage(tmp_path / "verifier") is None
    with pytest.raises(ValueError, match="not those of a Llama .* score.bias"):  # nobody takes it for a policy
        checkpoint.load_model(tmp_path / "verifier")
    learned, calls = verifier.train, []
    monkeypatch.setattr(verifier, "train", lambda *args: calls.append(args) or learned(*args))
    again = cached_verifier(tmp_path, tmp_path / "a", model, task, RUN, steps=2)
    assert not calls and again.values(ROWS) == judge.values(ROWS)
    with torch.no_grad():
        model.model.norm.weight *= 2
    checkpoint.save(tmp_path / "b", model, task.tokenizer, {})
    assert not capsys.readouterr().err
    cached_verifier(tmp_path, tmp_path / "b", model, task, RUN, bar="verifier", steps=2)
    assert len(calls) == 1 and "2/2" in capsys.readouterr().err  # another policy, another verifier; its progress is shown


def test_every_step_has_rollouts_of_its_own(task, model, few, monkeypatch):
    """Other problems and other random numbers: there is no epoch to overfit."""
    problems, asked, draws, make = [], [], task.draws, verifier.generator_for
    monkeypatch.setattr(task, "draws", lambda *where: problems.append(where) or draws(*where))
    monkeypatch.setattr(verifier, "generator_for", lambda *which: asked.append(which) or make(*which))
    list(train(Verifier.of(model), model, task, RUN, 3))
    assert len(set(problems)) == len(set(asked)) == 3


def test_its_learning_rate_rises_and_falls(task, model, few, monkeypatch):
    """Over five steps, and in a straight line to the end."""
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    list(train(Verifier.of(model), model, task, RUN, 8))
    assert rates == pytest.approx([verifier.LEARNING_RATE * min(1, (k + 1) / 5) * (1 - k / 8) for k in range(8)])


def test_a_verdict_goes_with_its_own_trace_however_they_are_packed(task, model, monkeypatch):
    """Right and wrong ones; each step has the gradient of its own rollouts, which are the same in both, as no step is taken."""
    rollouts = warm_rollouts(task, 12)
    assert 0 < sum(rollouts.reward) < 12
    monkeypatch.setattr(verifier, "roll_out", lambda *_: rollouts)
    monkeypatch.setattr(verifier.nn.utils, "clip_grad_norm_", lambda *_: None)
    gradients = []
    for tokens in (16_384, 150):
        monkeypatch.setattr(verifier, "TOKENS", tokens)
        judge = Verifier.of(model)
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda _, judge=judge: gradients.append(judge.score.weight.grad.clone()))
        list(train(judge, model, task, RUN, 2))
    assert len(gradients) == 4 and gradients[0].norm() > 0
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


def test_another_number_of_steps_is_another_verifier(task, model, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a", model, task.tokenizer, {})
    trained = []
    monkeypatch.setattr(verifier, "train", lambda *args: trained.append(args[-1]) or iter(()))
    for steps in (2, 2, 3):
        cached_verifier(tmp_path, tmp_path / "a", model, task, RUN, steps=steps)
    assert trained == [2, 3]
