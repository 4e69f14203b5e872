"""The processes of a server or a cluster on this machine: which they are, and their memory."""

from collections.abc import Iterable

import psutil


def family(root: int | None = None) -> list[psutil.Process]:
    """Process ``root`` (by default this one) and all below it; none when it has ended."""
    try:
        first = psutil.Process(root)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def titled(title: str, root: int | None = None) -> list[psutil.Process]:
    """Processes below ``root`` whose command line has ``title`` in it, oldest first."""
    found = []
    for process in family(root)[1:]:
        try:
            if title in " ".join(process.cmdline()):
                found.append((process.create_time(), process))
        except psutil.NoSuchProcess:
            continue
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def rss(processes: Iterable[psutil.Process]) -> dict[str, int]:
    """Resident bytes by name and process id, of those that are still there."""
    found = {}
    for process in processes:
        try:
            found[f"{process.name()}:{process.pid}"] = process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found
