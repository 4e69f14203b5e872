"""Worker-side state of the policy, shared by the mixins of both model runners."""

from collections.abc import Iterable, Sequence

import torch

from sink_vllm.config import SinkConfig
from sink_vllm.plan import StepPlan


class RopeOffsets:
    """Rope offset of every stream, and of every row of the current batch.

    An offset is what the positions given to the model have in excess of cache positions. Streams
    that have not evicted have none.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self._of_request: dict[str, int] = {}
        self._rows_host = torch.zeros(max_num_reqs, dtype=torch.int64)
        self._rows = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._arranged: list[str] | None = None

    def __bool__(self) -> bool:
        return bool(self._of_request)

    def update(self, plan: StepPlan | None, finished: Iterable[str]) -> None:
        """Take over the offsets of a step; ``finished`` requests are forgotten."""
        if self._of_request:
            for req_id in finished:
                if self._of_request.pop(req_id, None) is not None:
                    self._arranged = None
        if plan is not None and plan.resent:
            self._arranged = None
            for req_id, state in plan.resent.items():
                if state.rope_offset:
                    self._of_request[req_id] = state.rope_offset
                else:
                    self._of_request.pop(req_id, None)

    def of_rows(self, req_ids: Sequence[str]) -> torch.Tensor:
        """Offsets in batch order: int64 ``[max_num_reqs]`` on the device."""
        if self._arranged != req_ids:
            self._arranged = list(req_ids)
            offsets = [self._of_request.get(req_id, 0) for req_id in req_ids]
            self._rows_host[: len(offsets)] = torch.tensor(offsets, dtype=torch.int64)
            self._rows.copy_(self._rows_host)
        return self._rows

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._of_request


class StreamingLLMState:
    """The policy as one model runner sees it."""

    def __init__(self, config: SinkConfig, max_num_reqs: int, device: torch.device) -> None:
        self.config = config
        self.offsets = RopeOffsets(max_num_reqs, device)
        self.plan: StepPlan | None = None

    def begin_step(self, plan: StepPlan | None, finished: Iterable[str]) -> StepPlan | None:
        """Make ``plan`` the current one, before vLLM updates its own request states."""
        self.plan = plan
        self.offsets.update(plan, finished)
        return plan
