"""Multi-head latent attention: page moves copy latents and turn the rotated part of rows.

Without an engine, on vLLM's own buffers, against the memory itself and against what vLLM writes
for the same tokens at other positions. And what start-up decides for such models.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.kv_cache_interface import KVCacheLayout, MLAAttentionSpec

from benchmarks.gpu.pages import Backend
from benchmarks.kv_buffer import kv_caches
from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.layers.rotation import Rotation
from sink_vllm.worker.moves.mover import PageMover
from sink_vllm.worker.pages.strided import LatentKeyPages
from tests.support.engine import Policy
from tests.support.families import FAMILIES
from tests.support.family import write_family

LAYERS, BLOCKS, BLOCK, LATENT, ROTATED = 3, 12, 16, 64, 32
ROPE = {
    "rope_type": "deepseek_yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
MOVES = [
    # An eviction: 21 sinks from pages 1 and 2, the rest of the head pages from 3.
    PageMove(1, 8, 0, 16, 64),
    PageMove(2, 3, 0, 5, 64),
    # A page that is shared, at a re-anchoring, and one that is not.
    PageMove(4, 9, 0, 16, -64),
    PageMove(5, 5, 0, 16, -64),
    # A border page of another stream, copied.
    PageMove(6, 10, 5, 16, 0),
]


def rotary_of_vllm() -> Any:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(ROTATED, 256, is_neox_style=False, rope_parameters=dict(ROPE))


def latent_layers(layout: KVCacheLayout, rotary: Any) -> list[AttentionLayer]:
    """Layers with pages in one buffer of vLLM's."""
    spec = MLAAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=LATENT + ROTATED, dtype=torch.float32
    )
    names = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
    views = kv_caches(spec, names, BLOCKS, layout, torch.device("cpu"))
    rotation = Rotation(rotary, names[0])
    known = {"kv_lora_rank": LATENT, "qk_rope_head_dim": ROTATED, "attn_backend": Backend()}
    return [
        AttentionLayer(name, cast(Any, SimpleNamespace(kv_cache=views[name], **known)), rotation)
        for name in names
    ]


def frequencies() -> torch.Tensor:
    """Of yarn as in its paper (arXiv 2309.00071, section 3.2), from the settings above."""
    half = ROTATED // 2
    plain = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)

    def dim_of(turns: float) -> float:
        wavelength = torch.tensor(64 / (turns * 2 * torch.pi)).log()
        return float(ROTATED * wavelength / (2 * torch.tensor(10000.0).log()))

    low, high = int(max(dim_of(32) // 1, 0)), int(-(-dim_of(1) // 1))
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - ramp) + plain / 4.0 * ramp


def expected_after(moves: list[PageMove], before: torch.Tensor) -> torch.Tensor:
    """``[layers, blocks, tokens, content]``: neighbours turn together, behind the latent."""
    after = before.clone()
    for move in moves:
        slots = slice(move.begin, move.end)
        moved = before[:, move.src, slots].clone()
        angles = move.delta * frequencies()
        pairs = torch.view_as_complex(moved[..., LATENT:].double().unflatten(-1, (-1, 2)))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        moved[..., LATENT:] = torch.view_as_real(turned).flatten(-2).float()
        after[:, move.dst, slots] = moved
    return after


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_moves_in_every_layout(layout: KVCacheLayout) -> None:
    """What should change does, as defined above, and no other number of the buffer."""
    layers = latent_layers(layout, rotary_of_vllm())
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape, generator=generator))
    before = torch.stack([layer.kv_cache[:, 0] for layer in layers])

    PageMover(layers, BLOCK, LatentKeyPages).run(MOVES)

    after = torch.stack([layer.kv_cache[:, 0] for layer in layers])
    expected = expected_after(MOVES, before)
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=0)
    assert torch.equal(after[..., :LATENT], expected[..., :LATENT])
    rest = [block for block in range(BLOCKS) if block not in {move.dst for move in MOVES}]
    assert torch.equal(after[:, rest], before[:, rest])


