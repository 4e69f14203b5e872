"""The project's own MPT class: slopes, refusals, registration (streams: ``test_models``)."""

from typing import Any

import pytest
from transformers import MptConfig
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from vllm.model_executor.models.registry import ModelRegistry

from sink_vllm import models
from sink_vllm.models.mpt import MptForCausalLM, alibi_slopes, check


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7, 12, 16, 32, 40, 64, 112])
def test_slopes_are_those_of_transformers(heads: int, bias_max: int) -> None:
    """Which writes them as the bias of distances; that of distance one is the slope."""
    bias = build_mpt_alibi_tensor(heads, 2, bias_max)

    assert alibi_slopes(heads, bias_max) == pytest.approx((-bias[:, 0, 0]).tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attn_config": {"alibi": False}}, "attn_config.alibi=False"),
        ({"attn_config": {"qk_ln": True}}, "attn_config.qk_ln=True"),
        ({"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm=True"),
        ({"attn_config": {"attn_type": "multiquery_attention"}}, "multiquery"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"no_bias": False}, "no_bias=False"),
    ],
)
def test_other_kinds_of_mpt_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check(MptConfig(**settings))


def test_published_settings_are_taken() -> None:
    check(MptConfig(attn_config={"clip_qkv": 6.0, "alibi_bias_max": 16}))


@pytest.mark.parametrize("architecture", ["MPTForCausalLM", "MptForCausalLM"])
def test_vllm_finds_the_class(architecture: str) -> None:
    models.register()
    models.register()

    assert ModelRegistry.models[architecture].load_model_cls() is MptForCausalLM


def test_guard_vllm_has_no_class_of_its_own() -> None:
    """When it has one again, ``sink_vllm.models.mpt`` can go."""
    from vllm.model_executor.models import registry

    assert {"MPTForCausalLM", "MptForCausalLM"} <= registry._PREVIOUSLY_SUPPORTED_MODELS.keys()
