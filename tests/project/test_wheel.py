"""The wheel works without the checkout: built, installed into its own environment, and run."""

import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.wheel import run

MODEL = ROOT / "examples" / "models" / "pystream-2.5m"


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sink_vllm").rglob("*.py")}

    assert {name for name in packages if not name.endswith(".dist-info")} == {"sink_vllm"}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "sink_vllm/py.typed" in names


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
