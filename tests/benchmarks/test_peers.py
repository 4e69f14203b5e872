"""The peers in plain transformers compute what they say, or a ratio to them means nothing."""

from pathlib import Path

import pytest
import torch

from benchmarks.serving import peers
from benchmarks.serving.arrivals import Log
from tests.conftest import ModelFactory
from tests.end_to_end.test_oracle import random_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_models import TinyLlama

SHAPES = {
    "mha": TinyLlama(layers=2),
    "gqa": TinyLlama(heads=4, kv_heads=2, layers=2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_streaming_is_streaming_llm_token_by_token(name: str, tiny_llama: ModelFactory) -> None:
    """S = 4, 40 tokens cached, one dropped per step: the oracle with stride 1."""
    folder = tiny_llama(SHAPES[name])
    prompt = random_tokens(30, seed=1)
    model = peers.StreamingModel(peers.load(str(folder), "float32", 64), sinks=4, most=40)
    cache = model.new_stream()

    tokens = [model.step(cache, prompt)]
    while len(tokens) < 80:
        tokens.append(model.step(cache, [tokens[-1]]))

    (expected,) = Oracle(folder).run([prompt], 4, 35, 1, 80)
    assert expected.evictions == 69
    assert tokens == expected.tokens
    (without_sinks,) = Oracle(folder).run([prompt], 0, 39, 1, 80)
    assert tokens != without_sinks.tokens, "the sinks make no difference: nothing was tested"


def test_streams_taking_turns_do_not_see_each_other(tiny_llama: ModelFactory) -> None:
    folder = tiny_llama(SHAPES["mha"])
    model = peers.StreamingModel(peers.load(str(folder), "float32", 64), sinks=4, most=24)
    prompts = [random_tokens(20, seed=seed) for seed in (1, 2)]

    alone = []
    for prompt in prompts:
        cache = model.new_stream()
        alone.append([model.step(cache, prompt)])
        for _ in range(20):
            alone[-1].append(model.step(cache, alone[-1][-1:]))
    caches = [model.new_stream() for _ in prompts]
    turns = [[model.step(cache, prompt)] for cache, prompt in zip(caches, prompts, strict=True)]
    for _ in range(20):
        for made, cache in zip(turns, caches, strict=True):
            made.append(model.step(cache, made[-1:]))

    assert turns == alone


def test_recomputing_is_a_prefill_of_the_window(tiny_llama: ModelFactory) -> None:
    folder = tiny_llama(SHAPES["mha"])
    model = peers.load(str(folder), "float32", 64)
    window = random_tokens(24, seed=3)

    with torch.inference_mode():
        logits = model(torch.tensor([window])).logits[0, -1]

    assert peers._recompute(model, window) == int(logits.argmax())


@pytest.mark.parametrize("kind", ["streaming", "recompute"])
def test_a_run_gives_one_log_per_stream(kind: str, tiny_llama: ModelFactory) -> None:
    folder: Path = tiny_llama(SHAPES["mha"])
    prompts = [random_tokens(24, seed=seed) for seed in range(3)]

    _, found = peers.run(kind, str(folder), "float32", 4, 24, prompts, 5, 0.0)

    for log in (Log(**log) for log in found["logs"]):
        assert len(log.arrivals) == 5
        assert log.started < log.arrivals[0]
        assert log.prompt == 24
