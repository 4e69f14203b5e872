"""The endpoint plugin: found by its name, and clear about servers it cannot serve."""

import asyncio
import inspect
from argparse import Namespace
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.renderers.online_renderer import OnlineRenderer

from sink_vllm.server.streams import routes as endpoint


def test_entry_point() -> None:
    """The name is that of the other groups, so that VLLM_PLUGINS=sink_vllm means all of them."""
    found = {entry.value for entry in entry_points(group="vllm.endpoint_plugins", name="sink_vllm")}

    assert found == {"sink_vllm.server.streams.routes:StreamsPlugin"}
    assert isinstance(endpoint.StreamsPlugin(), EndpointPlugin)


def _answer(engine_client: Any, args: Namespace) -> Any:
    """The answer to a request on a server that the plugin does not serve."""
    app, plugin = FastAPI(), endpoint.StreamsPlugin()
    app.state.args = Namespace(log_error_stack=False, api_key=None)
    plugin.attach_router(app)
    init_exception_handler(app)
    asyncio.run(plugin.init_state(engine_client, app.state, args))
    return TestClient(app).post("/v1/streams", json={})


@pytest.mark.parametrize("engine", [None, SimpleNamespace(vllm_config=SimpleNamespace())])
def test_without_the_policy(engine: Any) -> None:
    answer = _answer(engine, Namespace(api_server_count=1))

    assert answer.status_code == 501
    assert "--kv-policy sink" in answer.json()["error"]["message"]


def test_guard_what_stored_streams_use_of_vllm() -> None:
    for name in ("preprocess_chat", "preprocess_completion"):
        assert hasattr(OnlineRenderer, name)
    for name in (
        "_base_request_id",
        "_check_model",
        "_get_data_parallel_rank",
        "_get_priority",
        "_get_session_id",
        "_get_trace_headers",
        "_log_inputs",
        "_maybe_get_adapters",
        "_preflight",
        "_raise_if_error",
    ):
        assert callable(getattr(OpenAIServingCompletion, name))


def test_guard_the_handlers_own_way_with_limits() -> None:
    """The arguments and attributes that ``Handler.params`` repeats."""
    source = inspect.getsource(OpenAIServingCompletion)

    for given in (
        "self.default_sampling_params = self.model_config.get_diff_sampling_param()",
        "self.override_max_tokens = (",
        "max_model_len = self.model_config.max_model_len",
    ):
        assert given in source
    assert list(inspect.signature(get_max_tokens).parameters)[:5] == [
        "max_model_len",
        "max_tokens",
        "input_length",
        "default_sampling_params",
        "override_max_tokens",
    ]


def test_guard_which_keys_are_checked() -> None:
    """A header is a client's name only where vLLM compares it with something."""
    source = inspect.getsource(init_entrypoints_middleware)

    assert "for key in (args.api_key or [envs.VLLM_API_KEY]) if key" in source
    assert 'partition(" ")' in inspect.getsource(AuthenticationMiddleware.verify_token)


@pytest.mark.parametrize(
    ("given", "environment", "same"),
    [(None, "", True), (["k", "l"], "", False), (None, "k", False), ([], "", True)],
)
def test_keys_are_clients_where_the_server_checks_them(
    monkeypatch: pytest.MonkeyPatch, given: list[str] | None, environment: str, same: bool
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", environment)
    app = FastAPI()
    app.state.args = Namespace(api_key=given)
    app.get("/")(endpoint.client_of)
    client = TestClient(app)
    names = {client.get("/", headers={"Authorization": f"Bearer {k}"}).json() for k in "kl"}

    assert len(names) == (1 if same else 2)
