"""Every run-time change of vLLM that sink_vllm makes.

A module that patches vLLM lists its patches in a tuple named ``PATCHES``, is named here, and has
one record per patch in ``patches/``. Changes of single objects, which cannot be patched by name,
are listed in ``OBJECT_CHANGES``. tests/compat/test_patch_records.py compares both with the records,
and the second list with the code.
"""

import importlib
from typing import NamedTuple

from sink_vllm.compat.patching import Patch

PATCHING_MODULES = (
    "sink_vllm.server.cli",
    "sink_vllm.server.engine_args",
    "sink_vllm.server.front_end",
    "sink_vllm.server.lengths",
    "sink_vllm.server.renderer",
    "sink_vllm.server.requests",
    "sink_vllm.server.options",
    "sink_vllm.server.pin",
    "sink_vllm.server.events",
    "sink_vllm.engine.input_thread",
    "sink_vllm.engine.start_up",
    "sink_vllm.worker.plans",
)
# Applied by who needs them: by a class whose targets import optional packages, when it is used, and
# in the place of all the others beside a vLLM that these were not made for.
ON_DEMAND_MODULES = ("sink_vllm.ray.patches", "sink_vllm.compat.unsupported")


class ObjectChange(NamedTuple):
    """An object of vLLM gets, loses or changes an attribute."""

    where: str
    """The module, or a package for all of its modules."""
    what: str
    """What is assigned to, or the method that changes it, as the code spells it (with ``*`` for
    anything)."""
    record: str


OBJECT_CHANGES = (
    ObjectChange(
        "sink_vllm.server.cli",
        "parser._option_string_actions[_OPTION].__class__",
        "0001-engine-args-add-cli-args",
    ),
    *(
        ObjectChange("sink_vllm.server.engine_args", what, "0002-engine-args-create-engine-config")
        for what in (
            "engine_args.*",
            "probe.max_model_len",
            "vllm_config.*",
            "scheduler.max_num_batched_tokens",
        )
    ),
    *(
        ObjectChange("sink_vllm.server.block_size", what, "0002-engine-args-create-engine-config")
        for what in (
            "probe.cache_config",
            "probe.compilation_config",
            "probe.compilation_config.static_forward_context",
        )
    ),
    ObjectChange(
        "sink_vllm.ray.choose",
        "parallel_config.distributed_executor_backend",
        "0030-ray-workers-on-cpus",
    ),
    *(
        ObjectChange("sink_vllm.server.lengths", what, "0003-front-end-view-of-lengths")
        for what in ("front.model_config", "front.model_config.max_model_len")
    ),
    ObjectChange("sink_vllm.server.memory", "*.__class__", "0043-endless-responses"),
    ObjectChange("sink_vllm.server.response_state", "processor.logprobs", "0043-endless-responses"),
    ObjectChange("sink_vllm.server.memory", "processed.reqs_to_abort", "0043-endless-responses"),
    ObjectChange("sink_vllm.server.detokenizer", "*.__class__", "0043-endless-responses"),
    ObjectChange("sink_vllm.server.prompts", "vars(raw_request).pop", "0007-streamed-responses"),
    ObjectChange(
        "sink_vllm.worker.cpu_worker",
        "self.input_batch.generators*",
        "0044-generators-of-discarded-rows",
    ),
    ObjectChange(
        "sink_vllm.worker.layers.rotation", "self.rotary.cos_sin_cache", "0046-longer-rope-tables"
    ),
    ObjectChange("sink_vllm.worker.layers.rotation", "_ROPE_DICT[*]", "0046-longer-rope-tables"),
    ObjectChange("sink_vllm.tools.specs", "_ROPE_DICT[*]", "0046-longer-rope-tables"),
    *(
        ObjectChange("sink_vllm.tools.seats", what, "0052-seats-of-a-split-model")
        for what in (
            "parallel_config.rank",
            "group.ranks",
            "group.rank",
            "group.rank_in_group",
            "group.world_size",
        )
    ),
    *(
        ObjectChange("sink_vllm.worker.layers.rotation_longrope", what, "0046-longer-rope-tables")
        for what in ("rotary.use_long_rope", "self.rotary.long_short_cos_sin_cache")
    ),
    ObjectChange("sink_vllm.server.lengths", "front.<_ATTRIBUTE>", "0047-marks"),
    ObjectChange("sink_vllm.server.lengths", "front.model_config.<_ATTRIBUTE>", "0047-marks"),
    ObjectChange("sink_vllm.server.renderer", "renderer.<_ATTRIBUTE>", "0047-marks"),
    ObjectChange("sink_vllm.server.pin", "vars(renderer).setdefault", "0047-marks"),
    ObjectChange("sink_vllm.engine", "output.<StepPlan.ATTRIBUTE>", "0047-marks"),
    ObjectChange("sink_vllm.engine.input_thread", "made.<PREPARED>", "0047-marks"),
    ObjectChange("sink_vllm.compat.patching", "owner.*", "0047-marks"),
    ObjectChange("sink_vllm.server.cli", "namespace.*", "0048-values-of-a-request"),
    *(
        ObjectChange("sink_vllm.server", what, "0048-values-of-a-request")
        for what in (
            "card.max_model_len",
            "params.*",
            "response.kv_transfer_params",
            "chunk.kv_transfer_params",
            "completion.text",
            "self._messages.messages",
            "state.streaming_input",
            "output.finish_reason",
            "output.new_token_ids*",
            "output.new_logprobs",
        )
    ),
    ObjectChange("sink_vllm.server.streams", "params.*", "0048-values-of-a-request"),
    ObjectChange(
        "sink_vllm.policy.stats",
        "scheduler_stats.num_kv_fetch_reqs_by_stage.update",
        "0048-values-of-a-request",
    ),
    ObjectChange(
        "sink_vllm.engine.hibernation",
        "pool.cached_block_hash_to_block.insert",
        "0053-pages-that-come-back",
    ),
    *(
        ObjectChange("sink_vllm.worker.runner_v1", what, "0048-values-of-a-request")
        for what in ("req_state.output_token_ids.extend", "self.mrope_positions.gpu*")
    ),
    *(
        ObjectChange("sink_vllm.engine", what, "0048-values-of-a-request")
        for what in (
            "request.*",
            "params.*",
            "data.sampling_params*",
            "output.kv_transfer_params",
            "output.scheduled_new_reqs.extend",
            "session.*",
            "structured.reasoning_ended",
            "cache.*",
        )
    ),
)


def start_up_patches() -> tuple[Patch, ...]:
    """What every process applies, those of one module in this order. Imports no vLLM."""
    return _patches_of(PATCHING_MODULES)


def declared_patches() -> tuple[Patch, ...]:
    """All patches, those on demand included. Imports no vLLM."""
    return _patches_of((*PATCHING_MODULES, *ON_DEMAND_MODULES))


def _patches_of(module_names: tuple[str, ...]) -> tuple[Patch, ...]:
    return tuple(
        patch
        for module_name in module_names
        for patch in importlib.import_module(module_name).PATCHES
    )
