"""GSM8K (Cobbe et al., arXiv 2110.14168): word problems of elementary mathematics, one step of the solution per episode.

    A bus has 14 seats on either side, and 9 are free. How many people sit in it?
    <think> <try> It has 14 x 2 = 28 seats. <try> Of these, 28 - 9 = 19 are taken. </think> <answer> 19 </answer>

The warm start teaches a pretrained model (`warm_from`), whose vocabulary gets the tags, how people wrote their solutions. The
data are two files, train.jsonl and test.jsonl, with a question and an answer per line; the answer's lines are its steps, and
`####` stands before its result. Problems too long for the config's limits are left out.
Left out: the calculator's annotations (<<14*2=28>>), which a policy that has no calculator can't use.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from data.task import TAGS, Task, last_answer
from nanomrt.config import RunConfig, UserError
from nanomrt.tokenizer import Tokenizer

SOURCE = "https://github.com/openai/grade-school-math/tree/master/grade_school_math/data"
PROBE = "It has 14 x 2 = $28.50."  # what a vocabulary must be able to say
NUMBER = r"-?\$?(?:\d{1,3}(?:,\d{3}){1,6}|\d{1,20})(?:\.\d{1,20})?"
EQUATION = re.compile(rf"(?<![\d.])(?:{NUMBER} ?[-+*/x] ?)*{NUMBER} ?= ?{NUMBER}", re.ASCII)
OF_TWO = re.compile(rf"({NUMBER}) ?([-+*/x]) ?({NUMBER}) ?= ?({NUMBER})", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """A question, the steps of a solution in words (none if a user asks), and its result."""

    question: str
    steps: tuple[str, ...]
    answer: Fraction

    @property
    def key(self) -> str:
        return self.question


def number(text: str) -> Fraction | None:
    """The value of a number as people write it; None if it is anything else.

    >>> number("$1,200.50"), number("-3."), number("75%"), number("three"), number("1,20"), number("3/4")
    (Fraction(2401, 2), Fraction(-3, 1), Fraction(75, 1), None, None, None)
    """
    found = re.fullmatch(rf"({NUMBER}) ?%?\.?", text.strip(), re.ASCII)
    return Fraction(re.sub(r"[$,]", "", found[1])) if found else None


def read(path: Path) -> list[Problem]:
    """The problems of a file. Raises UserError that says what to do if it is missing or no such file."""
    if not path.is_file():
        raise UserError(f"no file {path}: put GSM8K's train.jsonl and test.jsonl there ({SOURCE}), or name their folder with "
                        "--data_dir=…")
    problems = []
    for i, line in enumerate(path.open("rb"), 1):
        try:
            row = json.loads(line)
            solution, _, result = row["answer"].rpartition("####")
            steps = [re.sub(r"<<.*?>>", "", step).strip() for step in solution.splitlines()]
            problem = Problem(row["question"].strip(), tuple(step for step in steps if step), number(result))
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = None
        if problem is None or problem.answer is None:
            raise UserError(f'{path}, line {i}: expected {{"question": "…", "answer": "a step\\n…\\n#### a number"}}')
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} is empty: put GSM8K's there ({SOURCE})")
    return problems


class GSM8K(Task):
    """Problems, people's solutions, and the verdict."""

    GATE_ADVICE = {"result": "the model often computes wrongly: raise warm_steps, or take a larger one",
                   "answer": "responses do not end with a number: raise warm_steps"}

    def __init__(self, config: RunConfig):
        known, unseen = (read(Path(config.data_dir) / name) for name in ("train.jsonl", "test.jsonl"))
        asked = {problem.key for problem in unseen}
        known = [problem for problem in known if problem.key not in asked]  # nobody learns what the test asks
        short = lambda problem: len(problem.steps) < config.ood_min_steps
        held_out = lambda problem: hashlib.sha256(problem.question.encode()).digest()[0] < 26  # a tenth, whatever the machine
        pools = {"train": [problem for problem in known if short(problem) and not held_out(problem)],
                 "validation": [problem for problem in known if short(problem) and held_out(problem)],
                 "test": [problem for problem in unseen if short(problem)],
                 "ood": [problem for problem in unseen if not short(problem)]}  # longer solutions than any trained on
        vocabulary = Path(config.warm_from) / "tokenizer.json"
        if not vocabulary.is_file():
            raise UserError(f"no file {vocabulary}: name the folder of a pretrained model with --warm_from=…")
        tokenizer = Tokenizer.load(vocabulary).with_special(TAGS)
        if (back := tokenizer.decode(tokenizer.encode(PROBE)).strip()) != PROBE:
            raise UserError(f"the tokenizer of {config.warm_from} makes {back!r} of {PROBE!r}, so nothing could be graded: take "
                            "another model")
        super().__init__(config, tokenizer)
        self.pools = {split: [problem for problem, fits in zip(pool, self.fits(pool)) if fits] for split, pool in pools.items()}

    # --- Problems ---

    def fits(self, problems: Sequence[Problem]) -> list[bool]:
        """Which problems keep within the config's limits, in tokens."""
        config, lengths = self.config, lambda texts: map(len, self.tokenizer.encode_batch(texts))
        questions = lengths([problem.question for problem in problems])
        answers = lengths([written(problem.answer) for problem in problems])
        steps = lengths([step for problem in problems for step in problem.steps])
        fits = []
        for problem, question, answer in zip(problems, questions, answers):
            step = [1 + next(steps) for _ in problem.steps]  # 1: <try>
            fits.append(question < config.prompt_tokens and max(step, default=0) <= config.step_tokens and
                        sum(step) <= config.solution_tokens and answer < self.answer_tokens)
        return fits

    def drawn(self, split: str, rng: random.Random) -> Iterator[Problem]:
        pool = self.pools[split]
        if not pool:
            raise UserError(f"no {split} problem of {self.config.data_dir} keeps within the limits: raise prompt_tokens, "
                            "step_tokens or solution_tokens, or change ood_min_steps")
        while True:
            yield rng.choice(pool)

    def parse(self, text: str) -> Problem:
        """A problem from a user's words, with the right answer after ####. Raises UserError with an example."""
        question, _, result = text.rpartition("####")
        answer = number(result)
        if not question.strip() or answer is None:
            raise UserError("expected a question and its answer, such as 'Ann has 3 apples and buys 4: how many? #### 7', "
                            f"not {text!r}")
        return Problem(question.strip(), (), answer)

    # --- Text ---

    def prompt(self, problem: Problem) -> list[int]:
        return [*self.tokenizer.encode(problem.question), self.open_thinking]

    def show(self, ids: Sequence[int]) -> str:
        return " ".join(re.sub(r"(</?\w+>)", r" \1 ", self.tokenizer.decode(ids)).split())

    def warm_trace(self, problem: Problem, rng: random.Random) -> tuple[list[int], list[float]]:
        """The solution as it stands, every token with weight 1; nothing is random."""
        ids = []
        for step in self.tokenizer.encode_batch(problem.steps):
            ids += [self.open_episode, *step]
        ids += [*self.forced_stop, *self.right_answers(problem)[0]]
        return ids, [1.0] * len(ids)

    # --- Verdict ---

    def right_answers(self, problem: Problem) -> list[list[int]]:
        """One: the result as the warm start writes it."""
        return [[*self.tokenizer.encode(written(problem.answer)), self.close_answer]]

    def answer(self, response: Sequence[int]) -> str:
        """The last complete answer's number; '' if it is none."""
        value = number(super().answer(response))
        return "" if value is None else str(value)

    def grade(self, problem: Problem, text: str) -> float:
        """1.0 if the last complete answer of a response, given as text, outside the thinking is the right number."""
        return float(number(last_answer(text) or "") == problem.answer)

    def audit(self, problems: Sequence[Problem], responses: Sequence[Sequence[int]],
              rewards: Sequence[float]) -> dict[str, float]:
        """Gates. result: of the written equations of two numbers, those that hold; answer: of the responses, those that answer
        with a number. A share of nothing is 0."""
        return {"result": self.habits(problems, responses, 0)["arithmetic"],
                "answer": sum(map(bool, map(self.answer, responses))) / max(len(responses), 1)}

    def habits(self, problems: Sequence[Problem], responses: Sequence[Sequence[int]], thinking_budget: int) -> dict[str, float]:
        """attempts: steps per trace;  repeats: of the steps after a trace's first, those that it said before, word for word;
        arithmetic: of the written equations of two numbers, those that hold. A share or mean of nothing is 0."""
        count: Counter[str] = Counter()
        for response in responses:
            ends = self.episode_ends(response)
            steps = [re.sub(r"<(try|back)>", "", text).strip() for text in
                     self.tokenizer.decode_batch([response[a:b] for a, b in zip([0, *ends], ends)])]
            count["steps"] += len(steps)
            count["later"] += len(steps[1:])
            count["repeats"] += sum(step in steps[:i] for i, step in enumerate(steps))
            for equation in filter(None, (OF_TWO.fullmatch(text) for step in steps for text in EQUATION.findall(step))):
                count["equations"] += 1
                count["hold"] += holds(*equation.groups())
        share = lambda part, whole: part / max(whole, 1)
        return {"attempts": share(count["steps"], len(responses)), "repeats": share(count["repeats"], count["later"]),
                "arithmetic": share(count["hold"], count["equations"])}


def written(answer: Fraction) -> str:
    """A result as a policy should write it: '72', '0.5'."""
    return f"{Decimal(answer.numerator) / answer.denominator:f}"


def holds(a: str, op: str, b: str, c: str) -> bool:
    """Whether a op b = c, to the hundredth that people round to.

    >>> holds("2", "/", "3", "0.67"), holds("$2", "x", "1,500", "$3,000"), holds("2", "+", "2", "5"), holds("1", "/", "0", "1")
    (True, True, False, False)
    """
    x, y, z = (number(text) for text in (a, b, c))
    if op == "/" and y == 0:
        return False
    value = x + y if op == "+" else x - y if op == "-" else x / y if op == "/" else x * y
    return abs(value - z) < Fraction(1, 100)
