"""The scheduler of the policy: when to evict, and what the workers are told (engine core).

``StreamingLLMScheduler`` and ``StreamingLLMAsyncScheduler`` are vLLM's own two schedulers plus
one mixin. Once per step, before vLLM schedules, every stream whose cache is full and which has
nothing in flight evicts; the request stays in ``running`` and is an ordinary request for vLLM's
loop. Its compacted state reaches the workers the way vLLM's streaming input sessions do: as
``NewRequestData`` for a request id they already have.
"""

import itertools
import time
from copy import copy
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus, StreamingUpdate

from sink_vllm.config import SinkConfig
from sink_vllm.plan import REPORT_KEY, Resent, StepPlan
from sink_vllm.scheduler.output_tail import forget_evicted
from sink_vllm.scheduler.reasoning import decide_reasoning
from sink_vllm.scheduler.recycler import Recycler
from sink_vllm.scheduler.tables import PageTables

# Below vLLM's own logger, whose handlers print it.
logger = init_logger(f"vllm.{__name__}")

_NO_LENGTH_LIMIT = 2**31 - 1
"""Stands in for ``max_model_len`` where vLLM would end a request that reached it."""


class StreamingLLMMixin(Scheduler):
    """Evicts, streams long prompts in, and has no length limit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = SinkConfig.of(self.vllm_config)
        assert config is not None, "the scheduler of the policy needs the policy"
        tables = PageTables(self.kv_cache_manager.coordinator.single_type_managers)
        cache_config = self.vllm_config.cache_config
        self.recycler = Recycler(
            config,
            tables,
            get_hash_fn_by_name(cache_config.prefix_caching_hash_algo)
            if cache_config.enable_prefix_caching
            else None,
        )
        # The block manager keeps C + 1; what must not see that limit is the stop check. Chunks
        # are capped by `_reserve_prefill_lookahead` below.
        self.max_model_len = _NO_LENGTH_LIMIT
        self._stride_pages = (
            config.schedule.stride // tables.block_size * len(self.kv_cache_config.kv_cache_groups)
        )
        self._resent: list[NewRequestData] = []
        self._log_start(config)

    def _log_start(self, config: SinkConfig) -> None:
        spec = self.recycler.tables.spec
        per_stream = self.recycler.tables.pages_per_stream
        # Pages of all groups come from one pool: as many layers in each.
        layers = max(len(one.layer_names) for one in self.kv_cache_config.kv_cache_groups)
        logger.info(
            "StreamingLLM: sink tokens S=%d, window W=%d, stride g=%d, capacity C=%d tokens; "
            "KV cache per stream: %.2f MiB in %d pages of %d tokens; %d streams fit.",
            spec.sink_tokens,
            spec.window,
            spec.stride,
            config.capacity,
            per_stream * spec.page_size_bytes * layers / 2**20,
            per_stream,
            spec.block_size,
            # One page of the pool is vLLM's null block.
            (self.kv_cache_config.num_blocks - 1) // per_stream,
        )

    # -- requests come and go ---------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            decide_reasoning(self.structured_output_manager, request)
            self.recycler.open(request)
        super().add_request(request)

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """The next input of a session may be longer than its cache."""
        visible = self.recycler.extend(session, update.prompt_token_ids or [])
        super()._update_request_as_session(session, replace(update, prompt_token_ids=visible))
        forget_evicted(session)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.recycler.preempted(request)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """End a request; the account of what was evicted leaves with its last output."""
        kv_params, ec_params = super()._free_request(request, delay_free_blocks)
        report = self.recycler.close(request)
        if report is not None:
            kv_params = {**(kv_params or {}), REPORT_KEY: report}
        return kv_params, ec_params

    # -- one step ---------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._pause_state != PauseState.PAUSED_ALL:
            streams = self.recycler.streams
            for request in [
                r for r in self.running if r.num_computed_tokens >= streams[r.request_id].capacity
            ]:
                if self.recycler.is_full(request):
                    self._evict(request)
            if self.kv_holding_waiting:
                self._evict_waiting_sessions()
        if self.recycler.unresolved and self._pause_state == PauseState.UNPAUSED:
            self._resume_waiting()
        output = super().schedule(throttle_prefills)
        self._complete_new_requests(output)
        plan = StepPlan(
            moves=self.recycler.take_moves(),
            resent={
                data.req_id: self._resent_state(data.req_id)
                for data in output.scheduled_new_reqs
                if data.req_id in self.recycler.dirty
            },
        )
        if plan:
            setattr(output, StepPlan.ATTRIBUTE, plan)
        self.recycler.dirty.difference_update(plan.resent)
        self.recycler.release()
        return output

    def _evict(self, request: Request) -> None:
        """Make room in a full stream, at the cost of others when pages are short."""
        # An eviction earlier in this step may have preempted it.
        while request.status == RequestStatus.RUNNING and not self.recycler.evict(request):
            self._preempt_lowest_priority()

    def _evict_waiting_sessions(self) -> None:
        """A session may be full when its next input arrives; vLLM could give it no token."""
        for request in list(self.kv_holding_waiting):
            if request.status == RequestStatus.WAITING and self.recycler.is_full(request):
                self.recycler.evict(request)  # when pages are short, it waits for some

    def _preempt_lowest_priority(self) -> None:
        """Preempt whom vLLM would preempt when pages run out."""
        if self.policy == SchedulingPolicy.PRIORITY:
            victim = max(self.running, key=lambda r: (r.priority, r.arrival_time))
            self.running.remove(victim)
        else:
            victim = self.running.pop()
        self._preempt_request(victim, time.monotonic())

    def _resume_waiting(self) -> None:
        """Look up the long prompts vLLM may admit in this step; those found hold pages now.

        vLLM admits requests that hold pages first, and never preempts them; so each of them
        keeps the pages for its first chunk reserved.
        """
        slots = self.max_num_active_reqs - len(self.running) - len(self.kv_holding_waiting)
        for request in list(itertools.islice(self.waiting, max(slots, 0))):
            if (
                request.request_id in self.recycler.unresolved
                and request.status == RequestStatus.WAITING
                and self.recycler.resume(request, len(self.kv_holding_waiting) * self._stride_pages)
            ):
                self.waiting.remove_request(request)
                self.deferred_waiting.discard(request)
                self.kv_holding_waiting.add_request(request)

    def _complete_new_requests(self, output: SchedulerOutput) -> None:
        """Correct what vLLM says of new requests, and add those that are sent again."""
        for data in output.scheduled_new_reqs:
            request, stream = self.requests[data.req_id], self.recycler.streams[data.req_id]
            known = data.req_id in self.recycler.dirty or request.num_preemptions
            stats = request.prefill_stats
            if stats is not None and stream.pending and not known:
                # vLLM's statistics count whole prompts, not just what the engine sees at once.
                stats.set(
                    num_prompt_tokens=stats.num_prompt_tokens + len(stream.pending),
                    num_local_cached_tokens=stats.num_local_cached_tokens,
                    num_external_cached_tokens=stats.num_external_cached_tokens,
                )
        output.scheduled_new_reqs.extend(self._resent)
        self._resent = []
        if self.use_v2_model_runner:
            for data in output.scheduled_new_reqs:
                params = data.sampling_params
                if data.req_id in self.recycler.dirty and params is not None and params.min_tokens:
                    # That runner samples with stream positions, and compares them with prompt
                    # length plus min_tokens.
                    data.sampling_params = copy(params)
                    data.sampling_params.min_tokens += self.recycler.streams[data.req_id].evicted

    def _resent_state(self, req_id: str) -> Resent:
        stream = self.recycler.streams[req_id]
        return Resent(
            rope_offset=self.recycler.tables.anchors.offset(stream.chain_evictions),
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
        dirty = self.recycler.dirty
        if dirty:
            self._resent = [
                NewRequestData.from_request(
                    request,
                    self.kv_cache_manager.get_block_ids(request.request_id),
                    request._all_token_ids.copy() if self.use_v2_model_runner else None,
                )
                for request in (*running_reqs, *resumed_reqs)
                if request.request_id in dirty
            ]
            running_reqs = [r for r in running_reqs if r.request_id not in dirty]
            resumed_reqs = [r for r in resumed_reqs if r.request_id not in dirty]
        return super()._make_cached_request_data(
            running_reqs,
            resumed_reqs,
            num_scheduled_tokens,
            spec_decode_tokens,
            req_to_new_blocks,
        )

    # -- limits -----------------------------------------------------------------------------

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Never schedule past the capacity: vLLM's last clamp on the size of every chunk.

        0 makes a full stream skip the step; with asynchronous scheduling that is how it drains
        before it evicts. Where vLLM cannot prefill in chunks (MLA on CPUs), what does not fit into
        the first one is computed token by token.
        """
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        room = self.recycler.streams[request.request_id].capacity - num_computed_tokens
        if num_computed_tokens and not self.scheduler_config.enable_chunked_prefill:
            room = min(room, 1)  # its attention kernels read the cache for one query only
        return num_new_tokens if num_new_tokens <= room else max(room, 0)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """Leave at least one token below the capacity to compute.

        A hit of ``C`` tokens would leave nothing to schedule before the eviction, and vLLM's
        waiting loop stops for good at a request it cannot give a token.
        """
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        capacity = self.recycler.streams[request.request_id].capacity
        if num_tokens >= capacity:
            # Looked up again: windowed layers need pages further back of a shorter prefix.
            hit, num_tokens, _ = self.kv_cache_manager.coordinator.find_longest_cache_hit(
                request.block_hashes, capacity - 1
            )
            blocks = self.kv_cache_manager.create_kv_cache_blocks(hit)
        return blocks, num_tokens, boundary, diverged

    # -- output -----------------------------------------------------------------------------

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self.recycler.take_stats().attach(stats)
        return stats

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Add the account of evictions to the first output after each of them.

        The front end may end a request by itself (stop strings), so waiting for the last output
        would lose it.
        """
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        due = self.recycler.report_due
        if due:
            for output in itertools.chain(*(o.outputs for o in outputs.values())):
                if output.request_id in due:
                    due.discard(output.request_id)
                    request = self.requests[output.request_id]
                    report = self.recycler.streams[output.request_id].report(request)
                    params = output.kv_transfer_params or {}
                    output.kv_transfer_params = {**params, REPORT_KEY: report}
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
