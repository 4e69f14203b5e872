"""Page moves against a per-slot reference, on pages written by vLLM's own cache-write op."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheLayout

from benchmarks.paged_layers import PagedLayers
from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.moves.mover import KeyPagesFactory, PageMover
from sink_vllm.worker.moves.plan import MovePlan, split_turns
from sink_vllm.worker.pages.layouts import key_pages_for
from sink_vllm.worker.pages.strided import StridedKeyPages
from sink_vllm.worker.scratch import Scratch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Rotated keys are rounded once; products were rounded to float32 before, in another order.
ULPS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}

Pages = tuple[torch.Tensor, torch.Tensor]
"""Keys and values ``[layers, blocks, block_size, heads, head_size]``."""


def fill(paged: PagedLayers, seed: int = 0) -> Pages:
    """Random keys and values in all slots, written by the backend's op; what was written."""
    shape = (paged.layers, paged.blocks, paged.block_size, paged.kv_heads, paged.head_size)
    noise = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(shape, generator=noise).to(paged.dtype) for _ in range(2))
    slots = torch.arange(paged.blocks * paged.block_size)
    paged.write(keys.flatten(1, 2), values.flatten(1, 2), slots)
    return keys, values


def fill_strided(paged: PagedLayers, seed: int = 0) -> Pages:
    """The same for plain pages, sliced as vLLM's GPU backends do (``flash_attn.py``)."""
    keys, values = fill(PagedLayers(**_shape_of(paged)), seed)
    for layer, module in enumerate(paged.modules):
        cache = module.kv_cache.transpose(1, 2)  # [kernel blocks, tokens, heads, content]
        cache[..., : paged.head_size] = keys[layer].view(cache[..., : paged.head_size].shape)
        cache[..., paged.head_size :] = values[layer].view(cache[..., : paged.head_size].shape)
    return keys, values


def _shape_of(paged: PagedLayers) -> dict[str, Any]:
    names = ("layers", "kv_heads", "head_size", "block_size", "blocks", "dtype")
    return {name: getattr(paged, name) for name in names}


def contents(mover: PageMover, paged: PagedLayers) -> Pages:
    pages = [mover.read_page(page) for page in range(paged.blocks)]
    keys, values = (
        torch.stack([torch.stack([page[name][i] for page in pages]) for name in paged.names])
        for i in range(2)
    )
    return keys, values


def expected_after(paged: PagedLayers, pages: Pages, moves: Sequence[PageMove]) -> Pages:
    """One slot after the other, always reading from the state before the step."""
    keys, values = (part.clone() for part in pages)
    half = paged.head_size // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    for move in moves:
        for slot in range(move.begin, move.end):
            key = pages[0][:, move.src, slot]
            if move.delta and paged.rope is not None:
                first, second = key.double()[..., :half], key.double()[..., half:]
                cos, sin = (move.delta * frequencies).cos(), (move.delta * frequencies).sin()
                parts = (first * cos - second * sin, second * cos + first * sin)
                key = torch.cat(parts, dim=-1).to(paged.dtype)
            keys[:, move.dst, slot] = key
            values[:, move.dst, slot] = pages[1][:, move.src, slot]
    return keys, values


def check(
    paged: PagedLayers,
    moves: Sequence[PageMove],
    fill_pages: Callable[[PagedLayers], Pages] = fill,
    mover: PageMover | None = None,
) -> None:
    mover = mover or PageMover(paged.attention_layers, paged.block_size)
    before = fill_pages(paged)
    keys, values = expected_after(paged, before, moves)

    mover.run(moves)

    found_keys, found_values = contents(mover, paged)
    assert torch.equal(found_values, values)
    # Exactly equal where nothing rotates, copied slots included.
    ulp = torch.finfo(paged.dtype).eps * ULPS[paged.dtype]
    length = keys.float().norm(dim=-1, keepdim=True)
    assert bool(((found_keys - keys.float()).abs() <= ulp * length).all())
    still = torch.ones(paged.blocks, paged.block_size, dtype=torch.bool)
    for move in moves:
        if move.delta:
            still[move.dst, move.begin : move.end] = False
    assert torch.equal(found_keys[:, still], keys.float()[:, still])


def eviction(sinks: int, window: int, head: int, border: int, block: int) -> list[PageMove]:
    return [PageMove(window, head, border, block, 0), PageMove(sinks, head, 0, border, 96)]


