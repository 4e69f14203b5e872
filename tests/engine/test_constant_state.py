"""Invariant 4: what the engine remembers of a stream does not grow with the stream."""

import gc
import pickle
from collections import deque
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import pytest
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.conftest import ModelFactory
from tests.support.engine import Engine, Policy, running_engine
from tests.support.judge import random_tokens
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

POLICY = Policy(4, 60, 32)  # C = 96
SHAPE = TinyLlama(layers=2, max_positions=256)
NUM_TOKENS = 3_200
MEASURED = 20  # times that all entries are counted, early and late
OPAQUE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, torch.Tensor, str)
SIZED = (list, tuple, dict, set, frozenset, deque, bytes, bytearray)


def reachable_entries(roots: Iterable[Any]) -> int:
    """Entries of all containers reachable from ``roots`` (code, classes and tensors excluded)."""
    seen: set[int] = set()
    stack = list(roots)
    entries = 0
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, OPAQUE):
            continue
        seen.add(id(thing))
        if isinstance(thing, SIZED):
            entries += len(thing)
        stack.extend(gc.get_referents(thing))
    return entries


def list_lengths(engine: Engine) -> dict[str, int]:
    """Lengths of the lists that grow with the sequence in stock vLLM, for the only stream."""
    (request,) = engine.scheduler.requests.values()
    (state,) = engine.runner.requests.values()
    table = engine.manager.req_to_blocks[request.request_id]
    return {
        "request._all_token_ids": len(request._all_token_ids),
        "request._output_token_ids": len(request._output_token_ids),
        "request.prompt_token_ids": len(request.prompt_token_ids),
        "request.block_hashes": len(request.block_hashes) * 32,
        "block table": len(table) * 32,
        "worker prompt_token_ids": len(state.prompt_token_ids),
        "worker output_token_ids": len(state.output_token_ids),
        "worker block_ids": sum(map(len, state.block_ids)) * 32,
    }


@pytest.mark.parametrize("caching", [False, True], ids=["no cache", "prefix cache"])
def test_engine_state_of_a_stream_is_bounded(
    caching: bool, tiny_llama: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scheduler, block manager, worker and the messages between them stay O(C) for 3,200 tokens.

    What page moves work in is there before vLLM measures memory, and stays where it is.
    """
    measured: list[dict[str, Any]] = []
    measure = CPUWorker.determine_available_memory

    def watched_measure(self: Any) -> int:
        measured.append(self.model_runner.page_scratch.addresses())
        return measure(self)

    monkeypatch.setattr(CPUWorker, "determine_available_memory", watched_measure)
    longest: dict[str, int] = {}
    messages: list[int] = []
    entries: dict[int, int] = {}
    steps = 0
    with running_engine(
        tiny_llama(SHAPE),
        POLICY,
        guarded=False,
        enable_prefix_caching=caching,
        num_gpu_blocks_override=12,  # so few that the prefix cache is full early
    ) as engine:
        schedule = engine.scheduler.schedule

        def recorded_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            messages.append(len(pickle.dumps(output)))
            return output

        def observe() -> None:
            nonlocal steps
            if not engine.scheduler.requests:
                return
            steps += 1
            for name, length in list_lengths(engine).items():
                longest[name] = max(longest.get(name, 0), length)
            early = steps < 200 + MEASURED * POLICY.g
            late = steps >= NUM_TOKENS - MEASURED * POLICY.g
            if steps % POLICY.g == 0 and steps >= 200 and (early or late):
                roots = [engine.core.scheduler, engine.core.model_executor]
                entries[steps] = reachable_entries(roots)

        engine.scheduler.schedule = recorded_schedule
        engine.after_step.append(observe)
        (result,) = engine.greedy([random_tokens(40, 1)], NUM_TOKENS, logprobs=None)
        scratch = engine.runner.page_scratch.addresses()

    assert result.evictions >= 95
    assert result.reanchorings > 0
    assert [scratch] == measured
    assert sum(size for _, size in scratch.values()) == 7 << 20
    assert steps >= NUM_TOKENS - 1
    # One more token than the capacity is known before it is computed; pages round up.
    bound = POLICY.capacity + 32
    assert {name: n for name, n in longest.items() if n > bound} == {}
    assert max(messages[-1_000:]) <= max(messages[:500])
    counts = list(entries.values())
    assert len(counts) >= 2 * MEASURED - 1
    first, last = max(counts[:MEASURED]), max(counts[MEASURED:])
    assert last <= first + 50, f"{first} entries early, {last} late"
