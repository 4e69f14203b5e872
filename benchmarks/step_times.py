"""Seconds of every step of a server's engine core, noted by an observer in its process.

vLLM loads the observer as it loads all plugins: by an entry point (`vllm.general_plugins`) of a
distribution on the path, which :func:`observing` writes into a folder. A step is what the engine
core does between two looks at its queue of requests: scheduling, the model and the outputs. Noting
one takes a few microseconds behind it.
"""

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

NAME = "step_times"
_FILE = "STEP_TIMES"  # environment variable


def observing(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` of a server whose engine core notes its steps in ``folder``."""
    metadata = folder / f"{NAME}-0.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    point = f"[vllm.general_plugins]\n{NAME} = {__name__}:observe\n"
    metadata.joinpath("entry_points.txt").write_text(point)
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **environment,
        "VLLM_PLUGINS": f"{environment['VLLM_PLUGINS']},{NAME}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        _FILE: str(folder / "steps.txt"),
    }


def observe() -> None:
    """The plugin: in the engine core's process, note begin and duration of every step."""
    from vllm.v1.engine.core import EngineCoreProc

    step = EngineCoreProc._process_engine_step
    if hasattr(step, "__wrapped__"):  # loaded before
        return

    @functools.wraps(step)
    def observed(self: Any) -> bool:
        began = time.perf_counter()
        executed: bool = step(self)
        seconds = time.perf_counter() - began
        print(began, seconds, file=_opened(), flush=True)
        return executed

    EngineCoreProc._process_engine_step = observed


@functools.cache
def _opened() -> Any:
    return open(os.environ[_FILE], "a")


@dataclass(slots=True)
class Steps:
    """What has been noted, read on from where it was read last."""

    folder: Path
    _read: int = 0

    def since(self, began: float) -> list[float]:
        """Seconds of the steps that began after ``began`` and have not been asked for.

        Args:
            began: of ``time.perf_counter``, whose clock is that of all processes on Linux.
        """
        with (self.folder / "steps.txt").open() as file:
            file.seek(self._read)
            lines = file.readlines()
            self._read = file.tell()
        noted = [tuple(map(float, line.split())) for line in lines]
        return [seconds for start, seconds in noted if start >= began]
