"""Everything that only a GPU can show, in one command, with the raw output in one folder.

    make bench-gpu DEVICE=gpu                        on the machine with the GPU
    make bench-gpu ARGS="--device cpu --streams 1 --repeats 1"
                                                     smoke test, says nothing about GPUs

1. ``pytest -m gpu``: page moves in every layout and dtype on the device's tensors, against number
   by number arithmetic; streams through vLLM's V1 and V2 runners, with and without CUDA graphs,
   against token-by-token StreamingLLM. Output in ``tests.txt``.
2. ``benchmarks.gpu.evictions``: milliseconds of an eviction against the memory's bandwidth.
3. ``benchmarks.gpu.attention``: xformers' and torch's attention over the same cache, and keys
   rotated at every read instead of once per eviction.

Exit code 0: no test failed.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, Results, default_name
from benchmarks.gpu import attention, evictions

_HIDDEN = ("times_ms",)


def run_tests(output: Path) -> int:
    """Run the tests marked ``gpu``, their output on the screen and in ``output``."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rA", "-p", "no:cacheprovider"]
    with (
        output.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
    return process.returncode


def line_of(row: dict[str, Any]) -> str:
    """A row as one line, numbers short."""
    parts = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in row.items()
        if key not in _HIDDEN
    )
    return " ".join(parts)


def parse_arguments() -> argparse.Namespace:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=summary)
    parser.add_argument("--device", default="cuda", help="of torch; cpu for a smoke test")
    parser.add_argument("--repeats", type=int, default=100, help="runs per median")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 16], help="streams in one step"
    )
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    parser.add_argument("--name", help="folder under benchmarks/results")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no GPU here; use --device cpu to try it")
    if args.repeats < 1 or min(args.streams) < 1:
        parser.error("--repeats and --streams must be at least 1")
    return args


def measurements(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(args.device)
    yield from evictions.measure(device, streams=args.streams, repeats=args.repeats)
    yield from attention.measure(device, streams=args.streams, repeats=args.repeats)


def main() -> int:
    args = parse_arguments()
    results = Results(args.name or default_name("gpu"), vars(args))
    code = 0 if args.no_tests else run_tests(results.folder / "tests.txt")
    rows = []
    with results.rows("rows.jsonl") as file:
        for row in measurements(args):
            print(line_of(row), flush=True)
            file.add(**row)
            rows.append({key: value for key, value in row.items() if key not in _HIDDEN})
    results.summary({"tests_exit_code": None if args.no_tests else code, "rows": rows})
    return code


if __name__ == "__main__":
    sys.exit(main())
