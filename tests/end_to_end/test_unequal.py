"""Layers that differ in shape: pages of several sizes, behind one table and behind several.

How each family with such layers streams is in ``tests.models.test_models``; here is what settings
of the engine change, and where the pages are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from sink_vllm.compat.spec import check_groups, under_policy, with_equal_pages
from sink_vllm.engine.sizing import Sizing
from sink_vllm.policy.bound import Bound
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import SinkOptions
from sink_vllm.worker.layers.attention import shared_layers
from tests.support.engine import Engine, check_all_free, running_engine
from tests.support.families_unequal import UNEQUAL
from tests.support.family import Family, write_family
from tests.support.judge import judge, random_tokens
from tests.support.oracle_hf import HFOracle

PROMPTS = [random_tokens(length, length) for length in (5, 150)]
TOKENS = 330
FAMILY = {one.name: one for one in UNEQUAL}
LARGE, SMALL = FAMILY["Gemma 4 31B"], FAMILY["Gemma 4 E2B, E4B"]
CONFIG = replace(
    SinkConfig.resolve(SinkOptions(sink_window=28), block_size=32, bound=Bound.of(1024)),
    native_window=24,
)


@contextmanager
def streaming(folder: Path, family: Family, **options: object) -> Iterator[Engine]:
    """Streams of 330 tokens through an engine, which equal the judge's."""
    args = {"max_num_batched_tokens": 100, **family.engine, **options}
    with running_engine(folder, family.policy, **args) as engine:
        engine.spare_cached = False
        generated = engine.greedy(PROMPTS, TOKENS)
        check_all_free(engine)
        verdict = judge(HFOracle(folder), family.policy, PROMPTS, generated)
        assert verdict.least_evictions >= 5
        assert min(len(set(one.tokens)) for one in generated) >= 100
        yield engine


def sizes(engine: Engine) -> list[tuple[int, int, set[int]]]:
    """Of each group of the worker: layers with a cache, tokens of a page, bytes of a page."""
    owners = {layer.name: layer for layer in engine.runner.attention_layers}
    found = []
    for group in engine.runner.kv_cache_config.kv_cache_groups:
        caches = [owners[name].kv_cache for name in group.layer_names if name in owners]
        pages = {cache.stride(0) * cache.itemsize for cache in caches}
        (tokens,) = {cache.shape[2] for cache in caches}
        found.append((len(caches), tokens, pages))
    return found


@pytest.mark.engine
def test_smaller_pages_are_padded_where_tables_differ(tmp_path: Path) -> None:
    """Three windowed layers with pages of 32 KiB, and one without a window that needs 16 KiB."""
    with streaming(write_family(tmp_path, LARGE), LARGE) as engine:
        assert sizes(engine) == [(1, 32, {32768})] * 4
        sizing = Sizing.of(engine.scheduler.recycler.tables, engine.scheduler.kv_cache_config)
        # Two pages and one of sinks; two of each window of 24 tokens.
        assert (sizing.page_bytes, sizing.pages) == (32768, 2 + 1 + 3 * 2)


@pytest.mark.engine
@pytest.mark.slow
def test_layouts_that_pack_pages_need_no_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of 16 KiB share a page of the pool with one of 32 KiB, as on GPUs if asked for.

    vLLM's CPU backend reads pages by their stride, so it takes this layout, too; it only does not
    say so.
    """
    layout = KVCacheLayout.BLHNC
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout.name)
    monkeypatch.setattr(CPUAttentionBackend, "supported_kv_cache_layouts", lambda: (layout,))
    settings = {
        **LARGE.settings,
        "num_hidden_layers": 8,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
    }
    deeper = replace(LARGE, settings=settings)

    with streaming(write_family(tmp_path, deeper), deeper) as engine:
        # Two layers in a group that share pages, six groups of one layer.
        assert sorted(layers for layers, _, _ in sizes(engine)) == [1] * 6 + [2]
        assert {tokens for _, tokens, _ in sizes(engine)} == {32}
        sizing = Sizing.of(engine.scheduler.recycler.tables, engine.scheduler.kv_cache_config)
        assert (sizing.page_bytes, sizing.pages) == (32768, 2 + 1 + 6 * 2)


@pytest.mark.engine
def test_layers_behind_one_table_have_pages_of_their_own_size(tmp_path: Path) -> None:
    """And layers that read the cache of another one there: they are not moved, their owners are."""
    folder = write_family(tmp_path, SMALL)

    with streaming(folder, SMALL, disable_hybrid_kv_cache_manager=True) as engine:
        ((layers, tokens, pages),) = sizes(engine)
        assert (layers, tokens, pages) == (4, 32, {8192, 16384})
        readers = shared_layers(engine.runner.vllm_config)
        owners = [layer.name for layer in engine.runner.attention_layers]
        assert len(readers) == 4
        assert set(readers.values()) <= set(owners)
        assert not set(readers) & set(owners)
        sizing = Sizing.of(engine.scheduler.recycler.tables, engine.scheduler.kv_cache_config)
        assert sizing.page_bytes == 3 * 8192 + 16384


def spec_of(heads: int, window: int | None = None) -> KVCacheSpec:
    """Under the policy, with pages of ``heads`` times 8 KiB."""
    plain = FullAttentionSpec(block_size=32, num_kv_heads=heads, head_size=32, dtype=torch.float32)
    if window is None:
        return under_policy(plain, CONFIG, 256, 32)
    sliding = SlidingWindowSpec(
        block_size=32,
        num_kv_heads=heads,
        head_size=32,
        dtype=torch.float32,
        sliding_window=window,
    )
    return under_policy(sliding, CONFIG, 256, 32)


@pytest.mark.parametrize("layout", [None, "LBHNC", "HND", "BHLNC"])
def test_pages_of_several_tables_become_equal(layout: str | None) -> None:
    """Also if one size is no multiple of the other."""
    specs = {"full": spec_of(2), "window": spec_of(3, 24)}
    assert [one.page_size_bytes for one in specs.values()] == [2 * 8192, 3 * 8192]

    equal = with_equal_pages(specs, layout)

    assert [one.page_size_bytes for one in equal.values()] == [3 * 8192] * 2
    assert {one.block_size for one in equal.values()} == {32}
    assert equal["window"] == specs["window"]


@pytest.mark.parametrize(("windows", "layout"), [(48, None), (24, "BLHNC"), (24, "blnhc")], ids=str)
def test_pages_stay_as_they_are_where_sizes_may_differ(windows: int, layout: str | None) -> None:
    """Behind one table, and in layouts that pack pages."""
    specs = {"full": spec_of(2), "window": spec_of(3, windows)}

    assert with_equal_pages(specs, layout) == specs


def test_latents_are_not_padded() -> None:
    latent = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
    specs = {"latent": under_policy(latent, CONFIG, 256, 32), "window": spec_of(3, 24)}

    with pytest.raises(ValueError, match=r"^latent has pages of 8192 .* 24576, .*policy full\.$"):
        with_equal_pages(specs)


def test_groups_whose_pages_have_other_tokens_are_refused() -> None:
    """As vLLM would make them of pages that differ, if an engine asked for another layout."""
    longer = replace(spec_of(1), block_size=64)
    groups = [KVCacheGroupSpec(["window"], spec_of(2, 24)), KVCacheGroupSpec(["full"], longer)]
    config = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)

    with pytest.raises(ValueError, match=r"^full: vLLM gives its pages 64 tokens .* full\.$"):
        check_groups(config, 32)
    check_groups(replace(config, kv_cache_groups=groups[:1]), 32)
