"""Write a trained model as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

from .model import CompactLlama
from .tokens import BOS_ID, EOS_ID


def save_model(model: CompactLlama, config: LlamaConfig, folder: Path) -> None:
    """Write weights in bfloat16, config.json and generation_config.json to ``folder``.

    The weight file is replaced in one step, so a reader never sees half of a snapshot.
    """
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.export().items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")
    config.save_pretrained(folder)
    # Exactly the token ids and nothing else: servers read sampling defaults from this file.
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    defaults = GenerationConfig(**ids).to_diff_dict()
    path = folder / "generation_config.json"
    path.write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
