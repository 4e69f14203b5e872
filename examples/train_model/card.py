"""Measure a trained model folder and write its model card (``README.md``).

Usage, from the repository root::

    python -m examples.train_model.card examples/models/pystream-2.5m
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .corpus import HELD_OUT_MODULUS
from .measure import (
    FIRST_QUERY,
    PROMPTS,
    HeldOut,
    Sinks,
    held_out_loss,
    load,
    sample_text,
    sink_share,
)
from .model import CONTEXT

LISTED_PACKAGES = 15
CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, python, streaming-llm, attention-sinks]
---

# {name}

A very small Llama for tests, demonstrations and benchmarks of attention sinks: {weights} weights,
12 layers of 128, 4 heads of 32, a 1,024-token byte-level BPE vocabulary, trained with a context
of {context} tokens. It knows the look of Python source and nothing else. Trained from scratch by
`examples/train_model`; this card is written by `python -m examples.train_model.card`, and every
number in it is read from the run's own record or measured on the exported weights.

## Training

| | |
|---|---|
| samples | {context} tokens, every one starting with BOS (`<s>`) |
| steps | {steps:,} of {batch} samples |
| tokens seen | {tokens:,}, of a corpus of {corpus:,} |
| optimizer | AdamW, peak rate {rate:g} (warm-up, then cosine), weight decay 0.1, clipping at 1.0 |
| precision | bfloat16 autocast over float32 weights; stored as bfloat16 |
| wall time | {minutes:.0f} minutes |
| hardware | {cores}-core {machine} CPU, {threads} thread(s), no accelerator{note} |
| speed | {speed:,.0f} tokens/s |
| seed | {seed} |

The corpus is Python source found on the training machine: the CPython standard library and the
installed packages, without tests, generated tables and files above 150 kB, and at most 8 MB from
one package. Parts: {packages}; the full list is in `training_tokens.json`. The standard library
is repeated twice per pass.

Held out: the standard-library files whose path has a SHA-256 divisible by {modulus}
(`examples.train_model.corpus.held_out_files()`). Files of other packages that copy them are left
out of the training too.

## Held-out loss

| | |
|---|---|
| held-out text | {files} files of CPython {python}, {held_tokens:,} tokens |
| compression | {bpt:.2f} bytes per token |
| loss | {loss:.4f} nats per token (perplexity {ppl:.2f}, {bpb:.3f} bits per byte) |
| without BOS | {bare:.4f} nats per token, against {kept:.4f} with it (first tokens not counted) |

## Attention sinks

Share of attention mass on token 0 (BOS) on held-out text, for queries from position
{first_query} on. An even spread over the visible tokens would give {even:.1%}.

| layer | mean of heads | strongest head |
|---|---|---|
{sink_rows}
| **all** | **{sink_mean:.1%}** | **{best:.1%}** (layer {best_layer}, head {best_head}) |

## Sample

Greedy continuation of the first lines:

```python
{sample}
```

## Use and limits

Meant for checking and showing streaming inference on a machine without an accelerator: the model
is small enough to run anywhere and has real sinks. It is no assistant and no code generator: it
continues text with plausible Python and repeats itself. It was never trained on dialogue; the
chat template writes the roles as Python comments so that chat servers can be exercised with it.
Prompts must start with BOS; the tokenizer and the chat template both see to that (encode the
rendered template without special tokens). It has seen no position from {context} on;
longer streams need a sink cache.

## Licence

The weights and the tokenizer were made by this project and are released under Apache-2.0. The
training text is source code under the licences of the respective projects (the PSF licence for
CPython, mostly BSD, MIT and Apache-2.0 for the packages); none of it is distributed here.
"""


def _sink_rows(sinks: Sinks) -> str:
    rows = []
    for layer, heads in enumerate(sinks.share):
        rows.append(
            f"| {layer} | {float(heads.mean()):.1%} | {float(heads.max()):.1%} "
            f"(head {int(heads.argmax())}) |"
        )
    return "\n".join(rows)


def write_card(
    folder: Path, weights: int, held_out: HeldOut, sinks: Sinks, sample: str, note: str
) -> None:
    """Fill in the card from the measurements and the run's record, and write README.md."""
    run: dict[str, Any] = json.loads((folder / "training_run.json").read_text(encoding="utf-8"))
    counts: dict[str, int] = json.loads(
        (folder / "training_tokens.json").read_text(encoding="utf-8")
    )
    listed = sorted(counts, key=lambda name: -counts[name])[:LISTED_PACKAGES]
    named = ", ".join(f"{name} {counts[name] / 1e6:.1f} M" for name in listed)
    best_layer, best_head, best = sinks.strongest
    positions = range(FIRST_QUERY, CONTEXT)
    text = CARD.format(
        name=folder.resolve().name,
        weights=f"{weights / 1e6:.2f} million",
        context=CONTEXT,
        steps=run["steps"],
        batch=run["batch"],
        tokens=run["tokens"],
        corpus=run["corpus_tokens"],
        rate=run["learning_rate"],
        minutes=run["seconds"] / 60,
        cores=os.cpu_count(),
        machine=platform.machine(),
        threads=run["threads"],
        speed=run["tokens"] / run["seconds"],
        seed=run["seed"],
        packages=f"{named} tokens, and {len(counts) - len(listed)} smaller ones",
        modulus=HELD_OUT_MODULUS,
        python=".".join(platform.python_version_tuple()[:2]),
        files=held_out.files,
        held_tokens=held_out.tokens,
        bpt=held_out.bytes_per_token,
        loss=held_out.loss,
        ppl=math.exp(held_out.loss),
        bpb=held_out.bits_per_byte,
        bare=held_out.without_bos,
        kept=held_out.with_bos,
        first_query=FIRST_QUERY,
        even=sum(1 / (p + 1) for p in positions) / len(positions),
        sink_rows=_sink_rows(sinks),
        sink_mean=float(sinks.share.mean()),
        best=best,
        best_layer=best_layer,
        best_head=best_head,
        sample=sample.rstrip(),
        note=f"; {note}" if note else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="model folder written by train.py")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--note", default="", help="what else to say about the hardware")
    parser.add_argument("--dry-run", action="store_true", help="print the numbers, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load(args.folder)
    held_out = held_out_loss(model, tokenizer)
    sinks = sink_share(model, tokenizer)
    samples = [sample_text(model, tokenizer, prompt, 0.0) for prompt in PROMPTS]
    print(held_out, f"bits per byte {held_out.bits_per_byte:.3f}")
    print(_sink_rows(sinks))
    print("mean", f"{float(sinks.share.mean()):.1%}", "strongest", sinks.strongest)
    for prompt, greedy in zip(PROMPTS, samples, strict=True):
        print("--- greedy\n" + greedy)
        print("--- temperature 0.8\n" + sample_text(model, tokenizer, prompt, 0.8))
    if not args.dry_run:
        write_card(args.folder, model.num_parameters(), held_out, sinks, samples[0], args.note)


if __name__ == "__main__":
    main()
