"""Layers with a sliding window of their own, next to the window of the policy.

That whole streams of such models equal the oracle is tested with the other families
(``tests/models/test_models.py``); here is what only they can show.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
)

from benchmarks.gpu.pages import Backend
from sink_vllm.compat.spec import StreamingLLMSpec, StreamingLLMWindowSpec, under_policy
from sink_vllm.engine.managers.streaming import StreamingLLMManager
from sink_vllm.engine.managers.windowed import StreamingLLMWindowManager
from sink_vllm.policy.bound import Bound
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import SinkOptions
from sink_vllm.worker.layers.attention import AttentionLayer, check_windows
from tests.engine.test_preemption import check_lives, live
from tests.support.engine import (
    Generated,
    Policy,
    asynchronous_scheduling,
    check_all_free,
    running_engine,
)
from tests.support.families import FAMILIES
from tests.support.family import Family, write_family
from tests.support.judge import TOLERANCE, judge, random_tokens
from tests.support.oracle_hf import HFOracle

PROMPTS = [random_tokens(length, length) for length in (5, 150)]
SLOW = pytest.mark.slow


def family(name: str, **settings: Any) -> Family:
    known = {one.name: one for one in FAMILIES}
    return replace(known[name], settings={**known[name].settings, **settings})


def streams(folder: Path, policy: Policy | None, **engine_args: Any) -> list[Generated]:
    with running_engine(folder, policy, max_num_batched_tokens=100, **engine_args) as engine:
        return engine.greedy(PROMPTS, 400)


@pytest.mark.engine
@pytest.mark.parametrize(("window", "same"), [(29, True), (30, False)])
def test_nothing_is_lost_when_all_windows_lie_in_the_kept_one(
    window: int, same: bool, tmp_path: Path
) -> None:
    """With ``w <= W + 1`` in every layer, an endless stream is what stock vLLM computes.

    One token more, and right after an eviction a query sees a sink where the evicted token was.
    """
    long = family("Mistral 7B v0.1", sliding_window=window, max_position_embeddings=1024)
    folder = write_family(tmp_path, long)

    endless = streams(folder, Policy(4, 28, 32))
    stock = streams(folder, None, max_model_len=600)

    assert min(one.evictions for one in endless) >= 10
    assert ([one.tokens for one in endless] == [one.tokens for one in stock]) is same
    if same:
        for one, other in zip(endless, stock, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("policy", "window", "kinds", "full_tables"),
    [
        pytest.param(Policy(4, 92, 32), 48, "sssf", 1, id="four tables"),
        pytest.param(Policy(40, 56, 32), 48, "sff", 2, id="two of them with sinks", marks=SLOW),
        pytest.param(Policy(4, 92, 32), 110, "sssf", 1, id="one table, into the sinks", marks=SLOW),
    ],
)
def test_a_resent_conversation_costs_its_new_tokens(
    policy: Policy, window: int, kinds: str, full_tables: int, tmp_path: Path
) -> None:
    """Resumed from cached pages, windowed layers included, it is still its stream."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    settings = {"num_hidden_layers": len(kinds), "layer_types": [names[kind] for kind in kinds]}
    folder = write_family(tmp_path, family("Gemma 3", sliding_window=window, **settings))
    oracle = HFOracle(folder)
    conversation = random_tokens(150, 1)

    with running_engine(
        folder, policy, enable_prefix_caching=True, num_gpu_blocks_override=400
    ) as engine:
        tables = [type(one) for one in engine.managers]
        assert tables.count(StreamingLLMManager) == full_tables
        for turn in range(5):
            (answer,) = engine.greedy([conversation], 90)
            judge(oracle, policy, [conversation], [answer])
            if turn:
                assert answer.cached_tokens > policy.capacity
                assert len(conversation) - answer.cached_tokens <= 26 + 2 * policy.g
            conversation = conversation + answer.tokens + random_tokens(25, turn)
        assert answer.reanchorings >= 1
        check_all_free(engine)


@pytest.mark.engine
def test_windowed_layers_hold_their_window_only(tmp_path: Path) -> None:
    """Tables of their own: few pages per layer, and the other layers have all of the cache."""
    policy = Policy(4, 92, 32)
    folder = write_family(tmp_path, family("Gemma 3", sliding_window=48))
    held: list[tuple[int, int]] = []

    with running_engine(folder, policy) as engine:
        *windowed, full = engine.managers
        assert [type(one) for one in windowed] == [StreamingLLMWindowManager] * 3
        assert type(full) is StreamingLLMManager

        def count() -> None:
            for one in windowed:
                held.extend(
                    (sum(not block.is_null for block in table), len(full.req_to_blocks[request]))
                    for request, table in one.req_to_blocks.items()
                    if full.ledger.pinned(full.kv_cache_group_id, request)
                )

        engine.after_step.append(count)
        engine.greedy([random_tokens(20, 1)], 400)
        check_all_free(engine)

    assert max(held) == (3, 4)  # 48 tokens lie in 3 pages of 32 at most
    assert min(held)[0] == 2


@pytest.mark.engine
def test_one_table_on_demand(tmp_path: Path) -> None:
    """``--disable-hybrid-kv-cache-manager`` means here what it means in vLLM; streams are equal."""
    policy = Policy(4, 28, 32)
    folder = write_family(tmp_path, family("Gemma 3"))

    with running_engine(folder, policy, disable_hybrid_kv_cache_manager=True) as engine:
        assert type(engine.manager) is StreamingLLMManager
        generated = engine.greedy(PROMPTS, 200)
        check_all_free(engine)

    verdict = judge(HFOracle(folder), policy, PROMPTS, generated)
    assert verdict.least_evictions >= 4


