"""R(delta) of every rotary module vLLM has, against the module's own forward."""

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from vllm.platforms import current_platform

from benchmarks.paged_layers import PagedLayers
from sink_vllm.worker.layers.rotation import Rotation

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "base 500000": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, magnitude of its own": YARN | {"attention_factor": 1.7},
    "yarn, not truncated": YARN | {"truncate": False},
    "DeepSeek's yarn": YARN | {"rope_type": "deepseek_yarn", "mscale": 0.7, "mscale_all_dim": 1.0},
    "ntk": {"rope_type": "ntk", "factor": 2.0},
    "ntk, mixed": {"rope_type": "ntk", "factor": 2.0, "mixed_b": 0.6},
    "dynamic ntk": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic ntk, alpha": {"rope_type": "dynamic", "alpha": 4.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "M-RoPE": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    "M-RoPE, interleaved": {
        "rope_type": "default",
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
    "M-RoPE, yarn": YARN | {"mrope_section": [12, 10, 10], "mrope_interleaved": True},
    "half rotary": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "quarter rotary": {"rope_type": "default", "partial_rotary_factor": 0.25},
}


def rotary_of(
    rope: dict[str, Any], *, head_size: int = 64, neox: bool = True, dtype: torch.dtype
) -> RotaryEmbedding:
    current_platform.import_kernels()
    with set_current_vllm_config(PagedLayers().config):
        return get_rope(head_size, 1024, neox, rope_parameters=rope, dtype=dtype)


def keys_at(rotary: RotaryEmbedding, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The module's own rotation of ``[n, heads, head_size]``, its sections at one position."""
    if getattr(rotary, "mrope_section", None):
        positions = positions.expand(3, -1)  # what vLLM's models give to text
    _, rotated = rotary.forward_native(positions, torch.zeros_like(keys), keys.clone())
    assert rotated is not None
    return rotated


def rerotated(rotation: Rotation, keys: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    result = keys.float().clone()
    rotation.rotate(result, rotation.rows_of(deltas.tolist(), keys.device))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rotated_key_equals_the_key_of_the_later_position(
    variant: str, neox: bool, dtype: torch.dtype
) -> None:
    """``R(delta) K(p) == K(p + delta)`` for near and far deltas of both signs."""
    if variant == "proportional" and not neox:
        pytest.skip("the module exists for halves only")
    rotary = rotary_of(VARIANTS[variant], neox=neox, dtype=dtype)
    rotation = Rotation(rotary, "layer")
    keys = torch.randn(64, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.randint(0, 1024, (64,), generator=torch.Generator().manual_seed(1))
    after = torch.randint(0, 1024, (64,), generator=torch.Generator().manual_seed(2))

    found = rerotated(rotation, keys_at(rotary, keys, before), after - before)

    expected = keys_at(rotary, keys, after).float()
    # float32: angles up to 1024 are rounded by 3e-5. bfloat16: four roundings of 2^-9.
    tolerance = 2e-4 if dtype is torch.float32 else 2.0**-7
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) <= tolerance


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("M-RoPE")])
def test_sections_at_one_position_are_one_position(variant: str) -> None:
    """vLLM's V1 runner gives the model three rows of positions, ours on V2 gives it one."""
    rotary = rotary_of(VARIANTS[variant], dtype=torch.float32)
    keys, positions = torch.randn(9, 2, 64), torch.arange(0, 900, 100)

    _, rotated = rotary.forward_native(positions, torch.zeros_like(keys), keys.clone())

    assert rotated is not None
    assert torch.equal(rotated, keys_at(rotary, keys, positions))


