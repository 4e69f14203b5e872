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
    "import os\nimport sys\n\n\ndef read_file(path):",
    "class Queue:\n    def __init__(self, maxsize=0):",
    "for i in range(",
)
"""None ends in a newline: the tokenizer joins a newline with the indentation that follows it, so
a bare one at the end is a token the model never saw before an indented line."""


@dataclass(frozen=True)
class HeldOut:
    """Loss on the held-out files, in nats per token.

    ``loss`` covers every token. The other two cover all but the first token of each window, which
    nothing precedes without BOS: ``with_bos`` as trained, ``without_bos`` with BOS left out.
    """

    files: int
    tokens: int
    bytes_per_token: float
    loss: float
    with_bos: float
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


def _losses(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of every target, ``[batch, positions]``."""
    logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, tokenizer: TokenizerBase) -> HeldOut:
    """Measure all held-out windows, with BOS and without.

    The difference shows how far the model depends on its sink token.
    """
    rows = _samples(tokenizer)
    first = rest = bare = 0.0
    for chunk in _batches(rows):
        losses = _losses(model, _prepend_bos(chunk)[:, :-1], chunk)
        first += float(losses[:, 0].sum())
        rest += float(losses[:, 1:].sum())
        bare += float(_losses(model, chunk[:, :-1], chunk[:, 1:]).sum())
    later_tokens = rows[:, 1:].numel()
    texts = tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
    return HeldOut(
        files=len(held_out_files()),
        tokens=rows.numel(),
        bytes_per_token=sum(len(text.encode("utf-8")) for text in texts) / rows.numel(),
        loss=(first + rest) / rows.numel(),
        with_bos=rest / later_tokens,
        without_bos=bare / later_tokens,
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
