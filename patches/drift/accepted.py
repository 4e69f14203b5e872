"""Changes of vLLM that somebody has read and found to leave us alone: ``accepted.toml``.

An entry is for one text of one symbol. When the symbol changes again, it is a change again.
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

from patches.drift.seams import Symbol

ACCEPTED = Path(__file__).with_name("accepted.toml")
_KEYS = {"symbol", "version", "source", "why"}


class Accepted(NamedTuple):
    """One text of one symbol."""

    symbol: Symbol
    version: str
    """The first release with that text, for whoever reads the list."""
    source: str
    """The digest that the table shows, or ``"gone"``."""
    why: str


def read_accepted(path: Path = ACCEPTED) -> list[Accepted]:
    """The entries of the file.

    Raises:
        ValueError: an entry has no reason, or other keys.
    """
    entries = tomllib.loads(path.read_text()).get("accepted", [])
    for number, entry in enumerate(entries, start=1):
        if entry.keys() != _KEYS or not all(str(value).strip() for value in entry.values()):
            raise ValueError(
                f"{path.name}: entry {number} ({entry.get('symbol', 'without symbol')}) must have "
                f"a text for each of {', '.join(sorted(_KEYS))}."
            )
    return [
        Accepted(Symbol.of(one["symbol"]), one["version"], one["source"], one["why"])
        for one in entries
    ]
