"""Latent attention on GPUs: which pages vLLM gives its backends, and page moves in them.

Rows of ``[512 latent | 64 rotated]`` numbers, as in DeepSeek's models, made by vLLM's own layer,
spec and buffers on a CPU. What a backend says of its pages is read in vLLM
(``tests/support/latent_backends.py``); where Triton's kernel finds the two parts of a row is seen
under its interpreter (``tests/support/latent_decode.py``).
"""

import pytest
import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.moves.mover import PageMover
from sink_vllm.worker.pages.layouts import LATENT_BACKENDS
from tests.support.fp8 import check_rounded_once
from tests.support.latent_backends import LatentBackend, names_on_cuda, read
from tests.support.latent_layers import BLOCKS, LATENT, ROTATED, latent_layers, turned
from tests.support.runner_job import INTERPRETED_V2, json_of

ON_GPUS = [read(name) for name in names_on_cuda() if "SPARSE" not in name]
PAGES = [
    pytest.param(one.name, dtype, size, id=f"{one.name}, {dtype}, {size} tokens")
    for one in ON_GPUS
    for dtype in ("bfloat16", "fp8")
    if dtype in one.dtypes
    for size in one.sizes
]
LAYOUTS = [pytest.param(one, id=one.name) for one in KVCacheLayout]


def moves(size: int) -> list[PageMove]:
    """An eviction of 5 sinks, and a re-anchoring in place."""
    return [
        PageMove(1, 4, 0, 5, 96),
        PageMove(2, 4, 5, size, 0),
        PageMove(3, 3, 0, size, -64),
    ]


def expected_after(before: torch.Tensor, size: int) -> torch.Tensor:
    """``[layers, blocks, tokens, row]``: neighbours turn together, behind the latent."""
    after = before.clone()
    for move in moves(size):
        slots = slice(move.begin, move.end)
        moved = before[:, move.src, slots].clone()
        moved[..., LATENT:] = turned(moved[..., LATENT:], move.delta).float()
        after[:, move.dst, slots] = moved
    return after


def test_backends_are_all_that_vllm_chooses_from() -> None:
    """A new one has to be read, and then added; sparse ones have caches of other things, too."""
    assert {one.name for one in ON_GPUS} | {"CPU_MLA"} == set(LATENT_BACKENDS)


@pytest.mark.parametrize("backend", ON_GPUS, ids=lambda one: one.name)
def test_guard_backends_take_the_rows_of_vllms_layer(backend: LatentBackend) -> None:
    """None packs rows, asks for a layout or writes the cache in a way of its own."""
    assert backend.bases == ("MLACommonBackend",)
    assert not {"customize_spec", "supported_kv_cache_layouts"} & set(backend.members)
    assert "do_kv_cache_update" not in backend.implementation
    assert MLACommonBackend.supported_kv_cache_layouts() is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "dtype", "size"), PAGES)
def test_moves_in_pages_of_every_backend(
    backend: str, dtype: str, size: int, layout: KVCacheLayout
) -> None:
    """Rotated parts turn and are rounded once; latents and all other rows keep their bits."""
    layers = latent_layers(backend, dtype, size, layout)
    number = layers[0].cache_dtype
    generator = torch.Generator().manual_seed(size)
    for layer in layers:
        assert layer.kv_cache.shape == (BLOCKS, 1, size, LATENT + ROTATED)
        numbers = 100 * torch.randn(layer.kv_cache.shape, generator=generator)
        layer.kv_cache.copy_(numbers.to(number).view(layer.kv_cache.dtype))
    before = torch.stack([layer.kv_cache[:, 0].clone() for layer in layers])

    PageMover(layers, size).run(moves(size))

    after = torch.stack([layer.kv_cache[:, 0] for layer in layers])
    found, exact = (one.view(number).float() for one in (after, before))
    exact = expected_after(exact, size)
    if dtype == "fp8":
        check_rounded_once(found, exact)
    else:
        torch.testing.assert_close(found, exact, rtol=2**-8, atol=1e-3)
    assert torch.equal(found[..., :LATENT], exact[..., :LATENT])
    rest = [block for block in range(BLOCKS) if block not in (3, 4)]
    assert torch.equal(after[:, rest], before[:, rest])
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("backend", "dtype", "what"),
    [
        ("FLASHMLA", "fp8_ds_mla", "uint8 elements in FLASHMLA is not supported"),
        ("FLASHMLA_SPARSE", "bfloat16", "has not been tested with the pages of FLASHMLA_SPARSE"),
    ],
)
def test_other_rows_are_refused(backend: str, dtype: str, what: str) -> None:
    """Packed with scales, 656 bytes long, and those that sparse attention reads."""
    layers = latent_layers(backend, dtype, 64)

    with pytest.raises(ValueError, match=what):
        PageMover(layers, 64).run(moves(64))


def test_triton_reads_what_moves_write() -> None:
    """vLLM's kernel for decode steps, interpreted, over pages after an eviction: the output is that
    of attention with keys numbered by cache position."""
    errors = json_of("tests.support.latent_decode", INTERPRETED_V2)

    assert errors["moved"] < 1e-4
    assert errors["not moved"] > 0.05  # as a control
