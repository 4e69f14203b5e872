"""Who is admitted, and how much of it is scheduled: the part of the scheduler that hands out pages.

vLLM asks at its own seams, and ``admission`` answers. Inside vLLM's loop over waiting requests a
request is looked up and admitted in one go: who waits holds no page. What happens to those that
hold some, before that loop, is in ``making_room``.
"""

import itertools
from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from sink_vllm.engine.admission import Admission, Verdict
from sink_vllm.engine.hibernation.start import make_hibernation
from sink_vllm.engine.making_room import MakingRoomMixin
from sink_vllm.engine.prompt_stats import count_prompt
from sink_vllm.engine.recycler import Recycler
from sink_vllm.engine.tables import FoundPages, PageTables
from sink_vllm.gate.refused import refusals
from sink_vllm.policy.config import SinkConfig

_NO_LENGTH_LIMIT = 2**31 - 1
"""Stands in for ``max_model_len`` where vLLM would end a request that reached it."""
_MOST_PASSED_OVER = 32
"""Waiting requests per step that others are admitted before, because all shares are taken."""


class AdmittingMixin(MakingRoomMixin):
    """Admits, and limits what is scheduled to pages and capacity."""

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
        self.ledger = tables.ledger
        with refusals():
            self.hibernation = make_hibernation(self.vllm_config, self.kv_cache_config, tables)
        self.recycler.hibernation = self.hibernation
        self.admission = Admission(
            tables,
            by_priority=self.policy == SchedulingPolicy.PRIORITY,
            # What the front end fills in when a client names no limit of its own.
            no_limit=config.max_stream_tokens or _NO_LENGTH_LIMIT,
            watermark=self.kv_cache_manager.watermark_blocks,
        )
        # The block manager keeps C + 1; what must not see that limit is the stop check. Chunks
        # are capped by `_reserve_prefill_lookahead` below.
        self.max_model_len = _NO_LENGTH_LIMIT
        # Whether a request fits is answered by `admission`, for its whole life.
        self.scheduler_reserve_full_isl = False
        self._found: dict[str, FoundPages | None] = {}
        """Requests admitted in this step, and the cached pages they are resumed from."""
        self._passed_over = 0
        self._short_of_pages = False
        """Somebody waits for pages or for a share in this step."""
        self._queue_stands = False
        """Somebody waits for pages, whom nobody behind may pass in this step."""
        self._adapters: set[int] = set()
        self._adapters_of = -1
        """Adapters of the running requests, when there were so many."""
        self._parked = set()
        self._most_drafts = self.num_spec_tokens

    # -- pages change hands -----------------------------------------------------------------

    def check_integrity(self) -> None:
        """Every page has its owner, and promises are those of the requests that hold pages.

        Raises:
            IntegrityError: naming pages, and both numbers of each.
            AssertionError: the promises are not what they should be.
        """
        self.ledger.check_integrity()
        self.admission.check()

    def _begin_step(self) -> None:
        self._passed_over, self._short_of_pages, self._queue_stands = 0, False, False
        self._adapters_of = -1
        self.ledger.begin()
        if self.hibernation is not None:
            self.hibernation.begin()

    def get_num_unfinished_requests(self) -> int:
        """vLLM takes sessions between two inputs off the requests that hold pages, and parked ones
        hold none."""
        unfinished = super().get_num_unfinished_requests()
        if self._pause_state == PauseState.PAUSED_NEW:
            unfinished += len(self._parked)
        return unfinished

    # -- admission, inside vLLM's loop over waiting requests ----------------------------------

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Let others pass a request that waits for a share: they can use what no share covers."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        if not self._is_lora_admissible(request):
            return False
        if request.num_computed_tokens or self._passed_over >= _MOST_PASSED_OVER:
            return True
        if self.admission.residents_fit(request, self.recycler.streams[request.request_id]):
            return True
        self._passed_over += 1
        self._short_of_pages = True
        return False

    def _is_lora_admissible(self, request: Request) -> bool:
        """Whether the adapters of all running requests still fit beside that of ``request``.

        vLLM looks at those it schedules in this step, and stops for good if more run in the next;
        a full stream skips steps.
        """
        if self.lora_config is None or request.lora_request is None:
            return True
        if len(self.running) != self._adapters_of:  # vLLM only appends to it here
            self._adapters_of = len(self.running)
            self._adapters = {r.lora_request.lora_int_id for r in self.running if r.lora_request}
        adapters = self._adapters | {request.lora_request.lora_int_id}
        return len(adapters) <= self.lora_config.max_loras

    def _get_local_prefix_cache_hit(
        self, request: Request, *longest: int | None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Look a waiting request up, and decide whether it is admitted.

        A long prompt, and a stream that lost its pages, starts from the longest boundary that is
        cached, wherever that is. Otherwise
        at least one token below the capacity is left to compute: a hit of ``C`` tokens would leave
        nothing to schedule before the eviction, and no step would change that.

        Args:
            request: waiting.
            longest: the most tokens a hit may have, where vLLM gives a length (from 0.33 on).
        """
        stream = self.recycler.streams[request.request_id]
        nothing = self.kv_cache_manager.empty_kv_cache_blocks
        if self._queue_stands:
            # vLLM 0.32 ends its loop at a request without a token, 0.33 goes on to the next: who is
            # behind one that waits for pages must not take them.
            return nothing, 0, 0, False
        if not self._bring_back(request):
            self._queue_stands = True
            return nothing, 0, 0, False
        may_be_resumed = stream.prompt is not None or stream.lost is not None
        if may_be_resumed:
            if not self._admit(request):
                return nothing, 0, 0, False
            found = self._found[request.request_id] = self.recycler.look_up(request)
            if found is not None:
                return nothing, self.recycler.show_resumed(request, found), 0, False
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(
            request, *longest
        )
        if num_tokens >= stream.capacity:
            # Looked up again: windowed layers need pages further back of a shorter prefix.
            hit, num_tokens, _ = self.kv_cache_manager.coordinator.find_longest_cache_hit(
                request.block_hashes, stream.capacity - 1
            )
            blocks = self.kv_cache_manager.create_kv_cache_blocks(hit)
        if not may_be_resumed:
            # A state that is found is copied, whoever holds it.
            states = self.recycler.tables.state_groups
            shared = [one for group, one in enumerate(blocks.blocks) if group not in states]
            cached = itertools.chain(*shared)
            self._admit(request, sum(b.ref_cnt > 0 and not b.is_null for b in cached))
        return blocks, num_tokens, boundary, diverged

    def _bring_back(self, request: Request) -> bool:
        """Let the prefix cache have what is kept elsewhere; False: the request waits a step."""
        if self.hibernation is None:
            return True
        stream = self.recycler.streams[request.request_id]
        if self.admission.verdict(request, stream) is not Verdict.ADMITTED:
            return True  # it waits anyway
        return self.hibernation.bring_back(request, stream)

    def _admit(self, request: Request, cached_in_use: int = 0) -> bool:
        stream = self.recycler.streams[request.request_id]
        if self.admission.admit(request, stream, cached_in_use):
            self._call_in_loans()
            self._found[request.request_id] = None
            return True
        self._short_of_pages = self._queue_stands = True
        return False

    def _settle_admissions(self) -> None:
        """Who was admitted but not scheduled after all goes on waiting, and holds no page."""
        for request_id, found in self._found.items():
            request = self.requests[request_id]
            if request.status == RequestStatus.RUNNING:
                stream = self.recycler.streams[request_id]
                of_prompt = None if stream.is_lost else found
                count_prompt(request, stream, of_prompt, self.kv_cache_manager)
                self.recycler.started(request, resumed=found is not None)
                continue
            self.admission.leave(request_id)
            if found is not None:
                self.ledger.cancel(request_id)
                self.kv_cache_manager.free(request)
                self.recycler.show_whole(request)
        self._found = {}

    # -- limits -----------------------------------------------------------------------------

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Never schedule past the capacity: vLLM's last clamp on the size of every chunk.

        0 makes a full stream skip the step; with asynchronous scheduling that is how it drains
        before it evicts. A waiting request that was not admitted gets 0, too, and so do all behind
        it (``_get_local_prefix_cache_hit``). Where vLLM cannot prefill in chunks (MLA on CPUs),
        what does not fit into the first one is computed token by token.
        """
        if request.status == RequestStatus.RUNNING:  # nearly always
            return self._fit(request, num_computed_tokens, num_new_tokens)
        request_id = request.request_id
        if not request.num_computed_tokens:
            if request_id not in self._found:
                return 0
            found = self._found[request_id]
            if found is not None or (num_computed_tokens and self.recycler.tables.recurrent):
                self.ledger.spare = max(self.admission.spare(), 0)
            if found is not None:
                self.recycler.resume(request, found)
        if num_new_tokens > request.num_tokens - num_computed_tokens == 1:
            num_new_tokens = self._without_padding()
        return self._fit(request, num_computed_tokens, num_new_tokens)

    def _without_padding(self) -> int:
        """Let the last token of a prompt come alone.

        vLLM adds padding in place of drafts and insists on all of it; but it may go beyond the
        capacity, and beyond the pages that the request was admitted with. The one thing both sides
        of that read is the number of drafts. It is 0 for the rest of the loop over waiting
        requests, which ``_make_cached_request_data`` ends.
        """
        self.num_spec_tokens = 0
        return 1

    def _fit(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """As much of a chunk as capacity, kernels and pages allow."""
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        room = self.recycler.streams[request.request_id].capacity - num_computed_tokens
        if num_computed_tokens and not self.scheduler_config.enable_chunked_prefill:
            room = min(room, 1)  # its attention kernels read the cache for one query only
        num_new_tokens = num_new_tokens if num_new_tokens <= room else max(room, 0)
        if num_new_tokens > 1 and self.recycler.tables.recurrent and self.recycler.hasher:
            num_new_tokens = self._to_page_end(request, num_computed_tokens, num_new_tokens)
        if num_new_tokens and self.recycler.tables.windowed:
            return self._fit_windows(request, num_computed_tokens, num_new_tokens)
        return num_new_tokens

    def _to_page_end(self, request: Request, computed: int, num_new_tokens: int) -> int:
        """A chunk that ends with a page, where recurrent states can be kept for others.

        The last page that the prompt fills is the end of a chunk, since that is where the
        conversation is resumed when it is sent again. Chunks that the capacity cuts stay as long
        as they are otherwise: evictions decide where they end.
        """
        stream, size = self.recycler.streams[request.request_id], self.recycler.tables.block_size
        end, known = computed + num_new_tokens, request.num_tokens
        last = (known + len(stream.pending) - 1) // size * size
        if computed < last < end:
            return last - computed
        page_end = end // size * size
        is_cut = end < known and end < stream.capacity
        return page_end - computed if is_cut and page_end > computed else num_new_tokens

    def _fit_windows(self, request: Request, computed: int, num_new_tokens: int) -> int:
        """The longest chunk whose pages are its own or nobody's."""
        held = self.ledger.held(request.request_id) - self.ledger.num_pinned(request.request_id)
        allowed = held + self.admission.needs(request.request_id) + max(self.admission.spare(), 0)
        in_flight = request.num_in_flight_tokens
        return self.recycler.tables.longest_chunk(computed, in_flight, num_new_tokens, allowed)
