"""The scheduler of the policy: when to evict, and what the workers are told (engine core).

``StreamingLLMScheduler`` and ``StreamingLLMAsyncScheduler`` are vLLM's own two schedulers plus
one mixin. Once per step, before vLLM schedules, every stream whose cache is full and which has
nothing in flight evicts; the request stays in ``running`` and is an ordinary request for vLLM's
loop. Its compacted state reaches the workers the way vLLM's streaming input sessions do: as
``NewRequestData`` for a request id they already have.
"""

import time
from copy import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from sink_vllm.config import SinkConfig
from sink_vllm.plan import PageMove, Resent, StepPlan
from sink_vllm.scheduler.manager import StreamingLLMManager
from sink_vllm.scheduler.stream import Stream, compact, open_stream, rehash
from sink_vllm.stats import StreamingLLMStats

logger = init_logger(__name__)

REPORT_KEY = "streaming_llm"
"""Key of the per-response account inside ``kv_transfer_params``."""

_NO_LENGTH_LIMIT = 2**31 - 1
"""Stands in for ``max_model_len`` where vLLM would end a request that reached it."""


class StreamingLLMMixin(Scheduler):
    """Evicts, streams long prompts in, and has no length limit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = SinkConfig.of(self.vllm_config)
        assert config is not None, "the scheduler of the policy needs the policy"
        self.policy_config = config
        self.schedule_of_stream = config.schedule
        self.capacity = config.capacity
        # The block manager keeps C + 1; what must not see that limit is the stop check. Chunks
        # are capped by `_reserve_prefill_lookahead` below.
        self.max_model_len = _NO_LENGTH_LIMIT
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, StreamingLLMManager)
        self.manager = manager
        self.streams: dict[str, Stream] = {}
        self._moves: dict[str, list[PageMove]] = {}
        self._retained: list[KVCacheBlock] = []
        self._resent: list[NewRequestData] = []
        self._report_due: set[str] = set()
        self._step_stats = StreamingLLMStats()
        self._log_start()

    def _log_start(self) -> None:
        spec = self.manager.spec
        num_blocks = self.kv_cache_config.num_blocks
        per_stream = spec.pages_per_stream
        group = self.kv_cache_config.kv_cache_groups[0]
        kv_bytes = per_stream * spec.page_size_bytes * len(group.layer_names)
        logger.info(
            "StreamingLLM: sink tokens S=%d, window W=%d, stride g=%d, capacity C=%d tokens; "
            "KV cache per stream: %.2f MiB in %d pages of %d tokens; %d streams fit.",
            spec.sink_tokens,
            spec.window,
            spec.stride,
            self.capacity,
            kv_bytes / 2**20,
            per_stream,
            self.manager.block_size,
            # One page of the pool is vLLM's null block.
            (num_blocks - 1) // per_stream,
        )

    # -- requests come and go ---------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            stream = open_stream(request, self.schedule_of_stream, self.policy_config.sink_prompt)
            self.streams[request.request_id] = stream
            if stream.evicted:
                self._count(stream, stream.evicted)
                self._report_due.add(request.request_id)
        super().add_request(request)

    def _count(self, stream: Stream, tokens: int) -> None:
        """Account for ``tokens`` just evicted from ``stream``, or never computed."""
        strides = tokens // self.schedule_of_stream.stride
        self._step_stats.streams += stream.evictions == strides
        self._step_stats.tokens += tokens
        self._step_stats.evictions += strides

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Forget the pages of a request; it is recomputed from its compacted tokens."""
        self._moves.pop(request.request_id, None)
        super()._preempt_request(request, *args, **kwargs)
        stream = self.streams[request.request_id]
        stream.rope_offset = 0
        if stream.evictions:
            # The survivors become an ordinary prompt with page hashes of their own, and the
            # workers must hear of it even if they never heard of the last eviction.
            stream.dirty = True
            if stream.block_hasher is not None:
                request._block_hasher = stream.block_hasher
                stream.block_hasher = None
                rehash(request)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """End a request; the account of what was evicted leaves with its last output."""
        kv_params, ec_params = super()._free_request(request, delay_free_blocks)
        stream = self.streams.pop(request.request_id)
        self._report_due.discard(request.request_id)
        if stream.evictions:
            kv_params = {**(kv_params or {}), REPORT_KEY: stream.report(request)}
        return kv_params, ec_params

    # -- one step ---------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._pause_state != PauseState.PAUSED_ALL:
            for request in self._full_streams():
                self._evict(request)
        output = super().schedule(throttle_prefills)
        self._count_pending_prompts(output)
        if self._resent:
            output.scheduled_new_reqs.extend(self._resent)
        plan = StepPlan(
            moves=[move for moves in self._moves.values() for move in moves],
            resent={
                data.req_id: self._resent_state(data.req_id)
                for data in output.scheduled_new_reqs
                if self.streams[data.req_id].dirty
            },
        )
        if plan:
            setattr(output, StepPlan.ATTRIBUTE, plan)
        for req_id in plan.resent:
            self.streams[req_id].dirty = False
        self._resent = []
        self._moves = {}
        # The step is planned: whatever takes these pages next is written after its moves ran.
        if self._retained:
            self.manager.block_pool.free_blocks(self._retained)
            self._retained = []
        return output

    def _count_pending_prompts(self, output: SchedulerOutput) -> None:
        """Let vLLM's statistics see whole prompts, not just what the engine sees at once."""
        for data in output.scheduled_new_reqs:
            pending = len(self.streams[data.req_id].pending)
            stats = self.requests[data.req_id].prefill_stats
            if pending and stats is not None and not self.requests[data.req_id].num_preemptions:
                stats.set(
                    num_prompt_tokens=stats.num_prompt_tokens + pending,
                    num_local_cached_tokens=stats.num_local_cached_tokens,
                    num_external_cached_tokens=stats.num_external_cached_tokens,
                )

    def _full_streams(self) -> list[Request]:
        """Running requests whose cache is full, with one more token to compute, none in flight."""
        capacity = self.capacity
        return [
            request
            for request in self.running
            if request.num_computed_tokens == capacity
            and request.num_in_flight_tokens == 0
            and request.num_tokens > capacity
        ]

    def _evict(self, request: Request) -> None:
        if request not in self.running:  # preempted by an eviction earlier in this step
            return
        stream = self.streams[request.request_id]
        offset, window_delta = self._next_rope_offset(stream)
        while True:
            eviction = self.manager.evict(request.request_id, window_delta, offset)
            if eviction is not None:
                break
            if self._preempt_lowest_priority() is request:
                return
        self._moves[request.request_id] = eviction.moves
        self._retained += eviction.retained
        if stream.block_hasher is None:
            stream.block_hasher = request._block_hasher
            request._block_hasher = None
            request.block_hashes.clear()
        stream.rope_offset = offset
        stream.reanchorings += bool(window_delta)
        compact(request, stream, self.schedule_of_stream)
        self._count(stream, self.schedule_of_stream.stride)
        self._step_stats.reanchorings += bool(window_delta)
        self._report_due.add(request.request_id)

    def _next_rope_offset(self, stream: Stream) -> tuple[int, int]:
        """Rope offset after the next eviction, and the rotation of the window it takes.

        The offset grows by ``g`` so that the window's keys can stay as they are, until positions
        would leave the RoPE table: then the window is rotated back once (re-anchoring).
        """
        rows = self.manager.spec.rope_rows
        if rows is None:
            return 0, 0
        grown = stream.rope_offset + self.schedule_of_stream.stride
        if grown + self.capacity <= rows:
            return grown, 0
        return 0, -grown

    def _preempt_lowest_priority(self) -> Request:
        """Preempt whom vLLM would preempt when pages run out; returns the victim."""
        if self.policy == SchedulingPolicy.PRIORITY:
            victim = max(self.running, key=lambda r: (r.priority, r.arrival_time))
            self.running.remove(victim)
        else:
            victim = self.running.pop()
        self._preempt_request(victim, time.monotonic())
        return victim

    def _resent_state(self, req_id: str) -> Resent:
        stream = self.streams[req_id]
        return Resent(
            rope_offset=stream.rope_offset,
            evicted=stream.evicted,
            output_token_ids=list(self.requests[req_id]._output_token_ids),
        )

    def _make_cached_request_data(
        self,
        running_reqs: list[Request],
        resumed_reqs: list[Request],
        num_scheduled_tokens: dict[str, int],
        spec_decode_tokens: dict[str, list[int]],
        req_to_new_blocks: dict[str, KVCacheBlocks],
    ) -> CachedRequestData:
        """Divert requests the workers have an outdated copy of: they leave as new requests."""
        self._resent = [
            self._new_request_data(request)
            for request in (*running_reqs, *resumed_reqs)
            if self.streams[request.request_id].dirty
        ]
        if self._resent:
            diverted = {data.req_id for data in self._resent}
            running_reqs = [r for r in running_reqs if r.request_id not in diverted]
            resumed_reqs = [r for r in resumed_reqs if r.request_id not in diverted]
        return super()._make_cached_request_data(
            running_reqs,
            resumed_reqs,
            num_scheduled_tokens,
            spec_decode_tokens,
            req_to_new_blocks,
        )

    def _new_request_data(self, request: Request) -> NewRequestData:
        data = NewRequestData.from_request(
            request,
            self.kv_cache_manager.get_block_ids(request.request_id),
            request._all_token_ids.copy() if self.use_v2_model_runner else None,
        )
        params = data.sampling_params
        if self.use_v2_model_runner and params is not None and params.min_tokens:
            # That runner samples with stream positions, and compares them with prompt length
            # plus min_tokens.
            data.sampling_params = copy(params)
            data.sampling_params.min_tokens += self.streams[request.request_id].evicted
        return data

    # -- limits -----------------------------------------------------------------------------

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Never schedule past the capacity: vLLM's last clamp on the size of every chunk.

        0 makes a full stream skip the step; with asynchronous scheduling that is how it drains
        before it evicts.
        """
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        return max(min(num_new_tokens, self.capacity - num_computed_tokens), 0)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """Leave at least one token below the capacity to compute.

        A hit of ``C`` tokens would leave nothing to schedule before the eviction, and vLLM's
        waiting loop stops for good at a request it cannot give a token.
        """
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        if num_tokens >= self.capacity:
            block_size = self.manager.block_size
            num_tokens = (self.capacity - 1) // block_size * block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_tokens)
        return blocks, num_tokens, boundary, diverged

    # -- output -----------------------------------------------------------------------------

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._step_stats.attach(stats)
            self._step_stats = StreamingLLMStats()
        return stats

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Add the account of evictions to the first output after each of them.

        The front end may end a request by itself (stop strings), so waiting for the last output
        would lose it.
        """
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._report_due:
            for core_outputs in outputs.values():
                for output in core_outputs.outputs:
                    if output.request_id in self._report_due:
                        self._report_due.discard(output.request_id)
                        request = self.requests[output.request_id]
                        report = self.streams[output.request_id].report(request)
                        output.kv_transfer_params = {
                            **(output.kv_transfer_params or {}),
                            REPORT_KEY: report,
                        }
        return outputs


class StreamingLLMScheduler(StreamingLLMMixin):
    """vLLM's ``Scheduler`` under the policy."""


class StreamingLLMAsyncScheduler(StreamingLLMMixin, AsyncScheduler):
    """vLLM's ``AsyncScheduler`` under the policy."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """What ``--scheduler-cls`` names: the scheduler that fits the final configuration.

    vLLM decides about asynchronous scheduling after the class is named, so the choice is made
    here, when the engine core builds its scheduler.
    """
    cls = (
        StreamingLLMAsyncScheduler
        if vllm_config.scheduler_config.async_scheduling
        else StreamingLLMScheduler
    )
    return cls(vllm_config=vllm_config, **kwargs)
