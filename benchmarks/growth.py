"""Question: with what does the work of a step grow, and how fast?

    python -m benchmarks.growth [--whole] [--rounds 6] [--name NAME]

Engines of the policy are built as always, no model runs (see `micro_scheduler`). Processor time of
`schedule()` and `update_from_output()`, per step, evictions included, while one number grows. With
`--whole` the model of the repository runs, and it is the seconds of the whole `LLMEngine.step()`:

- `streams`: 1 to 512 at once;
- `sinks`: S = 4 to 2,048, 16 streams (a pinned system prompt);
- `stride`: from one block to the whole window, 16 streams;
- `prompt`: 1,000 to 1,000,000 tokens, one request: from `preprocess_add_request`, which cuts and
  hashes it, to its first token; chunks of 2,048 tokens.

Concluded: the exponent e of t ~ n^e, by least squares over all sizes and between the two largest.
Work per step must not grow faster than streams (1), nor with sinks or strides (0), and work per
prompt not faster than its tokens (1); `most` allows 0.1 more, for what a cache misses. A whole step
may grow as the cached tokens do, which attention reads: 1 for sinks and strides, too.

Not to be concluded from the scheduler alone: anything about the model's part of a step, or page
moves (`micro_page_moves`).
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.common import Results, default_name
from benchmarks.micro_scheduler import SchedulerOnly
from benchmarks.overhead_arm import FIRST_WORD, ArmError, ArmProcess, Engine, Setup
from benchmarks.rows import Rows

STREAMS = (1, 4, 16, 64, 256, 512)
SINKS = (4, 64, 256, 1024, 2048)
STRIDES = (32, 128, 512, 2048)
PROMPTS = (1_000, 10_000, 100_000, 1_000_000)
MOST = {"streams": 1.1, "sinks": 0.1, "stride": 0.1, "prompt": 1.1}
MOST_WHOLE = {"streams": 1.1, "sinks": 1.1, "stride": 1.1, "prompt": 1.1}


class WholeSteps(Engine):
    """Seconds of the engine with its model, and of whole prompts."""

    def prompt(self, tokens: int) -> float:
        """Seconds for one prompt, up to its first token, with nothing else running."""
        from vllm import SamplingParams

        words, once = self._words(tokens), SamplingParams(max_tokens=1, ignore_eos=True)
        began = time.perf_counter()
        self._engine.add_request(f"prompt-{self._serial}", {"prompt_token_ids": words}, once)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - began

    def _words(self, tokens: int) -> list[int]:
        self._serial += 1
        chosen = random.Random(self._serial)  # no prompt is found in the cache
        return chosen.choices(range(FIRST_WORD, self._vocabulary), k=tokens)


class Clocked(SchedulerOnly, WholeSteps):
    """Processor time of the scheduler instead."""

    clock = staticmethod(time.process_time)

    def prompt(self, tokens: int) -> float:
        """The same of ``preprocess_add_request`` and the scheduler."""
        from vllm import SamplingParams
        from vllm.v1.outputs import ModelRunnerOutput

        core = self._engine.engine_core.engine_core  # type: ignore[attr-defined]
        words = self._words(tokens)
        request = self._engine.input_processor.process_inputs(
            f"prompt-{self._serial}",
            {"prompt_token_ids": words},
            SamplingParams(max_tokens=1, ignore_eos=True),
            supported_tasks=("generate",),
        )
        began = self.clock()
        core.add_request(*core.preprocess_add_request(request))
        made = 0
        while made == 0:
            planned = self._scheduler.schedule()
            ids = list(planned.num_scheduled_tokens)
            last = not self._scheduler.requests[ids[0]].is_prefill_chunk
            answer = ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={req_id: index for index, req_id in enumerate(ids)},
                sampled_token_ids=[[FIRST_WORD] if last else []],
            )
            told = self._scheduler.update_from_output(planned, answer)
            made = sum(len(one.new_token_ids) for each in told.values() for one in each.outputs)
        return self.clock() - began


def exponents(points: Mapping[int, float]) -> dict[str, float]:
    """Of ``t ~ n^e``: ``overall`` by least squares, ``last`` between the two largest."""
    logs = [(math.log(n), math.log(t)) for n, t in sorted(points.items())]
    (n1, t1), (n2, t2) = logs[-2:]
    slope = statistics.linear_regression(*zip(*logs, strict=True)).slope
    return {"overall": slope, "last": (t2 - t1) / (n2 - n1)}


class Measured(NamedTuple):
    """What is measured, and how often."""

    rows: Rows
    engine: type[WholeSteps]
    rounds: int


def per_step(
    measured: Measured, what: str, size: int, setup: Setup, streams: Sequence[int]
) -> dict[int, float]:
    """Median over rounds of the mean step, by number of streams, on one engine."""
    rows, engine, rounds = measured
    found = {}
    with ArmProcess("sink", setup, engine) as arm:
        for number in streams:
            arm.start(number)
            means = []
            for _ in range(rounds):
                steps = arm.round()
                means.append(statistics.fmean(step.seconds for step in steps))
                worst = max(step.seconds for step in steps if step.evicting)
                rows.add(what=what, size=size or number, mean_s=means[-1], longest_eviction_s=worst)
            arm.finish()
            found[number] = statistics.median(means)
    return found


def prompts(measured: Measured) -> dict[int, float]:
    """Median over rounds, by length."""
    rows, engine, rounds = measured
    setup = Setup(window=188, stride=64, max_streams=1, prefix_caching=True)
    found: dict[int, list[float]] = {length: [] for length in PROMPTS}
    with ArmProcess("sink", setup, engine) as arm:
        for _ in range(rounds):
            for length in PROMPTS:
                found[length].append(float(arm.ask("prompt", length)))
                rows.add(what="prompt", size=length, mean_s=found[length][-1])
    return {length: statistics.median(seconds) for length, seconds in found.items()}


def measure(measured: Measured) -> dict[str, dict[int, float]]:
    """Seconds by size, of everything that grows."""
    found: dict[str, dict[int, float]] = {}
    small = Setup(window=28, stride=64, max_streams=max(STREAMS))
    found["streams"] = per_step(measured, "streams", 0, small, STREAMS)
    found["sinks"], found["stride"] = {}, {}
    for sinks in SINKS:
        setup = Setup(window=188, stride=64, sink_tokens=sinks, max_streams=16, context=4096)
        found["sinks"][sinks] = per_step(measured, "sinks", sinks, setup, [16])[16]
    for stride in STRIDES:
        setup = Setup(window=2044, stride=stride, max_streams=16, context=8192)
        found["stride"][stride] = per_step(measured, "stride", stride, setup, [16])[16]
    found["prompt"] = prompts(measured)
    return found


def main() -> int:
    """0 when nothing grows faster than it must."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--whole", action="store_true", help="whole steps, with the model")
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    options = parser.parse_args()
    try:
        results = Results(options.name or default_name("growth"), vars(options))
        with results.rows("growth.jsonl") as rows:
            engine = WholeSteps if options.whole else Clocked
            found = measure(Measured(rows, engine, options.rounds))
    except (ArmError, OSError) as error:
        print(f"growth: {error}", file=sys.stderr)
        return 1
    most = MOST_WHOLE if options.whole else MOST
    summary: dict[str, Any] = {
        what: {"seconds": points, "exponents": exponents(points), "most": most[what]}
        for what, points in found.items()
    }
    holds = all(one["exponents"]["last"] <= one["most"] for one in summary.values())
    results.summary({**summary, "holds": holds})
    print(json.dumps(summary, indent=2))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
