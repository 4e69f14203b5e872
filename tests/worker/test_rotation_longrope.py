"""LongRoPE: the factors in use, their rotations and longer tables, against vLLM's module."""

from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import (
    _ROPE_DICT,
    Phi3LongRoPEScaledRotaryEmbedding,
    get_rope,
)

from benchmarks.paged_layers import PagedLayers
from sink_vllm.worker.layers.rotation_longrope import LongRotation

ORIGINAL, LONGEST = 256, 1024
SIZE, ROTARY = 64, 48  # partial rotation, as in Phi-4-mini
PARAMETERS = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": ROTARY / SIZE,
    "short_factor": [1.0 + i / 32 for i in range(ROTARY // 2)],
    "long_factor": [2.0 + i for i in range(ROTARY // 2)],
    "original_max_position_embeddings": ORIGINAL,
}


def rotary_of(
    max_model_len: int, dtype: torch.dtype = torch.float32
) -> Phi3LongRoPEScaledRotaryEmbedding:
    config = PagedLayers().config
    config.model_config.max_model_len = max_model_len
    with set_current_vllm_config(config):
        rotary: Any = get_rope(SIZE, LONGEST, True, rope_parameters=PARAMETERS, dtype=dtype)
    for key in [key for key, module in _ROPE_DICT.items() if module is rotary]:
        del _ROPE_DICT[key]  # it does not tell lengths of engines apart
    assert type(rotary) is Phi3LongRoPEScaledRotaryEmbedding
    return rotary


def keys_at(
    rotary: Phi3LongRoPEScaledRotaryEmbedding, keys: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The module's own rotation of ``[n, heads, head_size]``."""
    flat = keys.flatten(1)
    _, rotated = rotary(positions, torch.zeros_like(flat), flat.clone())
    assert rotated is not None
    return rotated.view(keys.shape)


def error_of_rotating(
    rotary: Phi3LongRoPEScaledRotaryEmbedding, rotation: LongRotation, rows: int
) -> float:
    generator = torch.Generator().manual_seed(0)
    table = rotary.long_short_cos_sin_cache
    assert isinstance(table, torch.Tensor)
    keys = torch.randn(64, 3, SIZE, generator=generator).to(table.dtype)
    before, after = (torch.randint(0, rows, (64,), generator=generator) for _ in range(2))
    found = keys_at(rotary, keys, before).float()
    rotation.rotate(found, rotation.rows_of((after - before).tolist(), keys.device))
    expected = keys_at(rotary, keys, after).float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("max_model_len", [ORIGINAL, ORIGINAL + 2], ids=["short", "long"])
def test_a_rotated_key_equals_the_key_of_the_later_position(
    max_model_len: int, dtype: torch.dtype
) -> None:
    """``R(delta) K(p) == K(p + delta)``, before and after the table was made longer."""
    rotary = rotary_of(max_model_len, dtype)
    rotation = LongRotation(rotary, "layer")
    tolerance = 2e-4 if dtype is torch.float32 else 2.0**-7
    own = ORIGINAL if max_model_len == ORIGINAL else LONGEST

    assert rotation.table_rows == own
    assert error_of_rotating(rotary, rotation, own) <= tolerance
    rotation.extend(4 * own, exact_from=max_model_len - 1)
    assert rotation.table_rows == 4 * own
    assert error_of_rotating(rotary, rotation, 4 * own) <= tolerance


@pytest.mark.parametrize("capacity", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1])
def test_factors_are_those_of_the_capacity(capacity: int) -> None:
    """A cache of the original length takes the short ones, though ``max_model_len`` is longer."""
    rotary = rotary_of(capacity + 1)
    stock = rotary_of(capacity)  # the same cache without the policy
    rotation = LongRotation(rotary, "layer")

    rotation.extend(4 * capacity, exact_from=capacity)

    keys = torch.randn(capacity, 2, SIZE)
    positions = torch.arange(capacity)
    assert torch.equal(keys_at(rotary, keys, positions), keys_at(stock, keys, positions))
    assert rotary.use_long_rope == stock.use_long_rope == (capacity > ORIGINAL)
    assert error_of_rotating(rotary, rotation, 4 * capacity) <= 2e-4


def test_a_table_with_other_frequencies_is_refused() -> None:
    rotary = rotary_of(ORIGINAL)
    rotary.short_factor = [2 * factor for factor in rotary.short_factor]

    with pytest.raises(ValueError, match=r"^layers\.3\.attn: the table of Phi3LongRoPE.*full\.$"):
        LongRotation(rotary, "layers.3.attn")
