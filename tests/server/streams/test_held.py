"""What a server holds of a stream: little at any age, and enough for every way to go on."""

from array import array
from dataclasses import dataclass, field
from random import Random

import msgspec
import pytest

from sink_vllm.policy.parked import Chain, Parked
from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.held import KEPT, Held

BLOCK = 4
SCHEDULES = [
    Schedule(sink_tokens=sinks, window=window, stride=stride)
    for sinks in (0, 1, 4, 6, 11)
    for window in (5, 8, 17)
    for stride in (BLOCK, 2 * BLOCK, 4 * BLOCK)
    # The border page is full when the stream first evicts, so that its hash is known.
    if not sinks % BLOCK or sinks % BLOCK + window >= BLOCK
]


def _hash(schedule: Schedule, chain: list[int], position: int) -> bytes:
    """Stands for the hash of the page that ends at ``position`` of a chain."""
    return repr((schedule.sink_tokens, position, hash(tuple(chain[:position])))).encode()


@dataclass
class _Engine:
    """The stream from its first token, and what an engine would tell of it."""

    schedule: Schedule
    tokens: list[int] = field(default_factory=list)
    base: int = 0
    """Where the cache was last built: of the survivors then."""

    @property
    def chain(self) -> list[int]:
        sinks = self.schedule.sink_tokens
        return [*self.tokens[:sinks], *self.tokens[sinks + self.base :]]

    def told(self, computed: int) -> Chain:
        """After so many computed tokens of the stream."""
        evictions = self.schedule.evictions(computed - self.base)
        sinks = self.schedule.sink_tokens // BLOCK * BLOCK
        chain = self.chain
        return Chain(
            base=self.base,
            anchors=tuple(
                (at := sinks + one * self.schedule.stride, _hash(self.schedule, chain, at))
                for one in range(max(evictions - 2, 1), evictions + 1)
            ),
            sinks=(b"sinks",) if evictions else (),
        )

    def check(self, held: Held, parked: Parked, sampled: bool) -> None:
        """All that is needed of the stream is there, and is what it should be."""
        schedule, chain = self.schedule, self.chain
        sinks, missing = schedule.sink_tokens, parked.missing
        assert held.position == len(self.tokens)
        assert parked.base == self.base
        assert list(held.tokens) == [*chain[:sinks], *chain[sinks + missing :]]
        known = set(range(sinks)) | set(range(sinks + missing, len(chain)))
        assert set(schedule.cached_positions(len(chain))) <= known
        if missing:
            start = sinks + missing
            assert start % BLOCK == 0
            assert parked.parent == _hash(schedule, chain, start)
            assert parked.sinks
            # Every boundary within the last page and KEPT strides is one to resume at.
            computed = len(chain) - sampled
            for end in range(
                max(computed - KEPT * schedule.stride, 0) // BLOCK, len(chain) // BLOCK
            ):
                if schedule.evictions(end * BLOCK + 1) > schedule.evictions(computed) - KEPT:
                    needed = schedule.cached_positions(end * BLOCK + 1)
                    assert set(needed) - {end * BLOCK} <= known


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_what_is_needed_is_held(schedule: Schedule) -> None:
    """Random turns, some of which end behind their survivors, some cut by a stop string."""
    random = Random(0)
    most = schedule.capacity + KEPT * schedule.stride + BLOCK
    forgotten = 0
    for stream in range(6):
        engine, held = _Engine(schedule), Held()
        for turn in range(30):
            new = [random.randrange(9) for _ in range(random.choice((1, 3, 20, 150)))]
            answer = [random.randrange(9) for _ in range(random.choice((0, 1, 7, 60)))]
            if turn and random.random() < 0.2:  # the pages are gone
                engine.base = schedule.evicted(len(engine.tokens) - engine.base) + engine.base
            engine.tokens += new
            held.extend(new)
            told = engine.told(len(engine.tokens))
            held.told(told)
            for token in answer:
                engine.tokens.append(token)
                held.extend([token])
                if (now := engine.told(len(engine.tokens) - 1)) != told:
                    held.told(told := now)
                    held.trim(schedule, sampled=True)
            held.trim(schedule, sampled=bool(answer))
            engine.check(held, held.parked(schedule), bool(answer))
            assert len(held.tokens) <= most
        forgotten += held.missing
        assert held.chain.base == engine.base, stream
    assert forgotten > 6 * schedule.capacity


def test_without_hashes_the_survivors_stay() -> None:
    """No prefix cache: what is held is what the next request computes."""
    schedule, held, tokens = Schedule(sink_tokens=4, window=20, stride=8), Held(), list[int]()
    for turn in range(40):
        before = len(tokens)
        tokens += range(turn, turn + 13)
        if held.missing:  # as the engine then goes on
            held.told(Chain(base=schedule.evicted(before)))
        held.extend(range(turn, turn + 13))
        held.trim(schedule, sampled=False)
        parked = held.parked(schedule)
        assert parked.parent is None
        survivors = [tokens[p] for p in schedule.cached_positions(len(tokens))]
        rest = len(survivors) - 4
        assert list(held.tokens[:4]) + list(held.tokens[-rest:]) == survivors
        assert len(held.tokens) <= schedule.capacity + (KEPT + 1) * schedule.stride


def test_a_million_tokens_take_no_more_than_ten_thousand() -> None:
    schedule = Schedule(sink_tokens=4, window=1000, stride=64)
    held, sizes, sent = Held(), dict[int, int](), dict[int, int]()
    for count in range(1, 101):
        held.extend(range(10_000))
        evictions = schedule.evictions(held.position)
        anchors = tuple(
            (4 // 16 * 16 + e * 64, b"%d" % e) for e in range(evictions - 2, evictions + 1)
        )
        held.told(Chain(anchors=anchors, sinks=(b"s",)))
        held.trim(schedule, sampled=False)
        request = (held.tokens.tolist(), held.parked(schedule).wire())
        sizes[count] = len(held.tokens)
        sent[count] = len(msgspec.msgpack.encode(request))
        assert len(held.chain.anchors) <= 8
    assert held.position == 10**6
    assert max(sizes.values()) <= schedule.capacity + 2 * 64 + 16
    # Token ids take up to three bytes each, and where pages begin differs by a stride.
    assert max(sent.values()) - min(sent.values()) <= 3 * 64 + 8


def test_a_copy_changes_by_itself() -> None:
    held = Held(array("i", range(500)))
    copy = held.copy()
    copy.extend([1])
    copy.told(Chain(anchors=((260, b"h"),)))
    copy.trim(Schedule(sink_tokens=4, window=92, stride=32), sampled=False)
    assert (held.position, held.missing, held.chain) == (500, 0, Chain())
    assert (copy.position, copy.missing) == (501, 256)
