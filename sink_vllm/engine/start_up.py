"""What an engine core looks at before it starts, and tells the front end when it has.

The counterpart in the front end is in ``sink_vllm.server.front_end``.
"""

from collections.abc import Callable
from dataclasses import fields, make_dataclass
from typing import Any

from sink_vllm.compat.parts import TOLD, check_config, check_workers
from sink_vllm.compat.patching import Patch
from sink_vllm.gate.refused import refusals
from sink_vllm.policy.config import SinkConfig


def _wrap_initialize_kv_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        with refusals():
            config = SinkConfig.of(vllm_config)
            check_config(vllm_config, config)
        if config is not None:
            with refusals():
                check_workers(self.model_executor.get_kv_cache_specs(), config)
            return original(self, vllm_config)
        kv_cache_config = original(self, vllm_config)
        with refusals():
            for group in kv_cache_config.kv_cache_groups:
                check_workers([dict.fromkeys(group.layer_names, group.kv_cache_spec)], None)
        return kv_cache_config

    return _initialize_kv_caches


def _wrap_make_ready_response(original: Callable[..., Any]) -> Callable[..., Any]:
    def _make_ready_response(self: Any) -> Any:
        response = original(self)
        config = SinkConfig.of(self.vllm_config)
        if config is None:
            return response
        # A field more on the wire, which vLLM's decoder skips.
        kind = type(response)
        told = make_dataclass(kind.__name__, [(TOLD, dict)], bases=(kind,), kw_only=True)
        values = {field.name: getattr(response, field.name) for field in fields(response)}
        return told(**values, **{TOLD: config.as_additional_config()})

    return _make_ready_response


_RECORD = "0041-parts-are-checked"
PATCHES = (
    Patch(
        target="vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        wrapper=_wrap_initialize_kv_caches,
        record=_RECORD,
    ),
    Patch(
        target="vllm.v1.engine.core:EngineCoreProc._make_ready_response",
        wrapper=_wrap_make_ready_response,
        record=_RECORD,
    ),
)
