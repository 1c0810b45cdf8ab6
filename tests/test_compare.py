"""compare.py: arms and jobs, values between checkpoints, intervals, tables, and one whole comparison of tiny runs."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import compare
from nanomrt.config import UserError, load_config, parse_overrides, save_config

FAST = ["--steps=2", "--save_every=1", "--warm_steps=2", "--prompts_per_step=2", "--group_size=2", "--eval_problems=4",
        "--trace_max_attempts=2", "--thinking_budget=12", "--eval_budget=12", "--hidden_size=16", "--intermediate_size=16",
        "--num_hidden_layers=1", "--device=cpu"]


def run(arm: str, seed: int, *points: tuple[int, int, float, list[float], list[float]]) -> dict:
    """A run's file: points of (step, tokens, seconds, right, tokens per problem)."""
    config, ood = {"seed": seed, "thinking_budget": 10}, {"right": points[-1][3]}
    return {"arm": arm, "config": config, "device": "CPU", "ood": ood, "points": [
        {"step": step, "tokens": tokens, "seconds": seconds, "curve": [[0, 0.1], [10, 0.5]],
         "habits": {"attempts": step / 10, "loops": 0.25},
         "per_problem": {"right": right, "tokens": spent, "regret to 10": [1 - x for x in right]}}
        for step, tokens, seconds, right, spent in points]}


GRPO = [run("grpo", seed, (0, 0, 0.0, [0.0, 0.0], [10.0, 10.0]), (10, 100, 4.0, [1.0, 0.0], [20.0, 40.0])) for seed in (0, 1)]
MRT = [run("mrt", seed, (0, 0, 0.0, [0.0, 0.0], [10.0, 10.0]), (10, 200, 2.0, [1.0, 1.0], [20.0, 20.0])) for seed in (0, 1)]


def test_an_arm_is_an_algorithm_with_keys_of_its_own():
    job = compare.Job.of(Path("config/tiny.py"), "mrt_online+alpha=2+gamma=0.5", 3, {"steps": "7"}, Path("r"), "validation")
    config = job.config
    assert (config.algorithm, config.alpha, config.gamma, config.seed, config.steps) == ("mrt_online", 2.0, 0.5, 3, 7)
    assert job.result == Path("r/mrt_online+alpha=2+gamma=0.5-seed=3-steps=7-validation.json") and job.run.parent == Path("out")


def test_an_arm_is_a_config_file_beside_this_one():
    """With its own algorithm and keys, and the run's name that train.py gives it."""
    job = compare.Job.of(Path("config/small.py"), "small_grpo+steps=7", 3, {"eval_problems": "9"}, Path("r"), "test")
    config = load_config("config/small_grpo.py", {"steps": "7", "seed": "3", "eval_problems": "9", "threads": "1"})
    assert replace(job.config, threads=1) == config and config.algorithm == "grpo"
    assert job.result == Path("r/small_grpo+steps=7-seed=3-eval_problems=9.json")
    assert job.run == Path("out/small_grpo-eval_problems=9-seed=3-steps=7") and job.config_path == Path("config/small_grpo.py")


def test_runs_with_other_settings_have_other_names():
    """A file is never taken for that of a run with another key; what the config file says anyway is no difference."""
    name = lambda **shared: compare.Job.of(Path("config/tiny.py"), "grpo", 0, shared, Path(), "test").result.name
    assert name() == name(steps="12") == name(out_dir="elsewhere") == "grpo-seed=0.json"
    assert name(steps="13") == "grpo-seed=0-steps=13.json"


def test_a_result_has_one_file_whatever_the_values_of_its_arm():
    """A slash would be a folder that isn't there."""
    job = compare.Job.of(Path("config/tiny.py"), "grpo+init_from=out/a", 0, {"operators": "+-*/"}, Path("r"), "test")
    assert job.result == Path("r/grpo+init_from=out_a-seed=0-operators=+-*_.json") and job.config.init_from == "out/a"


