"""Pages that the pool has reused come back, from host memory and disk: as if never lost."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sink_vllm.gate.refused import Refused
from tests.conftest import ModelFactory
from tests.end_to_end.test_parked import Setup
from tests.support.engine import (
    BLOCK_SIZE,
    Engine,
    Generated,
    Policy,
    asynchronous_scheduling,
    check_all_free,
    running_engine,
)
from tests.support.judge import judge, random_tokens
from tests.support.judge_stored import judge_chain
from tests.support.oracle import Oracle
from tests.support.remembered import Remembered
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=256, seed=1)
POLICY = Policy(4, 92, 32)
PAGES = -(-POLICY.capacity // BLOCK_SIZE) + -(-POLICY.S // BLOCK_SIZE) + 2
"""Of a pool for one stream."""
TALKS, TURNS = 4, 5
LARGE = 400
HOST = {"sink_host_gib": 0.05}


@dataclass(slots=True)
class Talk:
    """A conversation, sent again with every turn."""

    number: int
    tokens: list[int] = field(default_factory=list)
    answers: list[Generated] = field(default_factory=list)

    def turn(self, engine: Engine) -> None:
        turn = len(self.answers)
        self.tokens += random_tokens(
            20 + 9 * self.number + 50 * (turn == 0), self.number + 9 * turn
        )
        (answer,) = engine.greedy([self.tokens], 32)
        self.tokens += answer.tokens
        self.answers.append(answer)


@contextmanager
def engine_with(
    folder: Path, pages: int, options: dict[str, Any], **engine_args: Any
) -> Iterator[Engine]:
    with running_engine(
        folder,
        POLICY,
        enable_prefix_caching=True,
        num_gpu_blocks_override=pages,
        max_num_batched_tokens=200,
        additional_config=POLICY.additional_config() | options,
        **engine_args,
    ) as engine:
        yield engine
        check_all_free(engine)
        finish(engine)
        hibernation = engine.scheduler.hibernation
        if hibernation is not None:
            if hibernation.disk is not None:
                hibernation.disk.wait()
            hibernation.slots.check()
            assert not hibernation.slots._held


def finish(engine: Engine) -> None:
    """The step behind the last request, which ``LLM`` leaves for the next one and servers run."""
    while engine.scheduler.has_requests() or engine.core.batch_queue:
        engine.core.step_fn()


def talk(engine: Engine, talks: list[Talk], turns: int) -> None:
    """Turn by turn, one conversation after the other: each is idle while the others talk."""
    for _ in range(turns):
        for one in talks:
            one.turn(engine)


def check_equal(talks: list[Talk], wanted: list[Talk], *, cached: bool) -> None:
    """The tokens of ``wanted``, and with ``cached`` as many that were found."""
    for one, other in zip(talks, wanted, strict=True):
        answers, others = one.answers, other.answers
        assert [a.tokens for a in answers] == [a.tokens for a in others][: len(answers)]
        if cached:
            found = [a.cached_tokens for a in answers]
            assert found == [a.cached_tokens for a in others][: len(found)]


@pytest.fixture(scope="module")
def model(tiny_llama: ModelFactory) -> Path:
    return tiny_llama(SHAPE)


@pytest.fixture(scope="module")
def never_lost(model: Path) -> list[Talk]:
    """Conversations whose pages all stay in the pool, seen by the oracle."""
    talks = [Talk(number) for number in range(TALKS)]
    with engine_with(model, LARGE, {}) as engine:
        talk(engine, talks, TURNS)
    oracle = Oracle(model)
    for one in talks:
        last = one.answers[-1]
        judge(oracle, POLICY, [one.tokens[: last.prompt_len]], [last])
        assert last.evictions >= 4
        assert last.cached_tokens > POLICY.capacity
        assert len({tuple(answer.tokens) for answer in one.answers}) == TURNS
    return talks


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_conversations_equal_those_that_never_lost_a_page(
    asynchronous: bool, model: Path, never_lost: list[Talk]
) -> None:
    """Conversations on pages for one: the tokens of a large pool, and no token computed twice."""
    talks = [Talk(number) for number in range(TALKS)]
    with asynchronous_scheduling():
        engine_args = {"async_scheduling": asynchronous}
        with engine_with(model, PAGES, HOST, **engine_args) as engine:
            talk(engine, talks, TURNS)
            copied = engine.scheduler.hibernation.copied
            assert copied["back"] > TALKS * TURNS
            # What is new, and a page per eviction.
            assert copied["out"] <= sum(len(one.tokens) for one in talks) / BLOCK_SIZE * 2
            finish(engine)
            engine.llm.reset_prefix_cache()
            assert not engine.scheduler.hibernation.slots
    check_equal(talks, never_lost, cached=True)


def test_streams_say_where_their_pages_were(model: Path) -> None:
    """Appends to stored streams go on exactly from host memory, and say so."""
    with engine_with(model, PAGES, HOST) as engine:
        setup = Setup(POLICY, engine, Oracle(model))
        streams = setup.streams(3)
        told: list[str | None] = []
        for turn in range(7):
            for number, stream in enumerate(streams):
                new = random_tokens(30 + number, 50 * number + turn)
                told.append(_append(setup, stream, new))
        assert min(len(stream.all) for stream in streams) > 3 * POLICY.capacity
        assert set(told[:3]) == {None}
        assert told[-12:] == ["host"] * 12


def _append(setup: Setup, stream: Remembered, new: list[int]) -> str | None:
    before = list(stream.all)
    answers, chains = setup.append([stream], [new], 30)
    judge(setup.oracle, setup.policy, [[*before, *new]], answers)
    assert chains[0].base == 0
    return chains[0].resumed_from


def test_pages_on_disk_outlive_the_engine(
    model: Path, never_lost: list[Talk], tmp_path: Path
) -> None:
    """Another engine goes on exactly; with damaged files, too, and without them it computes."""
    disk = {"sink_disk": str(tmp_path / "pages"), "sink_disk_gib": 1}
    talks = [Talk(number) for number in range(TALKS)]
    with engine_with(model, PAGES, _few_slots() | disk) as engine:
        talk(engine, talks, 3)
        assert engine.scheduler.hibernation.copied["read"] > 0
        with pytest.raises(Refused, match="in use by another server"):
            _claim_again(engine)
    check_equal(talks, never_lost, cached=True)

    with engine_with(model, PAGES, _few_slots() | disk) as engine:
        hibernation = engine.scheduler.hibernation
        talk(engine, talks, 1)
        assert hibernation.copied["read"] >= 3 * TALKS
        check_equal(talks, never_lost, cached=True)
        _leave_files_only(engine)
        files = sorted((tmp_path / "pages").glob("*/pages/*/*.page"))
        for number, path in enumerate(files):
            _damage(path, number % 4)
        talk(engine, talks, 1)
    check_equal(talks, never_lost, cached=False)
    lost = [one.answers[-1].cached_tokens for one in talks]
    assert lost != [one.answers[-1].cached_tokens for one in never_lost]

    other = engine_with(model, PAGES, HOST | disk | {"sink_window": 60})
    with pytest.raises(Refused, match="has the pages of another server"):
        other.__enter__()


def test_damaged_pages_leave_the_survivors(model: Path, tmp_path: Path) -> None:
    """A stored stream goes on from its files, and from its survivors when none of them is whole."""
    disk = {"sink_disk": str(tmp_path), "sink_disk_gib": 1}
    with engine_with(model, PAGES, _few_slots() | disk) as engine:
        setup = Setup(POLICY, engine, Oracle(model))
        (stream,) = setup.streams(1)
        while stream.held.missing == 0:
            _append(setup, stream, random_tokens(60, len(stream.all)))
        _leave_files_only(engine)
        assert _append(setup, stream, random_tokens(9, 1)) == "disk"

        _leave_files_only(engine)
        files = sorted(tmp_path.glob("*/pages/*/*.page"))
        for number, path in enumerate(files):
            _damage(path, number % 3)
        assert len(files) >= 3
        position = stream.held.position
        evicted = setup.schedule.evicted(position)
        survivors = [stream.all[p] for p in setup.schedule.cached_positions(position)]
        new = random_tokens(40, 2)
        answers, chains = setup.append([stream], [new], 30)
        assert (chains[0].resumed_from, chains[0].base) == ("survivors", evicted)
        judge_chain(setup.oracle, POLICY, [*survivors, *new], answers[0], evicted)


def _leave_files_only(engine: Engine) -> None:
    """Neither the pool nor host memory has a page any more; what could be written is."""
    finish(engine)
    hibernation = engine.scheduler.hibernation
    hibernation.disk.wait()
    hibernation.slots.clear()
    assert engine.scheduler.kv_cache_manager.reset_prefix_cache()


def _few_slots() -> dict[str, float]:
    """Host memory for two streams."""
    page = BLOCK_SIZE * SHAPE.kv_heads * 2 * SHAPE.head_size * 4 * SHAPE.layers
    return {"sink_host_gib": 2 * PAGES * page / 2**30}


def _claim_again(engine: Engine) -> None:
    from sink_vllm.compat.disk_folder import engine_folder
    from sink_vllm.policy.config import SinkConfig

    config = SinkConfig.of(engine.scheduler.vllm_config)
    assert config is not None
    (path,) = Path(config.disk or "").glob("*/pages-of.json")
    layout = json.loads(path.read_text())["layout"]
    engine_folder(config, engine.scheduler.vllm_config, layout)


def _damage(path: Path, kind: int) -> None:
    data = path.read_bytes()
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(data[:-7])
    elif kind == 2:
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
