"""Pages of vLLM's CPU attention, whatever the instruction set.

The backend sees a page as ``[heads, 2 * tokens, head_size]``, one half for keys, one for values
(``CPUAttentionBackendImpl.do_kv_cache_update``), and packs them for its instruction set: plain
AVX kernels keep keys transposed, AMX and BFMMLA interleave keys and values in tiles. There is an
op that packs and none that unpacks, so:

- writing goes through that op, on scratch pages;
- for reading, the packing is learned once by writing numbered slots through the same op. Each
  element must show up exactly once; a packing that changes numbers, or depends on the head or
  on the page, is refused.

With an fp8 cache the op divides by a scale and cuts bits off (``float_to_fp8e4m3_scalar``), which
would shorten a key a little at every rotation. So numbers are rounded here, and what the op is
given is exact: it writes what was read, divided by a scale of one.
"""

from collections.abc import Callable
from typing import cast

import torch
from vllm import _custom_ops as ops

from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.layers.rotation import within_range
from sink_vllm.worker.pages.keys import KeyPages
from sink_vllm.worker.pages.store import PageStore
from sink_vllm.worker.scratch import Scratch, in_float32

_BASE = 16  # digits of the numbers written: exact in every dtype, float8 included


class CPUKeyPages(KeyPages):
    """Reads by a learned permutation, writes with vLLM's ``cpu_attn_reshape_and_cache``."""

    def __init__(self, layer: AttentionLayer, store: PageStore) -> None:
        module = layer.module
        heads, tokens, content = store.page_shape
        self._heads, self._tokens, self._head_size = heads, tokens, module.head_size
        self.key_size = module.head_size
        self._isa = str(getattr(module, "isa", ""))  # set by CPUAttentionMetadataBuilder
        self._dtype = layer.cache_dtype
        fp8 = self._dtype == torch.float8_e4m3fn
        self._bits = store.dtype
        self._op_dtype = cast("torch.dtype", module.dtype) if fp8 else store.dtype
        self._format = module.kv_cache_dtype if fp8 else "auto"
        self._slots = torch.arange(0).view(0, tokens)
        if (heads, content) != (module.num_kv_heads, 2 * module.head_size) or (
            module.head_size != module.head_size_v
        ):
            raise ValueError(
                f"{layer.name}: CPU attention pages of {heads} heads with {content} numbers per "
                f"token are not {module.num_kv_heads} heads of equally long keys and values; "
                f"serve this model with --kv-policy full."
            )
        keys, values = self._learn(layer)
        self._key_at = _Places.of(keys, store.page_size // heads)
        self._value_at = _Places.of(values, store.page_size // heads)
        self._key_in_half = _Places.of(keys, store.page_size // heads // 2)

    def read_keys(
        self, pages: torch.Tensor, begin: int, end: int, scratch: Scratch | None = None
    ) -> torch.Tensor:
        keys = self._key_at.read(pages, self._heads, begin, end).view(self._dtype)
        return in_float32(keys, scratch)

    def read_values(self, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return self._value_at.read(pages, self._heads, begin, end).view(self._dtype)

    def write(
        self,
        pages: torch.Tensor,
        begin: int,
        end: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        count = pages.shape[0] * pages.shape[1]
        if self._slots.shape[0] < count:
            self._slots = torch.arange(count * self._tokens).view(count, self._tokens)
        # The op reads slots and values as dense memory, and `reshape` leaves views of one token
        # per page strided.
        slots = self._slots[:count, begin:end].reshape(-1).contiguous()
        shape = (slots.shape[0], self._heads, self._head_size)
        parts = pages.view(count, self._heads, 2 * self._tokens, self._head_size)
        key_half, value_half = parts.chunk(2, dim=2)
        rounded = within_range(keys, self._dtype).to(self._dtype)
        ops.cpu_attn_reshape_and_cache(
            rounded.to(self._op_dtype).view(shape),
            values.reshape(shape).to(self._op_dtype).contiguous(),
            key_half,
            value_half,
            slots,
            self._isa,
            kv_cache_dtype=self._format,
        )

    def rotate(
        self,
        pages: torch.Tensor,
        begin: int,
        end: int,
        rotate: Callable[[torch.Tensor], None],
        scratch: Scratch,
    ) -> None:
        if not isinstance(self._key_in_half, _RegularPlaces):
            super().rotate(pages, begin, end, rotate, scratch)
            return
        halves = pages.view(*pages.shape[:2], self._heads, 2, -1)[..., 0, :]
        self._rotate_halves(halves, begin, end, rotate, scratch)

    def key_part(self, cache: torch.Tensor) -> torch.Tensor | None:
        """The half of each head that the op was given for keys, if they are regular in it."""
        if not isinstance(self._key_in_half, _RegularPlaces):
            return None  # gathering and scattering them would cost more than whole pages do
        blocks, heads = cache.shape[:2]
        halves = cache.view(blocks, heads, 2 * self._tokens, self._head_size)
        return halves[:, :, : self._tokens]

    def rotate_parts(
        self, parts: torch.Tensor, rotate: Callable[[torch.Tensor], None], scratch: Scratch
    ) -> None:
        halves = parts.view(*parts.shape[:2], self._heads, -1)
        self._rotate_halves(halves, 0, self._tokens, rotate, scratch)

    def _rotate_halves(
        self,
        halves: torch.Tensor,
        begin: int,
        end: int,
        rotate: Callable[[torch.Tensor], None],
        scratch: Scratch,
    ) -> None:
        """``halves``: the keys of each head, ``[n, layers, heads, tokens * head_size]``."""
        assert isinstance(self._key_in_half, _RegularPlaces)
        # Converted in the order they lie in: the halves hold nothing but keys.
        halves = halves.view(self._dtype)
        exact = halves if halves.dtype == torch.float32 else in_float32(halves, scratch)
        rotate(self._key_in_half.of_heads(exact, begin, end))
        if exact is not halves:
            halves.copy_(within_range(exact, self._dtype))

    def _learn(self, layer: AttentionLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Where keys and values of a head are in its part of a page.

        Returns:
            Two int64 ``[tokens, head_size]``: element ``d`` of token ``t`` is at ``[t, d]``.
        """
        tokens, size = self._tokens, self._head_size
        half = tokens * size
        numbers = torch.arange(2 * half).view(2, tokens, 1, size).expand(-1, -1, self._heads, -1)
        seen = torch.zeros(2, self._heads, 2 * half, dtype=torch.int64)
        weight = 1
        while weight < 2 * half:
            digits = (numbers // weight % _BASE).to(self._dtype)
            keys, values = digits[:, None, None].expand(-1, 2, 1, -1, -1, -1).contiguous()
            pages = torch.zeros(2, 1, self._heads * 2 * half, dtype=self._bits)
            self.write(pages, 0, tokens, keys.float(), values)
            seen += pages.view(self._dtype).view_as(seen).float().to(torch.int64) * weight
            weight *= _BASE
        places = seen[0, 0].argsort()
        if bool((seen != seen[0, 0]).any()) or not torch.equal(
            seen[0, 0][places], torch.arange(2 * half)
        ):
            raise ValueError(
                f"{layer.name}: CPU attention ({self._isa}) does not store keys and values of "
                f"{str(self._dtype).removeprefix('torch.')} as a permutation of their elements; "
                f"use --dtype float32 or --dtype bfloat16."
            )
        return places[:half].view(tokens, size), places[half:].view(tokens, size)


class _Places:
    """Elements ``[tokens, head_size]`` of one head, at learned places of its part of a page."""

    def __init__(self, places: torch.Tensor, part: int) -> None:
        self._places = places
        self._part = part

    @classmethod
    def of(cls, places: torch.Tensor, part: int) -> "_Places":
        """A view if the places are regular in token and dimension, a gather if not."""
        start, token, dim = places[0, 0], places[1, 0] - places[0, 0], places[0, 1] - places[0, 0]
        tokens, dims = (torch.arange(size) for size in places.shape)
        regular = start + tokens[:, None] * token + dims * dim
        if torch.equal(places, regular):
            return _RegularPlaces(places, part, (int(start), int(token), int(dim)))
        return cls(places, part)

    def read(self, pages: torch.Tensor, heads: int, begin: int, end: int) -> torch.Tensor:
        """``[n, layers, end - begin, heads, head_size]`` of pages ``[n, layers, page_size]``."""
        n, layers, _ = pages.shape
        places = self._places[begin:end]
        parts = pages.view(-1, self._part)
        found = parts.gather(1, places.reshape(1, -1).expand(parts.shape[0], -1))
        return found.view(n, layers, heads, *places.shape).transpose(2, 3)


class _RegularPlaces(_Places):
    def __init__(self, places: torch.Tensor, part: int, steps: tuple[int, int, int]) -> None:
        super().__init__(places, part)
        self._start, self._token, self._dim = steps

    def read(self, pages: torch.Tensor, heads: int, begin: int, end: int) -> torch.Tensor:
        return self.of_heads(pages.view(*pages.shape[:2], heads, self._part), begin, end)

    def of_heads(self, parts: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """A view like what ``read`` returns, of ``[n, layers, heads, part]`` of any strides."""
        n, layers, heads, _ = parts.shape
        of_page, of_layer, of_head, _ = parts.stride()
        return parts.as_strided(
            (n, layers, end - begin, heads, self._places.shape[1]),
            (of_page, of_layer, self._token, of_head, self._dim),
            parts.storage_offset() + self._start + begin * self._token,
        )
