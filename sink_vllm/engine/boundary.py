"""The longest boundary of a stream that is cached in all page tables (pure arithmetic)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Needed:
    """What one page table needs to be resumed at a boundary."""

    first: Callable[[int], int]
    """First page that is needed before a boundary; never grows when the boundary shrinks."""
    is_cached: Callable[[int], bool]
    """Whether the prefix cache has a page."""


def longest_boundary(
    num_pages: int,
    least_pages: int,
    tables: Sequence[Needed],
    is_resumable: Callable[[int], bool],
) -> int | None:
    """The longest boundary with all pages it needs in the cache; each page is looked up once.

    Args:
        num_pages: consider boundaries of at most that many pages,
        least_pages: and of at least that many.
        tables: of one stream.
        is_resumable: what else a boundary must be.

    Returns:
        Pages before the boundary; ``None`` if every window has gaps.
    """
    end = num_pages
    known = [end] * len(tables)  # pages [known, end) are cached, per table
    while end >= least_pages:
        if not is_resumable(end):
            end -= 1
            continue
        gap = None
        for index, table in enumerate(tables):
            low, first = min(known[index], end), table.first(end)
            while low > first and table.is_cached(low - 1):
                low -= 1
            known[index] = low
            if low > first:
                gap = low - 1
                break
        if gap is None:
            return end
        # Every boundary between the gap and this one needs the page that is missing.
        end = gap
    return None
