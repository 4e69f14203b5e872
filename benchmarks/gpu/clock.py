"""Wall times of work on a device, and what its memory can do at best."""

import time
from collections.abc import Callable
from statistics import median

import torch


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``work``, from an idle device to an idle device: launches are included."""
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return (time.perf_counter() - begin) * 1e3


def median_milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of ``repeats`` runs, after one that does not count (kernels are chosen there)."""
    work()
    return median(milliseconds(work, device) for _ in range(repeats))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_millisecond(device: torch.device, repeats: int) -> float:
    """Bytes read plus bytes written, of one large copy."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / median_milliseconds(lambda: target.copy_(source), device, repeats)
