"""Which Python source files the example model is trained on, and which are held out.

The corpus is whatever the running interpreter has installed: its standard library and the
packages in its ``site-packages``. Nothing is downloaded.

Held-out rule: a standard-library file belongs to the held-out set if the SHA-256 of its POSIX
path relative to the standard library folder, read as a number, is divisible by
``HELD_OUT_MODULUS`` (20, so about 5% of the files). Tests and generated data are skipped before
the rule is applied. The rule depends on nothing but names, so a benchmark that calls
:func:`held_out_files` gets exactly the files that training did not see.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_MODULUS = 20
MAX_FILE_BYTES = 150_000
"""Larger sources are nearly always tables or generated code."""
MIN_FILE_BYTES = 200
PACKAGE_BYTE_CAP = 8_000_000
"""At most this much text from one package, so that no package dominates the mixture."""
LEAK_MIN_LINE_CHARS = 30
LEAK_SHARE = 0.15
"""A training file with a larger share of its long lines in held-out files is dropped."""

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idle_test"}
    | {"pydoc_data", "encodings", "lib-dynload", "ensurepip"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "test_")


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: ``package`` is ``"stdlib"`` or a top-level installed name."""

    package: str
    name: str
    path: Path

    def read(self) -> str:
        """The file's text, or an empty string if it is not valid UTF-8."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            return ""


def _wanted(relative: Path, size: int) -> bool:
    return (
        MIN_FILE_BYTES <= size <= MAX_FILE_BYTES
        and _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1])
        and not relative.name.startswith(_SKIPPED_PREFIXES)
    )


def _python_files(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield ``(relative, absolute)`` paths in a fixed order."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if path.is_file() and _wanted(relative, path.stat().st_size):
            yield relative, path


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest(), "big")


def is_held_out(relative_name: str) -> bool:
    """Whether the held-out rule selects this standard-library path, such as ``json/decoder.py``."""
    return _digest(relative_name) % HELD_OUT_MODULUS == 0


def stdlib_files() -> list[SourceFile]:
    """All usable files of the standard library, held-out ones included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [SourceFile("stdlib", rel.as_posix(), path) for rel, path in _python_files(root)]


def held_out_files() -> list[Path]:
    """The standard-library files kept for evaluation, in a fixed order."""
    return [file.path for file in stdlib_files() if is_held_out(file.name)]


def _installed_files() -> list[SourceFile]:
    """Files of installed packages, capped per package.

    Within a package the order is by hash: the cap then takes an even sample of its modules
    rather than the first ones in alphabetical order.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    by_package: dict[str, list[SourceFile]] = defaultdict(list)
    for relative, path in _python_files(root):
        package = relative.parts[0].removesuffix(".py")
        by_package[package].append(SourceFile(package, relative.as_posix(), path))
    chosen: list[SourceFile] = []
    for package in sorted(by_package):
        taken = 0
        for file in sorted(by_package[package], key=lambda f: _digest(f.name)):
            taken += file.path.stat().st_size
            if taken > PACKAGE_BYTE_CAP:
                break
            chosen.append(file)
    return chosen


def _folder_files(folder: Path) -> list[SourceFile]:
    return [SourceFile(folder.name, rel.as_posix(), path) for rel, path in _python_files(folder)]


def _long_lines(text: str) -> list[int]:
    stripped = (line.strip() for line in text.splitlines())
    return [hash(line) for line in stripped if len(line) >= LEAK_MIN_LINE_CHARS]


def training_texts(extra: Path | None = None) -> Iterator[tuple[SourceFile, str]]:
    """Yield the training files with their text, leaving out copies of held-out files.

    Packages vendor parts of the standard library (``setuptools`` carries ``distutils``, for
    one), so a path rule alone would leak. A file whose long lines often occur in held-out
    files is dropped, and so is an exact duplicate of an earlier file.

    Args:
        extra: a folder with further Python files to use instead of the installed packages.
    """
    library = stdlib_files()
    held_lines: set[int] = set()
    for file in library:
        if is_held_out(file.name):
            held_lines.update(_long_lines(file.read()))
    seen: set[bytes] = set()
    others = _installed_files() if extra is None else _folder_files(extra)
    for file in [f for f in library if not is_held_out(f.name)] + others:
        text = file.read()
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        lines = _long_lines(text)
        if sum(line in held_lines for line in lines) > LEAK_SHARE * max(len(lines), 1):
            continue
        yield file, text
