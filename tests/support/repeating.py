"""A plugin of pytest: runs that can be repeated, alone and beside each other. Light to import."""

import os
import random
import shlex
import sys
from collections.abc import Generator
from typing import Any

import pytest

ALONE = ("engine", "server", "ray", "gpu")
"""Marks of tests whose processes take part in what they show."""
MATTERS = ("VLLM_", "HF_HUB_", "OMP_", "TORCH", "TRITON_", "CUDA_", "LIVENESS_", "PYTHONHASH")
"""Beginnings of environment variables that change what tests do."""


def pytest_runtest_setup() -> None:
    """Draw the same numbers in every run, whatever ran before."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say how to repeat a test alone that failed; seeds are in its code, or in the environment."""
    report = yield
    if report.failed and any(item.get_closest_marker(mark) for mark in ALONE):
        settings = [
            f"{name}={shlex.quote(value)}"
            for name, value in sorted(os.environ.items())
            if name.startswith(MATTERS) and not name.endswith(("KEY", "TOKEN"))
        ]
        command = " ".join([*settings, "python -m pytest", shlex.quote(item.nodeid)])
        report.sections.append(("repeat it alone", command))
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile`` a file is one process's, but for the parts of the random episodes.

    They share nothing and are minutes together.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            whole = "test_episodes.py::" in nodeid
            return nodeid if whole else super()._split_scope(nodeid)

    return ByFile(config, log)
