"""vLLM's statistics of a prompt, of which the engine sees a part at once (engine core process)."""

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from sink_vllm.engine.stream import Stream
from sink_vllm.engine.tables import FoundPages


def count_prompt(
    request: Request, stream: Stream, found: FoundPages | None, manager: KVCacheManager
) -> None:
    """Let the statistics of a request that has just been admitted count its whole prompt.

    Args:
        request: was scheduled for the first time.
        stream: of it; what is pending, or was skipped, is what vLLM did not count.
        found: the cached pages it goes on from.
        manager: of the engine core's pages.
    """
    if request.num_preemptions or not (stream.pending or found):
        return
    skipped = stream.evicted if found else 0
    prefill, cache = request.prefill_stats, manager.prefix_cache_stats
    if prefill is not None:
        prefill.set(
            num_prompt_tokens=prefill.num_prompt_tokens + skipped + len(stream.pending),
            num_local_cached_tokens=prefill.num_local_cached_tokens + skipped,
            num_external_cached_tokens=prefill.num_external_cached_tokens,
        )
    if cache is not None and manager.prefix_cache_lookup_enabled(request):
        cache.queries += skipped + len(stream.pending)
        cache.hits += skipped
