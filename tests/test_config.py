"""The run configuration: every mistake is an error with its fix before any work starts, and every key does something."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from data.countdown import Countdown
from nanomrt.config import (
    ALGORITHMS,
    CHOICES,
    KEYS,
    RunConfig,
    describe,
    load_config,
    parse_overrides,
    read_config,
    refuse_unread,
    run_name,
    save_config,
)
from nanomrt.methods import METHODS
from nanomrt.model import Llama, ModelConfig

ROOT = Path(__file__).parents[1]
CONFIG_FILES = sorted((ROOT / "config").glob("*.py"))


def load(tmp_path: Path, text: str = "", *arguments: str) -> RunConfig:
    """The config of a file with this text and these command line arguments."""
    (tmp_path / "run.py").write_text(text)
    return load_config(tmp_path / "run.py", parse_overrides(list(arguments)))


# --- What is right ---


def test_an_empty_file_gives_the_defaults(tmp_path):
    """Each default exists once, in RunConfig."""
    assert load(tmp_path) == RunConfig()


def test_the_command_line_wins_over_the_file(tmp_path):
    """File over default, command line over file; both spellings, and dashes for underscores."""
    text = "steps = 7\nalpha = 0.5  # why\n"
    assert (load(tmp_path, text).steps, load(tmp_path, text).alpha) == (7, 0.5)
    assert load(tmp_path, text, "--steps=9") == load(tmp_path, text, "--steps", "9") == RunConfig(steps=9, alpha=0.5)
    assert load(tmp_path, "", "--group-size=4", "--kl-coef", "0.5") == RunConfig(group_size=4, kl_coef=0.5)
    assert load(tmp_path, "", "--steps=9", "--steps=8").steps == 8


@pytest.mark.parametrize("arguments, overrides", [
    ([], {}),
    (["--seed=3"], {"seed": "3"}),
    (["--seed", "3"], {"seed": "3"}),
    (["--operators=+-*/"], {"operators": "+-*/"}),
    (["--out_dir=a=b"], {"out_dir": "a=b"}),  # only the first = divides
    (["--init_from="], {"init_from": ""}),
    (["--target_min", "-3", "--alpha=1"], {"target_min": "-3", "alpha": "1"}),
])
def test_parse_overrides(arguments, overrides):
    """--key=value and --key value, in any mixture."""
    assert parse_overrides(arguments) == overrides


@pytest.mark.parametrize("text, arguments", [("alpha = 2", ()), ("", ("--alpha=2",)), ("", ("--alpha", "2")),
                                             ("", ("--alpha=2e0",))])
def test_whole_numbers_become_floats_where_floats_are_wanted(tmp_path, text, arguments):
    """alpha = 2 is alpha = 2.0, of type float."""
    alpha = load(tmp_path, text, *arguments).alpha
    assert alpha == 2.0 and type(alpha) is float


@pytest.mark.parametrize("text, arguments, value", [("", ("--qk_norm=True",), True),
                                                    ("qk_norm = True", ("--qk_norm=false",), False)])
def test_booleans_on_the_command_line(tmp_path, text, arguments, value):
    """The words true and false, in any case; not what Python's bool makes of a text."""
    assert load(tmp_path, text, *arguments).qk_norm is value


def test_continuations_differ_without_a_fork_temperature():
    """Those of vineppo are sampled like a rollout: several of them are no copies."""
    assert RunConfig(algorithm="vineppo", forks=4).fork_temperature == 0


def test_the_largest_seed_works():
    """PyTorch takes it."""
    assert torch.Generator().manual_seed(RunConfig(seed=2**63 - 1).seed).initial_seed() == 2**63 - 1


def test_one_file_may_build_on_another(tmp_path):
    """`base` names a file beside this one; what is assigned here wins, whatever the line's place."""
    (tmp_path / "ground.py").write_text("steps = 5\nalpha = 0.25\n")
    assert load(tmp_path, "alpha = 0.5\nbase = 'ground.py'\n") == RunConfig(steps=5, alpha=0.5)
    assert load(tmp_path, "base = 'ground.py'\n", "--steps=6") == RunConfig(steps=6, alpha=0.25)


# --- What is wrong ---


