"""What the policy adds to vLLM's V1 model runner (worker process)."""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from sink_vllm.policy.plan import StepPlan
from sink_vllm.worker.runner import StreamingLLMRunner

if TYPE_CHECKING:
    from vllm.sequence import IntermediateTensors


class StreamingLLMRunnerV1(StreamingLLMRunner):
    """Mixin over ``GPUModelRunner`` (V1) and its CPU subclass.

    Three things happen per step, in this order: vLLM zeroes and copies its own pages, the moves
    of the step run, and the positions given to the model (nothing else) get the rope offsets of
    their streams. Slot mapping and attention metadata keep cache positions.
    """

    _plan: StepPlan | None = None

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        self._plan = StepPlan.of(scheduler_output)
        self.rope_offsets.update(self._plan, scheduler_output.finished_req_ids)
        result = super()._update_states(scheduler_output)
        if self._plan is not None and self._plan.moves:
            self.page_mover.run(self._plan.moves)
        return result

    def _update_streaming_request(
        self, req_id: str, new_req_data: NewRequestData
    ) -> CachedRequestState:
        """Keep the split between prompt and output of a request that is sent again.

        vLLM sends sessions with their outputs moved into the prompt; penalties, ``min_tokens``
        and logits processors need to know which tokens the model generated.
        """
        req_state = super()._update_streaming_request(req_id, new_req_data)
        if self._plan is not None and req_id in self._plan.resent:
            req_state.output_token_ids.extend(self._plan.resent[req_id].output_token_ids)
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
            self.positions[:n] += rows[self.req_indices.gpu[:n]]
        return result
