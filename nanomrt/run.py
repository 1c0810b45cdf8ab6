"""A run's folder and its life: command line, state, records, checkpoints, interruption.

    out/<run>/config.json  metrics.jsonl  samples.jsonl  checkpoints/step-000020/ …  figures/  traces.html  summary.json

The state that a resumed run needs is small: the step, the counters below, weights and optimiser. Random numbers need no
state, because each stage of each step derives its own generator from (seed, stage, step).
"""

import fcntl
import hashlib
import json
import math
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from nanomrt import checkpoint, report
from nanomrt.config import (
    RunConfig,
    UserError,
    describe,
    differences,
    load_config,
    parse_overrides,
    read_config,
    refuse_unread,
    run_name,
    save_config,
)
from nanomrt.methods import Gathered
from nanomrt.model import Llama

USAGE = "usage: python train.py config/small.py [--key=value …] [--resume] [--force]"


def generator_for(seed: int, stage: str, step: int) -> torch.Generator:
    """A generator that depends on nothing but these three."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def device_of(config: RunConfig) -> str:
    """The device of a run: "cuda" or "cpu"."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no GPU: use --device=cpu")
    return device


def choose_device(config: RunConfig) -> str:
    """`device_of`; on a CPU this also sets the number of threads, and prints one line."""
    device = device_of(config)
    if device == "cpu":
        if config.threads:
            torch.set_num_threads(config.threads)
        print(f"no GPU in use: running in fp32 on {torch.get_num_threads()} CPU threads")
    return device


