"""The evaluation against a scripted policy whose every answer is known, and its command line against a real checkpoint."""

import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
from data.countdown import Problem
from evaluate import (
    against_best,
    budget_figure,
    budget_grid,
    distinct,
    evaluate_policy,
    sample_chunk,
    summary_table,
)
from nanomrt import checkpoint, search, verifier
from nanomrt.config import RunConfig, save_config
from nanomrt.rollout import roll_out, training_sampling
from nanomrt.run import UserError, generator_for

RUN = RunConfig(thinking_budget=36, eval_budget=54, eval_samples=2, trace_max_attempts=4, eval_problems=3, device="cpu")
GRID = [0, 9, 18, 27, 36, 54]  # an attempt takes 9 tokens
SOLVED, UNSOLVED = Problem((3, 7, 4), 25), Problem((3, 7, 5), 25)


class Scripted:
    """Thinks `closes` tokens of <try>, then answers: with (3 * 7) + 4 after at least `ready` of them, else with rubbish.

    The next token depends on the last token and its position only; hidden states are one-hot logits.
    """

    config = SimpleNamespace(max_position_embeddings=256, num_hidden_layers=1, num_key_value_heads=1, head_dim=2, vocab_size=117)

    def __init__(self, task, closes: int, ready: int):
        self.task, self.closes, self.ready = task, closes, ready
        self.head = torch.eye(len(task.tokenizer))  # (V,V)
        self.device = self.head.device
        words = "( 3 * 7 ) + 4 </answer>".split()
        self.after = dict(zip(words, words[1:])) | {"</think>": "<answer>", "-": "</answer>"}

    def next_word(self, word: str, position: int) -> str:
        done = position - 6  # tokens of the response up to here; a prompt takes 7
        if word in self.after:
            return self.after[word]
        if word == "<answer>":
            return "(" if done - 2 >= self.ready else "-"
        return "<try>" if done < self.closes else "</think>"

    def __call__(self, tokens, positions, attend):
        empty = torch.zeros(len(tokens), 1, 2)
        attend(0, empty, empty, empty)  # fills the cache
        words = [self.task.tokenizer.decode([token]) for token in tokens.tolist()]
        following = [self.task.tokenizer.id(self.next_word(*pair)) for pair in zip(words, positions.tolist())]
        return 100 * self.head[following]


def section_of(task, closes: int, ready: int, config: RunConfig = RUN) -> dict:
    return evaluate_policy(Scripted(task, closes, ready), task, [SOLVED, UNSOLVED], config, 0)


def values(curve: list[dict]) -> list[float]:
    return [row["J"]["value"] for row in curve]


def test_a_policy_that_solves_one_of_two_problems_after_15_tokens_and_stops_at_20(task):
    section = section_of(task, closes=20, ready=15)
    assert section["accuracy"] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert section["tokens_per_correct"]["value"] == 60  # 20 of thinking, 10 of answer, half are right
    assert section["mean_thinking_tokens"] == {"value": 20, "low": 20, "high": 20}
    assert {k: leaf["value"] for k, leaf in section["pass_at_k"].items()} == {"1": 0.5, "2": 0.5}
    assert section["maj_at_k"]["2"]["value"] == 0.5
    assert [row["budget"] for row in section["budget_curve"]] == GRID
    assert values(section["budget_curve"]) == values(section["extrapolation"]) == [0, 0, 0.5, 0.5, 0.5, 0.5]
    assert [row["tokens"] for row in section["budget_curve"]] == [min(b, 20) + 10 for b in GRID]  # it stops by itself
    assert [row["tokens"] for row in section["extrapolation"]] == [b + 10 for b in GRID]  # it is kept from stopping
    regret = {h: leaf["value"] for h, leaf in section["regret"].items()}
    assert regret == pytest.approx({"18": 1 - 2.25 / 18, "36": 1 - 11.25 / 36, "54": 1 - 20.25 / 54})
    assert (section["problems"], section["samples"], section["thinking_budget"]) == (2, 2, 36)


