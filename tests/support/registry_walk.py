"""What the gate says of every generation architecture that vLLM knows, from default configurations.

``python -m tests.support.registry_walk`` prints the page ``docs/coverage.md``. Nothing is loaded:
the configuration class gives its defaults, vLLM makes a ``ModelConfig`` of them, and the gate looks
at that, for a GPU. Multimodal ones are asked for their text side (``--language-model-only``).

Default configurations flatter some checkpoints and wrong others, and where an architecture comes
with remote code only, the nearest configuration class stands in for its own: the table says what
the gate does, not what streams. So does one for the text of a multimodal model whose configuration
leaves it open.
"""

import copy
import functools
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from vllm.config import ModelConfig
from vllm.model_executor.models import registry
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from sink_vllm.gate.facts import Facts
from sink_vllm.gate.model_facts import model_facts
from sink_vllm.gate.refusals import REFUSALS

# Architectures whose configuration class has another name, or is that of a model made alike.
_MODEL_TYPES = {
    "ChatGLMForConditionalGeneration": "chatglm",
    "ChatGLMModel": "chatglm",
    "ExaoneMoEForCausalLM": "exaone_moe",
    "Glm5NextForCausalLM": "glm5_next",
    "HCXVisionV2ForCausalLM": "hyperclovax_vision_v2",
    "LongcatFlashNgramForCausalLM": "longcat_flash",
    "MiMoForCausalLM": "qwen2",
    "MiMoV2ForCausalLM": "mimo_v2_flash",
    "MistralLarge3ForCausalLM": "deepseek_v3",
    "NemotronHPuzzleForCausalLM": "nemotron_h",
    "PanguUltraMoEForCausalLM": "deepseek_v3",
    "PhiMoEForCausalLM": "phimoe",
    "SarvamMLAForCausalLM": "deepseek_v3",
    "Step3TextForCausalLM": "step3_text",
    "Step3p5ForCausalLM": "step3p5",
    "BagelForConditionalGeneration": "bagel",
    "BailingMoeV3VLForConditionalGeneration": "bailing_moe_v3_vl",
    "Cosmos3ForConditionalGeneration": "cosmos3_omni",
    "DeepseekOCR2ForCausalLM": "deepseek_vl_v2",
    "DeepseekOCRForCausalLM": "deepseek_vl_v2",
    "DeepseekV41ForCausalLM": "deepseek_v41",
    "DeepseekV4ForConditionalGeneration": "deepseek_v4",
    "DeepseekVLV2ForCausalLM": "deepseek_vl_v2",
    "Dots3NoteForCausalLM": "dots3_note",
    "FunAudioChatForConditionalGeneration": "funaudiochat",
    "GLM4VForCausalLM": "glm4v",
    "InternS1ForConditionalGeneration": "internvl",
    "InternVLChatModel": "internvl",
    "IsaacForConditionalGeneration": "isaac",
    "KimiK25ForConditionalGeneration": "kimi_k25",
    "KimiK3ForConditionalGeneration": "kimi_k3",
    "KimiVLForConditionalGeneration": "kimi_vl",
    "LightOnOCRForConditionalGeneration": "lighton_ocr",
    "LlavaOnevision2ForConditionalGeneration": "llava_onevision",
    "MiDashengLMModel": "midashenglm",
    "MiMoV2OmniForCausalLM": "mimo_v2_flash",
    "Moondream3ForCausalLM": "moondream3",
    "HfMoondream": "moondream3",
    "MossTranscribeDiarizeForConditionalGeneration": "moss_transcribe_diarize",
    "OpenVLAForActionPrediction": "openvla",
    "Ovis": "ovis",
    "Phi4MMForCausalLM": "phi4_multimodal",
    "PixtralForConditionalGeneration": "mistral3",
    "Qwen2_5OmniModel": "qwen2_5_omni",
    "Qwen3ASRRealtimeGeneration": "qwen3_asr",
    "Step3VLForConditionalGeneration": "step3_vl",
    "UltravoxModel": "ultravox",
    "UnlimitedOCRForCausalLM": "unlimited_ocr",
    "VoxtralRealtimeGeneration": "voxtral_realtime",
}
_STAND_IN = "llama"
_OCR_TEXT = {
    "hidden_size": 1280,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "use_mla": False,
    "kv_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "v_head_dim": 0,
}
# What configuration classes leave open, and every checkpoint says.
_SETTINGS: dict[str, dict[str, Any]] = {
    "DeepseekV32ForCausalLM": {"index_topk": 2048},
    "DeepseekV4ForConditionalGeneration": {"vision_n_layers": 2},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
}
# The same of multimodal ones, whose text is another model: what stands in for that one.
_OCR = (
    *("DeepseekVLV2ForCausalLM", "DeepseekOCRForCausalLM", "DeepseekOCR2ForCausalLM"),
    "UnlimitedOCRForCausalLM",
)
_TEXTS: dict[str, dict[str, Any]] = {
    **{name: {"language_config": _OCR_TEXT} for name in _OCR},
    "MiDashengLMModel": {"text_config": {"hidden_size": 3584}},
    "Ovis": {"llm_config": {"model_type": "qwen2"}, "hidden_size": 4096},
    "UltravoxModel": {"text_config": {"model_type": "llama", "rope_theta": 500000.0}},
}
# What a configuration class writes, and reads by another name or not at all.
_WRITTEN: dict[str, dict[str, str | None]] = {
    **{name: {"text_config": "language_config"} for name in _OCR},
    "HfMoondream": {"text_config": None, "vision_config": None},
    "Moondream3ForCausalLM": {"text_config": None, "vision_config": None},
    "Ovis": {"text_config": "llm_config"},
    "UltravoxModel": {"wrapped_model_config": "text_config"},
}
# What modules of vLLM import for media, and nothing here needs.
_ABSENT = ("timm", "torchaudio")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the gate says of one architecture."""

    architecture: str
    multimodal: bool
    stand_in: bool
    """Whether it has no configuration class of its own outside remote code."""
    row: str | None
    """Name of the first row that refuses it; ``None``: accepted."""
    error: str | None = None
    """Why no ``ModelConfig`` could be made."""

    @property
    def accepted(self) -> bool:
        return self.row is None and self.error is None


def architectures() -> Iterator[tuple[str, bool]]:
    """Every generation architecture of vLLM's registry, and whether it takes media."""
    for name in registry._TEXT_GENERATION_MODELS:
        yield name, False
    for name in registry._TRANSFORMERS_SUPPORTED_MODELS:
        yield name, _TRANSFORMERS_MULTIMODAL in registry._TRANSFORMERS_SUPPORTED_MODELS[name]
    for name in registry._MULTIMODAL_MODELS:
        yield name, True


