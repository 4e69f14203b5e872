"""How long RoPE tables become, and that positions far from the start are as good as any."""

from typing import Any, cast

import pytest
import torch

from benchmarks.paged_layers import PagedLayers
from sink_vllm.worker.layers import rope_table
from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.layers.rope_table import ROWS, TABLE_ROWS, extend_rope_tables
from sink_vllm.worker.layers.rotation import Rotation
from sink_vllm.worker.layers.rotation_transformers import TransformersRotation
from sink_vllm.worker.moves.arena import layout_of
from sink_vllm.worker.moves.mover import PageMover
from tests.worker.test_rotation import VARIANTS, keys_at, rerotated, rotary_of


def _layer(rotation: Rotation | None) -> AttentionLayer:
    return AttentionLayer("layer", cast("Any", None), rotation)


def _rows(rotation: Rotation, capacity: int, most: int | None = None) -> int:
    extend_rope_tables([_layer(rotation), _layer(None), _layer(rotation)], capacity, most)
    return rotation.table_rows


@pytest.fixture
def rotation() -> Rotation:
    return Rotation(rotary_of({"rope_type": "default"}, dtype=torch.float32), "layer")


@pytest.mark.parametrize(
    ("capacity", "expected"), [(64, TABLE_ROWS), (16_384, TABLE_ROWS), (20_000, 80_000)]
)
def test_a_stream_is_seldom_rotated_back(
    rotation: Rotation, monkeypatch: pytest.MonkeyPatch, capacity: int, expected: int
) -> None:
    monkeypatch.delenv(ROWS)  # of the tests

    assert _rows(rotation, capacity) == expected
    assert rotation.rotary.get_buffer("cos_sin_cache").shape[0] == expected


def test_what_the_model_may_not_be_given_is_not_used(
    rotation: Rotation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ROWS)

    assert _rows(rotation, 64, most=500) == 500


def test_tests_see_many_rotations_back(rotation: Rotation) -> None:
    """With the environment of ``tests/conftest.py``."""
    assert _rows(rotation, 400) == rope_table.TABLE_CAPACITIES * 400


def test_modules_that_compute_angles_get_no_far_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do so in float32."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    monkeypatch.delenv(ROWS)
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=256, num_attention_heads=4))

    assert _rows(TransformersRotation(rotary, "layer", 64), 400) == 1600


@pytest.mark.parametrize("given", ["many", "-1", "6.5", ""])
def test_what_is_no_number_is_said(
    rotation: Rotation, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv(ROWS, given)

    with pytest.raises(ValueError, match=f"{ROWS}='{given}' is no number of rows"):
        extend_rope_tables([_layer(rotation)], 64)


@pytest.mark.parametrize("variant", ["default", "llama3", "yarn", "M-RoPE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_out_are_those_at_the_start(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype
) -> None:
    """Products of queries and keys at the end of the table are as close to those of the rows that
    the model brought along as products near the start are; and so are keys moved that far."""
    monkeypatch.delenv(ROWS)
    rotary = rotary_of(VARIANTS[variant], dtype=dtype)
    rotation = Rotation(rotary, "layer")
    capacity = 256
    _rows(rotation, capacity)
    torch.manual_seed(1)
    keys = torch.randn(capacity, 2, 64, dtype=dtype)
    query = torch.randn(1, 2, 64, dtype=dtype)
    near, far = 2 * capacity, rotation.table_rows - capacity

    def scores(offset: int) -> torch.Tensor:
        at = keys_at(rotary, keys, torch.arange(offset, offset + capacity)).double()
        last = keys_at(rotary, query, torch.tensor([offset + capacity - 1])).double()
        return (at * last).sum(-1)

    def error_of_scores(offset: int) -> torch.Tensor:
        return (scores(offset) - scores(0)).abs().max()

    def error_of_moving(offset: int) -> torch.Tensor:
        at_zero = keys_at(rotary, keys, torch.arange(capacity))
        moved = rerotated(rotation, at_zero, torch.tensor([offset] * capacity))
        there = keys_at(rotary, keys, torch.arange(offset, offset + capacity))
        return (moved.double() - there.double()).abs().max()

    assert 0 < error_of_scores(far) < 1.5 * error_of_scores(near)
    assert 0 < error_of_moving(far) < 1.5 * error_of_moving(near)


def test_pages_that_are_kept_name_the_table_they_were_rotated_under() -> None:
    """Those of a shorter table have been rotated back where those of a longer one have not."""
    mover = PageMover(PagedLayers().attention_layers, 32)
    before = layout_of(mover, 1)
    rotation = mover.layers[0].rotation
    assert rotation is not None

    rotation.limit(rotation.table_rows - 1)

    assert layout_of(mover, 1) != before
