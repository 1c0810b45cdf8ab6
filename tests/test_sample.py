"""sample.py: what it shows is what an uncached model would do, and mistakes name their fix."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
from data.countdown import Countdown
from nanomrt import checkpoint
from nanomrt.config import RunConfig, UserError, save_config
from nanomrt.model import Llama, Packed
from nanomrt.sampler import Sampling

PROBLEM = "3 7 4 target 25"


@pytest.fixture
def model(config) -> Llama:
    """A random policy that says `<try>` a lot, and something else after every context."""
    model = Llama(replace(config, tie_word_embeddings=False)).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight *= 3 if weight.ndim == 2 else 1
        model.lm_head.weight[Countdown(RunConfig()).open_episode] *= 3
    return model


@pytest.fixture
def run(tmp_path, model, task):
    """A run's folder around that model."""
    save_config(RunConfig(), tmp_path / "config.json")
    checkpoint.save(tmp_path / "checkpoints/step-000001", model, task.tokenizer, {})
    return tmp_path


def greedy(model, tokens: list[int], limit: int, stops: tuple[int, ...]) -> list[int]:
    """What is likeliest after `tokens`, by a whole forward pass for every token; a stop included."""
    new: list[int] = []
    while len(new) < limit and not (new and new[-1] in stops):
        packed = Packed.of(torch.tensor([len(tokens) + len(new)]))
        with torch.no_grad():
            hidden = model(torch.tensor(tokens + new), packed.position_ids, packed)
        new.append(int((hidden[-1] @ model.head.T).argmax()))
    return new


@pytest.fixture
def thought(model, task) -> list[int]:
    """All that the model thinks of PROBLEM when it is greedy: some episodes, then it answers unasked."""
    *thinking, last = greedy(model, task.prompt(task.parse(PROBLEM)), 60, (task.close_thinking, task.close_answer))
    assert last == task.close_answer and thinking.count(task.open_episode) >= 5 and len(set(thinking)) >= 10
    return thinking


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 60])
def test_thinking_episode_by_episode_equals_uncached_greedy_decoding(model, task, thought, budget):
    """The episodes are the model's own tokens up to the budget or the end of its thinking, cut before each `<try>`."""
    prompt = task.prompt(task.parse(PROBLEM))
    episodes = [episode for episode, _ in sample.think(model, task, prompt, budget, Sampling(1, (), 0.0), 0)]
    assert sum(episodes, []) == thought[:budget] and all(episodes)
    assert [i for episode in episodes for i in range(len(episode)) if episode[i] == task.open_episode] == [0] * (
        thought[:budget].count(task.open_episode))


def test_answers_at_every_budget_equal_uncached_greedy_decoding(run, model, task, thought, capsys):
    """Whether thinking stops there or went on, and whatever its last token is: a `<try>` was never fed before."""
    prompt, words = task.prompt(task.parse(PROBLEM)), [str(run), "--prompt", PROBLEM, "--temperature", "0"]
    budgets, answers = range(len(thought) + 1), []
    for budget in budgets:
        row = greedy(model, prompt + thought[:budget] + task.forced_stop, task.answer_tokens, (task.close_answer,))
        answers.append(f"{task.show(task.forced_stop + row)}   wrong")
        sample.main([*words, "--budget", str(budget)])
        assert capsys.readouterr().out.splitlines()[-1].strip() == answers[-1]
    sample.main([*words, "--budget", ",".join(map(str, budgets))])
    table = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[-len(budgets) :]]
    assert table == [[str(budget), str(budget), answer] for budget, answer in zip(budgets, answers)]


