"""Runs can be repeated: a failing test says how, and the parts of a file may run side by side."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ENVIRONMENT = {
    "VLLM_API_KEY": "secret",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "LIVENESS_SEEDS": "3:9",
}
FAILING = """
import random, pytest

@pytest.mark.engine
@pytest.mark.parametrize("policy", ["four sinks, odd"])
def test_that_fails(policy):
    print("drawn", random.random())
    assert False
"""
EPISODES = """
import pytest

@pytest.mark.parametrize("part", range(4))
def test_part(part):
    pass
"""


def pytest_in(folder: Path, *args: str, **environment: str) -> str:
    """What pytest prints of the tests in a folder, with this project's plugin."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.repeating", "-c", "/dev/null"]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), "-p", "no:cacheprovider", *args, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout


def test_a_failure_can_be_repeated_alone(tmp_path: Path) -> None:
    """Its command is in the report, with the environment; drawn numbers are the same again."""
    (tmp_path / "test_it.py").write_text(FAILING)

    first, second = (pytest_in(tmp_path, **ENVIRONMENT) for _ in range(2))

    (command,) = [line for line in first.splitlines() if "python -m pytest" in line]
    assert command.endswith("python -m pytest 'test_it.py::test_that_fails[four sinks, odd]'")
    assert "LIVENESS_SEEDS=3:9 " in command
    assert "VLLM_CPU_KVCACHE_SPACE=1 " in command
    assert "secret" not in command
    (drawn,) = [line for line in first.splitlines() if line.startswith("drawn")]
    assert drawn in second


def test_parts_of_the_random_episodes_are_shared_by_processes(tmp_path: Path) -> None:
    """``--dist loadfile`` would give a file to one process; other files still are one's."""
    pytest.importorskip("xdist")
    (tmp_path / "test_episodes.py").write_text(EPISODES)
    # One test: both processes are given two units at once, so either has an episode.
    (tmp_path / "test_other.py").write_text(EPISODES.replace("range(4)", "range(1)"))
    args = ("-v", "-n", "2", "--dist", "loadfile")

    shown = pytest_in(tmp_path, *args).splitlines()

    def workers(file: str) -> set[str]:
        return {line.split()[0] for line in shown if " PASSED " in line and file in line}

    assert len(workers("test_episodes.py")) == 2
    assert len(workers("test_other.py")) == 1
