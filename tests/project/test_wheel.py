"""The wheel works without the checkout: built, installed into its own environment, and run."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from examples.serving import ENVIRONMENT
from tests.support.paths import ROOT

MODEL = ROOT / "examples" / "models" / "pystream-2.5m"


def run(*words: str | Path, cwd: Path, timeout: int = 300) -> str:
    """What a command says; it must succeed."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**ENVIRONMENT, **outside},
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves files beside what it builds."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "sink_vllm"):
        run("cp", "-r", ROOT / name, source, cwd=source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", made)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=source)
    (found,) = made.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, on this one's vLLM and torch."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Behind its own packages; what is installed here in editable form is not followed.
    (packages / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    options = ("--python", python, "install", "--no-deps", "--no-index", "--ignore-installed")
    run(sys.executable, "-m", "pip", *options, wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sink_vllm").rglob("*.py")}

    assert {name for name in packages if not name.endswith(".dist-info")} == {"sink_vllm"}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "sink_vllm/py.typed" in names
    page = {path.name for path in (ROOT / "sink_vllm/server/page").iterdir() if path.is_file()}
    assert {f"sink_vllm/server/page/{name}" for name in page} <= set(names)


@pytest.mark.server
def test_doctor_and_plan_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """As a newcomer: nothing of the checkout is on the path but the model."""
    file = run(
        installed / "python", "-c", "import sink_vllm; print(sink_vllm.__file__)", cwd=tmp_path
    )
    assert Path(file.strip()).is_relative_to(installed.parent)

    healthy = run(installed / "sink-vllm", "doctor", "--model", MODEL, cwd=tmp_path)
    assert healthy.endswith("nothing is wrong\n")
    planned = run(installed / "sink-vllm", "plan", MODEL, "--kv-memory", "1", cwd=tmp_path)
    assert "capacity C=256 tokens; KV cache per stream: 1.69 MiB in 9 pages of 32" in planned
