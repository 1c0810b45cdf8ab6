"""Who moves a decision: against the exact product of two gradients, and against a step that is taken."""

import random
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.countdown import Countdown
from nanomrt import checkpoint, influence
from nanomrt.config import RunConfig, UserError, read_config, save_config
from nanomrt.methods import METHODS, Gathered
from nanomrt.model import Llama
from nanomrt.mrt import episodes_between, token_weights
from nanomrt.rollout import boundaries, graded
from train import score

CONFIG = RunConfig(algorithm="mrt_online", micro_batch_tokens=200, device="cpu")
ARMS = {arm: influence.arm_config(CONFIG, arm) for arm in ("grpo", "mrt_online+alpha=2", "anytime")}


@pytest.fixture
def gathered(task) -> Gathered:
    """Four search traces of each of three problems, with values drawn by lot."""
    rng = random.Random(0)
    problems = [problem for problem in task.problems("train", 3, 0) for _ in range(4)]
    rows = [task.prompt(problem) + task.warm_trace(problem, rng)[0] for problem in problems]
    rollouts = graded(task, problems, [i // 4 for i in range(12)], rows)
    batch, (row, position) = rollouts.batch(), boundaries(task, rollouts)
    place = batch.offset[torch.tensor(row)] + torch.tensor(position)
    J = torch.tensor([float(rng.random() < 0.5) for _ in row])
    return Gathered(rollouts, batch, episodes_between(torch.tensor(row), place, J), 0)


def log_odds(model, batch, places, stop: int) -> float:
    """The mean over `places`, from the logits of one forward pass a row."""
    odds, at = [], batch.offset.tolist()
    for start, length in zip(at, batch.lengths.tolist()):
        tokens = batch.tokens[start : start + length]
        hidden = model(tokens, torch.arange(length), influence.Packed.of(torch.tensor([length])))
        p = (hidden @ model.head.T).softmax(1)[:, stop]
        odds += [float((p[i - 1] / (1 - p[i - 1])).log()) for i in range(length) if places[start + i]]
    return sum(odds) / len(odds)


def test_a_decision_is_the_token_after_an_episode_by_what_an_answer_is_worth_there(task, gathered):
    kinds, batch, E = influence.decisions(gathered), gathered.batch, gathered.episodes
    assert not (kinds["wrong"] & kinds["right"]).any()
    for kind, right in (("wrong", 0.0), ("right", 1.0)):
        assert kinds[kind].nonzero().squeeze(1).tolist() == E.end[E.J_after == right].tolist()
    assert {int(token) for token in batch.tokens[kinds["wrong"] | kinds["right"]]} <= {task.open_episode, task.close_thinking}


def test_an_episode_that_was_cut_off_decides_nothing(task, gathered):
    prompt = task.prompt(gathered.rollouts.problems[0])
    row = prompt + task.tokenizer.encode("<try> 3 no <try> 4")
    rollouts = graded(task, gathered.rollouts.problems[:1], [0], [row])
    place, J = torch.tensor([0, 3, 5]) + len(prompt), torch.tensor([0.0, 1.0, 0.0])
    episodes = episodes_between(torch.zeros(3, dtype=torch.long), place, J)
    kinds = influence.decisions(Gathered(rollouts, rollouts.batch(), episodes, 0))
    assert kinds["right"].nonzero().tolist() == [[len(prompt) + 3]] and not kinds["wrong"].any()


def test_influence_is_the_product_of_the_gradients(model, task, gathered):
    """(2) against (1), token by token, and the weights are as they were."""
    batch, before = gathered.batch, [p.clone() for p in model.parameters()]
    way = influence.grad_log_odds(model, batch, influence.decisions(gathered)["wrong"], task.close_thinking, CONFIG)
    measured = influence.influences(model, batch, way, CONFIG)
    assert all(map(torch.equal, before, model.parameters()))
    assert not measured[~batch.is_action].any()
    logprob, _, action = score(model, batch, CONFIG.temperature)
    chosen = range(0, len(action), 9)
    exact = [influence.dot(torch.autograd.grad(logprob[i], list(model.parameters()), retain_graph=True), way) for i in chosen]
    assert torch.allclose(measured[action[chosen]], torch.tensor(exact), atol=2e-2 * max(map(abs, exact)))


@pytest.mark.parametrize("kind", influence.KINDS)
def test_a_step_that_is_taken_moves_the_decision_by_the_sum(model, task, gathered, kind):
    """Any weights of any tokens: a small step along their gradient changes d by eta times the sum of (1)."""
    batch, places = gathered.batch, influence.decisions(gathered)[kind]
    value = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(1)) * batch.is_action
    way = influence.grad_log_odds(model, batch, places, task.close_thinking, CONFIG)
    predicted = float((value * influence.influences(model, batch, way, CONFIG)).sum())
    gradient = influence.grad_loss(model, batch, value, CONFIG)  # of the loss: the step goes down
    eta, sides = 1e-3 / influence.dot(gradient, gradient) ** 0.5, []
    for signed in (-eta, 2 * eta):
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradient):
                p.add_(signed * g)
            sides.append(log_odds(model, batch, places, task.close_thinking))
    assert (sides[0] - sides[1]) / (2 * eta) == pytest.approx(predicted, rel=2e-2)


