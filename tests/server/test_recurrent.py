"""Start-up with recurrent layers: a page must hold a state, which decides all other numbers."""

from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from sink_vllm.gate.refused import Refused
from sink_vllm.plugin import register
from sink_vllm.policy.config import SinkConfig
from tests.support.families_hybrid import HYBRIDS
from tests.support.family import write_family

SINK = {"kv_policy": "sink"}
PAGE = 64
"""Tokens of a page that holds a state; without it 32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    family = next(one for one in HYBRIDS if one.name == "Falcon-H1")
    return str(write_family(tmp_path_factory.mktemp("falcon-h1"), family))


def build(model: str, options: dict[str, Any], **settings: Any) -> VllmConfig:
    register()
    arguments = {"dtype": "float32", "enforce_eager": True, **settings}
    return EngineArgs(model, additional_config=options, **arguments).create_engine_config()


@pytest.mark.parametrize("block_size", [None, 32])
def test_numbers_follow_the_page_that_holds_a_state(model: str, block_size: int | None) -> None:
    config = build(model, SINK, block_size=block_size)

    policy = SinkConfig.of(config)
    assert policy is not None
    assert policy.block_size == config.cache_config.block_size == PAGE
    assert policy.schedule.stride == PAGE
    assert policy.capacity == 128
    assert policy.recurrent
    assert config.cache_config.mamba_block_size == policy.capacity + 1
    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.mamba_cache_mode == "none"


def test_stride_that_does_not_fit_the_page(model: str) -> None:
    with pytest.raises(
        Refused, match=r"^--sink-stride=32 .* size 64, in which the state .*use 64\."
    ):
        build(model, SINK | {"sink_stride": 32})


def test_cache_that_is_too_short_for_the_page(model: str) -> None:
    """No smaller block helps, so none is advised; the length that is, is taken."""
    with pytest.raises(Refused, match=r"in which the state .*; use 69 or more\.$"):
        build(model, SINK, max_model_len=60)

    assert SinkConfig.of(build(model, SINK, max_model_len=69)) is not None


def test_prefix_caching_can_be_switched_off(model: str) -> None:
    config = build(model, SINK, enable_prefix_caching=False)

    assert not config.cache_config.enable_prefix_caching
    assert config.cache_config.mamba_cache_mode == "none"


def test_prompts_that_do_not_come_in_chunks(model: str) -> None:
    """Refused by the sentence for all models; vLLM would fail an assertion first."""
    with pytest.raises(Refused, match=r"\(--no-enable-chunked-prefill\)"):
        build(model, SINK, enable_chunked_prefill=False)


def test_vllms_own_way_of_keeping_states_is_refused(model: str) -> None:
    with pytest.raises(Refused, match=r"^--mamba-cache-mode='align' contradicts --kv-policy sink"):
        build(model, SINK, mamba_cache_mode="align")


def test_without_the_policy_nothing_is_decided(model: str) -> None:
    config = build(model, {})

    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.mamba_cache_mode == "align"
