"""The wheel of this checkout, and an environment that has it and nothing of the checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from examples.serving import ENVIRONMENT
from tests.support.paths import ROOT


def run(*words: str | Path, cwd: Path, timeout: int = 300) -> str:
    """What a command says; it must succeed."""
    ran = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=outside(),
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def outside() -> dict[str, str]:
    """The environment variables of somebody who has no checkout."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**ENVIRONMENT, **kept}


def build_wheel(source: Path, made: Path) -> Path:
    """Built from a copy in ``source``: setuptools leaves files beside what it builds."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "sink_vllm"):
        run("cp", "-r", ROOT / name, source, cwd=source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", made)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=source)
    (found,) = made.glob("*.whl")
    return found


def install_wheel(wheel: Path, folder: Path) -> Path:
    """The programs of an environment with the wheel, on this one's vLLM and torch."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Behind its own packages; what is installed here in editable form is not followed.
    (packages / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    options = ("--python", python, "install", "--no-deps", "--no-index", "--ignore-installed")
    run(sys.executable, "-m", "pip", *options, wheel, cwd=folder)
    command = folder / "bin" / "vllm"  # of the vLLM below, as pip would write it
    command.write_text(
        f"#!{python}\nimport sys\nfrom vllm.entrypoints.cli.main import main\n"
        'if __name__ == "__main__":\n    sys.exit(main())\n'  # processes it starts import it
    )
    command.chmod(0o755)
    return folder / "bin"