def test_the_three_regrets_of_that_policy_and_its_habits(task):
    """J rises from 0 to .5 between 9 and 18 tokens. A majority of 4 equal answers is no better and costs 3 · 10 tokens more."""
    section = section_of(task, closes=20, ready=15)
    value = lambda name: [leaf["value"] for leaf in section[name].values()]
    assert values(section["maj_curve"]) == values(section["budget_curve"])
    assert [row["tokens"] for row in section["maj_curve"]] == [min(b, 20) + 40 for b in GRID]
    assert value("regret_to_maj") == pytest.approx([-2.25 / 18, -11.25 / 36, (5.25 - 20.25) / 54])
    assert value("regret_to_best") == pytest.approx([0.5 - 2.25 / 18, 0.5 - 11.25 / 36, 0.5 - 20.25 / 54])
    assert section["habits"] == {"attempts": 0, "hit_rate": 0, "loops": 0, "repeats": 0, "rechecks": 0, "stopped_unsolved": 1,
                                 "fooled": 0}
    hasty, endless = (section_of(task, closes=closes, ready=15)["habits"]["stopped_unsolved"] for closes in (27, 1000))
    assert (hasty, endless) == (1, 0)  # 27 leaves room for 9 more
    assert section_of(task, closes=28, ready=15)["habits"]["stopped_unsolved"] == 0


def test_the_best_of_all_runs_is_the_comparator_of_each(task):
    early, late = section_of(task, closes=40, ready=15), section_of(task, closes=40, ready=30)
    both = against_best({"early": early, "late": late})
    assert both["early"]["regret_to_best"] == early["regret_to_best"]  # it is the best itself
    assert late["regret_to_best"]["18"]["value"] == 0  # nothing is in its own reach by then
    for h, leaf in both["late"]["regret_to_best"].items():
        assert leaf == pytest.approx({name: x - 0.5 for name, x in late["regret"][h].items()})
    assert both["late"]["regret"] == late["regret"]
    assert late["best_of"] == ["this policy"] and both["early"]["best_of"] == both["late"]["best_of"] == ["early", "late"]


def test_extrapolation_reaches_answers_that_a_policy_which_stops_early_does_not(task):
    section = section_of(task, closes=20, ready=30)
    assert values(section["budget_curve"]) == [0] * 6
    assert values(section["extrapolation"]) == [0, 0, 0, 0, 0.5, 0.5]
    assert section["tokens_per_correct"]["value"] == math.inf
    assert section["regret"]["54"]["value"] == 1


def test_a_rollout_that_is_over_the_training_budget_scores_0_but_its_budget_curve_goes_on(task):
    in_time = section_of(task, closes=36, ready=30)  # its last token is the last one that training allows
    assert in_time["accuracy"]["value"] == 0.5 and in_time["tokens_per_correct"]["value"] == 92
    late = section_of(task, closes=37, ready=30)
    assert late["accuracy"]["value"] == 0 and late["maj_at_k"]["2"]["value"] == 0
    assert late["mean_thinking_tokens"]["value"] == 37
    assert values(late["budget_curve"]) == [0, 0, 0, 0, 0.5, 0.5]
    endless = section_of(task, closes=1000, ready=50)
    assert endless["mean_thinking_tokens"]["value"] == 46  # cut off
    assert values(endless["budget_curve"]) == [0, 0, 0, 0, 0, 0.5]


def test_what_a_late_rollout_did_after_the_cut_counts_nowhere(task):
    late = sample_chunk(Scripted(task, 37, 30), task, [SOLVED], RUN, GRID, generator_for(0, "test", 0), False)
    assert late["right"].tolist() == [0, 0] and late["vote"].tolist() == ["", ""]
    assert late["tokens"].tolist() == [46, 46]  # not 47


def test_the_grid_ends_at_the_largest_budget(task):
    assert budget_grid(task, RUN) == GRID
    assert budget_grid(task, RunConfig(thinking_budget=36, eval_budget=40, trace_max_attempts=4)) == [0, 9, 18, 27, 36, 40]
    assert budget_grid(task, RunConfig(thinking_budget=45, eval_budget=36, trace_max_attempts=4)) == [0, 9, 18, 27, 36, 45]
    assert budget_grid(task, RunConfig()) == [9 * n for n in evaluate.ATTEMPTS]


def test_where_thinking_ends(task):
    encode = task.tokenizer.encode
    assert task.thinking_tokens(encode("<try> 3 yes </think> <answer> 3 </answer>")) == 3
    assert task.thinking_tokens(encode("<try> 3 no")) == 3  # cut off
    assert task.thinking_tokens(encode("<try> 3 </answer>")) == 2  # the stop token has no cache entry to branch from