def random_moves(rng: random.Random, blocks: int, block: int) -> list[PageMove]:
    """Any moves the contract allows: no slot written twice, pages read and written at once."""
    moves = []
    for dst in rng.sample(range(blocks), rng.randint(1, blocks - 1)):
        cuts = sorted(rng.sample(range(block + 1), rng.choice((2, 2, 3, 4))))
        if rng.random() < 0.5:
            cuts[0], cuts[-1] = 0, block
        for begin, end in pairwise(cuts):
            src = rng.choice((dst, rng.randrange(blocks)))
            moves.append(PageMove(src, dst, begin, end, rng.choice((0, 0, 64, -300, 7))))
    rng.shuffle(moves)
    return moves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_random_moves(seed: int, dtype: str) -> None:
    """Hazards included: the source of one move is what another writes."""
    paged = PagedLayers(layers=3, kv_heads=2, dtype=DTYPES[dtype])

    check(paged, random_moves(random.Random(seed), paged.blocks, paged.block_size))


@pytest.mark.parametrize("seed", range(4))
def test_random_moves_in_many_batches(seed: int) -> None:
    """As little scratch memory as there can be: one page of one layer, or two."""
    paged = PagedLayers(layers=3, blocks=12)
    scratch = Scratch(torch.device("cpu"), 4 * 2 * 32 * 64 * (1 + seed % 2))
    mover = PageMover(paged.attention_layers, paged.block_size, scratch=scratch)

    for more in range(3):
        moves = random_moves(random.Random(10 * seed + more), paged.blocks, paged.block_size)
        check(paged, moves, mover=mover)


def heavy_step(streams: int, block: int) -> list[PageMove]:
    """Re-anchorings and evictions of streams in one step: windows turned, heads made from them."""
    moves = []
    for i in range(streams):
        sinks, head, *window = range(4 * i + 1, 4 * i + 5)
        moves += [PageMove(page, page, 0, block, -640) for page in window]
        moves += eviction(sinks, window[0], head, 1 + i % 5, block)
    return moves


