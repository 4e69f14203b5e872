"""A Llama checkpoint of transformers as the GGUF file that llama.cpp reads.

    python -m benchmarks.peers.gguf_of examples/models/pystream-2.5m out/pystream.gguf

Matrices have the type that is asked for (``--weights``, default float32); vectors, the weights of
norms, are float32, as llama.cpp's kernels want them. Names are those of the GGUF specification
(``gguf.MODEL_ARCH.LLAMA``). llama.cpp rotates pairs of neighbours where transformers rotates
halves, so rows of query and key projections change places. Its server says nothing of tokens whose
bytes are not whole characters, until they are; here token ids are all that counts, so such tokens
get a name that is text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers.decoders import ByteLevel

Weights = dict[str, NDArray[np.float32]]

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
"""Types of matrices, and of the file that has them, by their names in llama.cpp."""

_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class ConversionError(Exception):
    """A checkpoint that is no plain Llama."""


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows ``[heads * head_dim, hidden]`` of halves as rows of pairs, head by head."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def tensors(weights: Weights, config: dict[str, Any]) -> Weights:
    """All tensors under their names in GGUF.

    Raises:
        ConversionError: one has no name there.
    """
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    found: Weights = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem in _WHOLE:
            found[f"{_WHOLE[stem]}.weight"] = weight
            continue
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        if not stem.startswith("model.layers.") or part not in _BLOCK:
            raise ConversionError(f"tensor {name} is none of a plain Llama")
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            weight = interleaved(weight, heads[part[10]])
        found[f"blk.{layer}.{_BLOCK[part]}.weight"] = weight
    return found


def convert(model: Path, target: Path, weights: str = "f32") -> None:
    """Write ``target``.

    Args:
        model: folder of the checkpoint.
        target: file to write.
        weights: one of :data:`TYPES`.

    Raises:
        ConversionError: ``model`` is no plain Llama with a byte-level BPE tokenizer.
    """
    config = json.loads((model / "config.json").read_text())
    rope = config["rope_parameters"]
    if config["model_type"] != "llama" or rope["rope_type"] != "default":
        raise ConversionError(f"{model} is no Llama with plain RoPE")
    matrix_type, file_type = TYPES[weights]
    checkpoint = {
        name: weight.float().numpy()
        for name, weight in load_file(model / "model.safetensors").items()
    }
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name(model.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)
    _add_tokenizer(writer, model, config)
    for name, tensor in tensors(checkpoint, config).items():
        kind = matrix_type if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    if tokenizer["model"]["type"] != "BPE" or tokenizer["pre_tokenizer"]["type"] != "ByteLevel":
        raise ConversionError(f"the tokenizer of {model} is no byte-level BPE")
    by_id = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id |= special
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    texts, types = [], []
    for number in range(config["vocab_size"]):
        is_part = number not in special and _is_part_of_a_character(by_id[number])
        texts.append(f"<{number}>" if is_part else by_id[number])
        types.append(
            kinds.CONTROL if number in special else kinds.USER_DEFINED if is_part else kinds.NORMAL
        )
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _is_part_of_a_character(token: str) -> bool:
    """Whether the bytes of a token are no text by themselves."""
    return "\ufffd" in ByteLevel().decode([token])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--weights", choices=TYPES, default="f32", help="type of matrices")
    options = parser.parse_args()
    options.target.parent.mkdir(parents=True, exist_ok=True)
    convert(options.model, options.target, options.weights)
    print(f"{options.target}: {options.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
