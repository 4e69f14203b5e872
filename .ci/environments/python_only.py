"""A vLLM wheel without anything compiled, under a version that says it is for CPUs."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path, PurePosixPath

# Code for compilers, and what they made of it. The rest of a wheel is Python and its data.
NATIVE = {".so", ".h", ".hpp", ".cuh", ".cu", ".c", ".cc", ".cpp", ".inl"}
PROGRAMS = {"vllm/vllm-rs"}


def is_python(name: str) -> bool:
    """Whether a wheel's file is needed where nothing compiled can be used."""
    return PurePosixPath(name).suffix not in NATIVE and name not in PROGRAMS


def wheel_name(version: str) -> str:
    """The file name of the wheel that :func:`strip` writes for vLLM ``version``."""
    return f"vllm-{version}+cpu-py3-none-any.whl"


def pick(folder: Path, distribution: str, version: str) -> Path | None:
    """The wheel of exactly that release in a folder."""
    start = f"{distribution.replace('-', '_')}-{version}"
    # A version is followed by a tag ("-cp38-…") or by a local label ("+cu130-cp38-…").
    found = (path for mark in "-+" for path in sorted(folder.glob(f"{start}{mark}*.whl")))
    return next(found, None)


def strip(wheel: Path, version: str, folder: Path) -> Path:
    """Write the wheel's Python as a wheel of its own, which pip can install anywhere.

    Args:
        wheel: vLLM ``version`` as released.
        version: without a local label.
        folder: where the new wheel goes.

    Raises:
        zipfile.BadZipFile: ``wheel`` is damaged.
    """
    target = folder / wheel_name(version)
    unfinished = target.with_suffix(".part")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as stripped,
    ):
        [old] = {name.partition("/")[0] for name in source.namelist() if ".dist-info/" in name}
        new = f"vllm-{version}+cpu.dist-info"
        kept = [name for name in source.namelist() if is_python(name) and name[-1] != "/"]
        for name in kept:
            content = source.read(name)
            if name == f"{old}/METADATA":
                content = _renamed(content, b"Version: ", f"{version}+cpu")
            elif name == f"{old}/WHEEL":
                content = _renamed(content, b"Tag: ", "py3-none-any")
                content = _renamed(content, b"Root-Is-Purelib: ", "true")
            elif name == f"{old}/RECORD":
                continue
            stripped.writestr(name.replace(f"{old}/", f"{new}/", 1), content)
        record = io.StringIO()
        # Names with commas are quoted; pip fills in the sums when it installs.
        rows = ((name.replace(f"{old}/", f"{new}/", 1), "", "") for name in kept)
        csv.writer(record, lineterminator="\n").writerows(rows)
        stripped.writestr(f"{new}/RECORD", record.getvalue())
    return unfinished.replace(target)


def _renamed(text: bytes, field: bytes, value: str) -> bytes:
    """Headers with the first ``field`` replaced and others of the same name removed."""
    headers, blank, body = text.partition(b"\n\n")
    lines = headers.split(b"\n")
    first = next(index for index, line in enumerate(lines) if line.startswith(field))
    lines[first] = field + value.encode()
    rest = [line for line in lines[first + 1 :] if not line.startswith(field)]
    return b"\n".join([*lines[: first + 1], *rest]) + blank + body
