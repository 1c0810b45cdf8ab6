"""data/gsm8k.py: whatever people write is read, graded and cut into steps rightly, and a pretrained model keeps what it knows."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

import sample
import train
from data import load_task
from data.gsm8k import GSM8K, Problem, holds, number, read
from data.task import SPLITS, TAGS
from evaluate import distinct
from nanomrt import checkpoint
from nanomrt.config import RunConfig, UserError, load_config, refuse_unread
from nanomrt.model import Llama, ModelConfig, Packed
from nanomrt.report import read_jsonl
from nanomrt.rollout import grade
from nanomrt.tokenizer import Tokenizer
from nanomrt.verifier import Verifier
from nanomrt.verifier import train as train_verifier
from nanomrt.warmstart import untrained, warm_folder, warm_optimizers, warm_start, with_vocabulary

ROOT = Path(__file__).parents[1]
SMALL = {"task": "gsm8k", "ood_min_steps": 4, "prompt_tokens": 60, "step_tokens": 40, "solution_tokens": 160,
         "thinking_budget": 60, "eval_budget": 60, "max_position_embeddings": 400}


def story(i: int, steps: int) -> dict:
    """A problem like the dataset's, with annotations, a thousands separator now and then, and `steps` additions."""
    total, lines = 1000 * (i % 3), []
    for step in range(steps):
        lines.append(f"After day {step + 1} it is {total} + {i + 2} = <<{total}+{i + 2}={total + i + 2}>>{total + i + 2} coins.")
        total += i + 2
    return {"question": f"Box {i} has {1000 * (i % 3)} coins and gets {i + 2} a day. How many after {steps} days?",
            "answer": "\n".join(lines) + f"\n#### {total:,}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    for name, count in (("train", 120), ("test", 40)):
        lines = [json.dumps(story(i + 200 * (name == "test"), 2 + i % 4)) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def byte_level(texts: list[str], special: list[str], size: int = 400) -> HFTokenizer:
    """A BPE as language models have it."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pretrained(request, tmp_path_factory) -> Path:
    """Somebody's checkpoint: random weights, one of the tags in its vocabulary, and rows that no token has, as in Qwen's."""
    tokenizer = Tokenizer(byte_level([story(i, 3)["question"] for i in range(50)], ["<|endoftext|>", "<think>"]))
    shape = ModelConfig(vocab_size=len(tokenizer) + 20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=400, rope_theta=5000.0,
                        tie_word_embeddings=request.param == "llama", attention_bias=request.param == "qwen2")
    folder = tmp_path_factory.mktemp(request.param) / "model"
    checkpoint.save(folder, Llama(shape).initialise(torch.Generator().manual_seed(1)), tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory) -> RunConfig:
    """Without weights: the task needs the vocabulary only."""
    known = tmp_path_factory.mktemp("vocabulary")
    byte_level([json.loads(line)["answer"] for line in (folder / "train.jsonl").open()], []).save(str(known / "tokenizer.json"))
    return RunConfig(data_dir=str(folder), warm_from=str(known), **SMALL)


@pytest.fixture(scope="module")
def task(config) -> GSM8K:
    return load_task(config)


# --- Numbers ---


@given(st.integers(-10**15, 10**15), st.sampled_from(["", "$"]), st.sampled_from(["", ".", "%", " %", "%."]))
def test_a_number_is_read_however_it_is_written(value, sign, end):
    minus, size = "-" * (value < 0) + sign, abs(value)
    assert number(f" {minus}{size}{end} ") == number(f"{minus}{size:,}{end}") == number(f"{minus}{size}.0") == value


@given(st.text(max_size=60))
def test_anything_else_is_no_number_and_nothing_is_evaluated(text):
    assert number(text) is None or set(text.strip()) <= set("0123456789-$,.% ")


@pytest.mark.parametrize("text", ["", "-", "$", ".", "1,20", "1,2000", "12,34", "1 2", "3/4", "2*3", "1e9", "0x1F", "٣", "½",
                                  "nan", "inf", "--5", "1.2.3", "9" * 400, "72 apples"])
def test_what_is_no_number(text):
    assert number(text) is None


@pytest.mark.parametrize("step, arithmetic", [
    ("so 2 + 3 = 5", 1.0), ("so 2+3=6", 0.0), ("$1,200 x 2 = $2,400", 1.0), ("10 / 3 = 3.33", 1.0), ("10 / 3 = 3.3", 0.0),
    ("5 - 8 = -3", 1.0), ("2 + 3 = 5 and 5 + 1 = 7", 0.5),
    (".5 x 4 = 2 and 1 + 1 = 2", 1.0), ("$.75 * 8 = $6, 1 + 1 = 2", 1.0),  # not read from behind the point, which would be wrong
    # no equation of two numbers: nothing is said of them
    ("2 * 3 * 4 = 24", 0.0), ("(3 + 4) * 2 = 14", 0.0), ("20 * 10% = 2", 0.0), ("x = 5", 0.0), ("2 + 3", 0.0),
])
def test_equations_of_two_numbers_are_checked(task, step, arithmetic):
    response = [task.open_episode, *task.tokenizer.encode(step), task.close_thinking]
    assert task.habits([None], [response], 0)["arithmetic"] == arithmetic == task.audit([None], [response], [0.0])["result"]


def test_a_chain_is_not_read_as_its_end(task):
    """4 * 2 = 24 is no part of 3 * 4 * 2 = 24: a wrong equation would be counted."""
    response = [task.open_episode, *task.tokenizer.encode("3 * 4 * 2 = 24, then 1 + 1 = 2"), task.close_thinking]
    assert task.habits([None], [response], 0)["arithmetic"] == 1.0


def test_division_by_zero_does_not_hold():
    assert not holds("1", "/", "0", "0")


def test_a_hundredth_is_too_much():
    assert holds("1", "+", "1", "2.009") and not holds("1", "+", "1", "2.01") and not holds("1", "-", "1", "-0.01")


# --- Files ---


def test_a_line_is_a_problem(tmp_path):
    """Annotations and blank lines go, the separator of thousands is read."""
    row = {"question": " How many? ", "answer": "He has 2*600 = <<2*600=1200>>1,200.\n\nThat is it.\n#### 1,200"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "train.jsonl") == [Problem("How many?", ("He has 2*600 = 1,200.", "That is it."), Fraction(1200))]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"question": "?"}', '{"question": "?", "answer": "many\\n#### many"}',
                                  '{"question": "?", "answer": "no result"}', '{"question": 1, "answer": "#### 1"}', "\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "train.jsonl").write_text(json.dumps(story(0, 2)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r'train.jsonl, line 2: expected \{"question'):
        read(tmp_path / "train.jsonl")


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"question": "Wie groß?", "answer": "#### 1"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="train.jsonl, line 1: expected"):
        read(tmp_path / "train.jsonl")


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    """Other separators of lines may stand in a question as they are."""
    row = story(0, 2) | {"question": f"One.{separator}Two?"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read(tmp_path / "train.jsonl")[0].question == row["question"]


def test_missing_files_say_where_they_come_from(config, tmp_path):
    with pytest.raises(ValueError, match=r"no file .*train.jsonl: put GSM8K's .* there \(https://.*\), or .* --data_dir=…"):
        load_task(replace(config, data_dir=str(tmp_path)))
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match=r"train.jsonl is empty: put GSM8K's there"):
        load_task(replace(config, data_dir=str(tmp_path)))


# --- Problems ---


def test_no_problem_is_in_two_splits_and_all_are_used(task, folder):
    keys = {split: {problem.key for problem in task.pools[split]} for split in SPLITS}
    assert sum(map(len, keys.values())) == len(set.union(*keys.values()))
    known, unseen = ({problem.key for problem in read(folder / f"{name}.jsonl")} for name in ("train", "test"))
    assert keys["train"] | keys["validation"] < known and keys["test"] | keys["ood"] == unseen
    assert min(map(len, keys.values())) >= 5


def test_nobody_learns_what_the_test_asks(config, folder, tmp_path):
    """A question that stands in both files is a test problem."""
    leaked = (folder / "train.jsonl").read_text().splitlines(keepends=True)[:30]
    shutil.copy(folder / "train.jsonl", tmp_path)
    (tmp_path / "test.jsonl").write_text((folder / "test.jsonl").read_text() + "".join(leaked))
    pools = load_task(replace(config, data_dir=str(tmp_path))).pools
    assert not {problem.key for split in ("train", "validation") for problem in pools[split]} & {
        json.loads(line)["question"] for line in leaked}


def test_out_of_distribution_means_longer(task):
    assert all((len(problem.steps) >= 4) == (split == "ood") for split in SPLITS for problem in task.pools[split])


def test_problems_are_a_function_of_seed_and_split(task, config):
    again = load_task(config)
    for split in SPLITS:
        assert task.problems(split, 20, "a") == again.problems(split, 20, "a") != task.problems(split, 20, "b")
    assert {problem.key for problem in distinct(task, "test", 99, 0)} == {problem.key for problem in task.pools["test"]}
    with pytest.raises(ValueError, match="split 'tests' is none of train, validation, test, ood"):
        task.problems("tests", 1, 0)


@pytest.mark.parametrize("limit", ["prompt_tokens", "step_tokens", "solution_tokens"])
def test_what_exceeds_a_limit_is_left_out(task, config, limit):
    """Of the tokens that are really fed: the longest that is kept has exactly the limit."""
    def length(problem: Problem) -> int:
        response, _ = task.warm_trace(problem, random.Random(0))
        ends = task.episode_ends(response)
        return {"prompt_tokens": len(task.prompt(problem)), "step_tokens": max(b - a for a, b in zip([0, *ends], ends)),
                "solution_tokens": task.thinking_tokens(response)}[limit]

    lengths = sorted({length(problem) for problem in task.pools["train"]})
    shorter = load_task(replace(config, **{limit: lengths[-2]}))
    assert shorter.pools["train"] == [problem for problem in task.pools["train"] if length(problem) <= lengths[-2]]


def test_no_problem_within_the_limits(config):
    with pytest.raises(ValueError, match="no train problem of .* within the limits: raise prompt_tokens, step_tokens or"):
        load_task(replace(config, prompt_tokens=3)).problems("train", 1, 0)
    with pytest.raises(UserError, match="no ood problem of .* or change ood_min_steps"):
        train.checked_task(replace(config, ood_min_steps=9))


def test_a_tenth_of_the_training_file_is_held_out(config, tmp_path):
    for name, begin, count in (("train", 0, 600), ("test", 600, 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(story(i, 2)) + "\n" for i in range(begin, begin + count)))
    pools = load_task(replace(config, data_dir=str(tmp_path))).pools
    assert len(pools["train"]) + len(pools["validation"]) == 600 and 30 < len(pools["validation"]) < 90


# --- Traces ---


def test_a_solution_is_a_right_trace_with_a_step_per_episode(task, config):
    for problem in task.pools["train"]:
        response, weights = task.warm_trace(problem, random.Random(0))
        text = task.tokenizer.decode(response)
        assert task.grade(problem, text) == 1.0 and task.answer(response) == str(problem.answer)
        assert len(task.episode_ends(response)) == len(problem.steps) and set(weights) == {1.0} and len(weights) == len(response)
        assert len(task.prompt(problem)) + len(response) <= config.longest_context
        assert text.split("</think>")[0] == "".join(f"<try>{step}" for step in problem.steps)
        assert [response[-len(answer) :] for answer in task.right_answers(problem)] == task.right_answers(problem)
    answer = len(task.forced_stop) + task.answer_tokens
    assert config.longest_context == config.prompt_tokens + config.solution_tokens + 2 * answer  # one more is forced
    habits = task.habits([problem], [response], 60)
    assert habits == {"attempts": len(problem.steps), "repeats": 0.0, "arithmetic": 1.0}
    assert task.audit([problem], [response, response[:-1]], [1.0, 0.0]) == {"result": 1.0, "answer": 0.5}


def test_a_tag_spelled_with_other_tokens_is_none(task):
    """Who answers so while still thinking, as its tokens say, has said nothing: it would be paid for never stopping."""
    problem = task.parse("How many? #### 7")
    honest = [*task.tokenizer.encode("3 + 4 = 7"), *task.forced_stop, *task.right_answers(problem)[0]]
    spelled = [token for piece in ("<", "/think", ">", "<", "answer", ">", "7", "<", "/answer", ">")
               for token in task.tokenizer.encode(piece)]
    assert task.tokenizer.decode(spelled) == "</think><answer>7</answer>"
    rows = [honest, spelled, [*spelled, *honest], [*honest[:-1], *task.tokenizer.encode("<"), *honest[-1:]]]
    assert grade(task, [problem] * 4, rows) == [1.0, 0.0, 0.0, 0.0]
    assert [task.answer(row) for row in rows[:3]] == ["7", "", ""]


@pytest.mark.parametrize("result", ["0.00001", "72", "-0.5", "1,200.25", "0.1"])
def test_a_right_answer_is_right_however_small(task, result):
    """As it is written, also where floats would write 1e-05."""
    problem = task.parse(f"How many? #### {result}")
    assert task.grade(problem, f"</think><answer>{task.tokenizer.decode(task.right_answers(problem)[0][:-1])}</answer>") == 1.0


def test_a_trace_for_the_eye(task):
    problem = task.parse("How many?  #### 7")
    ids = [*task.prompt(problem), *task.warm_trace(replace(problem, steps=("3 + 4 = 7",)), random.Random(0))[0]]
    assert task.show(ids) == "How many? <think> <try> 3 + 4 = 7 </think> <answer> 7 </answer>"


def test_a_repeated_step_is_counted(task):
    one, two = ([task.open_episode, *task.tokenizer.encode(text)] for text in ("2 + 2 = 4", "so it is 4"))
    again = [task.go_back, *one[1:]]  # another tag, the same words
    habits = task.habits([None], [[*one, *two, *again, task.close_thinking]], 60)
    assert habits["repeats"] == 0.5 and habits["attempts"] == 3


@pytest.mark.parametrize("text, reward", [
    ("2 </think> <answer> 1200 </answer>", 1.0), ("</think><answer>$1,200.00</answer>", 1.0),
    ("</think><answer>7</answer><answer>1200</answer>", 1.0), ("</think><answer>1200</answer><answer>7</answer>", 0.0),
    ("<answer>1200</answer>", 0.0), ("<answer>1200</answer></think>", 0.0), ("</think><answer>1200", 0.0),
    ("</think><answer>1200 coins</answer>", 0.0), ("</think><answer></answer>", 0.0), ("</think><answer>600*2</answer>", 0.0),
    ("", 0.0),
])
def test_the_last_complete_answer_outside_of_the_thinking_counts(task, text, reward):
    assert task.grade(Problem("?", (), Fraction(1200)), text) == reward


def test_equal_answers_are_equal_texts(task):
    """Votes compare them."""
    said = lambda text: task.answer([*task.forced_stop, *task.tokenizer.encode(text), task.close_answer])
    assert said("$1,200") == said("1200.0") == "1200" and said("many") == "" == task.answer([])


def test_a_problem_from_a_user(task):
    assert task.parse("How many are 3 and 4? #### 7") == Problem("How many are 3 and 4?", (), Fraction(7))
    for text in ("How many?", "#### 7", "How many? #### lots", ""):
        with pytest.raises(ValueError, match="expected a question and its answer, such as 'Ann"):
            task.parse(text)


def test_the_gate_asks_for_a_number_and_not_for_the_right_one(task):
    [problem] = task.problems("train", 1, 0)
    wrong = [*task.forced_stop, *task.tokenizer.encode("123456"), task.close_answer]
    silent = [*task.forced_stop, *task.tokenizer.encode("coins"), task.close_answer]
    assert task.audit([problem] * 2, [wrong, silent], [0.0, 0.0])["answer"] == 0.5


# --- Tokens ---


@given(text=st.text(max_size=40))
def test_any_text_survives_the_vocabulary(task, text):
    if not any(tag in text for tag in TAGS):
        assert task.tokenizer.decode(task.tokenizer.encode(text)) == text
        assert task.tokenizer.encode_batch([text]) == [task.tokenizer.encode(text)]


def test_tags_are_tokens(task):
    assert [task.tokenizer.encode(tag) for tag in TAGS] == [[task.tokenizer.id(tag)] for tag in TAGS]


def test_settings_of_whoever_trained_a_vocabulary_do_not_cut_or_pad(task, tmp_path):
    task.tokenizer.save(tmp_path / "tokenizer.json")
    inner = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode("How many coins?") == task.tokenizer.encode("How many coins?")


# --- A pretrained model ---


def test_a_pretrained_model_keeps_what_it_knows(pretrained, config):
    """Text without tags has the same hidden states and logits, bit for bit; a tag that it lacked is the mean of its tokens."""
    config = replace(config, warm_from=str(pretrained))
    task, before = load_task(config), checkpoint.load_model(pretrained)
    after = untrained(task, config)
    known = len(Tokenizer.load(pretrained / "tokenizer.json"))
    assert after.config == replace(before.config, vocab_size=len(task.tokenizer)) and len(task.tokenizer) == known + len(TAGS) - 1
    assert task.open_thinking < known <= task.close_thinking
    tokens = torch.tensor(task.tokenizer.encode("How many coins are in 12 boxes?"))
    packed = Packed.of(torch.tensor([len(tokens)]))
    hidden = [model(tokens, packed.position_ids, packed) for model in (before, after)]
    assert torch.equal(*hidden) and torch.equal(hidden[0] @ before.head[:known].T, (hidden[1] @ after.head.T)[:, :known])
    for old, new in ((before.model.embed_tokens.weight, after.model.embed_tokens.weight), (before.head, after.head)):
        torch.testing.assert_close(new[known:], old[:known].mean(0, keepdim=True).expand(len(TAGS) - 1, -1))


def test_a_vocabulary_may_stay_as_it_is():
    shape = ModelConfig(8, 4, 4, 1, 1, 1, 4, 16)
    model = Llama(shape).initialise(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), with_vocabulary(model, 8, 8).parameters(), strict=True))


@pytest.fixture
def copied(pretrained, config, tmp_path) -> RunConfig:
    """A config whose pretrained model may be spoiled."""
    shutil.copytree(pretrained, tmp_path / "copy")
    return replace(config, warm_from=str(tmp_path / "copy"))


@pytest.mark.parametrize("missing, message", [
    ("tokenizer.json", "no file .*tokenizer.json: name the folder of a pretrained model with --warm_from=…"),
    ("model.safetensors", r"copy is no .*folder: it has no model.safetensors \(weights in several files.*save_pretrained"),
])
def test_half_a_pretrained_model_is_named(copied, missing, message):
    (Path(copied.warm_from) / missing).unlink()
    with pytest.raises(UserError, match=message):
        untrained(load_task(copied), copied)


def with_tokenizer(config: RunConfig, change: Callable[[dict], None]) -> None:
    path = Path(config.warm_from) / "tokenizer.json"
    inner = json.loads(path.read_text())
    change(inner)
    path.write_text(json.dumps(inner))


def test_a_vocabulary_that_does_not_fit_is_named(copied):
    """One with more tokens than the model knows; one that cannot write what it reads; one whose ids have holes."""
    folder = Path(copied.warm_from)
    shape = checkpoint.from_hf(json.loads((folder / "config.json").read_text()))
    few = Llama(replace(shape, vocab_size=100)).initialise(torch.Generator().manual_seed(0))
    checkpoint.save(folder, few, Tokenizer.load(folder / "tokenizer.json"), {})
    with pytest.raises(UserError, match="its tokenizer has .* tokens, its model 100: take another model"):
        untrained(load_task(copied), copied)
    with_tokenizer(copied, lambda inner: inner["model"]["vocab"].update(far=len(inner["model"]["vocab"]) + 3))
    with pytest.raises(ValueError, match="the ids of this vocabulary have holes, so tokens can't be added: take another model"):
        load_task(copied)
    with_tokenizer(copied, lambda inner: (inner["model"]["vocab"].pop("far"), inner.update(decoder=None)))
    with pytest.raises(ValueError, match="the tokenizer of .* makes .* of 'It has .*', so nothing could be graded"):
        load_task(copied)


def test_a_context_too_short_for_the_task_is_found_before_the_warm_start(pretrained, config):
    config = replace(config, warm_from=str(pretrained), max_position_embeddings=4000, thinking_budget=900)
    with pytest.raises(UserError, match="has a context of 400 tokens, but .* can take .*: lower thinking_budget"):
        untrained(load_task(config), config)


def test_another_model_or_other_data_are_another_warm_start(copied, folder, tmp_path):
    """Though the folders have the same names."""
    shutil.copytree(folder, tmp_path / "data")
    config = replace(copied, data_dir=str(tmp_path / "data"))
    before, weights = warm_folder(config), Path(copied.warm_from) / "model.safetensors"
    for path in (weights, tmp_path / "data/train.jsonl", tmp_path / "data/test.jsonl"):  # what the test asks is not learned
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert warm_folder(config) != before
        path.write_bytes(content)
    assert warm_folder(config) == before


def test_the_warm_start_of_micro_batches_is_the_same(pretrained, config):
    """Its gradient is a sum over traces, however many are computed at once."""
    losses = []
    for tokens in (10**6, 1):
        several = replace(config, warm_from=str(pretrained), micro_batch_tokens=tokens, warm_steps=3, warm_batch=6,
                          warm_muon_lr=0.0)
        task = load_task(several)
        losses.append(torch.stack(list(warm_start(untrained(task, several), task, several))))
    torch.testing.assert_close(*losses)
    assert losses[0][2] < losses[0][0]


def test_without_a_rate_for_muon_adamw_trains_everything(config):
    model = Llama(ModelConfig(8, 4, 4, 1, 1, 1, 4, 16))
    [adamw] = warm_optimizers(model, replace(config, warm_muon_lr=0.0))
    assert isinstance(adamw, torch.optim.AdamW) and len(adamw.param_groups[0]["params"]) == len(list(model.parameters()))
    muon, adamw = warm_optimizers(model, config)
    assert sum(len(group["params"]) for some in (muon, adamw) for group in some.param_groups) == len(list(model.parameters()))


def test_a_verifier_of_a_pretrained_model_learns_a_hundred_times_slower(pretrained, config):
    """AdamW's first step moves every weight that has a gradient by its rate, a fifth of the peak."""
    config = replace(config, warm_from=str(pretrained))
    task = load_task(config)
    policy, moved = untrained(task, config), []
    for other in (config, replace(config, task="countdown", warm_from="")):  # the config of a verifier that was not pretrained
        verifier = Verifier.of(policy)
        before = verifier.score.weight.clone()
        next(train_verifier(verifier, policy, task, other, steps=1))
        moved.append((verifier.score.weight - before).abs().max().item())
    assert moved == pytest.approx([2e-6, 2e-4], rel=1e-3)


# --- Config ---


def test_keys_of_another_task_are_refused(config):
    refuse_unread(config, ["prompt_tokens", "steps"])
    with pytest.raises(ValueError, match="numbers changes nothing with task=gsm8k: leave it out, or set task=countdown"):
        refuse_unread(config, ["numbers"])
    for name in ("trace_repeat", "gate_check_recall", "hidden_size", "num_hidden_layers"):
        with pytest.raises(ValueError, match=f"{name} changes nothing with task=gsm8k: leave it out, or set task=countdown"):
            refuse_unread(config, [name])
    with pytest.raises(ValueError, match="repeat_penalty knows how long an attempt is in Countdown only"):
        replace(config, repeat_penalty=0.5)
    with pytest.raises(ValueError, match="ood_min_steps changes nothing with task=countdown: leave it out, or set task=gsm8k"):
        refuse_unread(RunConfig(), ["ood_min_steps"])


def test_one_task_needs_a_pretrained_model_and_the_other_has_a_vocabulary_of_its_own(config):
    with pytest.raises(ValueError, match="warm_from brings a vocabulary of its own.*leave it empty, or task=gsm8k"):
        RunConfig(warm_from="somewhere")
    with pytest.raises(ValueError, match="task=gsm8k begins with a pretrained model, .* --warm_from=…"):
        replace(config, warm_from="")


def test_a_context_too_short_for_the_solutions(config):
    with pytest.raises(ValueError, match="lower thinking_budget, eval_budget or solution_tokens"):
        replace(config, solution_tokens=999)


# --- All of it ---


@pytest.mark.parametrize("pretrained, algorithm", [("llama", "mrt_online"), ("qwen2", "mrt"), ("llama", "mrt_star")],
                         indirect=["pretrained"])
def test_the_pipeline_runs_from_a_pretrained_model(pretrained, folder, tmp_path, algorithm, capsys):
    """Warm start, two steps, evaluation, and sample.py; the pretrained folder is left as it was."""
    keys = {"base": str(ROOT / "config/gsm8k.py"), **SMALL, "data_dir": str(folder), "warm_from": str(pretrained),
            "out_dir": str(tmp_path / "out"), "algorithm": algorithm, "warm_steps": 20, "warm_adamw_lr": 0.01, "warm_batch": 8,
            "steps": 2, "prompts_per_step": 4, "group_size": 4, "eval_problems": 4, "eval_samples": 1, "device": "cpu"}
    (tmp_path / "run.py").write_text("\n".join(f"{name} = {value!r}" for name, value in keys.items()))
    before, contents = signal.getsignal(signal.SIGINT), {path: path.read_bytes() for path in pretrained.iterdir()}
    try:
        assert train.main([str(tmp_path / "run.py"), "--force"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert contents == {path: path.read_bytes() for path in pretrained.iterdir()}
    config = (tmp_path / "out/run/config.json").read_text()
    (tmp_path / "out/run/config.json").write_text(config.replace(str(pretrained), "gone"))  # each checkpoint has the vocabulary
    run = tmp_path / "out/run"
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "reward" in row]
    assert len(rows) == 2 and all(row["max_logprob_diff"] < 1e-4 for row in rows)
    assert set(json.loads((run / "summary.json").read_text())["test"]["habits"]) == {"attempts", "repeats", "arithmetic"}
    capsys.readouterr()
    sample.main([str(run), "--prompt", "Box 1 has 0 coins and gets 3 a day. How many after 2 days? #### 6", "--budget=24"])
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] in ("right", "wrong")


@pytest.mark.skipif(not (ROOT / "data/gsm8k/train.jsonl").is_file(), reason="GSM8K is not there")
def test_the_real_dataset(tmp_path):
    """Every solution that fits is a right trace, .98 of its equations hold, and the limits of config/gsm8k.py leave out few."""
    texts = [text for problem in read(ROOT / "data/gsm8k/train.jsonl") for text in (problem.question, *problem.steps)]
    byte_level(texts, [], 8000).save(str(tmp_path / "tokenizer.json"))
    config = load_config(ROOT / "config/gsm8k.py", {"warm_from": str(tmp_path)})
    task = load_task(config)
    problems = [problem for split in SPLITS for problem in task.pools[split]]
    traces = [task.warm_trace(problem, random.Random(0))[0] for problem in problems]
    assert all(task.grade(problem, task.tokenizer.decode(trace)) == 1 for problem, trace in zip(problems, traces))
    assert [len(task.episode_ends(trace)) for trace in traces] == [len(problem.steps) for problem in problems]
    assert task.habits(problems, traces, 0)["arithmetic"] > 0.98
    train, validation, test, ood = (len(task.pools[split]) for split in SPLITS)
    assert 0.97 * 6723 < train + validation <= 6723 and 0.97 * 1168 < test <= 1168 and 0.85 * 151 < ood <= 151
    assert 0.08 < validation / (train + validation) < 0.12
