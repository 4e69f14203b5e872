"""Tiny random-weight checkpoints of a model family: real architectures to the engine.

Shapes are the least that shows what is special about a family; weights are scaled as in
``tests.support.tiny_models``: attention is peaked, its output outweighs the embedding, logits are
spread.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedConfig

from tests.support.engine import Policy
from tests.support.tiny_models import BOS, EOS, PAD, VOCAB_SIZE, _tokenizer

FOR_TRANSFORMERS = "transformers"
HIDDEN, HEADS, HEAD_SIZE, LAYERS, MAX_POSITIONS = 128, 4, 32, 2, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table of models."""

    name: str
    """As people call it; what the documentation shows."""
    model: str
    """Name of the configuration class in transformers, without ``Config``."""
    special: str
    """What this row is in the table for."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the configuration, on top of the common ones."""
    media: dict[str, Any] | None = None
    """Settings around those of the text, of a multimodal model that serves text alone."""
    processor: dict[str, Any] | None = None
    """Of images, for a class that compiles one with numba, whatever it serves."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Of the generation configuration, on top of special tokens."""
    served_as: str | None = None
    """Name of the architecture in vLLM, if it is not the one in transformers."""
    positions: str = "rope"
    backend: str = "vLLM"
    """Whose model code vLLM 0.32 runs: its own, that of transformers, or this project's."""
    still: tuple[int, ...] = ()
    """Layers whose keys do not depend on the position."""
    page: int = 32
    """Tokens per KV page: the smallest of the attention backend."""
    recurrent: bool = False
    """Whether some layers have a state in place of a cache. A page must hold it."""
    stride: int = 0
    """Tokens evicted at once, and half of the cache: those of a page; 32 or, with states, 64."""
    dtype: str = "float32"
    torch_convolutions: bool = False
    """Whether vLLM's convolutions of gated delta nets must be those in torch: its op for CPUs with
    AVX512-BF16 takes no single token out of a wider projection, and fails on Qwen3.5."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the engine."""
    tied_gain: float = 4.0
    """Scale of embeddings that are the output's weights, too."""
    gain: float = 1.0
    """Scale of the weights of layers; more where the embedding outweighs them and tokens repeat."""
    distinct: int = 100
    """How many different tokens streams have at least: a model that repeats itself shows little."""
    turned: str | None = None
    """Part of the names of weights that are transposed in published checkpoints."""
    renamed: tuple[str, str] | None = None
    """A part of their names that transformers writes, and what it is in published checkpoints."""
    dropped: tuple[str, ...] = ()
    """Parts of the names of weights that vLLM is not given."""
    published: dict[str, Any] | None = None
    """The configuration in the names of published checkpoints, where transformers has others."""
    quick: bool = False
    """Whether it is tested by default, for all that is like it."""

    @property
    def architecture(self) -> str:
        """In transformers."""
        kind = "CausalLM" if self.media is None else "ConditionalGeneration"
        return f"{self.model.removesuffix('Text')}For{kind}"

    @property
    def text_alone(self) -> bool:
        """Whether vLLM runs its multimodal class, and is given texts only."""
        return self.media is not None and self.published is None

    @property
    def resumed(self) -> bool:
        """Whether prefixes are kept: vLLM does not on CPUs for latent attention."""
        return "kv_lora_rank" not in self.settings

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments for ``running_engine``."""
        alone = {"language_model_only": True} if self.text_alone else {}
        compiles = {"compiles": True} if self.processor is not None else {}
        return {"block_size": self.page, "dtype": self.dtype, **alone, **compiles, **self.options}

    @property
    def policy(self) -> Policy:
        """With it streams evict, and where keys rotate re-anchor, within hundreds of tokens."""
        stride = self.stride or (64 if self.recurrent else 32)
        return Policy(4, stride - 4, stride)

    @property
    def evictions(self) -> int:
        """That a test's streams have gone through at least."""
        return 10 if self.policy.g == 32 else 8

    @property
    def tokens(self) -> int:
        """Of a test's streams: enough of them to re-anchor."""
        return 500 if self.policy.g == 32 else 650

    @property
    def model_class(self) -> Any:
        """Of transformers."""
        return getattr(transformers, self.architecture)

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "-")


def rope(rope_type: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **settings}}


TIED = {"tie_word_embeddings": True}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

