"""Question: what does the policy add to the scheduler's work per step, for 1 to 512 streams?

    python -m benchmarks.micro_scheduler [--streams 1 8 64 128 256 512] [--rounds 10] [--name NAME]

The arms, the rounds and the lengths are those of `benchmarks.overhead`, but no model runs: each
engine is built as always, and then only its scheduler is driven. A step is timed around
`Scheduler.schedule()` and `Scheduler.update_from_output()`; between the two, what the model would
have returned is made up (one token per stream). All streams evict in the same step, every stride.

Not to be concluded: what an eviction costs in the worker (see `micro_page_moves`), or what a step
costs as a whole (see `overhead`).
"""

import argparse
import sys
import time
from typing import Any

from benchmarks.common import Results, default_name
from benchmarks.overhead import compare, measure
from benchmarks.overhead_arm import ArmError, ArmProcess, Engine, Setup

TOKEN = 5  # an ordinary word


class SchedulerOnly(Engine):
    """Streams in lockstep on the scheduler of an engine whose model never runs."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, setup: Setup, *, sink: bool) -> None:
        super().__init__(setup, sink=sink)
        core = self._engine.engine_core.engine_core  # type: ignore[attr-defined]
        self._scheduler = core.scheduler

    def _step(self) -> float:
        """One token for every stream; seconds the scheduler took."""
        from vllm.v1.outputs import ModelRunnerOutput

        seconds, made = 0.0, 0
        while made == 0:
            began = self.clock()
            planned = self._scheduler.schedule()
            seconds += self.clock() - began
            ids = list(planned.num_scheduled_tokens)
            answer = ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={req_id: index for index, req_id in enumerate(ids)},
                sampled_token_ids=[[TOKEN] for _ in ids],
            )
            began = self.clock()
            told = self._scheduler.update_from_output(planned, answer)
            seconds += self.clock() - began
            outputs = [output for one in told.values() for output in one.outputs]
            made = sum(len(output.new_token_ids) for output in outputs)
        if made != self._streams:
            raise ArmError(f"{made} tokens in a step of {self._streams} streams: not in lockstep")
        if self.sink:
            self._count_evictions(outputs)
        return seconds

    def _abort(self) -> None:
        self._engine.abort_request(self._requests)
        self._requests.clear()


def table(found: dict[int, dict[str, Any]]) -> str:
    """Microseconds per step, by number of streams."""
    head = "streams   stock µs    sink µs  mean ratio  added µs/stream  eviction step ÷ median"
    rows = []
    for streams, row in found.items():
        stock, sink = 1e6 * row["stock"]["median"], 1e6 * row["sink"]["median"]
        rows.append(
            f"{streams:>7} {stock:>10.0f} {sink:>10.0f} {row['mean_ratio']:>11.3f} "
            f"{(sink - stock) / streams:>16.2f} {row['eviction_step_over_median']:>23.2f}"
        )
    return "\n".join([head, *rows])


def run(options: argparse.Namespace) -> None:
    """Both arms, every number of streams; medians of single steps."""
    setup = Setup(window=28, stride=64, max_streams=max(options.streams))
    results = Results(options.name or default_name("micro_scheduler"), vars(options))
    found: dict[int, dict[str, Any]] = {}
    with (
        ArmProcess("stock", setup, SchedulerOnly) as stock,
        ArmProcess("sink", setup, SchedulerOnly) as sink,
        results.rows("steps.jsonl") as rows,
    ):
        for streams in options.streams:
            steps = measure(
                {"stock": stock, "sink": sink}, streams, options.rounds, ArmProcess.round
            )
            for arm, rounds in steps.items():
                for number, one in enumerate(rounds):
                    rows.add(
                        streams=streams,
                        arm=arm,
                        round=number,
                        us=[round(1e6 * step.seconds, 1) for step in one],
                        evicting=[at for at, step in enumerate(one) if step.evicting],
                    )
            found[streams] = compare(steps, "stock", "sink")
            found[streams].pop("holds")  # its limits are those of whole steps
    results.summary({str(streams): row for streams, row in found.items()})
    print(table(found))


def main() -> int:
    """0 when everything was measured."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    try:
        run(parser.parse_args())
    except (ArmError, OSError) as error:
        print(f"micro_scheduler: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
