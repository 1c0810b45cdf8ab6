"""compare.py: arms and jobs, the queue of runs, and one whole comparison of tiny ones."""

import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import compare
from nanomrt import comparison, report, run
from nanomrt.config import UserError, load_config, parse_overrides, refuse_unread, save_config
from nanomrt.files import write_json
from nanomrt.run import Run, processor, provenance

FAST = ["--steps=2", "--save_every=1", "--warm_steps=2", "--prompts_per_step=2", "--group_size=2", "--eval_problems=4",
        "--trace_max_attempts=2", "--thinking_budget=12", "--eval_budget=12", "--hidden_size=16", "--intermediate_size=16",
        "--num_hidden_layers=1", "--device=cpu"]


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


def test_what_the_arms_own_file_has_otherwise_is_a_difference():
    """The comparison's has it anyway, but the arm without it is another run."""
    name = lambda **shared: compare.Job.of(Path("config/small.py"), "small_grpo", 0, shared, Path(), "test").result.name
    assert [name(), name(epochs="3")] == ["small_grpo-seed=0.json", "small_grpo-seed=0-epochs=3.json"]


def test_the_table_names_every_key_that_one_of_its_results_does(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "tables", lambda arms: "the tables")
    monkeypatch.setattr(comparison, "FIGURES", {})
    for arm in ("mrt_online", "small_grpo"):
        job = compare.Job.of(Path("config/small.py"), arm, 0, {"epochs": "3"}, tmp_path / "small", "test")
        job.result.parent.mkdir(exist_ok=True)
        job.result.write_text(json.dumps({"config": asdict(job.config)}))
    command = ["config/small.py", "--seeds=1", "--epochs=3", "--report", f"--results={tmp_path}", "--algorithms"]
    assert compare.main([*command, "mrt_online"]) == compare.main([*command, "mrt_online,small_grpo"]) == 0
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "mrt_online-seed=0.json", "small_grpo-seed=0-epochs=3.json", "comparison.md", "comparison-epochs=3.md"}


def test_a_file_may_need_what_is_set_for_all_arms(tmp_path):
    """Neither the comparison's nor the arm's is a valid config alone."""
    for name in ("base", "arm"):
        (tmp_path / f"{name}.py").write_text("thinking_budget = 400\nalgorithm = 'mrt_online'\n")
    job = compare.Job.of(tmp_path / "base.py", "arm", 0, {"max_position_embeddings": "900", "alpha": "2"}, tmp_path, "test")
    assert (job.config.algorithm, job.config.alpha, job.config.max_position_embeddings) == ("mrt_online", 2, 900)
    assert job.result.name == "arm-seed=0-alpha=2.0-max_position_embeddings=900.json"
    job = compare.Job.of(tmp_path / "base.py", "grpo+max_position_embeddings=900", 0, {"steps": "7"}, tmp_path, "test")
    assert job.config.thinking_budget == 400  # an arm may bring it, too


def test_the_name_of_a_result_fits_a_file_system():
    """Whatever the keys of its arm: an error would come after the training. Two results have two names."""
    one, two = (compare.Job.of(Path("config/tiny.py"), f"grpo+init_from={'a/long/path/' * 30}", seed, {}, Path(), "validation")
                for seed in (0, 1))
    assert one.result != two.result and len(one.result.name) == len(two.result.name) == len("-validation.json") + 160


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
    for wrong in ("", "0", "00", "many", "-1", "1.5", ","):
        with pytest.raises(ValueError, match="a number of seeds, such as 3"):
            compare.parse_seeds(wrong)


