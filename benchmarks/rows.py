"""Raw rows of a run: plain JSON lines while it is measured, one packed file afterwards.

    python -m benchmarks.rows pack benchmarks/results/RUN …      what a finished run does by itself
    python -m benchmarks.rows unpack benchmarks/results/RUN …    the plain files again, to the byte

While something is measured every row is a line of ``<run>/<part>.jsonl``, written at once: a crash
costs one row at most. A finished run is packed: ``<run>/rows.jsonl.zst`` has all parts one after
the other, each behind a line that names it, counts its rows and has a checksum of both::

    {"file": "steps.jsonl", "rows": 2560, "crc32": 1319952809}
    {"arm": "old", "round": 0, …}

``zstd -dc rows.jsonl.zst`` shows the same without Python. Whatever reads rows calls :func:`read`,
which does not care how they lie there.
"""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

PACK = "rows.jsonl.zst"
LEVEL = 19  # of zstd; a quarter smaller than its default, and half a second for a megabyte

Row = dict[str, Any]


class RowsError(OSError):
    """Rows that cannot be packed or read; one sentence with the file and a way out."""


class Rows:
    """A file of JSON lines that is being written."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, **row: Any) -> None:
        print(json.dumps(row), file=self._file, flush=True)


@contextmanager
def writing(path: Path, *, go_on: bool = False) -> Iterator[Rows]:
    """Rows that are in the file as soon as they have been added.

    Args:
        path: of a plain part.
        go_on: behind the rows that are there; one that a crash cut off is dropped.
    """
    if go_on and path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    with path.open("a" if go_on else "w") as file:
        yield Rows(file)


def require() -> None:
    """Called before hours of measuring, because packing comes last.

    Raises:
        RowsError: the library that packs is missing.
    """
    if find_spec("pyarrow") is None:
        raise RowsError(
            "pyarrow, which packs raw rows, is not installed; run `make install`, or "
            "`pip install -e '.[bench]'`"
        )


def read(folder: Path) -> dict[str, list[Row]]:
    """Rows of every part of a run by file name, in the order of the names, packed or plain.

    Raises:
        RowsError: a file is damaged, or pyarrow is missing.
    """
    return {name: _parsed(folder / name, content) for name, content in _parts(folder).items()}


def names(folder: Path) -> set[str]:
    """File names of a run's parts, packed or plain."""
    return set(_parts(folder))


def pack(folder: Path) -> None:
    """Put all plain parts of a run into its packed file, beside what is packed already.

    A part that is there in both ways was measured again, or packing it was interrupted: the plain
    one counts. The plain files are deleted when the packed one has been read back. Folders below
    are runs of their own.

    Raises:
        RowsError: a part ends within a row, so its run crashed; nothing is changed.
    """
    plain = sorted(folder.glob("*.jsonl"))
    if not plain:
        return
    parts = _parts(folder)
    for path in plain:
        _parsed(path, parts[path.name])
        if parts[path.name][-1:] not in (b"", b"\n"):
            raise RowsError(f"{path} does not end with a whole line, so its run did not end")
    partial = folder / f"{PACK}.partial"
    partial.write_bytes(_packed(parts))
    if _unpacked(partial) != parts:
        raise RowsError(f"{partial} is not what was packed; the plain files are kept")
    partial.replace(folder / PACK)
    for path in plain:
        path.unlink()


def unpack(folder: Path) -> None:
    """The inverse: plain files, and no packed one."""
    path = folder / PACK
    for name, content in _unpacked(path).items():
        (folder / name).write_bytes(content)
    path.unlink()


def _parts(folder: Path) -> dict[str, bytes]:
    """Every part as it was written, by file name."""
    packed = folder / PACK
    parts = _unpacked(packed) if packed.exists() else {}
    parts |= {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    return dict(sorted(parts.items()))


def _parsed(path: Path, content: bytes) -> list[Row]:
    try:
        return [json.loads(line) for line in content.splitlines()]
    except ValueError as error:
        raise RowsError(
            f"{path} has a line that is no row ({error}); if its run crashed, delete that line, "
            "or measure again"
        ) from error


def _head(name: str, content: bytes) -> Row:
    crc = zlib.crc32(content, zlib.crc32(name.encode()))
    return {"file": name, "rows": content.count(b"\n"), "crc32": crc}


def _packed(parts: Mapping[str, bytes]) -> bytes:
    from pyarrow import Codec

    lines = b"".join(
        json.dumps(_head(name, content)).encode() + b"\n" + content
        for name, content in parts.items()
    )
    return bytes(Codec("zstd", compression_level=LEVEL).compress(lines, asbytes=True))


def _unpacked(path: Path) -> dict[str, bytes]:
    require()
    from pyarrow import input_stream

    try:
        with input_stream(str(path), compression="zstd") as stream:
            lines: list[bytes] = stream.read().splitlines(keepends=True)
        parts: dict[str, bytes] = {}
        at = 0
        while at < len(lines) or not parts:
            head = json.loads(lines[at])
            end = at + 1 + head["rows"]
            parts[head["file"]] = b"".join(lines[at + 1 : end])
            if _head(head["file"], parts[head["file"]]) != head:
                raise ValueError(f"{head['file']} is not what was packed")
            at = end
    except (OSError, ValueError, LookupError, TypeError) as error:  # anything can stand there
        raise RowsError(f"{path} is damaged ({error}); take it from git again") from error
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all runs were packed or unpacked, 1 when one could not be."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="rows", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("runs", nargs="+", type=Path, help="folders, and those below them")
    options = parser.parse_args(arguments)
    try:
        require()
        for run in options.runs:
            if not run.is_dir():
                parser.error(f"{run} is no folder; name a run below benchmarks/results")
            for folder in (run, *(path for path in sorted(run.rglob("*")) if path.is_dir())):
                if options.what == "pack":
                    pack(folder)
                elif (folder / PACK).exists():
                    unpack(folder)
    except (RowsError, OSError) as error:
        print(f"rows: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
