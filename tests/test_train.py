"""The whole pipeline on config/tiny.py: everything is written, resuming is exact, killing loses nothing."""

import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from data.countdown import Countdown
from nanomrt import checkpoint, warmstart
from nanomrt.config import RunConfig, UserError, load_config, parse_overrides
from nanomrt.methods import Gathered
from nanomrt.model import Llama, Packed
from nanomrt.mrt import Batch, clipped_loss, token_weights
from nanomrt.report import read_jsonl
from nanomrt.rollout import graded
from nanomrt.run import Run, generator_for
from nanomrt.warmstart import STAGES, cached_warm_start, warm_folder

ROOT = Path(__file__).parents[1]
FAST = ["--warm_steps=200", "--steps=4", "--save_every=2", "--eval_problems=8", "--eval_samples=2", "--threads=1", "--device=cpu"]
CLOCKS = ("seconds_trace", "seconds_fork", "seconds_update", "seconds_cpu", "seconds_total")


@pytest.fixture(scope="module")
def warm_started(tmp_path_factory) -> Path:
    """The folder of a warm start that is good enough for rewards to differ: without them, every gradient would be 0."""
    out = tmp_path_factory.mktemp("warm")
    config = load_config(ROOT / "config/tiny.py", parse_overrides([*FAST, f"--out_dir={out}"]))
    return cached_warm_start(Countdown(config), config, "cpu", force=False)


@pytest.fixture
def out(tmp_path, warm_started) -> Path:
    """An output folder that holds the warm start already."""
    shutil.copytree(warm_started, tmp_path / warm_started.name)
    return tmp_path


def run_tiny(out: Path, *words: str) -> Path:
    """Train the tiny configuration in this process; returns its folder."""
    before = signal.getsignal(signal.SIGINT)
    try:
        assert train.main([str(ROOT / "config/tiny.py"), *FAST, f"--out_dir={out}", *words]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    return newest_run(out)


def newest_run(out: Path) -> Path:
    return max((path for path in out.iterdir() if path.name.startswith("tiny")), key=lambda path: path.stat().st_mtime)


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows[1:]]


def weights(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(warm_started) -> Path:
    """A run that nothing interrupted."""
    return run_tiny(warm_started.parent)


def test_everything_is_written(finished):
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "traces.html", "figures/training.png",
                 "figures/budget.png", "checkpoints/step-000002", "checkpoints/step-000004"):
        assert (finished / name).exists(), name
    assert [row["step"] for row in metrics(finished)] == [1, 2, 3, 4]
    summary = json.loads((finished / "summary.json").read_text())
    for section in ("warm_start", "test", "ood"):
        for key in ("accuracy", "tokens_per_correct", "mean_thinking_tokens"):
            assert set(summary[section][key]) == {"value", "low", "high"}
        assert summary[section]["regret"] and summary[section]["budget_curve"]
    assert {"ledger", "seconds", "peak_memory_bytes", "config", "commit", "device"} <= summary.keys()
    assert all(summary["ledger"][kind] > 0 for kind in ("trace", "fork", "update"))


def test_every_stage_has_the_problems_of_its_own_split(tmp_path, monkeypatch):
    """Only training problems are learned, only validation problems choose, and test problems are for the end."""
    drawn, draws = [], Countdown.draws
    monkeypatch.setattr(Countdown, "draws", lambda task, *where: drawn.append(where) or draws(task, *where))
    run_tiny(tmp_path, "--steps=2", "--warm_steps=2")
    asked = {(split, seed) for split, seed in drawn if seed != "is there one?"}
    assert asked == {("train", "0/warm"), ("validation", "gates"), ("train", "0/0"), ("train", "0/1"), ("test", "eval"),
                     ("ood", "eval"), ("test", "traces")}


def test_sampler_and_trainer_score_the_same_distribution(finished):
    assert all(row["max_logprob_diff"] < 1e-4 for row in metrics(finished))


def test_how_far_sampler_and_trainer_are_apart_counts_every_token_once():
    """However they were cut into parts."""
    difference = torch.randn(250, generator=torch.Generator().manual_seed(0))
    expected = {"mean_logprob_diff": float(difference.abs().mean()), "max_logprob_diff": float(difference.abs().max()),
                "p99_logprob_diff": float(difference.abs().sort().values[-3])}  # two of 250 are larger
    for sizes in ([250], [1, 249], [100, 50, 100]):
        assert train.apart(list(difference.split(sizes))) == pytest.approx(expected)
    assert set(train.apart([]).values()) == {0.0}


def test_the_ledger_counts_the_actions_that_were_trained(finished):
    """On-policy and online, every sampled trace token is trained once, or never if no gradient would come from it."""
    last = metrics(finished)[-1]
    assert 0 < last["update_tokens"] <= last["trace_tokens"]


def test_the_runs_of_these_tests_learn(finished):
    """Some rewards differ and no gradient is 0, so equal weights mean something; which step has them depends on the machine."""
    rows = metrics(finished)
    assert any(0 < row["reward"] < 1 for row in rows) and all(row["grad_norm"] > 0 for row in rows)


def test_alpha_zero_is_grpo_bit_for_bit_and_mrt_is_not(finished, out):
    zero, grpo = run_tiny(out, "--alpha=0"), run_tiny(out, "--algorithm=grpo")
    assert equal(weights(zero), weights(grpo))
    assert not equal(weights(zero), weights(finished))


@pytest.fixture(scope="module")
def learned(warm_started, tmp_path_factory) -> Callable[..., torch.Tensor]:
    """All weights (n,) after two steps with these words on the command line, unevaluated; each run is made once."""
    @functools.cache
    def run(*words: str) -> torch.Tensor:
        out = tmp_path_factory.mktemp("switch")
        shutil.copytree(warm_started, out / warm_started.name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "finish", lambda *_: None)
            folder = run_tiny(out, "--steps=2", *words)
        assert all(row["grad_norm"] < 1e3 and row["skipped"] == 0 for row in metrics(folder))
        return torch.cat([weight.flatten() for weight in weights(folder, 2).values()])
    return run


