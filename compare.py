"""Which method is best, and how sure is that? Trains what is missing, evaluates it on the same problems, writes one table.

    python compare.py config/study.py --algorithms grpo,mrt_online,length_penalty --seeds 3
    python compare.py config/study.py --algorithms grpo,mrt_online,mrt_online+alpha=2 --seeds 0,1 --split validation
    python compare.py config/small.py --algorithms small_grpo,mrt_online --seeds 5

An arm is an algorithm, or the name of a config file beside this one (`small_grpo`), perhaps with keys of its own
(`mrt_online+alpha=2`); the first arm is the baseline; any other `--key=value` holds for all that read it. --labels "GRPO,MRT"
renames the arms in tables and figures. Runs of one seed share their warm start, unless an arm's keys give it another: the row
`warm start` is the baseline's, and a gain is over the arm's own. Every finished run is one file in results/<config's name>/: what
has one isn't trained again (if its config was another, a warning says so), and an interrupted run goes on where it was.

What is compared, and how sure it is: nanomrt/comparison.py.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import train
from data import load_task
from evaluate import PROBLEM_KEYS, agree, distinct, evaluate_policy
from nanomrt import checkpoint, comparison, report
from nanomrt.config import (
    ALGORITHMS,
    KEYS,
    RunConfig,
    UserError,
    command,
    complete,
    differences,
    file_values,
    load_config,
    name_of,
    parse_arm,
    parse_overrides,
    read_config,
    reads,
    refuse_unread,
    run_name,
)
from nanomrt.files import write_json
from nanomrt.run import choose_device, commit, device_of, finished
from nanomrt.warmstart import cached_warm_start, warm_folder

TAKEN = {  # keys with a place of their own, and which
    "seed": "--seeds says which, and --seeds=4, is seed 4 alone",
    "algorithm": "name it in --algorithms, as an arm",
    "threads": "on a CPU every run has one, so that CPU times compare",
}
# What all arms must have in common: the problems, and how they are measured.
MEASURED = (*PROBLEM_KEYS, "thinking_budget", "eval_samples", "eval_budget")
# What a warm start's passing depends on, besides what shapes it.
GATES = ("temperature", *(name for name in KEYS if name.startswith("gate_")))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("config", type=Path, help="a config file, such as config/study.py")
    parser.add_argument("--algorithms", required=True, help="arms, separated by commas; the first is the baseline")
    parser.add_argument("--labels", help="what tables and figures call the arms, separated by commas (default: as they are)")
    parser.add_argument("--seeds", default="3", help="how many, or which: 3 is 0,1,2 and 3, is seed 3 alone")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="validation: to choose between settings")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time (default: one per core, or one on a GPU)")
    parser.add_argument("--report", action="store_true", help="train nothing: what the runs that are there say")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--name", default="comparison", help="of the table and the figures")
    args, rest = parser.parse_known_args(argv)
    folder, names = args.results / args.config.stem, args.algorithms.split(",")
    labels = [label.strip() for label in args.labels.split(",")] if args.labels else names
    if args.jobs < 0:
        raise UserError(f"--jobs={args.jobs}: give how many runs go on at a time, or leave it out")
    seeds, shared = parse_seeds(args.seeds), parse_overrides(rest)
    jobs = [Job.of(args.config, arm, seed, shared, folder, args.split) for arm in names for seed in seeds]
    refuse_unread(jobs[0].config, [key for key in shared if not any(key in job.overrides for job in jobs)])
    runs = [job.run for job in jobs]
    for run in runs:
        if runs.count(run) > 1:
            raise UserError(f"--algorithms={args.algorithms} --seeds={args.seeds} name the run {run.name} twice: leave one out")
    if not len(labels) == len(set(labels)) == len(names):
        raise UserError(f"--labels={args.labels}: give {len(names)} that differ, one for each of {args.algorithms}")
    name = file_name(args.name, {args.config, *(job.config_path for job in jobs)}, shared, args.split)
    report.check_figure(folder / f"{name}.png")  # before the work, not after it
    if args.report:
        jobs = [job for job in jobs if job.result.is_file()]
        if not jobs or jobs[0].arm != names[0]:
            raise UserError(f"{folder} has no such run of {names[0]}, the baseline: leave out --report to train it, or name "
                            "another arm first")
    for job in jobs:
        if changed := differences(job.made_with, job.config):
            print(f"warning: {job.result} was made with {changed}; remove it to train it anew", file=sys.stderr)
        if "-modified" in job.made_by and job.made_by != commit():  # no commit keeps what it was made by
            print(f"warning: {job.arm}, seed {job.config.seed}, is of code that has changed since; remove {job.result} and "
                  f"{job.run} to train it anew", file=sys.stderr)
    agree({job.result.stem: job.made_with for job in jobs}, MEASURED,
          "runs are compared by the same measurements: give such a key to all, as --key=value")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not job.result.is_file()]
    for job in missing:
        refuse_another_run(job)
    run_all(missing, args.jobs)
    arms: dict[str, list[dict]] = {}
    for job in jobs:
        arms.setdefault(labels[names.index(job.arm)], []).append(json.loads(job.result.read_text()))
    text = comparison.tables(arms)
    print(text)
    (folder / f"{name}.md").write_text(text + "\n")
    for kind, draw in comparison.FIGURES.items():
        draw(folder / f"{name}-{kind}.png", arms)
    print(f"\n{folder}: {name}.md, {', '.join(f'{name}-{kind}.png' for kind in comparison.FIGURES)}")
    return 0


def parse_seeds(text: str) -> list[int]:
    """'3' -> [0, 1, 2], '3,' -> [3], '0,4' -> [0, 4]. Raises UserError with an example."""
    words = text.rstrip(",").split(",")
    if not all(word.isdecimal() for word in words) or text.strip("0") == "":
        raise UserError(f"--seeds={text}: give a number of seeds, such as 3, or the seeds themselves, such as 0,1,4 or 3,")
    return [int(word) for word in words] if "," in text else list(range(int(text)))


# --- Running ---


@dataclass(frozen=True)
class Job:
    """One run of one arm."""

    arm: str
    config_path: Path  # the comparison's, or that of the arm
    overrides: dict[str, str]
    config: RunConfig
    split: str
    result: Path  # where its file goes

    @classmethod
    def of(cls, config_path: Path, arm: str, seed: int, shared: dict[str, str], folder: Path, split: str) -> "Job":
        name, own = parse_arm(arm)
        if "/" in name:
            raise UserError(f"{arm}: name a config file by its name alone, as in small_grpo; it must stand beside {config_path}")
        sibling = config_path.with_name(f"{name}.py")
        of_file = name not in ALGORITHMS and sibling.is_file()
        for key, reason in TAKEN.items():
            if key in shared or key in own and not (of_file and key == "algorithm"):
                raise UserError(f"{key} can't be set for {arm if key in own else 'all arms'}: {reason}")
        path = sibling if of_file else config_path
        if not of_file:
            own["algorithm"] = name
        algorithm = own.get("algorithm") or file_values(path)["algorithm"]
        overrides = {key: value for key, value in shared.items() if reads(algorithm, key)} | own | {"seed": str(seed)}
        if device_of(load_config(path, overrides)) == "cpu":
            overrides["threads"] = "1"
        config = load_config(path, overrides)
        refuse_unread(config, overrides)
        result = file_name(f"{arm}-seed={seed}", {config_path, path}, shared, split)
        return cls(arm, path, overrides, config, split, folder / f"{result}.json")

    @property
    def run(self) -> Path:
        return Path(self.config.out_dir) / run_name(self.config_path, self.overrides)

    @property
    def made_with(self) -> dict:
        """The config of its result, or that with which it will be made."""
        if not self.result.is_file():
            return asdict(self.config)
        return complete(json.loads(self.result.read_text())["config"])

    @property
    def made_by(self) -> str:
        """The commit of its result, or of its run; '' if there is neither."""
        if self.result.is_file():
            return json.loads(self.result.read_text()).get("commit", "")
        return next((row.get("commit", "") for row in report.read_jsonl(self.run / "metrics.jsonl")[:1]), "")


def file_name(start: str, paths: Iterable[Path], shared: dict[str, str], split: str) -> str:
    """Of a result or a table: it ends with the keys for all arms that one of these config files has otherwise, and with the split
    unless that is test."""
    return name_of(start, paths, shared) + ("" if split == "test" else f"-{split}")


def run_all(jobs: list[Job], processes: int) -> None:
    """Every job in a process of its own, `processes` at a time, the warm starts that they share first. After a failure or Ctrl-C
    no job begins any more; it raises at once, but the program ends when those under way have, so nothing of them is lost."""
    from tqdm import tqdm

    if not jobs:
        return
    processes = processes or (os.cpu_count() if device_of(jobs[0].config) == "cpu" else 1)
    by_start: dict[Path, list[Job]] = {}
    for job in jobs:
        by_start.setdefault(shared_start(job), []).append(job)
    for group in by_start.values():
        agree({job.result.stem: job.made_with for job in group}, GATES,
              "runs with the same warm start must pass the same gates with it: give such a key to all, as --key=value")
    ready: list[tuple[Callable[[Job], None], Job]] = [(train_warm_start, group[0]) for group in by_start.values()]
    running: dict[Future, tuple[Callable[[Job], None], Job]] = {}
    steps = sum(job.config.steps for job in jobs)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent)
    try:
        with tqdm(total=steps, unit="step", desc="all runs") as bar:
            while ready or running:
                while ready and len(running) < processes:  # a pool wouldn't give back all that it was given
                    work, job = ready.pop(0)
                    running[pool.submit(work, job)] = work, job
                for future in wait(running, 1.0, FIRST_COMPLETED).done:
                    work, job = running.pop(future)
                    future.result()  # raises what the job raised
                    if work is train_warm_start:
                        ready += [(run_job, other) for other in by_start[shared_start(job)]]
                bar.update(sum(steps_done(job) for job in jobs) - bar.n)
    except KeyboardInterrupt:
        raise UserError("interrupted: the same command goes on with it") from None
    finally:
        pool.shutdown(wait=False)
        if running:
            print(f"nothing more begins; {len(running)} under way end first", file=sys.stderr)


def end_with_parent() -> None:
    """This process ends when the one that started it has. Else the runs of a killed comparison would go on, beside the same ones
    that the next comparison resumes. A run that is killed goes on from its last checkpoint.

    Ctrl-C reaches every process. Here only training heeds it, after its step: a pool one of whose processes ends, ends them all.
    """

    def follow() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def steps_done(job: Job) -> int:
    """Finished RL steps of a run, for the progress bar."""
    return max(len(report.read_jsonl(job.run / "metrics.jsonl")) - 1, 0)  # its first line is no step


def shared_start(job: Job) -> Path:
    """What two runs have in common if they begin with the same policy."""
    return Path(job.config.init_from) if job.config.init_from else warm_folder(job.config)


def train_warm_start(job: Job) -> None:
    """Train and cache a warm start, so that no two of the runs that share it do."""
    if not job.config.init_from:
        cached_warm_start(train.checked_task(job.config), job.config, choose_device(job.config), False)


def refuse_another_run(job: Job) -> None:
    """Raises UserError if the job's folder holds a run that was trained otherwise."""
    begun, threads = job.run / "config.json", job.config.threads
    try:
        before = read_config(begun) if begun.is_file() else job.config
        if before.threads != threads:
            raise UserError(f"it wasn't trained with threads={threads}, so its CPU time can't be compared")
        if changed := differences(asdict(before), job.config):
            raise UserError(f"it was trained with {changed}")
    except UserError as error:
        raise UserError(f"{job.run} is there, but {error}: remove it, or train elsewhere with --out_dir=out/compare") from None


