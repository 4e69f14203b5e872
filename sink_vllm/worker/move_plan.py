"""What a step's moves mean for each page they write: a base, and slots laid over it.

A written page is composed in scratch memory and written back whole. Its base is one page copied
as it is; parts of other pages are laid over it. If the moves write all slots of a page, the base
is the source of the longest of them, which then needs no further copy (and if that move rotates,
the rotation happens in the scratch page). If they do not, the base is the page itself, so that
its other slots keep what they hold.

Pure index arithmetic, on the host; the result is the same for all layers.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sink_vllm.plan import PageMove


class Overlay(NamedTuple):
    """Slots ``[begin, end)`` of several scratch pages, given by the same slots of others."""

    begin: int
    end: int
    sources: list[int] | None
    """Pages the slots are taken from; ``None``: from the scratch pages themselves."""
    deltas: list[int] | None
    """Rope positions the keys are rotated by; ``None``: copied bit by bit."""
    at: list[int]
    """Indices of the scratch pages they are laid over."""

    @property
    def contiguous(self) -> slice | None:
        """``at`` as a slice, if it is a range."""
        first, last = self.at[0], self.at[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.at) else None


@dataclass(slots=True)
class MovePlan:
    """Moves of one batch of pages, grouped so that each group is one operation."""

    bases: list[int]
    pages: list[int]
    """Page to be written for each base; no page twice."""
    overlays: list[Overlay]

    @classmethod
    def of(cls, moves: Sequence[PageMove], block_size: int) -> "MovePlan":
        """Group ``moves``; pages with the same kind of overlay become neighbours."""
        by_page: dict[int, list[PageMove]] = defaultdict(list)
        for move in moves:
            by_page[move.dst].append(move)

        composed = []
        for page, parts in by_page.items():
            base, laid = page, parts
            if sum(part.end - part.begin for part in parts) == block_size:
                longest = max(parts, key=lambda part: part.end - part.begin)
                base = longest.src
            laid = [part for part in parts if part.delta or part.src != base]
            kinds = sorted(
                (part.begin, part.end, part.src == base, part.delta == 0) for part in laid
            )
            composed.append((kinds, page, base, laid))
        composed.sort(key=lambda one: one[0])

        groups: dict[tuple[int, int, bool, bool], list[tuple[PageMove, int]]] = defaultdict(list)
        for at, (_, _, base, laid) in enumerate(composed):
            for part in laid:
                kind = (part.begin, part.end, part.src == base, part.delta == 0)
                groups[kind].append((part, at))
        overlays = [
            Overlay(
                begin,
                end,
                None if in_place else [part.src for part, _ in group],
                None if plain else [part.delta for part, _ in group],
                [at for _, at in group],
            )
            for (begin, end, in_place, plain), group in groups.items()
        ]
        return cls(
            bases=[base for _, _, base, _ in composed],
            pages=[page for _, page, _, _ in composed],
            overlays=overlays,
        )


def independent_batches(moves: Sequence[PageMove], pages: int) -> Iterator[Sequence[PageMove]]:
    """Split moves into batches that write at most ``pages`` pages each, if order cannot matter.

    Batches run one after the other, so a page written by one must not be read by another. If any
    page is both written and read by a move to another page, there is one batch.
    """
    written = {move.dst for move in moves}
    if len(written) <= pages or any(move.src in written and move.src != move.dst for move in moves):
        yield moves
        return
    ordered = sorted(moves, key=lambda move: move.dst)
    begin = count = 0
    for i, move in enumerate(ordered):
        if i and move.dst != ordered[i - 1].dst:
            count += 1
            if count == pages:
                yield ordered[begin:i]
                begin, count = i, 0
    yield ordered[begin:]
