"""Block managers: one per kind of page table, registered with vLLM (every process)."""

OF_VLLM = "vllm.v1.core.single_type_kv_cache_manager"
"""The module of vLLM's own managers. vLLM's registry imports it before it answers a question, so
whoever needs ours needs it, too."""


def register() -> None:
    """Tell vLLM which manager serves which KV cache spec. Idempotent.

    ``_ensure_registered`` comes first: vLLM registers its own specs only while the registry is
    empty, so a plugin that comes first would suppress all of them.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from sink_vllm.compat.spec import (
        StreamingLLMSpec,
        StreamingLLMStateSpec,
        StreamingLLMWindowSpec,
    )
    from sink_vllm.engine.managers.recurrent import StreamingLLMStateManager
    from sink_vllm.engine.managers.streaming import StreamingLLMManager
    from sink_vllm.engine.managers.windowed import StreamingLLMWindowManager

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        StreamingLLMSpec,
        manager_class=StreamingLLMManager,
        uniform_type_base_spec=FullAttentionSpec,
    )
    KVCacheSpecRegistry.register(
        StreamingLLMWindowSpec,
        manager_class=StreamingLLMWindowManager,
        uniform_type_base_spec=SlidingWindowSpec,
    )
    KVCacheSpecRegistry.register(
        StreamingLLMStateSpec,
        manager_class=StreamingLLMStateManager,
        uniform_type_base_spec=MambaSpec,
    )
