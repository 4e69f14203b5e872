"""What the project stands on, as data: one ``Seam`` per symbol of vLLM and way of using it."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """How the project depends on a symbol; the value is the heading of its table."""

    PATCH = "patch targets"
    OVERRIDE = "overridden methods and attributes"
    SWAP = "class swaps"
    PRIVATE = "private attributes used"
    GUARD = "sources that guards read"
    SET = "attributes set on objects of vLLM"
    IMPORT = "imports"
    PUBLIC = "public attributes used"
    OWN = "names of ours in subclasses of vLLM's classes"


class Place(NamedTuple):
    """Where our code depends on a symbol."""

    file: str
    """Relative to the repository."""
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Phrases:
    """What the guards of a source look for in it."""

    present: frozenset[str] = frozenset()
    counted: frozenset[str] = frozenset()
    """Must be there equally often."""
    absent: frozenset[str] = frozenset()

    def __or__(self, other: "Phrases") -> "Phrases":
        return Phrases(
            self.present | other.present,
            self.counted | other.counted,
            self.absent | other.absent,
        )

    def broken(self, before: str, now: str) -> list[str]:
        """Phrases that held in ``before`` and do not in ``now``."""
        gone = [one for one in self.present if one in before and one not in now]
        more = [one for one in self.counted if before.count(one) != now.count(one)]
        new = [one for one in self.absent if one not in before and one in now]
        return sorted({*gone, *more, *new})

    def found(self, before: str) -> bool:
        """Whether the guards say anything about this source."""
        return any(one in before for one in self.present | self.counted)


class Symbol(NamedTuple):
    """A name in vLLM: ``"vllm.module:Class.attribute"``; the module alone if ``path`` is empty."""

    module: str
    path: tuple[str, ...] = ()

    @classmethod
    def of(cls, spelled: str) -> "Symbol":
        module, _, path = spelled.partition(":")
        return cls(module, tuple(path.split(".")) if path else ())

    def __str__(self) -> str:
        return f"{self.module}:{'.'.join(self.path)}" if self.path else self.module


@dataclass(frozen=True, slots=True)
class Seam:
    """One symbol that the project stands on in one way."""

    kind: Kind
    symbol: Symbol
    places: tuple[Place, ...]
    record: str | None = None
    """File name in ``patches/``, without ``.md``."""
    phrases: Phrases | None = None
    """For sources that guards read; ``None`` if a guard takes them apart in its own way."""


def merged(seams: list[Seam]) -> list[Seam]:
    """One seam per kind and symbol, with all places; in order of kind and name."""
    together: dict[tuple[Kind, Symbol], Seam] = {}
    for seam in seams:
        key = seam.kind, seam.symbol
        other = together.get(key)
        if other is None:
            together[key] = seam
            continue
        phrases = (
            None if seam.phrases is None or other.phrases is None else seam.phrases | other.phrases
        )
        together[key] = Seam(
            *key,
            tuple(sorted({*other.places, *seam.places})),
            other.record or seam.record,
            phrases,
        )
    order = list(Kind)
    return sorted(together.values(), key=lambda one: (order.index(one.kind), str(one.symbol)))
