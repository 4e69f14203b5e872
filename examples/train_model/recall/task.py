"""The synthetic stream: facts are told once and asked for once, with noise in between.

Tokens come in groups of four::

    [BOS  noise noise noise]   first group, which holds the sink tokens: no fact is ever in it
    [TELL key   value noise]   a fact
    [ASK  key   value noise]   the question for it; ``value`` is the answer
    [noise noise noise noise]

Keys of a stream are distinct and values are drawn evenly, so that a question is answered by the one
fact with its key, and without that fact one guess in ``VALUES`` is right. No answer stands in the
stream before it is asked for, but as the fact.

Pure Python: no torch, nothing of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

GROUP = 4
"""Tokens of a group. Distances are multiples of it."""
KEYS, VALUES, NOISE = 32, 16, 45
BOS, TELL, ASK = 0, 1, 2
FIRST_KEY = 3
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_NOISE = FIRST_VALUE + VALUES
VOCABULARY = FIRST_NOISE + NOISE
CHANCE = 1 / VALUES
MOST_FACTS = 16
"""Of a stream; shorter ones have one for every four groups."""
_TRIES = 64


@dataclass(frozen=True, slots=True)
class Question:
    """Stream positions of a fact's value and of the answer, which is the same token."""

    fact: int
    answer: int

    @property
    def distance(self) -> int:
        """Tokens from the value as it was told to the value as it is asked for."""
        return self.answer - self.fact


@dataclass(frozen=True, slots=True)
class Stream:
    """Tokens and the questions among them, in the order of their answers."""

    tokens: tuple[int, ...]
    questions: tuple[Question, ...]


def make_stream(random: Random, groups: int, last: int | None = None) -> Stream:
    """A stream of ``groups`` groups with as many facts as find a place.

    Distances are drawn from all that fit, one half log-uniformly and one half evenly, then the
    place of the fact evenly.

    Args:
        last: if given, the last group is a question, and its fact is so many tokens before it.

    Raises:
        ValueError: ``last`` is no multiple of ``GROUP``, or does not fit.
    """
    tokens = [FIRST_NOISE + random.randrange(NOISE) for _ in range(groups * GROUP)]
    tokens[0] = BOS
    keys = random.sample(range(KEYS), min(MOST_FACTS, max(groups // 4, 1)))
    free = set(range(1, groups))
    places: list[tuple[int, int]] = []
    if last is not None:
        if last % GROUP or not GROUP <= last <= (groups - 2) * GROUP:
            raise ValueError(f"no question {last} tokens after its fact in {groups} groups")
        places.append((groups - 1 - last // GROUP, groups - 1))
    while len(places) < len(keys):
        for _ in range(_TRIES):
            near, any_of = int((groups - 1) ** random.random()), random.randrange(1, groups - 1)
            apart = random.choice((near, any_of))
            told = random.randrange(1, groups - apart)
            if {told, told + apart} <= free.difference(*places):
                places.append((told, told + apart))
                break
        else:
            break  # crowded
    questions = []
    for key, (told, asked) in zip(keys, places, strict=False):
        value = FIRST_VALUE + random.randrange(VALUES)
        for kind, group in ((TELL, told), (ASK, asked)):
            tokens[group * GROUP : group * GROUP + 3] = kind, FIRST_KEY + key, value
        questions.append(Question(told * GROUP + 2, asked * GROUP + 2))
    return Stream(tuple(tokens), tuple(sorted(questions, key=lambda one: one.answer)))
