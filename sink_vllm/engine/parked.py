"""Stored streams in the engine core: prompts with a gap, and what is told of them afterwards.

``policy.parked`` says what such a request is. To the engine it is a long prompt whose middle is
not there: the prefix cache is asked for boundaries behind the gap only, and if it has none the
stream goes on from its survivors, as after a preemption. Nothing of a stream stays here when its
request ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from sink_vllm.policy.parked import KEY, Chain, Parked, ResumedFrom
from sink_vllm.policy.schedule import EvictionPages, Schedule, cdiv

ANCHORS = 3
"""Windows whose beginnings are told: the cache may know the stream up to some strides ago only,
where a re-anchoring has rewritten pages."""


class GappedHashes(Sequence[BlockHash]):
    """Hashes of the full pages of a stream by their place in it, without those in a gap."""

    def __init__(self, first: Sequence[BlockHash], gap: int, rest: Sequence[BlockHash]) -> None:
        """``gap`` pages are unknown between ``first`` and ``rest``."""
        self._first, self._rest = list(first), list(rest)
        self._begin = len(first) + gap

    def __len__(self) -> int:
        return self._begin + len(self._rest)

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...

    @overload
    def __getitem__(self, index: slice) -> list[BlockHash]: ...

    def __getitem__(self, index: int | slice) -> BlockHash | list[BlockHash]:
        if isinstance(index, slice):
            begin, end, _ = index.indices(len(self))
            return [self[page] for page in range(begin, end)]
        if 0 <= index < len(self._first):
            return self._first[index]
        if index < self._begin:
            raise IndexError(f"page {index} is in the gap of the stream")
        return self._rest[index - self._begin]


@dataclass(frozen=True, slots=True)
class Dropped:
    """What an eviction dropped: ``g`` tokens, and the hashes of as many pages."""

    tokens: Sequence[int]
    hashes: Sequence[BlockHash]


@dataclass(frozen=True, slots=True)
class Lost:
    """What a stream was when it lost its pages (``comeback``)."""

    evictions: int
    evicted: int
    """Of its chain, as ``Stream`` counts them."""
    dropped: Dropped | None
    """By the last of them."""
    hashes: GappedHashes
    """Of the full pages of its chain."""
    sinks: Sequence[BlockHash]
    anchors: Sequence[tuple[int, BlockHash]]


def take_parked(request: Request) -> Parked | None:
    """What ``request`` says of its stream, which is no business of the workers'."""
    params = request.sampling_params
    if params is None or not params.extra_args or KEY not in params.extra_args:
        return None
    params.extra_args = dict(params.extra_args)
    given = params.extra_args.pop(KEY)
    params.extra_args = params.extra_args or None
    return given if isinstance(given, Parked) else Parked.read(given)


def least_pages(schedule: Schedule, parked: Parked | None, block_size: int) -> int:
    """Fewest pages before a boundary past the capacity, whose window lies behind a gap."""
    past = schedule.capacity // block_size + 1
    evictions = evictions_in_gap(schedule, parked)
    if not evictions:
        return past
    behind = cdiv(schedule.capacity + (evictions - 1) * schedule.stride, block_size)
    return max(behind, past)


def evictions_in_gap(schedule: Schedule, parked: Parked | None) -> int:
    """Evictions of the chain that the first window behind the gap has seen."""
    return 0 if parked is None else cdiv(parked.missing, schedule.stride)


def anchor_position(schedule: Schedule, evictions: int, block_size: int) -> int:
    """Chain position of the first page with window tokens after so many evictions."""
    pages = EvictionPages.of(schedule, block_size)
    return pages.sink_full * block_size + evictions * schedule.stride


def anchors_of(
    schedule: Schedule,
    parked: Parked | None,
    hashes: Sequence[BlockHash],
    evictions: int,
    block_size: int,
) -> list[tuple[int, BlockHash]]:
    """Where the last windows began, of a chain that is resumed after so many evictions."""
    gap = evictions_in_gap(schedule, parked)
    anchors: list[tuple[int, BlockHash]] = []
    for one in range(max(evictions - ANCHORS + 1, gap, 1), evictions + 1):
        position = anchor_position(schedule, one, block_size)
        if one == gap:
            assert parked is not None
            assert parked.parent is not None
            anchors.append((position, BlockHash(parked.parent)))
        else:
            anchors.append((position, hashes[position // block_size - 1]))
    return anchors


def told(
    base: int,
    anchors: Sequence[tuple[int, BlockHash]],
    sinks: Sequence[BlockHash],
    resumed_from: ResumedFrom | None,
) -> dict[str, Any]:
    """What the account of a stored stream says for the requests to come."""
    return Chain(
        base=base,
        anchors=tuple((position, bytes(one)) for position, one in anchors),
        sinks=tuple(map(bytes, sinks)),
        resumed_from=resumed_from,
    ).wire()
