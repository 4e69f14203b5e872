"""Train the example model on one CPU thread and write it in the Hugging Face layout.

Usage, from the repository root::

    python -m examples.train_model.train --minutes 95 --out examples/models/pystream-2.5m

Every sample starts with the BOS token. That constant, always visible first token is what the
heads learn to rest on, so the model has true attention sinks to stream with: BOS is a dedicated,
learnable sink token (arXiv 2309.17453, section 3.3), it occurs nowhere else. ``--no-sink-token``
trains the same model without it, which is the paper's comparison (Table 3).

The learning rate follows the wall clock, not a step count: the run ends after ``--minutes`` with
a fully decayed rate on any machine. With ``--steps`` it follows the steps instead, so that two
models see exactly the same samples. An exportable snapshot replaces the output folder's weights
every ten minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .corpus import held_out_files, training_texts
from .export import save_model
from .model import CONTEXT, CompactLlama, make_config
from .tokens import (
    BOS_ID,
    Streams,
    TokenArray,
    encode_files,
    held_out_windows,
    save_tokenizer,
    train_tokenizer,
    windows,
)

LIBRARY_REPEATS = 2
"""Passes over the standard library per pass over the packages: it is the best-written part."""
TOKENIZER_FILES = 2500
CLIP_NORM = 1.0
WARMUP_SHARE = 0.02
FINAL_LR_SHARE = 0.02
EVAL_WINDOWS = 128
SNAPSHOT_SECONDS = 600.0


@dataclass
class Progress:
    """What the model card reports about a run."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    threads: int = 1
    batch: int = 0
    learning_rate: float = 0.0
    corpus_tokens: int = 0
    seed: int = 0
    sink_token: bool = True


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to a small rest; ``progress`` runs from 0 to 1."""
    if progress < WARMUP_SHARE:
        return peak * (progress + 1e-3) / (WARMUP_SHARE + 1e-3)
    phase = min((progress - WARMUP_SHARE) / (1 - WARMUP_SHARE), 1.0)
    return peak * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * phase)))


def samples(rows: TokenArray, sink_token: bool) -> tuple[Tensor, Tensor]:
    """Inputs and targets of text ``[batch, CONTEXT]``, with BOS in front of each row or not.

    Without it the first token of a row has no input before it and is no target.
    """
    targets = torch.from_numpy(rows.astype(np.int64))
    if not sink_token:
        return targets[:, :-1].contiguous(), targets[:, 1:].contiguous()
    inputs = torch.cat([torch.full((len(rows), 1), BOS_ID), targets[:, :-1]], dim=1)
    return inputs, targets


def batches(
    streams: Streams, batch: int, seed: int, sink_token: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches; each pass cuts the streams at other places."""
    random_state = np.random.default_rng(seed)
    sources = [streams.packages] + [streams.library] * LIBRARY_REPEATS
    while True:
        offsets = random_state.integers(0, CONTEXT, size=len(sources))
        rows = np.concatenate(
            [windows(s, CONTEXT, int(o)) for s, o in zip(sources, offsets, strict=True)]
        )
        order = random_state.permutation(len(rows))
        for start in range(0, len(order) - batch + 1, batch):
            yield samples(rows[order[start : start + batch]], sink_token)


@torch.no_grad()
def evaluate(
    model: CompactLlama, rows: TokenArray, batch: int, sink_token: bool, bfloat16: bool = True
) -> float:
    """Mean held-out loss in nats per token over whole batches of ``rows``."""
    losses = []
    for start in range(0, len(rows) - batch + 1, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses.append(float(model(*samples(rows[start : start + batch], sink_token))))
    return sum(losses) / len(losses)


def make_optimizer(model: CompactLlama, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; norms have nothing to gain from it."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=95.0, help="wall time of the training")
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument(
        "--no-sink-token", action="store_true", help="no BOS in front of the samples"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and sample order")
    parser.add_argument(
        "--data", type=Path, help="folder of Python files instead of the installed packages"
    )
    parser.add_argument("--layers", type=int, default=12, help="decoder layers of the model")
    parser.add_argument("--batch", type=int, default=16, help="samples of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="AdamW weight decay")
    parser.add_argument(
        "--float32",
        action="store_true",
        help="instead of bfloat16, which processors without AVX-512 only emulate",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="skip torch.compile (slower, no compiler needed)"
    )
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """Prepare the data, run the loop and write the model folder."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    sink_token = not args.no_sink_token

    texts = list(training_texts(args.data))
    sample = random.Random(args.seed).sample(texts, min(TOKENIZER_FILES, len(texts)))
    tokenizer = train_tokenizer(text for _, text in sample)
    save_tokenizer(tokenizer, args.out, sink_token)
    streams = encode_files(tokenizer, texts)
    del texts
    held_out = held_out_windows(tokenizer, held_out_files(), CONTEXT)
    # An even selection over all files, fixed, so that the values of a run can be compared.
    held_out = held_out[np.linspace(0, len(held_out) - 1, EVAL_WINDOWS).astype(int)]
    corpus_tokens = sum(streams.tokens_by_package.values())
    (args.out / "training_tokens.json").write_text(
        json.dumps(streams.tokens_by_package, indent=1) + "\n", encoding="utf-8"
    )
    print(f"corpus {corpus_tokens} tokens, library {streams.library.size}", flush=True)

    config = make_config(args.layers)
    model = CompactLlama(config)
    if not args.no_compile:
        for block in model.blocks:
            block.compile()
    optimizer = make_optimizer(model, args.weight_decay)
    data = batches(streams, args.batch, args.seed, sink_token)
    state = Progress(
        threads=args.threads,
        batch=args.batch,
        learning_rate=args.lr,
        corpus_tokens=corpus_tokens,
        seed=args.seed,
        sink_token=sink_token,
    )

    def snapshot() -> None:
        save_model(model, config, args.out)
        text = json.dumps(asdict(state), indent=1) + "\n"
        (args.out / "training_run.json").write_text(text, encoding="utf-8")

    limit = args.minutes * 60.0
    started = time.monotonic()
    next_snapshot = SNAPSHOT_SECONDS
    average = math.nan
    while (done := state.steps / args.steps if args.steps else state.seconds / limit) < 1:
        inputs, targets = next(data)
        rate = learning_rate(done, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            loss = model(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()

        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss became {value} at step {state.steps}")
        average = value if math.isnan(average) else 0.98 * average + 0.02 * value
        state.steps += 1
        state.tokens += inputs.numel()
        state.seconds = time.monotonic() - started
        if state.steps % 50 == 0:
            line = f"step {state.steps} tokens {state.tokens} loss {average:.4f} lr {rate:.2e}"
            print(f"{line} tokens/s {state.tokens / state.seconds:.0f}", flush=True)
        if state.steps % 500 == 0:
            measured = evaluate(model, held_out, args.batch, sink_token, not args.float32)
            print(f"held-out loss {measured:.4f}", flush=True)
        if state.seconds >= next_snapshot:
            next_snapshot += SNAPSHOT_SECONDS
            snapshot()
    snapshot()
    final = evaluate(model, held_out, args.batch, sink_token, not args.float32)
    print(f"done, held-out loss {final:.4f}", flush=True)


if __name__ == "__main__":
    train(parse_arguments())
