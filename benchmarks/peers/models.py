"""Models that several engines run: a checkpoint of transformers and a GGUF file of each."""

from pathlib import Path

from benchmarks.common import MODEL, ROOT

MADE = ROOT / "out" / "models"
RANDOM_110M = "random-110m"


def checkpoint(name: str) -> Path:
    """The folder of a model: the repository's, or a random Llama of 110M weights.

    Raises:
        ValueError: there is no such model.
    """
    if name == "repository":
        return MODEL
    if name != RANDOM_110M:
        raise ValueError(f"model {name!r} is neither 'repository' nor {RANDOM_110M!r}")
    folder = MADE / name
    if not (folder / "config.json").exists():
        _write_random(folder)
    return folder


def gguf(name: str, weights: str) -> Path:
    """The GGUF file of the same weights, as type ``weights`` of ``gguf_of.py``."""
    from benchmarks.peers.gguf_of import convert

    target = MADE / f"{name}-{weights}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        convert(checkpoint(name), partial, weights)
        partial.replace(target)
    return target


def _write_random(folder: Path) -> None:
    """Shapes of Llama's smallest kind, the repository's tokenizer, weights from a seed."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(MODEL)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 768, 2048, 15
    config.num_attention_heads = config.num_key_value_heads = 12
    config.head_dim = 64
    config.max_position_embeddings = 2048
    model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    for file in MODEL.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    model.float().save_pretrained(folder)
