"""Countdown on a pocket calculator: reach a target from given numbers, one attempt per episode.

    numbers 3 7 4 target 25 <think> <try> 7 + 4 11 * 3 33 no <try> 3 * 7 21 + 4 25 yes </think>
    <answer> ( 3 * 7 ) + 4 </answer>

An attempt is an *episode*: `<try>`, then a chain `a op b r op c v` that applies one operation after the other to a running
result (7 + 4 = 11, 11 * 3 = 33), then a check of v against the target. `<back> 11 - 3 8 no` is an episode too: it goes back to
a running result of the last attempt and on from there. Each number is one token. The vocabulary has no `=`, which saves two
tokens in nine of every attempt; `Countdown.show` writes it for the eye.

Warm-start traces search at random, with flaws that the config sets, so that reinforcement learning has something to improve:
they try what has just failed once more, check over and over what has just succeeded, and give up early. Problems are drawn by
(seed, split) and belong to exactly one split by a hash of their key (sorted numbers, target).
Left out: chains whose running result is not a whole number in 1..max_value (no trace ever contains one), and expressions
that are no chain, like (a*b)+(c*d). The grader accepts both.
"""

import ast
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import permutations, product

from data.task import TAGS, Task, last_answer
from nanomrt.config import RunConfig, UserError
from nanomrt.tokenizer import Tokenizer

MAX_ANSWER_CHARS = 200  # a longer answer is wrong: it bounds what the parser sees
MAX_MISSES = 20_000  # draws in a row that are none of a split's problems: then it is taken to have none


@dataclass(frozen=True)
class Problem:
    """Reach `target` with an expression of exactly `used` (a key) of `numbers`, each at most as often as it is given."""

    numbers: tuple[int, ...]
    target: int

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """What makes two problems the same: the order in which the numbers are shown does not."""
        return tuple(sorted(self.numbers)), self.target


@dataclass(frozen=True)
class Chain:
    """An attempt: numbers[0] ops[0] numbers[1] ops[1] …, with the running results after each operation."""

    numbers: tuple[int, ...]
    ops: tuple[str, ...]
    results: tuple[int, ...]

    def attempt(self, kept: int = 0) -> list[str]:
        """As an episode is written: from the beginning, or back to where `kept` operations of the last attempt were done."""
        words = ["<back>", str(self.results[kept - 1])] if kept else ["<try>", str(self.numbers[0])]
        for op, number, result in zip(self.ops[kept:], self.numbers[kept + 1 :], self.results[kept:]):
            words += [op, str(number), str(result)]
        return words

    @property
    def expression(self) -> list[str]:
        """The same with brackets in place of the running results, as an answer is written."""
        words = [str(self.numbers[0])]
        for i, (op, number) in enumerate(zip(self.ops, self.numbers[1:])):
            words = (["(", *words, ")"] if i else words) + [op, str(number)]
        return words


@lru_cache(maxsize=100_000)
def solve(numbers: tuple[int, ...], used: int, operators: str, max_value: int) -> dict[int, list[Chain]]:
    """Every chain over `used` of the (sorted) `numbers`, by the value it reaches. The oracle, and the proposer.

    >>> [" ".join(chain.expression) for chain in solve((3, 4, 7), 3, "+-*", 100)[33]]
    ['( 4 + 7 ) * 3', '( 7 + 4 ) * 3']
    """
    chains: dict[int, list[Chain]] = {}
    for chosen in sorted(set(permutations(numbers, used))):
        for ops in product(operators, repeat=used - 1):
            results, value = [], chosen[0]
            for op, number in zip(ops, chosen[1:]):
                value = _apply(op, value, number)
                if value is None or value.denominator != 1 or not 1 <= value <= max_value:
                    break
                value = int(value)  # whole so far: integers are many times faster than fractions
                results.append(value)
            else:
                chains.setdefault(results[-1], []).append(Chain(chosen, ops, tuple(results)))
    return chains


def _apply(op: str, a: int | Fraction, b: int | Fraction) -> int | Fraction | None:
    """a op b, exactly; None for a division by 0."""
    if op == "/":
        return Fraction(a, b) if b else None
    return a + b if op == "+" else a - b if op == "-" else a * b


# --- The grader: text in, verdict out, nothing evaluated ---

_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