@pytest.mark.parametrize("head_size", [32, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
def test_head_sizes(head_size: int, neox: bool) -> None:
    """No head size is special to the kernel that rotates."""
    rotary = rotary_of({"rope_type": "default"}, head_size=head_size, neox=neox, dtype=torch.float)
    rotation = Rotation(rotary, "layer")
    keys = torch.randn(7, 5, head_size)

    found = rerotated(rotation, keys_at(rotary, keys, torch.full((7,), 9)), torch.full((7,), 30))

    expected = keys_at(rotary, keys, torch.full((7,), 39))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_partial_rotary_passes_the_rest_through() -> None:
    """Dimensions behind ``rotary_dim`` keep their bits."""
    rotary = rotary_of(VARIANTS["quarter rotary"], dtype=torch.float32)
    keys = torch.randn(4, 2, 64)

    found = rerotated(Rotation(rotary, "layer"), keys, torch.tensor([1, 5, -7, 900]))

    assert torch.equal(found[..., 16:], keys[..., 16:])
    assert not torch.equal(found[..., :16], keys[..., :16])


def test_rotation_there_and_back_keeps_lengths_and_keys() -> None:
    """Pure rotations: yarn's magnitude is not applied again."""
    rotation = Rotation(rotary_of(VARIANTS["yarn"], dtype=torch.float32), "layer")
    keys = torch.randn(6, 2, 64)
    deltas = torch.tensor([1, -3, 64, 500, -1000, 4000])

    there = rerotated(rotation, keys, deltas)
    back = rerotated(rotation, there, -deltas)

    torch.testing.assert_close(there.norm(dim=-1), keys.norm(dim=-1))
    torch.testing.assert_close(back, keys, atol=2e-6, rtol=1e-5)


def test_garbage_in_one_key_stays_there() -> None:
    """Pages hold anything behind their last token, NaN included."""
    rotation = Rotation(rotary_of(VARIANTS["default"], dtype=torch.float32), "layer")
    keys = torch.randn(3, 2, 64)
    clean = rerotated(rotation, keys, torch.tensor([5, 6, 7]))
    keys[1, 0] = torch.nan

    found = rerotated(rotation, keys, torch.tensor([5, 6, 7]))

    assert found[1, 0].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert torch.equal(found[1, 1], clean[1, 1])


def test_the_table_of_deltas_survives_being_full() -> None:
    """More deltas than the table has rows: asked for at once, and over time."""
    rotation = Rotation(rotary_of(VARIANTS["default"], dtype=torch.float32), "layer")
    keys = torch.randn(1500, 1, 64)

    for start in (0, 700, -5000, 0):
        deltas = torch.arange(start, start + 1500)
        found = rerotated(rotation, keys, deltas)
        single = rerotated(rotation, keys[-1:], deltas[-1:])
        assert torch.equal(found[-1:], single)


REFUSED: dict[str, dict[str, Any]] = {
    "MRotaryEmbeddingInterleaved": {
        "rope_type": "openpangu",
        "mrope_section": [8, 12, 12],
        "mrope_interleaved": True,
    },
    "BailingMRotaryEmbedding": {"rope_type": "bailing_mrope", "mrope_section": [8, 12, 12]},
    "FourierRotaryEmbedding": {
        "rope_type": "default",
        "use_fope": True,
        "num_key_value_heads": 2,
        "num_inv_freq": 16,
        "fope_sep_head": True,
        "fope_init_factor": 0.1,
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rotations_that_are_not_known_to_compose_are_refused(kind: str) -> None:
    """The sentence names the layer, the class and the way out."""
    rotary = rotary_of(REFUSED[kind], dtype=torch.float32)

    with pytest.raises(ValueError, match=rf"^layers\.3\.attn: .*{kind}.*--kv-policy full"):
        Rotation(rotary, "layers.3.attn")


@pytest.mark.parametrize("rows", [48, 256, 2048])
def test_a_longer_table_follows_the_frequencies(rows: int) -> None:
    """Also where the model has fewer rows than a stream may cache, as with dynamic NTK."""
    with set_current_vllm_config(VllmConfig()):
        short = RotaryEmbedding(64, 64, 96, 10000.0, True, torch.float32)
        expected = RotaryEmbedding(64, 64, max(rows, 96), 10000.0, True, torch.float32)
    rotation = Rotation(short, "layer")
    before = short.cos_sin_cache.clone()

    rotation.extend(rows, exact_from=rows // 4)

    assert rotation.table_rows == max(rows, 96) == len(short.cos_sin_cache)
    kept = min(rows // 4, 96)
    assert torch.equal(short.cos_sin_cache[:kept], before[:kept])
    torch.testing.assert_close(short.cos_sin_cache, expected.cos_sin_cache, atol=2e-4, rtol=0)


def test_a_subclass_is_refused() -> None:
    """A class derived from a known one may compute anything."""

    class OtherRotary(RotaryEmbedding):
        pass

    with set_current_vllm_config(VllmConfig()):
        rotary = OtherRotary(64, 64, 128, 10000.0, True, torch.float32)

    with pytest.raises(ValueError, match="OtherRotary"):
        Rotation(rotary, "layer")


def test_a_table_with_other_frequencies_is_refused() -> None:
    """Models may fill ``cos_sin_cache`` themselves; the frequencies must be those of the table."""
    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(64, 64, 128, 10000.0, True, torch.bfloat16)
        other = RotaryEmbedding(64, 64, 128, 12000.0, True, torch.bfloat16)
    rotary.cos_sin_cache = other.cos_sin_cache

    with pytest.raises(ValueError, match="not what its frequencies say"):
        Rotation(rotary, "layer")


@pytest.mark.parametrize("variant", ["default", "llama3", "yarn, magnitude of its own"])
def test_a_longer_table_is_exact_from_the_capacity_on(variant: str) -> None:
    """Rows before stay the model's own, rows after are right to the last float32 digit, keys moved
    from one to the other fit, and the next model in the process gets a table of its own."""
    rotary = rotary_of(VARIANTS[variant], dtype=torch.float32)
    own = rotary.cos_sin_cache.clone()
    rotation = Rotation(rotary, "layer")

    rotation.extend(4 * 700, exact_from=700)

    assert rotation.table_rows == len(rotary.cos_sin_cache) >= 4 * 700
    assert torch.equal(rotary.cos_sin_cache[:700], own[:700])
    angles = torch.outer(torch.arange(700, 2800, dtype=torch.float64), rotation.frequencies)
    exact = torch.cat((angles.cos(), angles.sin()), dim=-1) * own[0, 0].double()
    assert torch.allclose(rotary.cos_sin_cache[700:2800].double(), exact, atol=1e-7, rtol=0)
    keys = torch.randn(3, 2, 64)
    moved = rerotated(
        rotation, keys_at(rotary, keys, torch.tensor([5, 80, 600])), torch.tensor([2000] * 3)
    )
    later = keys_at(rotary, keys, torch.tensor([2005, 2080, 2600]))
    assert torch.allclose(moved, later, atol=1e-3)
    assert rotary_of(VARIANTS[variant], dtype=torch.float32) is not rotary