@pytest.mark.parametrize("without, switch", [
    ([], ["--kl_coef=0.1"]), (["--kl_coef=0.1"], ["--kl_estimator=k3"]), (["--kl_coef=0.1"], ["--kl_estimator=k1_reward"]),
    ([], ["--loss_norm=sequence"]), ([], ["--truncated=mask"]), (["--algorithm=grpo"], ["--equal_groups=skip"]),
    ([], ["--advantage_norm=rloo"]), ([], ["--advantage_norm=mean"]), ([], ["--gamma=0.5"]), ([], ["--fork_temperature=1"]),
    (["--fork_temperature=1"], ["--forks=2"]), (["--fork_temperature=1"], ["--forks=0"]), ([], ["--weight_decay=0.1"]),
    ([], ["--forced_on=1"]),
])
def test_every_switch_trains_and_changes_what_is_learned(learned, without, switch):
    """By more than rounding; importance weights, which are 1 but for rounding here, have tests of their own."""
    assert (learned(*without, *switch) - learned(*without)).abs().max() > 1e-6


def test_importance_weights_do_not_hide_how_far_sampler_and_trainer_are_apart(out, monkeypatch):
    """The trainer's own log-probs stand in for the sampler's from then on: what is logged is the difference before."""
    monkeypatch.setattr(train, "rescore", lambda model, batch, config: batch.logprob - 0.25 * batch.is_action)
    steps = [row for row in read_jsonl(run_tiny(out, "--steps=1", "--importance_cap=2") / "metrics.jsonl") if "reward" in row]
    [row] = steps
    assert [row[f"{name}_logprob_diff"] for name in ("mean", "p99", "max")] == [pytest.approx(0.25, abs=1e-5)] * 3


def test_the_prefix_form_measures_one_episode_of_each_continuing_rollout(out):
    """Half of a group is forced to stop, so at most half of the rollouts have an episode, and none has more than one."""
    rows = metrics(run_tiny(out, "--algorithm=mrt", "--steps=2"))
    assert all(0 < row["episodes"] <= 0.5 and row["fork_tokens"] > 0 for row in rows)


def test_a_finished_run_is_left_as_it_is(finished, capsys, monkeypatch):
    """What evaluate.py added to its summary stays there. Unlike a mistake, it is no error."""
    before = (finished / "summary.json").read_bytes()
    monkeypatch.setattr(train, "starting_policy", None)
    words = [str(ROOT / "config/tiny.py"), *FAST, f"--out_dir={finished.parent}", "--resume"]
    assert train.main(words) == 0 and (finished / "summary.json").read_bytes() == before
    assert "is finished: python evaluate.py" in capsys.readouterr().out


