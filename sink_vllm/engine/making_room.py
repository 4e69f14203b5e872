"""Who evicts and who gives way, once per step, before vLLM schedules: a part of the scheduler.

Every stream whose cache is full and which has nothing in flight evicts, and holders of pages give
way until all others get what they need; so vLLM's own preemption finds nothing to do.
"""

import itertools

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from sink_vllm.engine.admission import Standing, Verdict
from sink_vllm.engine.ahead import heads_per_batch, pages_per_step, steps_between_batches
from sink_vllm.engine.ledger import PageLedger
from sink_vllm.engine.preempting import PreemptingMixin
from sink_vllm.policy.schedule import cdiv

_COMPUTING = (RequestStatus.RUNNING, RequestStatus.WAITING)
_STEPS_WITHOUT_LOANS = 8
"""After a step in which nothing could be composed ahead, because all free pages are promised."""


class MakingRoomMixin(PreemptingMixin):
    """Evicts, composes ahead of evictions, and takes pages back for those who need them."""

    ledger: PageLedger
    _steps_without_loans = 0
    _steps_to_heads = 0
    _are_rotating = False
    """Whether streams whose next eviction re-anchors were composing when heads were last due."""

    def _make_room(self) -> None:
        """Evict what is full, and let holders give way until all others get what they need."""
        full: list[Request] = []
        composable: list[Request] = []
        streams, ahead = self.recycler.streams, self.ledger.ahead
        heads_due = self._are_heads_due()
        composes = heads_due or self._are_rotating
        for request in itertools.chain(self.running, self.kv_holding_waiting):
            stream, computed = streams[request.request_id], request.num_computed_tokens
            if computed < stream.composable_at or request.status not in _COMPUTING:
                continue
            if computed < stream.capacity:
                if (
                    composes
                    and request.request_id not in ahead.done
                    and computed - request.num_in_flight_tokens >= stream.composable_at
                ):
                    composable.append(request)
            elif self.recycler.is_full(request):
                full.append(request)
        if full:
            self.ledger.spare = max(self.admission.spare(), 0)
        for request in full:
            self._evict(request)
        if self.ledger.num_free < self._most_pages_of_a_step:
            if self.admission.num_guests:
                while self.admission.slack() < 0 and (guest := self.admission.newest_guest()):
                    self._give_way(guest)
            self._call_in_loans()
        if composable:
            self._compose_ahead(composable, heads_due)
        if not self.running and (self.waiting or self.kv_holding_waiting):
            self._make_progress()

    def _are_heads_due(self) -> bool:
        """Whether this step composes heads, a batch of them."""
        if self._steps_without_loans:
            self._steps_without_loans -= 1
            self._are_rotating = False
            return False
        self._steps_to_heads -= 1
        if self._steps_to_heads > 0:
            return False
        self._steps_to_heads = steps_between_batches(self.recycler.config.schedule)
        return True

    def _compose_ahead(self, composable: list[Request], heads_due: bool) -> None:
        """Let some streams compose what their next evictions need, in pages nobody needs."""
        config, groups = self.recycler.config, len(self.recycler.tables.full)
        rotating = [request for request in composable if self.recycler.reanchors_next(request)]
        self._are_rotating = bool(rotating)
        most = heads_per_batch(len(self.running), groups) if heads_due else 0
        if rotating:
            window = groups * cdiv(config.capacity, self.recycler.tables.block_size)
            most += pages_per_step(len(rotating), window, config.schedule)
        if self.admission.may_be_short(self._most_pages_of_a_step + most):
            most = min(most, self.admission.spare())
            if most <= 0:
                self._steps_without_loans = _STEPS_WITHOUT_LOANS
        if rotating:  # heads first: without its own a stream has to compose it when it evicts
            composable = sorted(composable, key=self.recycler.reanchors_next)
        for request in composable:
            if most <= 0:
                return
            if self.admission.standing(request.request_id) is not Standing.WAITING:
                most -= self.recycler.compose_ahead(request, most)

    def _call_in_loans(self) -> None:
        """Holders need pages that heads have been composed in: these go back to the pool."""
        if self.ledger.ahead and self.admission.spare() < 0:
            self.recycler.give_back_ahead()

    @property
    def _most_pages_of_a_step(self) -> int:
        """Pages that a step can take at most, whoever is scheduled."""
        tables = self.recycler.tables
        per_group = self.max_num_scheduled_tokens // tables.block_size
        per_group += len(self.running) + len(self.kv_holding_waiting) + 1
        return tables.num_groups * per_group

    def _evict(self, request: Request) -> None:
        """Make room in a full stream, at the cost of guests when pages are short."""
        while self.admission.standing(request.request_id) is not Standing.WAITING:
            verdict = self.admission.promote(request)
            if verdict is Verdict.ADMITTED:
                if self.recycler.evict(request):
                    return
                if self.ledger.ahead:
                    self.recycler.give_back_ahead()
                    continue
            self._give_way(self.admission.who_gives_way(request, verdict))

    def _make_progress(self) -> None:
        """Nothing runs: sessions whose clients are silent give way to who waits for pages."""
        while (head := self._first_ready()) is not None:
            active = self.num_waiting_for_streaming_input
            if active < self.max_num_active_reqs and self._can_start(head):
                return
            idle = [
                request
                for request in self.kv_holding_waiting
                if request.status == RequestStatus.WAITING_FOR_STREAMING_REQ
            ]
            if idle:
                self._give_way(min(idle, key=self._silence))
            elif head.num_computed_tokens:
                self._give_way(head)  # it holds pages, and cannot go on with them
            else:
                return

    def _silence(self, request: Request) -> tuple[bool, float]:
        """Who loses no state comes first, then who has been silent the longest."""
        return self.admission.loses_state(request.request_id), request.arrival_time

    def _first_ready(self) -> Request | None:
        """The first request vLLM would admit, if there were pages for it."""
        waiting = [self.kv_holding_waiting]
        if self._pause_state == PauseState.UNPAUSED:
            waiting.append(self.waiting)
        for request in itertools.chain(*waiting):
            if not self._is_blocked_waiting_status(request.status) or (
                request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
                and self._is_grammar_ready(request)
            ):
                return request
        return None

    @staticmethod
    def _is_grammar_ready(request: Request) -> bool:
        structured = request.structured_output_request
        return structured is not None and structured.grammar is not None

    def _can_start(self, request: Request) -> bool:
        """Whether there are pages for the next chunk of a request that waits."""
        if request.num_computed_tokens:
            return self.admission.slack() >= 0
        stream = self.recycler.streams[request.request_id]
        return self.admission.verdict(request, stream) is Verdict.ADMITTED
