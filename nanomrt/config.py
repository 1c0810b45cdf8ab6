"""Every key of a run, with its type, default and meaning, once.

A config file is plain assignments (`alpha = 1.0`), perhaps on top of another file (`base = "small.py"`), loaded into a frozen
dataclass; `--key=value` or `--key value` on the command line wins over it. A misspelt key, a wrong type or an impossible
combination is an error before any work starts.
The model's own shape is saved beside its weights (`ModelConfig`) and comes from there when a checkpoint is loaded.
"""

import difflib
import hashlib
import json
import math
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from nanomrt.files import write_json

ALGORITHMS = ("sft", "star", "grpo", "length_penalty", "mrt_online", "mrt", "mrt_b", "mrt_star", "vineppo", "anytime")
CHOICES = {
    "algorithm": ALGORITHMS,
    "task": ("countdown", "gsm8k"),
    "advantage_norm": ("mean", "mean_std", "rloo"),
    "progress_norm": ("none", "std", "mean_std"),
    "loss_norm": ("token", "sequence", "constant"),
    "kl_estimator": ("k2", "k3", "k1_reward"),
    "truncated": ("zero", "mask"),
    "equal_groups": ("keep", "skip"),
    "device": ("auto", "cpu", "cuda"),
}
SUPERVISED = ("sft", "star", "mrt_star")  # their loss is a log-likelihood: no probability ratio, no clip
READ_BY = {  # keys that training reads with some methods, and with no other
    "alpha": ("mrt_online", "mrt", "mrt_b"),
    "gamma": ("mrt_online",),
    "J_discount": ("mrt_online", "mrt"),
    "progress_norm": ("mrt_online", "mrt", "vineppo"),
    "advantage_norm": ("grpo", "length_penalty", "mrt_online", "mrt", "mrt_b"),
    "repeat_penalty": ("grpo", "mrt_online", "mrt"),
    "length_penalty": ("length_penalty",),
    "decision_in_loss": ("mrt",),
    "forced_on": ("mrt_online",),
    "forks": ("mrt_online", "mrt", "mrt_b", "mrt_star", "vineppo", "anytime"),
    "fork_temperature": ("mrt_online", "mrt", "mrt_b", "mrt_star", "anytime"),
    **dict.fromkeys(("clip_low", "clip_high"), tuple(name for name in ALGORITHMS if name not in SUPERVISED)),
}


class UserError(ValueError):
    """Something the user can fix; its message says how. Commands show it without a traceback."""