def test_two_processes_do_not_train_one_run(model, tmp_path):
    """The second one would cut off the first one's records. Whoever has ended, or was killed, is in nobody's way."""
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    run, optimizer = Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu"), torch.optim.AdamW(model.parameters())
    words = [sys.executable, "-c", hold, tmp_path / ".lock"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        with pytest.raises(UserError, match="another process is training"):
            run.begin(tmp_path, model, optimizer, resume=False)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        other.kill()
    run.begin(tmp_path, model, optimizer, resume=False)
    run.end()


def test_a_checkpoint_without_an_optimiser_cannot_be_resumed(model, task, tmp_path):
    checkpoint.save(tmp_path / "checkpoints/step-000001", model, task.tokenizer, {})
    run = Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu")
    with pytest.raises(UserError, match="cannot resume: .*step-000001 has no optimizer.safetensors: --init_from="):
        run.begin(tmp_path, model, torch.optim.AdamW(model.parameters()), resume=True)


def test_micro_batches_change_nothing_but_rounding(finished, out):
    """Gradients are sums over the whole minibatch, however it is cut."""
    other = run_tiny(out, "--steps=1", "--save_every=1", "--micro_batch_tokens=64")
    assert metrics(other)[0]["grad_norm"] == pytest.approx(metrics(finished)[0]["grad_norm"], rel=1e-4)


def test_resuming_equals_never_stopping(finished, out):
    """4 steps == 2 + resume + 2: parameters, optimiser and metrics, bit for bit."""
    run = run_tiny(out)
    for name in ("checkpoints/step-000004", "summary.json"):
        path = run / name
        path.rename(out / path.name)  # as if the run had stopped after step 3, before the next checkpoint
    run_tiny(out, "--resume")
    assert equal(weights(run), weights(finished))
    assert metrics(run) == metrics(finished)
    optimizer = "checkpoints/step-000004/optimizer.safetensors"
    assert equal(load_file(run / optimizer), load_file(finished / optimizer))


def test_a_forced_run_resumes_from_the_warm_start_that_it_began_with(out, monkeypatch):
    """--force took one that fails a gate; to go on from it needs no second --force, and no other warm start."""
    run = run_tiny(out, "--gate_answer=1", "--steps=2", "--force")
    (run / "checkpoints/step-000002").rename(out / "gone")
    start = read_jsonl(run / "metrics.jsonl")[0]["start"]
    monkeypatch.setattr(train, "cached_warm_start", lambda *_: pytest.fail("asked for a warm start"))
    run_tiny(out, "--gate_answer=1", "--steps=2", "--resume")
    assert read_jsonl(run / "metrics.jsonl")[0]["start"] == start and len(metrics(run)) == 2


@pytest.mark.parametrize("moment", ["in a step", "while a checkpoint is written"])
def test_a_killed_run_resumes_to_the_same_end(finished, out, moment):
    """SIGKILL, then --resume: the same weights and metrics as if nothing had happened."""
    command = [sys.executable, "train.py", "config/tiny.py", *FAST, f"--out_dir={out}"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    if moment == "in a step":
        for line in process.stdout:
            if line.lstrip().startswith("3/4"):
                break
    else:
        while process.poll() is None and not list(out.glob("tiny*/checkpoints/.step-000004.*.partial")):
            time.sleep(0.0005)
    process.kill()
    process.wait()
    process.stdout.close()
    run = newest_run(out)
    assert (run / "checkpoints").is_dir()
    run_tiny(out, "--resume")
    assert equal(weights(run), weights(finished))
    assert metrics(run) == metrics(finished)


def test_ctrl_c_saves_and_says_how_to_go_on(out):
    command = [sys.executable, "train.py", "config/tiny.py", *FAST, f"--out_dir={out}", "--steps=200", "--save_every=100"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
    output = []
    for line in process.stdout:
        output.append(line)
        if line.lstrip().startswith("1/200"):
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert output[-1].rstrip().endswith(f"python train.py {' '.join(command[2:])} --resume")
    assert checkpoint.damage(checkpoint.newest(newest_run(out) / "checkpoints")) is None
    process.stdout.close()


def test_ctrl_c_before_training_is_one_line(tmp_path):
    """There is nothing to save yet."""
    command = [sys.executable, "train.py", "config/tiny.py", f"--out_dir={tmp_path}", "--device=cpu", "--warm_steps=100000"]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # who runs the tests in the background ignores Ctrl-C
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert "no GPU in use" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and errors.endswith("stopped; --resume goes on with a run that has begun\n")
    assert "Traceback" not in errors


def test_after_training_ctrl_c_is_what_it_was(finished, tmp_path):
    """While a run trains, the first Ctrl-C waits for the step's end; once it is over nothing waits any more."""
    run, before = Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu"), signal.getsignal(signal.SIGINT)
    model = checkpoint.load_model(finished / "checkpoints/step-000004", "cpu")
    run.begin(finished, model, torch.optim.AdamW(model.parameters()), resume=False)
    assert signal.getsignal(signal.SIGINT) == run._interrupt
    run.end()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("at", [1, 2])
def test_an_interruption_at_any_moment_is_saved(out, monkeypatch, capsys, at):
    """Wherever between two looks at `interrupted` it comes, the step that the message names has its checkpoint."""
    looks = itertools.count()
    monkeypatch.setattr(Run, "interrupted", property(lambda run: next(looks) >= at, lambda run, value: None), raising=False)
    assert train.main([str(ROOT / "config/tiny.py"), *FAST, f"--out_dir={out}", "--save_every=100"]) == 130
    saved = checkpoint.newest(newest_run(out) / "checkpoints").name
    assert f"stopped after step {int(saved.removeprefix('step-'))};" in capsys.readouterr().out


def test_non_finite_gradients_are_skipped_and_three_in_a_row_stop(tmp_path):
    run = Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu")
    assert run.accept_gradient(1.0)
    assert not run.accept_gradient(float("nan")) and not run.accept_gradient(float("inf"))
    assert run.accept_gradient(1.0) and run.skipped == 2
    assert not run.accept_gradient(float("nan")) and not run.accept_gradient(float("nan"))
    with pytest.raises(UserError, match="lower learning_rate"):
        run.accept_gradient(float("nan"))


def test_learning_rate_rises_and_falls():
    """Linear over the warm-up, then a straight line to learning_rate_end at the end of the run; 1 keeps it constant."""
    keys = {"steps": "5", "epochs": "2", "minibatches": "2", "warmup_steps": "4", "learning_rate": "0.8"}
    config = load_config(ROOT / "config/tiny.py", keys)
    rates = [train.learning_rate(config, done) for done in range(20)]
    assert rates == pytest.approx([0.8 * min(1, (done + 1) / 4) * (20 - done) / 20 for done in range(20)])
    half = replace(config, learning_rate_end=0.5)
    assert train.learning_rate(half, 19) == pytest.approx(0.8 * (1 - 0.5 * 19 / 20))
    constant = replace(config, learning_rate_end=1.0, warmup_steps=0)
    assert [train.learning_rate(constant, done) for done in range(20)] == [0.8] * 20


def test_every_pass_sees_every_rollout_once(model, imitated, tmp_path, monkeypatch):
    """3 passes in 2 steps each: 6 steps of the schedule, three times the tokens, and only the first step is on policy."""
    batch, advantage = imitated
    config = replace(load_config(ROOT / "config/tiny.py"), epochs=3, minibatches=2, warmup_steps=0, learning_rate=0.1)
    run, optimizer, rates, ratios = Run(config, tmp_path, "cpu"), torch.optim.SGD(model.parameters()), [], []
    clipped_loss = train.clipped_loss
    monkeypatch.setattr(optimizer, "step", lambda step=optimizer.step: rates.append(optimizer.param_groups[0]["lr"]) or step())
    monkeypatch.setattr(train, "clipped_loss", lambda logprob, old, *rest: ratios.append((logprob - old).abs().max().item()) or
                        clipped_loss(logprob, old, *rest))
    on_policy = replace(batch, logprob=train.rescore(model, batch, config))
    learned = train.update(model, optimizer, on_policy, advantage, None, run)
    assert rates == [train.learning_rate(config, done) for done in range(6)]
    assert run.ledger["update"] == 3 * int(batch.is_action.sum())
    assert ratios[0] < 1e-5 and min(ratios[1:]) > 1e-3 and learned["max_logprob_diff"] == ratios[0]


def test_a_run_of_non_finite_gradients_stops_and_says_what_to_do(out, monkeypatch):
    monkeypatch.setattr(train, "clipped_loss", lambda logprob, *_: (logprob * float("nan")).sum())
    with pytest.raises(UserError, match="three gradients in a row"):
        run_tiny(out)


@pytest.fixture
def imitated(task) -> tuple[Batch, torch.Tensor]:
    """Three search traces and a worth for every token. Their log-probs are nonsense: nobody sampled them."""
    problems = task.problems("train", 3, 0)
    tokens = [task.prompt(p) + task.warm_trace(p, random.Random(i))[0] for i, p in enumerate(problems)]
    batch = graded(task, problems, [0, 1, 2], tokens).batch()
    g = torch.Generator().manual_seed(0)
    return replace(batch, logprob=torch.randn(batch.logprob.shape, generator=g)), torch.rand(len(batch.tokens), generator=g)


def test_a_skipped_update_leaves_the_parameters_alone(model, imitated, tmp_path, monkeypatch):
    """NaN in every gradient: nothing moves, though the optimiser would decay the weights. Without it everything moves."""
    batch, advantage = imitated
    config = replace(load_config(ROOT / "config/tiny.py"), minibatches=1, warmup_steps=0, learning_rate=0.1)
    run, optimizer = Run(config, tmp_path, "cpu"), torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.1)
    before = [weight.detach().clone() for weight in model.parameters()]
    with monkeypatch.context() as patched:
        patched.setattr(train, "clipped_loss", lambda logprob, *_: (logprob * float("nan")).sum())
        train.update(model, optimizer, batch, advantage, None, run)
    assert run.skipped == 1 and all(map(torch.equal, model.parameters(), before))
    train.update(model, optimizer, batch, advantage, None, run)
    assert run.skipped == 1 and not any(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("keys", [{}, {"epochs": 2, "minibatches": 3}, {"micro_batch_tokens": 1}], ids=str)
def test_the_entropy_of_a_log_line_is_the_mean_over_all_tokens(model, imitated, tmp_path, keys):
    """log V for uniform logits, however many passes, steps and parts the tokens are seen in."""
    batch, advantage = imitated
    torch.nn.init.zeros_(model.head)
    config = replace(load_config(ROOT / "config/tiny.py"), **{"minibatches": 1, "learning_rate": 1e-12} | keys)
    learned = train.update(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, advantage, None,
                           Run(config, tmp_path, "cpu"))
    assert learned["entropy"] == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)


def test_a_step_is_no_longer_than_its_clipped_gradient(model, imitated, tmp_path):
    """lr · grad_clip, all weights taken together, for a gradient many times as large."""
    batch, advantage = imitated
    config = replace(load_config(ROOT / "config/tiny.py"), minibatches=1, warmup_steps=0, learning_rate=0.5, grad_clip=1e-4)
    before, optimizer = [weight.detach().clone() for weight in model.parameters()], torch.optim.SGD(model.parameters(), lr=0.0)
    learned = train.update(model, optimizer, batch, advantage, None, Run(config, tmp_path, "cpu"))
    moved = torch.stack([(a.detach() - b).norm() for a, b in zip(model.parameters(), before, strict=True)]).norm()
    assert float(moved) == pytest.approx(0.5 * 1e-4, rel=1e-2) and learned["grad_norm"] > 1e-2


def update_gradient(model, batch, advantage, folder, ref_logprob=None, **keys) -> list[torch.Tensor]:
    """What `update` leaves in the parameters' .grad, unclipped, with a learning rate of almost 0."""
    config = replace(load_config(ROOT / "config/tiny.py"), **dict(minibatches=1, grad_clip=1e9, learning_rate=1e-12) | keys)
    train.update(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, advantage, ref_logprob, Run(config, folder, "cpu"))
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("algorithm", ["sft", "star", "mrt_star"])
@pytest.mark.parametrize("loss_norm", ["token", "sequence"])
def test_the_supervised_update_is_the_gradient_of_the_likelihood(model, imitated, tmp_path, algorithm, loss_norm):
    """-sum w A log p over all tokens after the prompts, scored from scratch; however the batch is cut, and whatever the keys of
    the policy gradient and the recorded log-probs are."""
    batch, advantage = imitated
    got = update_gradient(model, batch, advantage, tmp_path, algorithm=algorithm, loss_norm=loss_norm)
    model.zero_grad()
    loss, weight = 0.0, token_weights(batch, loss_norm, 0, "zero")
    for ids, w, A in zip(*(x.split(batch.lengths.tolist()) for x in (batch.tokens, weight, advantage)), strict=True):
        packed = Packed.of(torch.tensor([len(ids)]))
        logprob = (model(ids, packed.position_ids, packed) @ model.head.T).log_softmax(-1)
        loss = loss - (w[1:] * A[1:] * logprob[:-1].gather(1, ids[1:, None]).squeeze(1)).sum()
    loss.backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-3)
    other = update_gradient(model, replace(batch, logprob=batch.logprob * 0), advantage, tmp_path, algorithm=algorithm,
                            loss_norm=loss_norm, alpha=0.0, gamma=1.0, clip_low=0.0, clip_high=0.0, forks=3,
                            fork_temperature=1.0, advantage_norm="rloo", micro_batch_tokens=60)
    for mine, again in zip(got, other, strict=True):
        torch.testing.assert_close(mine, again, atol=1e-6, rtol=1e-3)


def test_a_policy_gradient_does_heed_the_recorded_logprobs(model, imitated, tmp_path):
    """The counterpart: with the same nonsense as old log-probs, clipping cuts most of the gradient."""
    batch, advantage = imitated
    sft, grpo = (update_gradient(model, batch, advantage, tmp_path, algorithm=name) for name in ("sft", "grpo"))
    assert not torch.allclose(sft[0], grpo[0], atol=1e-3)


# --- Switches: each against the gradient, or the number, that it stands for ---


@pytest.fixture
def on_policy(model, imitated) -> tuple[Batch, torch.Tensor]:
    """`imitated` with the model's own log-probs: rewards 1, 0, 1, the last two of one problem, the first one cut off."""
    batch, advantage = imitated
    batch = replace(batch, reward=torch.tensor([1.0, 0.0, 1.0]), prompt_id=torch.tensor([4, 7, 7]),
                    finished=torch.tensor([False, True, True]))
    return replace(batch, logprob=train.rescore(model, batch, load_config(ROOT / "config/tiny.py"))), advantage


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-6, rtol=1e-3) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_pulls_to_the_reference(model, on_policy, tmp_path, estimator):
    """On policy the gradient of coef · KL is that of -coef · delta · log p, where the reference's log-probs are delta higher."""
    batch, delta = on_policy
    pull = update_gradient(model, batch, 0 * delta, tmp_path, ref_logprob=batch.logprob + delta, algorithm="grpo", kl_coef=0.3,
                           kl_estimator=estimator)
    assert same(pull, update_gradient(model, batch, 0.3 * delta, tmp_path, algorithm="grpo"))


