#!/usr/bin/env python3
"""`make install`: an environment with vLLM, this project (editable) and the tools.

Runs under the system's Python with the standard library only, and does nothing when the stamp in
the environment says that these very files and pyproject.toml were installed already.

    python .ci/install.py [--vllm LINE] [--device cpu|gpu] [--venv FOLDER] [--base FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from environments.borrowed import Borrowed, has_release
from environments.lines import folder_of, pick_line, read_lines
from environments.released import Released
from environments.steps import InstallError

OLDEST_PYTHON = (3, 11)


def install(options: argparse.Namespace) -> None:
    """Make the environment that the options describe.

    Raises:
        InstallError: one sentence about what went wrong.
    """
    lines = read_lines()
    line = pick_line(lines, options.vllm)
    venv = (options.venv or folder_of(lines, line)).resolve()
    if options.device == "gpu" or line.compiled is None:
        Released(venv, line, options.device).run()
        return
    below = lines[line.compiled]
    base = options.base
    if base is None:
        base = folder_of(lines, below)
        Released(base.resolve(), below, "cpu").run()
    borrowed = Borrowed(venv, line, base.resolve(), below)
    if not borrowed.is_current():
        own = has_release(base / "bin" / "python", line)
        if own is not None:
            Released(venv, dataclasses.replace(line, version=own), "cpu").run()
            return
    borrowed.run()


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
    parser.add_argument("--vllm", metavar="LINE", help="of pyproject.toml; the first by default")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--venv", type=Path, help=".venv, or .venv-LINE, by default")
    parser.add_argument("--base", type=Path, help="what a line without a CPU wheel stands on")
    options = parser.parse_args()
    try:
        install(options)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
