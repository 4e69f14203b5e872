"""Measurements on a finished model folder: held-out loss, attention sinks, sample text.

Everything runs through the transformers model in float32, so the numbers describe the exported
weights and not the training code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as TokenizerBase

from .corpus import held_out_files
from .model import CONTEXT
from .tokens import BOS_ID, held_out_windows

FIRST_QUERY = 32
"""Earlier queries see few keys, so token 0 gets a large share there for that reason alone."""
BATCH = 8
SINK_WINDOWS = 128
PROMPTS = (
    "import os\nimport sys\n\n\ndef read_file(path):\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "for i in range(",
)


@dataclass(frozen=True)
class HeldOut:
    """Loss on the held-out files; ``without_bos`` drops token 0 from the same windows."""

    files: int
    tokens: int
    bytes_per_token: float
    loss: float
    without_bos: float

    @property
    def bits_per_byte(self) -> float:
        return self.loss / float(np.log(2)) / self.bytes_per_token


@dataclass(frozen=True)
class Sinks:
    """Share of attention mass on token 0, ``[layers, heads]``, over queries >= FIRST_QUERY."""

    share: Tensor

    @property
    def strongest(self) -> tuple[int, int, float]:
        """Layer, head and share of the head that rests most on token 0."""
        layer, head = divmod(int(self.share.argmax()), self.share.shape[1])
        return layer, head, float(self.share[layer, head])


def load(folder: Path) -> tuple[PreTrainedModel, TokenizerBase]:
    """Model in float32 with eager attention (the only one that returns its weights)."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _samples(tokenizer: TokenizerBase) -> Tensor:
    """Held-out windows ``[n, CONTEXT]`` without BOS."""
    rows = held_out_windows(tokenizer.backend_tokenizer, held_out_files(), CONTEXT)
    return torch.from_numpy(rows.astype(np.int64))


def _batches(rows: Tensor) -> Iterator[Tensor]:
    yield from rows.split(BATCH)


def _prepend_bos(rows: Tensor) -> Tensor:
    return torch.cat([torch.full((len(rows), 1), BOS_ID), rows], dim=1)


def _summed_loss(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> float:
    logits = model(input_ids=inputs).logits
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, tokenizer: TokenizerBase) -> HeldOut:
    """Mean loss in nats per token over all held-out windows.

    The comparison without BOS leaves out the first token's prediction on both sides of its mean,
    since nothing precedes it there; it shows how far the model depends on its sink token.
    """
    rows = _samples(tokenizer)
    total = bare = 0.0
    for chunk in _batches(rows):
        total += _summed_loss(model, _prepend_bos(chunk)[:, :-1], chunk)
        bare += _summed_loss(model, chunk[:, :-1], chunk[:, 1:])
    texts = tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
    return HeldOut(
        files=len(held_out_files()),
        tokens=rows.numel(),
        bytes_per_token=sum(len(text.encode("utf-8")) for text in texts) / rows.numel(),
        loss=total / rows.numel(),
        without_bos=bare / rows[:, 1:].numel(),
    )


@torch.inference_mode()
def sink_share(model: PreTrainedModel, tokenizer: TokenizerBase) -> Sinks:
    """Attention on token 0 (BOS) per layer and head, over an even selection of windows."""
    rows = _samples(tokenizer)
    rows = rows[torch.linspace(0, len(rows) - 1, min(SINK_WINDOWS, len(rows))).long()]
    total: Tensor | float = 0.0
    for chunk in _batches(rows):
        inputs = _prepend_bos(chunk)[:, :-1]
        attentions = model(input_ids=inputs, output_attentions=True).attentions
        per_layer = [a[:, :, FIRST_QUERY:, 0].mean(dim=-1).sum(dim=0) for a in attentions]
        total = total + torch.stack(per_layer)
    assert isinstance(total, Tensor)
    return Sinks(total / len(rows))


@torch.inference_mode()
def sample_text(
    model: PreTrainedModel, tokenizer: TokenizerBase, prompt: str, temperature: float
) -> str:
    """Prompt and 80 tokens after it; greedy at temperature 0, else with a fixed seed."""
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    inputs = tokenizer(prompt, return_tensors="pt")
    generate: Any = model.generate  # its annotations do not survive nn.Module.__getattr__
    output = generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=80,
        pad_token_id=BOS_ID,
        **options,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