# --- A random policy ---


def test_a_long_rollout_cut_at_the_training_budget_is_a_training_rollout(task, model):
    short = training_sampling(task, RUN)
    long = replace(short, max_new_tokens=RUN.eval_budget + 10)
    problems = task.problems("test", 8, 0)
    cut, whole = (roll_out(model, task, problems, 2, sampling, generator_for(0, "test", 0)) for sampling in (short, long))
    assert [cut.response(row) for row in range(16)] == [whole.response(row)[:46] for row in range(16)]


def test_both_passes_share_their_random_numbers_until_thinking_is_closed(task, model):
    chunk = sample_chunk(model, task, task.problems("test", 16, 0), RUN, GRID, generator_for(0, "test", 0), False)
    assert (chunk["spent_on"] >= chunk["spent"]).all()  # forced to go on, a rollout never thinks less
    assert (chunk["spent_on"] > chunk["spent"]).any()
    assert chunk["J"].shape == chunk["J_on"].shape == (32, len(GRID))


def test_evaluation_is_a_function_of_its_seed_and_leaves_global_randomness_alone(task, model, monkeypatch, capsys):
    problems = task.problems("test", 4, 0)
    before = torch.get_rng_state()
    first = evaluate_policy(model, task, problems, RUN, "a")
    assert evaluate_policy(model, task, problems, RUN, "a") == first
    assert evaluate_policy(model, task, problems, RUN, "b") != first
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(evaluate, "ROWS", 4)  # two chunks of two problems
    assert not capsys.readouterr().err
    assert evaluate_policy(model, task, problems, RUN, "a", bar="test")["problems"] == 4
    assert "test: 100%" in (shown := capsys.readouterr().err) and "2/2" in shown


def test_an_evaluation_of_nothing_is_an_error(task, model):
    with pytest.raises(ValueError, match="at least one problem"):
        evaluate_policy(model, task, [], RUN, 0)


def test_distinct_problems_have_distinct_keys_and_run_out(task):
    some = distinct(task, "test", 20, "eval")
    assert len({problem.key for problem in some}) == 20
    assert all(task.split_of(problem) == "test" for problem in some)
    assert distinct(task, "test", 10, "eval") == distinct(task, "test", 10, "eval")
    everything = distinct(task, "test", 2000, "eval")
    assert 20 < len(everything) < 2000


# --- What is asked, and with which random numbers ---


def test_no_two_chunks_share_their_random_numbers(task, model, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 2)  # a chunk is one problem
    asked, make = [], evaluate.generator_for
    monkeypatch.setattr(evaluate, "generator_for", lambda *which: asked.append(which) or make(*which))
    evaluate_policy(Scripted(task, 20, 15), task, [SOLVED, UNSOLVED], RUN, "a", brief=True)
    assert len(set(asked)) == len(asked) == 2


def test_a_majority_is_of_sampled_answers_and_J_of_a_greedy_one(task, monkeypatch):
    asked, force = [], evaluate.force_answers
    monkeypatch.setattr(evaluate, "force_answers", lambda *args: asked.append(args[5:7]) or force(*args))
    sample_chunk(Scripted(task, 20, 15), task, [SOLVED], replace(RUN, temperature=0.7), GRID, generator_for(0, "test", 0), False)
    assert asked == [(1, 0.0), (evaluate.VOTES, 0.7), (1, 0.0)]


def test_what_is_kept_of_every_problem_has_the_means_that_are_shown(task):
    """20 tokens of thinking and 10 of an answer each; the first one is right after 15."""
    section = section_of(task, closes=20, ready=15)
    each = section["per_problem"]
    assert each["right"] == [1.0, 0.0] and each["tokens"] == [30.0, 30.0]
    assert each["regret to 54"] == pytest.approx([2 * (1 - 20.25 / 54) - 1, 1], abs=1e-4)
    for h, leaf in section["regret"].items():
        assert sum(each[f"regret to {h}"]) / 2 == pytest.approx(leaf["value"], abs=1e-4)