def test_a_key_for_all_holds_for_the_arms_that_read_it(tmp_path):
    """The others train without it, or `train.py` would refuse it; a key that none of them reads is an error at once."""
    grpo, mrt = (compare.Job.of(Path("config/tiny.py"), arm, 3, {"alpha": "2", "steps": "7"}, Path("r"), "test")
                 for arm in ("grpo", "mrt_online"))
    assert (mrt.config.alpha, mrt.config.steps, grpo.config.steps) == (2, 7, 7) and "alpha" not in grpo.overrides
    assert [job.result.stem for job in (grpo, mrt)] == [f"{arm}-seed=3-alpha=2.0-steps=7" for arm in ("grpo", "mrt_online")]
    room = {"max_position_embeddings": "2000"}
    long = compare.Job.of(Path("config/tiny.py"), "grpo+thinking_budget=900", 3, room, Path("r"), "test")
    assert long.config.thinking_budget == 900  # which fits only with the key for all
    refuse_unread(grpo.config, grpo.overrides)  # as `train.py` does
    for word, why in (("--alpha=2", "alpha changes nothing with algorithm=grpo"), ("--data_dir=x", "data_dir .* set task=gsm8k")):
        with pytest.raises(UserError, match=why):
            compare.main(["config/tiny.py", "--algorithms", "grpo", word, "--results", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arms, seeds", [("grpo,grpo", "1"), ("grpo", "0,0"), ("mrt_online,mrt_online+alpha=1", "1")])
def test_no_run_is_named_twice(arms, seeds, tmp_path):
    """Two processes would train in one folder, and a run that counts twice makes intervals narrower than they are."""
    with pytest.raises(UserError, match="name the run .* twice"):
        compare.main(["config/tiny.py", "--algorithms", arms, "--seeds", seeds, "--results", str(tmp_path)])


@pytest.mark.parametrize("arm, message", [
    ("grpoo", "must be one of"), ("grpo+alhpa=1", "did you mean 'alpha'"), ("grpo+alpha", "--alpha needs a value"),
    ("grpo+alpha=2", "alpha changes nothing with algorithm=grpo"),
    ("grpo+seed=4", "seed can't be set for grpo.*--seeds says which"), ("grpo+threads=2", "threads can't be set for grpo"),
    ("grpo+algorithm=mrt", "algorithm can't be set for grpo.*name it in --algorithms"),
    ("config/small_grpo", "by its name alone.*beside config/tiny.py")])
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


def test_a_missing_matplotlib_is_an_error_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(compare, "run_all", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        compare.main(["config/tiny.py", "--algorithms=grpo", f"--results={tmp_path}"])


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
    with pytest.raises(UserError, match="temperature=0.8, .* the same gates"):  # which are measured on samples
        run_arms(tmp_path, "grpo", "grpo+temperature=0.8")
    assert not begun
    run_arms(tmp_path, "grpo", "grpo+gate_answer=0.5+trace_repeat=0.1")
    assert len(begun) == 2


def test_a_run_on_more_threads_is_not_taken_for_one_on_one(tmp_path):
    """The newcomer's own run has the same name; its CPU time is that of all its threads."""
    job = compare.Job.of(Path("config/tiny.py"), "grpo", 0, {"out_dir": str(tmp_path)}, tmp_path, "test")
    job.run.mkdir()
    save_config(replace(job.config, threads=2), job.run / "config.json")
    with pytest.raises(UserError, match="wasn't trained with threads=1.*--out_dir"):
        compare.refuse_another_run(job)
    save_config(replace(job.config, steps=7, save_every=3), job.run / "config.json")  # the config file has changed since
    with pytest.raises(UserError, match=r"it was trained with steps=7: remove it, or train elsewhere"):
        compare.refuse_another_run(job)
    (job.run / "config.json").write_text('{"alhpa": 1}')  # another version's
    with pytest.raises(UserError, match="unknown key 'alhpa'.*--out_dir"):
        compare.refuse_another_run(job)


def test_another_run_in_the_way_is_found_before_any_work(begun, tmp_path):
    """The last of three: nothing of the others has begun by then."""
    command = ["config/tiny.py", "--algorithms", "grpo,anytime,star", "--seeds", "1", "--jobs", "1", "--results",
               str(tmp_path / "results"), f"--out_dir={tmp_path}"]
    job = compare.Job.of(Path("config/tiny.py"), "star", 0, {"out_dir": str(tmp_path)}, tmp_path / "results/tiny", "test")
    job.run.mkdir()
    save_config(replace(job.config, steps=7), job.run / "config.json")
    with pytest.raises(UserError, match="it was trained with steps=7"):
        compare.main(command)
    assert not begun


def test_a_commit_says_whether_the_code_of_a_run_differs_from_it(tmp_path, monkeypatch):
    """And how: two changes have two names. What a comparison writes, and whatever else is no code of a run, is no change."""
    monkeypatch.setattr(run, "__file__", str(tmp_path / "nanomrt/run.py"))
    for name in ("nanomrt/run.py", "data/a.py", "kernels/b.py", "train.py", "evaluate.py", "results/a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words], cwd=tmp_path, check=True,
                                        capture_output=True, text=True).stdout.strip()
    git("init"), git("add", "."), git("commit", "-m", "all")
    head = git("rev-parse", "--short", "HEAD")
    (tmp_path / "results/a.md").write_text("2\n")
    assert run.commit() == head
    names = set()
    for name, text in (("train.py", "2"), ("train.py", "3"), ("nanomrt/run.py", "2"), ("nanomrt/new.py", "1")):
        (tmp_path / name).write_text(text)
        names.add(run.commit())
    assert len(names) == 4 and all(re.fullmatch(f"{head}-modified-[0-9a-f]{{8}}", name) for name in names)
    git("checkout", "."), (tmp_path / "nanomrt/new.py").unlink()
    assert run.commit() == head


@pytest.mark.parametrize("made, warned", [("abc", False), ("abc-modified", True), ("abc-modified-12345678", True),
                                          ("now-modified-87654321", False), ("", False)])
@pytest.mark.parametrize("there", ["its run", "its result"])
def test_a_run_of_code_that_no_commit_keeps_and_that_has_changed_is_named(tmp_path, monkeypatch, capsys, there, made, warned):
    """Whoever edits a method and compares again would see the old one's numbers."""
    def stop(jobs, processes):
        raise UserError("here")

    monkeypatch.setattr(compare, "commit", lambda: "now-modified-87654321")
    monkeypatch.setattr(compare, "run_all", stop)
    job = compare.Job.of(Path("config/tiny.py"), "grpo", 0, {"out_dir": str(tmp_path)}, tmp_path / "results/tiny", "test")
    for folder in (job.run, job.result.parent):
        folder.mkdir(parents=True)
    if there == "its result":
        write_json(job.result, {"commit": made, "config": asdict(job.config)})
    elif made:
        report.append_jsonl(job.run / "metrics.jsonl", {"commit": made})
    with pytest.raises(UserError, match="here"):
        compare.main(["config/tiny.py", "--algorithms", "grpo", "--seeds", "1", "--results", str(tmp_path / "results"),
                      f"--out_dir={tmp_path}"])
    assert ("grpo, seed 0, is of code that has changed since" in capsys.readouterr().err) == warned


def test_a_run_that_was_evaluated_on_its_way_goes_on(tmp_path, monkeypatch):
    """evaluate.py writes a summary, too; only training writes down what the run took."""
    job = compare.Job.of(Path("config/tiny.py"), "grpo", 0, {"out_dir": str(tmp_path)}, tmp_path, "test")
    job.run.mkdir()
    save_config(job.config, job.run / "config.json")
    trained = []
    monkeypatch.setattr(compare.train, "main", lambda words: trained.append(words[-1]) or 0)
    monkeypatch.setattr(compare, "evaluated", lambda job: {})
    for summary in ({"test": {}}, {"test": {}, "ledger": {}}):
        write_json(job.run / "summary.json", summary)
        compare.run_job(job)
    assert trained == ["--resume"]


def test_a_result_of_another_config_is_not_shown_as_one_of_this(tmp_path, monkeypatch, capsys):
    """A config file that was edited since then is not what made it: a warning says so."""
    job = compare.Job.of(Path("config/tiny.py"), "grpo", 0, {}, tmp_path / "tiny", "test")
    job.result.parent.mkdir()
    job.result.write_text(json.dumps({"config": asdict(replace(job.config, steps=7, threads=2))}))
    monkeypatch.setattr(comparison, "tables", lambda arms: "the tables")
    monkeypatch.setattr(comparison, "FIGURES", {})
    assert compare.main(["config/tiny.py", "--algorithms=grpo", "--seeds=1", "--report", f"--results={tmp_path}"]) == 0
    shown = capsys.readouterr()
    assert "grpo-seed=0.json was made with steps=7; remove it" in shown.err and "the tables" in shown.out


def test_a_run_says_which_processor_it_had(tmp_path):
    """Times of two kinds can't be compared: only the name tells them apart."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: B\n")
    assert processor(tmp_path / "cpuinfo") == "A CPU @ 2 GHz"
    assert processor(tmp_path / "nowhere") == (platform.processor() or platform.machine())
    device = provenance(Run(load_config("config/tiny.py"), tmp_path, "cpu"))["device"]
    assert device.startswith("CPU, ") and f"{processor()}, {torch.backends.cpu.get_cpu_capability()}" in device


@pytest.mark.parametrize("device, clock", [("cpu", 2.0), ("cuda", 3.0)])
def test_where_the_numbers_of_a_result_come_from(device, clock, tmp_path, monkeypatch):
    """Every checkpoint answers the problems of --split and of OOD, and the first and the last one are measured in full. Forks
    cost tokens; time is the process's on a CPU, the wall clock's on a GPU; memory is what the run has taken at its end."""
    job = compare.Job.of(Path("config/tiny.py"), "anytime", 0, {"out_dir": str(tmp_path)}, tmp_path, "validation")
    for step in (3, 5):  # it was interrupted after step 3
        (job.run / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    report.append_jsonl(job.run / "metrics.jsonl", {"commit": "abc", "peak_memory_bytes": 1, "start": "out/warm"})
    for step in range(1, 6):
        report.append_jsonl(job.run / "metrics.jsonl", {
            "step": step, "trace_tokens": 10 * step, "fork_tokens": step, "seconds_cpu": 2 * step, "seconds_total": 3 * step,
            "seconds_trace": 1, "seconds_fork": 0.5, "seconds_update": 0.25})
    write_json(job.run / "summary.json", {"peak_memory_bytes": 7})
    monkeypatch.setattr(compare.checkpoint, "load_model", lambda folder, _: folder.name)
    monkeypatch.setattr(compare, "distinct", lambda _, split, count, seed: (split, count, seed))
    monkeypatch.setattr(compare, "evaluate_policy", lambda model, _, problems, config, seed, brief: {
        "mean_thinking_tokens": {"value": 4.0}, "budget_curve": [], "habits": {}, "per_problem": (model, *problems),
        **({} if brief else {"extrapolation": [{"budget": 9, "J": {"value": 0.5}}]})})
    monkeypatch.setattr(compare, "choose_device", lambda _: device)
    result = compare.evaluated(job)
    assert [(point["step"], point["tokens"], point["seconds"], point["per_problem"]) for point in result["points"]] == [
        (0, 0, 0, ("warm", "validation", 32, "eval")), (3, 33, 3 * clock, ("step-000003", "validation", 32, "eval")),
        (5, 55, 5 * clock, ("step-000005", "validation", 32, "eval"))]
    assert [point["ood"] for point in result["points"]] == [
        (folder, "ood", 32, "eval") for folder in ("warm", "step-000003", "step-000005")]
    assert [point.get("extrapolation") for point in result["points"]] == [[[9, 0.5]], None, [[9, 0.5]]]
    assert result["stages"] == {"trace": 5, "fork": 2.5, "update": 1.25}
    assert (result["commit"], result["peak_memory_bytes"]) == ("abc", 7) and "start" not in result


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
    monkeypatch.setattr(comparison, "RESAMPLES", 20)
    command = ["config/tiny.py", "--algorithms", "grpo,anytime", "--seeds", "1", "--results", str(tmp_path / "results"),
               "--labels", "GRPO, Any time", "--jobs", "2", f"--out_dir={tmp_path / 'out'}", *FAST]
    assert compare.main(command) == 0
    folder = tmp_path / "results/tiny"
    assert len(list((tmp_path / "out").glob("warm-*"))) == 1
    saved = json.loads(next(folder.glob("anytime-seed=0-*.json")).read_text())
    assert len(saved["points"][0]["per_problem"]["right"]) == 4
    assert all(saved["stages"][stage] > 0 for stage in ("trace", "fork", "update"))
    assert all(len(point["ood"]["right"]) == 4 for point in saved["points"])
    for point in (saved["points"][0], saved["points"][-1]):
        assert len(point["extrapolation"]) == len(point["curve"]) and len(point["per_problem"]["maj: regret to 12"]) == 4
    assert saved["commit"] and saved["config"]["seed"] == 0
    table = next(folder.glob("comparison-*.md"))
    before = table.read_text()
    assert "| GRPO | 1 |" in before and "| Any time | steps |" in before and "Differences from GRPO" in before
    assert all(len(list(folder.glob(f"comparison-*-{kind}.png"))) == 1 for kind in ("curves", "budget", "frontier", "habits"))
    monkeypatch.setattr(comparison, "FIGURES", {})  # slow, and drawn once already
    monkeypatch.setattr(compare, "run_job", None)
    assert compare.main(command) == 0 and table.read_text() == before
    assert compare.main([*command, "--report", "--seeds", "2", "--name", "other"]) == 0  # of what is there, which is seed 0
    assert next(folder.glob("other-*.md")).read_text() == before
    with pytest.raises(UserError, match="no such run of .*leave out --report"):
        compare.main(["config/tiny.py", "--algorithms", "sft", "--report", "--results", str(tmp_path / "elsewhere")])
    shared = parse_overrides([f"--out_dir={tmp_path / 'out'}", *FAST])
    job = compare.Job.of(Path("config/tiny.py"), "anytime", 0, shared, folder, "test")
    _, *rows = report.read_jsonl(job.run / "metrics.jsonl")
    assert [(point["step"], point["tokens"], point["seconds"]) for point in saved["points"]] == [
        (0, 0, 0), *((row["step"], row["trace_tokens"] + row["fork_tokens"], row["seconds_cpu"]) for row in rows)]
    assert len(rows) == 2 and rows[-1]["fork_tokens"] > 0
    assert saved["peak_memory_bytes"] == json.loads((job.run / "summary.json").read_text())["peak_memory_bytes"]
    (job.run / "checkpoints/step-000001/model.safetensors").write_bytes(b"half of it")
    with pytest.raises(UserError, match="step-000001 cannot be loaded .*or remove .*anytime.*trains it anew"):
        compare.evaluated(job)
