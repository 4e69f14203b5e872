"""vLLM 0.33, in the environment that ``make install VLLM=0.33`` makes, and changed copies of it."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ENVIRONMENT = ROOT / ".venv-0.33"
PYTHON = ENVIRONMENT / "bin" / "python"


def site_packages() -> Path:
    """The folder that holds vLLM 0.33; skips the test where there is none."""
    found = sorted(ENVIRONMENT.glob("lib/python3.*/site-packages/vllm/version.py"))
    if not found:
        pytest.skip("there is no .venv-0.33 with vLLM 0.33; make install VLLM=0.33 makes it")
    return found[0].parents[1]


def copy_changed_files(diffs: Iterable[Path], folder: Path) -> list[Path]:
    """Copy the files that the diffs change into ``folder``; returns their relative paths."""
    names = {
        line.removeprefix("--- a/")
        for diff in diffs
        for line in diff.read_text().splitlines()
        if line.startswith("--- a/")
    }
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a link of the overlay's
        shutil.copyfile(site_packages() / name, target)
    return [Path(name) for name in sorted(names)]


def apply(diff: Path, folder: Path) -> None:
    """Apply a diff to the files in ``folder``: exactly, without fuzz.

    Raises:
        AssertionError: it does not apply; says what git says.
    """
    done = subprocess.run(
        ["git", "apply", "--verbose", str(diff)],
        cwd=folder,
        # The folder may lie in a repository, of which these files are no part.
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def overlay(diffs: list[Path], folder: Path) -> dict[str, str]:
    """A vLLM 0.33 with the diffs applied: links to all files but those that are changed.

    Returns:
        the environment in which ``PYTHON`` imports it.
    """
    shutil.copytree(
        site_packages() / "vllm",
        folder / "vllm",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    copy_changed_files(diffs, folder)
    for diff in diffs:
        apply(diff, folder)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
