"""Every run-time change of vLLM that sink_vllm makes.

A module that patches vLLM lists its patches in a tuple named ``PATCHES``, is named here, and has
one record per patch in ``patches/``. Changes of single objects, which cannot be patched by name,
are listed in ``OBJECT_CHANGES``. tests/test_patch_records.py compares both with the records, and
the second list with the code.
"""

import importlib
from typing import NamedTuple

from sink_vllm.patching import Patch

PATCHING_MODULES = (
    "sink_vllm.frontend.cli",
    "sink_vllm.frontend.engine_args",
    "sink_vllm.frontend.clients",
    "sink_vllm.frontend.lengths",
    "sink_vllm.frontend.renderer",
    "sink_vllm.frontend.requests",
    "sink_vllm.frontend.request_options",
    "sink_vllm.frontend.pin",
    "sink_vllm.frontend.streams",
    "sink_vllm.scheduler.engine_core",
    "sink_vllm.scheduler.checks",
    "sink_vllm.worker.plans",
)
# Applied by who needs them: by a class whose targets import optional packages, when it is used, and
# in the place of all the others beside a vLLM that these were not made for.
ON_DEMAND_MODULES = ("sink_vllm.ray.patches", "sink_vllm.frontend.unsupported")


class ObjectChange(NamedTuple):
    """An assignment to an attribute of an object of vLLM."""

    where: str
    """The module, or a package for all of its modules."""
    what: str
    """What is assigned to, as the code spells it (with ``*`` for anything)."""
    record: str


OBJECT_CHANGES = (
    ObjectChange(
        "sink_vllm.frontend.cli",
        "parser._option_string_actions[_OPTION].__class__",
        "0001-engine-args-add-cli-args",
    ),
    *(
        ObjectChange(
            "sink_vllm.frontend.engine_args", what, "0002-engine-args-create-engine-config"
        )
        for what in (
            "engine_args.*",
            "probe.max_model_len",
            "vllm_config.*",
            "scheduler.max_num_batched_tokens",
        )
    ),
    ObjectChange(
        "sink_vllm.ray.choose",
        "parallel_config.distributed_executor_backend",
        "0030-ray-workers-on-cpus",
    ),
    *(
        ObjectChange("sink_vllm.frontend.lengths", what, "0003-front-end-view-of-lengths")
        for what in ("front.model_config", "front.model_config.max_model_len")
    ),
    ObjectChange("sink_vllm.frontend.memory", "*.__class__", "0043-endless-responses"),
    ObjectChange("sink_vllm.frontend.memory", "processor.logprobs", "0043-endless-responses"),
    ObjectChange("sink_vllm.frontend.memory", "processed.reqs_to_abort", "0043-endless-responses"),
    ObjectChange("sink_vllm.frontend.detokenizer", "*.__class__", "0043-endless-responses"),
    ObjectChange(
        "sink_vllm.worker.cpu_worker", "self.model_runner.__class__", "0044-cpu-model-runner"
    ),
    ObjectChange(
        "sink_vllm.worker.cpu_worker", "self.input_batch.generators[*]", "0044-cpu-model-runner"
    ),
    ObjectChange(
        "sink_vllm.worker.runner_v2", "state.prepare_*", "0045-positions-of-the-model-state"
    ),
    ObjectChange(
        "sink_vllm.worker.rotation", "self.rotary.cos_sin_cache", "0046-longer-rope-tables"
    ),
    ObjectChange("sink_vllm.worker.rotation", "_ROPE_DICT[*]", "0046-longer-rope-tables"),
    ObjectChange("sink_vllm.frontend.lengths", "front.<_ATTRIBUTE>", "0047-marks"),
    ObjectChange("sink_vllm.frontend.lengths", "front.model_config.<_ATTRIBUTE>", "0047-marks"),
    ObjectChange("sink_vllm.frontend.renderer", "renderer.<_ATTRIBUTE>", "0047-marks"),
    ObjectChange("sink_vllm.scheduler", "output.<StepPlan.ATTRIBUTE>", "0047-marks"),
    ObjectChange("sink_vllm.scheduler.engine_core", "made.<PREPARED>", "0047-marks"),
    ObjectChange("sink_vllm.patching", "owner.*", "0047-marks"),
    ObjectChange("sink_vllm.frontend.cli", "namespace.*", "0048-values-of-a-request"),
    *(
        ObjectChange("sink_vllm.frontend", what, "0048-values-of-a-request")
        for what in (
            "card.max_model_len",
            "params.*",
            "response.kv_transfer_params",
            "completion.text",
            "self._messages.messages",
            "state.streaming_input",
            "output.finish_reason",
            "output.new_token_ids*",
            "output.new_logprobs",
        )
    ),
    ObjectChange("sink_vllm.service", "params.*", "0048-values-of-a-request"),
    *(
        ObjectChange("sink_vllm.scheduler", what, "0048-values-of-a-request")
        for what in (
            "request.*",
            "params.*",
            "data.sampling_params*",
            "output.kv_transfer_params",
            "session.num_computed_tokens",
            "structured.reasoning_ended",
            "cache.*",
        )
    ),
)


def start_up_patches() -> tuple[Patch, ...]:
    """What every process applies, in this order. Imports no vLLM."""
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