@pytest.mark.parametrize("text, arguments, message", [
    # unknown keys, with the nearest
    ("lerning_rate = 1e-3", "", r"run.py: unknown key 'lerning_rate'; did you mean 'learning_rate'\?"),
    ("", "--alhpa=1", r"command line: unknown key 'alhpa'; did you mean 'alpha'\?"),
    ("", "--group-sise=4", "did you mean 'group_size'"),
    ("xyzzy = 1", "", "unknown key 'xyzzy'; --help lists all"),
    ("import os", "", "unknown key 'os'"),
    ("", "--base=small.py", "command line: unknown key 'base'"),
    ("base = 'gone.py'", "", r"no config file .*gone.py, the base of .*run.py; those that come"),
    ("base = 'run.py'", "", "run.py: builds on itself, run.py -> run.py: leave out one `base`"),
    ("base = 3", "", "run.py: base=3 must be the name of a config file"),
    # no clean Python
    ("steps = 3\nalpha = = 1", "", r"run.py: SyntaxError: invalid syntax \(run.py, line 2\); .* plain assignments"),
    ("steps = 3\nalpha = much", "", "run.py, line 2: NameError: name 'much' is not defined; a config file holds plain"),
    ("\nimport json\nsteps = json.loads('{')", "", "run.py, line 3: JSONDecodeError: .*; a config file holds"),
    # wrong types in a file
    ("steps = 1.5", "", "run.py: steps=1.5 must be int, not float"),
    ("steps = True", "", "steps=True must be int, not bool"),
    ("qk_norm = 1", "", "qk_norm=1 must be bool, not int"),
    ("", "--qk_norm=yes", "qk_norm='yes' must be bool"),
    ("alpha = False", "", "alpha=False must be float, not bool"),
    ("alpha = None", "", "alpha=None must be float, not NoneType"),
    ("device = 0", "", "device=0 must be str, not int"),
    ("steps = 'many'", "", "steps='many' must be int"),
    ("steps = '60'", "", "steps='60' must be int, not str"),  # a file writes 60
    ("alpha = '1.0'", "", "alpha='1.0' must be float, not str"),
    ("seed = [1]", "", r"seed=\[1\] must be int, not list"),
    # wrong types on the command line
    ("", "--steps=1.5", "command line: steps='1.5' must be int"),
    ("", "--steps=", "steps='' must be int"),
    ("", "--alpha=much", "alpha='much' must be float"),
    ("", "--steps --alpha=1", "--steps needs a value"),
    # not in the form of an argument
    ("", "--seed", "--seed needs a value: --seed=…"),
    ("", "--alpha=1 --seed", "--seed needs a value"),
    ("", "seed=1", "expected --key=value, not 'seed=1'"),
    ("", "-s 1", "expected --key=value, not '-s'"),
    # impossible combinations
    ("", "--forced_on=0.25 --alpha=0", "forced_on learns from progress, and alpha=0 gives it no weight"),
    ("", "--thinking_budget=999", "more than max_position_embeddings=256: raise it, or lower thinking_budget"),
    ("", "--eval_budget=999", "more than max_position_embeddings=256"),
    ("", "--trace_max_attempts=99", "lower thinking_budget, eval_budget or trace_max_attempts"),
    ("", "--max_position_embeddings=64", "more than max_position_embeddings=64"),
    ("", "--group_size=1", "group_size=1 must be at least 2"),
    ("", "--group_size=0", "group_size=0 must be at least 2"),
    ("", "--group_size=5 --algorithm=mrt", "group_size=5 must be even for algorithm=mrt"),
    ("", "--prompts_per_step=3 --group_size=3", r"prompts_per_step \* group_size = 9 must be divisible by minibatches=2"),
    ("", "--temperature=0", "temperature must be positive"),
    ("", "--grad_clip=0", "grad_clip must be positive"),
    ("", "--alpha=-1", "alpha=-1.0 must be at least 0"),
    ("", "--kl_coef=0.1 --kl_estimator=k1_reward --algorithm=vineppo", "algorithm=vineppo doesn't follow: use k2"),
    ("", "--kl_coef=0.1 --kl_estimator=k1_reward --algorithm=mrt_star", "algorithm=mrt_star doesn't follow: use k2"),
    ("", "--kl_coef=0.1 --kl_estimator=k1_reward --algorithm=length_penalty", "algorithm=length_penalty doesn't follow"),
    ("", "--kl_coef=0.1 --kl_estimator=k1_reward --algorithm=anytime", "algorithm=anytime doesn't follow: use k2"),
    ("", "--kl_coef=0.1 --kl_estimator=k1_reward --equal_groups=skip", "equal_groups=skip would skip none: use k2"),
    ("", "--importance_cap=0.5", r"importance_cap must be 0 \(off\) or at least 1"),
    ("", "--importance_cap=2 --algorithm=sft", "the loss of algorithm=sft has none: leave it at 0"),
    ("", "--alpha=nan", "alpha=nan must be a finite number"),
    ("", "--alpha=inf", "alpha=inf must be a finite number"),
    ("", "--learning_rate=nan", "learning_rate=nan must be a finite number"),
    ("alpha = -float('inf')", "", "alpha=-inf must be a finite number"),
    ("", "--seed=-1", r"seed=-1 must lie in 0\.\.9223372036854775807"),
    ("", "--seed=9223372036854775808", "seed=9223372036854775808 must lie in 0"),
    ("", "--gamma=1.5", r"gamma=1\.5 must lie in 0\.\.1"),
    ("", "--repeat_penalty=-1", "repeat_penalty=-1.0 must be at least 0"),
    ("", "--repeat_penalty=1 --algorithm=vineppo", "leave it at 0 for algorithm=vineppo"),
    ("", "--J_discount=0", "J_discount must be positive"),
    ("", "--learning_rate_end=2", r"learning_rate_end=2\.0 must lie in 0\.\.1"),
    ("", "--forks=4", "forks=4 greedy answers would all be the same: set fork_temperature"),
    ("", "--num_attention_heads=3", "num_attention_heads must be a multiple of num_key_value_heads"),
    ("", "--num_key_value_heads=0", "num_key_value_heads"),
    ("", "--head_dim=31", "head_dim=31 must be even"),
    ("", "--num_hidden_layers=0", "num_hidden_layers=0 must be at least 1"),
    ("", "--trace_repeat=1.5", r"trace_repeat=1\.5 must lie in 0\.\.1"),
    ("", "--forks=-1", "forks=-1 must be at least 0"),
    ("", "--fork_temperature=-1", "fork_temperature=-1.0 must be at least 0"),
    ("", "--forks=4 --algorithm=anytime", "set fork_temperature"),
    ("", "--forks=0", "forks=0 asks how probable a right answer is.*: set fork_temperature, such as 1"),
    *[("", f"--forks=0 --fork_temperature=1 --algorithm={name}", "set forks to 1 or more") for name in ("vineppo", "mrt_star")],
    ("", "--weight_decay=-1", "weight_decay=-1.0 must be at least 0"),
    *[("", f"--{name}=0", "must be at least 1") for name in (
        "steps", "prompts_per_step", "epochs", "minibatches", "save_every", "sample_every", "warm_batch",
        "eval_problems", "eval_samples")],
    *[("", f"--{name}=nonsense", f"{name}='nonsense' must be one of: {', '.join(CHOICES[name])}") for name in CHOICES],
])
def test_mistakes_are_errors_that_name_the_fix(tmp_path, text, arguments, message):
    """A ValueError, whose message says where the mistake is and what to write instead."""
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text, *arguments.split())


