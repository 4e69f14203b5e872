"""Sleep level 2 throws away what was allocated with the model, except its buffers.

vLLM has no sleep mode on CPUs, so the loss is staged: memory that the runner's ``load_model`` took
for the policy is overwritten between two steps of a stream that goes on.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from sink_vllm.worker.cpu_worker import StreamingLLMCPUModelRunner
from tests.conftest import ModelFactory
from tests.support.engine import Policy, running_engine
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(max_positions=128, layers=2)
POLICY = Policy(5, 27, 32)  # C = 64


class _Allocations(TorchDispatchMode):
    """Memory of all results of operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.storages[storage.data_ptr()] = storage
        return result


def test_offsets_are_not_lost_with_the_memory_of_the_model(
    tiny_llama: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the same requests go on, step after step."""
    ours = _Allocations()
    seen = steps = 0
    load_theirs, load_ours = CPUModelRunner.load_model, StreamingLLMCPUModelRunner.load_model

    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal seen
        with ours:
            load_ours(self, *args, **kwargs)
        seen += len(ours.storages)
        model = self.get_model()
        # On the host whatever the device is: `Rotation` asks for that.
        on_host = (one.rotation.frequencies for one in self.attention_layers)
        for kept in (*model.parameters(), *model.buffers(), *on_host):
            ours.storages.pop(kept.untyped_storage().data_ptr(), None)

    def load_unseen(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            load_theirs(self, *args, **kwargs)

    monkeypatch.setattr(StreamingLLMCPUModelRunner, "load_model", load)
    monkeypatch.setattr(CPUModelRunner, "load_model", load_unseen)
    prompts = [random_tokens(length, length) for length in (50, 64, 90)]

    def lose() -> None:
        nonlocal steps
        steps += 1
        if steps % 10 == 0:
            for storage in ours.storages.values():
                torch.tensor([], dtype=torch.uint8).set_(storage).zero_()

    with running_engine(tiny_llama(SHAPE), POLICY) as engine:
        engine.after_step.append(lose)
        results = engine.greedy(prompts, 150)

    assert steps > 150
    assert seen > 0
    verdict = judge(Oracle(tiny_llama(SHAPE)), POLICY, prompts, results)
    assert verdict.least_evictions >= 4
