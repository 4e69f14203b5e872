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
from contextlib import suppress
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from sink_vllm.policy.plan import PageMove


class Overlay(NamedTuple):
    """Slots ``[begin, end)`` of several scratch pages, given by the same slots of others."""

    begin: int
    end: int
    sources: list[int] | None
    """Pages the slots are taken from; ``None``: from the scratch pages themselves."""
    deltas: list[int] | None
    """Rope positions the keys are rotated by; ``None``: copied bit by bit."""
    at: slice
    """The scratch pages they are laid over: neighbours, so that they can be worked on in place."""


class _Run(NamedTuple):
    """Parts of one kind in pages that are neighbours."""

    first: int
    parts: list[PageMove]

    @property
    def end(self) -> int:
        return self.first + len(self.parts)


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

        runs: dict[tuple[int, int, bool, bool], list[_Run]] = defaultdict(list)
        for at, (_, _, base, laid) in enumerate(composed):
            for part in laid:
                of_kind = runs[part.begin, part.end, part.src == base, part.delta == 0]
                if not of_kind or of_kind[-1].end != at:
                    of_kind.append(_Run(at, []))
                of_kind[-1].parts.append(part)
        overlays = [
            Overlay(
                begin,
                end,
                None if in_place else [part.src for part in run.parts],
                None if plain else [part.delta for part in run.parts],
                slice(run.first, run.end),
            )
            for (begin, end, in_place, plain), of_kind in runs.items()
            for run in of_kind
        ]
        return cls(
            bases=[base for _, _, base, _ in composed],
            pages=[page for _, page, _, _ in composed],
            overlays=overlays,
        )


def independent_batches(moves: Sequence[PageMove], pages: int) -> Iterator[Sequence[PageMove]]:
    """Split moves into batches that write at most ``pages`` pages each.

    Batches run one after the other, so a page that one of them writes is read by none after it:
    whoever reads it from elsewhere comes before. Pages that read each other in a circle, which no
    scheduler of ours asks for, stay together as the last batch, however many they are.
    """
    to_page: dict[int, list[PageMove]] = defaultdict(list)
    for move in moves:
        to_page[move.dst].append(move)
    if len(to_page) <= pages:
        yield moves
        return
    order = TopologicalSorter(dict.fromkeys(sorted(to_page), ()))
    for move in moves:
        if move.src != move.dst and move.src in to_page:
            order.add(move.src, move.dst)
    with suppress(CycleError):  # what is not in a circle is ordered all the same
        order.prepare()
    ordered: list[int] = []
    while ready := order.get_ready():
        ordered += ready
        order.done(*ready)
    for first in range(0, len(ordered), pages):
        yield [move for page in ordered[first : first + pages] for move in to_page.pop(page)]
    if to_page:
        yield [move for left in to_page.values() for move in left]
