"""Host memory of workers that the engine core reads and writes, too.

A worker makes memory without a name, which is gone with the last process that has it mapped, and
leaves a note where to find it: a small file for the process that the engine core runs in, which
takes it away when it starts to schedule. Workers are that process or its children.
"""

import json
import mmap
import os
import tempfile
from pathlib import Path

from sink_vllm.gate.refused import Refused


def share(nbytes: int, rank: int, layout: str, *, is_child: bool) -> mmap.mmap:
    """Memory for a worker, of which its engine core will find a note.

    Args:
        nbytes: to map; they are taken from the machine when they are written to.
        rank: of the worker in its engine.
        layout: what must be the same for pages to be read by another worker.
        is_child: whether the engine core is the parent process, and not this one.
    """
    descriptor = os.memfd_create("sink_vllm")
    os.ftruncate(descriptor, nbytes)
    memory = mmap.mmap(descriptor, nbytes)
    note = _note(os.getppid() if is_child else os.getpid(), rank)
    note.unlink(missing_ok=True)
    with open(os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        where = f"/proc/{os.getpid()}/fd/{descriptor}"
        json.dump({"where": where, "layout": layout}, file)
    return memory


def attach(rank: int) -> tuple[memoryview, str]:
    """The memory of a worker of this engine core, and its layout.

    Raises:
        Refused: there is none, or this process may not have it.
    """
    note = _note(os.getpid(), rank)
    try:
        told = json.loads(note.read_text())
        note.unlink()
        descriptor = os.open(told["where"], os.O_RDWR)
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        os.close(descriptor)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(
            f"--sink-disk needs host memory that engine core and workers share, and that of worker "
            f"{rank} cannot be had ({error}); drop --sink-disk."
        ) from error
    return memoryview(memory), told["layout"]


def _note(engine_core: int, rank: int) -> Path:
    return Path(tempfile.gettempdir()) / f"sink_vllm-{os.getuid()}-{engine_core}-{rank}.json"
