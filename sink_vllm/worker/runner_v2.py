"""What the policy adds to vLLM's V2 model runner (worker process)."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

from sink_vllm.policy.plan import StepPlan
from sink_vllm.worker.runner import StreamingLLMRunner
from sink_vllm.worker.upload import upload

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class StreamingLLMRunnerV2(StreamingLLMRunner):
    """Mixin over ``GPUModelRunner`` (V2) and its CPU subclass.

    ``input_batch.positions`` stays what vLLM made it, cache positions: slot mapping, sampler and
    drafters read it. The model reads a second buffer, the way M-RoPE does it, and the sampler,
    whose noise is a function of seed and position, sees stream positions.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        slots = self.max_num_reqs
        self._rope_offset_of_slot = np.zeros(slots, dtype=np.int64)
        self._evicted_of_slot = np.zeros(slots, dtype=np.int64)
        self._rope_positions = torch.zeros(
            self.max_num_tokens, dtype=torch.int64, device=self.device
        )
        self._give_model_its_own_positions()

    def _give_model_its_own_positions(self) -> None:
        """Wrap the two methods of the model state whose results override the model's inputs.

        On the instance, so that it works for every model state, those of models included. The
        dummy inputs matter as much as the real ones: CUDA graphs capture that buffer's address.
        """
        state = self.model_state
        prepare_inputs, prepare_dummy_inputs = state.prepare_inputs, state.prepare_dummy_inputs

        def with_rope_positions(input_batch: "InputBatch", req_states: Any) -> dict[str, Any]:
            inputs = prepare_inputs(input_batch, req_states)
            return {**inputs, "positions": self._fill_rope_positions(input_batch)}

        def with_dummy_positions(num_reqs: int, num_tokens: int) -> dict[str, Any]:
            inputs = prepare_dummy_inputs(num_reqs, num_tokens)
            return {**inputs, "positions": self._rope_positions[:num_tokens]}

        state.prepare_inputs = with_rope_positions
        state.prepare_dummy_inputs = with_dummy_positions

    def _fill_rope_positions(self, input_batch: "InputBatch") -> torch.Tensor:
        """Cache positions plus rope offsets: a view of the persistent buffer, padding included."""
        padded = self._rope_positions[: input_batch.num_tokens_after_padding]
        padded.copy_(input_batch.positions[: input_batch.num_tokens_after_padding])
        shift = self._per_token(self._rope_offset_of_slot, input_batch)
        if shift is not None:
            padded[: len(shift)] += shift
        return padded

    def _per_token(self, of_slot: np.ndarray, input_batch: "InputBatch") -> torch.Tensor | None:
        """A number per request slot, repeated for each of its tokens; ``None`` if all are 0."""
        values = of_slot[input_batch.idx_mapping_np]
        if not values.any():
            return None
        tokens = np.repeat(values, input_batch.num_scheduled_tokens)[: input_batch.num_tokens]
        return upload(tokens, self.device)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        plan = StepPlan.of(scheduler_output)
        refreshes = plan.refreshes if plan is not None else {}
        for data in scheduler_output.scheduled_new_reqs:
            slot = self.req_states.req_id_to_index[data.req_id]
            state = refreshes.get(data.req_id)
            # Slots are recycled: a request without offset must clear its predecessor's.
            self._rope_offset_of_slot[slot] = state.rope_offset if state else 0
            self._evicted_of_slot[slot] = state.evicted if state else 0

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().update_requests(scheduler_output)
        plan = StepPlan.of(scheduler_output)
        if plan is not None and plan.moves:
            self.page_mover.run(plan.moves)

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: "InputBatch",
        grammar_output: GrammarOutput | None,
    ) -> Any:
        """Sample with stream positions; with cache positions noise would repeat every ``g``."""
        shift = self._per_token(self._evicted_of_slot, input_batch)
        if shift is not None:
            positions = input_batch.positions.clone()
            positions[: len(shift)] += shift
            input_batch = dataclasses.replace(input_batch, positions=positions)
        return super().sample(hidden_states, input_batch, grammar_output)
