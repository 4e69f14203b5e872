"""Rope offsets of the streams a worker runs: positions given to the model minus cache positions."""

from collections.abc import Iterable, Sequence

import torch

from sink_vllm.policy.plan import StepPlan


class RopeOffsets:
    """Offset of every stream that has one, and of every row of the current batch."""

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self._of_request: dict[str, int] = {}
        self._rows = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._arranged: list[str] | None = None

    def __bool__(self) -> bool:
        """Whether any stream has an offset; streams that never evicted have none."""
        return bool(self._of_request)

    def update(self, plan: StepPlan | None, finished: Iterable[str]) -> None:
        """Take over the offsets of a step; requests in ``finished`` are forgotten."""
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
        """Offsets in batch order: int64 ``[max_num_reqs]`` on the device, zero past the batch."""
        if self._arranged != req_ids:
            self._arranged = list(req_ids)
            offsets = [self._of_request.get(req_id, 0) for req_id in req_ids]
            self._rows[: len(offsets)] = torch.tensor(offsets, dtype=torch.int64)
        return self._rows
