"""Train one model on streams of facts and questions, on one CPU thread.

Usage, from the repository root::

    python -m examples.train_model.recall.train --out out/recall/hybrid
    python -m examples.train_model.recall.train --layers attention attention \
        --out out/recall/attention

The two differ in ``--layers`` and in nothing else: same streams in the same order, same steps, same
optimizer, as many weights within some percent, and attention of both sees what the cache of the
policy will hold (``attention.py``). Every step's streams follow from the seed and the step's
number. An interrupted run goes on from its checkpoint when it is started again, and ends with the
same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sink_vllm.policy.schedule import Schedule

from .model import SCHEDULE, SMALL, limit, make_config, make_model
from .task import GROUP, make_stream

STEP_TOKENS = 4096
STAGES = (
    (0.25, 128, SMALL),
    (0.10, 128, SCHEDULE),
    (0.20, 256, SCHEDULE),
    (0.25, 512, SCHEDULE),
    (0.20, 1024, SCHEDULE),
)
"""Share of all steps, tokens of a stream, cache. Where attention sees enough from the start, states
learn nothing: it solves what is near at once, and what is far is too hard to begin with."""
WARMUP_STEPS = 100
FINAL_SHARE = 0.02
CLIP_NORM = 1.0
CHECKPOINT_STEPS = 50
HYBRID = ["mamba", "attention"]


@dataclass
class Progress:
    """What is said of a run afterwards; seconds count from start to start."""

    layers: list[str]
    weights: int
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    inside: float = math.nan
    beyond: float = math.nan


def stage_at(step: int, steps: int) -> tuple[int, Schedule]:
    """Tokens of the streams of a step, and what their cache holds."""
    done = 0.0
    for share, length, schedule in STAGES:
        done += share
        if step < done * steps:
            return length, schedule
    return STAGES[-1][1:]


def rate_at(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up, then a cosine to a small rest."""
    phase = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(step / WARMUP_STEPS, 1.0) * (FINAL_SHARE + (1 - FINAL_SHARE) * phase)


def batch(seed: int, step: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Streams of a step: tokens ``[streams, length]``, and of each question the stream's row, the
    answer's position, and the distance, ``[questions]``."""
    random = Random(f"{seed} {step}")
    streams = [make_stream(random, length // GROUP) for _ in range(STEP_TOKENS // length)]
    found = [
        (row, one.answer, one.distance)
        for row, stream in enumerate(streams)
        for one in stream.questions
    ]
    rows, answers, distances = (torch.tensor(column) for column in zip(*found, strict=True))
    return torch.tensor([stream.tokens for stream in streams]), rows, answers, distances


def optimizer_of(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


class Run:
    """A training that can stop anywhere."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.model: Any = make_model(make_config(args.layers))
        self.optimizer = optimizer_of(self.model)
        self.state = Progress(args.layers, self.model.num_parameters())
        self._file: Path = args.out / "checkpoint.pt"
        if self._file.exists():
            held = torch.load(self._file)
            self.model.load_state_dict(held["model"])
            self.optimizer.load_state_dict(held["optimizer"])
            self.state = Progress(**held["progress"])

    def steps(self) -> Iterator[float]:
        """Do the steps that are left; the loss of each, in nats per answer."""
        args, state = self.args, self.state
        since = time.monotonic() - state.seconds
        while state.steps < args.steps:
            length, schedule = stage_at(state.steps, args.steps)
            limit(self.model, schedule)
            for group in self.optimizer.param_groups:
                group["lr"] = rate_at(state.steps, args.steps, args.lr)
            tokens, rows, answers, distances = batch(args.seed, state.steps, length)
            hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
            # The token before the answer is the key that is asked for.
            logits = self.model.lm_head(hidden[rows, answers - 1])
            targets = tokens[rows, answers]
            loss = F.cross_entropy(logits, targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self._note(logits.argmax(-1) == targets, distances)
            state.steps += 1
            state.tokens += tokens.numel()
            state.seconds = time.monotonic() - since
            if state.steps % CHECKPOINT_STEPS == 0 or state.steps == args.steps:
                self._keep()
            yield loss.item()

    def save(self) -> None:
        """Write the model as transformers and vLLM read it, and what is said of the run."""
        self.model.save_pretrained(self.args.out)
        text = json.dumps(asdict(self.state), indent=1) + "\n"
        (self.args.out / "training_run.json").write_text(text, encoding="utf-8")

    def _keep(self) -> None:
        held = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.state),
        }
        partial = self._file.with_suffix(".partial")
        torch.save(held, partial)
        partial.replace(self._file)

    def _note(self, right: Tensor, distances: Tensor) -> None:
        """Recall up to the window, which the cache surely has, and beyond window and stride."""
        known = distances <= SCHEDULE.window
        gone = distances > SCHEDULE.window + SCHEDULE.stride
        for name, which in (("inside", known), ("beyond", gone)):
            if which.any():
                now, before = float(right[which].float().mean()), getattr(self.state, name)
                value = now if math.isnan(before) else 0.95 * before + 0.05 * now
                setattr(self.state, name, value)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=["mamba", "attention"], default=HYBRID)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and streams")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    state = run.state
    print(f"{state.weights} weights, {state.layers}", flush=True)
    for loss in run.steps():
        if state.steps % 25 == 0:
            recall = f"inside {state.inside:.3f} beyond {state.beyond:.3f}"
            line = f"step {state.steps} length {stage_at(state.steps, args.steps)[0]}"
            print(f"{line} loss {loss:.4f} {recall} {state.seconds:.0f} s", flush=True)
    run.save()


if __name__ == "__main__":
    main()
