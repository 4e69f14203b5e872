"""Hashes of pages: a chain that is remembered in runs, and made once."""

import inspect
from array import array
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import BlockHash, init_none_hash
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from sink_vllm.engine import hashing
from sink_vllm.engine.hashing import PageHasher, RememberedRuns
from sink_vllm.policy.schedule import Schedule
from tests.conftest import ModelFactory
from tests.support.engine import Policy, running_engine
from tests.support.tiny_models import TinyLlama

BLOCK = 4
SCHEDULE = Schedule(sink_tokens=5, window=11, stride=8)
RUN = BLOCK * hashing._RUN  # tokens
TOKENS = [(7 * i) % 1000 for i in range(3 * RUN + 17)]


class Counting:
    """A hash function that says how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, what: Any) -> bytes:
        self.calls += 1
        return sha256(what)


@pytest.fixture(autouse=True)
def none_hash() -> None:
    init_none_hash(sha256)


def request_of(**settings: Any) -> Request:
    return Request("x", TOKENS, SamplingParams(max_tokens=1), None, **settings)


def one_by_one(request: Request, schedule: Schedule, tokens: list[int]) -> list[BlockHash]:
    """Page by page, each with a hasher of its own: nothing is ever remembered."""
    found: list[BlockHash] = []
    for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
        page, parent = tokens[begin : begin + BLOCK], found[-1] if found else None
        found += PageHasher(BLOCK, sha256).hashes(request, schedule, page, begin, parent)
    return found


def test_remembered_hashes_are_those_of_the_pages() -> None:
    hasher, request = PageHasher(BLOCK, sha256), request_of()

    first, second = (hasher.hashes(request, SCHEDULE, TOKENS) for _ in range(2))

    assert first == second == one_by_one(request, SCHEDULE, TOKENS)
    assert len(set(first)) == len(TOKENS) // BLOCK


def test_a_longer_prompt_hashes_what_is_new() -> None:
    count = Counting()
    hasher = PageHasher(BLOCK, count)
    hasher.hashes(request_of(), SCHEDULE, TOKENS)
    before = count.calls

    found = hasher.hashes(request_of(), SCHEDULE, [*TOKENS, *range(30)])

    assert found == one_by_one(request_of(), SCHEDULE, [*TOKENS, *range(30)])
    assert count.calls - before <= (17 + 30) // BLOCK


@pytest.mark.parametrize(
    ("settings", "schedule", "tokens"),
    [
        ({"cache_salt": "mine"}, SCHEDULE, TOKENS),
        ({"lora_request": LoRARequest("other", 1, "/nowhere")}, SCHEDULE, TOKENS),
        ({}, Schedule(sink_tokens=5, window=7, stride=12), TOKENS),
        ({}, SCHEDULE, [*TOKENS[: RUN + 3], 999, *TOKENS[RUN + 4 :]]),
    ],
    ids=["salt", "LoRA", "policy", "a token in the second run"],
)
def test_nothing_is_remembered_of_other_streams(
    settings: dict[str, Any], schedule: Schedule, tokens: list[int]
) -> None:
    hasher = PageHasher(BLOCK, sha256)
    ordinary = hasher.hashes(request_of(), SCHEDULE, TOKENS)
    request = request_of(**settings)

    found = hasher.hashes(request, schedule, tokens)

    assert found == one_by_one(request, schedule, tokens)
    assert found != ordinary


@pytest.mark.engine
def test_guard_requests_get_the_hasher_of_the_core(tiny_llama: ModelFactory) -> None:
    """What the patch takes away is what requests hash with, and nothing else asks for it."""
    folder = tiny_llama(TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=128))
    source = inspect.getsource(EngineCore)
    assert source.count("self.request_block_hasher") == 3  # None, made, given to requests
    assert "Request.from_engine_core_request(request, self.request_block_hasher)" in source

    with running_engine(folder, Policy(4, 92, 32), enable_prefix_caching=True) as engine:
        assert engine.core.request_block_hasher is not None
        engine.greedy([[1, 2, 3]], 2)

        assert engine.core.request_block_hasher is None


def test_an_unknown_prompt_costs_its_sink_pages_before_it_starts() -> None:
    """Without them nothing of it can be found, so the rest is hashed as it is computed."""
    count = Counting()
    hasher, tokens = PageHasher(BLOCK, count), array("i", TOKENS)

    def first_are_cached(_: object) -> bool:
        return False

    unknown = hasher.hashes_of_prompt(request_of(), SCHEDULE, tokens, 2, first_are_cached)
    assert count.calls == 2

    known = hasher.hashes_of_prompt(request_of(), SCHEDULE, tokens, 2, lambda _: True)
    assert known == one_by_one(request_of(), SCHEDULE, TOKENS)
    assert unknown == known[:2]


def test_one_prompt_of_any_length_leaves_what_others_come_back_to() -> None:
    """Runs that were asked for twice are not pushed out by those that are seen once."""
    count = Counting()
    hasher = PageHasher(BLOCK, count)
    hasher._runs = RememberedRuns(pages=8 * hashing._RUN)
    for _ in range(2):
        hasher.hashes(request_of(), SCHEDULE, TOKENS)
    endless = [(11 * i) % 997 for i in range(40 * RUN)]
    hasher.hashes(request_of(cache_salt="another"), SCHEDULE, endless)
    before = count.calls

    hasher.hashes(request_of(), SCHEDULE, TOKENS)

    assert count.calls - before == 17 // BLOCK  # less than a run is not remembered