def test_k1_is_a_price_in_the_reward(on_policy):
    """Each rollout pays coef times its summed log-ratio to the reference."""
    batch, delta = on_policy
    config = replace(load_config(ROOT / "config/tiny.py"), kl_coef=0.3, kl_estimator="k1_reward")
    priced = train.with_k1_penalty(batch, batch.logprob - delta, config)
    assert train.with_k1_penalty(batch, batch.logprob - delta, replace(config, kl_estimator="k2")) is batch
    sums = torch.stack([part.sum() for part in delta.split(batch.lengths.tolist())])
    torch.testing.assert_close(priced.reward, batch.reward - 0.3 * sums)


@pytest.mark.parametrize("keys, message", [
    ({"vocab_size": 5}, "a vocabulary of 5, the task one of 118: set the task's keys"),
    ({"max_position_embeddings": 100}, r"a context of 100 tokens, but .* can take \d+: lower thinking_budget")])
def test_a_checkpoint_that_does_not_fit_is_an_error_before_training(config, task, tmp_path, keys, message):
    checkpoint.save(tmp_path / "start", Llama(replace(config, **keys)), task.tokenizer, {})
    with pytest.raises(UserError, match=message):
        train.starting_policy(tmp_path / "start", task, RunConfig(), "cpu")


def test_skipping_equal_groups_and_masking_cut_off_rollouts_leave_the_others(model, on_policy, tmp_path):
    """Here both leave out the first rollout: nothing of its group has an advantage, and it was cut off. It is left out of the
    number of tokens, too; and skipping leaves nobody out who has an advantage, whatever the rewards of the group."""
    batch, advantage = on_policy
    rows = torch.tensor([1, 2])
    some = advantage.clone()
    some[batch.flat(torch.tensor([0]))] = 0.0
    others = update_gradient(model, batch.take(rows), advantage[batch.flat(rows)], tmp_path, algorithm="grpo")
    for switch in ({"equal_groups": "skip"}, {"truncated": "mask"}):
        assert same(others, update_gradient(model, batch, some, tmp_path, algorithm="grpo", **switch))
    assert not same(others, update_gradient(model, batch, some, tmp_path, algorithm="grpo"))
    everyone = update_gradient(model, batch, advantage, tmp_path, algorithm="grpo")
    assert same(everyone, update_gradient(model, batch, advantage, tmp_path, algorithm="grpo", equal_groups="skip"))


