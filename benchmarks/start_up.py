"""Question: how much longer does `vllm serve` take to be ready with the policy?

    python -m benchmarks.start_up [--rounds 5] [--eager] [--model FOLDER] [--name NAME]

Arms, one server at a time, in turn, round by round; the order is turned around every other round:

- `stock`: no plugin of any kind is loaded (`VLLM_PLUGINS` names none).
- `off`: the plugin is loaded in every process, the policy is not asked for.
- `sink`: `--kv-policy sink`, with everything that it checks at the start, the self-test of the
  pages included.

Seconds are from the start of the process until `/health` answers 200, asked for every 20 ms. Every
arm starts once before, which is not counted: files come from the disk then, and `torch.compile`
fills its cache.

Limit: 1 second of `sink` over `stock`, by the median of the rounds' differences.

Not to be concluded: what a start takes at all, which depends on the machine, the model and its
weights.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, Results, default_name, describe
from examples.serving import Server, ServerError

LIMIT = 1.0
NO_PLUGIN = {"VLLM_PLUGINS": "none"}
ALL = {"VLLM_PLUGINS": "sink_vllm"}
ARMS: dict[str, tuple[list[str], dict[str, str]]] = {
    "stock": ([], NO_PLUGIN),
    "off": ([], ALL),
    "sink": (["--kv-policy", "sink"], ALL),
}
POLL = 0.02
LOGGED = "StreamingLLM: sink tokens"


def start(arm: str, model: Path, flags: Sequence[str], limit: float = 600) -> float:
    """Seconds until a server of ``arm`` is ready; it is stopped again.

    Raises:
        ServerError: it ends, is not ready after ``limit`` seconds, or runs the wrong policy.
    """
    words, environment = ARMS[arm]
    with Server([str(model), *flags, *words], environment) as server:
        started = time.monotonic()
        while not server.healthy():
            server.check()
            if time.monotonic() - started > limit:
                raise ServerError(f"no answer after {limit:.0f} s{server.log_tail()}")
            time.sleep(POLL)
        seconds = time.monotonic() - started
        if (LOGGED in server.log.read_text(errors="replace")) != (arm == "sink"):
            raise ServerError(f"the arm {arm} runs the wrong policy{server.log_tail()}")
    return seconds


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Differences to `stock`, round by round."""
    added = {
        arm: [one - base for one, base in zip(found, seconds["stock"], strict=True)]
        for arm, found in seconds.items()
        if arm != "stock"
    }
    return {
        **{arm: describe(found) for arm, found in seconds.items()},
        **{f"{arm}_adds": describe(found) for arm, found in added.items()},
        "holds": statistics.median(added["sink"]) <= LIMIT,
    }


def run(options: argparse.Namespace) -> bool:
    """Warm up, then all rounds."""
    results = Results(options.name or default_name("start_up"), vars(options))
    flags = ["--enforce-eager"] if options.eager else []
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = list(ARMS)
    for arm in order:
        print(f"warming up: {arm} {start(arm, options.model, flags):.2f} s", flush=True)
    with results.rows("starts.jsonl") as rows:
        for number in range(options.rounds):
            for arm in order:
                took = start(arm, options.model, flags)
                seconds[arm].append(took)
                rows.add(round=number, arm=arm, seconds=took)
                print(f"round {number + 1}: {arm} {took:.2f} s", flush=True)
            order.reverse()
    found = compare(seconds)
    results.summary(found)
    for name in (*ARMS, "off_adds", "sink_adds"):
        print(f"{name:<10}{found[name]['median']:7.2f} s (median)")
    print(f"limit: sink adds {LIMIT} s; {'holds' if found['holds'] else 'does NOT hold'}")
    return bool(found["holds"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--name", help="folder in benchmarks/results")
    return 0 if run(parser.parse_args()) else 1


if __name__ == "__main__":
    sys.exit(main())