@lru_cache(maxsize=65_536)
def evaluate(expression: str) -> tuple[Fraction, tuple[int, ...]] | None:
    """(value, sorted numbers used) of an expression of whole numbers, + - * / and brackets; None if it is anything else.

    >>> evaluate("( 3 * 7 ) + 4")
    (Fraction(25, 1), (3, 4, 7))
    >>> evaluate("97**98**9") is evaluate("1.5*4") is evaluate("--5") is evaluate("1/0") is None
    True
    """
    # Names, decimals and non-ASCII digits end here. `**` and `//` parse, but are none of _OPERATORS: nothing computes them.
    if len(expression) > MAX_ANSWER_CHARS or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # unbalanced, leading zeros, nested too deeply
        return None
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction | None:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**6:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            a, b = value(node.left), value(node.right)
            return None if a is None or b is None else _apply(_OPERATORS[type(node.op)], a, b)
        return None

    result = value(tree)
    return None if result is None else (result, tuple(sorted(numbers)))


class Countdown(Task):
    """Problems, search traces with flaws, and the verdict."""

    GATE_ADVICE = {
        "result": "intermediate results are often wrong: raise warm_steps",
        "check_precision": "`yes` is said too often: raise warm_steps, or lower trace_hint",
        "check_recall": "solutions go unnoticed: raise warm_steps or trace_hint",
        "answer": "solved traces do not lead to their answer: raise warm_steps or trace_hint",
    }

    def __init__(self, config: RunConfig):
        if not 2 <= config.used <= config.numbers <= config.number_max:
            raise UserError(f"need 2 <= used <= numbers <= number_max, not used={config.used}, numbers={config.numbers}, "
                            f"number_max={config.number_max}")
        if not config.operators or not set(config.operators) <= set("+-*/") or len(set(config.operators)) < len(config.operators):
            raise UserError(f"operators={config.operators!r} must be some of '+-*/', each once")
        if not config.number_max <= config.target_max <= config.max_value:
            raise UserError(f"need number_max <= target_max <= max_value, not number_max={config.number_max}, "
                            f"target_max={config.target_max}, max_value={config.max_value}")
        words = ("numbers", "target", "yes", "no", "(", ")", "+", "-", "*", "/", *map(str, range(1, config.max_value + 1)))
        super().__init__(config, Tokenizer.from_words(words, ("<unk>", "<pad>", *TAGS)))

    # --- Problems ---

    def chains(self, problem: Problem) -> dict[int, list[Chain]]:
        return solve(problem.key[0], self.config.used, self.config.operators, self.config.max_value)

    def split_of(self, problem: Problem) -> str | None:
        """The one split a problem belongs to; None if it has no solution or too many."""
        config, solutions = self.config, len(self.chains(problem).get(problem.target, ()))
        if not 1 <= solutions <= config.max_solutions or not config.target_min <= problem.target <= config.target_max:
            return None
        if problem.target >= config.ood_target_min and solutions <= config.ood_max_solutions:
            return "ood"  # large targets with few solutions: harder than anything trained on
        bucket = hashlib.sha256(repr(problem.key).encode()).digest()[0]  # 0..255, the same on every machine
        return "test" if bucket < 26 else "validation" if bucket < 52 else "train"

    def drawn(self, split: str, rng: random.Random) -> Iterator[Problem]:
        config, missed = self.config, 0
        while True:
            numbers = tuple(rng.sample(range(1, config.number_max + 1), config.numbers))
            targets = sorted(solve(tuple(sorted(numbers)), config.used, config.operators, config.max_value))
            problem = Problem(numbers, rng.choice(targets)) if targets else None
            if problem and self.split_of(problem) == split:
                yield problem
                missed = 0
            elif (missed := missed + 1) == MAX_MISSES:
                raise UserError(f"no {split} problem in {missed:,} draws: " +
                                ("lower ood_target_min or raise ood_max_solutions" if split == "ood" else
                                 "widen target_min..target_max or raise max_solutions"))

    # --- Text ---

    def prompt(self, problem: Problem) -> list[int]:
        return self.tokenizer.encode(f"numbers {' '.join(map(str, problem.numbers))} target {problem.target} <think>")

    def parse(self, text: str) -> Problem:
        """A problem from a user's words, such as '3 7 4 target 25' or '3 7 4 = 25'. Raises UserError with an example."""
        config, numbers = self.config, [int(word) for word in re.findall(r"-?[0-9]{1,20}", text)]
        if len(numbers) != config.numbers + 1:
            example = " ".join(map(str, range(2, config.numbers + 2)))
            raise UserError(f"expected {config.numbers} numbers and a target, such as '{example} target {config.target_max}', "
                            f"not {text!r}")
        if not all(1 <= number <= config.max_value for number in numbers):
            raise UserError(f"the model knows the numbers 1 to {config.max_value} only")
        return Problem(tuple(numbers[:-1]), numbers[-1])

    def show(self, ids: Sequence[int]) -> str:
        """`ids` for the eye: a number that follows an operation is its result."""
        return re.sub(r"([-+*/] \d+) (?=\d)", r"\1 = ", self.tokenizer.decode(ids))

    def warm_trace(self, problem: Problem, rng: random.Random) -> tuple[list[int], list[float]]:
        """A response by random search, flaws included, and the weight of each token in the warm start's loss.

        The answer is the success's, and without one the last attempt's. Unless `trace_wander` is set, whoever has succeeded only
        checks that again, so both are the last attempt's.
        Proposals are random, so their tokens are mostly noise to learn and weigh half; checks weigh `warm_check_weight`.
        """
        config, by_value = self.config, self.chains(problem)
        proposals = [chain for value in sorted(by_value) for chain in by_value[value]]
        rng.shuffle(proposals)
        last, success, untried, words, weights = None, None, iter(proposals * config.trace_max_attempts), [], []
        for _ in range(config.trace_max_attempts):
            draw = rng.random()
            if draw < (1 - config.trace_go_on if success else config.trace_give_up):
                break
            kept, way = 0, None
            if last and not success and rng.random() < config.trace_backtrack:
                way = self.way_back(last, proposals, problem.target, rng)
            if way:
                last, kept = way
            elif success:
                # Who goes on has drawn 1 - trace_go_on or more: the upper share trace_wander of that wanders.
                last = next(untried) if draw >= 1 - config.trace_go_on * config.trace_wander else success
            elif last is None or rng.random() >= config.trace_repeat:
                last = rng.choice(by_value[problem.target]) if rng.random() < config.trace_hint else next(untried)
            hit = last.results[-1] == problem.target
            success = last if hit else success
            words += [*last.attempt(kept), "yes" if hit else "no"]
            weights += [1.0, 0.5] + [0.5, 0.5, 1.0] * (config.used - 1 - kept) + [config.warm_check_weight]
        answer = success or last or rng.choice(proposals)  # without an attempt, a guess
        ending = ["</think>", "<answer>", *answer.expression, "</answer>"]
        return [self.tokenizer.id(word) for word in words + ending], weights + [1.0] * len(ending)

    def way_back(self, failed: Chain, proposals: Sequence[Chain], target: int, rng: random.Random) -> tuple[Chain, int] | None:
        """A chain that shares its first `kept` operations with a failed attempt, and `kept`: the most for which some such chain
        reaches the target. The one returned may be right or wrong. None if there is none."""
        for kept in reversed(range(1, self.config.used - 1)):
            shared = failed.numbers[: kept + 1], failed.ops[:kept]
            ways = [way for way in proposals if (way.numbers[: kept + 1], way.ops[:kept]) == shared and way != failed]
            if any(way.results[-1] == target for way in ways):
                return rng.choice(ways), kept  # of right ones only, `yes` would always follow `<back>`, and no check be learned
        return None

    # --- Verdict ---

    def right_answers(self, problem: Problem) -> list[list[int]]:
        """One for each chain that reaches the target; none if no chain does."""
        return [[*map(self.tokenizer.id, chain.expression), self.close_answer]
                for chain in self.chains(problem).get(problem.target, ())]

    def grade(self, problem: Problem, text: str) -> float:
        """1.0 if the last complete answer of a response, given as text, outside the thinking reaches the target with exactly
        `used` of the given numbers and the operators of the task, else 0.0."""
        answer = last_answer(text) or ""
        result = evaluate(answer)
        if result is None or set(answer) & set("+-*/") - set(self.config.operators):
            return 0.0
        value, numbers = result
        given = Counter(numbers) <= Counter(problem.numbers)
        return float(given and len(numbers) == self.config.used and value == problem.target)

    def audit(self, problems: Sequence[Problem], responses: Sequence[Sequence[int]],
              rewards: Sequence[float]) -> dict[str, float]:
        """What a policy must be able to do before RL can teach it to search: shares in 0..1, by the name of their gate.

        result: running results that are right; check_precision, check_recall: of `yes` against "the written value is the
        target"; answer: right answers among traces that wrote the target. A share of nothing is 0. The value that is written
        counts here; in `habits` it is what the attempt is worth.
        """
        count: Counter[str] = Counter()
        for problem, response, reward in zip(problems, responses, rewards):
            reached_once = False
            for _, value, steps, check in self.attempts(response):
                for op, number, result in steps:
                    count["results"] += 1
                    count["right"] += _apply(op, Fraction(value), number) == result
                    value = result
                reached = value == problem.target
                count["reached"] += reached
                count["yes"] += check == "yes"
                count["true_yes"] += reached and check == "yes"
                reached_once |= reached
            count["traces_reached"] += reached_once
            count["answered"] += bool(reached_once and reward)
        share = lambda part, whole: count[part] / max(count[whole], 1)
        return {"result": share("right", "results"), "check_precision": share("true_yes", "yes"),
                "check_recall": share("true_yes", "reached"), "answer": share("answered", "traces_reached")}

    # --- Habits ---

    def attempts(self, response: Sequence[int]) -> Iterator[tuple[str, int, list[tuple[str, int, int]], str]]:
        """(try or back, first number, [(operator, number, result)], yes or no) of every attempt, as it is written.

        What is malformed or cut off is no attempt.
        """
        for attempt in self.tokenizer.decode(response).split("</think>")[0].split("<")[1:]:
            words = re.fullmatch(r"(try|back)> (\d+)((?: [-+*/] \d+ \d+)+) (yes|no)\s*", attempt)
            if words:
                steps = words[3].split()
                yield words[1], int(words[2]), list(zip(steps[::3], map(int, steps[1::3]), map(int, steps[2::3]))), words[4]

    def proposals(self, response: Sequence[int]) -> list[Chain]:
        """The whole chain that each attempt stands for: a `<back>` stands for the last attempt up to the running result that it
        goes back to, and then for what it writes. One that goes back to nothing of the kind stands for no chain."""
        found: list[Chain] = []
        for kind, first, steps, _ in self.attempts(response):
            ops, numbers, results = zip(*steps)
            if kind == "try":
                found.append(Chain((first, *numbers), ops, results))
                continue
            kept = self.config.used - 1 - len(steps)  # the operations that it need not write again
            if kept > 0 and found and found[-1].results[kept - 1 : kept] == (first,):
                last = found[-1]
                found.append(Chain(last.numbers[: kept + 1] + numbers, last.ops[:kept] + ops, last.results[:kept] + results))
        return found

    def habits(self, problems: Sequence[Problem], responses: Sequence[Sequence[int]], thinking_budget: int) -> dict[str, float]:
        """How a policy searches. A hit is an attempt that would be a right answer, whatever its results and its check say; a
        trace is solved by its first one. A share or mean of nothing is 0.

        attempts: per trace;  hit_rate: hits among the attempts before which the trace was unsolved;
        loops, repeats: of the attempts that follow a failure in an unsolved trace, those that propose what the one just before,
        or any one before, proposed already;  rechecks: attempts after the first hit, per solved trace;
        stopped_unsolved: of the unsolved traces, those that stopped thinking with room for another attempt;
        fooled: of the unsolved traces, those that did so right after a `yes`, a false one.
        """
        count: Counter[str] = Counter()
        for problem, response in zip(problems, responses):
            before, solved = [], False  # what was proposed so far
            for chain in self.proposals(response):
                if solved:
                    count["rechecks"] += 1
                    continue
                proposal = chain.numbers, chain.ops
                count["open"] += 1
                count["after_failure"] += bool(before)
                count["loops"] += before[-1:] == [proposal]
                count["repeats"] += proposal in before
                solved = self.grade(problem, f"</think> <answer> {' '.join(chain.expression)} </answer>") == 1
                before.append(proposal)
            count["solved" if solved else "unsolved"] += 1
            thinking = self.thinking_tokens(response)
            room = thinking < len(response) and thinking + self.attempt_tokens <= thinking_budget  # it answered, and needn't have
            count["stopped_unsolved"] += room and not solved
            checks = [check for *_, check in self.attempts(response)]
            count["fooled"] += room and not solved and checks[-1:] == ["yes"]
        share = lambda part, whole: part / max(whole, 1)
        return {"attempts": share(count["open"] + count["rechecks"], count["solved"] + count["unsolved"]),
                "hit_rate": share(count["solved"], count["open"]),
                "loops": share(count["loops"], count["after_failure"]),
                "repeats": share(count["repeats"], count["after_failure"]),
                "rechecks": share(count["rechecks"], count["solved"]),
                "stopped_unsolved": share(count["stopped_unsolved"], count["unsolved"]),
                "fooled": share(count["fooled"], count["unsolved"])}