_TRANSFORMERS_MULTIMODAL = "TransformersMultiModalForCausalLM"


@functools.cache
def _types_of_transformers() -> dict[str, str]:
    """Model types of transformers, by the architectures of its auto classes."""
    types: dict[str, str] = {}
    for name in sorted(vars(modeling_auto)):
        if name.endswith("_MAPPING_NAMES"):
            for model_type, names in getattr(modeling_auto, name).items():
                for one in (names,) if isinstance(names, str) else names:
                    types.setdefault(one, model_type)
    return types


def config_of(architecture: str) -> tuple[Any, bool]:
    """A configuration with default values, and whether another class stands in for its own."""
    model_type = _MODEL_TYPES.get(architecture) or _types_of_transformers().get(architecture)
    known = model_type or _STAND_IN
    config_class = _CONFIG_REGISTRY[known] if known in _CONFIG_REGISTRY else CONFIG_MAPPING[known]
    text = copy.deepcopy(_TEXTS.get(architecture, {}))  # classes take them apart
    config = config_class(**_SETTINGS.get(architecture, {}), **text)
    config.architectures = [architecture]
    return config, model_type is None or bool(text)


def answer(architecture: str, multimodal: bool) -> Answer:
    """Ask the gate about the model alone, on a GPU."""
    stand_in = False
    try:
        config, stand_in = config_of(architecture)
        row = _row_of(config, multimodal)
        if row == "multimodal" and not multimodal:  # vLLM lists it among the others
            multimodal, row = True, _row_of(config, True)
    except Exception as error:  # noqa: BLE001  # whatever a class does with its own defaults
        return Answer(architecture, multimodal, stand_in, None, f"{type(error).__name__}: {error}")
    return Answer(architecture, multimodal, stand_in, row)


