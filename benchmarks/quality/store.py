"""Raw results on disk, one file per unit of work; a finished file is never made again.

``results/<name>/meta.json``            what was run where, one entry per start
``results/<name>/<unit>.jsonl``         first row: what was run; then rows of ``buckets.py``
``results/<name>/<unit>.jsonl.partial`` a unit that was interrupted; begun again by the next start
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import Rows, meta
from benchmarks.quality.buckets import Series

_SAME = ("model", "dtype")
"""Settings that must not change between the starts of one folder."""


class StoreError(Exception):
    """The folder belongs to another run."""


class Store:
    """A folder of results that a later start can continue."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open or create ``folder``.

        Raises:
            StoreError: it was made with another model.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        starts = folder / "meta.json"
        entries: list[dict[str, Any]] = json.loads(starts.read_text()) if starts.exists() else []
        entry = meta(settings)
        entry["command"] = entry["command"].replace(sys.orig_argv[0], "python", 1)
        for before in entries:
            for key in _SAME:
                if before["settings"].get(key) != entry["settings"].get(key):
                    raise StoreError(
                        f"{folder.name} was made with {key}={before['settings'].get(key)!r}; "
                        "give another --name"
                    )
        starts.write_text(json.dumps([*entries, entry], indent=1) + "\n")

    def done(self, unit: str) -> bool:
        return self._file(unit).exists()

    @contextmanager
    def unit(self, name: str, **facts: Any) -> Iterator[Rows]:
        """Rows of one unit; they count only if the block ends without an exception."""
        partial = self._file(name).with_suffix(".jsonl.partial")
        with partial.open("w") as file:
            rows = Rows(file)
            rows.add(**facts)
            yield rows
        partial.replace(self._file(name))

    def _file(self, unit: str) -> Path:
        return self.folder / f"{unit.replace('/', '-').replace(':', '-')}.jsonl"


def read(path: Path) -> tuple[dict[str, Any], Series]:
    """The facts and the losses of a finished unit."""
    facts, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return facts, Series.of(rows, facts["every"])


def units(folder: Path) -> Iterator[tuple[dict[str, Any], Series]]:
    """All finished units of a run, by name."""
    for path in sorted(folder.glob("*.jsonl")):
        yield read(path)