def test_what_no_gradient_comes_from_is_not_computed(model, on_policy, tmp_path, monkeypatch):
    """A rollout without an advantage, and what follows another one's last: the gradient is the whole batch's all the same."""
    batch, advantage = on_policy
    config = load_config(ROOT / "config/tiny.py")
    last = int(batch.is_action.nonzero()[3])  # the fourth action of the first rollout
    some = advantage * batch.is_action
    some[last + 1 : int(batch.lengths[:2].sum())] = 0.0  # the rest of it, and all of the second one
    logprob, _, action = train.score(model, batch, config.temperature)
    weight = token_weights(batch, config.loss_norm, config.thinking_budget, config.truncated)[action]
    clipped_loss(logprob, batch.logprob[action], some[action], weight, config.clip_low, config.clip_high).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    read, score = [], train.score
    monkeypatch.setattr(train, "score", lambda model, batch, *rest: read.append(len(batch.tokens)) or score(model, batch, *rest))
    assert same(whole, update_gradient(model, batch, some, tmp_path, algorithm="grpo"))
    assert sum(read) == last + 1 + int(batch.lengths[2])


def test_the_seconds_of_forced_answers_are_not_counted_among_those_of_traces(on_policy, tmp_path, monkeypatch):
    """A clock of our own: gathering takes 5 s, of which 2 are forced answers; then the update takes 4."""
    batch, _ = on_policy
    clock = iter([0.0, 5.0, 10.0, 14.0])
    run = Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu")
    run._cpu_began = run._began = 0.0
    with monkeypatch.context() as patched:
        patched.setattr("nanomrt.run.time.perf_counter", lambda: next(clock, 20.0))
        for stage in ("trace", "update"):
            with run.timed(stage):
                pass
        run.record(Gathered(None, batch, None, 70, 30, fork_seconds=2.0),
                   {"entropy": 1.0, "grad_norm": 1.0, "max_logprob_diff": 0.0})
    [row] = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row[f"seconds_{stage}"] for stage in ("trace", "fork", "update", "total")] == [3.0, 2.0, 4.0, 9.0]
    assert row["trace_tokens"] == 70 and row["fork_tokens"] == 30


def test_a_batch_that_teaches_nothing_moves_nothing(model, on_policy, tmp_path):
    """Not even by the optimiser's momentum."""
    batch, advantage = on_policy
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu")
    train.update(model, optimizer, batch, advantage, None, run)
    before, tokens = [parameter.clone() for parameter in model.parameters()], run.ledger["update"]
    learned = train.update(model, optimizer, batch, 0 * advantage, None, run)
    assert same(before, list(model.parameters())) and run.ledger["update"] == tokens and learned["grad_norm"] == 0.0


@pytest.mark.parametrize("ratio, weight", [(4.0, 2.0), (0.25, 0.25)])
def test_importance_weights_are_the_trainers_probability_over_the_samplers(out, monkeypatch, ratio, weight):
    """Up to the cap, and the old log-probs of the loss are then the trainer's."""
    seen = []

    def stop(model, optimizer, batch, advantage, ref_logprob, run):
        seen.append((batch, advantage))
        raise UserError("seen")

    monkeypatch.setattr(train, "update", stop)
    monkeypatch.setattr(train, "rescore", lambda model, batch, config: batch.logprob + math.log(ratio) * batch.is_action)
    for cap in ("0", "2"):
        with pytest.raises(UserError, match="seen"):
            train.main([str(ROOT / "config/tiny.py"), *FAST, f"--out_dir={out}", f"--importance_cap={cap}"])
    (before, plain), (after, weighted) = seen
    torch.testing.assert_close(weighted, weight * plain)
    torch.testing.assert_close(after.logprob, before.logprob + math.log(ratio) * before.is_action)


