"""Models whose positions say something about the capacity, through ``create_engine_config``.

Configurations are those of transformers, with the sizes that are published; nothing is loaded.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from sink_vllm.gate.lengths import notes_of
from sink_vllm.plugin import register
from sink_vllm.policy.config import SinkConfig


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


def write(folder: Path, architecture: str, config: PreTrainedConfig) -> Path:
    config.architectures = [architecture]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return folder


def build(model: Path, policy: dict[str, Any] | None = None, **settings: Any) -> VllmConfig:
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        additional_config={"kv_policy": "sink"} | (policy or {}),
        **settings,
    ).create_engine_config()


def capacity_of(vllm_config: VllmConfig) -> int:
    config = SinkConfig.of(vllm_config)
    assert config is not None
    assert vllm_config.model_config.max_model_len == config.capacity + 1
    return config.capacity


def note_of(vllm_config: VllmConfig) -> str:
    (note,) = notes_of(vllm_config.model_config, capacity_of(vllm_config))
    return note


@pytest.fixture(scope="module")
def phi_4_mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Phi3Config(
        hidden_size=3072,
        num_attention_heads=24,
        num_key_value_heads=8,
        num_hidden_layers=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 48,
            "long_factor": [1.0 + i for i in range(48)],
        },
    )
    return write(tmp_path_factory.mktemp("phi"), "Phi3ForCausalLM", config)


@pytest.mark.parametrize(
    ("settings", "capacity", "factors"),
    [
        ({}, 4096, "short factors, as in stock vLLM up to the original length of 4096 tokens"),
        ({"max_model_len": 4096}, 4096, "short factors"),
        ({"max_model_len": 1024}, 1024, "short factors"),
        ({"max_model_len": 4097}, 4097, "long factors.*--max-model-len 4096 takes the short ones"),
        ({"max_model_len": 131072}, 131072, "long factors"),
        ({"policy": {"sink_window": 7932, "sink_stride": 256}}, 8192, "long factors"),
    ],
    ids=lambda value: str(value) if isinstance(value, (int, dict)) else "",
)
def test_longrope_factors_are_those_of_the_capacity(
    phi_4_mini: Path, settings: dict[str, Any], capacity: int, factors: str
) -> None:
    """The original length is what stock vLLM starts with; more has to be asked for."""
    vllm_config = build(phi_4_mini, **settings)

    assert capacity_of(vllm_config) == capacity
    assert re.search(factors, note_of(vllm_config))


def test_longrope_ends_where_the_model_does(phi_4_mini: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^--max-model-len=131073 is above 131072, the length .*; use 131072 or"
    ):
        build(phi_4_mini, max_model_len=131073)


def test_dynamic_rope_ends_with_its_table(tmp_path: Path) -> None:
    """vLLM takes twice the rows that it makes for the length of the model."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(max_position_embeddings=2048, rope_parameters=rope)
    model = write(tmp_path, "LlamaForCausalLM", config)

    assert capacity_of(build(model)) == 2048
    with pytest.raises(ValueError, match=r"=2049 is above 2048, .*dynamic RoPE.*use 2048 or less"):
        build(model, max_model_len=2049)
