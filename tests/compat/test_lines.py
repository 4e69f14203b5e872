"""Differences between the supported vLLM lines are bridged, and bridges are taken down in time."""

import inspect
from importlib import import_module

import pytest
import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from vllm import envs
from vllm.v1.core.sched.scheduler import Scheduler

from sink_vllm.compat.lines import DIFFERENCES, Difference
from sink_vllm.compat.versions import supported_versions
from sink_vllm.gate.facts import older_ray_executor

OLDER = Version(vllm.__version__) < Version("0.33")


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda it: it.what)
def test_a_difference_dies_with_its_line(difference: Difference) -> None:
    """When this fails, the line has gone: remove the difference and what bridges it."""
    module, _, name = difference.where.partition(":")
    found = import_module(module)
    for part in name.split(".") if name else ():
        found = getattr(found, part)

    assert SpecifierSet(supported_versions()).contains(f"{difference.dies_with}.0")


def test_the_older_ray_executor_is_one_of_the_older_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM still has it the variable chooses; where it has gone the variable says nothing."""
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")

    assert older_ray_executor() == OLDER == hasattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND")
    monkeypatch.delenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND")
    assert not older_ray_executor()


def test_guard_the_look_up_is_given_a_length_on_the_newer_line() -> None:
    """Our override passes on what it is given, one length or none."""
    [_, _, *longest] = inspect.signature(Scheduler._get_local_prefix_cache_hit).parameters

    assert longest == ([] if OLDER else ["max_cache_hit_length"])
