"""The engine core leaves hashing pages to the scheduler of the policy."""

from collections.abc import Callable
from typing import Any

from sink_vllm.config import SinkConfig
from sink_vllm.patching import Patch


def _wrap_preprocess_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if self.request_block_hasher is not None and SinkConfig.of(self.vllm_config) is not None:
            # ``Recycler.open`` hashes as much of a prompt as there is a use for.
            self.request_block_hasher = None
        return original(self, request)

    return preprocess_add_request


PATCHES = (
    Patch(
        target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        wrapper=_wrap_preprocess_add_request,
        record="0023-prompts-hashed-once",
    ),
)
