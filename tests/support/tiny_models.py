"""Tiny Llama checkpoints with random weights: real models to the engine, fast on one core.

The weights are scaled so that a wrong cache shows at once: attention is peaked (scores with a
standard deviation near 1.5) and its output outweighs the embedding, so each token depends on a few
keys anywhere in the cache, and the logits are spread far enough that greedy near-ties are rare.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 300
BOS, EOS, PAD = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

LLAMA3_ROPE: dict[str, float | str] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyLlama:
    """Shape of a tiny Llama; ``max_positions`` is the number of rows of its RoPE table."""

    heads: int = 2
    kv_heads: int = 2
    layers: int = 3
    head_size: int = 32
    max_positions: int = 384
    tied: bool = False
    logit_scale: float = 3.0
    """Standard deviation of the logits; 0 makes all tokens equally likely."""
    rope: dict[str, float | str] | None = None
    seed: int = 0

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size


def write_tiny_llama(folder: Path, shape: TinyLlama) -> Path:
    """Write config, weights, tokenizer and generation config of ``shape`` into ``folder``."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.max_positions,
        rope_parameters=shape.rope or {"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=shape.tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).float()
    _fill(model, shape)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def write_tiny_lora(folder: Path, shape: TinyLlama, rank: int = 4) -> Path:
    """Write a LoRA adapter for ``shape`` whose answers differ from the model's at once."""
    generator = torch.Generator().manual_seed(shape.seed + 1)
    weights = {}
    for layer in range(shape.layers):
        for name, heads in (("q_proj", shape.heads), ("v_proj", shape.kv_heads)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            into = torch.randn(rank, shape.hidden, generator=generator) / shape.hidden**0.5
            out_of = torch.randn(heads * shape.head_size, rank, generator=generator) / rank**0.5
            weights[f"{prefix}.lora_A.weight"], weights[f"{prefix}.lora_B.weight"] = into, out_of
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 4 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _fill(model: LlamaForCausalLM, shape: TinyLlama) -> None:
    """Draw every weight; the gains give the unit-variance inputs the output scale named."""
    generator = torch.Generator().manual_seed(shape.seed)
    gains = {
        "embed_tokens": 1.0,
        "q_proj": 1.2,
        "k_proj": 1.2,
        "v_proj": 1.0,
        "o_proj": 1.2,
        "gate_proj": 1.0,
        "up_proj": 1.0,
        "down_proj": 1.0,
        "lm_head": shape.logit_scale,
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # norms: near one, but not exactly
                weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
                continue
            gain = gains[name.split(".")[-2]]
            fan_in = 1 if "embed_tokens" in name else weight.shape[1]
            if "embed_tokens" in name and shape.tied:
                gain = gains["lm_head"] / shape.hidden**0.5
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * gain / fan_in**0.5)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    vocab |= {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
