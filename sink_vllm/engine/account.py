"""What streams evict, counted for their clients, the metrics and the log (engine core process)."""

from vllm.logger import init_logger

from sink_vllm.engine.stream import Stream
from sink_vllm.policy.stats import StreamingLLMStats

# Below vLLM's own logger, whose handlers print it.
logger = init_logger(f"vllm.{__name__}")

_EVICTIONS_PER_LOG_LINE = 1000


class Account:
    """Evictions of all streams of an engine core."""

    def __init__(self) -> None:
        self.stats = StreamingLLMStats()
        self.due: set[str] = set()
        """Requests whose next output should tell the client what was evicted."""
        self._evictions = 0

    def evicted(self, request_id: str, stream: Stream, evictions: int, open_streams: int) -> None:
        """``stream`` has just made ``evictions``, or skipped them with their tokens."""
        if not evictions:
            return
        self.stats.streams += stream.evictions == evictions
        self.stats.evictions += evictions
        self.stats.tokens += evictions * stream.schedule.stride
        self.due.add(request_id)
        logged = self._evictions // _EVICTIONS_PER_LOG_LINE
        self._evictions += evictions
        if self._evictions // _EVICTIONS_PER_LOG_LINE > logged:
            logger.info(
                "StreamingLLM: %d evictions so far; %d streams are open.",
                self._evictions,
                open_streams,
            )

    def resumed(self, request_id: str) -> None:
        """A stream goes on from cached pages; its client should know where it stands."""
        self.stats.resumed += 1
        self.due.add(request_id)

    def take_stats(self) -> StreamingLLMStats:
        """What happened since the last call."""
        stats, self.stats = self.stats, StreamingLLMStats()
        return stats