def test_a_mistake_is_one_line_that_names_the_fix(tmp_path):
    command = [sys.executable, "train.py", "config/tiny.py", "--alhpa=1", f"--out_dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "did you mean 'alpha'" in result.stderr


@pytest.mark.parametrize("words, message", [
    (["--resume"], "which config.* usage: python train.py config/small.py"),
    (["config/missing.py"], "no config file"),
    (["config/tiny.py", "--group_size=1"], "group_size"),
    (["config/tiny.py", "--thinking_budget=500"], "max_position_embeddings"),
    (["config/tiny.py", "--resume"], "nothing to resume"),
    (["config/tiny.py", "--init_from=nowhere"], "no checkpoint folder"),
    (["config/tiny.py", "--operators=%"], "must be some of"),
    (["config/tiny.py", "--ood_target_min=61"], "no ood problem in 20,000 draws"),
])
def test_an_impossible_run_ends_before_any_work(tmp_path, monkeypatch, words, message):
    """And not when all of it is done."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        train.main([*words, f"--out_dir={tmp_path}", "--device=cpu"])
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_written_ends_before_any_work(task, tmp_path, monkeypatch):
    """Not minutes later, when the warm start is to be saved; and nothing is made where something could be."""
    monkeypatch.setattr(warmstart, "warm_start", None)
    words = lambda out: [str(ROOT / "config/tiny.py"), *FAST, f"--out_dir={out}"]
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/new/out"):
        with pytest.raises(UserError, match=f"cannot write to {out}.*: {tmp_path / 'file'} is no folder"):
            train.main(words(out))
        with pytest.raises(UserError, match="cannot write to"):  # compare.py begins here
            cached_warm_start(task, load_config(ROOT / "config/tiny.py", {"out_dir": str(out)}), "cpu", force=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="not yours to write to; name another one"):
        train.main(words(tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_warm_start_that_diverges_is_neither_saved_nor_sampled_from(tmp_path, monkeypatch):
    def diverge(model, *_):
        torch.nn.init.constant_(model.model.norm.weight, math.nan)
        yield torch.tensor(math.nan)

    monkeypatch.setattr(warmstart, "warm_start", diverge)
    config = replace(load_config(ROOT / "config/tiny.py"), out_dir=str(tmp_path))
    with pytest.raises(UserError, match="diverged: lower warm_muon_lr or warm_adamw_lr"):
        cached_warm_start(Countdown(config), config, "cpu", force=True)
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_not_overwritten(finished):
    with pytest.raises(UserError, match="--resume"):
        train.main([str(ROOT / "config/tiny.py"), *FAST, f"--out_dir={finished.parent}"])


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=str)
@pytest.mark.parametrize("capability, least, most", [("AVX2", 0, 1e-5), ("AVX512", 1e-3, 0.1)])
def test_muon_multiplies_in_bf16_only_where_a_cpu_can(monkeypatch, shape, capability, least, most):
    """PyTorch's first step against five Newton-Schulz iterations in float64: off by fp32's rounding, or by bf16's."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with warmstart.muon_precision(torch.device("cpu")):
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
    X = weight.grad.double() / weight.grad.double().norm()
    for _ in range(5):
        S = X @ X.T
        X = 3.4445 * X + (-4.775 * S + 2.0315 * S @ S) @ X
    expected = -X * max(1, shape[0] / shape[1]) ** 0.5
    off = (weight.detach() - expected).abs().max().item()
    assert least < off < most


@pytest.mark.parametrize("measured, stages, ready", [((1.0,), 1, True), ((0.0, 1.0), 2, True), ((0.0, 0.0), 2, False)], ids=str)
def test_who_fails_a_gate_gets_a_second_stage(out, monkeypatch, measured, stages, ready):
    """And who fails again gets none: the advice says what to do. Each stage is kept."""
    config = replace(load_config(ROOT / "config/tiny.py"), out_dir=str(out), warm_steps=2, warm_batch=2)
    seen = []
    monkeypatch.setattr(warmstart, "gates", lambda model, task, config: seen.append(model.head.clone()) or
                        {"result": (measured[len(seen) - 1], 0.5)})
    start = lambda: cached_warm_start(Countdown(config), config, "cpu", force=False)
    if ready:
        start()
    else:
        with pytest.raises(UserError, match="raise warm_steps"):
            start()
    assert len(seen) == stages and (stages == 1 or not torch.equal(*seen))
    for stage, head in zip(STAGES, seen):
        assert torch.equal(checkpoint.load_model(warm_folder(config, stage), "cpu").head, head)


def test_a_stage_is_kept_for_who_needs_it(out, monkeypatch):
    """Whose gates are lower, or who forces them, begins after the first stage, and whoever comes then still gets the second: what
    a config starts from doesn't depend on what ran before."""
    config = replace(load_config(ROOT / "config/tiny.py"), out_dir=str(out), warm_steps=2, warm_batch=2)
    monkeypatch.setattr(warmstart, "gates", lambda model, task, config: {"result": (0.5, config.gate_result)})
    start = lambda gate, force=False: cached_warm_start(Countdown(config), replace(config, gate_result=gate), "cpu",
                                                        force=force)
    assert start(0.9, force=True) == start(0.4) == warm_folder(config)
    assert not warm_folder(config, STAGES[1]).exists()
    with pytest.raises(UserError, match="raise warm_steps"):
        start(0.9)
    assert warm_folder(config, STAGES[1]).exists() and start(0.4) == warm_folder(config)


def test_a_failed_gate_stops_before_rl(out):
    with pytest.raises(UserError, match="raise warm_steps.*--force"):
        train.main([str(ROOT / "config/tiny.py"), *FAST, f"--out_dir={out}", "--gate_result=1.0", "--warm_steps=2"])


# --- The warm start ---


@pytest.mark.parametrize("stage", STAGES)
def test_a_warm_starts_loss_is_that_of_its_weighted_traces(stage):
    """By a constant, however long they are; prompts have no weight, and each stage writes traces of its own."""
    config = replace(load_config(ROOT / "config/tiny.py"), warm_batch=3, warm_steps=1, warm_check_weight=3.0)
    task, rng = Countdown(config), random.Random(f"0/{stage}")
    model = warmstart.untrained(task, config)
    policy, expected = deepcopy(model), 0.0
    for problem in task.problems("train", 3, f"0/{stage}"):
        prompt, (response, weight) = task.prompt(problem), task.warm_trace(problem, rng)
        ids, packed = torch.tensor(prompt + response), Packed.of(torch.tensor([len(prompt + response)]))
        logprob = (policy(ids, packed.position_ids, packed) @ policy.head.T).log_softmax(-1)
        said = logprob[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None]).squeeze(1)
        expected -= float((said @ torch.tensor(weight)).detach()) / (3 * task.trace_tokens)
    assert [float(loss) for loss in warmstart.warm_start(model, task, config, stage)] == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("clip", [1e9, 1e-3])
