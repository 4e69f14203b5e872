"""Models whose positions say something about the capacity, through ``create_engine_config``.

Configurations are those of transformers, with the sizes that are published; nothing is loaded.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Llama4TextConfig,
    LlamaConfig,
    Ministral3Config,
    Phi3Config,
    PreTrainedConfig,
)
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.llama4 import Llama4Attention, Llama4ForCausalLM
from vllm.model_executor.models.mistral import MistralAttention

from sink_vllm.gate.lengths import notes_of, rope_positions
from sink_vllm.plugin import register
from sink_vllm.policy.bound import DEFAULT_CAPACITY
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
    settings: dict[str, Any] = {"partial_rotary_factor": 0.75}  # as published, beside RoPE's
    config = Phi3Config(
        hidden_size=3072,
        num_attention_heads=24,
        num_key_value_heads=8,
        num_hidden_layers=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 48,
            "long_factor": [1.0 + i for i in range(48)],
        },
        **settings,
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


def test_a_long_model_gets_a_short_cache_and_the_log_says_so(tmp_path: Path) -> None:
    """Nobody gets 131,072 tokens per stream without asking for them."""
    config = LlamaConfig(max_position_embeddings=131072)
    model = write(tmp_path, "LlamaForCausalLM", config)

    by_default = build(model)
    assert capacity_of(by_default) == DEFAULT_CAPACITY
    assert re.search(
        r"capacity of up to 131072 tokens, the default is 8192; --max-model-len",
        note_of(by_default),
    )
    asked = build(model, max_model_len=16384)
    assert capacity_of(asked) == 16384
    assert notes_of(asked.model_config, 16384) == []


def test_a_short_model_gets_all_of_its_length(tmp_path: Path) -> None:
    model = write(tmp_path, "LlamaForCausalLM", LlamaConfig(max_position_embeddings=4096))
    vllm_config = build(model)

    assert capacity_of(vllm_config) == 4096
    assert notes_of(vllm_config.model_config, 4096) == []


@pytest.fixture(scope="module")
def ministral_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ministral")
    return write(folder, "Ministral3ForCausalLM", Ministral3Config())


@pytest.mark.parametrize(
    ("settings", "capacity"),
    [
        ({}, 8192),
        ({"max_model_len": 16384}, 16384),
        ({"max_model_len": 4096}, 4096),
        ({"policy": {"sink_window": 10_000}}, 4 + 10_000 + 256),
    ],
    ids=str,
)
def test_a_temperature_by_position_bounds_the_capacity(
    ministral_3: Path, settings: dict[str, Any], capacity: int
) -> None:
    """Half of the positions that are not scaled by default, all of them on request."""
    vllm_config = build(ministral_3, **settings)

    assert capacity_of(vllm_config) == capacity
    assert rope_positions(vllm_config.model_config) == 16384
    assert "stay below 16384" in note_of(vllm_config)


@pytest.mark.parametrize(
    "settings", [{"max_model_len": 16385}, {"policy": {"sink_window": 16384 - 256 - 3}}], ids=str
)
def test_longer_caches_reach_another_temperature(
    ministral_3: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(
        ValueError,
        match=r"16384.* positions before the first at which queries are scaled \("
        r"original_max_position_embeddings=16384\); use (a window of 16124|16384) or less\.$",
    ):
        build(ministral_3, **settings)


TUNED = {"override_generation_config": {"attn_temperature_tuning": True}}


@pytest.mark.parametrize(
    ("changes", "settings", "capacity", "positions"),
    [
        ({}, {}, 8192, None),
        ({}, TUNED, 4096, 8191),
        ({}, TUNED | {"max_model_len": 8191}, 8191, 8191),
        ({"floor_scale": 16384}, TUNED | {"max_model_len": 8192}, 8192, 16383),
        ({"attention_chunk_size": None}, {}, DEFAULT_CAPACITY, None),
        ({"attention_chunk_size": None}, {"max_model_len": 32767}, 32767, None),
        (
            {"attention_chunk_size": None, "floor_scale": 40000},
            {"max_model_len": 39999},
            39999,
            39999,
        ),
    ],
    ids=str,
)
def test_llama_4_is_bounded_by_chunks_and_temperature(
    tmp_path: Path,
    changes: dict[str, Any],
    settings: dict[str, Any],
    capacity: int,
    positions: int | None,
) -> None:
    """vLLM tunes what is asked for by the generation configuration, or longer than 32768."""
    model = write(tmp_path, "Llama4ForCausalLM", llama_4(**changes))

    vllm_config = build(model, **settings)

    assert capacity_of(vllm_config) == capacity
    assert rope_positions(vllm_config.model_config) == positions


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        (
            {},
            TUNED | {"max_model_len": 8192},
            r"=8192 is above 8191, the positions before .*\(floor_scale=8192\); use 8191 or less",
        ),
        (
            {},
            {"max_model_len": 8193},
            r"=8193 is above 8192, one chunk of its attention \(attention_chunk_size=8192\)",
        ),
        (
            {"attention_chunk_size": None},
            {"max_model_len": 32768},
            r"=32768 is above 32767, the length up to which vLLM tunes no temperature of Llama 4",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_longer_caches_would_see_another_chunk(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    model = write(tmp_path, "Llama4ForCausalLM", llama_4(**changes))

    with pytest.raises(ValueError, match=sentence):
        build(model, **settings)


def test_guard_vllm_tunes_llama_4_by_generation_configuration_and_length() -> None:
    made = inspect.getsource(Llama4ForCausalLM.__init__)

    assert "max_model_len > 32768" in made
    assert '"attn_temperature_tuning", default_attn_temperature_tuning' in made
    scale = inspect.getsource(Llama4Attention._get_attn_scale)
    assert "floor = torch.floor((positions + 1.0) / self.floor_scale)" in scale
    scale = inspect.getsource(MistralAttention._get_llama_4_attn_scale)
    assert "positions / self.llama_4_scaling_original_max_position_embeddings" in scale


def llama_4(**changes: Any) -> PreTrainedConfig:
    kinds: dict[str, Any] = {}
    if not changes.get("attention_chunk_size", True):
        kinds["layer_types"] = ["full_attention"] * 48
    config: PreTrainedConfig = Llama4TextConfig(**changes, **kinds)
    return config