def test_progress_shows_J_after_every_episode(run, capsys):
    assert sample.main([str(run), "--progress", "--forks", "2", "--budget", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 and all(line.split()[-2] == "J" and 0 <= float(line.split()[-1]) <= 1 for line in lines[:-1])


def test_a_seed_makes_the_same_output(run, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        sample.main([str(run), "--seed", seed, "--prompt", PROBLEM])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_looking_does_not_change_the_trace(run, capsys):
    """Progress draws random numbers of its own, and a smaller budget shows the beginning of the same thinking."""
    def thinking(*words: str) -> list[str]:
        sample.main([str(run), "--prompt", PROBLEM, "--seed", "4", *words])
        lines = capsys.readouterr().out.replace(" = ", " ").splitlines()[1:-1]
        return " ".join(line.split(" J ")[0] for line in lines).split()
    whole = thinking("--budget", "60")
    assert len(whole) > 41 and thinking("--budget", "60", "--progress", "--forks", "2") == whole
    assert all(thinking("--budget", str(budget)) == whole[:budget] for budget in (0, 5, 20, 41))


def test_the_largest_budget_fits_and_one_more_does_not(run, capsys, task, config):
    """The context holds the prompt, the thinking and one forced answer."""
    prompt = task.prompt(task.parse(PROBLEM))
    room = config.max_position_embeddings - len(prompt) - len(task.forced_stop) - task.answer_tokens
    words = [str(run), "--prompt", PROBLEM, "--progress", "--forks", "1", "--temperature", "0"]
    assert sample.main([*words, "--budget", str(room)]) == 0
    with pytest.raises(UserError, match=f"0..{room}"):
        sample.main([*words, "--budget", str(room + 1)])


def test_a_checkpoint_folder_is_as_good_as_its_run(run, capsys):
    outputs = []
    for folder in (run, run / "checkpoints/step-000001"):
        assert sample.main([str(folder), "--budget", "20"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_mistake_on_the_command_line_is_one_line_and_status_2(run):
    root = Path(__file__).parents[1]
    command = [sys.executable, "sample.py", str(run), "--prompt", "3 7"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: expected 3 numbers") and result.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_it_in_silence(run):
    """`python sample.py … | head -1`: the pipe is closed before all is written."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "sample.py", str(run)], cwd=Path(__file__).parents[1], stdout=write,
                            stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == 0 and result.stderr == ""


@pytest.mark.parametrize("words, message", [
    (["--prompt", "3 7"], "expected 3 numbers and a target"),
    (["--prompt", "3 7 4 target 999"], "knows the numbers 1 to 100"),
    (["--budget", "9999"], "--budget must lie in 0"),
    (["--budget", "many"], "whole numbers of tokens"),
    (["--budget", "18,"], "whole numbers of tokens"),
    (["--prompt", ""], "expected 3 numbers and a target"),
    (["--temperature", "-1"], "--temperature=-1.0 must be 0"),
    (["--temperature", "nan"], "--temperature=nan must be 0"),
    (["--top-k", "-1"], "--top-k=-1 must be 0"),
    (["--top-p", "0"], "--top-p=0.0 must lie"),
    (["--progress", "--forks", "0"], "--forks=0 must be at least 1"),
])
def test_mistakes_name_their_fix(run, words, message):
    with pytest.raises(UserError, match=message):
        sample.main([str(run), *words])


def test_without_a_run_or_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is no run: it has no config.json; train one with"):
        sample.main([str(tmp_path)])
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm/model.safetensors").touch()
    with pytest.raises(UserError, match="is no run: it has no config.json"):
        sample.main([str(tmp_path / "warm")])
    save_config(RunConfig(), tmp_path / "config.json")
    with pytest.raises(UserError, match="train first"):
        sample.main([str(tmp_path)])


def test_no_two_episodes_or_answers_draw_the_same_random_numbers(run, monkeypatch, capsys):
    """Or what was drawn once would be drawn again."""
    asked, make = [], sample.generator_for
    monkeypatch.setattr(sample, "generator_for", lambda *which: asked.append(which) or make(*which))
    sample.main([str(run), "--prompt", PROBLEM, "--progress", "--forks", "2", "--budget", "20"])
    assert len(asked) > 5 and len(set(asked)) == len(asked)


@pytest.mark.parametrize("words", [["--top-k", "1"], ["--top-p", "1e-9"]], ids=str)
def test_the_likeliest_token_alone_is_greedy(run, capsys, words):
    """In the thinking and in the answer."""
    outputs = []
    for some in (["--temperature", "0"], words):
        sample.main([str(run), "--prompt", PROBLEM, "--budget", "20,40", *some])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_J_is_the_mean_over_all_forks(run, monkeypatch, capsys):
    """Of answers that are all right."""
    monkeypatch.setattr(Countdown, "grade", lambda *_: 1.0)
    sample.main([str(run), "--progress", "--forks", "3", "--budget", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("J 1.00") for line in lines[:-1]) and lines[-1].endswith("right")


def test_the_problem_of_who_names_none_is_a_test_problem(run, monkeypatch, capsys):
    """Drawn by the seed; and a checkpoint may be named from inside of it."""
    drawn, draws = [], Countdown.draws
    monkeypatch.setattr(Countdown, "draws", lambda task, *where: drawn.append(where) or draws(task, *where))
    monkeypatch.chdir(run / "checkpoints/step-000001")
    assert sample.main([".", "--budget", "5", "--seed", "3"]) == 0
    assert drawn == [("test", 3)]
