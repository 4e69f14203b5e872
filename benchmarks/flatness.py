"""Question: does a token cost the same far into a stream as right after its first eviction?

    python -m benchmarks.flatness [--tokens 100000] [--streams 1] [--rounds 20] [--name NAME]

Both arms are the same engine with `--kv-policy sink`, in processes of their own, up at the same
time. `old` first makes `--tokens` tokens of every stream, then `young` begins, and from there on
the two take turns, one stride at a time: `old` at its position, `young` right after its first
evictions. That separates the stream's position from whatever else changes in the meantime, which
one stream timed at its beginning and at its end (see `soak.py`) cannot.

A round is `g` steps and contains one eviction of every stream, in both arms. A step is timed around
`LLMEngine.step()`. Concluded: time per token of `old` over that of `young`, as the median over the
rounds of the ratio of their means (one stalled step outweighs a whole round, and stalls hit either
arm). At most 1/0.97 = 1.03. Not to be concluded: anything about HTTP, or absolute speed.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, Results, default_name, describe
from benchmarks.overhead_arm import ArmError, ArmProcess, Setup, Step

LIMIT = 1 / 0.97
_SLICE = 5_000  # tokens between two lines of progress


def measure(
    old: ArmProcess, young: ArmProcess, options: argparse.Namespace
) -> dict[str, list[list[Step]]]:
    """Age one arm, then let the arms take turns; who begins alternates."""
    old.start(options.streams)
    for done in range(0, options.tokens, _SLICE):
        old.advance(min(_SLICE, options.tokens - done))
        print(f"{min(done + _SLICE, options.tokens):>9,} tokens", flush=True)
    young.start(options.streams)
    steps: dict[str, list[list[Step]]] = {"old": [], "young": []}
    order = [("old", old), ("young", young)]
    for _ in range(options.rounds):
        for name, arm in order:
            steps[name].append(arm.round())
        order.reverse()
    old.finish()
    young.finish()
    return steps


def verdict(steps: dict[str, list[list[Step]]]) -> dict[str, Any]:
    """Ratios of old to young, and whether the median holds."""
    means = {
        name: [statistics.fmean(step.seconds for step in one) for one in rounds]
        for name, rounds in steps.items()
    }
    evictions = {
        name: sum(step.evicting for one in rounds for step in one) for name, rounds in steps.items()
    }
    if not all(evictions.values()):
        raise ArmError(f"steps that evict: {evictions}; nothing was measured")
    ratios = [o / y for o, y in zip(means["old"], means["young"], strict=True)]
    return {
        "ratio_of_rounds": describe(ratios),
        "median_step_ratio": _median_step(steps["old"]) / _median_step(steps["young"]),
        "evictions_timed": evictions,
        "holds": statistics.median(ratios) <= LIMIT,
    }


def _median_step(rounds: list[list[Step]]) -> float:
    return statistics.median(step.seconds for one in rounds for step in one)


def run(options: argparse.Namespace) -> bool:
    """Start both arms, measure, write, conclude."""
    setup = Setup(
        model=str(options.model),
        dtype=options.dtype,
        window=options.window,
        stride=options.stride,
        max_streams=options.streams,
    )
    results = Results(options.name or default_name("flatness"), vars(options))
    print(f"starting the arms (capacity {setup.schedule.capacity})", flush=True)
    with (
        ArmProcess("sink", setup) as old,
        ArmProcess("sink", setup) as young,
        results.rows("steps.jsonl") as rows,
    ):
        steps = measure(old, young, options)
        for arm, rounds in steps.items():
            for number, one in enumerate(rounds):
                for step in one:
                    rows.add(arm=arm, round=number, **asdict(step))
    found = verdict(steps)
    results.summary(found)
    print(
        f"{'HOLDS' if found['holds'] else 'FAILS'}: at {options.tokens:,} tokens "
        f"({options.tokens / setup.schedule.capacity:.0f} capacities) a token takes "
        f"{found['ratio_of_rounds']['median']:.3f} of the time it takes after the first evictions "
        f"(median of {options.rounds} rounds; of single steps {found['median_step_ratio']:.3f}; "
        f"limit {LIMIT:.3f})"
    )
    return bool(found["holds"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flatness", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=100_000, help="age of the old streams")
    parser.add_argument("--streams", type=int, default=1, help="streams of each arm")
    parser.add_argument("--rounds", type=int, default=20, help="strides per arm")
    parser.add_argument("--window", type=int, default=188)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    return parser.parse_args(arguments)


def main() -> int:
    """0 when the figure holds, 1 when it does not or nothing could be measured."""
    try:
        return 0 if run(parse()) else 1
    except (ArmError, OSError) as error:
        print(f"flatness: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
