"""A start that is refused ends with one sentence, whatever was started and wherever it failed.

``LLM(...)`` raises :class:`Refused`, a ``ValueError``. A command (``vllm serve`` and its like)
ends with ``vllm serve: error: <sentence>`` and exit code 1, without a traceback. Engine cores and
workers are other processes, whose traces vLLM prints itself; they leave their sentence in a file,
so that the command can end with it, behind vLLM's "see root cause above". Imports neither torch
nor vLLM.
"""

import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_LAST_WORDS = "SINK_VLLM_LAST_WORDS"
"""Environment variable: where a child process leaves its sentence (a path, not yet a file)."""

_COMMANDS_OF_COMMANDS = ("bench", "launch")


class Refused(ValueError):
    """A configuration that sink_vllm does not run: one sentence that names the way out."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Whatever is refused inside (any ``ValueError``; code of ours only) is a :class:`Refused`.

    Raises:
        Refused: with the sentence of the ``ValueError``.
    """
    try:
        yield
    except ValueError as error:
        _leave(str(error))
        if isinstance(error, Refused):
            raise
        raise Refused(str(error)) from error


def end_with_the_sentence() -> None:
    """Let this process end in the way of a command if a start is refused. Idempotent."""
    previous = sys.excepthook
    if getattr(previous, "__module__", None) == __name__:
        return
    # There is no such file before somebody is refused. Children inherit the variable.
    path = Path(tempfile.gettempdir(), f"sink_vllm-refused-{secrets.token_hex(8)}")
    os.environ.setdefault(_LAST_WORDS, str(path))

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        left = _take()
        if isinstance(error, Refused):
            sentence: str | None = str(error)
        else:
            previous(kind, error, trace)
            sentence = left
        if sentence is not None:
            print(f"{_command()}: error: {sentence}", file=sys.stderr)

    sys.excepthook = excepthook


def _command() -> str:
    """What runs, as its user would call it: ``vllm serve``, ``vllm bench latency``."""
    program, *words = Path(sys.argv[0]).name, *sys.argv[1:]
    if program != "vllm":
        return program
    return " ".join(
        [program, *words[: 2 if words[:1] and words[0] in _COMMANDS_OF_COMMANDS else 1]]
    )


def _leave(sentence: str) -> None:
    """The first process to refuse says why; those that fail because of it say nothing new."""
    path = os.environ.get(_LAST_WORDS)
    if path is not None:
        with contextlib.suppress(OSError), Path(path).open("x", encoding="utf-8") as file:
            file.write(sentence)


def _take() -> str | None:
    """What a child has left; it is gone afterwards."""
    path = Path(os.environ.get(_LAST_WORDS, os.devnull))
    try:
        sentence = path.read_text(encoding="utf-8")
        path.unlink()
    except OSError:
        return None
    return sentence or None
