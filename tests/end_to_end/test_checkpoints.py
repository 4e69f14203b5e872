"""A request that is longer than a server lives goes on from the last pages on disk."""

import shutil
from pathlib import Path

import pytest
from vllm import RequestOutput

from sink_vllm.engine.recycler import evictions_between_checkpoints
from sink_vllm.policy.schedule import Schedule
from tests.conftest import ModelFactory
from tests.end_to_end.test_hibernation import HOST, PAGES, POLICY, SHAPE, engine_with
from tests.support.engine import Engine, Generated, greedy_params
from tests.support.judge import random_tokens

pytestmark = pytest.mark.engine

SCHEDULE = Schedule(sink_tokens=POLICY.S, window=POLICY.W, stride=POLICY.g)
BETWEEN = evictions_between_checkpoints(SCHEDULE) * POLICY.g
PROMPT = random_tokens(BETWEEN + POLICY.capacity + 900, 1)


def test_a_prompt_goes_on_where_a_killed_server_had_come_to(
    tiny_llama: ModelFactory, tmp_path: Path
) -> None:
    """What is on disk in the middle of a prompt is all that the next engine has of it."""
    model = tiny_llama(SHAPE)
    killed, copied = tmp_path / "killed", tmp_path / "copied"
    with engine_with(model, PAGES, _disk(killed), guarded=False) as engine:
        whole = _answer(engine, copy=(killed, copied))
    with engine_with(model, PAGES, _disk(copied), guarded=False) as engine:
        (again,) = engine.greedy([PROMPT], 32)

    assert again.tokens == whole.tokens
    assert len(set(again.tokens)) > 4
    assert whole.cached_tokens == 0
    assert again.cached_tokens == BETWEEN + POLICY.capacity
    assert again.evictions == whole.evictions > BETWEEN / POLICY.g


def _answer(engine: Engine, copy: tuple[Path, Path]) -> Generated:
    """The whole answer; the folder is copied while the prompt is computed, behind a checkpoint."""
    source, target = copy
    llm_engine = engine.llm.llm_engine
    llm_engine.add_request("long", {"prompt_token_ids": PROMPT}, greedy_params(32))
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            if output.finished:
                assert isinstance(output, RequestOutput)
                return Generated.of(output)
        streams = engine.scheduler.recycler.streams.values()
        if not target.exists() and any(
            stream.evicted > BETWEEN + POLICY.capacity for stream in streams
        ):
            assert all(stream.pending for stream in streams)
            engine.scheduler.hibernation.disk.wait()
            shutil.copytree(source, target)
    raise AssertionError("the request has not ended")


def _disk(folder: Path) -> dict[str, object]:
    return HOST | {"sink_disk": str(folder), "sink_disk_gib": 1}