@pytest.mark.parametrize("delta", [32, -32, 200])
def test_a_moved_page_is_what_vllm_writes_at_the_other_positions(delta: int) -> None:
    """With vLLM's rotary module and its cache write; the magnitude is not applied twice."""
    rotary = rotary_of_vllm()
    layer, *_ = layers = latent_layers(KVCacheLayout.LBHNC, rotary)
    cache = layer.kv_cache[:, 0]
    latents, keys = torch.randn(BLOCK, LATENT), torch.randn(BLOCK, 1, ROTATED)

    def write(page: int, first: int) -> None:
        positions = torch.arange(first, first + BLOCK)
        _, rotated = rotary.forward_native(positions, keys.clone(), keys.clone())
        slots = torch.arange(page * BLOCK, (page + 1) * BLOCK)
        CPUMLAImpl.do_kv_cache_update(
            cast(Any, None), latents, rotated, cache, slots, "auto", torch.ones(1)
        )

    write(1, 40)
    write(2, 40 + delta)
    PageMover(layers, BLOCK, LatentKeyPages).run([PageMove(1, 3, 0, BLOCK, delta)])

    torch.testing.assert_close(cache[3], cache[2], atol=5e-5, rtol=0)
    assert not torch.allclose(cache[3], cache[1], atol=0.1)
    assert float(rotary.cos_sin_cache[0, 0]) != pytest.approx(1.0, abs=0.01)


def test_rows_of_another_shape_are_refused() -> None:
    """Such as rows that are packed with scales."""
    layers = latent_layers(KVCacheLayout.LBHNC, rotary_of_vllm())
    for layer in layers:
        layer.module.kv_lora_rank = LATENT + 8

    with pytest.raises(ValueError, match=r"FLASH_ATTN stores 1 rows of 96 numbers .* full\."):
        PageMover(layers, BLOCK, LatentKeyPages).run(MOVES)


def build(folder: Path, **settings: Any) -> VllmConfig:
    policy = Policy(4, 8000, 32).additional_config()
    return EngineArgs(
        model=str(folder), additional_config=policy, **settings
    ).create_engine_config()


def test_start_up_on_a_cpu(tmp_path: Path) -> None:
    """vLLM begins a prompt in one step or not at all, so a step has room for the longest one."""
    known = {one.name: one for one in FAMILIES}["DeepSeek-V2"]
    longer = dict(known.settings["rope_parameters"], original_max_position_embeddings=4096)
    settings = {"rope_parameters": longer, "max_position_embeddings": 16384}
    folder = write_family(tmp_path, replace(known, settings={**known.settings, **settings}))

    config = build(folder, max_num_seqs=8)

    assert config.cache_config.block_size == 16
    assert not config.scheduler_config.enable_chunked_prefill
    assert config.model_config.max_model_len == 4 + 8000 + 32 + 1
    assert config.scheduler_config.max_num_batched_tokens >= 8037 + 8
    with pytest.raises(ValueError, match=r"^--block-size=32 is not 16, .*; use 16, or drop"):
        build(folder, block_size=32)


def test_guard_vllms_cpu_rotation_turns_the_wrong_numbers_of_queries() -> None:
    """Why models without RoPE scaling are refused on CPUs, and on CPUs only: the op takes the parts
    of several heads for dense ones. When this fails, the row of the gate can go."""
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(ROTATED, 256, is_neox_style=False, rope_parameters={"rope_theta": 1e4})
    positions = torch.arange(100, 103)
    queries, key = torch.randn(3, 4, 2 * ROTATED), torch.randn(3, 1, ROTATED)
    expected, _ = rotary.forward_native(positions, queries[..., ROTATED:].clone(), key.clone())

    found, _ = rotary.forward_cpu(positions, queries[..., ROTATED:], key)

    assert not torch.allclose(found[:, 1:], expected[:, 1:], atol=0.1)
