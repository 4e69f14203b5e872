"""What all environments have in common: a folder, a stamp, a log, progress lines, and pip."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# In the packages of an environment that stands on another one. It names that one's packages, comes
# last in its folder, and behind the folder on the path.
PATH_FILE = "zz_older_line.pth"


class InstallError(Exception):
    """One sentence for the user; details are in the log."""


class Environment(ABC):
    """A virtual environment that is made in steps; the output of commands goes to one log file.

    Args:
        venv: its folder.
        steps: how many times :meth:`say` will be called.
    """

    def __init__(self, venv: Path, steps: int) -> None:
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.stamp = venv / ".installed"
        self.log = venv / "install.log"
        self.step = 0
        self.steps = steps

    def run(self) -> None:
        """Make the environment, or return at once when the stamp fits.

        Raises:
            InstallError: a step failed.
        """
        if self.is_current():
            self.stamp.touch()  # only for make, which compares times
            return
        self.stamp.unlink(missing_ok=True)
        self.make()
        self.stamp.write_text(self.fingerprint())

    @abstractmethod
    def make(self) -> None:
        """All the steps."""

    def is_current(self) -> bool:
        """Whether everything this environment depends on is as it was when it was made."""
        return self.stamp.is_file() and self.stamp.read_text() == self.fingerprint()

    def fingerprint(self) -> str:
        """What the contents of the environment depend on."""
        sources = sorted(Path(__file__).parent.glob("*.py"))
        digest = hashlib.sha256()
        for path in (ROOT / "pyproject.toml", *sources):
            digest.update(path.read_bytes())
        # Editable installs and scripts hold absolute paths: a moved checkout is a new environment.
        return f"{sys.version_info[:2]} {self.venv} {digest.hexdigest()}\n"

    def make_venv(self, python: Path | str, *options: str) -> None:
        """A virtual environment of ``python``, unless there is one."""
        if not self.python.exists():
            command = [str(python), "-m", "venv", *options, str(self.venv)]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                said = (made.stderr or made.stdout).strip()
                raise InstallError(f"{python} -m venv failed: {said}")
        self.log.write_text("")

    def pip(self, what: str, *arguments: str) -> None:
        """`pip install` into this environment.

        Raises:
            InstallError: naming ``what`` could not be installed.
        """
        if not self.try_pip("install", *arguments):
            self.fail(f"pip could not install {what}")

    def try_pip(self, command: str, *arguments: str) -> bool:
        """Whether pip could do it."""
        options = ("--disable-pip-version-check", "--no-input")
        return self.logged([str(self.python), "-m", "pip", *options, command, *arguments])

    def output(self, *arguments: str) -> str:
        """What this environment's Python prints."""
        command = [str(self.python), *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

    def logged(self, command: list[str]) -> bool:
        """Whether the command succeeded."""
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            return subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode == 0

    def check_command(self) -> None:
        """The command that everything else uses must start."""
        if not self.logged([str(self.venv / "bin" / "vllm"), "--version"]):
            self.fail("`vllm --version` failed")

    def say(self, what: str) -> None:
        """Print that the next step begins."""
        self.step += 1
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} [{self.step}/{self.steps}] {what}", flush=True)

    def fail(self, sentence: str) -> None:
        """Raise ``sentence`` with the end of the log."""
        tail = "\n".join(f"    {line}" for line in self.log.read_text().splitlines()[-12:])
        raise InstallError(f"{sentence}; the end of {self.log}:\n{tail}")
