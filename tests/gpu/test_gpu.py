"""What only a GPU can show about streams: both of vLLM's model runners, their kernels and graphs.

Page moves on a GPU's memory are in ``tests/worker/test_layouts.py``. All of it is one command
there: ``python -m benchmarks.gpu``.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.kv_cache_interface import KVCacheLayout

from benchmarks.common import RESULTS
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, evictions
from benchmarks.gpu.pages import Shape, attention_layers
from sink_vllm.worker.moves.mover import PageMover
from tests.conftest import ModelFactory
from tests.support.engine import Policy
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.runner_job import Batch, run_job
from tests.support.tiny_models import TinyLlama

SHAPE = TinyLlama(max_positions=128, layers=2)
POLICY = Policy(5, 27, 32)  # C = 64
PROMPTS = [random_tokens(length, length) for length in (20, 64, 65, 170)]
SHORT_PROMPTS = [random_tokens(4, seed) for seed in range(6)]
NUM_TOKENS = 500
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
RUNNERS = {"V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "V2": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}
CLASSES = {"V1": "StreamingLLMGPUModelRunner", "V2": "StreamingLLMGPUModelRunnerV2"}
# Triton multiplies float32 numbers as TF32 otherwise, ten bits of which are exact.
IEEE = {"TRITON_F32_DEFAULT": "ieee"}


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLEX_ATTENTION"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_streams_equal_the_oracle(
    runner: str, backend: str, eager: bool, tiny_llama: ModelFactory
) -> None:
    """Exactly, in float32, which FlashAttention does not have."""
    folder = tiny_llama(SHAPE)
    batch = Batch(PROMPTS, [GREEDY | {"max_tokens": NUM_TOKENS}] * len(PROMPTS))

    ran = run_job(
        folder,
        [batch],
        POLICY,
        RUNNERS[runner] | IEEE,
        watch=False,
        enforce_eager=eager,
        attention_backend=backend,
    )

    assert ran.runner == CLASSES[runner]
    verdict = judge(Oracle(folder), POLICY, PROMPTS, ran.batches[0])
    print(runner, backend, verdict)
    assert verdict.least_evictions >= 10
    assert verdict.least_reanchorings >= 1


@pytest.mark.engine
@pytest.mark.parametrize(
    ("runner", "cache"),
    [
        ("CPU", "auto"),
        *(
            pytest.param(runner, cache, marks=pytest.mark.gpu)
            for runner in RUNNERS
            for cache in ("auto", "fp8")
        ),
    ],
)
def test_rounding_does_not_build_up(runner: str, cache: str, tiny_llama: ModelFactory) -> None:
    """In bfloat16 and fp8 a stream is as close to float32 after its evictions as before them.

    On a GPU with the attention that vLLM chooses, and its CUDA graphs.
    """
    folder = tiny_llama(SHAPE)
    count = len(SHORT_PROMPTS)
    batch = Batch(SHORT_PROMPTS, [GREEDY | {"max_tokens": NUM_TOKENS}] * count)

    ran = run_job(
        folder,
        [batch],
        POLICY,
        RUNNERS.get(runner, {}),
        watch=False,
        dtype="bfloat16",
        kv_cache_dtype=cache,
        enforce_eager=runner == "CPU",
    )

    assert ran.runner == CLASSES.get(runner, "StreamingLLMCPUModelRunner")
    streams = ran.batches[0]
    assert all(stream.evictions >= 10 and stream.reanchorings >= 1 for stream in streams)
    truth = Oracle(folder).run(
        SHORT_PROMPTS,
        POLICY.S,
        POLICY.W,
        POLICY.g,
        NUM_TOKENS,
        forced=[stream.tokens for stream in streams],
    )
    errors = [
        [abs(a - b) for a, b in zip(one.logprobs, stream.logprobs, strict=True)]
        for one, stream in zip(truth, streams, strict=True)
    ]
    first = POLICY.capacity - len(SHORT_PROMPTS[0])
    before = fmean(error for stream in errors for error in stream[:first])
    last = NUM_TOKENS // 2
    after = fmean(error for stream in errors for error in stream[last:])
    print(
        f"{runner} {cache}: mean |dlogprob| {before:.1e} before evictions, {after:.1e} at the end"
    )
    assert 0 < after <= 1.5 * before


@pytest.mark.gpu
@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_pages_are_read_as_vllm_writes_them(layout: KVCacheLayout) -> None:
    """By the op that FlashAttention and FlashInfer write their caches with."""
    shape = Shape(layers=1, kv_heads=2, head_size=64, block_size=16, dtype=torch.float16)
    device = torch.device("cuda")
    (layer,) = layers = attention_layers(shape, device, 4, layout)
    keys, values = torch.randn(2, 4 * 16, 2, 64, device=device, dtype=torch.float16)
    cache = layer.kv_cache.transpose(1, 2)
    slots, scale = torch.arange(4 * 16, device=device), torch.ones(1, device=device)

    ops.reshape_and_cache_flash(
        keys, values, cache[..., :64], cache[..., 64:], slots, "auto", scale, scale
    )

    mover = PageMover(layers, 16)
    for page in range(4):
        ((read_keys, read_values),) = mover.read_page(page).values()
        assert torch.equal(read_keys, keys[16 * page : 16 * page + 16].float())
        assert torch.equal(read_values, values[16 * page : 16 * page + 16].float())


def test_the_command_runs_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A smoke test on the CPU, with a small model: everything is measured, or says why not."""
    small = partial(Shape, layers=2, kv_heads=2, head_size=32)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--no-tests", "--repeats", "1"])
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    for module in (evictions, attention):
        monkeypatch.setattr(module, "Shape", small)

    assert command.main() == 0

    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("what=eviction")]) == 2 * 2 * 2 * 2
    rows = [line for line in lines if line.startswith("what=attention")]
    assert len(rows) == 2 * 2 * len(attention.ATTENTIONS)
    assert all(("rotate_at_read_ms=" in row) != ("cannot=" in row) for row in rows)
    assert all("rotate_at_read_ms=" in row for row in rows if "by=torch" in row)
    (folder,) = tmp_path.iterdir()
    assert {file.name for file in folder.iterdir()} == {
        "meta.json",
        "rows.jsonl.zst",
        "summary.json",
    }
    assert not (RESULTS / folder.name).exists()


@torch.inference_mode()
def test_attention_is_the_same_over_keys_rotated_early_or_late() -> None:
    shape = Shape(layers=2, kv_heads=2, head_size=32, dtype=torch.float32)
    step = attention.DecodeStep(shape, streams=3, capacity=40, device=torch.device("cpu"))
    size = shape.head_size

    early = step.attention(attention.by_torch)
    late = step.rotate_at_read(attention.by_torch)

    for layer, (one, other) in enumerate(zip(early, late, strict=True)):
        assert torch.equal(one, other)
        keys, values = step.rotated[layer], step.values[layer]
        scores = torch.einsum("bqhgd,bkhd->bhgqk", step.query, keys) / size**0.5
        expected = torch.einsum("bhgqk,bkhd->bqhgd", scores.softmax(-1), values)
        torch.testing.assert_close(one, expected)
    assert not torch.equal(step.rotated[0], step.unrotated[0])