def run_job(job: Job) -> None:
    """Train, or go on training; then evaluate every checkpoint; its file appears whole, at the end."""
    words = [str(job.config_path), *(f"--{name}={value}" for name, value in job.overrides.items())]
    job.run.parent.mkdir(parents=True, exist_ok=True)
    if not finished(job.run):
        with open(f"{job.run}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
            code = train.main(words + ["--resume"] * (job.run / "config.json").is_file())
        if code:
            raise UserError(f"{job.run} was interrupted: the same command goes on with it")
    write_json(job.result, evaluated(job), indent=None)


def evaluated(job: Job) -> dict:
    """The run's file: where it comes from, what its stages took, and a point per checkpoint, from the warm start (step 0) on."""
    config, (made, *rows) = job.config, report.read_jsonl(job.run / "metrics.jsonl")
    made["peak_memory_bytes"] = json.loads((job.run / "summary.json").read_text())["peak_memory_bytes"]  # after training
    task, device = load_task(config), choose_device(config)
    spent = {0: {"tokens": 0, "seconds": 0.0}} | {
        row["step"]: {"tokens": row["trace_tokens"] + row["fork_tokens"],
                      "seconds": row["seconds_cpu"] if device == "cpu" else row["seconds_total"]} for row in rows}
    folders = {0: Path(made.pop("start"))}
    folders |= {int(path.name.split("-")[1]): path for path in sorted((job.run / "checkpoints").glob("step-*"))}

    problems = {split: distinct(task, split, config.eval_problems, "eval") for split in (job.split, "ood")}
    points, last = [], max(folders)
    for step, folder in folders.items():
        try:
            model = checkpoint.load_model(folder, device)
        except UserError as error:
            raise UserError(f"{error}; or remove {job.run}, and the same command trains it anew") from None
        section, harder = (evaluate_policy(model, task, problems[split], config, "eval", brief)
                           for split, brief in ((job.split, 0 < step < last), ("ood", True)))
        curves = {name: [[row["budget"], round(row["J"]["value"], 4)] for row in section[of]]
                  for name, of in (("curve", "budget_curve"), ("extrapolation", "extrapolation")) if of in section}
        points.append({"step": step, **spent[step], "thinking_tokens": section["mean_thinking_tokens"]["value"], **curves,
                       "habits": section["habits"], "per_problem": section["per_problem"], "ood": harder["per_problem"]})
    stages = {stage: sum(row[f"seconds_{stage}"] for row in rows) for stage in ("trace", "fork", "update")}  # wall clock
    return {"arm": job.arm, **made, "stages": stages, "points": points}


if __name__ == "__main__":
    command(main)