def test_the_groups_add_up_and_the_credit_decides(model, task, gathered):
    kinds, stop = influence.decisions(gathered), task.close_thinking
    ways = {kind: influence.grad_log_odds(model, gathered.batch, places, stop, CONFIG) for kind, places in kinds.items()}
    found = influence.contributions(model, gathered, kinds, ways, CONFIG, ARMS)
    for rows in found.values():
        for parts in rows.values():
            total, *rest = (part["value"] for part in parts.values())
            assert total == pytest.approx(sum(rest), abs=1e-6)
        assert rows["grpo"] != rows["mrt_online+alpha=2"] != rows["anytime"]
    text = influence.table(model, gathered, stop, CONFIG, ARMS)
    assert all(text.count(f"| {arm} |") == 2 for arm in ARMS)


def test_only_credit_for_whole_traces_can_be_compared():
    with pytest.raises(ValueError, match="vineppo learns from other rollouts.*grpo.*anytime"):
        influence.arm_config(CONFIG, "vineppo")
    with pytest.raises(ValueError, match="alpa"):
        influence.arm_config(CONFIG, "grpo+alpa=2")


def test_without_a_place_of_a_kind_it_says_so(model, task, gathered):
    gathered.episodes.J_after.zero_()
    with pytest.raises(UserError, match="forced answer is right.*--problems"):
        influence.table(model, gathered, task.close_thinking, CONFIG, ARMS)


@pytest.fixture
def run(config, task, tmp_path) -> Path:
    """A run whose policy goes on and stops, but has learned nothing."""
    model = Llama(replace(config, tie_word_embeddings=False)).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
        model.lm_head.weight.mul_(15)
        model.lm_head.weight[task.open_episode] *= 2.5
        model.lm_head.weight[[task.close_thinking, task.close_answer]] *= 1.5
    checkpoint.save(tmp_path / "run/checkpoints/step-000001", model, task.tokenizer, {})
    save_config(replace(CONFIG, group_size=4, thinking_budget=40), tmp_path / "run/config.json")
    return tmp_path / "run"


def test_the_command_shows_every_credit_for_both_decisions(run, monkeypatch, capsys):
    """With a verdict that a random policy can earn: the parity of a hash of what it says."""
    monkeypatch.setattr(Countdown, "grade", lambda task, problem, response: float(zlib.crc32(response.encode()) % 2))
    assert influence.main([str(run), "--problems", "6", "--algorithms", "grpo,length_penalty+length_penalty=1"]) == 0
    text = capsys.readouterr().out
    assert "24 rollouts" in text and text.count("| grpo |") == text.count("| length_penalty+length_penalty=1 |") == 2


