"""Real text, as token ids, that the repository's model was not trained on.

``python``      the held-out files of the standard library (``held_out_files``), then files of the
                library's own test suite, which the corpus rule never lets into the training; whole
                files, shuffled with a fixed seed, each ended by EOS as in training
``repeated``    the first 100,000 tokens of ``held-out``, again and again: every bucket of
                that size is the same text, so nothing but the stream position differs
``held-out``    the held-out files alone, in their own order
``tests``       the files of the test suite alone
``<file>``      any UTF-8 file of ``--books``, by its name without the ending

``name:part/parts`` is one of several equal pieces of a text. Every text starts with BOS if the
model has one.
"""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.quality.buckets import BUCKET
from examples.train_model.corpus import MAX_FILE_BYTES, held_out_files

SEED = 0
REPEATED = 100 * BUCKET


class TextError(Exception):
    """There is no such text, or too little of it."""


class Texts:
    """Texts in the tokens of one model."""

    def __init__(self, model: str, books: Path | None = None, bos: bool = True) -> None:
        """
        Args:
            model: folder with a tokenizer.
            books: folder of ``.txt`` files.
            bos: start texts with BOS.
        """
        self._tokenizer = tokenizer_of(model)
        self._books = books
        self.bos: int | None = self._tokenizer.bos_token_id if bos else None

    def get(self, name: str, tokens: int) -> list[int]:
        """The first ``tokens`` tokens of a text, BOS counted.

        Raises:
            TextError: it is unknown or shorter.
        """
        base, _, piece = name.partition(":")
        part, parts = (int(n) for n in piece.split("/")) if piece else (0, 1)
        front = [] if self.bos is None else [self.bos]
        need = tokens - len(front)
        if base == "repeated":
            ids = self.get("held-out", REPEATED + len(front))[len(front) :]
            ids = ids * -(-need // len(ids))
        elif parts > 1:
            ids = self._all(base)
            size = len(ids) // parts
            ids = ids[part * size : part * size + size]
        else:
            ids = []
            for document in self._documents(base):
                ids += document
                if len(ids) >= need:
                    break
        if len(ids) < need:
            raise TextError(f"text {name!r} has {len(ids)} tokens, {need} are needed")
        return front + ids[:need]

    def all(self, names: Sequence[str], tokens: int) -> dict[str, list[int]]:
        """``tokens`` tokens of every text, or as many as ``name@tokens`` says."""
        texts = {}
        for spec in names:
            name, _, count = spec.partition("@")
            texts[name] = self.get(name, int(count or tokens))
        return texts

    def length(self, name: str) -> int:
        """Tokens of a whole text, BOS counted."""
        return len(self._all(name)) + (self.bos is not None)

    @cache  # noqa: B019 - one object per run
    def _all(self, base: str) -> list[int]:
        return [token for document in self._documents(base) for token in document]

    def _documents(self, base: str) -> Iterator[list[int]]:
        for path in _files(base, self._books):
            text = path.read_text(encoding="utf-8")
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
            if path.suffix == ".py" and self._tokenizer.eos_token_id is not None:
                ids.append(self._tokenizer.eos_token_id)
            yield ids


def _files(base: str, books: Path | None) -> list[Path]:
    if base == "held-out":
        return held_out_files()
    if base == "tests":
        return library_tests()
    if base == "python":
        files = held_out_files() + library_tests()
        random.Random(SEED).shuffle(files)
        return files
    path = (books or Path()) / f"{base}.txt"
    if books is None or not path.is_file():
        raise TextError(
            f"no text {base!r}; known are held-out, tests, python, repeated and --books"
        )
    return [path]


def library_tests() -> list[Path]:
    """Files of CPython's test suite of the size the training takes, a sample of about 4 MB."""
    root = Path(sysconfig.get_paths()["stdlib"]) / "test"
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if 1000 <= path.stat().st_size <= MAX_FILE_BYTES and _is_text(path)
    ]
    random.Random(SEED).shuffle(files)
    chosen, size = [], 0
    for path in files:
        chosen.append(path)
        size += path.stat().st_size
        if size > 4_000_000:
            break
    return chosen


def _is_text(path: Path) -> bool:
    try:
        return "\0" not in path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 1 << 40  # no warning about long texts
    return tokenizer
