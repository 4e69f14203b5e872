"""What the policy adds to vLLM's V2 model runner (worker process)."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

from sink_vllm.policy.plan import StepPlan
from sink_vllm.worker.runner import StreamingLLMRunner
from sink_vllm.worker.upload import upload

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class StateWithPositions:
    """A runner's model state, whatever its class, with positions of the model's own.

    What a model state returns overrides the model's inputs, in steps, in dummy runs and where CUDA
    graphs are captured. Everything else that is read, called or assigned here is the state's.
    """

    _wrapped_state: Any
    _positions_of: "Callable[[InputBatch], torch.Tensor]"
    _dummy_positions_of: Callable[[int], torch.Tensor]

    def __init__(
        self,
        state: Any,
        positions: "Callable[[InputBatch], torch.Tensor]",
        dummy_positions: Callable[[int], torch.Tensor],
    ) -> None:
        vars(self).update(
            _wrapped_state=state, _positions_of=positions, _dummy_positions_of=dummy_positions
        )

    def prepare_inputs(self, input_batch: "InputBatch", *args: Any, **kwargs: Any) -> Any:
        inputs = self._wrapped_state.prepare_inputs(input_batch, *args, **kwargs)
        return {**inputs, "positions": self._positions_of(input_batch)}

    def prepare_dummy_inputs(
        self, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = self._wrapped_state.prepare_dummy_inputs(num_reqs, num_tokens, *args, **kwargs)
        return {**inputs, "positions": self._dummy_positions_of(num_tokens)}

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_wrapped_state"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped_state, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._wrapped_state, name)


class StreamingLLMRunnerV2(StreamingLLMRunner):
    """Mixin over ``GPUModelRunner`` (V2) and its CPU subclass.

    ``input_batch.positions`` stays what vLLM made it, cache positions: slot mapping, sampler and
    drafters read it. The model reads a second buffer, the way M-RoPE does it, and the sampler,
    whose noise is a function of seed and position, sees stream positions.
    """

    model_state: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        slots = self.max_num_reqs
        self._rope_offset_of_slot = np.zeros(slots, dtype=np.int64)
        self._evicted_of_slot = np.zeros(slots, dtype=np.int64)
        self._rope_positions = torch.zeros(
            self.max_num_tokens, dtype=torch.int64, device=self.device
        )
        # CUDA graphs capture the buffer's address, so the dummy inputs have it as well.
        self.model_state = StateWithPositions(
            self.model_state,
            self._fill_rope_positions,
            lambda num_tokens: self._rope_positions[:num_tokens],
        )

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
        self.run_moves(StepPlan.of(scheduler_output))

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
