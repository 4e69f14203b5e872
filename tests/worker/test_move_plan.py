"""What a list of moves is turned into: bases, overlays, batches."""

from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.moves.plan import MovePlan, Overlay, independent_batches, split_turns

BLOCK = 32


def test_the_step_drawn_above_the_code() -> None:
    """The example of ``sink_vllm.worker.moves.plan``, number by number."""
    a = [PageMove(3, 9, 4, 16, 0), PageMove(1, 9, 0, 4, 32)]
    head, turned, sinks = (
        PageMove(22, 22, 4, 16, -96),
        PageMove(23, 23, 0, 16, -96),
        PageMove(5, 22, 0, 4, 0),
    )

    turns, others = split_turns([*a, head, turned, sinks], 16)

    assert turns == [turned]
    assert MovePlan.of(others, 16) == MovePlan(
        bases=[3, 22],
        pages=[9, 22],
        overlays=[
            Overlay(0, 4, [1], [32], slice(0, 1)),
            Overlay(4, 16, None, [-96], slice(1, 2)),
            Overlay(0, 4, [5], None, slice(1, 2)),
        ],
    )


def test_border_page_and_sinks_become_one_page() -> None:
    """The copied window page is the base, the rotated sinks are laid over it."""
    moves = [PageMove(7, 3, 4, 32, 0), PageMove(1, 3, 0, 4, 64)]

    plan = MovePlan.of(moves, BLOCK)

    assert plan == MovePlan([7], [3], [Overlay(0, 4, [1], [64], slice(0, 1))])


def test_all_streams_share_one_overlay() -> None:
    """The number of operations does not grow with the number of streams."""
    moves = []
    for i in range(64):
        moves += [PageMove(300 + i, 100 + i, 4, 32, 0), PageMove(200 + i, 100 + i, 0, 4, 32 * i)]
    moves[1] = moves[1]._replace(delta=32)

    plan = MovePlan.of(moves, BLOCK)

    assert len(plan.pages) == 64
    assert len(plan.overlays) == 1
    assert plan.overlays[0].at == slice(0, 64)


def test_a_page_that_is_not_fully_written_is_its_own_base() -> None:
    """Its other slots keep what they hold."""
    plan = MovePlan.of([PageMove(7, 3, 4, 20, 0)], BLOCK)

    assert plan == MovePlan([3], [3], [Overlay(4, 20, [7], None, slice(0, 1))])


def test_a_whole_page_is_rotated_in_scratch_memory() -> None:
    """In place or not: the source is the base, and no second page is read."""
    plan = MovePlan.of([PageMove(3, 3, 0, 32, -64), PageMove(5, 4, 0, 32, -64)], BLOCK)

    assert plan == MovePlan([3, 5], [3, 4], [Overlay(0, 32, None, [-64, -64], slice(0, 2))])


def test_kinds_of_pages_become_neighbours() -> None:
    """Sinks of 40 tokens: a head page of sinks alone, a mixed one, for every stream."""
    moves = []
    for i in range(3):
        a, b, c, head = (10 * i + 10 + j for j in range(4))
        moves += [PageMove(a, head, 0, 32, 64), PageMove(b, head + 100, 0, 8, 64)]
        moves += [PageMove(c, head + 100, 8, 32, 0)]

    plan = MovePlan.of(moves, BLOCK)

    assert [overlay.at for overlay in plan.overlays] == [slice(0, 3), slice(3, 6)]


def test_a_page_that_another_move_reads_is_not_turned_before() -> None:
    whole, partial = PageMove(3, 3, 0, 32, 64), PageMove(4, 4, 0, 31, 64)
    reading, alone = PageMove(3, 5, 0, 32, 0), PageMove(6, 6, 0, 32, 64)

    assert split_turns([whole, partial, reading, alone], 32) == ([alone], [whole, partial, reading])


def test_batches_are_whole_pages() -> None:
    """Moves to one page stay together, and no batch writes more pages than allowed."""
    moves = [move for i in range(7) for move in _eviction(100 + i, 200 + i, 300 + i)]

    batches = list(independent_batches(moves, 3))

    assert [len({move.dst for move in batch}) for batch in batches] == [3, 3, 1]
    assert sorted(move for batch in batches for move in batch) == sorted(moves)


def test_pages_are_read_before_they_are_written() -> None:
    """A re-anchoring rotates the page that the head page of the same step is made from."""
    streams = range(0, 40, 10)
    moves = [
        move for i in streams for move in (PageMove(i, i, 0, 32, -64), *_eviction(9, i, i + 1))
    ]

    batches = list(independent_batches(moves, 3))

    assert [len({move.dst for move in batch}) for batch in batches] == [3, 3, 2]
    order = [move for batch in batches for move in batch]
    assert sorted(order) == sorted(moves)
    for i in streams:
        read = next(k for k, move in enumerate(order) if (move.src, move.dst) == (i, i + 1))
        assert read < order.index(PageMove(i, i, 0, 32, -64))


def test_pages_in_a_circle_stay_in_one_batch() -> None:
    """Exchange of two pages: neither can be written first."""
    moves = [PageMove(1, 2, 0, 32, 0), PageMove(2, 1, 0, 32, 0), PageMove(3, 4, 0, 32, 0)]

    assert list(independent_batches(moves, 1)) == [moves[2:], moves[:2]]


def test_pages_rewritten_in_place_do_not_depend_on_each_other() -> None:
    moves = [PageMove(i, i, 0, 32, -64) for i in range(1, 6)]

    assert len(list(independent_batches(moves, 2))) == 3


def _eviction(sinks: int, window: int, head: int) -> list[PageMove]:
    return [PageMove(window, head, 4, 32, 0), PageMove(sinks, head, 0, 4, 64)]
