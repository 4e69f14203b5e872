"""The example application of Ray Serve: sessions that stick, and a replica that dies."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

ray: Any = pytest.importorskip("ray", reason="Ray is not installed (pip install 'sink-vllm[ray]')")
pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install 'sink-vllm[ray]')")

from examples.ray_serve.app import ROUTERS, Options, application_args  # noqa: E402
from examples.ray_serve.client import Conversation, conversations, http_client  # noqa: E402
from examples.ray_serve.local import LocalApp, local_cluster, running_app  # noqa: E402
from sink_vllm.policy.options import SinkOptions  # noqa: E402

PAGE = 32
TURNS = 4


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_files_have_the_policy_on_and_sessions_pinned(name: str) -> None:
    """Ray validates the files when an application is built; the policy's options are ours."""
    folder = Options().config.parent

    (llm,) = application_args(Options(config=folder / name))["llm_configs"]

    assert SinkOptions.parse(llm["engine_kwargs"]["additional_config"]) is not None
    router = llm["deployment_config"]["request_router_config"]["request_router_class"]
    assert router == ROUTERS["session"]["request_router_class"]


def test_options_replace_replicas_and_router() -> None:
    folder = Options().config.parent

    options = Options(config=folder / "gpu.yaml", replicas=3, routing="prefix")
    (llm,) = application_args(options)["llm_configs"]

    assert llm["deployment_config"]["num_replicas"] == 3
    assert "autoscaling_config" not in llm["deployment_config"]
    assert llm["deployment_config"]["request_router_config"] == ROUTERS["prefix"]


@pytest.fixture(scope="module")
def app() -> Iterator[LocalApp]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with local_cluster(nodes=2, cpus_per_node=2) as address:
        ray.init(address=address, log_to_driver=False)
        with running_app(port, replicas=2) as app:
            app.wait_for_replicas(2)
            yield app
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow  # two engines and their replacement
def test_conversations_survive_the_death_of_a_replica(app: LocalApp) -> None:
    """Sessions stay where their pages are; when that replica is killed they go on elsewhere."""
    talks = conversations(6)

    async def take_turns(count: int, *, kill: bool = False) -> None:
        async with http_client(app.url) as http:
            rounds = [_take_turns(talk, http, count) for talk in talks]
            victims = [_kill_soon(app)] if kill else []
            await asyncio.gather(*rounds, *victims)

    asyncio.run(take_turns(TURNS))
    assert all(_landed(talk, number) for talk in talks for number in range(1, TURNS))
    assert not any(turn.errors for talk in talks for turn in talk.turns)

    asyncio.run(take_turns(TURNS, kill=True))

    assert all(len(talk.turns) == 2 * TURNS for talk in talks)
    assert max(turn.seconds for talk in talks for turn in talk.turns) < 60
    moved = [
        talk
        for talk in talks
        if not all(_landed(talk, number) for number in range(TURNS, 2 * TURNS))
    ]
    assert 0 < len(moved) < len(talks)


def _landed(talk: Conversation, number: int) -> bool:
    """Whether the engine found the prompt of the turn before, up to two pages at its end."""
    turn, before = talk.turns[number], talk.turns[number - 1]
    return turn.cached_tokens >= max(before.prompt_tokens - 2 * PAGE, PAGE)


async def _take_turns(talk: Conversation, http: httpx.AsyncClient, count: int) -> None:
    for _ in range(count):
        await talk.take_turn(http)


async def _kill_soon(app: LocalApp) -> None:
    await asyncio.sleep(1)
    os.kill(app.replicas()[0].pid, signal.SIGKILL)
