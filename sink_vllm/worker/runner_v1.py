"""What the policy adds to vLLM's V1 model runner (worker process)."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from sink_vllm.policy.plan import StepPlan
from sink_vllm.worker.runner import StreamingLLMRunner
from sink_vllm.worker.upload import upload

if TYPE_CHECKING:
    from vllm.sequence import IntermediateTensors


class RopeOffsets:
    """Positions given to the model minus cache positions, by stream and by row of the batch.

    The host keeps them. What the device has is made in the step that needs it, and not with the
    model, whose memory sleep level 2 throws away with all that is in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_request: dict[str, int] = {}
        self._rows = torch.empty(0)
        self._arranged: list[str] | None = None

    def __bool__(self) -> bool:
        """Whether any stream has an offset; streams that never evicted have none."""
        return bool(self._of_request)

    def update(self, plan: StepPlan | None, finished: Iterable[str]) -> None:
        """Take over the offsets of a step; requests in ``finished`` are forgotten."""
        # Finished first: a new request under the same name may come in the same step.
        if self._of_request:
            for req_id in finished:
                if self._of_request.pop(req_id, None) is not None:
                    self._arranged = None
        if plan is not None and plan.refreshes:
            self._arranged = None
            for req_id, state in plan.refreshes.items():
                if state.rope_offset:
                    self._of_request[req_id] = state.rope_offset
                else:
                    self._of_request.pop(req_id, None)

    def of_rows(self, req_ids: Sequence[str]) -> torch.Tensor:
        """Offsets in batch order: int64 ``[len(req_ids)]`` on the device."""
        if self._arranged != req_ids:
            self._arranged = list(req_ids)
            offsets = [self._of_request.get(req_id, 0) for req_id in req_ids]
            self._rows = upload(offsets, self._device)
        return self._rows


class StreamingLLMRunnerV1(StreamingLLMRunner):
    """Mixin over ``GPUModelRunner`` (V1) and its CPU subclass.

    Three things happen per step, in this order: vLLM zeroes and copies its own pages, the moves
    of the step run, and the positions given to the model (nothing else) get the rope offsets of
    their streams. Slot mapping and attention metadata keep cache positions.
    """

    _plan: StepPlan | None = None
    rope_offsets: RopeOffsets

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.rope_offsets = RopeOffsets(self.device)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        self._plan = StepPlan.of(scheduler_output)
        self.rope_offsets.update(self._plan, scheduler_output.finished_req_ids)
        result = super()._update_states(scheduler_output)
        self.run_moves(self._plan)
        return result

    def _update_streaming_request(
        self, req_id: str, new_req_data: NewRequestData
    ) -> CachedRequestState:
        """Keep the split between prompt and output of a request that is sent again.

        vLLM sends sessions with their outputs moved into the prompt; penalties, ``min_tokens``
        and logits processors need to know which tokens the model generated.
        """
        req_state = super()._update_streaming_request(req_id, new_req_data)
        if self._plan is not None and req_id in self._plan.refreshes:
            req_state.output_token_ids.extend(self._plan.refreshes[req_id].output_token_ids)
        return req_state

    def _preprocess(
        self,
        scheduler_output: SchedulerOutput,
        num_input_tokens: int,
        intermediate_tensors: "IntermediateTensors | None" = None,
    ) -> Any:
        result = super()._preprocess(scheduler_output, num_input_tokens, intermediate_tensors)
        if self.rope_offsets:
            # In place: CUDA graphs replay reads of this very buffer. Slot mapping and sequence
            # lengths were computed from it before, and are done with it.
            n = scheduler_output.total_num_scheduled_tokens
            rows = self.rope_offsets.of_rows(self.input_batch.req_ids)
            shift = rows[self.req_indices.gpu[:n]]
            self.positions[:n] += shift
            if self.uses_mrope:  # this buffer is then read instead, by section; texts have no gaps
                self.mrope_positions.gpu[:, :n] += shift
        return result
