"""Start a real `vllm serve`, watch it, stop it: what the demo and the server benchmarks share."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import openai
import psutil
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from examples import processes

HOST = "127.0.0.1"
# A small model on one machine: no model hub, no usage report, 1 GiB of KV cache where the CPU
# engine would take half of the memory. Connections stay: vLLM closes what was idle for 5 seconds,
# perhaps just when a client sends its next request. The caller's own settings win.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
}


# The worker in the engine's process, with one thread: as two processes they wait for each other in
# loops of `sched_yield`, and where there are two CPUs nobody else gets a turn for seconds.
ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
FEW_PROCESSORS = 4


def for_few_processors() -> dict[str, str]:
    """:data:`ONE_PROCESS` where vLLM's processes would leave no processor to a client.

    The caller's own settings win.
    """
    if (os.cpu_count() or 1) > FEW_PROCESSORS:
        return {}
    return {name: value for name, value in ONE_PROCESS.items() if name not in os.environ}


class ServerError(Exception):
    """The server did not start, or ended; one sentence and the end of its log."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """One reading of a server's `/metrics`."""

    families: tuple[Metric, ...]

    @classmethod
    def read(cls, url: str) -> "Metrics":
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            return cls.parse(answer.read().decode())

    @classmethod
    def parse(cls, text: str) -> "Metrics":
        return cls(tuple(text_string_to_metric_families(text)))

    def total(self, name: str) -> float:
        """Sum of a metric over engines and labels; 0 when the server does not have it."""
        samples = (sample for family in self.families for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == name)

    def label(self, name: str, label: str) -> str | None:
        """A label of the first sample of a metric."""
        for family in self.families:
            for sample in family.samples:
                if sample.name == name and label in sample.labels:
                    return sample.labels[label]
        return None

    @property
    def kv_pages(self) -> int:
        """KV pages that requests hold (vLLM's own gauge; page 0 is vLLM's null page)."""
        pages = int(self.label("vllm:cache_config_info", "num_gpu_blocks") or 1) - 1
        return round(self.total("vllm:kv_cache_usage_perc") * pages)

    @property
    def evictions(self) -> int:
        return int(self.total("sink_vllm:evictions_total"))

    @property
    def evicted_tokens(self) -> int:
        return int(self.total("sink_vllm:evicted_tokens_total"))


class Server:
    """`vllm serve` on a free port, as a context manager that leaves no process behind.

    What the OpenAI client raises inside leaves as a ServerError that quotes the server's log.

    Args:
        arguments: what follows `vllm serve`, without host and port.
        environment: variables on top of the caller's and of :data:`ENVIRONMENT`.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        beside = Path(sys.executable).with_name("vllm")
        vllm = str(beside) if beside.exists() else shutil.which("vllm")
        if vllm is None:
            raise ServerError("the `vllm` command is not installed; run `make install`")
        self.command = [vllm, "serve", *arguments, "--host", HOST, "--port", str(self.port)]
        self.environment = {**ENVIRONMENT, **os.environ, **(environment or {})}
        # The commands of this environment first: vLLM calls compilers by name.
        self.environment["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), self.environment.get("PATH", os.defpath)]
        )
        self._log = tempfile.NamedTemporaryFile(prefix="vllm-serve-", suffix=".log", delete=False)  # noqa: SIM115
        self.log = Path(self._log.name)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C reaches only us, and the group can be ended as a whole.
        self._process = subprocess.Popen(
            self.command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=self.environment,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._log.close()
        if isinstance(error, openai.OpenAIError):
            raise ServerError(f"{error}{self.log_tail()}") from error
        if not isinstance(error, Exception):  # nothing went wrong, or the user pressed Ctrl-C
            self.log.unlink(missing_ok=True)

    def wait(self, progress: Callable[[float], None], limit: float = 600) -> None:
        """Return when the server is healthy; ``progress`` gets the seconds waited so far.

        Raises:
            ServerError: it ended, or was not healthy after ``limit`` seconds.
        """
        started = time.monotonic()
        while not self.healthy():
            self.check()
            waited = time.monotonic() - started
            if waited > limit:
                raise ServerError(f"no answer after {limit:.0f} s{self.log_tail()}")
            progress(waited)
            time.sleep(0.5)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def check(self) -> None:
        """Raise ServerError if the server has ended."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise ServerError(f"`vllm serve` ended with exit code {code}{self.log_tail()}")

    def metrics(self) -> Metrics:
        return Metrics.read(self.url)

    def processes(self) -> list[psutil.Process]:
        """The server's processes, the API server first."""
        return [] if self._process is None else processes.family(self._process.pid)

    def rss(self) -> dict[str, int]:
        """Resident bytes of every process, by name and process id."""
        return processes.rss(self.processes())

    def log_tail(self, lines: int = 12) -> str:
        """What the server's log says about a failure, ready to be appended to a sentence."""
        log = [line.rstrip() for line in self.log.read_text(errors="replace").splitlines()]
        errors = (line for line in log if "WARNING" not in line and "Error: " in line)
        shown = ["errors:", *list(dict.fromkeys(errors))[:5], "end:", *log[-lines:]]
        return f"; its log is {self.log}\n" + textwrap.indent("\n".join(shown), "    ")

    def stop(self, grace: float = 20) -> None:
        """End the server: politely, then the whole process group."""
        if self._process is None:
            return
        family = self.processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        with contextlib.suppress(ProcessLookupError):  # when nobody is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(family, timeout=grace)
        self._process = None


def stop_on_terminate() -> None:
    """Let SIGTERM unwind the stack like Ctrl-C does, so that servers are stopped."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, unwind)
