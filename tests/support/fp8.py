"""What the tests of 8-bit caches share: the number format, and how far rounding may go."""

import torch

FP8 = torch.finfo(torch.float8_e4m3fn)
HAS_KERNELS = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
"""Whether vLLM's CPU attention can have such a cache on this processor."""


def check_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Assert that ``found`` is ``exact``, cut to the range of the format and rounded to nearest.

    Returns:
        ``exact``, cut to the range.
    """
    expected = exact.clamp(-FP8.max, FP8.max)
    # Half a unit in the last place, which near zero is that of the subnormals.
    error, unit = (found - expected).abs(), FP8.smallest_normal * FP8.eps
    assert bool((error <= expected.abs() * FP8.eps / 2 + unit / 2 + 1e-3).all())
    return expected
