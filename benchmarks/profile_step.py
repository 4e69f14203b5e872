"""Question: where does the time of a step go, and how much of it is the policy's?

    python -m benchmarks.profile_step [--streams 64] [--seconds 30] [--name NAME]

py-spy samples the sink arm of `benchmarks.overhead` (an in-process engine, streams in lockstep)
while it decodes. A sample belongs to whichever of sink_vllm and vLLM is innermost on its stack: a
call from the policy into vLLM counts as vLLM's, and the other way round, and torch belongs to who
called it. The share of the policy, by function, is what it adds to a step, except for what it makes
vLLM do (requests that are sent to the worker again).

Sampling costs time itself; shares are to be compared, not seconds. Needs py-spy (``.[bench]``).
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import Results, default_name
from benchmarks.overhead_arm import ArmError, ArmProcess, Setup

RATE = 200  # samples per second
_FRAME = re.compile(r"(?P<function>\S+) \((?P<file>.*):\d+\)$")


def owner(stack: str) -> str:
    """`sink_vllm/<file> <function>`, or `vllm`, or `other`, of a collapsed stack (leaf last)."""
    for frame in reversed(stack.split(";")):
        found = _FRAME.match(frame)
        if found is None:
            continue
        _, ours, within = found["file"].rpartition("sink_vllm/")
        if ours:
            return f"sink_vllm/{within} {found['function']}"
        if "/vllm/" in found["file"]:
            return "vllm"
    return "other"


def owners(lines: Iterable[str]) -> Counter[str]:
    """Samples by owner; only those inside an engine step (the rest waits for the next round)."""
    samples: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.strip().rpartition(" ")
        if "advance (" in stack:
            samples[owner(stack)] += int(count)
    return samples


def record(arm: ArmProcess, seconds: int) -> list[str]:
    """Collapsed stacks of the arm's process while it makes rounds.

    Raises:
        ArmError: py-spy could not attach.
    """
    with tempfile.TemporaryDirectory() as folder:
        stacks = Path(folder) / "stacks"
        command = [str(Path(sys.executable).with_name("py-spy")), "record", "--nonblocking"]
        command += ["--format", "raw", "--full-filenames", "--rate", str(RATE)]
        command += ["--duration", str(seconds), "--pid", str(arm.pid), "--output", str(stacks)]
        done = threading.Event()
        spy = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        def wait() -> None:
            spy.wait()
            done.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not done.is_set():
            arm.round()
        waiting.join()
        if spy.returncode or not stacks.exists():
            assert spy.stdout is not None
            raise ArmError(f"py-spy ended with {spy.returncode}: {spy.stdout.read()[-500:]}")
        return stacks.read_text().splitlines()


def main() -> int:
    """0 when a profile was made."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--name", default=default_name("profile"))
    options = parser.parse_args()
    setup = Setup(
        dtype=options.dtype,
        window=188,
        stride=options.stride,
        max_streams=options.streams,
    )
    try:
        with ArmProcess("sink", setup) as arm:
            arm.start(options.streams)
            samples = owners(record(arm, options.seconds))
    except (ArmError, OSError) as error:
        print(f"profile_step: {error}", file=sys.stderr)
        return 1
    total = sum(samples.values())
    policy = {name: n for name, n in samples.most_common() if name.startswith("sink_vllm/")}
    results = Results(options.name, vars(options))
    results.summary(
        {
            "samples": total,
            "policy_share": sum(policy.values()) / total,
            "policy": {name: n / total for name, n in policy.items()},
        }
    )
    print(f"{sum(policy.values()) / total:6.2%} of {total} samples are the policy's")
    for name, n in list(policy.items())[:15]:
        print(f"{n / total:6.2%} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
