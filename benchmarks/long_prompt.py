"""Question: how long do streams wait because somebody else sends a very long prompt?

    python -m benchmarks.long_prompt [--tokens 1000000] [--streams 16] [--arrivals 5] [--name NAME]

An engine is built as always and no model runs, as in `benchmarks.micro_scheduler`: streams decode
on its scheduler, one made-up token per step. Prompts arrive as they do in vLLM's engine process:
an input thread prepares the request (`EngineCore.preprocess_add_request`), and the loop takes it
in between two steps. A step is `add_request`, `schedule()` and `update_from_output()` together:
what the streams wait for beside the model. Quiet steps and those after an arrival take turns.

Not to be concluded: what computing the prompt costs the streams (its chunks share their steps), or
what receiving it over a socket costs.
"""

import argparse
import gc
import os
import queue
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.common import Results, default_name
from benchmarks.overhead_arm import FIRST_WORD, ArmError, Setup

TOKEN = 5  # an ordinary word
STEPS = 400  # quiet, and after an arrival
SETTLING = 300  # steps before anything is timed: every stream has evicted by then
LIMIT_MS = 20.0  # growth of the longest step


@dataclass(frozen=True, slots=True)
class Arrival:
    """Milliseconds around the arrival of one prompt."""

    quiet: float
    """Longest step of the streams alone."""
    longest: float
    """Longest step from the arrival on."""
    add_request: float
    """Longest wait for a request to be taken in."""
    schedule: float
    """Longest call of `schedule()` from the arrival on."""

    @property
    def growth(self) -> float:
        return self.longest - self.quiet


class Scheduler:
    """Streams on the scheduler of an in-process engine of the policy whose model never runs."""

    def __init__(self, engine: Any, streams: int) -> None:
        """``engine`` is an ``LLMEngine`` with a prefix cache and room for one request more."""
        self._engine = engine
        self._core: Any = engine.engine_core.engine_core
        self._scheduler = self._core.scheduler
        self._vocabulary = engine.model_config.get_vocab_size()
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._words = random.Random(0)
        self._names = [f"stream-{number}" for number in range(streams)]
        for name in self._names:
            self._core.add_request(*self._core.preprocess_add_request(self._request(name, 100)))
        gc.collect()
        gc.freeze()
        for _ in range(SETTLING):
            self._step()

    def arrival(self, tokens: int, name: str) -> Arrival:
        """Let a prompt of ``tokens`` arrive, and forget it again."""
        request = self._request(name, tokens)
        quiet = [sum(self._step()) for _ in range(STEPS)]
        reader = threading.Thread(
            target=lambda: self._arrived.put(self._core.preprocess_add_request(request))
        )
        reader.start()
        steps: list[tuple[float, float, float]] = []
        taken = None
        while taken is None or len(steps) < taken + STEPS:
            steps.append(self._step())
            if taken is None and name in self._scheduler.requests:
                taken = len(steps)
        reader.join()
        self._core.abort_requests([name])
        self._step()
        return Arrival(
            quiet=1e3 * max(quiet),
            longest=1e3 * max(map(sum, steps)),
            add_request=1e3 * max(add for add, _, _ in steps),
            schedule=1e3 * max(planned for _, planned, _ in steps),
        )

    def close(self) -> None:
        """End the streams."""
        self._core.abort_requests(self._names)
        self._scheduler.schedule()
        gc.unfreeze()

    def _request(self, name: str, tokens: int) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1 << 30, ignore_eos=True)
        words = [self._words.randrange(FIRST_WORD, self._vocabulary) for _ in range(tokens)]
        return self._engine.input_processor.process_inputs(
            name, {"prompt_token_ids": words}, params, supported_tasks=("generate",)
        )

    def _step(self) -> tuple[float, float, float]:
        """One step; seconds of taking in requests, of planning and of booking its results."""
        from vllm.v1.outputs import ModelRunnerOutput

        began = time.perf_counter()
        while not self._arrived.empty():
            self._core.add_request(*self._arrived.get())
        added = time.perf_counter()
        planned = self._scheduler.schedule()
        scheduled = time.perf_counter()
        ids = list(planned.num_scheduled_tokens)
        requests = self._scheduler.requests
        answer = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={req_id: index for index, req_id in enumerate(ids)},
            sampled_token_ids=[
                [] if requests[req_id].is_prefill_chunk else [TOKEN] for req_id in ids
            ],
        )
        answered = time.perf_counter()
        self._scheduler.update_from_output(planned, answer)
        return added - began, scheduled - added, time.perf_counter() - answered


def build(streams: int) -> Any:
    """An engine of the policy in this process, as `benchmarks.overhead` builds it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    setup = Setup(window=220, stride=32, max_streams=streams + 1)
    return LLM(**setup.engine_arguments(sink=True), enable_prefix_caching=True).llm_engine


def run(options: argparse.Namespace) -> bool:
    """Whether the median growth is within the limit."""
    results = Results(options.name or default_name("long_prompt"), vars(options))
    engine = build(options.streams)
    scheduler = Scheduler(engine, options.streams)
    arrivals = []
    with results.rows("arrivals.jsonl") as rows:
        for number in range(options.arrivals):
            one = scheduler.arrival(options.tokens, f"long-{number}")
            arrivals.append(one)
            rows.add(
                quiet_ms=round(one.quiet, 2),
                longest_ms=round(one.longest, 2),
                add_request_ms=round(one.add_request, 2),
                schedule_ms=round(one.schedule, 2),
            )
            print(
                f"longest step {one.quiet:6.1f} ms quiet, {one.longest:6.1f} ms with a prompt of "
                f"{options.tokens:,} tokens (add_request {one.add_request:.1f}, schedule "
                f"{one.schedule:.1f})"
            )
    engine.engine_core.shutdown()
    growth = statistics.median(one.growth for one in arrivals)
    holds = growth <= LIMIT_MS
    results.summary({"median_growth_ms": round(growth, 2), "limit_ms": LIMIT_MS, "holds": holds})
    print(f"growth of the longest step, median: {growth:.1f} ms (limit {LIMIT_MS:.0f} ms)")
    return holds


def main() -> int:
    """0 when the limit holds, 2 when it does not, 1 when nothing was measured."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--arrivals", type=int, default=5)
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    try:
        return 0 if run(parser.parse_args()) else 2
    except (ArmError, OSError) as error:
        print(f"long_prompt: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
