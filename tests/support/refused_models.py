"""Configurations of models that the policy does not work with, and the row that refuses each."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """One refused row of the table of models."""

    name: str
    """As people call it; what the documentation shows."""
    config: str
    """Name of the configuration class in transformers."""
    row: str
    """Name of the row of ``sink_vllm.gate.refusals`` that refuses it."""
    settings: dict[str, Any] = field(default_factory=dict)


REFUSED = (
    Refused(name="GPT-2", config="GPT2Config", row="learned absolute positions"),
    Refused(name="OPT", config="OPTConfig", row="learned absolute positions"),
    Refused(name="StarCoder", config="GPTBigCodeConfig", row="learned absolute positions"),
    Refused(name="Whisper", config="WhisperConfig", row="encoder-decoder"),
    Refused(name="Mamba", config="MambaConfig", row="attention-free"),
    Refused(name="Jamba", config="JambaConfig", row="recurrent layers"),
    Refused(name="Qwen2-VL with images", config="Qwen2VLConfig", row="multimodal"),
    Refused(name="Gemma 3 with images", config="Gemma3Config", row="multimodal"),
    Refused(name="LLaVA with images", config="LlavaConfig", row="multimodal"),
    Refused(name="Qwen3.5 with images", config="Qwen3_5Config", row="multimodal"),
    Refused(
        name="Moonlight",
        config="DeepseekV3Config",
        row="MLA without RoPE scaling on CPUs",
    ),
    Refused(
        name="MiMo-V2-Flash on CPUs",
        config="MiMoV2FlashConfig",
        row="values of another size on CPUs",
    ),
    Refused(name="HunYuan", config="HunYuanDenseV1Config", row="scaling after rotation"),
    Refused(name="MiniCPM3", config="MiniCPM3Config", row="hidden latents"),
    Refused(name="HRM-Text", config="HrmTextConfig", row="prefix language models"),
)