def test_habits_are_those_of_each_response_to_its_own_problem(task, monkeypatch):
    monkeypatch.setattr(task, "habits", lambda problems, responses, budget: {"asked": problems, "of": len(responses)})
    assert section_of(task, 20, 15)["habits"] == {"asked": [SOLVED, SOLVED, UNSOLVED, UNSOLVED], "of": 4}


def test_a_grid_that_ends_at_the_training_budget_leaves_room_for_the_answer(task):
    """Who thinks for as long as training allows still answers."""
    section = section_of(task, closes=36, ready=30, config=replace(RUN, eval_budget=36))
    assert section["accuracy"]["value"] == 0.5 and section["tokens_per_correct"]["value"] == 92


def test_runs_of_all_seeds_answer_the_same_problems_with_the_same_random_numbers(task, monkeypatch):
    """They are compared problem by problem."""
    asked, draws, make = [], task.draws, evaluate.generator_for
    monkeypatch.setattr(task, "draws", lambda *where: asked.append(where) or draws(*where))
    monkeypatch.setattr(evaluate, "generator_for", lambda *which: asked.append(which) or make(*which))
    for seed in (0, 1):
        evaluate.evaluate_splits(Scripted(task, 20, 15), task, replace(RUN, seed=seed), ["test"], brief=True)
    assert asked == [("test", "eval"), ("eval", "evaluate", 0)] * 2


# --- Table, figure, command line ---


@pytest.fixture
def run(tmp_path, task, model):
    folder = tmp_path / "small"
    checkpoint.save(folder / "checkpoints" / "step-000002", model, task.tokenizer, {})
    save_config(RUN, folder / "config.json")
    return folder


