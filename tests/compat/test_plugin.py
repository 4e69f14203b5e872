"""The entry point: found by vLLM, light to import, strict about versions, harmless twice."""

import inspect
import pickle
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points

import pytest

from sink_vllm.compat.changes import start_up_patches
from sink_vllm.compat.patching import Patch
from sink_vllm.compat.versions import is_supported, refusal_of, supported_versions
from sink_vllm.plugin import register
from tests.support.paths import ROOT

LIGHT_MODULES = (
    "sink_vllm",
    "sink_vllm.plugin",
    "sink_vllm.policy.config",
    "sink_vllm.policy.schedule",
    "sink_vllm.policy.plan",
    "sink_vllm.compat.patching",
    "sink_vllm.gate.check",
    "sink_vllm.compat.parts",
    "sink_vllm.gate.refused",
    "sink_vllm.compat.unsupported",
    "sink_vllm.compat.shipping",
)


def _python(code: str) -> str:
    """Standard output of ``code`` in a fresh interpreter; raises if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_import_is_light(module: str) -> None:
    _python(
        f"import sys, {module}; heavy = {{'torch', 'vllm', 'transformers'}} & set(sys.modules); "
        "assert not heavy, heavy"
    )


def test_patches_are_declared_without_importing_vllm() -> None:
    """Targets are resolved when patches are applied; a declaration must not load the engine."""
    _python(
        "import sys; from sink_vllm.compat.changes import declared_patches; "
        "assert declared_patches(); assert 'vllm' not in sys.modules"
    )


def test_entry_point_is_register() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="sink_vllm")

    assert found.load() is register


def test_register_twice_changes_nothing_the_second_time() -> None:
    register()
    patches = start_up_patches()
    assert all(patch.is_applied for patch in patches)
    before = [_what_stands_there(patch) for patch in patches]

    register()

    assert [_what_stands_there(patch) for patch in patches] == before


def _what_stands_there(patch: Patch) -> object:
    return inspect.getattr_static(*patch.locate())


@pytest.mark.server
def test_vllm_loads_the_plugin_by_itself() -> None:
    """What happens in every process of vLLM, with nothing imported by hand."""
    _python(
        "from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from sink_vllm.compat.changes import start_up_patches; "
        "assert all(patch.is_applied for patch in start_up_patches())"
    )


@pytest.mark.server
def test_a_process_loads_no_module_of_vllm_to_patch_it() -> None:
    """A process that inspects a model needs no API server; one that imports it gets it patched."""
    _python(
        """
import sys
from vllm.plugins import load_general_plugins
from vllm.model_executor.models import registry  # what that process runs

from sink_vllm.compat.changes import start_up_patches
from sink_vllm.engine import managers

patches, before = start_up_patches(), set(sys.modules)
load_general_plugins()
assert registry.ModelRegistry.models["MPTForCausalLM"], "the plugin was not loaded"
late = {patch.module for patch in patches} - before
late.add(managers.OF_VLLM)
assert {"vllm.v1.engine.async_llm", "vllm.v1.engine.core", managers.OF_VLLM} <= late, late
assert not late & set(sys.modules), late & set(sys.modules)

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from sink_vllm.compat.spec import StreamingLLMSpec
from sink_vllm.engine.managers.streaming import StreamingLLMManager

assert "sink_vllm" in AsyncLLM.__init__.__globals__["__name__"]
spec = StreamingLLMSpec.__new__(StreamingLLMSpec)
assert KVCacheSpecRegistry.get_manager_class(spec) is StreamingLLMManager
"""
    )


@pytest.mark.server
def test_unpickling_options_loads_the_plugin() -> None:
    """For processes that get a finished configuration and never load plugins themselves."""
    from sink_vllm.compat.shipping import ShippedConfig

    pickled = pickle.dumps(ShippedConfig(kv_policy="sink"))

    _python(
        f"import pickle, sys; config = pickle.loads({pickled!r}); "
        "from sink_vllm.compat.changes import start_up_patches; "
        "assert all(patch.is_applied for patch in start_up_patches()); "
        "assert config == {'kv_policy': 'sink'}"
    )


def test_supported_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"]["gpu"]

    assert set(supported_versions().split(",")) == set(requirement[len("vllm") :].split(","))


@pytest.mark.parametrize("found", ["0.32.0", "0.32.5", "0.32.0+cpu", "0.33.0", "0.33.1rc1"])
def test_supported_vllm_is_accepted(found: str) -> None:
    assert is_supported(found)


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0", "0.34.0rc1", "1.0.0", "0.32.0rc1", "dev"])
def test_other_vllm_is_refused_with_both_versions(found: str) -> None:
    assert not is_supported(found)
    assert f"--kv-policy sink needs vLLM {supported_versions()}, found vLLM {found};" in refusal_of(
        found
    )
