"""llama.cpp beside us: the same weights, streams past its capacity, and no long prompts."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers import llama_cpp
from benchmarks.peers.gguf_of import TYPES, ConversionError, convert, interleaved
from benchmarks.serving import load
from benchmarks.serving.load import Client, words
from benchmarks.serving.run import without_missing
from benchmarks.serving.spec import LlamaSpec, Scenario, load_arms
from tests.support.paths import ROOT

MODEL = ROOT / "examples" / "models" / "pystream-2.5m"
SPEC = LlamaSpec(cache_type="f32", flash_attention="off", discard="stride")
SCENARIO = Scenario(
    name="small",
    kind="endless",
    arms=("llama-cpp",),
    streams=(2,),
    sinks=4,
    window=92,
    stride=32,  # C = 128
    prompt=40,
    tokens=300,
    seconds=0,
    repetitions=1,
)


@contextmanager
def serving(folder: Path, weights: str) -> Iterator[llama_cpp.LlamaServer]:
    if (why := llama_cpp.missing()) is not None:
        pytest.skip(why)
    target = folder / "model.gguf"
    convert(MODEL, target, weights)
    with llama_cpp.LlamaServer(SPEC, SCENARIO, target, threads=1) as server:
        server.wait(lambda _seconds: None, limit=60)
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama_cpp.LlamaServer]:
    with serving(tmp_path_factory.mktemp("gguf"), "f32") as server:
        yield server


def stream(
    server: llama_cpp.LlamaServer, prompts: list[list[int]], tokens: int, **options: Any
) -> list[list[int]]:
    """Token ids of streams that run at once."""
    dialect = llama_cpp.dialect(SPEC, SCENARIO)
    dialect = replace(dialect, options={**dialect.options, **options})
    unlimited = load.NO_LIMIT, lambda _: None

    async def run() -> list[list[int]]:
        async with load.connection() as http:
            logs = [load.Log(prompt=len(prompt)) for prompt in prompts]
            answers = await asyncio.gather(
                *(
                    load.complete(http, server.url, prompt, tokens, log, *unlimited, dialect)
                    for prompt, log in zip(prompts, logs, strict=True)
                )
            )
            assert [len(log.arrivals) for log in logs] == [tokens] * len(prompts)
        return [ids for ids, _ in answers]

    return asyncio.run(run())


def greedy(prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers generates."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        return [
            model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=-1
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]


@pytest.mark.server
@pytest.mark.timeout(180)
def test_it_runs_the_same_model(server: llama_cpp.LlamaServer) -> None:
    """Greedy tokens of transformers, as long as nothing is discarded."""
    prompts = [words(40, "same", number) for number in range(2)]
    expected = greedy(prompts, 60)

    assert stream(server, prompts, 60) == expected
    assert expected[0] != expected[1]


@pytest.mark.server
@pytest.mark.timeout(180)
@pytest.mark.parametrize("weights", [weights for weights in TYPES if weights != "f32"])
def test_with_weights_of_16_bits_it_begins_alike(weights: str, tmp_path: Path) -> None:
    """The checkpoint is bfloat16; what is rounded are activations, so few tokens are the same."""
    prompts = [words(40, "same", number) for number in range(2)]
    with serving(tmp_path, weights) as server:
        assert stream(server, prompts, 4) == greedy(prompts, 4)
    convert(MODEL, tmp_path / "whole.gguf")
    sizes = [(tmp_path / name).stat().st_size for name in ("model.gguf", "whole.gguf")]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.server
@pytest.mark.timeout(180)
def test_tokens_that_are_part_of_a_character_arrive(server: llama_cpp.LlamaServer) -> None:
    """A server's events leave them out where the vocabulary has bytes that are no text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    parts = [number for number in range(1024) if "\ufffd" in tokenizer.decode([number])]
    assert len(parts) > 50
    prompt, bias = words(40, "parts"), [[number, 100.0] for number in parts]
    dialect = llama_cpp.dialect(SPEC, SCENARIO)
    body = dialect.body(prompt, 60) | {"logit_bias": bias, "stream": False}

    answer = httpx.post(f"{server.url}{dialect.path}", json=body, timeout=60).json()
    (ids,) = stream(server, [prompt], 60, logit_bias=bias)

    assert len(ids) == 60
    assert set(ids) <= set(parts)
    assert answer["tokens"] == ids


@pytest.mark.server
@pytest.mark.timeout(180)
def test_its_streams_go_on_past_their_slots(server: llama_cpp.LlamaServer) -> None:
    """What it makes once tokens are discarded is its own affair; that it goes on is the arm's."""
    prompts = [words(40, "endless", number) for number in range(2)]
    assert 2 * SCENARIO.schedule.capacity < 40 + 300

    (first, second) = stream(server, prompts, 300)

    assert first != second
    assert "context shift" in server.log.read_text(errors="replace")
    assert "n_discard = 32" in server.log.read_text(errors="replace")


@pytest.mark.server
def test_it_refuses_prompts_beyond_its_slots(server: llama_cpp.LlamaServer) -> None:
    answer = server.answer_to(words(8 * SCENARIO.schedule.capacity, "long"))

    assert answer["status"] == 400
    assert "exceed" in answer["said"]


def test_rows_of_halves_become_rows_of_pairs() -> None:
    """Two heads of four: 0 1 2 3 is first half, second half; pairs are 0 2, 1 3."""
    weight = np.arange(8, dtype=np.float32).reshape(8, 1)

    assert interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_other_models_are_not_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen3", "rope_parameters": {"rope_type": "default"}}'
    )

    with pytest.raises(ConversionError, match="is no Llama"):
        convert(tmp_path, tmp_path / "model.gguf")


def test_an_arm_that_cannot_run_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = load_arms()
    monkeypatch.setattr(llama_cpp, "_NEEDED", ("no_such_package",))

    left = without_missing(SCENARIO, arms)

    assert left.arms == ()
    assert capsys.readouterr().out == (
        "small: llama-cpp is left out: no_such_package not installed; pip install -e '.[peers]'\n"
    )
    assert Client().dialect is load.OPENAI