def test_a_missing_file_says_where_configs_are(tmp_path):
    """Not a traceback from runpy."""
    with pytest.raises(ValueError, match=r"no config file .*nowhere\.py; those that come with nanomrt are config/\*\.py"):
        load_config(tmp_path / "nowhere.py")


def test_the_config_is_frozen():
    """Nobody changes it along the way."""
    with pytest.raises(AttributeError):
        RunConfig().steps = 3


def greedy_tryer(task: Countdown, config: RunConfig) -> Llama:
    """A model that says `<try>` whatever it reads, and never stops: the longest traces with the most episodes."""
    shape = {f.name: getattr(config, f.name) for f in fields(ModelConfig) if hasattr(config, f.name)}
    model = Llama(ModelConfig(vocab_size=len(task.tokenizer), tie_word_embeddings=False, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[task.open_episode] = 10.0
    return model


@pytest.mark.parametrize("algorithm", ["grpo", "mrt_online", "mrt"])
@pytest.mark.parametrize("budgets", [{"thinking_budget": 24, "eval_budget": 1, "trace_max_attempts": 1},
                                     {"thinking_budget": 18, "eval_budget": 24, "trace_max_attempts": 2}],
                         ids=["thinking longest", "evaluation longest"])
def test_a_context_that_is_accepted_is_enough(algorithm, budgets):
    """With the smallest max_position_embeddings that the config accepts, a step on the longest traces does not overflow."""
    small = {"algorithm": algorithm, "prompts_per_step": 6, "group_size": 2, "hidden_size": 8, "intermediate_size": 8,
             "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, **budgets}
    for context in range(1, 200):
        try:
            config = RunConfig(max_position_embeddings=context, **small)
            break
        except ValueError:
            continue
    task = Countdown(config)
    for seed in range(4):
        problems = task.problems("train", config.prompts_per_step, seed)
        gathered = METHODS[algorithm].gather(greedy_tryer(task, config), task, problems, config,
                                             torch.Generator().manual_seed(seed))
        assert max(map(len, gathered.rollouts.tokens)) <= context


# --- Names, saving ---


@pytest.mark.parametrize("overrides, name", [
    ({}, "small"),
    ({"seed": "1"}, "small-seed=1"),
    ({"seed": "1", "alpha": "0"}, "small-alpha=0.0-seed=1"),
    ({"out_dir": "elsewhere", "device": "cpu", "threads": "2", "save_every": "5", "sample_every": "1"}, "small"),
    ({"init_from": "out/warm/step"}, "small-init_from=out_warm_step"),
])
def test_run_names(overrides, name):
    """The file's stem and what was changed, sorted; never a slash, never what only says where or how to run."""
    assert run_name("config/small.py", overrides) == name


def test_a_file_may_need_what_the_command_line_adds(tmp_path):
    """It has a name though it is no valid config alone."""
    (tmp_path / "long.py").write_text("thinking_budget = 400\n")
    with pytest.raises(ValueError, match="raise it"):
        load_config(tmp_path / "long.py")
    assert run_name(tmp_path / "long.py", {"max_position_embeddings": "900"}) == "long-max_position_embeddings=900"


def test_long_run_names_are_cut_and_stay_different():
    """A path among the keys is no reason to fail when the folder is made."""
    one, two = (run_name("config/small.py", {"init_from": "a/very/long/path/" * 20, "steps": steps}) for steps in ("7", "8"))
    assert one != two and one[:140] == two[:140] and len(one) == len(two) == 160 and "/" not in one


def test_saved_configs_read_back_equal(tmp_path):
    """save, read: the same config with the same types, also where a float is whole."""
    config = RunConfig(steps=3, alpha=2.0, operators="+-*/", learning_rate=1e-7, init_from="out/x")
    save_config(config, tmp_path / "config.json")
    again = read_config(tmp_path / "config.json")
    assert again == config and type(again.alpha) is float and type(again.steps) is int


@pytest.mark.parametrize("text, message", [
    ('{"learning_rat": 1.0}', "unknown key 'learning_rat'; did you mean 'learning_rate'"),  # of another version
    ('{"steps": 1.5}', "steps=1.5 must be int"), ('{"steps": 0}', "steps=0 must be at least 1"),
    ('{"alpha": NaN}', "alpha=nan must be a finite number"),
    ('{"steps": 6', "is damaged: put back what the first line of metrics.jsonl has"), ("", "is damaged"), ("[1]", "is damaged"),
])
def test_a_saved_config_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json:? {message}"):
        read_config(tmp_path / "config.json")


def test_a_config_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    """A process that dies while it writes leaves the old one; what it had written is gone after the next time."""
    save_config(RunConfig(steps=3), tmp_path / "config.json")
    monkeypatch.setattr(Path, "write_text", lambda path, text, write=Path.write_text: write(path, text[:99]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_config(RunConfig(steps=4), tmp_path / "config.json")
    monkeypatch.undo()
    assert read_config(tmp_path / "config.json") == RunConfig(steps=3) and len(list(tmp_path.iterdir())) == 2
    save_config(RunConfig(steps=4), tmp_path / "config.json")
    assert read_config(tmp_path / "config.json").steps == 4 and len(list(tmp_path.iterdir())) == 1


# --- Every key ---


def test_every_key_is_described():
    """--help has a line for each key with its type, default and meaning."""
    lines = describe().splitlines()
    assert len(lines) == len(KEYS) == len(fields(RunConfig))
    for line, field in zip(lines, fields(RunConfig), strict=True):
        assert field.type in (int, float, bool, str) and type(field.default) is field.type and field.metadata["meaning"]
        assert re.match(rf"\s+--{field.name}\s+{field.type.__name__}\s", line)
        assert repr(field.default) in line and line.endswith(field.metadata["meaning"])
        assert ("of mrt_online: " in line) == (field.name in ("gamma", "forced_on"))


def test_a_key_that_changes_nothing_is_refused():
    """A user who sets it believes that it does."""
    refuse_unread(RunConfig(algorithm="mrt", alpha=2.0), ["alpha", "steps"])
    with pytest.raises(ValueError, match=r"gamma changes nothing with algorithm=mrt: leave it out.*reads it \(mrt_online\)"):
        refuse_unread(RunConfig(algorithm="mrt", gamma=0.5), ["gamma"])


def keys_read() -> set[str]:
    """Keys that something outside nanomrt/config.py reads: the task, the gates, the model's shape, or `config.<key>`."""
    read = {f"gate_{name}" for name in Countdown(RunConfig()).audit([], [], [])} | {f.name for f in fields(ModelConfig)}
    sources = [path for folder in (".", "nanomrt", "kernels", "data") for path in (ROOT / folder).glob("*.py")]
    for path in sources:
        if path != ROOT / "nanomrt" / "config.py":
            read |= set(re.findall(r"\bconfig\.(\w+)", path.read_text()))
    return read


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_read(name):
    """No dead settings."""
    assert name in keys_read()


# --- The files that come with nanomrt ---


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_config_files_load(path):
    """Each names a possible run, with any algorithm: its task and its model can be built, it has problems to train on, and what
    a method samples fits the context."""
    config = load_config(path)
    assert all(load_config(path, {"algorithm": name}).algorithm == name for name in ALGORITHMS)
    if config.task == "gsm8k":  # its data don't come with nanomrt: tests/test_gsm8k.py has some like it
        return
    task = Countdown(config)
    assert all(task.problems(split, 2, 0) for split in ("train", "validation", "test", "ood"))
    ModelConfig(vocab_size=len(task.tokenizer),
                **{f.name: getattr(config, f.name) for f in fields(ModelConfig) if hasattr(config, f.name)})


# --- No side effects ---


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_have_no_side_effects():
    """Importing everything, and loading every config file, seeds nothing and sets no global of PyTorch or the system."""
    modules = ["kernels", *(f"{folder}.{path.stem}" for folder in ("nanomrt", "data")
                            for path in sorted((ROOT / folder).glob("*.py")) if path.stem != "__init__")]
    code = f"""
import os, random, torch, numpy, tokenizers
torch.manual_seed(123)
state = lambda: (torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate(),
                 numpy.random.get_state()[1].tolist(), torch.get_num_threads(), torch.get_default_dtype(),
                 torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), dict(os.environ),
                 torch.is_grad_enabled())
before = state()
import {', '.join(modules)}
from nanomrt.config import load_config
for path in {[str(path) for path in CONFIG_FILES]}:
    load_config(path)
assert torch.initial_seed() == 123
print(state() == before)
"""
    assert in_a_fresh_process(code) == "True"


def test_the_core_imports_no_drawing_and_no_progress_bars():
    """mrt, the sampler and the task need nothing that draws; what torch itself imports does not count."""
    code = """
import sys, torch
before = set(sys.modules)
import nanomrt.mrt, nanomrt.sampler, data.countdown
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"matplotlib", "tqdm", "transformers"}))
"""
    assert in_a_fresh_process(code) == "[]"