def test_command_line_writes_test_and_ood_keeps_the_rest_and_draws(run, task, capsys):
    kept = {"warm_start": section_of(task, 20, 15), "seconds": {"trace": 1.5}, "test": "old"}
    (run / "summary.json").write_text(json.dumps(kept))
    assert evaluate.main([str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seconds"] == kept["seconds"] and summary["warm_start"] == kept["warm_start"]
    assert summary["test"]["problems"] == summary["ood"]["problems"] == 3
    shown = capsys.readouterr().out
    assert "0.500 [0.000 1.000]" in shown and str(run / "figures" / "budget.png") in shown
    assert (run / "figures" / "budget.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json", "figures", "summary.json"]
    again = run.parent / "again.png"
    assert evaluate.main([str(run), "--figure", str(again)]) == 0 and again.is_file()
    assert json.loads((run / "summary.json").read_text()) == summary  # the same problems, the same samples


@pytest.fixture
def other(run):
    return Path(shutil.copytree(run, run.parent / "other"))


def test_runs_side_by_side_are_held_against_the_best_of_them(run, other, task, monkeypatch):
    """One solves a problem after 15 tokens, one after 30: within 18, only the first one knows what is in reach."""
    ready = {"small": 30, "other": 15}
    monkeypatch.setattr(checkpoint, "load_model", lambda folder, device: Scripted(task, 40, ready[folder.parts[-3]]))
    monkeypatch.setattr(evaluate, "distinct", lambda *_: [SOLVED, UNSOLVED])
    assert evaluate.main([str(run), str(other)]) == 0
    for folder, regret_to_best in ((run, 0.5), (other, 0.5 - 2.25 / 18)):
        for section in map(json.loads((folder / "summary.json").read_text()).get, ("test", "ood")):
            assert section["regret_to_best"]["18"]["value"] == pytest.approx(regret_to_best)
            assert section["best_of"] == ["small", "other"]


def test_runs_with_other_problems_are_not_put_side_by_side(run, other):
    save_config(replace(RUN, eval_problems=4, target_max=59, thinking_budget=27), other / "config.json")
    with pytest.raises(UserError, match="^other has target_max=59, eval_problems=4, but small has target_max=60, eval_pro"):
        evaluate.main([str(run), str(other)])
    assert not (run / "summary.json").exists()  # said before the first evaluation


def test_a_run_without_a_checkpoint_is_an_error_before_the_evaluation_of_others(run, other):
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(UserError, match="no good checkpoint in .*other"):
        evaluate.main([str(run), str(other)])
    assert not (run / "summary.json").exists()


def test_a_missing_matplotlib_is_an_error_before_the_evaluation(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        evaluate.main([str(run)])
    assert not (run / "summary.json").exists()


def test_test_time_trains_a_verifier_once_and_writes_a_section_a_table_and_a_figure(run, capsys, monkeypatch):
    monkeypatch.setattr(search, "COUNTS", (1, 2))
    monkeypatch.setattr(search, "ATTEMPTS", (1, 2))
    monkeypatch.setattr(verifier, "PROBLEMS", 2)
    monkeypatch.setattr(evaluate, "cached_verifier", partial(verifier.cached_verifier, steps=1))
    save_config(replace(RUN, eval_problems=2), run / "config.json")
    assert evaluate.main([str(run), "--test-time"]) == 0
    shown, section = capsys.readouterr().out, json.loads((run / "summary.json").read_text())["test_time"]
    assert section["problems"] == 2 and set(section["methods"]["beam"]) == {"1", "2"}
    table = [line.split()[:2] for line in shown[shown.index("method") :].splitlines()]
    assert table[:3] == [["method", "N"], ["majority", "1"], ["majority", "2"]] and len(section["methods"]) == 6
    assert (run / "figures" / "test_time.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(verifier, "train", None)  # it is there
    assert evaluate.main([str(run), "--test-time"]) == 0
    assert json.loads((run / "summary.json").read_text())["test_time"] == section


def test_user_mistakes_name_the_fix(run, tmp_path):
    with pytest.raises(UserError, match="no config.json; train one with python train.py"):
        evaluate.main([str(run), str(tmp_path / "nothing")])
    assert not (run / "summary.json").exists()  # nothing was evaluated before the complaint
    (run / "checkpoints" / "step-000002" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no good checkpoint"):
        evaluate.main([str(run)])


@pytest.mark.parametrize("figure, message", [
    ("curve.xyz", "curve.xyz is no figure that matplotlib can draw: end it in .png"), ("figures", "figures is no figure"),
    ("small/config.json/curve.png", "cannot write to .*: .*config.json is no folder, or not yours"),
])
def test_a_figure_that_cannot_be_drawn_is_an_error_before_the_evaluation(run, tmp_path, figure, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([str(run), "--figure", str(tmp_path / figure)])
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json"]


def test_a_model_that_cannot_be_loaded_is_a_users_mistake(run, task, model):
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    checkpoint.save(run / "checkpoints" / "step-000003", model, task.tokenizer, {})
    with pytest.raises(UserError, match="step-000003 holds weights that are not finite"):
        evaluate.main([str(run)])


def test_table_has_a_line_per_section_and_a_column_per_horizon(task):
    section = section_of(task, 20, 15)
    other = section_of(task, 20, 15, RunConfig(thinking_budget=54, eval_budget=54, eval_samples=2, trace_max_attempts=4))
    mrt, grpo = {"warm_start": section, "test": section, "seconds": 1}, {"ood": other}
    lines = summary_table({"mrt": mrt, "grpo": grpo}).splitlines()
    assert [line.split()[0] for line in lines] == ["run", "mrt", "mrt", "grpo"]
    assert [line.split()[1] for line in lines] == ["problems", "warm_start", "test", "ood"]
    assert lines[0].endswith("regret to 54")
    assert {line.index("0.500 [") for line in lines[1:]} == {lines[0].index("accuracy")}  # fixed width
    assert "27" in lines[0] and " - " in lines[1]  # a horizon that only the other run has


def test_figure_overlays_many_runs(task, tmp_path):
    section = section_of(task, 20, 15)
    path = tmp_path / "new" / "figure.png"
    budget_figure(path, {f"run {i}": section for i in range(9)})
    assert path.stat().st_size > 10_000


def test_more_tokens_are_tried_on_the_test_problems(run, task, monkeypatch):
    seen = []

    def measure(model, verifier, task, problems, *rest, **keys):
        seen.extend(problems)
        raise UserError("seen")

    monkeypatch.setattr(evaluate, "evaluate_splits", lambda *args, **keys: {})
    monkeypatch.setattr(evaluate, "cached_verifier", lambda *args, **keys: None)
    monkeypatch.setattr(search, "measure", measure)
    with pytest.raises(UserError, match="seen"):
        evaluate.main([str(run), "--test-time"])
    assert seen == distinct(task, "test", RUN.eval_problems, "eval")
