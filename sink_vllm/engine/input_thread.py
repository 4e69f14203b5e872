"""Requests become streams on vLLM's input thread (engine core process).

Hashing a prompt of a million tokens takes half a second, and cutting it to what the engine sees at
once some milliseconds; in the loop of the engine they would be a pause of all streams.
"""

from collections.abc import Callable
from typing import Any

from sink_vllm.compat.patching import Patch
from sink_vllm.policy.config import SinkConfig

PREPARED = "streaming_llm_stream"
"""Attribute of vLLM's ``Request``: its stream, from the input thread to the scheduler."""


def _wrap_preprocess_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if SinkConfig.of(self.vllm_config) is None:
            return original(self, request)
        # The stream hashes as much of a prompt as there is a use for.
        self.request_block_hasher = None
        made, wave = original(self, request)
        # Of a session this may be another input than the first, which only the scheduler knows.
        if not made.resumable:
            setattr(made, PREPARED, self.scheduler.prepare(made))
        return made, wave

    return preprocess_add_request


PATCHES = (
    Patch(
        target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        wrapper=_wrap_preprocess_add_request,
        record="0023-prompts-hashed-once",
    ),
)
