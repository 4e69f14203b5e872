"""A database that cannot be used ends the start before an engine loads, in one sentence."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sink_vllm.gate.refused import Refused
from sink_vllm.server.streams import opening
from sink_vllm.server.streams.archive import Archive
from sink_vllm.server.streams.remote import RemoteStore
from sink_vllm.server.streams.store import StreamStore


@pytest.fixture(autouse=True)
def _a_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_PLUGINS", "sink_vllm")
    yield
    os.environ.pop(opening.ADDRESS, None)
    for archive in opening._opened.values():
        archive.close()
    opening._opened.clear()
    for owner in opening._owners:
        owner.close()
    opening._owners.clear()


def _config(path: Path | None, servers: int = 1, rank: int = 0) -> Any:
    options = {"kv_policy": "sink", "sink_window": 92, "sink_stride": 32, "sink_streams": 7}
    if path is not None:
        options["sink_streams_db"] = str(path)
    return SimpleNamespace(
        additional_config=options,
        cache_config=SimpleNamespace(block_size=32),
        model_config=SimpleNamespace(
            model="m", dtype="torch.float32", hf_text_config=SimpleNamespace(), is_hybrid=False
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=True),
        parallel_config=SimpleNamespace(_api_process_count=servers, _api_process_rank=rank),
    )


@pytest.mark.parametrize(("servers", "rank"), [(1, 0), (2, -1)])
def test_a_database_that_cannot_be_used(tmp_path: Path, servers: int, rank: int) -> None:
    damaged, held = tmp_path / "damaged.db", Archive(str(tmp_path / "held.db"), {})
    damaged.write_bytes(b"no database" * 1000)
    reasons = {
        damaged: "not a database",
        tmp_path: "unable to open",
        tmp_path / "none" / "streams.db": "does not exist",
        Path(held.path): "another server has it open",
    }
    for path, reason in reasons.items():
        with pytest.raises(Refused, match=f"--sink-streams-db='{path}' cannot be used: .*{reason}"):
            opening.prepare(_config(path, servers, rank))
    held.close()


def test_it_is_held_from_then_on_and_used_by_the_store(tmp_path: Path) -> None:
    config = _config(tmp_path / "streams.db")
    opening.prepare(config)
    opening.prepare(config)  # vLLM may build its configuration twice
    with pytest.raises(RuntimeError, match="another server has it open"):
        Archive(str(tmp_path / "streams.db"), {})

    store = opening.store_of(config)

    assert isinstance(store, StreamStore)
    assert (store.limits.most_streams, store.limits.is_archived) == (7, True)
    assert store._archive is not None
    store._archive.close()


def test_nothing_is_opened_for_a_server_without_the_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")

    opening.prepare(_config(tmp_path / "streams.db"))

    assert not list(tmp_path.iterdir())


def test_several_api_servers_ask_the_process_that_starts_them() -> None:
    with pytest.raises(Refused, match="`vllm serve`"):
        opening.store_of(_config(None, 2, 1))
    opening.prepare(_config(None, 2, -1))
    opening.prepare(_config(None, 2, 0))  # an API server opens nothing

    stores = [opening.store_of(_config(None, 2, rank)) for rank in range(2)]

    made = stores[0].create("a", "m", None, {}, tokens=[1, 2])
    assert stores[1].get(made.id).position == 2
    assert not stores[0].limits.is_archived
    for store in stores:
        assert isinstance(store, RemoteStore)
        store.close()
