"""Every run-time patch of vLLM that sink_vllm makes, collected from the modules that make them.

A module that patches vLLM lists its patches in a tuple named ``PATCHES``, is named here, and has
one record per patch in ``patches/`` (tests/test_patch_records.py compares the two).
"""

import importlib

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
