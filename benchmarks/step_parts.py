"""Question: which part of a step takes how long, with the policy and in stock vLLM?

    VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 \\
        python -m benchmarks.step_parts [--streams 1 8 32] [--rounds 5] [--eager] [--name NAME]

Arms, rounds and cached lengths are those of `benchmarks.overhead`: equal ones on both sides, all
streams of the policy evict once per round. The model is compiled, as `vllm serve` does by default.

- `forward`: the model's own forward pass;
- `worker`: the rest of `execute_model` and `sample_tokens`: what is prepared, page moves, sampling;
- `schedule`, `update`: the scheduler before and after;
- `rest`: of `LLMEngine.step()`: outputs, detokenisation.

Concluded: milliseconds per step, means over all timed steps. Not to be concluded: what HTTP and
processes add (`benchmarks.serving`).
"""

import argparse
import sys
import time
from collections import defaultdict
from statistics import fmean
from typing import Any

from benchmarks.common import Results, default_name
from benchmarks.overhead import measure
from benchmarks.overhead_arm import ArmError, ArmProcess, Engine, Setup, Step

PARTS = ("forward", "worker", "schedule", "update", "rest")


class Timed(Engine):
    """Streams in lockstep, with a clock around each part of a step."""

    def __init__(self, setup: Setup, *, sink: bool) -> None:
        super().__init__(setup, sink=sink)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._timed: dict[str, float] = {}
        core: Any = self._engine.engine_core.engine_core  # type: ignore[attr-defined]
        executor = core.model_executor
        for owner, method in (
            (core.scheduler, "schedule"),
            (core.scheduler, "update_from_output"),
            (executor, "execute_model"),
            (executor, "sample_tokens"),
            (executor.driver_worker.worker.model_runner, "_model_forward"),
        ):
            self._clock(owner, method)

    def _clock(self, owner: Any, method: str) -> None:
        work = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = work(*args, **kwargs)
            self._seconds[method] += time.perf_counter() - began
            return result

        setattr(owner, method, timed)

    def advance(self, tokens: int) -> list[Step]:
        self._seconds.clear()
        steps = super().advance(tokens)
        self._timed = dict(self._seconds)
        return steps

    def parts(self) -> dict[str, float]:
        """Seconds per step of the round that has just ended, by part."""
        found = {name: seconds / self.setup.stride for name, seconds in self._timed.items()}
        forward = found["_model_forward"]
        worker = found["execute_model"] + found["sample_tokens"] - forward
        schedule, update = found["schedule"], found["update_from_output"]
        return {"forward": forward, "worker": worker, "schedule": schedule, "update": update}


def round_of(arm: ArmProcess) -> dict[str, float]:
    """Seconds per step of one round, whole and by part."""
    step = fmean(one.seconds for one in arm.round())
    parts: dict[str, float] = arm.ask("parts")
    return {"step": step, **parts, "rest": step - sum(parts.values())}


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Milliseconds, by streams and arm."""
    columns = ("step", *PARTS)
    lines = ["streams  arm    " + "".join(f"{name:>10}" for name in columns)]
    for streams, arms in found.items():
        for arm, means in arms.items():
            numbers = "".join(f"{1e3 * means[name]:>10.3f}" for name in columns)
            lines.append(f"{streams:>7}  {arm:<7}{numbers}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    setup = Setup(
        window=188,
        stride=64,
        max_streams=max(options.streams),
        dtype=options.dtype,
        eager=options.eager,
    )
    results = Results(options.name or default_name("step_parts"), vars(options))
    found: dict[str, dict[str, dict[str, float]]] = {}
    with (
        ArmProcess("stock", setup, Timed) as stock,
        ArmProcess("sink", setup, Timed) as sink,
        results.rows("rounds.jsonl") as rows,
    ):
        for streams in options.streams:
            arms = {"stock": stock, "sink": sink}
            measured = measure(arms, streams, options.rounds, round_of)
            for arm, rounds in measured.items():
                for number, one in enumerate(rounds):
                    rows.add(streams=streams, arm=arm, round=number, **one)
            found[str(streams)] = {
                arm: {name: fmean(one[name] for one in rounds) for name in rounds[0]}
                for arm, rounds in measured.items()
            }
    results.summary(found)
    print(table(found))


def main() -> int:
    """0 when everything was measured."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    try:
        run(parser.parse_args())
    except (ArmError, OSError) as error:
        print(f"step_parts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