def test_a_warm_starts_rate_rises_and_falls_and_each_step_has_its_own_gradient(clip, monkeypatch):
    """Of a loss whose gradient is 1 everywhere: up over 20 steps, down over the second half, and no longer than the clip."""
    config = replace(load_config(ROOT / "config/tiny.py"), warm_batch=1, warm_steps=80, grad_clip=clip)
    task, seen = Countdown(config), []
    model = warmstart.untrained(task, config)
    optimizer, size = torch.optim.SGD(model.parameters(), lr=0.8), sum(p.numel() for p in model.parameters())
    norm = lambda: float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    monkeypatch.setattr(optimizer, "step", lambda: seen.append((optimizer.param_groups[0]["lr"], norm())))
    monkeypatch.setattr(warmstart, "warm_optimizers", lambda *_: [optimizer])
    monkeypatch.setattr(warmstart, "learn", lambda *_: sum(p.sum() for p in model.parameters()).backward() or torch.zeros(()))
    list(warmstart.warm_start(model, task, config))
    rates, norms = zip(*seen)
    assert rates == pytest.approx([0.8 * min(1, (k + 1) / 20, (80 - k) / 40) for k in range(80)])
    assert norms == pytest.approx([min(size**0.5, clip)] * 80, rel=1e-3)


def test_a_second_stage_goes_on_from_the_first(tmp_path, monkeypatch):
    """Whether that has just been trained or lies there."""
    config = replace(load_config(ROOT / "config/tiny.py"), out_dir=str(tmp_path))

    def one_more(model, *_):
        model.model.norm.weight.data += 1
        yield torch.zeros(())

    monkeypatch.setattr(warmstart, "warm_start", one_more)
    monkeypatch.setattr(warmstart, "gates", lambda *_: {"result": (0.0, 0.5)})
    for _ in range(2):
        with pytest.raises(UserError, match="not ready"):
            cached_warm_start(Countdown(config), config, "cpu", force=False)
        assert [checkpoint.load_model(warm_folder(config, stage)).model.norm.weight.unique().tolist() for stage in STAGES] == [
            [2.0], [3.0]]
        (warm_folder(config, STAGES[1]) / "model.safetensors").unlink()


def test_a_warm_start_is_shared_by_runs_that_differ_in_RL_only():
    """What its data, its network and its training depend on makes another one; each of these keys does."""
    config = load_config(ROOT / "config/tiny.py")
    shaping = {"seed": 1, "target_max": 39, "used": 3, "max_solutions": 3, "trace_hint": 0.5, "trace_max_attempts": 5,
               "warm_steps": 401, "warm_check_weight": 2.0, "warm_adamw_lr": 1e-3, "hidden_size": 96, "intermediate_size": 96,
               "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "qk_norm": True,
               "max_position_embeddings": 160, "grad_clip": 0.5}
    others = {warm_folder(replace(config, **{key: value})) for key, value in shaping.items()}
    assert len(others) == len(shaping) and warm_folder(config) not in others
    learned = {"algorithm": "grpo", "steps": 7, "learning_rate": 1.0, "eval_problems": 9, "gate_result": 1.0, "group_size": 4,
               "thinking_budget": 30}
    assert {warm_folder(replace(config, **{key: value})) for key, value in learned.items()} == {warm_folder(config)}


