"""KV cache specs of layers under the policy: what workers tell the engine core about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    iter_layer_specs,
    replace_as,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from sink_vllm.policy.request_options import most_sink_tokens
from sink_vllm.policy.schedule import Schedule, cdiv, pages_per_stream

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from sink_vllm.policy.config import SinkConfig


@dataclass(frozen=True, kw_only=True)
class StreamingLLMSpec(FullAttentionSpec):
    """Full attention over the bounded sequence of a stream.

    The fields reach the block manager in the engine core; ``rope_rows`` is how the workers, which
    have the model, tell the scheduler, which has not, where the RoPE table ends.
    """

    plain: ClassVar[type[FullAttentionSpec]] = FullAttentionSpec
    """vLLM's spec of the same layers."""

    sink_tokens: int
    window: int
    stride: int
    rope_rows: int | None
    """Rope positions the model's tables hold; ``None`` when no layer rotates its keys."""
    pinnable: int = 0
    """Sink tokens a request may ask for, for which start-up must leave room: the front end, which
    checks requests against the pool, knows nothing of other tables in it. 0 where there are none.
    """

    @classmethod
    def wrap(
        cls, spec: AttentionSpec, config: SinkConfig, rope_rows: int | None, block_size: int
    ) -> StreamingLLMSpec:
        """``spec`` under the policy ``config``, in pages of ``block_size`` tokens.

        The spec of a layer with a sliding window of its own says nothing of it afterwards: its
        pages are those of the stream, and its attention kernel takes the window from the layer.
        So does that of a layer that sees chunks.
        """
        plain = replace_as(
            spec,
            cls.plain,
            drop=("sliding_window", "extra_retained_tokens", "attention_chunk_size"),
            block_size=block_size,
        )
        return cls(
            **_fields_of(plain),
            sink_tokens=config.schedule.sink_tokens,
            window=config.schedule.window,
            stride=config.schedule.stride,
            rope_rows=rope_rows,
            pinnable=most_sink_tokens(config) if config.native_window or config.recurrent else 0,
        )

    @property
    def schedule(self) -> Schedule:
        return Schedule(sink_tokens=self.sink_tokens, window=self.window, stride=self.stride)

    @property
    def pages_per_stream(self) -> int:
        return pages_per_stream(self.schedule, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest request: a whole stream, pinned sink pages included.

        vLLM refuses to start when the pool cannot hold this, and derives the number of streams
        that fit from it.
        """
        sinks = max(self.sink_tokens, self.pinnable)
        pages = cdiv(self.schedule.capacity, self.block_size) + cdiv(sinks, self.block_size)
        return pages * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[StreamingLLMSpec]) -> StreamingLLMSpec:
        """One spec for the layers of a group; they share the policy, and rows of the shortest."""
        base = cls.plain.merge(list(specs))
        rows = [spec.rope_rows for spec in specs if spec.rope_rows is not None]
        first = specs[0]
        return cls(
            **_fields_of(base),
            sink_tokens=first.sink_tokens,
            window=first.window,
            stride=first.stride,
            rope_rows=min(rows) if rows else None,
            pinnable=first.pinnable,
        )


@dataclass(frozen=True, kw_only=True)
class StreamingLLMLatentSpec(StreamingLLMSpec, MLAAttentionSpec):  # type: ignore[misc]
    """The same for multi-head latent attention."""

    plain: ClassVar[type[FullAttentionSpec]] = MLAAttentionSpec


@dataclass(frozen=True, kw_only=True)
class StreamingLLMWindowSpec(SlidingWindowSpec):
    """Sliding-window attention with page tables of its own; the window never reaches the sinks."""


@dataclass(frozen=True, kw_only=True)
class StreamingLLMStateSpec(MambaSpec):
    """A recurrent layer: a page is one state, and its hash that of a page of attention."""


_WRAPPERS: dict[type[KVCacheSpec], type[StreamingLLMSpec]] = {
    FullAttentionSpec: StreamingLLMSpec,
    SlidingWindowSpec: StreamingLLMSpec,
    ChunkedLocalAttentionSpec: StreamingLLMSpec,
    MLAAttentionSpec: StreamingLLMLatentSpec,
}
"""By exact type: a subclass may manage its pages in any way."""


def under_policy(
    spec: KVCacheSpec, config: SinkConfig, rope_rows: int | None, block_size: int
) -> KVCacheSpec:
    """``spec`` of a layer under the policy; as it is if the policy does not know such layers.

    Raises:
        ValueError: the cache is longer than the chunks that the layer sees, or they do not end
            with a page; or a recurrent layer keeps several states of a stream.
    """
    if type(spec) is MambaSpec:
        _check_state(spec)
        return replace_as(spec, StreamingLLMStateSpec, block_size=block_size)
    wrapper = _WRAPPERS.get(type(spec))
    if wrapper is None:
        return spec
    assert isinstance(spec, AttentionSpec)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        _check_chunk(spec.attention_chunk_size, config.capacity, block_size)
    if type(spec) is SlidingWindowSpec and spec.sliding_window <= config.native_window:
        return replace_as(spec, StreamingLLMWindowSpec, block_size=block_size)
    return wrapper.wrap(spec, config, rope_rows, block_size)


def with_equal_pages(
    specs: Mapping[str, KVCacheSpec], layout: str | None = None
) -> dict[str, KVCacheSpec]:
    """Specs whose pages stand for the same tokens in all tables, also if layers differ in shape.

    Layers that share the one table of a stream may have pages of several sizes. Tables of several
    groups take their pages from one pool, and there vLLM makes pages equal by giving smaller layers
    more tokens per page. So the smaller pages are padded before vLLM sees them, which costs their
    layers memory; but for layouts of memory in which vLLM packs pages of several sizes side by
    side, as many layers to a page of the pool as it holds.

    Args:
        specs: by layer, under the policy.
        layout: vLLM's name of the one that was asked for, if any.

    Raises:
        ValueError: pages of latent attention would have to be padded; names the layer.
    """
    one_table = all(isinstance(one, StreamingLLMSpec) for one in specs.values())
    if one_table or packs_pages(layout):
        return dict(specs)
    largest = max((one.page_size_bytes for one in specs.values()), default=0)
    padded = dict(specs)
    for name, spec in specs.items():
        if spec.page_size_bytes == largest or not isinstance(spec, AttentionSpec):
            continue
        if isinstance(spec, MLAAttentionSpec):
            raise ValueError(
                f"{name} has pages of {spec.page_size_bytes} bytes and other layers have pages of "
                f"{largest}, to which those of latent attention cannot be padded; serve this model "
                f"with --kv-policy full."
            )
        padded[name] = replace(spec, page_size_padded=largest)
    return padded


def packs_pages(layout: str | None) -> bool:
    """Whether vLLM packs pages of several sizes into the blocks of a layout of memory."""
    known = KVCacheLayout.__members__.get((layout or "").upper())
    return known is not None and known.is_block_outermost and known.is_block_compact


def check_groups(kv_cache_config: KVCacheConfig, block_size: int) -> None:
    """Refuse groups of attention layers whose pages do not have ``block_size`` tokens.

    Raises:
        ValueError: names a layer.
    """
    for group in kv_cache_config.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            if isinstance(spec, AttentionSpec) and spec.block_size != block_size:
                raise ValueError(
                    f"{group.layer_names[0]}: vLLM gives its pages {spec.block_size} tokens and "
                    f"others {block_size}, and an eviction drops the same pages from all tables; "
                    f"unset VLLM_KV_CACHE_LAYOUT, or serve this model with --kv-policy full."
                )


def with_shared_layers(kv_cache_config: KVCacheConfig, owners: Mapping[str, str]) -> KVCacheConfig:
    """The configuration with the specs of layers that read the cache of another layer.

    vLLM's runners put such layers into the group of their owners, and look their specs up there if
    the group has pages of several sizes; but nobody puts the specs in.

    Args:
        kv_cache_config: of a worker; it stays as it is.
        owners: by the name of a layer that reads another's cache: the layer that has it.
    """
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            specs = dict(spec.kv_cache_specs)
            specs |= {name: specs[owner] for name, owner in owners.items() if owner in specs}
            group = replace(group, kv_cache_spec=replace(spec, kv_cache_specs=specs))
        groups.append(group)
    return replace(kv_cache_config, kv_cache_groups=groups)


def _check_state(spec: MambaSpec) -> None:
    """Several states of a stream would be found by cache positions, which evictions shift."""
    if spec.mamba_cache_mode != "none" or spec.num_speculative_blocks:
        raise ValueError(
            f"mamba_cache_mode={spec.mamba_cache_mode!r} with {spec.num_speculative_blocks} states "
            f"for drafts keeps several recurrent states of a stream, and --kv-policy sink one; "
            f"drop --mamba-cache-mode and --speculative-config."
        )


def _check_chunk(chunk: int, capacity: int, block_size: int) -> None:
    """Within its first chunk such a layer sees everything; vLLM cuts the page table into chunks."""
    if capacity > chunk:
        raise ValueError(
            f"attention_chunk_size={chunk} is less than the capacity of {capacity} tokens, so what "
            f"a token sees would depend on where chunks begin; use --max-model-len {chunk}."
        )
    if chunk % block_size:
        raise ValueError(
            f"attention_chunk_size={chunk} is not a multiple of the {block_size} tokens of a KV "
            f"block, which vLLM's chunked attention asks for; use another --block-size."
        )


def _fields_of(spec: FullAttentionSpec) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
