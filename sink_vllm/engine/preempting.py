"""How a request loses its pages and is computed again: the part of the scheduler that takes them.

vLLM preempts requests that run. Sessions hold pages while they wait for their client, too, and vLLM
knows no preemption of those.
"""

import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from sink_vllm.engine.admission import Admission
from sink_vllm.engine.recycler import Recycler


class PreemptingMixin(Scheduler):
    """Takes pages back, from whoever holds some."""

    admission: Admission
    recycler: Recycler
    _parked: set[str]
    """Sessions between two inputs that have given up pages and model-runner slot."""

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.admission.gave_way(request.request_id)
        self.recycler.preempted(request)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Sessions that wait hold pages, too; vLLM would leave them, and fail."""
        if reset_running_requests:
            for request in list(self.kv_holding_waiting):
                self._give_way(request)
        if self.recycler.hibernation is not None:
            self.recycler.hibernation.clear()
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _give_way(self, request: Request) -> None:
        """Take the pages of a request that holds some; it is computed again later."""
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            # It may be admitted again in this step, as after a reset of the prefix cache.
            self.prev_step_scheduled_req_ids.discard(request.request_id)
            # vLLM would lose a session that stops with an output from before its preemption.
            self._preempt_request(request, time.monotonic(), drop_stale_output=request.resumable)
            return
        # A session: vLLM knows no preemption of requests that do not run.
        if request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            self.recycler.parked(request)
            self._parked.add(request.request_id)
            self.max_num_active_reqs += 1  # vLLM counts it among those that hold a slot
            self.reset_preempted_req_ids.add(request.request_id)
        else:
            request.num_computed_tokens = 0
            self.recycler.preempted(request)
        self.kv_cache_manager.free(request)
        self.admission.gave_way(request.request_id)
        self.kv_holding_waiting.remove_request(request)
        self.waiting.prepend_request(request)

    def _unpark(self, request: Request) -> None:
        if request.request_id in self._parked:
            self._parked.discard(request.request_id)
            self.max_num_active_reqs -= 1
