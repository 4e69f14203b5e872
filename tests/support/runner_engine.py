"""Runs a job of ``runner_job.py``: ``python -m tests.support.runner_engine < job.json``.

The kernels of vLLM's V2 model runner are written in Triton, which has no CPU backend. Under
Triton's interpreter they run anyway, once Triton reports *some* active backend; so this has to be a
process of its own, with ``INTERPRETED_V2`` in its environment before it starts and a stand-in
backend registered before vLLM is imported. On a GPU both runners need neither. The last line of
the output is the result, as JSON.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class _StandInDriver:
    """All vLLM asks of the driver of a Triton backend: whether it is there."""

    @staticmethod
    def is_active() -> bool:
        return True


def register_stand_in_backend() -> None:
    import triton.backends

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=_StandInDriver)


def keep_masks_boolean() -> None:
    """Let the interpreter load under masks that it made integers.

    It loses the type of a comparison that is combined with others, as in vLLM's kernels that draft
    n-grams, and then refuses it. Compilers keep one bit.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def load_under_bits(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return load(self, ptrs, mask, *args)

    def store_under_bits(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, *args)

    InterpreterBuilder.create_masked_load = load_under_bits
    InterpreterBuilder.create_masked_store = store_under_bits


def switch_async_scheduling_on() -> None:
    """Undo what the CPU platform does at the end of its checks."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_switch_on(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(check_and_switch_on)  # type: ignore[method-assign]


def use_torch_convolutions() -> None:
    """What ``Family.torch_convolutions`` asks for."""
    import torch

    torch.cpu._is_avx512_bf16_supported = lambda: False


def flatten_logits(model: Any) -> None:
    """Make all tokens equally likely, so that the sampler's noise alone decides."""
    model.logits_processor.scale = 1e-9


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run the batches of a job one after the other on one engine."""
    from vllm import SamplingParams

    from sink_vllm.policy.parked import Chain
    from tests.support.drafts import Drafts, watch_drafts
    from tests.support.engine import Generated, Policy, check_all_free, running_engine
    from tests.support.positions_seen import PositionsSeen, watch_positions
    from tests.support.remembered import Remembered, append, schedule_of

    policy = Policy(**job["policy"]) if job["policy"] else None
    with (
        watching_graphs() as graphs,
        running_engine(Path(job["model"]), policy, **job["engine"]) as engine,
    ):
        self_test_graphs = graphs.copy()
        seen = watch_positions(engine.runner) if job["watch"] else PositionsSeen()
        drafts = watch_drafts(engine.scheduler) if policy else Drafts()
        batches, drafted, told = [], [], []
        streams: list[Remembered] = []
        for batch in job["batches"]:
            if batch["flat"]:
                flatten_logits(engine.runner.get_model())
            params = [SamplingParams(**_with_int_keys(params)) for params in batch["params"]]
            before = dataclasses.astuple(drafts)
            if batch["forget"]:
                engine.forget_prefixes()
            chains: list[Chain] = []
            if batch["stored"] and policy:
                prompts = batch["prompts"]
                streams = streams or [Remembered(schedule_of(policy)) for _ in prompts]
                made, chains = append(engine, streams, prompts, params)
            else:
                made = [Generated.of(one) for one in engine.generate(batch["prompts"], params)]
            told.append([(chain.resumed_from, chain.base) for chain in chains])
            pairs = zip(dataclasses.astuple(drafts), before, strict=True)
            drafted.append([after - one for after, one in pairs])
            batches.append([dataclasses.asdict(one) for one in made])
        check_all_free(engine)
        return {
            "scheduler": type(engine.scheduler).__name__,
            "runner": type(engine.runner).__name__,
            "batches": batches,
            "num_poisoned": engine.num_poisoned,
            "model": type(engine.runner.get_model()).__name__,
            "still": [not one.rotation for one in getattr(engine.runner, "attention_layers", ())],
            "positions": dataclasses.asdict(seen),
            "self_test_graphs": self_test_graphs,
            "drafts": drafted,
            "told": told,
        }


@contextmanager
def watching_graphs() -> Iterator[list[bool]]:
    """Step by step, whether the V2 runner may replay a graph of decode steps."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    seen: list[bool] = []
    gather = GPUModelRunner.gather_batch_req_state

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        state, tokens = gather(self, *args, **kwargs)
        if state is not None:  # not a dummy run
            seen.append(tokens == 1)
        return state, tokens

    GPUModelRunner.gather_batch_req_state = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        GPUModelRunner.gather_batch_req_state = gather  # type: ignore[method-assign]


def _with_int_keys(params: dict[str, Any]) -> dict[str, Any]:
    """JSON turns the token ids of ``logit_bias`` into strings."""
    bias = params.get("logit_bias") or {}
    return params | {"logit_bias": {int(token): value for token, value in bias.items()}}


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        register_stand_in_backend()
        keep_masks_boolean()
    job = json.load(sys.stdin)
    if job["engine"].get("async_scheduling"):
        switch_async_scheduling_on()
    if job["torch_convolutions"]:
        use_torch_convolutions()
    print(json.dumps(run(job)))


if __name__ == "__main__":
    main()