def command(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a program and exit with its status; a UserError is one line on stderr, and status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def key(default: Any, meaning: str, low: float | None = None, high: float | None = None) -> Any:
    """A field with its meaning and the range that its value must lie in, both ends included."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


class TokenCounts(NamedTuple):
    """The most tokens that each text of a task takes."""

    prompt: int  # <think> included
    attempt: int  # an episode, its tag included
    answer: int  # </answer> included, the tags before it not
    trace: int  # all episodes that a warm start shows


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    # run
    seed: int = key(0, "every random number of the run derives from it", 0, 2**63 - 1)
    steps: int = key(60, "RL steps", 1)
    device: str = key("auto", "auto, cpu or cuda")
    threads: int = key(0, "CPU threads; 0 leaves PyTorch's choice", 0)
    out_dir: str = key("out", "runs are written to out_dir/<run name>")
    init_from: str = key("", "a checkpoint folder to start RL from, instead of the warm start")
    save_every: int = key(20, "steps between checkpoints", 1)
    sample_every: int = key(10, "steps between printed rollouts", 1)

    task: str = key("countdown", "what is learned (data/): countdown, or gsm8k")

    # task=countdown (data/countdown.py)
    numbers: int = key(3, "numbers given")
    used: int = key(3, "numbers that an answer uses")
    number_max: int = key(13, "given numbers lie in 1..number_max")
    target_min: int = key(10, "smallest target")
    target_max: int = key(60, "largest target")
    operators: str = key("+-*", "some of + - * /")
    max_value: int = key(100, "largest running result in a warm-start trace; also the largest number token")
    max_solutions: int = key(4, "problems with more solutions are left out", 1)
    ood_target_min: int = key(45, "targets from here on with few solutions form the OOD split")
    ood_max_solutions: int = key(2, "how few", 1)

    # task=gsm8k (data/gsm8k.py); problems beyond one of the three limits, in tokens, are left out
    data_dir: str = key("data/gsm8k", "the folder of train.jsonl and test.jsonl")
    prompt_tokens: int = key(192, "longest question", 1)
    step_tokens: int = key(64, "longest step of a solution, which is an episode", 1)
    solution_tokens: int = key(256, "longest solution", 1)
    ood_min_steps: int = key(6, "test problems whose solution has so many steps form the OOD split; training has shorter ones", 1)

    # warm start (nanomrt/warmstart.py): Countdown's random search traces with flaws, or people's solutions
    trace_max_attempts: int = key(12, "attempts in the longest trace", 1)
    trace_repeat: float = key(0.3, "probability that the attempt after a failure repeats it", 0, 1)
    trace_go_on: float = key(0.7, "probability that a success is checked once more", 0, 1)
    trace_wander: float = key(0.0, "of these checks, the share replaced by another attempt; the success is answered", 0, 1)
    trace_give_up: float = key(0.04, "probability of answering before a success, per attempt", 0, 1)
    trace_hint: float = key(0.05, "probability that an attempt is a solution by construction", 0, 1)
    trace_backtrack: float = key(0.0, "probability of going back, after a failure, to a running result that can succeed", 0, 1)
    warm_from: str = key("", "task=gsm8k: the pretrained model that it begins with, a folder in Hugging Face's layout")
    warm_steps: int = key(500, "optimiser steps", 1)
    warm_batch: int = key(64, "traces per step", 1)
    warm_check_weight: float = key(1.0, "weight of `yes` and `no` in the loss; a proposal weighs .5, all else 1", 0)
    warm_muon_lr: float = key(0.02, "Muon learning rate, hidden matrices; 0: AdamW for these, too", 0)
    warm_adamw_lr: float = key(3e-3, "AdamW learning rate: embeddings, norms, and what Muon doesn't train", 0)
    gate_result: float = key(0.95, "least share of right intermediate results before RL begins", 0, 1)
    gate_check_precision: float = key(0.8, "least share of `yes` that are right", 0, 1)
    gate_check_recall: float = key(0.7, "least share of solved attempts that get a `yes`", 0, 1)
    gate_answer: float = key(0.6, "least share of right answers among traces that reach the target", 0, 1)

    # model: a Llama (nanomrt/model.py); Hugging Face's names
    hidden_size: int = key(128, "width", 1)
    intermediate_size: int = key(320, "width of the feed-forward layers", 1)
    num_hidden_layers: int = key(4, "layers", 1)
    num_attention_heads: int = key(4, "query heads", 1)
    num_key_value_heads: int = key(2, "key/value heads", 1)
    head_dim: int = key(32, "size of a head", 2)
    qk_norm: bool = key(False, "normalise each head's queries and keys, as in Qwen3")
    max_position_embeddings: int = key(256, "context length, in tokens")

    # rollouts
    prompts_per_step: int = key(32, "problems per step", 1)
    group_size: int = key(12, "rollouts per problem", 2)
    thinking_budget: int = key(108, "thinking tokens per rollout; it is cut off after these and the room of an answer", 1)
    temperature: float = key(1.0, "sampling temperature, the same in the loss")
    truncated: str = key("zero", "a rollout that was cut off: zero (scores 0 and trains) or mask (left out of the loss)")

    # algorithm (nanomrt/methods.py, nanomrt/mrt.py)
    algorithm: str = key("mrt_online", ", ".join(ALGORITHMS))
    alpha: float = key(1.0, "weight of the progress bonus; 0: none, so that mrt_online is GRPO", 0)
    gamma: float = key(0.0, "discount of later episodes' progress; 0 credits an episode with its own only", 0, 1)
    J_discount: float = key(1.0, "progress is J_discount · J after - J before", 0, 1)
    repeat_penalty: float = key(0.0, "price of each token of an n-gram, as long as an attempt, that was said before; 0: off", 0)
    length_penalty: float = key(0.5, "share of the reward that a whole budget of tokens costs", 0, 1)
    decision_in_loss: bool = key(False, "whether the forced decision to stop is learned, too")
    forced_on: float = key(0.0, "of the rollouts that stop, the share that is also forced to go on, and learned from there", 0, 1)
    forks: int = key(1, "branches per boundary, m: forced answers, or continuations for vineppo; 0: none, J is a probability", 0)
    fork_temperature: float = key(0.0, "temperature of forced answers; 0 is greedy, so one fork's J is 0 or 1", 0)
    advantage_norm: str = key("mean_std", "outcome reward in its group: mean (centred), mean_std (and divided by the std), rloo")
    progress_norm: str = key("mean_std", "progress: none (as it is), std (over its root mean square), mean_std (centred first)")
    loss_norm: str = key("token", "what the summed loss is divided by: token, sequence or constant")
    equal_groups: str = key("keep", "groups without any advantage, as of equal outcomes: keep, or skip (DAPO)")
    clip_low: float = key(0.2, "lower clip of the probability ratio, 1 - clip_low", 0, 1)
    clip_high: float = key(0.28, "upper clip of the probability ratio, 1 + clip_high", 0)
    importance_cap: float = key(0.0, "weigh each token by min(pi_trainer / pi_sampler, cap) before the update; 0: off")
    kl_coef: float = key(0.0, "weight of the KL to the starting policy; 0 loads no reference", 0)
    kl_estimator: str = key("k2", "k2 or k3 (in the loss) or k1_reward (in the reward)")

    # optimiser of the RL stage: AdamW
    learning_rate: float = key(5e-4, "peak learning rate")
    learning_rate_end: float = key(0.0, "share of it that is left at the end, after a linear decay; 1 keeps it constant", 0, 1)
    warmup_steps: int = key(10, "optimiser steps of linear warm-up", 0)
    weight_decay: float = key(0.0, "decoupled weight decay", 0)
    grad_clip: float = key(1.0, "largest gradient norm")
    epochs: int = key(1, "passes over a batch of rollouts, GRPO's mu", 1)
    minibatches: int = key(2, "optimiser steps per pass", 1)
    micro_batch_tokens: int = key(8192, "tokens per forward and backward pass; changes memory, not the result", 1)

    # evaluation (evaluate.py)
    eval_problems: int = key(256, "distinct problems per split", 1)
    eval_samples: int = key(4, "rollouts per problem", 1)
    eval_budget: int = key(144, "largest thinking budget, in tokens; beyond thinking_budget it is extrapolation", 1)

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of: {', '.join(allowed)}")
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{f.name}={value} must be a finite number")
            if not (low is None or low <= value) or not (high is None or value <= high):
                raise UserError(f"{f.name}={value} must " + (f"be at least {low}" if high is None else f"lie in {low}..{high}"))
        mistakes = [
            (self.algorithm == "mrt" and self.group_size % 2,
             f"group_size={self.group_size} must be even for algorithm=mrt: half of a group stops at the cut"),
            (self.prompts_per_step * self.group_size % self.minibatches,
             f"prompts_per_step * group_size = {self.prompts_per_step * self.group_size} must be divisible by "
             f"minibatches={self.minibatches}"),
            (self.longest_context > self.max_position_embeddings,
             f"prompt + budget + answer can take {self.longest_context} tokens, more than max_position_embeddings="
             f"{self.max_position_embeddings}: raise it, or {self.shorten}"),
            (self.warm_from and self.task == "countdown",
             "warm_from brings a vocabulary of its own, and Countdown has one token per number: leave it empty, or task=gsm8k"),
            (not self.warm_from and self.task == "gsm8k",
             "task=gsm8k begins with a pretrained model, which knows language: name its folder with --warm_from=…"),
            (self.temperature <= 0, "temperature must be positive: RL needs a distribution to learn from"),
            *((getattr(self, name) <= 0, f"{name} must be positive") for name in ("learning_rate", "grad_clip", "J_discount")),
            (self.k1_in_reward and self.algorithm not in ("grpo", "mrt_online", "mrt", "mrt_b"),
             f"kl_estimator=k1_reward is part of the reward, whose size algorithm={self.algorithm} doesn't follow: use k2"),
            (self.k1_in_reward and self.equal_groups == "skip",
             "kl_estimator=k1_reward makes the rewards of every group differ, so equal_groups=skip would skip none: use k2"),
            (self.repeat_penalty and self.algorithm not in READ_BY["repeat_penalty"],
             f"repeat_penalty is part of the credit of {', '.join(READ_BY['repeat_penalty'])}: leave it at 0 for algorithm="
             f"{self.algorithm}"),
            (self.repeat_penalty and self.task != "countdown",
             "repeat_penalty knows how long an attempt is in Countdown only: leave it at 0"),
            (self.forced_on and self.alpha == 0,
             "forced_on learns from progress, and alpha=0 gives it no weight: leave one of them out"),
            (self.importance_cap and self.importance_cap < 1, "importance_cap must be 0 (off) or at least 1"),
            (self.importance_cap and self.algorithm in SUPERVISED,
             f"importance_cap is for probability ratios, and the loss of algorithm={self.algorithm} has none: leave it at 0"),
            (self.forks > 1 and self.fork_temperature == 0 and self.algorithm != "vineppo",  # its forks go on, at `temperature`
             f"forks={self.forks} greedy answers would all be the same: set fork_temperature, or forks=1"),
            (self.forks == 0 and self.fork_temperature == 0,
             "forks=0 asks how probable a right answer is, and greedy answers aren't drawn: set fork_temperature, such as 1"),
            (self.forks == 0 and self.algorithm in ("vineppo", "mrt_star"),
             f"forks=0 samples no branch, and algorithm={self.algorithm} needs one: set forks to 1 or more"),
            (self.num_attention_heads % self.num_key_value_heads,
             "num_attention_heads must be a multiple of num_key_value_heads"),
            (self.head_dim % 2, f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs"),
        ]
        for wrong, message in mistakes:
            if wrong:
                raise UserError(message)

    @property
    def k1_in_reward(self) -> bool:
        """Whether the KL to the starting policy is taken from the rewards."""
        return self.kl_coef != 0 and self.kl_estimator == "k1_reward"

    @property
    def longest_context(self) -> int:
        """Tokens that a context can come to: prompt, thinking and answer."""
        counts = self.token_counts
        twice = self.algorithm in ("mrt", "mrt_b", "vineppo")  # a prefix, and a budget after it
        thinking = max(self.thinking_budget * (1 + twice), self.eval_budget, counts.trace)
        answer = 2 + counts.answer  # </think> <answer> …
        # A cut-off rollout had room for its answer, and is forced to answer once more; so was a prefix. Linearised, a trace has
        # room for an attempt at least, with the token after it, and an answer.
        return counts.prompt + max(thinking + answer * (2 + twice), 1 + counts.attempt + answer)

    @property
    def shorten(self) -> str:
        """What to do about a context that is too long."""
        longest_trace = {"countdown": "trace_max_attempts", "gsm8k": "solution_tokens"}[self.task]
        return f"lower thinking_budget, eval_budget or {longest_trace}"

    @property
    def token_counts(self) -> TokenCounts:
        if self.task == "gsm8k":
            return TokenCounts(self.prompt_tokens, self.step_tokens, 12, self.solution_tokens)  # 12: eleven digits
        attempt = 3 * self.used  # <try>, the first number, (op, number, result) for each other one, the check
        answer = 4 * self.used - 4  # numbers, the operators and brackets between them
        return TokenCounts(self.numbers + 4, attempt, answer, attempt * self.trace_max_attempts)


KEYS = {f.name: f for f in fields(RunConfig)}
TASK_KEYS = {  # what the problems of a task are
    "countdown": ("numbers", "used", "number_max", "target_min", "target_max", "operators", "max_value", "max_solutions",
                  "ood_target_min", "ood_max_solutions"),
    "gsm8k": ("data_dir", "prompt_tokens", "step_tokens", "solution_tokens", "ood_min_steps"),
}
# What else only Countdown has: traces made up, a check, and a model that isn't pretrained. Beginnings of names.
COUNTDOWN_ONLY = ("trace_", "gate_check_", "warm_check_weight", "hidden_size", "intermediate_size", "num_", "head_dim", "qk_norm")
# Where and how to run: no part of what comes out, but for rounding.
HOW = {"out_dir", "device", "threads", "save_every", "sample_every", "micro_batch_tokens"}
LONGEST_NAME = 160  # of a run or a result, in bytes: file systems allow 255, and suffixes follow
BOOLS = {"true": True, "false": False}  # bool("False") would be True


def describe() -> str:
    """One line per key: name, type, default, who reads it if not all methods do, meaning."""
    readers = {name: f"of {', '.join(methods)}: " for name, methods in READ_BY.items()}
    return "\n".join(f"  --{f.name:<24} {f.type.__name__:<6} {f.default!r:<12} {readers.get(f.name, '')}{f.metadata['meaning']}"
                     for f in KEYS.values())


def _typed(name: str, value: Any, source: str) -> Any:
    """`value` as the type of key `name`; a command line gives text, a file gives Python values."""
    if name not in KEYS:
        near = difflib.get_close_matches(name, KEYS, n=1)
        raise UserError(f"{source}: unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; --help lists all"))
    wanted = KEYS[name].type
    if source == "command line" and wanted is not str:
        try:
            return BOOLS[value.lower()] if wanted is bool else wanted(value)
        except (KeyError, ValueError):
            raise UserError(f"{source}: {name}={value!r} must be {wanted.__name__}") from None
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"{source}: {name}={value!r} must be {wanted.__name__}, not {type(value).__name__}")
    return value


def file_values(path: str | Path) -> dict[str, Any]:
    """Every key as a config file has it. Without what a command line adds they may be no valid config."""
    return complete(_read_file(Path(path)))


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> RunConfig:
    """The config of a file, with overrides. Raises UserError with the fix in its message."""
    values = _read_file(Path(path)) | {name: _typed(name, value, "command line") for name, value in (overrides or {}).items()}
    return RunConfig(**values)


def with_overrides(config: RunConfig, overrides: dict[str, str]) -> RunConfig:
    """The same config but for some keys, given as text. Raises UserError with the fix in its message."""
    return replace(config, **{name: _typed(name, value, "command line") for name, value in overrides.items()})


def reads(algorithm: str, name: str) -> bool:
    return algorithm in READ_BY.get(name, ALGORITHMS)


def refuse_unread(config: RunConfig, names: Iterable[str]) -> None:
    """Raises UserError if algorithm or task don't read one of these keys, which a user has set: it would change nothing."""
    for name in names:
        for task in TASK_KEYS.keys() - {config.task}:
            if name in TASK_KEYS[task] or task == "countdown" and name.startswith(COUNTDOWN_ONLY):
                raise UserError(f"{name} changes nothing with task={config.task}: leave it out, or set task={task}")
        if not reads(config.algorithm, name):
            raise UserError(f"{name} changes nothing with algorithm={config.algorithm}: leave it out, or choose an algorithm "
                            f"that reads it ({', '.join(READ_BY[name])}); one of your own declares it in READ_BY")


def _read_file(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The assignments of a config file, on top of those of the file that it names as `base`. above: the files that are built on
    this one."""
    if not path.is_file():
        named = f", the base of {above[-1]}" if above else ""
        raise UserError(f"no config file {path}{named}; those that come with nanomrt are config/*.py")
    if path.resolve() in [file.resolve() for file in above]:
        circle = " -> ".join(file.name for file in (*above, path))
        raise UserError(f"{path}: builds on itself, {circle}: leave out one `base`")
    values = {name: value for name, value in _run(path).items() if not name.startswith("__")}
    base = values.pop("base", "")
    if not isinstance(base, str):
        raise UserError(f"{path}: base={base!r} must be the name of a config file, such as 'small.py'")
    inherited = _read_file(path.parent / base, (*above, path)) if base else {}
    return inherited | {name: _typed(name, value, str(path)) for name, value in values.items()}


def _run(path: Path) -> dict[str, Any]:
    """What a config file leaves behind. Raises UserError that says where it fails, and how."""
    try:
        return runpy.run_path(str(path))
    except Exception as error:  # it is code, so it can raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"{where}: {type(error).__name__}: {error}; a config file holds plain assignments, such as "
                        "alpha = 1.0") from None


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """['--alpha=0', '--seed', '3'] -> {'alpha': '0', 'seed': '3'}."""
    overrides, rest = {}, list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"expected --key=value, not {word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=…")
            value = rest.pop(0)
        overrides[name.replace("-", "_")] = value
    return overrides


def parse_arm(arm: str) -> tuple[str, dict[str, str]]:
    """A name, perhaps with keys of its own: 'mrt_online+alpha=2' -> ('mrt_online', {'alpha': '2'})."""
    name, *keys = arm.split("+")
    return name, parse_overrides([f"--{key}" for key in keys])


def run_name(path: str | Path, overrides: dict[str, str]) -> str:
    """'config/small.py' with seed 1 -> 'small-seed=1'."""
    return name_of(Path(path).stem, [path], overrides)


def name_of(start: str, paths: Iterable[str | Path], overrides: dict[str, str]) -> str:
    """`start`, and what the overrides change in one of these config files at least: neither values that all of them have anyway
    nor keys of HOW. A name too long for a file or folder ends with a hash of all of it."""
    before = [file_values(path) for path in paths]
    after = {name: _typed(name, value, "command line") for name, value in sorted(overrides.items()) if name not in HOW}
    changed = [f"{name}={value}" for name, value in after.items() if any(values[name] != value for values in before)]
    name = "-".join([start, *changed]).replace("/", "_")
    whole = name.encode()
    if len(whole) <= LONGEST_NAME:
        return name
    return f"{whole[:LONGEST_NAME - 11].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:10]}"


def complete(saved: dict[str, Any]) -> dict[str, Any]:
    """Every key of a run that saved these values. One that is missing there is younger: the run did what its default does."""
    return {name: saved.get(name, f.default) for name, f in KEYS.items()}


def differences(saved: dict[str, Any], config: RunConfig) -> str:
    """What a run that saved these values was trained with and `config` isn't, 'epochs=1, steps=60'; '' if nothing."""
    return ", ".join(f"{name}={value}" for name, value in complete(saved).items()
                     if name not in HOW and value != getattr(config, name))


def save_config(config: RunConfig, path: Path) -> None:
    write_json(path, asdict(config))


def read_config(path: Path) -> RunConfig:
    """The config that a run saved; a key that it lacks came later, and has its default. Raises UserError that names the file."""
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is damaged: put back what the first line of metrics.jsonl has as `config`, or train anew")
    values = {name: _typed(name, value, str(path)) for name, value in saved.items()}
    try:
        return RunConfig(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