TEMPERATURE = 128
"""Positions before queries are scaled: twice the cache, half of the table it would have."""
MINISTRAL_3 = (
    rope(
        "yarn",
        factor=2.0,
        original_max_position_embeddings=TEMPERATURE,
        llama_4_scaling_beta=2.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    # vLLM reads it under the name of Mistral's own format only.
    | {"llama_4_scaling": {"beta": 2.0, "original_max_position_embeddings": TEMPERATURE}}
    | {"max_position_embeddings": 2 * TEMPERATURE}
)


def write_family(folder: Path, family: Family) -> Path:
    """Write configuration, weights and tokenizer of a tiny model of ``family``.

    Where vLLM reads another configuration than transformers, the one for transformers is in the
    folder ``FOR_TRANSFORMERS`` inside, with weights of its own.
    """
    config = config_of(family)
    model = family.model_class(config).float()
    _fill(model, family)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, **family.generation
    )
    model.save_pretrained(folder)
    if family.published is not None:
        model.save_pretrained(folder / FOR_TRANSFORMERS)
        (folder / "config.json").write_text(json.dumps(family.published))
    if family.served_as is not None:
        written = json.loads((folder / "config.json").read_text())
        written["architectures"] = [family.served_as]
        (folder / "config.json").write_text(json.dumps(written))
    if family.processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(family.processor))
    _edit(folder / "model.safetensors", family)
    _tokenizer().save_pretrained(folder)
    return folder


def _edit(file: Path, family: Family) -> None:
    """Rename, turn and drop what is otherwise in published checkpoints."""
    if family.turned is None and family.renamed is None and not family.dropped:
        return
    weights = {}
    for name, weight in load_file(file).items():
        if any(part in name for part in family.dropped):
            continue
        turned = family.turned is not None and family.turned in name
        known = name if family.renamed is None else name.replace(*family.renamed)
        weights[known] = weight.transpose(1, 2).contiguous() if turned else weight
    save_file(weights, file, metadata={"format": "pt"})


def config_of(family: Family) -> PreTrainedConfig:
    """The configuration: common settings in the names of the family, then its own."""
    config_class = getattr(transformers, f"{family.model}Config")
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "float32",
        "architectures": [family.architecture],
    }
    if "n_embd" in family.settings or family.model in ("Bloom", "GPTNeoX", "Falcon", "Mpt"):
        for name in ("num_key_value_heads", "head_dim"):
            del common[name]
    if {"n_embd", "d_model"} & family.settings.keys():
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            del common[name]
        for name in ("intermediate_size", "max_position_embeddings"):
            del common[name]
    settings = common | family.settings
    if family.media is not None:
        around = {name: settings[name] for name in ("tie_word_embeddings", "dtype")}
        around["architectures"] = settings.pop("architectures")
        settings = {"text_config": settings, **around, **family.media}
    config: PreTrainedConfig = config_class(**settings)
    return config


def _fill(model: Any, family: Family) -> None:
    """Draw every weight, by what its name says it does."""
    generator = torch.Generator().manual_seed(0)
    tied = model.config.tie_word_embeddings
    gemma = family.model.startswith("Gemma")
    # Their norms add one to the weight; those of Gemma 3n and 4 do not.
    offset = float(family.model in ("Gemma", "Gemma2", "Gemma3", "Gemma3Text", "Step3p7"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            part = name.split(".")[-2]
            if name.endswith("A_log"):
                weight.copy_(0.5 * noise - 4.0)  # a state forgets half within some fifty tokens
            elif name.endswith("bias"):
                weight.copy_(0.1 * noise)
            elif weight.dim() == 1:  # norms: near one, but not exactly
                unscaled = family.model.startswith(("Gemma3n", "Gemma4"))  # scores as they are
                heads = 0.75 if unscaled else 1.5
                peaked = heads if part in ("q_norm", "k_norm") else 1.0
                if gemma and part.startswith("post_"):
                    peaked = 6.0  # or the embedding outweighs what layers add, and tokens repeat
                weight.copy_(peaked * (1 + 0.1 * noise) - offset)
            elif weight is model.get_input_embeddings().weight:
                weight.copy_(noise * (family.tied_gain / weight.shape[1] ** 0.5 if tied else 1.0))
            else:
                weight.copy_(noise * family.gain * _gain(name) / weight.shape[-1] ** 0.5)
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
            if family.dtype == "bfloat16":
                weight.copy_(weight.bfloat16())


def _gain(name: str) -> float:
    part = name.split(".")[-2]
    if part in ("lm_head", "embed_out"):
        return 4.0
    attention = (
        "q_proj",
        "k_proj",
        "qkv_proj",
        "query_key_value",
        "o_proj",
        "dense",
        "out_proj",
        "Wqkv",
    )
    return 1.5 if part in attention else 1.0