def test_only_a_run_on_a_cpu_is_told_its_threads(monkeypatch):
    """There time is CPU time, of one thread; on a GPU train.py and compare.py make the same run."""
    threads = lambda: compare.Job.of(Path("config/tiny.py"), "grpo", 0, {}, Path(), "test").config.threads
    for device, told in (("cpu", 1), ("cuda", load_config("config/tiny.py").threads)):
        monkeypatch.setattr(compare, "device_of", lambda config, device=device: device)
        assert threads() == told


def test_seeds():
    """How many, or which."""
    assert [compare.parse_seeds(x) for x in ("3", "3,", "0,4")] == [[0, 1, 2], [3], [0, 4]]
    for wrong in ("", "0", "many", "-1", "1.5", ","):
        with pytest.raises(ValueError, match="a number of seeds, such as 3"):
            compare.parse_seeds(wrong)


@pytest.mark.parametrize("arms, seeds", [("grpo,grpo", "1"), ("grpo", "0,0"), ("mrt_online,mrt_online+alpha=1", "1")])
def test_no_run_is_named_twice(arms, seeds, tmp_path):
    """Two processes would train in one folder, and a run that counts twice makes intervals narrower than they are."""
    with pytest.raises(UserError, match="name the run .* twice"):
        compare.main(["config/tiny.py", "--algorithms", arms, "--seeds", seeds, "--results", str(tmp_path)])


@pytest.mark.parametrize("arm, message", [
    ("grpoo", "must be one of"), ("grpo+alhpa=1", "did you mean 'alpha'"), ("grpo+alpha", "--alpha needs a value"),
    ("grpo+seed=4", "seed can't be set for grpo.*--seeds says which"), ("grpo+threads=2", "threads can't be set for grpo"),
    ("grpo+algorithm=mrt", "algorithm can't be set for grpo.*name it in --algorithms")])
