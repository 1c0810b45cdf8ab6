"""The Countdown task: what counts as an answer, which problems exist, and what a warm-start trace looks like."""

import itertools
import os
import random
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.countdown import MAX_ANSWER_CHARS, Chain, Countdown, Problem, evaluate, solve
from data.task import SPLITS, last_answer
from nanomrt.config import RunConfig

ROOT = Path(__file__).parents[1]
PROBLEM = Problem((3, 7, 4), 25)
VARIANTS = {
    "three of three": {},
    "four of four": {"numbers": 4, "used": 4, "target_max": 90, "ood_target_min": 70, "max_solutions": 20},
    "two of four": {"numbers": 4, "used": 2, "target_min": 5, "max_solutions": 4},
    "with division": {"operators": "+-*/", "max_solutions": 6},
}


def countdown(**keys) -> Countdown:
    return Countdown(RunConfig(**keys))


def answered(*expressions: str) -> str:
    """A response that closes the thinking and gives these answers."""
    return "</think> " + " ".join(f"<answer> {expression} </answer>" for expression in expressions)


def attempts_of(task: Countdown, ids: list[int]) -> list[list[str]]:
    """The words of each attempt of a trace, without its `<try>`."""
    thinking = task.tokenizer.decode(ids).split("</think>")[0]
    return [attempt.split() for attempt in thinking.split("<try>")[1:]]


# --- The grader ---


