"""Questions about text seen some lines ago, in a form a small model can answer and in the paper's.

``copy``       a line of real source code seen d lines ago is begun again; right is the exact
               continuation, token by token. Any language model that can copy can do it.
``registers``  the published recipe: ``line 17: REGISTER_CONTENT is 4711`` and, later, the question
               for it. For models of a size that follows instructions.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from examples.train_model.corpus import held_out_files

ANSWER_TOKENS = 3
SHORTEST, LONGEST = 25, 45  # characters of a line of the `copy` form


def code_lines(seed: int) -> list[str]:
    """Different lines of held-out source code, without indentation, shuffled."""
    lines = sorted(
        {
            line.strip()
            for path in held_out_files()
            for line in path.read_text(encoding="utf-8").splitlines()
            if SHORTEST <= len(line.strip()) <= LONGEST
        }
    )
    random.Random(seed).shuffle(lines)
    return lines


@dataclass(frozen=True, slots=True)
class Question:
    """Tokens to send, and whether what came back is right."""

    prompt: list[int]
    answer: list[int]
    tokens: int
    judge: Callable[[Sequence[int]], bool]


class Form(Protocol):
    """A stream of lines and questions about them."""

    def line(self, number: int) -> list[int]:
        """Tokens of a line; the same for the same number."""

    def question(self, number: int) -> Question:
        """The question about line ``number``; it ends its line itself, with the answer."""


class Copy:
    """Real lines of code; the second half of a line is asked for."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._encode = tokenizer.encode
        self._lines = code_lines(seed)

    def line(self, number: int) -> list[int]:
        text = self._lines[number % len(self._lines)] + "\n"
        ids: list[int] = self._encode(text, add_special_tokens=False)
        return ids

    def question(self, number: int) -> Question:
        ids = self.line(number)
        half = len(ids) // 2
        answer = ids[half : half + ANSWER_TOKENS]
        return Question(ids[:half], ids[half:], len(answer), lambda made: list(made) == answer)


class Registers:
    """Register contents, as in the paper's example."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed

    def line(self, number: int) -> list[int]:
        return self._ids(f"line {number}: REGISTER_CONTENT is <{self._content(number)}>\n")

    def question(self, number: int) -> Question:
        content = str(self._content(number))
        asked = f"Question: what is the REGISTER_CONTENT in line {number}? Answer: <"
        answer = self._ids(f"{content}>\n")
        return Question(
            self._ids(asked),
            answer,
            len(answer),
            lambda made: self._tokenizer.decode(made).strip().startswith(content),
        )

    def _content(self, number: int) -> int:
        return random.Random(f"{self._seed}/{number}").randrange(1000, 100_000)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


FORMS: dict[str, Callable[[Any, int], Form]] = {"copy": Copy, "registers": Registers}
