"""What the policy adds to vLLM's V1 model runner (worker process)."""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from sink_vllm.config import SinkConfig
from sink_vllm.plan import StepPlan
from sink_vllm.scheduler.spec import StreamingLLMSpec
from sink_vllm.worker.layers import AttentionLayer, attention_layers, rope_rows
from sink_vllm.worker.page_moves import PageMover
from sink_vllm.worker.streaming import StreamingLLMState

if TYPE_CHECKING:
    from vllm.sequence import IntermediateTensors

    _Runner = GPUModelRunner
else:
    _Runner = object


class StreamingLLMRunnerV1(_Runner):
    """Mixin over ``GPUModelRunner`` (V1) and its CPU subclass.

    Three things happen per step, in this order: vLLM zeroes and copies its own pages, the moves
    of the step run, and the positions given to the model (nothing else) get the rope offsets of
    their streams. Slot mapping and attention metadata keep cache positions.
    """

    streaming_llm: StreamingLLMState
    attention_layers: list[AttentionLayer]
    page_mover: PageMover

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        config = SinkConfig.of(self.vllm_config)
        assert config is not None, "the worker of the policy needs the policy"
        self.streaming_llm = StreamingLLMState(config, self.max_num_reqs, self.device)
        self.attention_layers = attention_layers(self.get_model(), self.vllm_config)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The model's specs, its full-attention layers under the policy."""
        config = self.streaming_llm.config
        rows = rope_rows(self.attention_layers)
        return {
            name: StreamingLLMSpec.wrap(spec, config, rows)
            if type(spec) is FullAttentionSpec
            else spec
            for name, spec in super().get_kv_cache_spec().items()
        }

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self.page_mover = PageMover.for_runner(self)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        plan = self.streaming_llm.begin_step(
            StepPlan.of(scheduler_output), scheduler_output.finished_req_ids
        )
        result = super()._update_states(scheduler_output)
        if plan is not None and plan.moves:
            self.page_mover.run(plan.moves)
        return result

    def _update_streaming_request(
        self, req_id: str, new_req_data: NewRequestData
    ) -> CachedRequestState:
        """Keep the split between prompt and output of a request that is sent again.

        vLLM sends sessions with their outputs moved into the prompt; penalties, ``min_tokens``
        and logits processors need to know which tokens the model generated.
        """
        req_state = super()._update_streaming_request(req_id, new_req_data)
        plan = self.streaming_llm.plan
        if plan is not None and req_id in plan.resent:
            req_state.output_token_ids.extend(plan.resent[req_id].output_token_ids)
        return req_state

    def _preprocess(
        self,
        scheduler_output: SchedulerOutput,
        num_input_tokens: int,
        intermediate_tensors: "IntermediateTensors | None" = None,
    ) -> Any:
        result = super()._preprocess(scheduler_output, num_input_tokens, intermediate_tensors)
        offsets = self.streaming_llm.offsets
        if offsets:
            # In place: CUDA graphs replay reads of this very buffer. Slot mapping and sequence
            # lengths were computed from it before, and are done with it.
            n = scheduler_output.total_num_scheduled_tokens
            rows = offsets.of_rows(self.input_batch.req_ids)
            self.positions[:n] += rows[self.req_indices.gpu[:n]]
        return result
