"""Settings every test shares; they must be in the environment before torch and vLLM load."""

import os
import random
import shlex
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Tiny models gain nothing from threads, and spinning ones starve their neighbours.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

from tests.support.tiny_models import TinyLlama, write_tiny_llama  # noqa: E402

ModelFactory = Callable[[TinyLlama], Path]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Folder of a tiny Llama checkpoint of the given shape, written once per session."""
    folders: dict[str, Path] = {}

    def folder_of(shape: TinyLlama) -> Path:
        key = repr(shape)
        if key not in folders:
            folders[key] = write_tiny_llama(tmp_path_factory.mktemp("tiny"), shape)
        return folders[key]

    return folder_of


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Draw the same numbers in every run; skip what needs a GPU where there is none."""
    import torch  # not before the environment is set

    random.seed(0)
    torch.manual_seed(0)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


ALONE = ("engine", "server", "ray", "gpu")
"""Marks of tests whose processes take part in what they show."""
MATTERS = ("VLLM_", "HF_HUB_OFFLINE", "OMP_", "TORCH", "TRITON_", "CUDA_", "LIVENESS_", "PYTHONHASH")
"""Beginnings of environment variables that change what tests do."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, Any]:
    """Say how to repeat a test alone that failed; seeds are in its code, or in the environment."""
    report = yield
    if report.failed and any(item.get_closest_marker(mark) for mark in ALONE):
        seen = {k: v for k, v in sorted(os.environ.items()) if k.startswith(MATTERS)}
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in seen.items())
        command = f"{settings} python -m pytest {shlex.quote(item.nodeid)}"
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
