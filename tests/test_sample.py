"""sample.py: what it shows is what an uncached model would do, and mistakes name their fix."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from nanomrt import checkpoint
from nanomrt.config import RunConfig, UserError, save_config
from nanomrt.model import Packed
from nanomrt.sampler import Sampling


@pytest.fixture
def run(tmp_path, model, task):
    """A run's folder around a random model."""
    save_config(RunConfig(), tmp_path / "config.json")
    checkpoint.save(tmp_path / "checkpoints/step-000001", model, task.tokenizer, {})
    return tmp_path


def greedy(model, tokens: list[int]) -> int:
    packed = Packed.of(torch.tensor([len(tokens)]))
    with torch.no_grad():
        return int((model(torch.tensor(tokens), packed.position_ids, packed)[-1] @ model.head.T).argmax())


@pytest.mark.parametrize("budget", [0, 1, 7, 40])
def test_thinking_episode_by_episode_equals_uncached_greedy_decoding(model, task, budget):
    """The episodes, joined, are the model's own tokens up to the budget or the end of its thinking."""
    prompt = task.prompt(task.problems("test", 1, 0)[0])
    thought = [token for episode, _ in sample.think(model, task, prompt, budget, Sampling(1, (), 0.0), 0)
               for token in episode]
    expected = []
    while len(expected) < budget:
        token = greedy(model, prompt + expected)
        if token in (task.close_thinking, task.close_answer):
            break
        expected.append(token)
    # A `<try>` that the budget leaves without an attempt is the one token that may be missing at the end.
    assert thought == expected[: len(thought)] and len(expected) - len(thought) <= (expected[-1:] == [task.open_episode])


def test_the_cache_of_the_thinking_serves_any_shorter_budget(run, capsys):
    """One trace stopped at several budgets gives the answers that stopping there at once gives."""
    words = [str(run), "--prompt", "3 7 4 target 25", "--temperature", "0"]
    assert sample.main([*words, "--budget", "9,20,30"]) == 0
    together = [line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()[-3:]]
    for budget, answer in zip((9, 20, 30), together):
        assert sample.main([*words, "--budget", str(budget)]) == 0
        assert capsys.readouterr().out.splitlines()[-1].strip() == answer


def test_progress_shows_J_after_every_episode(run, capsys):
    assert sample.main([str(run), "--progress", "--forks", "2", "--budget", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[-2] == "J" and 0 <= float(line.split()[-1]) <= 1 for line in lines[:-1])


def test_a_seed_makes_the_same_output(run, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        sample.main([str(run), "--seed", seed, "--prompt", "3 7 4 target 25"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_looking_does_not_change_the_trace(run, capsys):
    """Progress draws random numbers of its own, and a smaller budget shows the beginning of the same thinking."""
    def thinking(*words: str) -> str:
        sample.main([str(run), "--prompt", "3 7 4 target 25", "--seed", "3", *words])
        lines = capsys.readouterr().out.splitlines()[1:-1]
        return " ".join(line.split(" J ")[0].strip() for line in lines)
    whole = thinking("--budget", "60")
    assert thinking("--budget", "60", "--progress", "--forks", "2") == whole
    assert all(whole.startswith(thinking("--budget", str(budget)).removesuffix("<try>").strip()) for budget in (5, 20, 41))


def test_the_largest_budget_fits_and_one_more_does_not(run, capsys, task, config):
    """The context holds the prompt, the thinking and one forced answer."""
    prompt = task.prompt(task.parse("3 7 4 target 25"))
    room = config.max_position_embeddings - len(prompt) - len(task.forced_stop) - task.answer_tokens
    words = [str(run), "--prompt", "3 7 4 target 25", "--progress", "--forks", "1", "--temperature", "0"]
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
    with pytest.raises(UserError, match="is no run: it has no config.json.* trains one"):
        sample.main([str(tmp_path)])
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm/model.safetensors").touch()
    with pytest.raises(UserError, match="a checkpoint outside of a run, so its task isn't known"):
        sample.main([str(tmp_path / "warm")])
    save_config(RunConfig(), tmp_path / "config.json")
    with pytest.raises(UserError, match="train first"):
        sample.main([str(tmp_path)])
