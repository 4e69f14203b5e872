"""What page moves and rope offsets make a device do, recorded on one that computes nothing.

Tensors on torch's ``meta`` device have shapes and no numbers. To the code under test it is a device
like a GPU: other than the host's, with the layouts and the batches of GPUs. It cannot show how long
anything takes, but whatever would read a number back fails on it, and every copy from the host is
seen with how it was asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.utils import torch_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from benchmarks.gpu.pages import Shape, attention_layers
from benchmarks.kv_buffer import kv_caches
from sink_vllm.policy.plan import PageMove, Refresh, StepPlan
from sink_vllm.worker import upload as sending
from sink_vllm.worker.moves.mover import PageMover
from sink_vllm.worker.runner_v1 import RopeOffsets
from sink_vllm.worker.scratch import Scratch
from sink_vllm.worker.upload import upload

DEVICE = torch.device("meta")
MIB = 1 << 20
BATCH = 32 * MIB
STREAMS = 256
# The first pages of a stream in these tests: original, head, and two of the window.
PAGES = 4
SHAPE = Shape(layers=32, kv_heads=8, head_size=128, block_size=16)


def _vllms_own() -> ModuleType:
    """vLLM's module as it is on GPUs: its V2 runner for CPUs replaces functions in it."""
    spec = spec_from_file_location("torch_utils_of_gpus", torch_utils.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TORCH_UTILS = _vllms_own()


@pytest.fixture(autouse=True)
def _as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "async_tensor_h2d", TORCH_UTILS.async_tensor_h2d)


@dataclass
class Seen:
    copies: int = 0
    """From the host to the device."""
    waits: list[str] = field(default_factory=list)
    """Copies during which the host waits for the device."""
    largest: int = 0
    """Bytes of the largest memory on the device that was allocated, and by what."""
    by: str = ""


class _Calls(TorchFunctionMode):
    """Constructors that copy numbers of the host: they are not dispatched as copies."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            self._seen.copies += 1
            self._seen.waits.append(func.__name__)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        known = {one.untyped_storage()._cdata for one in tensors}
        result = func(*args, **kwargs)
        name = str(func)
        if name.startswith(("aten._to_copy", "aten.copy_", "aten.to.")):
            source = args[1] if name.startswith("aten.copy_") else args[0]
            if source.device.type == "cpu" and result.device == DEVICE:
                self._seen.copies += 1
                if not kwargs.get("non_blocking", args[-1] is True):
                    self._seen.waits.append(name)
        if isinstance(result, torch.Tensor) and result.device == DEVICE:
            storage = result.untyped_storage()
            if storage._cdata not in known and storage.nbytes() > self._seen.largest:
                self._seen.largest, self._seen.by = storage.nbytes(), name
        return result


@contextmanager
def recorded() -> Iterator[Seen]:
    seen = Seen()
    with _Calls(seen), _Operations(seen):
        yield seen


def heavy_step(block: int, sinks: int = 4) -> list[PageMove]:
    """Every stream evicts or re-anchors, in different steps of its own life."""
    moves = []
    for stream in range(STREAMS):
        first = PAGES * stream + 1
        origin, head, *window = range(first, first + PAGES)
        if stream % 2:
            moves += [PageMove(page, page, 0, block, -640) for page in window]
        moves += [
            PageMove(origin, head, 0, sinks, 1 + stream),
            PageMove(window[0], head, sinks, block, 0),
        ]
    return moves


def mover_on_device(shape: Shape, layout: KVCacheLayout) -> tuple[PageMover, Scratch]:
    """As a GPU worker makes it: scratch memory is reserved for the specs of the model."""
    scratch = Scratch(DEVICE)
    spec = FullAttentionSpec(
        block_size=shape.block_size,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        dtype=shape.dtype,
    )
    scratch.reserve([spec] * shape.layers)
    layers = attention_layers(shape, torch.device("cpu"), 1, layout)
    caches = kv_caches(spec, [one.name for one in layers], PAGES * STREAMS + 1, layout, DEVICE)
    for layer in layers:
        layer.module.kv_cache = caches[layer.name]
    return PageMover(layers, shape.block_size, scratch=scratch), scratch


def test_copies_that_wait_are_seen() -> None:
    """The control: each way in which numbers used to be sent."""
    numbers = [1, 2, 3]
    with recorded() as seen:
        torch.tensor(numbers, device=DEVICE)
        torch.tensor(numbers).to(DEVICE)
        torch.empty(3, dtype=torch.int64, device=DEVICE)[:] = torch.tensor(numbers)
    assert seen.copies == len(seen.waits) == 3

    with recorded() as seen:
        upload(numbers, DEVICE)
        upload(np.arange(3), DEVICE)
    assert (seen.copies, seen.waits) == (2, [])

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        torch.zeros(1, device=DEVICE).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_evictions_do_not_wait_and_allocate_nothing_large(
    layout: KVCacheLayout, dtype: torch.dtype
) -> None:
    """256 streams in one step, in every layout and width of a cache.

    All of it works in what was reserved before the KV pool was sized: 3.5 batches of 32 MiB, keys
    in float32 among them, whatever the width of the cache.
    """
    shape = Shape(dtype=dtype)
    mover, scratch = mover_on_device(shape, layout)
    mover.run(heavy_step(shape.block_size)[:2])  # as the self-test does
    reserved = scratch.addresses()

    with recorded() as seen:
        mover.run(heavy_step(shape.block_size))

    assert sum(size for _, size in reserved.values()) == 7 * BATCH // 2
    assert scratch.addresses() == reserved
    assert seen.copies > 0
    assert seen.waits == []
    assert seen.largest < MIB, seen.by  # table of rotations, index tensors
    moved = len({move.dst for move in heavy_step(shape.block_size)}) * shape.layers
    assert moved * shape.page_bytes > 4 * BATCH


def test_rope_offsets_do_not_wait() -> None:
    offsets = RopeOffsets(DEVICE)
    refreshes = {f"r{i}": Refresh(64 * i, evicted=0, output_token_ids=[]) for i in range(STREAMS)}
    with recorded() as seen:
        offsets.update(StepPlan(refreshes=refreshes), finished=())
        rows = offsets.of_rows(list(refreshes))
    assert rows.shape == (STREAMS,)
    assert (seen.copies, seen.waits) == (1, [])


def test_guard_copies_of_vllm_are_queued_and_pinned() -> None:
    """Without a GPU nothing can be pinned, so vLLM's function is read."""
    text = Path(torch_utils.__file__).read_text()
    source = text.split("def async_tensor_h2d(")[1].split("\n\n\n")[0]

    assert source.count("pin_memory=") == 2
    assert "pin_memory=False" not in source
    assert source.count("non_blocking=True") == 2
