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
)


def declared_patches() -> tuple[Patch, ...]:
    """All patches, in the order in which they are applied. Imports no vLLM."""
    return tuple(
        patch
        for module_name in PATCHING_MODULES
        for patch in importlib.import_module(module_name).PATCHES
    )