@pytest.mark.engine
def test_asynchronous_streams_with_several_tables(tmp_path: Path) -> None:
    policy = Policy(4, 60, 32)
    folder = write_family(tmp_path, family("Gemma 3", sliding_window=40))
    prompts = [random_tokens(length, length) for length in (3, 95, 96, 97, 300)]

    with (
        asynchronous_scheduling(),
        running_engine(
            folder,
            policy,
            max_num_batched_tokens=100,
            enable_prefix_caching=True,
            async_scheduling=True,
            num_gpu_blocks_override=1000,
        ) as engine,
    ):
        assert engine.core.batch_queue is not None
        first = engine.greedy(prompts, 150)
        again = engine.greedy(prompts, 150)
        check_all_free(engine)

    oracle = HFOracle(folder)
    judge(oracle, policy, prompts, first)
    judge(oracle, policy, prompts, again)
    # A prefix hit of the whole capacity leaves a token to compute; a long prompt is resumed.
    assert [one.cached_tokens for one in again] == [0, 64, 64, 64, 288]


@pytest.mark.engine
def test_preempted_streams_with_several_tables(tmp_path: Path) -> None:
    policy = Policy(40, 56, 32)
    folder = write_family(tmp_path, family("Gemma 3", sliding_window=40))
    prompts = [random_tokens(length, length) for length in (20, 70, 100, 110, 120, 128)]

    with running_engine(folder, policy, num_gpu_blocks_override=42) as engine:
        lives = live(engine, prompts, reset_every=150)
        check_all_free(engine)

    check_lives(HFOracle(folder), policy, lives)


@pytest.mark.parametrize(
    ("backend", "windows", "groups", "refused"),
    [
        ("FLASHINFER", [24, None], [0, 0], True),
        ("FLASHINFER", [24, None], [0, 1], False),
        ("FLASHINFER", [24, 24], [0, 0], False),
        ("FLASH_ATTN", [24, None], [0, 0], False),
    ],
)
def test_flashinfer_serves_one_window(
    backend: str, windows: list[int | None], groups: list[int], refused: bool
) -> None:
    layers = [
        AttentionLayer(
            f"model.layers.{i}.self_attn.attn",
            cast(Any, SimpleNamespace(attn_backend=Backend(backend), sliding_window=window)),
            None,
            groups[i],
        )
        for i, window in enumerate(windows)
    ]
    if not refused:
        check_windows(layers)
        return

    with pytest.raises(
        ValueError,
        match=r"^model\.layers\.0\..*several \(24, none\); use --attention-backend FLASH_ATTN",
    ):
        check_windows(layers)


CONFIG = SinkConfig.resolve(
    SinkOptions(sink_window=28, sink_stride=32),
    block_size=32,
    bound=Bound.of(1024),
    max_model_len=None,
)
SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}


def test_layers_of_all_windows_share_one_group_of_pages() -> None:
    specs = [
        under_policy(spec, CONFIG, rows, block_size=32)
        for spec, rows in (
            (FullAttentionSpec(block_size=32, **SHAPE), 512),
            # Such layers may come with pages of another size.
            (SlidingWindowSpec(block_size=16, sliding_window=24, **SHAPE), 256),
            (SlidingWindowSpec(block_size=32, sliding_window=48, **SHAPE), None),
            (ChunkedLocalAttentionSpec(block_size=16, attention_chunk_size=64, **SHAPE), 320),
        )
    ]
    ours = [spec for spec in specs if isinstance(spec, StreamingLLMSpec)]
    assert ours == specs

    merged = StreamingLLMSpec.merge(ours)

    assert (merged.block_size, merged.rope_rows, merged.window) == (32, 256, 28)


@pytest.mark.parametrize(
    ("chunk", "sentence"),
    [
        (32, r"^attention_chunk_size=32 is less than the capacity of 64 .*--max-model-len 32\.$"),
        (80, r"^attention_chunk_size=80 is not a multiple of the 32 tokens .*--block-size\.$"),
    ],
)
def test_chunks_hold_the_cache_in_whole_pages(chunk: int, sentence: str) -> None:
    spec = ChunkedLocalAttentionSpec(block_size=32, attention_chunk_size=chunk, **SHAPE)
    config = SinkConfig.resolve(SinkOptions(sink_window=28), block_size=32, bound=Bound.of(1024))

    with pytest.raises(ValueError, match=sentence):
        under_policy(spec, config, 256, 32)


def test_windows_that_never_reach_the_sinks_have_tables_of_their_own() -> None:
    config = replace(CONFIG, native_window=29)

    near, far = (
        under_policy(
            SlidingWindowSpec(block_size=16, sliding_window=window, **SHAPE), config, 256, 32
        )
        for window in (29, 30)
    )

    assert isinstance(near, StreamingLLMWindowSpec)
    assert (near.block_size, near.sliding_window) == (32, 29)
    assert isinstance(far, StreamingLLMSpec)


def test_layers_that_manage_their_pages_otherwise_are_left_alone() -> None:
    spec = RSWASpec(block_size=32, rswa_window=64, **SHAPE)

    assert under_policy(spec, CONFIG, 512, block_size=32) is spec
