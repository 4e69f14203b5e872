"""The longest cached boundary, against trying every one; and how often pages are looked up."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from sink_vllm.engine.boundary import Needed, longest_boundary


def tables(
    cached: Sequence[Sequence[bool]], windows: Sequence[int], asked: Counter[tuple[int, int]]
) -> list[Needed]:
    """One table per row of ``cached``, each needing the last ``windows[i]`` pages."""

    def needed(index: int) -> Needed:
        def is_cached(page: int) -> bool:
            asked[index, page] += 1
            return cached[index][page]

        return Needed(lambda end: max(end - windows[index], 0), is_cached)

    return [needed(index) for index in range(len(cached))]


def by_trying(
    num_pages: int,
    least: int,
    cached: Sequence[Sequence[bool]],
    windows: Sequence[int],
    is_resumable: Callable[[int], bool],
) -> int | None:
    for end in range(num_pages, least - 1, -1):
        if is_resumable(end) and all(
            all(row[max(end - window, 0) : end])
            for row, window in zip(cached, windows, strict=True)
        ):
            return end
    return None


@pytest.mark.parametrize("windows", [(1,), (3,), (2, 1), (1, 3), (3, 3)])
def test_every_small_cache(windows: tuple[int, ...]) -> None:
    """Every set of cached pages of a short stream."""
    pages = 7 if len(windows) == 1 else 5
    rows = list(itertools.product((False, True), repeat=pages))
    for cached in itertools.product(rows, repeat=len(windows)):
        for least in (1, 3):
            asked: Counter[tuple[int, int]] = Counter()
            found = longest_boundary(
                pages, least, tables(cached, windows, asked), lambda end: end != 4
            )
            assert found == by_trying(pages, least, cached, windows, lambda end: end != 4)
            assert not asked or max(asked.values()) == 1


def test_gaps_in_one_table_of_a_long_stream_cost_one_pass() -> None:
    """20,000 pages that one table has and another has with gaps everywhere."""
    rng, pages = random.Random(1), 20_000
    full = [True] * pages
    windowed = [page < 50 or rng.random() < 0.7 for page in range(pages)]
    asked: Counter[tuple[int, int]] = Counter()

    found = longest_boundary(pages, 20, tables([full, windowed], (16, 30), asked), lambda _: True)

    assert found == by_trying(pages, 20, [full, windowed], (16, 30), lambda _: True)
    assert found is not None
    assert found < 1000  # nearly all of the way
    assert max(asked.values()) == 1