@pytest.mark.parametrize("expression", [
    "97**98**9", "9**9**9**9", "2**3", "1.5*4", "7//2", "--5", "-5", "+5", "3 - -4", "7 % 4", "1e3", "0x10", "1_000",
    "٣*٧", "３*７", "x", "3 if 7 else 4", "__import__('os')", "3; 7", "3 7", "3, 7", "3(7)", "(3)(7)", "()", "", " ",
    "3 +", "* 3", "(3", "3)", "07", "3\n* 7", "3\t* 7", "1/0", "4 / (7 - 7)", "(3*7)+4=25", "3*7+4 # 25",
    "1000000", "9" * 150,
    "(" * 99 + "3" + ")" * 99, "(" * 10_000 + "3" + ")" * 10_000, "(" * 200, "1+" * 99 + "1+", "3 " * 5000,
], ids=lambda text: text[:16] or "empty")
def test_what_is_no_expression_of_whole_numbers_is_rejected(expression):
    """Powers, decimals, signs, foreign digits, names, broken or huge brackets: None, reward 0, never an exception."""
    if expression == "(" * 99 + "3" + ")" * 99:
        assert evaluate(expression) == (3, (3,))  # deep but legal: 199 characters of brackets are still an expression
        expression = expression[:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(expression) is None
        assert countdown().grade(PROBLEM, answered(expression)) == 0.0


def test_length_cap_is_exact():
    """An answer of MAX_ANSWER_CHARS characters is read, one more is not."""
    longest = "1" + "+1" * 99 + " " * (MAX_ANSWER_CHARS - 199)
    assert len(longest) == MAX_ANSWER_CHARS and evaluate(longest) == (100, (1,) * 100)
    assert evaluate(longest + " ") is None


@pytest.mark.parametrize("expression, reward", [
    ("( 3 * 7 ) + 4", 1.0), ("3*7+4", 1.0), ("4+7*3", 1.0), ("((4)+(7*3))", 1.0),
    ("( 3 * 7 ) - 4", 0.0),  # 17
    ("3 * ( 7 + 4 )", 0.0),  # 33
    ("7 * 4 - 3", 1.0),  # 25 as well
    ("25", 0.0), ("21 + 4", 0.0),  # numbers that were not given
    ("3 * 7 + 7 - 3", 0.0),  # 25, but each number only once
    ("3 * 7 + 4 + 4 - 4", 0.0), ("7 + 7 + 7 + 4", 0.0), ("7 * 3", 0.0),
])
def test_reward_is_one_exactly_for_the_target_from_the_given_numbers(expression, reward, task):
    """The value must be the target, and each given number must be used once."""
    assert task.grade(PROBLEM, answered(expression)) == reward


def test_numbers_may_be_used_as_often_as_they_are_given(task):
    """With 4 given twice it may be used twice, but not three times."""
    assert task.grade(Problem((4, 4, 2), 18), answered("4 * 4 + 2")) == 1.0
    assert task.grade(Problem((4, 7, 2), 18), answered("4 * 4 + 2")) == 0.0
    assert task.grade(Problem((4, 4, 2), 20), answered("4 * 4 + 4")) == 0.0


def test_fractions_on_the_way_are_exact():
    """7 / 3 * 3 is 7 and not 6.999…; 8 / (3 - 8 / 3) is 24."""
    assert evaluate("7 / 3 * 3") == (Fraction(7), (3, 3, 7))
    assert evaluate("8/(3-8/3)") == (Fraction(24), (3, 3, 8, 8))
    assert countdown(operators="*/").grade(Problem((10, 3, 6), 20), answered("10 / 3 * 6")) == 1.0


@pytest.mark.parametrize("operators, rewards", [("+-*/", [1, 1, 1]), ("+-*", [0, 1, 0]), ("-/", [1, 0, 1]), ("+/", [1, 0, 0])])
def test_an_operator_that_the_task_does_not_offer_is_wrong(operators, rewards):
    """However right the value is."""
    task = countdown(operators=operators)
    assert [task.grade(Problem((4, 2, 1), 2), answered(text)) for text in ("4 / 2 / 1", "4 - 2 * 1", "4-2/1")] == rewards


def test_an_answer_with_too_few_numbers_does_not_count():
    """With two of four, an answer uses two numbers: not one, not three."""
    task = countdown(**VARIANTS["two of four"])
    problem = Problem((3, 7, 4, 10), 10)
    assert [task.grade(problem, answered(text)) for text in ("3 + 7", "10", "3 * 7 - 4 - 7", "7 + 4 - 1")] == [1.0, 0, 0, 0]
    assert task.grade(Problem((3, 7, 4, 10), 14), answered("3 + 7 + 4")) == 0.0


@pytest.mark.parametrize("response, answer", [
    ("", None),
    ("<try> 3 * 7 21 no", None),
    ("</think>", None),
    ("</think> <answer> 1 </answer>", "1"),
    ("</think> <answer> 1 </answer> <answer> 2 </answer>", "2"),
    ("</think> <answer> 1 </answer> <answer> 2", "1"),  # the second is unfinished
    ("</think> <answer> 1 <answer> 2 </answer>", "2"),  # nested: the inner one is complete
    ("</think> <answer> 1 <answer> 2 </answer> </answer>", "2"),
    ("</think> 1 </answer>", None),
    ("</think> <answer> 1", None),
    ("</think> <answer> </answer>", ""),
    ("<answer> 1 </answer>", None),  # still thinking
    ("<answer> 1 </answer> </think>", None),
    ("<answer> 1 </think> </answer>", None),
    ("<answer> 1 </answer> </think> <answer> 2 </answer>", "2"),
    ("</think> <answer> 1 </answer> <think> <answer> 2 </answer> </think>", "1"),  # thinking again
    ("</think> <answer> 1 </answer> <think> <answer> 2 </answer>", "1"),
    ("</think> <answer> 1 </answer> <think> </think> <answer> 3 </answer>", "3"),
    ("</think> <answer> 1\n2 </answer>", "1\n2"),
])
def test_last_complete_answer_outside_the_thinking(response, answer):
    """The prompt opened the thinking; what is said inside it is no answer, and an unfinished answer is none either."""
    assert last_answer(response) == answer


@pytest.mark.parametrize("response, answer", [
    ("<try> 3 </think> <answer> 3 * 7 </answer>", "3 * 7"),
    ("</think> <answer> 3 <answer> 3 + 4 </answer>", "3 + 4"),
    ("<try> <answer> 3 + 4 </answer>", ""),  # the thinking never ended
    ("<answer> </think> 3 + 4 </answer>", ""),  # it began inside of it
    ("</think> <answer> 3 + 4", ""), ("<try> </answer>", ""), ("</think> <answer> </answer>", ""),
])
def test_an_answer_in_tokens(response, answer, task):
    """What a response votes for is what its verdict is on."""
    assert task.answer(task.tokenizer.encode(response)) == answer


def test_a_right_answer_inside_the_thinking_earns_nothing(task):
    """Nor does a right answer before a wrong one; a wrong one before a right one does not hurt."""
    right, wrong = "3 * 7 + 4", "3 + 7 + 4"
    assert task.grade(PROBLEM, f"<answer> {right} </answer> </think>") == 0.0
    assert task.grade(PROBLEM, f"<answer> {right} </answer> {answered(wrong)}") == 0.0
    assert task.grade(PROBLEM, answered(right, wrong)) == 0.0
    assert task.grade(PROBLEM, answered(wrong, right)) == 1.0
    assert task.grade(PROBLEM, answered(right) + " <answer>") == 1.0


# A tree is a number or (op, left, right).
TREES = st.recursive(st.integers(0, 120), lambda x: st.tuples(st.sampled_from("+-*/"), x, x), max_leaves=9)


def value_of(tree) -> Fraction | None:
    """The oracle: exact, and None as soon as something is divided by 0."""
    if isinstance(tree, int):
        return Fraction(tree)
    op, a, b = tree[0], value_of(tree[1]), value_of(tree[2])
    if a is None or b is None or (op == "/" and b == 0):
        return None
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b


def leaves(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


def written(tree, sparse: bool, floor: int = 0) -> str:
    """With all brackets, or with only those that precedence and left-to-right order need."""
    if isinstance(tree, int):
        return str(tree)
    level = 1 if tree[0] in "+-" else 2
    text = f"{written(tree[1], sparse, level)}{tree[0]}{written(tree[2], sparse, level + 1)}"
    return text if sparse and level >= floor else f"({text})"


@settings(max_examples=300, deadline=None)
@given(TREES, st.booleans())
def test_evaluate_agrees_with_exact_arithmetic(tree, sparse):
    """Any tree over + - * /, with full or minimal brackets, has the oracle's value and leaves."""
    value, text = value_of(tree), written(tree, sparse)
    assert evaluate(text) == (None if value is None else (value, tuple(sorted(leaves(tree)))))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/() ", max_size=40))
def test_evaluate_never_raises(text):
    """Whatever the characters, the result is None or a value that Python's own arithmetic on fractions confirms."""
    result = evaluate(text)
    if result is not None:
        wrapped = "".join(f"Fraction({part})" if part.isdigit() else part for part in itertools.chain.from_iterable(
            ("".join(run),) if digit else run for digit, run in itertools.groupby(text, str.isdigit)))
        assert eval(wrapped.strip(), {"Fraction": Fraction}) == result[0]
        assert "**" not in text and "//" not in text


# --- The oracle of problems ---


def chains_by_hand(numbers, used, operators, max_value) -> set[tuple[int, str]]:
    """All (value, attempt) by going through positions, one operation at a time, in whole numbers."""
    found = set()

    def extend(value, words, left, steps):
        if steps == 0:
            found.add((value, " ".join(words)))
            return
        for i, b in enumerate(left):
            for op in operators:
                if op == "/" and value % b:
                    continue
                result = {"+": value + b, "-": value - b, "*": value * b, "/": value // b}[op]
                if 1 <= result <= max_value:
                    extend(result, [*words, op, str(b), str(result)], left[:i] + left[i + 1 :], steps - 1)

    for i, a in enumerate(numbers):
        extend(a, [str(a)], numbers[:i] + numbers[i + 1 :], used - 1)
    return found


@pytest.mark.parametrize("numbers, used, operators, max_value", [
    ((3, 4, 7), 3, "+-*", 100), ((4, 4, 7), 3, "+-*", 100), ((1, 1, 1), 3, "+-*/", 100), ((2, 3, 6), 3, "+-*/", 20),
    ((1, 5, 8, 9), 4, "+-*", 100), ((2, 4, 8, 8), 2, "+-*/", 60), ((2, 3, 5), 3, "/", 100),
])
def test_solve_finds_every_chain_once(numbers, used, operators, max_value):
    """The oracle lists exactly the chains of a brute force over positions, each once, under the value that it reaches."""
    solved = solve(numbers, used, operators, max_value)
    listed = [(value, " ".join(chain.attempt()[1:])) for value, chains in solved.items() for chain in chains]
    assert len(listed) == len(set(listed))
    assert set(listed) == chains_by_hand(numbers, used, operators, max_value)


def test_every_chain_is_its_expression():
    """The answer written for a chain has the chain's value and numbers."""
    for value, chains in solve((2, 3, 6, 8), 3, "+-*/", 100).items():
        for chain in chains:
            assert evaluate(" ".join(chain.expression)) == (value, tuple(sorted(chain.numbers)))


# --- Problems and splits ---


def every_problem(task: Countdown) -> list[Problem]:
    """All sorted problems of a task that have a split."""
    given = itertools.combinations(range(1, task.config.number_max + 1), task.config.numbers)
    candidates = (Problem(numbers, target) for numbers in given for target in task.chains(Problem(numbers, 0)))
    return [problem for problem in candidates if task.split_of(problem)]


def test_the_order_of_the_numbers_does_not_change_the_split(task):
    """All orders of one problem share one key and one split: no test problem hides in the training set."""
    for problem in every_problem(task)[::7]:
        orders = [Problem(order, problem.target) for order in itertools.permutations(problem.numbers)]
        assert {order.key for order in orders} == {problem.key}
        assert {task.split_of(order) for order in orders} == {task.split_of(problem)}


def test_splits_are_disjoint_and_all_inhabited(task):
    """No key is drawn for two splits, and train, validation, test hold about 80, 10 and 10 per cent of what is not OOD."""
    keys = {split: {problem.key for problem in task.problems(split, 400, 0)} for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert keys[a] and keys[b] and not keys[a] & keys[b]
    counts = {split: sum(task.split_of(problem) == split for problem in every_problem(task)) for split in SPLITS}
    seen = counts["train"] + counts["validation"] + counts["test"]
    assert abs(counts["train"] / seen - 0.8) < 0.05 and abs(counts["test"] / seen - 0.1) < 0.04


def test_split_membership_follows_the_settings(task):
    """Targets in range, 1 … max_solutions solutions; OOD is exactly "a large target with few solutions"."""
    for problem in every_problem(task):
        solutions = sum(value == problem.target for value, _ in
                        chains_by_hand(problem.key[0], task.config.used, task.config.operators, task.config.max_value))
        assert task.config.target_min <= problem.target <= task.config.target_max and 1 <= solutions <= task.config.max_solutions
        hard = problem.target >= task.config.ood_target_min and solutions <= task.config.ood_max_solutions
        assert (task.split_of(problem) == "ood") == hard
    assert task.split_of(Problem((1, 2, 3), 59)) is None


def test_problems_are_a_function_of_seed_and_split(task):
    """Same seed: same problems, from any instance; fewer are a prefix of more; another seed or split draws others."""
    drawn = task.problems("train", 20, 5)
    assert drawn == countdown().problems("train", 20, 5) and drawn[:7] == task.problems("train", 7, 5)
    assert len(drawn) == 20 and all(task.split_of(problem) == "train" for problem in drawn)
    assert drawn != task.problems("train", 20, 6) and drawn != task.problems("train", 20, "5/other")


def test_problems_leave_the_global_random_numbers_alone(task):
    """Neither reads nor moves the state of `random`."""
    random.seed(1)
    before, first = random.getstate(), task.problems("train", 5, 0)
    assert random.getstate() == before
    random.seed(2)
    assert task.problems("train", 5, 0) == first


def test_problems_are_the_same_in_every_process(task):
    """Python's randomised string hash plays no part."""
    code = "from data.countdown import *; print([p.key for p in Countdown(RunConfig()).problems('test', 8, 'a')])"
    for hash_seed in "01":
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": hash_seed})
        assert done.stdout.strip() == str([problem.key for problem in task.problems("test", 8, "a")])


@pytest.mark.parametrize("settings_, split, message", [
    ({"target_min": 61}, "train", "no train problem in 20,000 draws: widen .* or raise max_solutions"),
    ({"ood_target_min": 61}, "ood", "no ood problem in 20,000 draws: lower ood_target_min or raise ood_max_solutions"),
    ({}, "training", "train, validation, test, ood"),
    ({"operators": "/", "number_max": 7}, "train", "no train problem"),  # no draw has any chain
    ({"operators": "-", "number_max": 3}, "train", "no train problem"),
], ids=str)
def test_impossible_problems_are_a_clear_error(settings_, split, message):
    """If no problem of a split exists, `problems` ends with what to change instead of searching for ever."""
    with pytest.raises(ValueError, match=message):
        countdown(**settings_).problems(split, 1000, 0)  # however many are wanted, it gives up equally soon


@pytest.mark.parametrize("settings_, message", [
    ({"used": 4}, "used=4"), ({"used": 1}, "used=1"), ({"number_max": 2}, "number_max=2"),
    ({"operators": "+^"}, "operators"), ({"operators": "++"}, "each once"),
    ({"operators": ""}, "operators"), ({"max_value": 50}, "max_value"),
], ids=str)
def test_impossible_tasks_are_refused(settings_, message):
    """The constructor names the setting that cannot be."""
    with pytest.raises(ValueError, match=message):
        countdown(**settings_)


def test_only_draws_in_a_row_that_find_nothing_end_the_search(monkeypatch):
    """However many of them there were before."""
    monkeypatch.setattr("data.countdown.MAX_MISSES", 60)
    assert len(countdown().problems("train", 300, 0)) == 300


# --- Prompts, parsing, showing ---


@pytest.mark.parametrize("text", ["3 7 4 target 25", "3 7 4 = 25", "3, 7, 4 -> 25", "numbers 3 7 4 target 25 <think>"])
def test_parse_reads_a_users_words(text, task):
    """Numbers and target, whatever stands between them; and the prompt of a problem parses to that problem."""
    assert task.parse(text) == PROBLEM
    assert task.parse(task.tokenizer.decode(task.prompt(PROBLEM))) == PROBLEM


@pytest.mark.parametrize("text, message", [
    ("", "expected 3 numbers and a target"), ("3 7 4", "such as '2 3 4 target 60'"), ("3 7 4 5 25", "expected 3 numbers"),
    ("0 7 4 target 25", "1 to 100"), ("3 7 4 target 101", "1 to 100"),
])
def test_parse_errors_say_what_is_expected(text, message, task):
    """A wrong count shows an example; a number without a token names the range."""
    with pytest.raises(ValueError, match=message):
        task.parse(text)


def test_a_prompt_has_a_token_for_everything(task):
    """numbers, each number, target, its number, <think>: numbers + 4 tokens, none unknown."""
    prompt = task.prompt(Problem((3, 10, 4), 60))
    assert len(prompt) == task.config.numbers + 4 and prompt[-1] == task.open_thinking
    assert task.tokenizer.id("<unk>") not in prompt
    assert task.tokenizer.decode(prompt) == "numbers 3 10 4 target 60 <think>"


def test_show_writes_equals_before_a_result(task):
    """Only a running result follows a number, and it gets an equals sign; everything else stays."""
    ids = task.tokenizer.encode("<try> 7 + 4 11 * 3 33 no </think> <answer> ( 3 * 7 ) + 4 </answer>")
    assert task.show(ids) == "<try> 7 + 4 = 11 * 3 = 33 no </think> <answer> ( 3 * 7 ) + 4 </answer>"


def test_show_leaves_a_prompt_as_it_is(task):
    """The given numbers of a prompt are no results of one another."""
    assert task.show(task.prompt(PROBLEM)) == "numbers 3 7 4 target 25 <think>"


# --- Warm-start traces ---


def traces(task: Countdown, count: int, seed: int = 0):
    """(problem, ids, weights) of `count` traces."""
    rng = random.Random(seed)
    return [(problem, *task.warm_trace(problem, rng)) for problem in task.problems("train", count, "traces")]


def check_trace(task: Countdown, problem: Problem, ids: list[int], weights: list[float]) -> None:
    """Everything that must hold for one trace."""
    text, solved = task.tokenizer.decode(ids), False
    assert len(ids) == len(weights) and task.tokenizer.id("<unk>") not in ids
    for attempt in attempts_of(task, ids):
        assert len(attempt) == task.attempt_tokens - 1
        value, used = Fraction(int(attempt[0])), [int(attempt[0])]
        for op, number, result in zip(attempt[1:-1:3], attempt[2:-1:3], attempt[3:-1:3]):
            a, b = value, int(number)
            value = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b
            assert value == int(result) and 1 <= value <= task.config.max_value
            used.append(b)
        assert len(used) == task.config.used
        assert all(used.count(number) <= problem.numbers.count(number) for number in used)
        assert attempt[-1] == ("yes" if value == problem.target else "no")
        solved |= value == problem.target
    assert last_answer(text) is not None and ids[-1] == task.close_answer
    answer = ids[ids.index(task.close_thinking) :]
    assert answer[:2] == task.forced_stop and len(answer) == 2 + task.answer_tokens
    if solved:
        assert task.grade(problem, text) == 1.0
    ends = task.episode_ends(ids)
    assert ends == [task.attempt_tokens * (i + 1) for i in range(len(attempts_of(task, ids)))]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_works_end_to_end(name):
    """Problem, prompt, trace, episodes, answer and verdict agree for other counts of numbers and for division."""
    task = countdown(**VARIANTS[name])
    for problem, ids, weights in traces(task, 60):
        assert len(task.prompt(problem)) == task.config.numbers + 4
        check_trace(task, problem, ids, weights)
        assert {task.grade(problem, answered(" ".join(chain.expression)))
                for chain in task.chains(problem)[problem.target]} == {1.0}


def test_division_occurs_in_traces():
    """The variant with division really divides."""
    task = countdown(**VARIANTS["with division"])
    assert any(task.tokenizer.id("/") in ids for _, ids, _ in traces(task, 20))


def test_traces_are_a_function_of_their_generator(task):
    """The same generator state gives the same trace."""
    assert traces(task, 10, seed=3) == traces(task, 10, seed=3) != traces(task, 10, seed=4)


def test_weights_belong_to_their_tokens():
    """Proposals weigh 0.5, checks as much as the key says, results, tags and the answer 1."""
    task = countdown(warm_check_weight=3.0)
    tokenizer = task.tokenizer
    for _, ids, weights in traces(task, 40):
        close = ids.index(task.close_thinking)
        assert weights[close:] == [1.0] * (len(ids) - close)
        for start in range(0, close, task.attempt_tokens):
            words = tokenizer.decode(ids[start : start + task.attempt_tokens]).split()
            assert words[0] == "<try>" and words[-1] in ("yes", "no")
            expected = [1.0, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 1.0, 3.0]
            assert weights[start : start + task.attempt_tokens] == expected


def frequencies(task: Countdown, count: int) -> dict[str, float]:
    """How often each flaw occurred among the chances that it had."""
    chance = dict.fromkeys(("repeat", "go_on", "give_up"), 0)
    happened = dict(chance)
    for _, ids, _ in traces(task, count):
        attempts = [" ".join(attempt) for attempt in attempts_of(task, ids)]
        for i in range(min(len(attempts) + 1, task.config.trace_max_attempts)):
            found, more = any(attempt.endswith("yes") for attempt in attempts[:i]), i < len(attempts)
            kind, event = ("go_on", more) if found else ("give_up", not more)
            chance[kind] += 1
            happened[kind] += event
            if more and i and not found:
                chance["repeat"] += 1
                happened["repeat"] += attempts[i] == attempts[i - 1]
            assert not (more and found) or attempts[i] == attempts[i - 1]  # what succeeded is checked again
    assert min(chance.values()) > 300
    return {name: happened[name] / chance[name] for name in chance}


@pytest.mark.parametrize("rates", [{"repeat": 0.2, "go_on": 0.4, "give_up": 0.04},
                                   {"repeat": 0.5, "go_on": 0.7, "give_up": 0.2}], ids=str)
def test_flaws_have_the_frequencies_of_their_keys(rates):
    """Without hints, a repeated failure, one more check of a success and an early end occur as often as configured."""
    keys = {f"trace_{name}": rate for name, rate in rates.items()}
    measured = frequencies(countdown(trace_hint=0.0, max_solutions=4, **keys), 1500)
    for name, rate in rates.items():
        assert abs(measured[name] - rate) < 0.04, (name, measured[name])


def test_who_wanders_answers_with_the_success():
    """What follows a success is another attempt as often as the key says, else the latest success once more. The answer is that
    one, whatever follows it."""
    task, checks, others, failed_last = countdown(trace_go_on=0.7, trace_wander=0.4, max_solutions=4), 0, 0, 0
    for problem, ids, weights in traces(task, 800):
        check_trace(task, problem, ids, weights)
        chains, success = task.proposals(ids), None
        for chain in chains:
            if success:
                others, checks = others + (chain != success), checks + (chain == success)
            success = chain if chain.results[-1] == problem.target else success
        if success:
            failed_last += chains[-1] != success
            assert last_answer(task.tokenizer.decode(ids)) == " ".join(success.expression)
    assert failed_last > 50 and others / (others + checks) == pytest.approx(0.4, abs=0.04)


def test_extreme_rates_are_exact():
    """repeat=0: no attempt twice; go_on=0: nothing after a `yes`; give_up=0: no end without a `yes` or all attempts."""
    task = countdown(trace_repeat=0.0, trace_go_on=0.0, trace_give_up=0.0, trace_hint=0.0)
    for _, ids, _ in traces(task, 150):
        attempts = attempts_of(task, ids)
        checks = [attempt[-1] for attempt in attempts]
        assert len({tuple(attempt) for attempt in attempts}) == len(attempts)
        assert "yes" not in checks[:-1]
        assert checks[-1] == "yes" or len(attempts) == task.config.trace_max_attempts


def test_a_hint_is_a_solution():
    """hint=1: every attempt that is no repetition reaches the target; give_up=1: no attempt at all, just a guess."""
    for _, ids, _ in traces(countdown(trace_hint=1.0, trace_repeat=0.0, trace_give_up=0.0), 30):
        assert {attempt[-1] for attempt in attempts_of(countdown(), ids)} == {"yes"}
    guesser = countdown(trace_give_up=1.0)
    for problem, ids, weights in traces(guesser, 30):
        assert ids[0] == guesser.close_thinking and guesser.episode_ends(ids) == []
        check_trace(guesser, problem, ids, weights)


# --- Going back ---

BACK = countdown(trace_backtrack=1.0, trace_give_up=0.0, trace_hint=0.0, trace_go_on=0.0)
# after a failure it goes back wherever that can succeed


def test_an_attempt_from_a_running_result():
    """`kept` operations of the last attempt are not written again: `<back>` and their result stand for them."""
    chain = Chain((7, 4, 3, 2), ("+", "*", "-"), (11, 33, 31))
    assert [" ".join(chain.attempt(kept)) for kept in range(3)] == [
        "<try> 7 + 4 11 * 3 33 - 2 31", "<back> 11 * 3 33 - 2 31", "<back> 33 - 2 31"]


@pytest.mark.parametrize("used", [3, 4])
def test_a_way_back_begins_where_a_solution_does(used):
    """It shares numbers and operations with the failed attempt, as many as any solution does, and goes another way from there:
    each way equally often, right ones among them. Where no solution shares an operation there is no way back."""
    task = countdown(**VARIANTS["four of four" if used == 4 else "three of three"])
    rng, counts, right, expected = random.Random(0), [], 0, 0.0
    for problem in task.problems("train", 40, "back"):
        solutions = task.chains(problem)[problem.target]
        proposals = [chain for chains in task.chains(problem).values() for chain in chains]
        for failed in rng.choices([chain for chain in proposals if chain.results[-1] != problem.target], k=20):
            shared = lambda other, failed=failed: max(k for k in range(used - 1) if k == 0 or (
                other.numbers[: k + 1], other.ops[:k]) == (failed.numbers[: k + 1], failed.ops[:k]))
            way, kept = task.way_back(failed, proposals, problem.target, rng) or (None, 0)
            counts.append(kept)
            assert kept == max(map(shared, solutions))
            if way:
                ways = [other for other in proposals if shared(other) >= kept and other != failed]
                assert way in ways and way.results[:kept] == failed.results[:kept]
                right += way in solutions
                expected += sum(other in solutions for other in ways) / len(ways)
    assert set(counts) == set(range(used - 1))
    assert abs(right - expected) <= 4 * expected**0.5 and right > 10


def episodes_of(task: Countdown, ids: list[int]) -> list[list[str]]:
    """The words of each episode."""
    ends = task.episode_ends(ids)
    return [task.tokenizer.decode(ids[a:b]).split() for a, b in zip([0, *ends], ends)]


@pytest.mark.parametrize("name", ["three of three", "four of four", "with division"])
def test_backtracking_traces_are_right_in_their_arithmetic(name):
    """Each `<back>` names a running result of the attempt before it, as that stands with all that it had kept; its chain uses the
    numbers kept and its own, each as often as given; what it says of the target is true; the answer is the last attempt's."""
    task, back = countdown(**VARIANTS[name], trace_backtrack=0.7), 0
    for problem, ids, weights in traces(task, 60):
        numbers, results = [], []
        for episode in episodes_of(task, ids):
            head, first, *steps, check = episode
            if head == "<try>":
                numbers, results = [int(first)], []
            else:
                kept = next(k for k, result in enumerate(results) if result == int(first) and  # which, if two are equal:
                            len(numbers) - 1 - k - 1 == len(steps) // 3) + 1  # as many operations as are missing follow
                numbers, results, back = numbers[: kept + 1], results[:kept], back + 1
            value = Fraction(int(first))
            for op, number, result in zip(steps[::3], map(int, steps[1::3]), map(int, steps[2::3])):
                value = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[op]
                assert value == result and 1 <= value <= task.config.max_value
                numbers, results = [*numbers, number], [*results, result]
            assert len(numbers) == task.config.used and all(numbers.count(n) <= problem.numbers.count(n) for n in numbers)
            assert check == ("yes" if value == problem.target else "no")
        if numbers:
            value, used = evaluate(last_answer(task.tokenizer.decode(ids)))
            assert (value, used) == (results[-1], tuple(sorted(numbers)))
            assert task.grade(problem, task.tokenizer.decode(ids)) == (results[-1] == problem.target)
        assert len(ids) == len(weights)
    assert back > 10


@pytest.mark.parametrize("numbers, used, operators", [((2, 3, 4), 3, "+-*"), ((2, 3, 3), 2, "+*/"), ((5, 2, 7, 1), 2, "-+")])
def test_right_answers_are_the_chains_that_grade_right(numbers, used, operators):
    """By brute force over everything of an answer's form: numbers, operators and brackets as the warm start writes them. Each is
    there once, and fits the room for an answer."""
    task = countdown(numbers=len(numbers), used=used, operators=operators, number_max=13)
    for target in range(1, 30):
        problem, expected = Problem(numbers, target), set()
        for chosen in itertools.permutations(numbers, used):
            for ops in itertools.product(operators, repeat=used - 1):
                words, running, whole = [str(chosen[0])], Fraction(chosen[0]), True
                for i, (op, number) in enumerate(zip(ops, chosen[1:])):
                    words = (["(", *words, ")"] if i else words) + [op, str(number)]
                    running = {"+": running + number, "-": running - number, "*": running * number, "/": running / number}[op]
                    whole &= running.denominator == 1 and running >= 1
                if whole and task.grade(problem, f"</think> <answer> {' '.join(words)} </answer>"):
                    expected.add(tuple(task.tokenizer.encode(" ".join(words) + " </answer>")))
        found = task.right_answers(problem)
        assert len(found) == len(expected) and set(map(tuple, found)) == expected
        assert all(len(answer) <= task.answer_tokens for answer in found)


def test_weights_of_going_back():
    """`<back>`, results and the check 1, the result that `<back>` names, operations and numbers 0.5."""
    seen = set()
    for _, ids, weights in traces(BACK, 40):
        start = 0
        for words in episodes_of(BACK, ids):
            steps = len(words) // 3 - 1
            expected = [1.0, 0.5, *[0.5, 0.5, 1.0] * steps, 1.0]
            assert weights[start : start + len(words)] == expected
            seen.add((words[0], steps, words[-1]))
            start += len(words)
    assert {("<try>", 2, "no"), ("<back>", 1, "no"), ("<back>", 1, "yes")} <= seen


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_how_often_a_failure_is_gone_back_from(rate):
    """Of the failures whose first operation a solution shares, too, `trace_backtrack` are followed by `<back>`; no others, and
    nothing after a success or at first."""
    task = countdown(trace_backtrack=rate, trace_repeat=0.0, trace_hint=0.0, max_solutions=4)
    backs = chances = 0
    for problem, ids, _ in traces(task, 500):
        rows, begun = episodes_of(task, ids), {
            (str(c.numbers[0]), c.ops[0], str(c.numbers[1])) for c in task.chains(problem)[problem.target]}
        assert not rows or rows[0][0] == "<try>"
        first = ()
        for before, now in zip(rows, rows[1:]):
            first = tuple(before[1:4]) if before[0] == "<try>" else first  # the first operation, which `<back>` keeps
            possible = before[-1] == "no" and first in begun
            chances, backs = chances + possible, backs + (now[0] == "<back>")
            assert now[0] == "<try>" or possible
    assert chances > 150 and abs(backs / chances - rate) <= 4 * (rate * (1 - rate) / chances) ** 0.5


# --- Episodes ---


@pytest.mark.parametrize("response, ends", [
    ("", []),
    ("</think> <answer> 3 </answer>", []),
    ("3 + 4 7", []),  # no <try>, no episode
    ("<try>", [1]),
    ("<try> 3 + 4 7", [5]),  # cut off
    ("<try> 3 no </think> <answer>", [3]),
    ("<try> 3 no <try> 4 no <try> 5 yes </think>", [3, 6, 9]),
    ("<try> 3 no <try> 4", [3, 5]),  # the last episode is cut off
    ("7 yes <try> 3 no <try> 4 no", [5, 8]),  # the first owns what stands before it
    ("<try> <try> <try>", [1, 2, 3]),
    ("<try> 3 </think> <try> 4 </think>", [2]),  # nothing after the thinking is an episode
    ("</think> <try> 4", []),
    ("<try> 3 no </answer>", [3]),  # a stray stop token ends the thinking too; it belongs to no episode
    ("</answer>", []),
    ("<try> 3 no <back> 4 no </think>", [3, 6]),  # going back is an episode too
    ("<back> 4 no <try> 3", [3, 5]),
    ("</think> <back> 4", []),
])
def test_episode_ends(response, ends, task):
    """Exclusive: before the next `<try>`, before `</think>` or a stray `</answer>`, or where the response was cut off."""
    assert task.episode_ends(task.tokenizer.encode(response)) == ends


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["<try>", "<back>", "3", "no", "</think>", "</answer>"]), max_size=25))
def test_episodes_partition_the_thinking(words):
    """With an episode, 0 < ends ascending, the last is where the thinking ends, and each has exactly one `<try>` or `<back>`."""
    task = countdown()
    ids = task.tokenizer.encode(" ".join(words))
    thinking = list(itertools.takewhile(lambda token: token not in (task.close_thinking, task.close_answer), ids))
    ends = task.episode_ends(ids)
    parts = [ids[a:b] for a, b in zip([0, *ends], ends)]
    opens = lambda ids: ids.count(task.open_episode) + ids.count(task.go_back)
    assert len(ends) == opens(thinking) and all(opens(part) == 1 for part in parts)
    assert sum(parts, []) == (thinking if ends else [])


# --- The audit behind the gates ---


def test_audit_of_flawless_traces_is_all_ones(task):
    """Warm-start traces are arithmetically right and answer what they found."""
    problems, rows, _ = zip(*traces(task, 100))
    rewards = [task.grade(problem, task.tokenizer.decode(ids)) for problem, ids in zip(problems, rows)]
    assert task.audit(problems, rows, rewards) == {"result": 1.0, "check_precision": 1.0, "check_recall": 1.0, "answer": 1.0}


def test_audit_counts_by_hand(task):
    """4 of 6 results right; 1 of 2 `yes` true; 1 of 2 hits said so; 1 of 2 traces with a hit answered right."""
    rows = ["<try> 3 * 7 21 + 4 25 yes "  # right in everything
            "<try> 3 + 7 11 + 4 16 yes </think> <answer> 3 * 7 + 4 </answer>",  # two wrong results and a wrong check
            "<try> 7 * 4 28 - 3 25 no "  # a hit that goes unnoticed
            "<try> 7 * 4 28 -"]  # cut off: not counted
    ids = [task.tokenizer.encode(row) for row in rows]
    audit = task.audit([PROBLEM, PROBLEM], ids, [1.0, 0.0])
    assert audit == {"result": 4 / 6, "check_precision": 1 / 2, "check_recall": 1 / 2, "answer": 1 / 2}
    assert set(task.audit([], [], []).values()) == {0.0}


def test_a_right_answer_to_what_was_not_found_passes_no_gate(task):
    """The gate asks whether found solutions are answered, and a guess was none: of one trace with a hit none is right."""
    rows = ["</think> <answer> 3 * 7 + 4 </answer>", "<try> 3 * 7 21 + 4 25 yes </think> <answer> 3 + 4 * 7 </answer>"]
    audit = task.audit([PROBLEM] * 2, [task.tokenizer.encode(row) for row in rows], [1.0, 0.0])
    assert audit["answer"] == 0.0 and audit["check_recall"] == 1.0


# --- Habits ---


def habits(task: Countdown, *responses: str, budget: int = 108) -> dict[str, float]:
    """Of responses to PROBLEM, which is 3 7 4 target 25."""
    return task.habits([PROBLEM] * len(responses), [task.tokenizer.encode(response) for response in responses], budget)


MISS, OTHER, HIT = "<try> 7 + 4 11 * 3 33 no", "<try> 3 + 4 7 * 7 49 no", "<try> 3 * 7 21 + 4 25 yes"
ANSWER = "</think> <answer> ( 3 * 7 ) + 4 </answer>"


def test_habits_by_hand(task):
    """Five attempts without a hit, of which the 2nd loops and the 4th repeats too; a hit; two rechecks."""
    found = habits(task, f"{MISS} {MISS} {OTHER} {MISS} {HIT} {HIT} {HIT} {ANSWER}", f"{OTHER} {ANSWER}")
    assert found == {"attempts": 8 / 2, "hit_rate": 1 / 6, "loops": 1 / 4, "repeats": 2 / 4, "rechecks": 2.0,
                     "stopped_unsolved": 1.0, "fooled": 0.0}


def test_a_hit_is_what_would_be_right_whatever_is_written(task):
    """Results and checks that are wrong neither make nor hide a hit, and do not make two attempts of one proposal differ."""
    assert habits(task, "<try> 3 * 7 21 + 4 26 no")["hit_rate"] == 1
    assert habits(task, "<try> 3 + 7 11 + 4 25 yes")["hit_rate"] == 0
    assert habits(task, "<try> 5 * 5 25 + 4 25 yes", "<try> 5 * 5 25 yes")["hit_rate"] == 0  # numbers that are not given
    assert habits(task, f"{MISS} {MISS.replace('33 no', '32 yes')}")["loops"] == 1
    assert habits(task, f"{HIT} {MISS} {MISS}") == habits(task, f"{HIT} {HIT} {OTHER}")  # rechecks, whatever they propose


def test_what_is_malformed_or_cut_off_is_no_attempt(task):
    """It is passed over; an attempt that is short of a number is one, but no hit."""
    assert habits(task, "<try> 3 * no", "<try> 3 * 7 21 +", "3 * 7 21 + 4 25 yes", "")["attempts"] == 0
    assert habits(task, f"{ANSWER} {HIT}")["attempts"] == 0  # after the thinking
    assert habits(task, "<try> 3 * 7 21 yes")["attempts"] == 1
    assert set(task.habits([], [], 108).values()) == {0.0}


@pytest.mark.parametrize("response, stopped_unsolved", [
    (f"{MISS} {ANSWER}", {9: 0, 17: 0, 18: 1}),  # 9 tokens of thinking and 9 of an attempt
    (f"{MISS} {MISS} {ANSWER}", {18: 0, 26: 0, 27: 1}),
    (ANSWER, {8: 0, 9: 1}),
    (f"{MISS} {MISS}", {19: 0, 108: 0}),  # cut off
    (f"{HIT} {ANSWER}", {108: 0}),  # solved
])
def test_who_stopped_unsolved(task, response, stopped_unsolved):
    """An unsolved trace that ended its thinking with room for another attempt."""
    assert {budget: habits(task, response, budget=budget)["stopped_unsolved"] for budget in stopped_unsolved} == stopped_unsolved


def test_who_was_fooled(task):
    """Who gave up, and last said `yes` to a failure; not who said it earlier, was right, or had no room left."""
    fooled = MISS.replace("no", "yes")
    assert habits(task, f"{OTHER} {fooled} {ANSWER}", f"{MISS} {ANSWER}", f"{fooled} {OTHER} {ANSWER}", ANSWER)["fooled"] == 1 / 4
    assert habits(task, f"{fooled} {HIT} {ANSWER}", f"{HIT} {fooled} {ANSWER}")["fooled"] == 0
    assert habits(task, f"{fooled} {ANSWER}", budget=17)["fooled"] == 0


def test_a_way_back_is_compared_as_the_whole_chain_that_it_stands_for():
    """7 + 4 = 11, back to 11 and - 3: the proposal (7 + 4) - 3. Back to what the last attempt does not hold: no proposal."""
    task = countdown(trace_backtrack=0.5)
    expressions = lambda response: [" ".join(chain.expression) for chain in task.proposals(task.tokenizer.encode(response))]
    assert expressions(f"{MISS} <back> 11 - 3 8 no") == ["( 7 + 4 ) * 3", "( 7 + 4 ) - 3"]
    assert expressions(f"{MISS} <back> 11 - 3 8 no <back> 11 * 3 33 no")[2] == "( 7 + 4 ) * 3"
    assert expressions(f"{MISS} <back> 10 - 3 7 no") == expressions(MISS)
    assert expressions(f"{MISS} <back> 33 + 3 36 no") == expressions(MISS)  # an attempt that is too short to go back to
    assert expressions("<back> 11 - 3 8 no") == []
    assert expressions("<try> 3 * 7 21 no <back> 21 + 4 25 yes") == ["3 * 7", "( 3 * 7 ) + 4"]
    assert expressions(f"{MISS} <back> 7 + 4 11 * 3 33 no") == expressions(MISS)  # nothing is kept: that is no way back
    assert habits(task, f"{MISS} <back> 11 * 3 33 no")["loops"] == 1
    assert habits(task, f"{MISS} <back> 11 - 3 8 no {MISS}") == habits(task, f"{MISS} {OTHER} {MISS}")
    assert habits(task, "<try> 3 * 7 21 - 4 17 no <back> 21 + 4 25 yes")["hit_rate"] == 1 / 2


@pytest.mark.parametrize("numbers", [3, 4])
def test_ways_back_of_warm_traces_stand_for_chains_that_the_oracle_knows(numbers):
    """Every proposal of a trace is one of the problem's chains, and it hits where its check says so."""
    task = countdown(numbers=numbers, used=numbers, target_max=60, max_solutions=20, trace_backtrack=0.6)
    back = 0
    for problem, ids, _ in traces(task, 60):
        written, proposals = list(task.attempts(ids)), task.proposals(ids)
        assert len(written) == len(proposals)
        known = {(chain.numbers, chain.ops, chain.results) for chains in task.chains(problem).values() for chain in chains}
        for (kind, _, _, check), chain in zip(written, proposals):
            back += kind == "back"
            assert (chain.numbers, chain.ops, chain.results) in known
            assert (chain.results[-1] == problem.target) == (check == "yes")
    assert back > 10


def test_habits_of_warm_traces_are_the_flaws_of_their_keys():
    """Exact at the extremes: always looping, never repeating, checking on and on, giving up at once."""
    measure = lambda task, count: task.habits(*list(zip(*traces(task, count)))[:2], 9 * task.config.trace_max_attempts)
    looping = measure(countdown(trace_repeat=1.0, trace_go_on=0.0, trace_give_up=0.0, trace_hint=0.0), 100)
    assert looping["loops"] == looping["repeats"] == 1 and looping["rechecks"] == looping["stopped_unsolved"] == 0
    searching = measure(countdown(trace_repeat=0.0, trace_go_on=0.0, trace_give_up=0.0, trace_hint=0.0), 100)
    assert searching["loops"] == searching["repeats"] == searching["stopped_unsolved"] == 0
    assert measure(countdown(trace_repeat=0.0, trace_go_on=1.0, trace_give_up=0.0, trace_hint=1.0), 50) == {
        "attempts": 12, "hit_rate": 1, "loops": 0, "repeats": 0, "rechecks": 11, "stopped_unsolved": 0, "fooled": 0}
    assert measure(countdown(trace_give_up=1.0), 30) == {
        "attempts": 0, "hit_rate": 0, "loops": 0, "repeats": 0, "rechecks": 0, "stopped_unsolved": 1, "fooled": 0}
    rate = measure(countdown(trace_repeat=0.4, trace_go_on=0.5, trace_give_up=0.1, trace_hint=0.0), 800)
    assert rate["loops"] == pytest.approx(0.4, abs=0.03) and rate["rechecks"] == pytest.approx(1, abs=0.15)


def test_the_audit_reads_going_back(task):
    """What follows `<back>` is an attempt like any other: 5 of 6 results are right, its `yes` counts, and so does its hit."""
    row = "<try> 3 + 7 10 + 4 14 no <back> 10 * 4 41 no <try> 3 * 7 21 - 4 17 no <back> 21 + 4 25 yes </think> <answer>"
    audit = task.audit([PROBLEM], [task.tokenizer.encode(row)], [0.0])
    assert audit == {"result": 5 / 6, "check_precision": 1.0, "check_recall": 1.0, "answer": 0.0}
    problems, rows, _ = zip(*traces(BACK, 40))
    rewards = [BACK.grade(problem, BACK.tokenizer.decode(ids)) for problem, ids in zip(problems, rows)]
    assert set(BACK.audit(problems, rows, rewards).values()) == {1.0}
