"""Layers with a sliding window of their own, next to the window of the policy.

That whole streams of such models equal the oracle is tested with the other families
(``tests/test_models.py``); here is what only they can show.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, RSWASpec, SlidingWindowSpec

from benchmarks.gpu_page_moves import Backend
from sink_vllm.config import SinkConfig, SinkOptions
from sink_vllm.scheduler.spec import StreamingLLMSpec, under_policy
from sink_vllm.worker.layers import AttentionLayer, check_windows
from tests.engine import Generated, Policy, check_all_free, running_engine
from tests.families import FAMILIES, Family, write_family
from tests.judge import TOLERANCE, judge, random_tokens
from tests.oracle_hf import HFOracle

PROMPTS = [random_tokens(length, length) for length in (5, 150)]


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
@pytest.mark.parametrize("window", [48, 110], ids=["within", "into the sinks"])
def test_a_resent_conversation_costs_its_new_tokens(window: int, tmp_path: Path) -> None:
    """Resumed from cached pages, windowed layers included, it is still its stream."""
    policy = Policy(4, 92, 32)
    folder = write_family(tmp_path, family("Gemma 3", sliding_window=window))
    oracle = HFOracle(folder)
    conversation = random_tokens(150, 1)

    with running_engine(folder, policy, enable_prefix_caching=True) as engine:
        for turn in range(3):
            (answer,) = engine.greedy([conversation], 90)
            judge(oracle, policy, [conversation], [answer])
            if turn:
                assert answer.cached_tokens > policy.capacity
                assert len(conversation) - answer.cached_tokens <= 26 + 2 * policy.g
            conversation = conversation + answer.tokens + random_tokens(25, turn)
        check_all_free(engine)


@pytest.mark.parametrize(
    ("backend", "windows", "refused"),
    [
        ("FLASHINFER", [24, None], True),
        ("FLASHINFER", [24, 24], False),
        ("FLASH_ATTN", [24, None], False),
    ],
)
def test_flashinfer_serves_one_window(
    backend: str, windows: list[int | None], refused: bool
) -> None:
    layers = [
        AttentionLayer(
            f"model.layers.{i}.self_attn.attn",
            cast(Any, SimpleNamespace(attn_backend=Backend(backend), sliding_window=window)),
            None,
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
    SinkOptions(sink_window=28, sink_stride=32), block_size=32, trained_len=1024, max_model_len=None
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
        )
    ]
    ours = [spec for spec in specs if isinstance(spec, StreamingLLMSpec)]
    assert ours == specs

    merged = StreamingLLMSpec.merge(ours)

    assert (merged.block_size, merged.rope_rows, merged.window) == (32, 256, 28)


def test_layers_that_manage_their_pages_otherwise_are_left_alone() -> None:
    spec = RSWASpec(block_size=32, rswa_window=64, **SHAPE)

    assert under_policy(spec, CONFIG, 512, block_size=32) is spec
