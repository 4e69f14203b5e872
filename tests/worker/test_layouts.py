"""Page moves in the layouts of vLLM's GPU backends, against the memory itself.

``KVCacheLayout`` names the order of the dimensions in memory: layer, block, head, token, content.
Here the address of every number is computed from those letters, and nothing else; the moves run
on the views that vLLM makes of the same buffer. What a backend puts into ``content`` is read from
its source: the key, then the value.
"""

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheLayout

from benchmarks.gpu.pages import Shape, attention_layers, moves_of_one_eviction
from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.moves.mover import PageMover
from tests.support.fp8 import FP8, check_rounded_once

SHAPE = Shape(layers=3, kv_heads=2, head_size=32, block_size=16, dtype=torch.float32)
BLOCKS = 40
SHORT_VALUES = replace(SHAPE, value_size=SHAPE.head_size // 2)
"""As in MiMo V2."""
SINKS = (1, 4, 16, 21, 40)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ("flash_attn", "flashinfer", "triton_attn", "flex_attention")


def buffer_of(layers: list[AttentionLayer]) -> torch.Tensor:
    """All numbers of the cache, in the order of memory."""
    cache = layers[0].kv_cache
    return torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage())


def by_letters(buffer: torch.Tensor, layout: KVCacheLayout, shape: Shape = SHAPE) -> torch.Tensor:
    """The buffer as ``[layer, block, head, token, content]``, by the letters of its layout."""
    page = (shape.kv_heads, shape.block_size, shape.content)
    sizes = dict(zip("LBHNC", (shape.layers, BLOCKS, *page), strict=True))
    strides, stride = {}, 1
    for letter in reversed(layout.name):
        strides[letter] = stride
        stride *= sizes[letter]
    assert stride == buffer.numel()
    return buffer.as_strided([sizes[c] for c in "LBHNC"], [strides[c] for c in "LBHNC"])


def expected_after(moves: list[PageMove], before: torch.Tensor) -> torch.Tensor:
    """Every number moved on its own: keys turned in pairs of halves, values as they are."""
    after = before.clone()
    half = SHAPE.head_size // 2
    frequencies = 500000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    for move in moves:
        slots = slice(move.begin, move.end)
        moved = before[:, move.src, :, slots].clone()
        key = moved[..., : SHAPE.head_size].double()
        cos, sin = (move.delta * frequencies).cos(), (move.delta * frequencies).sin()
        first, second = key[..., :half], key[..., half:]
        moved[..., :half] = first * cos - second * sin
        moved[..., half : SHAPE.head_size] = second * cos + first * sin
        after[:, move.dst, :, slots] = moved
    return after


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("shape", [SHAPE, SHORT_VALUES], ids=["", "short values"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_eviction_in_every_layout(
    device: str, shape: Shape, layout: KVCacheLayout, sinks: int
) -> None:
    """One batch of evictions changes the numbers it should, and no other number of the buffer."""
    layers = attention_layers(shape, torch.device(device), BLOCKS, layout)
    buffer = buffer_of(layers)
    buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(sinks)))
    before = by_letters(buffer, layout, shape).clone().cpu()
    random.seed(sinks)
    take = iter(random.sample(range(BLOCKS), BLOCKS)).__next__
    moves = [m for _ in range(3) for m in moves_of_one_eviction(SHAPE.block_size, sinks, take)]
    moves = [move._replace(delta=move.delta % 500) for move in moves]  # float32 frequencies

    PageMover(layers, SHAPE.block_size).run(moves)

    after = by_letters(buffer, layout, shape).cpu()
    expected = expected_after(moves, before)
    changed = sorted({move.dst for move in moves})
    assert len(changed) == 3 * -(-sinks // SHAPE.block_size)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
    untouched = [block for block in range(BLOCKS) if block not in changed]
    assert torch.equal(after[:, untouched], before[:, untouched])
    assert not torch.equal(after[:, changed], before[:, changed])


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_eviction_of_fp8_keys(device: str, layout: KVCacheLayout, sinks: int) -> None:
    """Keys are decoded, rotated and rounded once, values and everything else keep their bits."""
    shape = replace(SHAPE, dtype=torch.uint8)
    layers = attention_layers(shape, torch.device(device), BLOCKS, layout)
    buffer = buffer_of(layers)
    numbers = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(sinks))
    # Some of them at the end of the range, where a rotation leads beyond it.
    stored = (numbers * 300).clamp(-FP8.max, FP8.max).to(torch.float8_e4m3fn)
    buffer.copy_(stored.view(torch.uint8))
    before = by_letters(buffer.view(torch.float8_e4m3fn).float(), layout).cpu()
    bits = by_letters(buffer, layout).clone().cpu()
    random.seed(sinks)
    take = iter(random.sample(range(BLOCKS), BLOCKS)).__next__
    moves = [m for _ in range(3) for m in moves_of_one_eviction(SHAPE.block_size, sinks, take)]
    moves = [move._replace(delta=move.delta % 500) for move in moves]

    PageMover(layers, SHAPE.block_size).run(moves)

    after_bits = by_letters(buffer, layout).cpu()
    after = by_letters(buffer.view(torch.float8_e4m3fn).float(), layout).cpu()
    exact = expected_after(moves, before)
    assert (exact.abs() > FP8.max).any()
    expected = check_rounded_once(after, exact)
    values = slice(SHAPE.head_size, None)
    assert torch.equal(after[..., values], expected[..., values].float())
    untouched = [b for b in range(BLOCKS) if b not in {move.dst for move in moves}]
    assert torch.equal(after_bits[:, untouched], bits[:, untouched])
    assert not torch.equal(after_bits, bits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guard_backends_store_the_key_before_the_value(backend: str) -> None:
    """The one thing the layouts do not say: what vLLM's backends put into ``content``."""
    source = _source_of(backend)

    assert "kv_cache.transpose(1,2).split(" in source
    assert "key_cache,value_cache=kv_cache" in source or "k_cache,v_cache=kv_cache" in source


def test_guard_backends_of_short_values_store_the_key_before_the_value() -> None:
    flash, triton = (_source_of(f"{name}_attn_diffkv") for name in ("flash", "triton"))

    assert "key_cache,value_cache=kv_cache.transpose(1,2).split(self.head_size," in flash
    assert "key_cache=kv_cache[...,:head_size_qk]" in triton
    assert "value_cache=kv_cache[...,head_size_qk:head_size_qk+head_size_v]" in triton


def _source_of(backend: str) -> str:
    """Without blanks."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "v1" / "attention" / "backends" / f"{backend}.py"
    return "".join(path.read_text().split())