class Run:
    """Where a run stands, and everything it writes down."""

    def __init__(self, config: RunConfig, folder: Path, device: str):
        self.config, self.folder, self.device = config, folder, device
        self.step = 0  # finished RL steps
        self.ledger = {"trace": 0, "fork": 0, "update": 0}  # tokens: sampled, sampled in forced answers, trained on
        self.seconds = {"warm_start": 0.0, "trace": 0.0, "fork": 0.0, "update": 0.0, "evaluation": 0.0}
        self.skipped, self.skipped_in_a_row = 0, 0  # updates left out for a non-finite gradient
        self.interrupted = False
        self._saved = 0  # the step of the last checkpoint; step 0 is the warm start
        self._before = dict(self.seconds)  # at the end of the last step
        self.cpu_seconds = 0.0  # of this process in RL steps; unlike the wall clock it leaves out what others make it wait
        self._began, self._first_step = time.perf_counter(), 0

    # --- Beginning ---

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def start(self) -> Path | None:
        """The warm start that a run to be resumed began with, though it may not pass the gates (--force); None if it isn't there,
        or damaged."""
        starts = [Path(row["start"]) for row in report.read_jsonl(self.folder / "metrics.jsonl")[:1]]
        return next((start for start in starts if checkpoint.damage(start) is None), None)

    def begin(self, start: Path, model: Llama, optimizer: torch.optim.Optimizer, resume: bool) -> None:
        """Start afresh from the policy in `start`, which `model` holds, or load the newest good checkpoint into `model` and
        `optimizer` and drop what came after it. Raises UserError if another process trains this run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")  # let go of when this process ends, however it does
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training {self.folder}: wait for it, or stop it") from None
        newest = self._newest() if resume else None
        save_config(self.config, self.folder / "config.json")
        if newest:
            try:
                model.load_state_dict(checkpoint.load_model(newest, self.device).state_dict())
                state = checkpoint.load_training(newest, optimizer)
            except ValueError as error:
                raise UserError(f"cannot resume: {error}") from None
            self.step, self.ledger, self.seconds = state["step"], state["ledger"], state["seconds"]
            self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
            self.cpu_seconds = state["cpu_seconds"]
            for name in ("metrics.jsonl", "samples.jsonl"):
                report.truncate_jsonl(self.folder / name, self.step)
            print(f"resumed after step {self.step} from {newest}")
        else:
            for name in ("metrics.jsonl", "samples.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            report.append_jsonl(self.folder / "metrics.jsonl", provenance(self) | {"start": str(start)})
        self._saved, self._first_step, self._began, self._before = self.step, self.step, time.perf_counter(), dict(self.seconds)
        self._cpu_began = time.process_time()
        print(f"{self.config.algorithm}: steps {self.step + 1} to {self.config.steps}, {self.config.prompts_per_step} problems x "
              f"{self.config.group_size} rollouts each")
        self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def end(self) -> None:
        """Training is over and saved: from here on Ctrl-C stops at once again."""
        signal.signal(signal.SIGINT, self._handler)

    def _newest(self) -> Path | None:
        """The checkpoint to resume from; None if the run was stopped before it had one."""
        try:
            return checkpoint.newest(self.checkpoints)
        except UserError:
            print("no good checkpoint yet: beginning again from the warm start")
            return None

    def _interrupt(self, *_) -> None:
        if self.interrupted:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nstopping after this step; press Ctrl-C again to stop at once and lose it", flush=True)

    # --- A step ---

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall clock of a block to `seconds[stage]`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def accept_gradient(self, norm: float) -> bool:
        """Whether to take the optimiser's step. Raises UserError at the third non-finite gradient in a row."""
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 3:
            raise UserError(f"three gradients in a row were not finite at step {self.step + 1}: lower learning_rate. The last "
                            f"good checkpoint is kept: {self.checkpoints}")
        print(f"warning: skipped an update at step {self.step + 1}: its gradient norm is {norm}", file=sys.stderr)
        return False

    def record(self, gathered: Gathered, learned: dict[str, float]) -> None:
        """Count a finished step: its row in metrics.jsonl and its line on the screen."""
        self.step += 1
        self.ledger["trace"] += gathered.trace_tokens
        self.ledger["fork"] += gathered.fork_tokens
        self.seconds["trace"] -= gathered.fork_seconds  # the clock of gathering ran on
        self.seconds["fork"] += gathered.fork_seconds
        spent = {f"seconds_{stage}": self.seconds[stage] - self._before[stage] for stage in ("trace", "fork", "update")}
        row = {"step": self.step, **gathered.metrics(), **learned, "skipped": self.skipped,
               **{f"{name}_tokens": count for name, count in self.ledger.items()}, **spent}
        now = time.process_time()
        self.cpu_seconds, self._cpu_began = self.cpu_seconds + now - self._cpu_began, now
        row["seconds_cpu"] = self.cpu_seconds  # these two since the first step
        row["seconds_total"] = sum(self.seconds[stage] for stage in ("trace", "fork", "update"))
        self._before = dict(self.seconds)
        report.append_jsonl(self.folder / "metrics.jsonl", row)
        pace = (time.perf_counter() - self._began) / (self.step - self._first_step)
        print(report.step_line(row, self.config.steps, (self.config.steps - self.step) * pace), flush=True)

    def show(self, example: dict) -> None:
        """Print a rollout, episode by episode, and keep it in samples.jsonl."""
        example = {"step": self.step, **example}
        report.append_jsonl(self.folder / "samples.jsonl", example)
        print(report.show_rollout(example), flush=True)

    def save(self, model: Llama, tokenizer, generation: dict, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self._saved == self.step:
            return
        state = {"step": self.step, "ledger": self.ledger, "seconds": self.seconds, "skipped": self.skipped,
                 "skipped_in_a_row": self.skipped_in_a_row, "cpu_seconds": self.cpu_seconds}
        checkpoint.save(self.checkpoints / f"step-{self.step:06d}", model, tokenizer, generation, optimizer, state)
        self._saved = self.step


def read_command_line(argv: list[str]) -> tuple[RunConfig, Path, set[str]]:
    """argv -> config, run folder, flags. Refuses to overwrite a run: --resume goes on with it."""
    if not argv or "--help" in argv or "-h" in argv:
        print(f"{USAGE}\n\nKeys, with their types, defaults and meanings:\n{describe()}")
        raise SystemExit(0 if argv else 2)
    flags = {word for word in argv if word in ("--resume", "--force")}
    words = [word for word in argv if word not in flags]
    if not words or words[0].startswith("--"):
        raise UserError(f"which config? {USAGE}")
    path, *rest = words
    overrides = parse_overrides(rest)
    config = load_config(path, overrides)
    refuse_unread(config, overrides)
    folder = Path(config.out_dir) / run_name(path, overrides)
    saved = folder / "config.json"
    before = read_config(saved) if saved.is_file() else None
    if "--resume" in flags:
        if before is None:
            raise UserError(f"nothing to resume in {folder}: run the same command without --resume")
        if changed := differences(asdict(before), config):
            raise UserError(f"{path} has changed since {folder} began with {changed}: restore it, or start a new run")
    elif before is not None:
        raise UserError(f"{folder} exists: add --resume to go on with it, or remove it to start again")
    report.check_writable(folder)
    report.blank_figure(1, 1)  # without matplotlib it says so now, and not after training
    return config, folder, flags


def finished(folder: Path) -> bool:
    """Whether a run was trained to its end and measured. That it has a summary says less: an evaluation on the way writes one."""
    summary = folder / "summary.json"
    return summary.is_file() and "ledger" in json.loads(summary.read_text())


def open_run(run: Path, chosen: Path | None = None) -> tuple[RunConfig, Path]:
    """The config of a run, and a checkpoint: `chosen`, or the run's newest good one. Raises UserError if there is none."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run: it has no config.json; train one with python train.py config/small.py")
    return read_config(run / "config.json"), chosen or checkpoint.newest(run / "checkpoints")


def commit() -> str:
    """The commit of this checkout; where the code of a run differs from it, '-modified-' and a hash of that code. '' outside a
    repository."""
    root = Path(__file__).parents[1]
    code = [root / name for name in ("train.py", "evaluate.py", "nanomrt", "data", "kernels")]
    git = lambda *words: subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
    try:
        head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", *code)
    except FileNotFoundError:  # no git on this machine
        return ""
    if not changed:
        return head
    files = sorted(file for path in code for file in (path.glob("*.py") if path.is_dir() else [path]))
    return f"{head}-modified-{hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:8]}"


def processor(listed: Path = Path("/proc/cpuinfo")) -> str:
    """What this machine's processor is called; where Linux doesn't list it, what Python knows of it."""
    names = re.findall(r"model name\s*: (.+)", listed.read_text()) if listed.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def provenance(run: Run) -> dict:
    """What made a run's numbers."""
    if run.device == "cuda":
        device, memory = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        device = f"CPU, {torch.get_num_threads()} threads, {processor()}, {torch.backends.cpu.get_cpu_capability()}"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"config": asdict(run.config), "commit": commit(), "device": device, "peak_memory_bytes": memory,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}
