"""An engine in a process of its own: vLLM keeps global state, and every arm wants a fresh one."""

import multiprocessing
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any


class WorkError(Exception):
    """The process failed; the message is its traceback."""


def isolated(work: Callable[..., Iterator[Any]], *args: Any) -> Generator[Any, None, None]:
    """What the generator ``work(*args)`` yields, run in a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, work, args), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            try:
                kind, content = ours.recv()
            except EOFError:
                process.join()
                raise WorkError(f"the process died (exit code {process.exitcode})") from None
            if kind == "end":
                return
            if kind == "error":
                raise WorkError(content)
            yield content
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Connection, work: Callable[..., Iterator[Any]], args: tuple[Any, ...]) -> None:
    try:
        for content in work(*args):
            pipe.send(("content", content))
        pipe.send(("end", None))
    except Exception:  # noqa: BLE001 - whatever it was, the parent reports it
        pipe.send(("error", traceback.format_exc()))