def test_a_wrong_arm_is_an_error_before_any_work(arm, message, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_all", None)
    with pytest.raises(UserError, match=message):
        compare.main(["config/tiny.py", "--algorithms", arm, "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word, message", [
    ("--seed=4", "seed can't be set for all arms: --seeds says which"), ("--threads=2", "threads can't be set for all arms"),
    ("--algorithm=mrt", "algorithm can't be set for all arms"), ("--jobs=-1", "--jobs=-1: give how many"),
    ("--labels=GRPO", "give 2 that differ, one for each of grpo,mrt"), ("--labels=MRT,MRT", "give 2 that differ")])
def test_what_holds_for_all_arms_is_not_misread(word, message, tmp_path, monkeypatch):
    """Neither is a key taken for the option that it begins: --seed=4 isn't --seeds=4, which are four."""
    monkeypatch.setattr(compare, "run_all", None)
    with pytest.raises(UserError, match=message):
        compare.main(["config/tiny.py", "--algorithms", "grpo,mrt", "--results", str(tmp_path), word])


def test_a_config_file_may_be_an_arm_with_another_algorithm():
    job = compare.Job.of(Path("config/small.py"), "small_grpo+algorithm=mrt_online", 0, {}, Path("r"), "test")
    assert job.config == replace(load_config("config/small_grpo.py", {"algorithm": "mrt_online"}), threads=job.config.threads)


@pytest.mark.parametrize("arm, unlike", [("mrt+eval_budget=40", "eval_budget=40, but grpo-seed=0 has eval_budget=48"),
                                         ("mrt+thinking_budget=24", "thinking_budget=24"),
                                         ("mrt+target_max=30+used=3+max_solutions=9", "used=3, target_max=30, max_solutions=9")])
def test_arms_that_cannot_be_compared_are_not_trained(arm, unlike, tmp_path, monkeypatch):
    """Their values would be those of other problems, budgets or horizons: said at once, and not after the last run."""
    monkeypatch.setattr(compare, "run_all", None)
    with pytest.raises(UserError, match=rf"mrt.*-seed=0 has {unlike}.*give such a key to all"):
        compare.main(["config/tiny.py", "--algorithms", f"grpo,{arm}", "--seeds", "1", "--results", str(tmp_path)])


def test_results_that_cannot_be_compared_are_not_added_to(tmp_path, monkeypatch, capsys):
    """It counts what a result was made with, which may not be what the config file says today."""
    monkeypatch.setattr(compare, "run_all", None)
    job = compare.Job.of(Path("config/tiny.py"), "mrt", 0, {}, tmp_path / "tiny", "test")
    job.result.parent.mkdir()
    job.result.write_text(json.dumps({"config": asdict(replace(job.config, eval_problems=7))}))
    with pytest.raises(UserError, match="mrt-seed=0 has eval_problems=7, but grpo-seed=0 has eval_problems=32"):
        compare.main(["config/tiny.py", "--algorithms=grpo,mrt", "--seeds=1", f"--results={tmp_path}"])
    assert "mrt-seed=0.json was made with eval_problems=7; remove it" in capsys.readouterr().err


def test_values_between_checkpoints_are_interpolated():
    """Half way in tokens, half way in everything; beyond the end, the end; at 0, the warm start."""
    half = compare.values_at(MRT, "tokens", 100)
    assert half["right"].tolist() == [[0.5, 0.5]] * 2 and half["tokens"].tolist() == [[15.0, 15.0]] * 2
    assert compare.values_at(MRT, "tokens", 1e9)["right"].tolist() == [[1.0, 1.0]] * 2
    assert compare.values_at(MRT, "step", 0)["right"].tolist() == [[0.0, 0.0]] * 2
    assert compare.values_at(MRT, "step", 10)["right"].tolist() == [[1.0, 1.0]] * 2
    assert compare.spent_at(MRT[0], "seconds", 1.0, "tokens") == 100


def test_tokens_per_right_answer_is_a_ratio_of_totals():
    """Not a mean of ratios: a problem that is never solved would make that infinite."""
    statistic, _ = compare.METRICS["tokens per right answer"]
    assert statistic(compare.values_at(GRPO, "step", 10)) == 60.0
    assert statistic(compare.values_at(GRPO, "step", 0)) == float("inf")


def test_the_interval_is_that_of_the_mean_of_seeds_and_problems():
    """Of independent seeds and problems with effects of std a and b, the mean's std is sqrt(a²/S + b²/P)."""
    rng = np.random.default_rng(1)
    S, P, a, b = 40, 400, 0.05, 0.4
    x = {"right": rng.normal(0, a, (S, 1)) + rng.normal(0, b, (1, P))}
    value, low, high = compare.interval(lambda v: v["right"].mean(), x)
    assert value == x["right"].mean()
    assert high - low == pytest.approx(2 * 1.96 * (a**2 / S + b**2 / P) ** 0.5, rel=0.15)


def test_a_paired_difference_does_not_see_what_both_arms_share():
    """The same seeds and problems are drawn for both: an arm that is better by .1 everywhere is better by .1 in every draw."""
    x = {"right": np.random.default_rng(0).random((3, 50))}
    better = {"right": x["right"] + 0.1}
    difference = compare.interval(lambda v, w: v["right"].mean() - w["right"].mean(), better, x)
    assert difference == pytest.approx((0.1, 0.1, 0.1))


def test_habits_that_an_older_run_does_not_know_are_left_out():
    """Beside a run of before `fooled` was measured, nobody's is shown."""
    newer = [dict(run, points=[dict(point, habits=point["habits"] | {"fooled": 0.5}) for point in run["points"]]) for run in MRT]
    habits = lambda arms: compare.tables(arms).split("### Habits after all steps")[1]
    assert "fooled" in habits({"mrt": newer}) and "0.50 |" in habits({"mrt": newer})
    for arms in ({"grpo": GRPO, "mrt": newer}, {"mrt": newer, "grpo": GRPO}):
        assert "fooled" not in habits(arms) and "| attempts | loops |" in habits(arms)


def test_what_the_warm_start_can_do_out_of_distribution_is_shown_where_it_was_measured():
    known = [dict(run, ood_start={"right": [0.25, 0.25]}) for run in GRPO]
    harder = lambda runs: next(row for row in compare.tables({"grpo": runs}).splitlines() if "warm start" in row).split(" | ")[5]
    assert harder(known) == "0.250 [0.250 0.250]" and harder([known[0], GRPO[1]]).strip() == ""


def test_the_tables_say_what_the_runs_say():
    """Equal tokens stop MRT half way, equal time and steps don't; differences are MRT minus the baseline."""
    text = compare.tables({"grpo": GRPO, "mrt": MRT})
    steps, tokens, seconds, differences, budgets, habits = text.split("###")[1:]
    rows = lambda part, arm: [row.split(" | ") for row in part.splitlines() if row.startswith(f"| {arm} |")]
    assert rows(steps, "mrt")[0][2].startswith("1.000") and rows(tokens, "mrt")[0][2].startswith("0.500")
    assert rows(seconds, "mrt")[0][2].startswith("1.000") and "100 sampled tokens" in tokens and "4 seconds" in seconds
    assert [row[2].split()[0] for row in rows(differences, "mrt")] == ["+0.500", "+0.000", "+0.500"]
    assert [rows(habits, arm)[0][1:] for arm in ("warm start", "mrt")] == [["0.00", "0.25 |"], ["1.00", "0.25 |"]]
    assert [row[-1].split()[0] for row in rows(differences, "mrt")] == ["2.00", "1.00", "2.00"]  # GRPO gains .5
    assert "| method | 0 | 10 |" in budgets and rows(budgets, "mrt")[0][1:] == ["0.100", "0.500 |"]
    assert not rows(differences, "grpo") and len(rows(steps, "warm start")) == 1


def test_of_a_baseline_that_gains_nothing_no_gain_is_a_multiple():
    start, end = (compare.values_at(MRT, "step", place) for place in (0, 10))
    assert compare.gains(end, start, start, start) == math.inf and compare.gains(start, start, end, start) == 0


def test_an_arm_gains_over_its_own_start():
    """From .5 to 1 it has gained as much as the baseline from 0 to .5, though it ends .5 ahead."""
    ahead = [run("mrt", seed, (0, 0, 0.0, [1.0, 0.0], [9.0, 9.0]), (10, 100, 4.0, [1.0, 1.0], [9.0, 9.0])) for seed in (0, 1)]
    row = compare.tables({"grpo": GRPO, "mrt": ahead}).split("### Differences")[1].splitlines()[4]
    assert "+0.500 [" in row and "| 1.00 [" in row


def test_nothing_is_equal_to_no_tokens():
    """A supervised baseline samples nothing: no table, no differences there, and a line that says why."""
    sft = [dict(run, points=[dict(point, tokens=0) for point in run["points"]]) for run in GRPO]
    text = compare.tables({"sft": sft, "mrt": MRT})
    _, tokens, seconds, differences, *_ = text.split("###")[1:]
    assert tokens == " Equal tokens\n\nsft has no sampled tokens that another arm could be equal to.\n\n"
    assert "| mrt |" in seconds and "| mrt | steps |" in differences and "| mrt | sampled tokens |" not in differences


def test_times_of_different_devices_are_shown_with_a_warning():
    """One line, and only then."""
    warning = "Warning: times can't be compared, they are those of CPU and H100."
    assert warning in compare.tables({"grpo": GRPO, "mrt": [dict(run, device="H100") for run in MRT]})
    assert "Warning" not in compare.tables({"grpo": GRPO, "mrt": MRT})


def test_curves_of_runs_with_different_checkpoints_meet_at_every_step():
    """Where one was measured and another wasn't, that one is interpolated."""
    often = run("grpo", 1, (0, 0, 0.0, [0.0, 0.0], [9.0, 9.0]), (4, 70, 1.0, [1.0, 0.0], [9.0, 9.0]),
                (10, 100, 4.0, [1.0, 1.0], [9.0, 9.0]))
    x, y = compare.learning_curves([GRPO[0], often], "tokens", lambda values: values["right"].mean())
    assert x.tolist() == [[0, 0], [40, 70], [100, 100]] and y.tolist() == [[0, 0], [0.2, 0.5], [0.5, 1]]


def test_an_arm_without_a_seed_of_the_baseline_has_no_difference():
    """It is in the tables of values; what can't be paired isn't compared."""
    differences = compare.tables({"grpo": GRPO[:1], "mrt": MRT[1:]}).split("###")[4]
    assert "| mrt | no seed in common |  |  |" in differences


def test_a_report_has_the_baseline_that_was_named(tmp_path):
    """Or else the next arm would silently take its place."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "anytime-seed=0.json").write_text("{}")
    with pytest.raises(UserError, match="no such run of grpo, the baseline"):
        compare.main(["config/tiny.py", "--algorithms", "grpo,anytime", "--report", "--results", str(tmp_path)])


def test_runs_wait_for_the_warm_start_that_is_theirs(tmp_path):
    """Not for that of their seed: arms whose traces differ have others. With `init_from` there is none to make."""
    job = lambda arm, **keys: compare.Job.of(Path("config/tiny.py"), arm, 0, {"out_dir": str(tmp_path), **keys}, Path(), "test")
    starts = [compare.shared_start(job(arm)) for arm in ("grpo", "mrt_online", "grpo+trace_repeat=0.1")]
    assert starts[0] == starts[1] != starts[2]
    elsewhere = job("grpo", init_from="somewhere")
    assert compare.shared_start(elsewhere) == Path("somewhere")
    compare.train_warm_start(elsewhere)
    assert not list(tmp_path.iterdir())


FAILURES = {"mrt": UserError("not finite"), "star": KeyboardInterrupt()}  # Ctrl-C


@pytest.fixture
def begun(monkeypatch) -> list[str]:
    """The arms whose runs begin, in threads and without any training; those of FAILURES fail."""
    begun = []

    def run_job(job: compare.Job) -> None:
        begun.append(job.arm)
        if job.arm in FAILURES:
            raise FAILURES[job.arm]

    monkeypatch.setattr(compare, "run_job", run_job)
    monkeypatch.setattr(compare, "train_warm_start", lambda job: None)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda processes, *_: ThreadPoolExecutor(processes))
    return begun


def run_arms(folder: Path, *arms: str) -> None:
    """One at a time."""
    shared = {"out_dir": str(folder)}
    compare.run_all([compare.Job.of(Path("config/tiny.py"), arm, 0, shared, folder, "test") for arm in arms], 1)


@pytest.mark.parametrize("arm, message", [("mrt", "not finite"), ("star", "interrupted: the same command goes on")])
def test_a_failure_or_ctrl_c_ends_the_queue(arm, message, begun, tmp_path):
    """It is what the user sees next, and the runs that were to follow don't begin."""
    with pytest.raises(UserError, match=message):
        run_arms(tmp_path, "grpo", arm, "anytime", "vineppo", "sft")
    assert begun == ["grpo", arm]


def test_runs_with_one_warm_start_have_the_same_gates(begun, tmp_path):
    """Else one may need a second stage of it that nobody has made beforehand. Whose start is another may have other gates."""
    with pytest.raises(UserError, match="gate_answer=0.5, but grpo-seed=0 has gate_answer=0.0: .* the same gates"):
        run_arms(tmp_path, "grpo", "grpo+gate_answer=0.5")
    assert not begun
    run_arms(tmp_path, "grpo", "grpo+gate_answer=0.5+trace_repeat=0.1")
    assert len(begun) == 2


def test_a_run_on_more_threads_is_not_taken_for_one_on_one(tmp_path):
    """The newcomer's own run has the same name; its CPU time is that of all its threads."""
    job = compare.Job.of(Path("config/tiny.py"), "grpo", 0, {"out_dir": str(tmp_path)}, tmp_path, "test")
    job.run.mkdir()
    save_config(replace(job.config, threads=2), job.run / "config.json")
    with pytest.raises(UserError, match="wasn't trained with threads=1.*--out_dir"):
        compare.run_job(job)
    save_config(replace(job.config, steps=7, save_every=3), job.run / "config.json")  # the config file has changed since
    with pytest.raises(UserError, match=r"it was trained with steps=7: remove it, or train elsewhere"):
        compare.run_job(job)
    (job.run / "config.json").write_text('{"alhpa": 1}')  # another version's
    with pytest.raises(UserError, match="unknown key 'alhpa'.*--out_dir"):
        compare.run_job(job)


def test_a_result_of_another_config_is_not_shown_as_one_of_this(tmp_path, monkeypatch, capsys):
    """A config file that was edited since then is not what made it: a warning says so."""
    job = compare.Job.of(Path("config/tiny.py"), "grpo", 0, {}, tmp_path / "tiny", "test")
    job.result.parent.mkdir()
    job.result.write_text(json.dumps({"config": asdict(replace(job.config, steps=7, threads=2))}))
    monkeypatch.setattr(compare, "tables", lambda arms: "the tables")
    for figure in ("curves_figure", "budgets_figure", "frontier_figure"):
        monkeypatch.setattr(compare, figure, lambda *_: None)
    assert compare.main(["config/tiny.py", "--algorithms=grpo", "--seeds=1", "--report", f"--results={tmp_path}"]) == 0
    shown = capsys.readouterr()
    assert "grpo-seed=0.json was made with steps=7; remove it" in shown.err and "the tables" in shown.out


KILLED = """
import compare, os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

def work():
    print("running", flush=True)
    time.sleep(60)
    print("still running", flush=True)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), compare.end_with_parent)
    os.kill(pool.submit(os.getpid).result(), signal.SIGINT)
    pool.submit(work).result()
"""


def test_the_runs_of_a_killed_comparison_end(tmp_path):
    """Whoever would go on would write beside the run that the next comparison resumes. Ctrl-C doesn't end them: they have their
    step to save, and who is idle would take them along."""
    (tmp_path / "killed.py").write_text(KILLED)
    killed = subprocess.Popen([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(Path(compare.__file__).parent)})
    assert killed.stdout.readline() == "running\n"
    killed.kill()
    assert killed.stdout.read() == "" and killed.wait()  # the pipe is closed: nobody is left who could write


def test_a_whole_comparison(tmp_path, monkeypatch):
    """Trains two arms from one warm start, writes a file for each and a table; a second call trains nothing and says the same."""
    monkeypatch.chdir(Path(compare.__file__).parent)
    monkeypatch.setattr(compare, "RESAMPLES", 20)
    command = ["config/tiny.py", "--algorithms", "grpo,anytime", "--seeds", "1", "--results", str(tmp_path / "results"),
               "--labels", "GRPO, Any time", "--jobs", "2", f"--out_dir={tmp_path / 'out'}", *FAST]
    assert compare.main(command) == 0
    folder = tmp_path / "results/tiny"
    assert len(list((tmp_path / "out").glob("warm-*"))) == 1
    saved = json.loads(next(folder.glob("anytime-seed=0-*.json")).read_text())
    assert [point["step"] for point in saved["points"]] == [0, 1, 2] and len(saved["points"][0]["per_problem"]["right"]) == 4
    assert len(saved["ood_start"]["right"]) == len(saved["ood"]["right"]) == 4
    tokens = [point["tokens"] for point in saved["points"]]
    assert tokens[0] == 0 < tokens[1] < tokens[2] and saved["commit"] and saved["config"]["seed"] == 0
    table = next(folder.glob("comparison-*.md"))
    before = table.read_text()
    assert "| GRPO | 1 |" in before and "| Any time | steps |" in before and "Differences from GRPO" in before
    assert all(len(list(folder.glob(f"comparison-*-{kind}.png"))) == 1 for kind in ("curves", "budget", "frontier"))
    for name in ("curves_figure", "budgets_figure", "frontier_figure"):  # slow, and drawn once already
        monkeypatch.setattr(compare, name, lambda path, arms: None)
    monkeypatch.setattr(compare, "run_job", None)
    assert compare.main(command) == 0 and table.read_text() == before
    assert compare.main([*command, "--report", "--seeds", "2", "--name", "other"]) == 0  # of what is there, which is seed 0
    assert next(folder.glob("other-*.md")).read_text() == before
    with pytest.raises(UserError, match="no such run of .*leave out --report"):
        compare.main(["config/tiny.py", "--algorithms", "sft", "--report", "--results", str(tmp_path / "elsewhere")])
    shared = parse_overrides([f"--out_dir={tmp_path / 'out'}", *FAST])
    job = compare.Job.of(Path("config/tiny.py"), "anytime", 0, shared, folder, "test")
    (job.run / "checkpoints/step-000001/model.safetensors").write_bytes(b"half of it")
    with pytest.raises(UserError, match="step-000001 cannot be loaded .*or remove .*anytime.*trains it anew"):
        compare.evaluated(job)
