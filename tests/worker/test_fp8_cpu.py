"""Pages of vLLM's CPU attention with ``--kv-cache-dtype fp8``.

The op that writes them exists only where the processor has AVX-512 or AMX. There it is used
(``vllm``, among the slow tests); elsewhere its two packings are written down here, number by
number, as ``csrc/cpu/cpu_attn_fp8.hpp`` describes them: numbers are divided by the scale of the
layer and cut off, not rounded, to ``float8_e4m3fn``.
"""

import random
from collections.abc import Callable

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from benchmarks.paged_layers import PagedLayers
from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.moves.mover import PageMover
from tests.support.fp8 import FP8, HAS_KERNELS, check_rounded_once
from tests.worker.test_page_moves import contents, expected_after, random_moves

SCALE = 0.5
Places = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
"""Where element ``d`` of slot ``t`` is: places of ``(t, d, tokens, head_size)``."""
PACKINGS: dict[str, tuple[Places, Places]] = {
    "vec": (
        lambda t, d, tokens, size: d * tokens + t,
        lambda t, d, tokens, size: t * size + d,
    ),
    "amx": (
        # Sixteen tokens side by side, two dimensions of each.
        lambda t, d, tokens, size: 2 * ((t // 16 * (size // 2) + d // 2) * 16 + t % 16) + d % 2,
        # Sixteen dimensions side by side, two tokens of each.
        lambda t, d, tokens, size: ((d // 16 * tokens + t // 2 * 2) * 16) + d % 16 * 2 + t % 2,
    ),
}
PARAMS = [
    "vec",
    "amx",
    pytest.param(
        "vllm",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not HAS_KERNELS, reason="vLLM's fp8 kernels need AVX-512 or AMX"),
        ],
    ),
]


def cut_off(numbers: torch.Tensor) -> torch.Tensor:
    """The bits of the numbers in fp8, rounded towards zero."""
    size = numbers.abs().clamp(max=FP8.max)
    bits = size.to(torch.float8_e4m3fn).view(torch.uint8)
    bits = bits - (bits.view(torch.float8_e4m3fn).float() > size).to(torch.uint8)
    return torch.where(numbers < 0, bits | 0x80, bits)


def written_down(name: str) -> Callable[..., None]:
    """``cpu_attn_reshape_and_cache`` for fp8, as a packing defines it."""

    def write(
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        isa: str,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        kv_cache_dtype: str = "auto",
    ) -> None:
        assert kv_cache_dtype == "fp8"
        assert key_cache.dtype == value_cache.dtype == torch.uint8
        for given, cache, scale, places in zip(
            (key, value), (key_cache, value_cache), (k_scale, v_scale), PACKINGS[name], strict=True
        ):
            bits = cut_off(given.float() / scale)
            _, heads, tokens, size = cache.shape
            for token, slot in enumerate(slot_mapping.tolist()):
                at = places(torch.tensor(slot % tokens), torch.arange(size), tokens, size)
                for head in range(heads):
                    cache[slot // tokens, head].view(-1)[at] = bits[token, head]

    return write


@pytest.fixture(params=PARAMS)
def paged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PagedLayers:
    if request.param != "vllm":
        # vLLM asks the processor when a layer is built; what it would run there is written down.
        current_platform.import_kernels()
        monkeypatch.setattr(current_platform, "import_kernels", lambda: None)
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
        monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", written_down(request.param))
    paged = PagedLayers(layers=2, kv_cache_dtype="fp8")
    for module in paged.modules:
        for name in ("_k_scale_float", "_v_scale_float"):
            setattr(module, name, SCALE)
    return paged


def fill(paged: PagedLayers, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of about ``size`` that fp8 has, in all slots; as they are in memory."""
    shape = (paged.layers, paged.blocks, paged.block_size, paged.kv_heads, paged.head_size)
    noise = torch.Generator().manual_seed(0)
    keys, values = (
        (torch.randn(shape, generator=noise) * size)
        .clamp(-FP8.max, FP8.max)
        .to(torch.float8_e4m3fn)
        .float()
        for _ in range(2)
    )
    slots = torch.arange(paged.blocks * paged.block_size)
    paged.write(SCALE * keys.flatten(1, 2), SCALE * values.flatten(1, 2), slots)
    return keys, values


@pytest.mark.parametrize("size", [1.0, 300.0], ids=["", "at-the-end-of-the-range"])
@pytest.mark.parametrize("seed", range(3))
def test_random_moves(paged: PagedLayers, seed: int, size: float) -> None:
    """Keys are decoded, rotated and rounded once; values and all other keys keep their bits."""
    moves = random_moves(random.Random(seed), paged.blocks, paged.block_size)
    moves.append(PageMove(0, 0, 0, paged.block_size, 77))  # a whole page, in place
    moves = [move for move in moves if move.dst or move is moves[-1]]
    mover = PageMover(paged.attention_layers, paged.block_size)
    before = fill(paged, size)
    found_before = contents(mover, paged)
    assert torch.equal(found_before[0], before[0])
    assert torch.equal(found_before[1], before[1])
    exact, values = expected_after(paged, before, moves)

    mover.run(moves)

    keys, found_values = contents(mover, paged)
    assert torch.equal(found_values, values)
    assert bool((exact.abs() > FP8.max).any()) == (size > 100)
    expected = check_rounded_once(keys, exact)
    rotated = torch.zeros(paged.blocks, paged.block_size, dtype=torch.bool)
    for move in moves:
        rotated[move.dst, move.begin : move.end] |= move.delta != 0
    assert torch.equal(keys[:, ~rotated], exact[:, ~rotated])
    assert not torch.equal(keys[:, rotated], expected[:, rotated])


def test_rotations_do_not_shorten_keys(paged: PagedLayers) -> None:
    """Rounded by us, not cut off by the op: forty times cut off, keys lose most of their length."""
    mover = PageMover(paged.attention_layers, paged.block_size)
    keys, _ = fill(paged, 1.0)
    whole = [PageMove(0, 0, 0, paged.block_size, 13)]
    parts = [PageMove(1, 1, 0, 7, 13), PageMove(1, 1, 7, paged.block_size, 13)]

    for _ in range(40):
        mover.run(whole + parts)

    found, _ = contents(mover, paged)
    lengths = (found.norm(dim=-1) / keys.norm(dim=-1))[:, :2]
    assert lengths.mean() == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(found[:, :2], keys[:, :2])


def test_what_cutting_off_does() -> None:
    numbers = torch.tensor([0.0, 1.0, 1.1, 1.24, -1.24, 500.0, -500.0, 0.0019, 0.0021])

    found = cut_off(numbers).view(torch.float8_e4m3fn).float().tolist()

    assert found == [0.0, 1.0, 1.0, 1.125, -1.125, 448.0, -448.0, 0.0, 0.001953125]
