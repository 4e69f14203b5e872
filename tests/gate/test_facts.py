"""Facts of configurations that say little, or something misleading, about their model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import (
    GPT2Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    LlamaConfig,
    NemotronHConfig,
    PreTrainedConfig,
)
from vllm.config import ModelConfig
from vllm.transformers_utils.configs.chatglm import ChatGLMConfig

from sink_vllm.gate.check import reason
from sink_vllm.gate.facts import Facts
from sink_vllm.gate.model_facts import _recurrent_layers, model_facts


def facts_of(folder: Path, architecture: str, config: PreTrainedConfig) -> Facts:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return Facts(**model_facts(ModelConfig(str(folder), skip_tokenizer_init=True)))


@pytest.mark.slow  # vLLM looks at each model class in a process of its own
@pytest.mark.parametrize(
    ("architecture", "config", "positions"),
    [
        ("JambaForCausalLM", JambaConfig, "none"),
        ("NemotronHForCausalLM", NemotronHConfig, "none"),
        ("GraniteMoeHybridForCausalLM", GraniteMoeHybridConfig, "none"),
        ("ChatGLMModel", ChatGLMConfig, "rope"),
        ("GPT2LMHeadModel", GPT2Config, "other"),
    ],
)
def test_positions(tmp_path: Path, architecture: str, config: Any, positions: str) -> None:
    """No positions are not learned ones, and rotary code needs no rotary settings."""
    facts = facts_of(tmp_path, architecture, config())

    assert facts.positions == positions
    assert ("cannot work" in (reason(facts) or "")) == (positions == "other")


@pytest.mark.parametrize(
    ("settings", "chunked"),
    [
        ({"layer_types": ["conv", "full_attention"]}, None),
        ({"layer_types": ["linear_attention", "hybrid"]}, None),
        ({"layer_types": ["moe", "full_attention"]}, None),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, None),
        (
            {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64},
            None,
        ),
        ({"layer_types": ["chunked_attention", "moe"]}, "layer_types: chunked_attention"),
        ({"layer_types": ["window_attention", "moe"]}, "layer_types: window_attention"),
        ({"rswa_window": 16}, "rswa_window=16"),
    ],
    ids=str,
)
def test_layers_that_attend_in_chunks(
    tmp_path: Path, settings: dict[str, Any], chunked: str | None
) -> None:
    """Layers without attention are no other kind of attention."""
    facts = facts_of(tmp_path, "LlamaForCausalLM", LlamaConfig(num_hidden_layers=2, **settings))

    assert facts.chunked_attention == chunked


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        # MiMo V2; MiniCPM3 and Sarvam's latent attention; Pangu Pro MoE V2; HRM text.
        ({"v_head_dim": 64}, "values that are shorter than their keys on CPUs (64)"),
        ({"v_head_dim": 128, "swa_head_dim": 192, "swa_v_head_dim": 128}, "keys on CPUs (128)"),
        ({"v_head_dim": 128, "swa_num_key_value_heads": 8, "swa_head_dim": 64}, None),
        ({"kv_lora_rank": 512}, "(kv_lora_rank=512)"),
        ({"param_sink_number": 128}, "(param_sink_number=128)"),
        ({"param_sink_number": 0}, None),
        ({"prefix_lm": True}, "read in both directions"),
    ],
    ids=str,
)
def test_what_cannot_start_is_refused_before_weights_are_loaded(
    tmp_path: Path, settings: dict[str, Any], what: str | None
) -> None:
    """By what their configurations say; the settings are put onto a model that starts."""
    refused = reason(facts_of(tmp_path, "LlamaForCausalLM", LlamaConfig(head_dim=128, **settings)))

    assert refused is None if what is None else what in (refused or "")


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("FalconH1ForCausalLM", ("mamba2",)),
        ("GraniteMoeHybridForCausalLM", ("mamba2",)),
        ("NemotronHForCausalLM", ("mamba2",)),
        ("Qwen3_5ForCausalLM", ("gated_delta_net",)),
        ("Qwen3_5MoeForConditionalGeneration", ("gated_delta_net",)),
        ("Qwen3NextForCausalLM", ("gated_delta_net",)),
        ("Lfm2MoeForCausalLM", ("short_conv",)),
        ("JambaForCausalLM", ("mamba1",)),
        ("BailingMoeV2_5ForCausalLM", ("linear_attention",)),
        ("KimiK3ForConditionalGeneration", ("unknown",)),
        ("NoSuchModel", ("unknown",)),
    ],
)
def test_kinds_of_recurrent_layers(architecture: str, kinds: tuple[str, ...]) -> None:
    """As vLLM's code of the model names the shapes of their states."""
    model = SimpleNamespace(architecture=architecture, is_hybrid=True, has_inner_state=True)

    assert _recurrent_layers(model) == kinds  # type: ignore[arg-type]


def test_models_without_recurrent_layers_have_no_kinds_of_them() -> None:
    model = SimpleNamespace(architecture="Lfm2ForCausalLM", is_hybrid=False, has_inner_state=False)

    assert _recurrent_layers(model) == ()  # type: ignore[arg-type]
