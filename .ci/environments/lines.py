"""The vLLM lines of this project, read from the one table that states them, in pyproject.toml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from environments.steps import ROOT, InstallError

TABLE = "tool.sink_vllm.lines"


@dataclass(frozen=True)
class Line:
    """One vLLM line, such as 0.33."""

    name: str
    version: str
    """The release of it that is installed, such as ``"0.33.0"``."""
    compiled: str | None = None
    """The line whose compiled extensions it borrows on a CPU while it has no CPU wheel."""
    also: tuple[str, ...] = ()
    """What its Python needs beside the packages of that line's environment."""


def read_lines(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, Line]:
    """All lines by name; the first is the one that everything runs on unless told otherwise."""
    import tomllib  # not in the Pythons that install.py turns away

    table = tomllib.loads(pyproject.read_text())["tool"]["sink_vllm"]["lines"]
    return {
        name: Line(name, entry["version"], entry.get("compiled"), tuple(entry.get("also", ())))
        for name, entry in table.items()
    }


def pick_line(lines: dict[str, Line], name: str | None) -> Line:
    """The line called ``name``, or the first one.

    Raises:
        InstallError: there is no such line.
    """
    if name is None:
        return next(iter(lines.values()))
    if name not in lines:
        known = " and ".join(lines)
        raise InstallError(f"VLLM={name}: the lines are {known} ([{TABLE}] in pyproject.toml)")
    return lines[name]


def folder_of(lines: dict[str, Line], line: Line) -> Path:
    """Where the environment of ``line`` belongs: `.venv` for the first line, else `.venv-NAME`."""
    first = line.name == next(iter(lines))
    return ROOT / (".venv" if first else f".venv-{line.name}")
