"""The endpoint plugin: found by its name, and clear about servers it cannot serve."""

import asyncio
from argparse import Namespace
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.renderers.online_renderer import OnlineRenderer

from sink_vllm.service import endpoint


def test_entry_point() -> None:
    """The name is that of the other groups, so that VLLM_PLUGINS=sink_vllm means all of them."""
    found = {entry.value for entry in entry_points(group="vllm.endpoint_plugins", name="sink_vllm")}

    assert found == {"sink_vllm.service.endpoint:StreamsPlugin"}
    assert isinstance(endpoint.StreamsPlugin(), EndpointPlugin)


def _answer(engine_client: Any, args: Namespace) -> Any:
    """The answer to a request on a server that the plugin does not serve."""
    app, plugin = FastAPI(), endpoint.StreamsPlugin()
    app.state.args = Namespace(log_error_stack=False)
    plugin.attach_router(app)
    init_exception_handler(app)
    asyncio.run(plugin.init_state(engine_client, app.state, args))
    return TestClient(app).post("/v1/streams", json={})


@pytest.mark.parametrize("engine", [None, SimpleNamespace(vllm_config=SimpleNamespace())])
def test_without_the_policy(engine: Any) -> None:
    answer = _answer(engine, Namespace(api_server_count=1))

    assert answer.status_code == 501
    assert "--kv-policy sink" in answer.json()["error"]["message"]


def test_with_several_api_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "policy_of", lambda _config: object())
    answer = _answer(SimpleNamespace(vllm_config=None), Namespace(api_server_count=4))

    assert answer.status_code == 501
    assert "--api-server-count is 4" in answer.json()["error"]["message"]


def test_guard_what_the_service_uses_of_vllm() -> None:
    for name in ("preprocess_chat", "preprocess_completion"):
        assert hasattr(OnlineRenderer, name)