@pytest.mark.parametrize("factory", [key_pages_for, StridedKeyPages])
def test_scratch_memory_is_what_was_reserved(factory: KeyPagesFactory) -> None:
    """However much is moved; the buffers stay where they were before the first move."""
    paged = PagedLayers(layers=6, kv_heads=4, head_size=64, blocks=250, dtype=torch.bfloat16)
    scratch = Scratch(torch.device("cpu"))
    scratch.reserve([paged.spec] * paged.layers)
    reserved = scratch.addresses()
    mover = PageMover(paged.attention_layers, paged.block_size, factory, scratch)
    filled = fill if factory is key_pages_for else fill_strided

    check(paged, heavy_step(60, paged.block_size), filled, mover)

    assert scratch.addresses() == reserved
    assert sorted(size for _, size in reserved.values()) == [1 << 20, *[2 << 20] * 3]
    page = paged.spec.page_size_bytes
    assert 60 * 4 * 6 * page > 6 * sum(size for _, size in reserved.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_moves_of_plain_pages_allocate_nothing_large(dtype: torch.dtype) -> None:
    """The layout of GPUs, where memory that is not counted runs out: not the first time, ever."""
    paged = PagedLayers(
        layers=6, kv_heads=4, head_size=64, blocks=250, dtype=dtype, layout=KVCacheLayout.LBHNC
    )
    scratch = Scratch(torch.device("cpu"))
    scratch.reserve([paged.spec] * paged.layers)
    mover = PageMover(paged.attention_layers, paged.block_size, StridedKeyPages, scratch)
    fill_strided(paged)

    with torch.profiler.profile(profile_memory=True) as profile:
        mover.run(heavy_step(60, paged.block_size))

    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < (2 << 20) / 4  # the table of rotations, and index tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128])
def test_shapes(head_size: int, block_size: int, dtype: str) -> None:
    """Head sizes of both instruction sets (80 and 112: ``vec16``), one and three heads."""
    for heads in (1, 3):
        paged = PagedLayers(
            layers=2,
            kv_heads=heads,
            head_size=head_size,
            block_size=block_size,
            blocks=6,
            dtype=DTYPES[dtype],
        )

        check(
            paged,
            [*eviction(1, 2, 3, 5, block_size), PageMove(4, 4, 0, block_size, -40)],
        )


@pytest.mark.parametrize("border", [0, 1, 4, 8, 31])
def test_evictions_of_many_streams(border: int) -> None:
    """More pages than one batch of scratch memory holds, in more layers than fit it."""
    paged = PagedLayers(layers=5, kv_heads=4, head_size=64, blocks=100, dtype=torch.bfloat16)
    moves = []
    for i in range(30):
        head, window, sinks = 3 * i + 1, 3 * i + 2, 3 * i + 3
        parts = eviction(sinks, window, head, border, paged.block_size)
        moves += [move for move in parts if move.begin < move.end]

    check(paged, moves)


def test_overlays_of_pages_that_are_not_neighbours() -> None:
    """Pages with several parts each: no order of the pages makes every group a range."""
    moves = [
        *(PageMove(1, dst, 0, 4, 32) for dst in (2, 3, 4)),
        *(PageMove(1, dst, 4, 8, 48) for dst in (3, 5)),
        PageMove(1, 4, 8, 12, 0),
    ]
    overlays = MovePlan.of(moves, 32).overlays
    assert len(overlays) > len({(one.begin, one.end) for one in overlays})

    check(PagedLayers(dtype=torch.bfloat16), moves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [32, 16], ids=["", "split"])
@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_plain_pages_in_every_layout(layout: KVCacheLayout, kernel: int, dtype: str) -> None:
    """GPU layouts on CPU tensors, also with kernel blocks of half a page."""
    if kernel != 32 and not (layout.is_layer_compact and layout.is_block_compact):
        pytest.skip("vLLM splits blocks only where a block is one dense page per layer")
    paged = PagedLayers(
        layers=3, blocks=10, dtype=DTYPES[dtype], layout=layout, kernel_block_size=kernel
    )
    mover = PageMover(paged.attention_layers, 32, StridedKeyPages)

    for seed in range(4):
        check(paged, random_moves(random.Random(seed), paged.blocks, 32), fill_strided, mover)


def test_layers_without_rotation_are_copied() -> None:
    """A delta means nothing to them: bits are copied."""
    paged = PagedLayers(rope=None, dtype=torch.bfloat16)

    check(paged, random_moves(random.Random(5), paged.blocks, paged.block_size))


def test_layers_with_and_without_rotation_in_one_buffer() -> None:
    """Every second layer does not rotate (NoPE)."""
    paged = PagedLayers(layers=4)
    layers = paged.attention_layers
    for layer in layers[1::2]:
        layer.rotation = None
    mover = PageMover(layers, paged.block_size)
    before = fill(paged)
    moves = [*eviction(1, 2, 3, 4, 32), PageMove(5, 6, 0, 32, 77)]
    rotated = expected_after(paged, before, moves)[0]
    copied = expected_after(paged, before, [move._replace(delta=0) for move in moves])[0]

    mover.run(moves)

    keys, _ = contents(mover, paged)
    torch.testing.assert_close(keys[::2], rotated[::2], atol=1e-5, rtol=0)
    assert torch.equal(keys[1::2], copied[1::2])


def test_every_bit_pattern_is_copied() -> None:
    """Copies go through floating-point words; NaN payloads and all other bits must survive."""
    paged = PagedLayers(dtype=torch.bfloat16)
    mover = PageMover(paged.attention_layers, paged.block_size)
    fill(paged)
    for module in paged.modules:
        bits = module.kv_cache.view(torch.int16)
        bits.copy_(torch.randint(-(2**15), 2**15, bits.shape, dtype=torch.int16))
    before = [module.kv_cache.view(torch.int16).clone() for module in paged.modules]

    mover.run([PageMove(1, 2, 0, 32, 0), PageMove(3, 4, 0, 32, 0)])

    for module, bits in zip(paged.modules, before, strict=True):
        bits[2], bits[4] = bits[1], bits[3]
        assert torch.equal(module.kv_cache.view(torch.int16), bits)


def test_garbage_is_copied_along_and_harms_nobody() -> None:
    """Slots behind the last token hold anything; here NaN in keys and values of a whole page."""
    paged = PagedLayers(layers=2, dtype=torch.bfloat16)
    mover = PageMover(paged.attention_layers, paged.block_size)
    keys, values = fill(paged)
    garbage = torch.full((2, 20, paged.kv_heads, paged.head_size), torch.nan).bfloat16()
    paged.write(garbage, garbage, 2 * 32 + torch.arange(12, 32))
    moves = [*eviction(1, 2, 3, 4, 32), PageMove(2, 5, 0, 32, 64), *eviction(1, 4, 6, 4, 32)]
    expected_keys, expected_values = expected_after(paged, (keys, values), moves)

    mover.run(moves)

    found_keys, found_values = contents(mover, paged)
    for page in (3, 5):
        assert found_keys[:, page, 12:].isnan().all()
        assert found_values[:, page, 12:].isnan().all()
    for page, end in ((3, 12), (5, 12), (6, 32), (1, 32), (4, 32)):
        clean = found_keys[:, page, :end], expected_keys[:, page, :end].float()
        torch.testing.assert_close(*clean, atol=0.05, rtol=0)
        assert torch.equal(found_values[:, page, :end], expected_values[:, page, :end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
def test_moved_keys_equal_keys_written_at_the_later_position(neox: bool, dtype: str) -> None:
    """The model's own rotary module and cache-write op, at ``p`` and at ``p + delta``."""
    paged = PagedLayers(layers=2, is_neox=neox, dtype=DTYPES[dtype])
    mover = PageMover(paged.attention_layers, paged.block_size)
    values = torch.randn(2, 32, paged.kv_heads, paged.head_size).to(paged.dtype)
    keys = torch.randn_like(values)
    assert paged.rotary is not None
    for page, first in ((1, 10), (2, 10 + 640)):
        positions = torch.arange(first, first + 32).repeat(2)
        _, rotated = paged.rotary.forward_native(
            positions, torch.zeros(64, 64).to(paged.dtype), keys.reshape(64, -1).clone()
        )
        assert rotated is not None
        paged.write(rotated.view_as(keys), values, page * 32 + torch.arange(32))

    mover.run([PageMove(1, 3, 0, 32, 640)])

    moved, written = mover.read_page(3), mover.read_page(2)
    for name in paged.names:
        error = (moved[name][0] - written[name][0]).norm(dim=-1) / written[name][0].norm(dim=-1)
        assert float(error.max()) <= max(4 * torch.finfo(paged.dtype).eps, 2e-4)
        assert torch.equal(moved[name][1], written[name][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("head_size", [32, 80])
def test_a_page_rotated_in_place_equals_one_rotated_on_its_way(
    head_size: int, neox: bool, dtype: str
) -> None:
    """Bit for bit, or a shared window page would differ from its owner's (``PageTurner``)."""
    paged = PagedLayers(head_size=head_size, is_neox=neox, dtype=DTYPES[dtype])
    mover = PageMover(paged.attention_layers, paged.block_size)
    fill(paged)

    mover.run([PageMove(1, 2, 0, 32, -640), PageMove(5, 6, 0, 32, 96)])
    turns, others = split_turns([PageMove(1, 1, 0, 32, -640), PageMove(5, 5, 0, 32, 96)], 32)
    assert len(turns) == 2
    assert not others
    mover.run(turns)

    for in_place, copied in ((1, 2), (5, 6)):
        there, here = mover.read_page(copied), mover.read_page(in_place)
        for name in paged.names:
            assert torch.equal(here[name][0], there[name][0])
            assert torch.equal(here[name][1], there[name][1])


def test_moves_of_other_groups_are_left_to_other_layers() -> None:
    """Groups have pages of one pool: the same number is another page, or nobody's here."""
    paged = PagedLayers()
    layers = paged.attention_layers
    layers[-1].group = 1
    mover = PageMover(layers, paged.block_size)
    keys, values = fill(paged)

    mover.run([PageMove(1, 2, 0, 32, 0, 1), PageMove(3, 4, 0, 32, 0, 2)])

    for index in range(2):
        for name, (found_keys, found_values) in mover.read_page(2, index).items():
            layer = paged.names.index(name)
            source = 1 if index == 1 else 2
            assert torch.equal(found_keys, keys[layer, source].float())
            assert torch.equal(found_values, values[layer, source])
        for name, (found_keys, _) in mover.read_page(4, index).items():
            assert torch.equal(found_keys, keys[paged.names.index(name), 4].float())


def test_caches_may_be_bound_again() -> None:
    """After sleep and wake-up, or a second initialisation, layers have other tensors."""
    paged = PagedLayers()
    mover = PageMover(paged.attention_layers, paged.block_size)
    check(paged, eviction(1, 2, 3, 4, 32), mover=mover)
    for module in paged.modules:
        module.bind_kv_cache(module.kv_cache.clone())

    check(paged, eviction(1, 2, 3, 4, 32), mover=mover)


def test_cleared_pages_are_zero_and_others_are_not() -> None:
    paged = PagedLayers()
    mover = PageMover(paged.attention_layers, paged.block_size)
    fill(paged)

    mover.clear([2, 5])

    for module in paged.modules:
        empty = (module.kv_cache == 0).flatten(1).all(dim=1)
        assert empty.tolist() == [page in (2, 5) for page in range(paged.blocks)]


def test_quantised_caches_are_refused() -> None:
    """One sentence names layer, dtype and way out."""
    paged = PagedLayers()
    for module in paged.modules:
        module.bind_kv_cache(module.kv_cache.to(torch.uint8))
    mover = PageMover(paged.attention_layers, paged.block_size)

    with pytest.raises(ValueError, match=r"layers\.0.*uint8.*--kv-cache-dtype auto"):
        mover.run([PageMove(1, 2, 0, 32, 0)])


def test_pages_with_another_content_are_refused() -> None:
    """Per-token scales or packed formats make a token longer than its key and value."""
    paged = PagedLayers()
    for module in paged.modules:
        module.bind_kv_cache(torch.zeros(8, 2, 32, 72))

    for factory in (key_pages_for, StridedKeyPages):
        mover = PageMover(paged.attention_layers, paged.block_size, factory)
        with pytest.raises(ValueError, match=r"layers\.0.*72 numbers per token"):
            mover.run([PageMove(1, 2, 0, 32, 0)])