def test_a_run_with_a_key_that_only_its_own_credit_has_can_be_asked(run, monkeypatch, capsys):
    """length_penalty hasn't repeat_penalty."""
    monkeypatch.setattr(Countdown, "grade", lambda task, problem, response: float(zlib.crc32(response.encode()) % 2))
    save_config(replace(read_config(run / "config.json"), repeat_penalty=0.1), run / "config.json")
    words = [str(run), "--problems", "6", "--algorithms"]
    assert influence.main([*words, "mrt_online,length_penalty+repeat_penalty=0"]) == 0
    assert "| mrt_online |" in capsys.readouterr().out
    with pytest.raises(UserError, match="repeat_penalty is part of"):
        influence.main([*words, "length_penalty"])


@pytest.mark.parametrize("words, says", [
    (["--algorithms", "grpo+alpha=2"], "alpha changes nothing with algorithm=grpo"),
    (["--algorithms", "grpo+group_size=2"], "the arms credit the same rollouts, so group_size can't differ"),
    (["--algorithms", "mrt"], "mrt learns from other rollouts"), (["--algorithms", "grop"], "grop"),
    (["--problems", "0"], "at least one"), (["--checkpoint", "nowhere"], "nowhere is no checkpoint folder")])
def test_what_is_wrong_is_said(run, words, says):
    with pytest.raises(UserError, match=says):
        influence.main([str(run), *words])


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="is no run: .*train.py"):
        influence.main([str(tmp_path)])


def test_a_contribution_is_the_sum_over_its_tokens(gathered, monkeypatch):
    """Token by token: the step's length over the gradient's, 5 here, times w_t, A_t above its group's mean, and i_t."""
    batch, kinds = gathered.batch, influence.decisions(gathered)
    i = {kind: torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(n)) for n, kind in enumerate(kinds)}
    monkeypatch.setattr(influence, "influences", lambda model, batch, way, config: i[way])
    monkeypatch.setattr(influence, "grad_loss", lambda *_: [torch.tensor([3.0]), torch.tensor([4.0])])
    found = influence.contributions(None, gathered, kinds, {kind: kind for kind in kinds}, CONFIG, ARMS)
    rest = batch.is_action & ~kinds["wrong"] & ~kinds["right"]
    for arm, own in ARMS.items():
        w = token_weights(batch, own.loss_norm, own.thinking_budget, own.truncated).tolist()
        A = METHODS[own.algorithm].credit(batch, gathered.episodes, own).tolist()
        for kind, other in (("wrong", "right"), ("right", "wrong")):
            expected = []
            for group in (kinds[kind], kinds[other], rest):
                some = group.nonzero().squeeze(1).tolist()
                mean = sum(w[t] * A[t] for t in some) / sum(w[t] for t in some)
                expected.append(sum(influence.STEP / 5 * w[t] * (A[t] - mean) * float(i[kind][t]) for t in some))
            value = [part["value"] for part in found[kind][arm].values()]
            assert value == pytest.approx([sum(expected), *expected], rel=1e-3, abs=1e-7)


def test_the_table_says_how_often_the_policy_stops_and_how_much_both_decisions_are_one(task, gathered, monkeypatch):
    """Gradients (1, 0) and (3, 4) have cosine 3/5."""
    ways = iter([[torch.tensor([1.0]), torch.tensor([0.0])], [torch.tensor([3.0]), torch.tensor([4.0])]])
    monkeypatch.setattr(influence, "grad_log_odds", lambda *_: next(ways))
    monkeypatch.setattr(influence, "contributions", lambda *_: {})
    text = influence.table(None, gathered, task.close_thinking, CONFIG, ARMS)
    assert "have cosine 0.60." in text
    for kind, places in influence.decisions(gathered).items():
        stops = [token == task.close_thinking for token in gathered.batch.tokens[places].tolist()]
        assert 0 < sum(stops) < len(stops)
        assert f"{sum(stops) / len(stops):.3f} of the {len(stops)} places where a forced answer is {kind}" in text
