"""The start-up self-test on the real engine: what it proves, and what it refuses."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sink_vllm.worker.layers.attention import attention_layers, rope_rows
from sink_vllm.worker.layers.rotation import Rotation
from sink_vllm.worker.moves.mover import PageMover
from sink_vllm.worker.self_test import self_test
from tests.support.engine import Engine, Policy, running_engine
from tests.support.tiny_models import LLAMA3_ROPE, TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, rope=LLAMA3_ROPE)
POLICY = Policy(S=4, W=60, g=32)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(
    request: pytest.FixtureRequest, tiny_llama: Callable[[TinyLlama], Path]
) -> Iterator[Engine]:
    with running_engine(tiny_llama(SHAPE), POLICY, guarded=False, dtype=request.param) as engine:
        yield engine


@pytest.fixture
def runner(engine: Engine) -> Iterator[Any]:
    """The model runner; its layers and mover are as found afterwards."""
    runner = engine.runner
    yield runner
    runner.attention_layers = attention_layers(runner.get_model(), runner.vllm_config)
    runner.page_mover = PageMover.for_runner(runner)


def use(runner: Any, rotation: Rotation | None, *, only: int | None = None) -> None:
    """Give the layers (or one of them) another rotation."""
    for i, layer in enumerate(runner.attention_layers):
        if only in (None, i):
            layer.rotation = rotation
    runner.page_mover.rebind()


def test_the_model_as_it_is_passes(runner: Any, caplog: pytest.LogCaptureFixture) -> None:
    """All layers rotate, scratch pages are left empty, no request is left behind."""
    with caplog.at_level(logging.INFO, logger="vllm.sink_vllm"):
        self_test(runner)

    assert "keys re-rotate in 3 layers, do not depend on positions in 0" in caplog.text
    assert all(layer.rotation is not None for layer in runner.attention_layers)
    assert not runner.requests
    for layer in runner.attention_layers:
        assert not layer.kv_cache[1:3].any()


def test_layers_are_found_with_their_rotary_module(runner: Any) -> None:
    """vLLM shares one rotary module between the layers, and so do they one rotation."""
    layers = runner.attention_layers

    assert [layer.name for layer in layers] == [
        f"model.layers.{i}.self_attn.attn" for i in range(3)
    ]
    assert len({id(layer.rotation) for layer in layers}) == 1
    rotary = runner.get_model().model.layers[0].self_attn.rotary_emb
    assert layers[0].rotation.rotary is rotary
    assert rope_rows(layers) == rotary.cos_sin_cache.shape[0]


def wrong_pairing(rotation: Rotation) -> None:
    rotation.is_neox = not rotation.is_neox


def wrong_frequencies(rotation: Rotation) -> None:
    """As if llama3 scaling had been forgotten: only slow dimensions differ."""
    rotation.frequencies = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)


def wrong_direction(rotation: Rotation) -> None:
    rotation.frequencies = -rotation.frequencies


@pytest.mark.parametrize("break_it", [wrong_pairing, wrong_frequencies, wrong_direction])
def test_a_wrong_rotation_is_refused_by_name(
    runner: Any, break_it: Callable[[Rotation], None]
) -> None:
    """Layer, rotary class, distance, error and way out are in the sentence."""
    wrong = Rotation(runner.attention_layers[0].rotation.rotary, "layer")
    break_it(wrong)
    use(runner, wrong, only=1)

    with pytest.raises(
        ValueError,
        match=r"^model\.layers\.1\.self_attn\.attn: keys re-rotated with its "
        r"Llama3RotaryEmbedding by \d+ positions differ by .* --kv-policy full",
    ):
        self_test(runner)


def test_a_magnitude_applied_twice_is_refused(runner: Any) -> None:
    """Yarn's factor is in the stored key; here one of 10% is applied with the rotation."""

    class Twice(Rotation):
        def rotate(self, keys: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            super().rotate(keys, *args, **kwargs)
            keys *= 1.1

    use(runner, Twice(runner.attention_layers[0].rotation.rotary, "layer"))

    with pytest.raises(ValueError, match=r"model\.layers\.0"):
        self_test(runner)


def test_a_rotation_that_was_not_found_is_refused(runner: Any) -> None:
    """Keys that depend on the position without a rotary module in sight."""
    use(runner, None, only=2)

    with pytest.raises(ValueError, match=r"model\.layers\.2.*no rotary module was found"):
        self_test(runner)


def test_offsets_that_do_not_reach_the_model_are_refused(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every layer would look as if it did not rotate, and the stream would break."""
    monkeypatch.setattr(runner.rope_offsets, "update", lambda *_: None)

    with pytest.raises(ValueError, match="rope offsets do not reach the model"):
        self_test(runner)


def test_offsets_that_do_not_reach_decode_steps_are_refused(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if CUDA graphs of decode steps had been captured with another buffer of positions."""
    preprocess, kinds = runner._preprocess, set()

    def replayed(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        decoding = bool(scheduler_output.scheduled_cached_reqs.req_ids)
        kinds.add(decoding)
        with monkeypatch.context() as graph:
            if decoding:
                graph.setattr(runner, "rope_offsets", {})
            return preprocess(scheduler_output, *args, **kwargs)

    monkeypatch.setattr(runner, "_preprocess", replayed)

    with pytest.raises(ValueError, match=r"^Decode steps compute keys .*; use --enforce-eager, "):
        self_test(runner)

    assert kinds == {False, True}


def test_layers_that_own_a_rotary_module_and_do_not_use_it_are_found(
    runner: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Command R and EXAONE 4 have such layers: their keys are left alone from then on."""
    attention = runner.get_model().model.layers[1].self_attn
    rotary = attention.rotary_emb
    attention.rotary_emb = _Unused(rotary)
    try:
        with caplog.at_level(logging.INFO, logger="vllm.sink_vllm"):
            self_test(runner)
    finally:
        attention.rotary_emb = rotary

    assert [layer.rotation is None for layer in runner.attention_layers] == [False, True, False]
    assert "keys re-rotate in 2 layers, do not depend on positions in 1" in caplog.text


class _Unused(torch.nn.Module):
    """In the place of a rotary module, as layers without rotation have it: not called."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key


@pytest.mark.parametrize("shift", [1, 32 * 32], ids=["next slot", "value"])
def test_pages_read_at_the_wrong_place_are_refused(runner: Any, shift: int) -> None:
    """Keys taken from the next slot, or from where values are."""
    self_test(runner)  # learns the layout
    for group in runner.page_mover._groups:
        group.pages._key_at._start += shift
    runner.page_mover.rebind = lambda: None

    with pytest.raises(ValueError, match=r"^model\.layers\.\d\.self_attn\.attn"):
        self_test(runner)
