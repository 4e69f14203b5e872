"""The arms of the benchmark, and an engine for each of them in this process.

=============  =========================================================================
``full``       stock vLLM, its RoPE table made longer than the trained length
``recompute``  stock vLLM; short prompts only (the sliding window with re-computation)
``sink``       the product: S sink tokens, window W, stride g
``window``     the product with S = 0
``absolute``   the product with its sinks left at absolute positions (negative control)
=============  =========================================================================
"""

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from sink_vllm.policy.schedule import Schedule

BLOCK_SIZE = 32  # the smallest page of vLLM's CPU attention
RECORDER = "benchmarks.quality.recorder.Recorder"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # see recorder.py
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to run a model over a text longer than its context."""

    name: str
    kind: str
    """``full``, ``recompute``, ``sink`` or ``absolute``; ``window`` is ``sink`` without sinks."""
    sinks: int = 0
    window: int = 0
    stride: int = 0
    limit: int = 0
    """Most tokens of one request (stock arms)."""
    dtype: str = "float32"

    @property
    def bounded(self) -> bool:
        return self.kind in ("sink", "absolute")

    @property
    def schedule(self) -> Schedule:
        return Schedule(sink_tokens=self.sinks, window=self.window, stride=self.stride)

    @property
    def options(self) -> dict[str, int]:
        """The arm as options of one request, on an engine with room for it."""
        return {"sink_tokens": self.sinks, "sink_window": self.window}

    def row(self) -> dict[str, Any]:
        """The arm as a row of the raw data."""
        return asdict(self)


def sink(
    sinks: int, capacity: int, stride: int = BLOCK_SIZE, name: str = "", dtype: str = "float32"
) -> Arm:
    """``sinks`` sink tokens in a cache of ``capacity`` tokens: the window gives way to them."""
    window = capacity - sinks - stride
    name = name or ("sink" if sinks else "window")
    return Arm(name=name, kind="sink", sinks=sinks, window=window, stride=stride, dtype=dtype)


def shared(arms: Iterable[Arm]) -> list[list[Arm]]:
    """Arms that can run on one engine, as options of its requests: same stride, same dtype."""
    groups: dict[object, list[Arm]] = {}
    for arm in arms:
        alike = (arm.stride, arm.dtype) if arm.kind == "sink" else arm
        groups.setdefault(alike, []).append(arm)
    return list(groups.values())


def host(arms: Sequence[Arm]) -> Arm:
    """The arm whose engine runs all of ``arms``: requests may have less window, not more."""
    if len(arms) == 1:
        return arms[0]
    capacity = max(arm.schedule.capacity for arm in arms)
    window = max(arm.window for arm in arms)
    return replace(arms[0], name="host", sinks=capacity - window - arms[0].stride, window=window)


@contextmanager
def engine(arm: Arm, model: str, streams: int) -> Iterator[Any]:
    """vLLM's ``LLMEngine`` for ``arm`` with room for ``streams`` requests at once."""
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    longest = arm.schedule.capacity if arm.bounded else arm.limit
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": arm.dtype,
        "block_size": BLOCK_SIZE,
        "enforce_eager": True,
        "max_num_seqs": streams,
        "max_num_batched_tokens": max(streams * min(longest, 512), 2048),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
        "worker_extension_cls": RECORDER,
        "seed": 0,
    }
    if arm.bounded:
        arguments["additional_config"] = {
            "kv_policy": "sink",
            "sink_tokens": arm.sinks,
            "sink_window": arm.window,
            "sink_stride": arm.stride,
        }
    else:
        # Plain RoPE: more rows of the table change no other row.
        arguments["max_model_len"] = arm.limit + 1
        arguments["hf_overrides"] = {"max_position_embeddings": arm.limit + 1}
    with _no_reanchoring(arm):
        llm = LLM(**arguments)
    try:
        core = llm.llm_engine
        core.collective_rpc("quality_start")
        if arm.kind == "absolute":
            core.collective_rpc("quality_leave_sinks")
        yield core
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm, core
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def _no_reanchoring(arm: Arm) -> Iterator[None]:
    """Absolute positions grow with the stream: a table for all of it, never started anew."""
    from sink_vllm.worker.layers import rope_table

    before = rope_table.TABLE_CAPACITIES
    if arm.kind == "absolute":
        rope_table.TABLE_CAPACITIES = arm.limit // arm.schedule.capacity + 2
    try:
        yield
    finally:
        rope_table.TABLE_CAPACITIES = before
