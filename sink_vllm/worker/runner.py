"""What the mixins of both model runners share: layers, KV cache specs, the mover of pages."""

from typing import Any, ClassVar

from vllm import envs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

from sink_vllm.compat.parts import check_config
from sink_vllm.compat.shared import share
from sink_vllm.compat.slots import num_slots, page_bytes
from sink_vllm.compat.spec import (
    check_groups,
    under_policy,
    with_equal_pages,
    with_shared_layers,
)
from sink_vllm.gate.lengths import rope_positions
from sink_vllm.gate.refused import refusals
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.plan import StepPlan
from sink_vllm.worker.layers.attention import (
    AttentionLayer,
    attention_layers,
    check_windows,
    rope_rows,
    shared_layers,
)
from sink_vllm.worker.layers.recurrent import recurrent_layers
from sink_vllm.worker.layers.rope_table import extend_rope_tables
from sink_vllm.worker.moves.arena import Arena, layout_of
from sink_vllm.worker.moves.mover import PageMover
from sink_vllm.worker.moves.states import StateMover
from sink_vllm.worker.scratch import Scratch

# vLLM's two model runners have no common base; what the mixins call, both of them have.
_Runner: Any = object


class StreamingLLMRunner(_Runner):
    """Base of the mixins; comes before vLLM's model runner in the bases of a concrete class."""

    consumes_plans: ClassVar = True
    """See ``sink_vllm.worker.plans``."""
    attention_layers: list[AttentionLayer]
    page_mover: PageMover
    state_mover: StateMover
    page_scratch: Scratch
    page_arena: Arena | None = None
    """Host memory for pages, if any are kept."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        with refusals():
            self.attention_layers = attention_layers(self.get_model(), self.vllm_config)
            most = rope_positions(self.vllm_config.model_config)
            extend_rope_tables(self.attention_layers, self._config.capacity, most)
        self.page_scratch = Scratch(self.device)

    def reserve_scratch(self) -> None:
        """Allocate what page moves work in; to be called before memory is measured."""
        self.page_scratch.reserve(self.get_kv_cache_spec().values())

    @property
    def _config(self) -> SinkConfig:
        with refusals():
            config = SinkConfig.of(self.vllm_config)
        check_config(self.vllm_config, config)
        assert config is not None  # this worker was named, so the policy is on
        return config

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The model's specs, its attention layers under the policy."""
        config, rows = self._config, rope_rows(self.attention_layers)
        block_size = self.cache_config.block_size
        specs = super().get_kv_cache_spec()
        with refusals():
            ours = {
                name: under_policy(spec, config, rows, block_size) for name, spec in specs.items()
            }
            return with_equal_pages(ours, envs.VLLM_KV_CACHE_LAYOUT)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        with refusals():
            check_groups(kv_cache_config, self.cache_config.block_size)
        with_layers = with_shared_layers(kv_cache_config, shared_layers(self.vllm_config))
        super().initialize_kv_cache(with_layers, *args, **kwargs)
        with refusals():
            self._bind_pages(with_layers)
            # vLLM makes a small cache first to see what graphs take, and drops it again.
            if not (kwargs.get("is_profiling") or any(args[:1])):
                self._bind_arena(kv_cache_config)

    def _bind_pages(self, kv_cache_config: KVCacheConfig) -> None:
        groups = kv_cache_config.kv_cache_groups
        index_of = {name: i for i, group in enumerate(groups) for name in group.layer_names}
        for layer in self.attention_layers:
            layer.group = index_of[layer.name]
        check_windows(self.attention_layers)
        self.reserve_scratch()  # where nothing is measured: workers that join a running engine
        self.page_mover = PageMover.for_runner(self)
        self.state_mover = StateMover(
            (index_of[name], layer) for name, layer in recurrent_layers(self.vllm_config)
        )

    def run_moves(self, plan: StepPlan | None) -> None:
        """Move pages, and copy states, before the step writes any."""
        if plan is not None and plan.moves:
            self.page_mover.run(plan.moves)
            self.state_mover.run(plan.moves)

    def _bind_arena(self, kv_cache_config: KVCacheConfig) -> None:
        """Host memory for pages, if any are to be kept."""
        slots = num_slots(self._config, self.vllm_config, kv_cache_config)
        if slots:
            size = page_bytes(kv_cache_config)
            shared = None
            if self._config.disk is not None:
                parallel = self.vllm_config.parallel_config
                shared = share(
                    slots * size,
                    parallel.rank,
                    layout_of(self.page_mover, size),
                    is_child=parallel.distributed_executor_backend == "mp",
                )
            self.page_arena = Arena(self.page_mover, slots, size, self.device, shared)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Copies of pages come before all else of a step, one without tokens included."""
        plan = StepPlan.of(scheduler_output)
        if plan is not None and (plan.stores or plan.loads):
            assert self.page_arena is not None, "the engine core keeps pages, and this worker none"
            self.page_arena.run(plan)
        return super().execute_model(scheduler_output, *args, **kwargs)
