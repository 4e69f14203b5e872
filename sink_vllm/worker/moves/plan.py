"""What a step's moves mean for each page they write: a base, and slots laid over it.

One step in pages of 16 tokens, with sink tokens S = 4 and stride g = 32. Stream A evicts for the
first time. Stream B evicts for the third time, which returns its rope offset of 64 to 0, so its
window turns by -(64 + g). Pages 1 and 5 keep the sinks s of A and B as first computed; page 3 is
in the prefix cache, too, so A may not change it. Written ``[page: stream positions it holds]``::

    before    A [ 1: s 4..15][ 2: 16..31][ 3: 32..47][ 4: 48..63]
              B [20: s 68..79][21: 80..95][22: 96..111][23: 112..127]

    moves      src   dst  begin  end  delta
              A  3 ->  9      4   16      0     36..47, which keep their slots
                 1 ->  9      0    4     32     s
              B 22 -> 22      4   16    -96     100..111
                23 -> 23      0   16    -96     112..127
                 5 -> 22      0    4      0     s

    after     A [ 9: s 36..47][ 4: 48..63]
              B [22: s 100..111][23: 112..127]

``split_turns`` takes out what is a rotation of a whole page that nobody else reads: 23. It is
turned where it lies. The other pages are composed in scratch memory and written back whole
(``MovePlan.of``). ``at`` counts the scratch pages::

    at         0                       1
    bases      3                       22                         copied into the scratch page
    overlays   [0, 4)  of 1, by 32     [4, 16) in place, by -96   laid over it, one by one
                                       [0, 4)  of 5, as it is
    pages      9                       22                         where it is written to

If the moves write all slots of a page, as here, its base is the source of the longest of them,
which needs no copy then; if that move rotates, the rotation happens in the scratch page. If they
do not, the base is the page itself, so that its other slots keep what they hold.

All bases and sources of a batch are read before its first page is written. Where a step has
several batches, ``independent_batches`` puts the one that reads a page before the one that writes
it. Pure index arithmetic, on the host; the result is the same for all layers.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from sink_vllm.policy.plan import PageMove
from sink_vllm.policy.schedule import cdiv


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
            base = page
            # No slot is written twice, so the lengths tell whether all slots are written.
            if sum(part.end - part.begin for part in parts) == block_size:
                longest = max(parts, key=lambda part: part.end - part.begin)
                base = longest.src
            # What comes with the base is laid already, unless it rotates.
            laid = [part for part in parts if part.delta or part.src != base]
            kinds = sorted(
                (part.begin, part.end, part.src == base, part.delta == 0) for part in laid
            )
            composed.append((kinds, page, base, laid))
        # An overlay is one slice of scratch pages: what is alike has to be side by side.
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


def in_kernel_pages(moves: Sequence[PageMove], tokens: int, split: int) -> list[PageMove]:
    """The same moves in the backend's pages of ``tokens``, ``split`` of which make a block."""
    parts = []
    for move in moves:
        for i in range(move.begin // tokens, cdiv(move.end, tokens)):
            begin = max(move.begin - i * tokens, 0)
            end = min(move.end - i * tokens, tokens)
            parts.append(
                PageMove(move.src * split + i, move.dst * split + i, begin, end, move.delta)
            )
    return parts


def split_turns(moves: Sequence[PageMove], tokens: int) -> tuple[list[PageMove], list[PageMove]]:
    """Moves that rotate a whole page in place which no other move reads, and the other moves.

    Args:
        tokens: per page.
    """
    read = {move.src for move in moves if move.src != move.dst}
    # A page that another move reads must be written after that move: it goes with the others.
    turns: list[PageMove] = []
    others: list[PageMove] = []
    for move in moves:
        whole = move.src == move.dst and move.end - move.begin == tokens
        (turns if whole and move.delta and move.src not in read else others).append(move)
    return turns, others


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
            order.add(move.src, move.dst)  # who reads a page is written before it is
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
