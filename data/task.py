"""What a task is: problems, traces as tokens, a verdict. `Countdown` and `GSM8K` are two; another one fills in the same names.

    prompt <think> <try> an episode <try> another one </think> <answer> … </answer>

The tags are one token each, in every task, so nobody has to guess where an episode ends. A response begins inside of the
thinking: the prompt opens it.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from nanomrt.config import RunConfig
from nanomrt.tokenizer import Tokenizer

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<try>", "<back>")
SPLITS = ("train", "validation", "test", "ood")


def last_answer(response: str) -> str | None:
    """The last complete <answer> outside the thinking, or None. A response begins inside it: the prompt opened it."""
    spoken = re.sub(r"<think>.*?(?:</think>|$)", " ", "<think>" + response, flags=re.DOTALL)
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", spoken, flags=re.DOTALL)
    return answers[-1].strip() if answers else None


class Task(ABC):
    """All that training, sampling and evaluation know of a task. A problem is what a task makes of it, with a hashable `key`."""

    GATE_ADVICE: dict[str, str]  # by the name of a gate: what to do if a policy doesn't pass it

    def __init__(self, config: RunConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        _, self.attempt_tokens, self.answer_tokens, self.trace_tokens = config.token_counts
        self.open_thinking, self.close_thinking, self.open_answer, self.close_answer, self.open_episode, self.go_back = (
            map(tokenizer.id, TAGS))
        self.forced_stop = [self.close_thinking, self.open_answer]  # "time is up, answer now"

    # --- Problems ---

    def problems(self, split: str, count: int, seed: int | str) -> list[Any]:
        """`count` problems of one of SPLITS, with repetition, a function of (seed, split) and the config."""
        return list(islice(self.draws(split, seed), count))

    def draws(self, split: str, seed: int | str) -> Iterator[Any]:
        """The same as an endless iterator. Raises ValueError for an unknown split; when drawn from, UserError for one without
        problems."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        return self.drawn(split, random.Random(f"{seed}/{split}"))

    @abstractmethod
    def drawn(self, split: str, rng: random.Random) -> Iterator[Any]:
        """Endlessly, problems of one split; no problem is in two. Raises UserError with the fix if there are none."""

    @abstractmethod
    def parse(self, text: str) -> Any:
        """A problem from a user's words. Raises UserError with an example."""

    # --- Text ---

    @abstractmethod
    def prompt(self, problem: Any) -> list[int]:
        """A problem as tokens, `<think>` at the end."""

    @abstractmethod
    def show(self, ids: Sequence[int]) -> str:
        """Tokens for the eye."""

    @abstractmethod
    def warm_trace(self, problem: Any, rng: random.Random) -> tuple[list[int], list[float]]:
        """A response to learn before RL begins, and the weight of each of its tokens in the loss."""

    @property
    def forced_tokens(self) -> int:
        """The most that a forced answer takes, with its `</think> <answer>` and `</answer>`."""
        return len(self.forced_stop) + self.answer_tokens

    def thinking_tokens(self, response: Sequence[int]) -> int:
        """How many tokens a response thought before it answered: all, if it was cut off first."""
        endings = (i for i, token in enumerate(response) if token in (self.close_thinking, self.close_answer))
        return next(endings, len(response))

    def episode_ends(self, response: Sequence[int]) -> list[int]:
        """Where each episode of a response ends (exclusive): before the next `<try>` or `<back>`, before `</think>` (or a stray
        `</answer>`), or where the response was cut off.

        No `<try>`, no episode. The first episode owns whatever stands before its `<try>`.
        """
        close = self.thinking_tokens(response)
        opens = [i for i in range(close) if response[i] in (self.open_episode, self.go_back)]
        return [*opens[1:], close] if opens else []

    # --- Verdict ---

    def texts(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Responses as the grader reads them. A tag is one token: who spells one with others, to answer while still thinking, has
        said nothing, ''."""
        said, tags = self.tokenizer.decode_batch(responses), set(map(self.tokenizer.id, TAGS))
        return [text if sum(map(text.count, TAGS)) == sum(token in tags for token in response) else ""
                for text, response in zip(said, responses)]

    def answer(self, response: Sequence[int]) -> str:
        """What a response says in the end, so that equal answers are equal texts; '' if it says nothing."""
        return last_answer(*self.texts([response])) or ""

    @abstractmethod
    def right_answers(self, problem: Any) -> list[list[int]]:
        """The right answers as the warm start writes them: all that follows `<answer>`, `</answer>` included; each once."""

    @abstractmethod
    def grade(self, problem: Any, text: str) -> float:
        """1.0 if a response, given as text, answers rightly, else 0.0. The last complete answer counts; text isn't evaluated."""

    @abstractmethod
    def audit(self, problems: Sequence[Any], responses: Sequence[Sequence[int]], rewards: Sequence[float]) -> dict[str, float]:
        """What a policy must be able to do before RL can teach it: shares in 0..1, by the name of their gate (`gate_…`)."""

    @abstractmethod
    def habits(self, problems: Sequence[Any], responses: Sequence[Sequence[int]], thinking_budget: int) -> dict[str, float]:
        """How a policy thinks: what a table of accuracies doesn't explain."""