def _row_of(config: Any, text_alone: bool) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        _rename(Path(folder) / "config.json", _WRITTEN.get(config.architectures[0], {}))
        keys: dict[str, Any] = {"language_model_only": True} if text_alone else {}
        model = ModelConfig(folder, skip_tokenizer_init=True, **keys)
        facts = Facts(**model_facts(model), platform="cuda")
    return next((row.name for row in REFUSALS if row.reason(facts)), None)


def _rename(file: Path, names: dict[str, str | None]) -> None:
    settings = json.loads(file.read_text())
    for written, read in names.items():
        value = settings.pop(written)
        if read is not None:
            settings[read] = value
    file.write_text(json.dumps(settings))


class _Names(types.ModuleType):
    """A package that is not here: its names, and nothing behind them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not here, behind everything that finds those that are."""

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in _ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def walk(only: Iterable[tuple[str, bool]] | None = None) -> list[Answer]:
    """All architectures, in the order of vLLM's registry, or those that are named."""
    in_process, absent = registry._run_in_subprocess, _Absent()
    registry._run_in_subprocess = lambda fn: fn()  # a process each would take half an hour
    sys.meta_path.append(absent)
    try:
        return [answer(*one) for one in only or architectures()]
    finally:
        registry._run_in_subprocess = in_process
        sys.meta_path.remove(absent)
        for name in [name for name, one in sys.modules.items() if isinstance(one, _Names)]:
            del sys.modules[name]


HEAD = """\
# What the gate says of every architecture of vLLM

Printed by `python -m tests.support.registry_walk`, for vLLM {release} and a GPU; a slow test
(`tests/gate/test_registry.py`) fails when it differs. Nothing is loaded: each configuration class
gives its defaults, vLLM makes a `ModelConfig` of them, and the gate of `--kv-policy sink` looks at
that. Multimodal architectures are asked for their text (`--language-model-only`).

*Accepted* is the gate's word, not a stream: the start-up self-test still decides, and
[models.md](models.md) says what has been compared with a judge. Default configurations flatter some
checkpoints and wrong others. Names in *italics* come with remote code only, and the nearest
configuration class, or Llama's, stands in for theirs; or their configuration leaves the text open,
and that of another model stands in for it.
"""


_KINDS = (("Text", False), ("Multimodal, text alone", True))


def markdown(answers: list[Answer], release: str) -> str:
    """The page of the documentation."""
    parts = [HEAD.format(release=release), _totals(answers)]
    for title, multimodal in _KINDS:
        of_kind = [one for one in answers if one.multimodal == multimodal]
        rows = {"accepted": [one for one in of_kind if one.accepted]}
        for row in REFUSALS:
            rows[f"refused: {row.what}"] = [one for one in of_kind if one.row == row.name]
        rows["not asked: vLLM makes no `ModelConfig` of the defaults"] = [
            one for one in of_kind if one.error is not None
        ]
        lines = [
            f"| {says} | {len(ones)} | {', '.join(map(_spelled, ones))} |"
            for says, ones in rows.items()
            if ones
        ]
        parts.append(
            f"## {title}\n\n| | | Architectures |\n|---|---:|---|\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def _spelled(one: Answer) -> str:
    return f"*{one.architecture}*" if one.stand_in else one.architecture


def _totals(answers: list[Answer]) -> str:
    lines = ["| | Architectures | Accepted | Refused | Not asked |", "|---|---:|---:|---:|---:|"]
    for title, multimodal in _KINDS:
        ones = [one for one in answers if one.multimodal == multimodal]
        accepted = sum(one.accepted for one in ones)
        failed = sum(one.error is not None for one in ones)
        refused = sum(one.row is not None for one in ones)
        lines.append(f"| {title} | {len(ones)} | {accepted} | {refused} | {failed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  # what vLLM's classes of multimodal models import

    print(markdown(walk(), vllm.__version__), end="")