def test_each_seed_has_a_network_of_its_own_and_muon_its_hidden_matrices():
    """Embeddings, the head and norms are AdamW's."""
    config = load_config(ROOT / "config/tiny.py")
    task = Countdown(config)
    model, again, other = (warmstart.untrained(task, replace(config, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(model.head, again.head) and not torch.equal(model.head, other.head)
    muon, adamw = warmstart.warm_optimizers(model, config)
    hidden = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    assert {id(p) for p in muon.param_groups[0]["params"]} == hidden
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {id(p) for p in model.parameters()} - hidden


def test_gates_are_measured_on_all_their_problems_and_each_has_its_own_threshold(monkeypatch):
    """One rollout of each problem. What is just enough passes."""
    config = replace(load_config(ROOT / "config/tiny.py"), eval_problems=5, gate_result=0.1, gate_check_precision=0.2,
                     gate_check_recall=0.3, gate_answer=0.4)
    task, asked = Countdown(config), []
    share = {"result": 0.1, "check_precision": 0.2, "check_recall": 0.29, "answer": 0.5}
    monkeypatch.setattr(task, "audit", lambda problems, responses, rewards: asked.append((problems, len(responses))) or share)
    model = warmstart.untrained(task, config)
    assert warmstart.failed_gates(model, task, config) == [task.GATE_ADVICE["check_recall"]]
    assert asked == [(task.problems("validation", 5, "gates"), 5)]


# --- What a step draws, scores and writes down ---


def test_no_two_steps_share_their_random_numbers(tmp_path, monkeypatch):
    """Each stage of each step has its own: with the same ones a problem's rollouts would be alike in every step."""
    asked, make = [], train.generator_for
    monkeypatch.setattr(train, "generator_for", lambda *which: asked.append(which) or make(*which))
    run_tiny(tmp_path, "--steps=2", "--warm_steps=2", "--eval_problems=2")
    assert asked == [(0, "sample", 0), (0, "update", 0), (0, "sample", 1), (0, "update", 1), (0, "traces", 2)]


def test_every_pass_has_an_order_of_its_own_and_leaves_nobody_out(on_policy):
    """Of a batch where nobody has an advantage, all stay even if such groups are skipped: a KL pulls at everybody."""
    batch, advantage = on_policy
    config = replace(load_config(ROOT / "config/tiny.py"), epochs=8, minibatches=1)
    for some, keys in ((advantage, {}), (0 * advantage, {"equal_groups": "skip"})):
        passes = [part.tolist() for part in train.shuffled(batch, some, replace(config, **keys), generator_for(0, "update", 0))]
        assert [sorted(rows) for rows in passes] == [[0, 1, 2]] * 8 and len(set(map(tuple, passes))) > 1


def test_what_a_step_line_counts_as_clipped():
    """Of ratios .75, .9, 1.1 and 1.3 those below 1 - .2 and above 1 + .28."""
    old, config = torch.full((4,), -2.0), replace(load_config(ROOT / "config/tiny.py"), clip_low=0.2, clip_high=0.28)
    logprob = old + torch.tensor([0.75, 0.9, 1.1, 1.3]).log()
    seen = train.observed(torch.tensor(3.0), logprob, old, torch.arange(4.0), config)
    assert seen == {"loss": 3.0, "entropy": 6.0, "clipped": 2, "tokens": 4}


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_training_scores_at_the_temperature_of_sampling(model, imitated, tmp_path, temperature):
    """softmax(logits / temperature): by it a batch is rescored, and by it the loss sees the policy."""
    batch, advantage = imitated
    config = replace(load_config(ROOT / "config/tiny.py"), temperature=temperature, minibatches=1)
    packed, at = Packed.of(batch.lengths), batch.is_action.nonzero().squeeze(1)
    with torch.no_grad():
        logits = model(batch.tokens, packed.position_ids, packed) @ model.head.T
    logprob = (logits / temperature).log_softmax(-1)[at - 1].gather(1, batch.tokens[at, None]).squeeze(1)
    expected = torch.zeros_like(batch.logprob).index_copy(0, at, logprob)
    torch.testing.assert_close(train.rescore(model, batch, config), expected, atol=1e-5, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    learned = train.update(model, optimizer, replace(batch, logprob=expected), advantage, None, Run(config, tmp_path, "cpu"))
    assert learned["max_logprob_diff"] < 1e-5


def test_a_summary_has_the_warm_start_beside_the_trained_policy(tmp_path, monkeypatch):
    """Each in its section: both on test problems, and the trained one on those of OOD."""
    run = Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu")
    monkeypatch.setattr(train, "evaluate_splits", lambda model, task, config, splits, brief=False: {
        split: f"{model}, {split}, {brief}" for split in splits})
    monkeypatch.setattr(train, "examples", lambda *_: [])
    for name in ("summary_table", "budget_figure"):
        monkeypatch.setattr(train, name, lambda *_: "")
    monkeypatch.setattr(train.report, "training_figure", lambda *_: None)
    train.finish(run, train.load_task(run.config), "trained", "warm")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [summary[name] for name in ("warm_start", "test", "ood")] == [
        "warm, test, True", "trained, test, False", "trained, ood, True"]


def test_a_resumed_run_goes_on_counting(model, task, tmp_path):
    """Tokens, seconds and skipped updates are those of all its steps, whoever made them."""
    optimizer = torch.optim.AdamW(model.parameters())
    run, again = (Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu") for _ in range(2))
    run.step, run.ledger, run.skipped, run.skipped_in_a_row, run.cpu_seconds = 3, {"trace": 7, "fork": 8, "update": 9}, 2, 1, 5.5
    run.seconds = {stage: 1.5 * i for i, stage in enumerate(run.seconds)}
    run.save(model, task.tokenizer, {}, optimizer)
    again.begin(tmp_path, model, optimizer, resume=True)
    again.end()
    for name in ("step", "ledger", "seconds", "skipped", "skipped_in_a_row", "cpu_seconds"):
        assert getattr(again, name) == getattr(run, name)


def test_the_seconds_of_a_step_are_its_own_and_those_of_the_process_are_of_all(on_policy, tmp_path, monkeypatch):
    """Traces take 5 s, and then 2; of the process's clock 2 s have passed, and then 3 in all."""
    batch, _ = on_policy
    run, clock = Run(load_config(ROOT / "config/tiny.py"), tmp_path, "cpu"), iter([3.0, 4.0])
    run._cpu_began = 1.0
    monkeypatch.setattr("nanomrt.run.time.process_time", lambda: next(clock))
    for seconds in (5.0, 7.0):
        run.seconds["trace"] = seconds
        run.record(Gathered(None, batch, None, 70, 30), {"entropy": 1.0, "grad_norm": 1.0, "max_logprob_diff": 0.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["seconds_trace"] for row in rows] == [5.0, 2.0] and [row["seconds_total"] for row in rows] == [5.0, 7.0]
    assert [row["seconds_cpu"] for row in rows] == [2.0, 3.0] and [row["fork_tokens"] for row in rows] == [30, 60]


def test_a_generator_depends_on_seed_stage_and_step():
    draw = lambda *which: int(torch.randint(2**62, (), generator=generator_for(*which)))
    all_of_them = list(itertools.product((0, 1), ("sample", "update"), (0, 1)))
    drawn = [draw(*which) for which in all_of_them]
    assert len(set(drawn)) == 8 and drawn == [draw(*which) for which in all_of_them]
