"""Raw results on disk, one file per unit of work; a finished file is never made again.

``results/<name>/meta.json``            what was run where, one entry per start
``results/<name>/<unit>.jsonl``         first row: what was run; then rows of ``buckets.py``
``results/<name>/<unit>.jsonl.partial`` a unit that was interrupted; begun again by the next start
``results/<name>/rows.jsonl.zst``       all units, when a start has finished the last (``rows.py``)
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.common import meta
from benchmarks.quality.buckets import Series

_SAME = ("model", "dtype")
"""Settings that must not change between the starts of one folder."""


class StoreError(Exception):
    """The folder belongs to another run, or its rows cannot be read or packed."""


class Store:
    """A folder of results that a later start can continue."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open or create ``folder``.

        Raises:
            StoreError: it was made with another model, or what is in it cannot be read.
        """
        self.folder = folder
        try:
            rows.require()
            folder.mkdir(parents=True, exist_ok=True)
            self._done = rows.names(folder)
        except rows.RowsError as error:
            raise StoreError(str(error)) from error
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
        return self._file(unit).name in self._done

    @contextmanager
    def unit(self, name: str, **facts: Any) -> Iterator[rows.Rows]:
        """Rows of one unit; they count only if the block ends without an exception."""
        partial = self._file(name).with_suffix(".jsonl.partial")
        with rows.writing(partial) as file:
            file.add(**facts)
            yield file
        partial.replace(self._file(name))
        self._done.add(self._file(name).name)

    def pack(self) -> None:
        """Called when a start has finished all of its units.

        Raises:
            StoreError: they cannot be packed; they stay as they are.
        """
        try:
            rows.pack(self.folder)
        except rows.RowsError as error:
            raise StoreError(str(error)) from error

    def _file(self, unit: str) -> Path:
        return self.folder / f"{unit.replace('/', '-').replace(':', '-')}.jsonl"


def units(folder: Path) -> Iterator[tuple[dict[str, Any], Series]]:
    """Facts and losses of all finished units of a run, by name."""
    for facts, *losses in rows.read(folder).values():
        yield facts, Series.of(losses, facts["every"])
