"""Question: what do sinks, cache size, stride and precision change, over several texts?

    python -m benchmarks.quality.ablations --name NAME [--texts …] [--groups sinks capacity …]

Every group varies one number of the ``sink`` arm and streams every text once per value, as
``perplexity.py`` does. The texts are the independent samples: tables give the mean difference of
log-perplexity between two arms with a 95% confidence interval over the texts.

- ``sinks``: 0, 1, 2, 4 and 8 sink tokens in the same capacity (Table 2 of the paper).
- ``capacity``: caches of different sizes with 4 sink tokens (Table 6).
- ``stride``: tokens evicted at once, from one page to the window, in the same capacity (the window
  pays) and with the same window (the memory pays).
- ``dtype``: float32 and bfloat16. vLLM's CPU kernels for fp8 caches need AVX-512 or AMX: no row.
"""

import argparse
import sys

from benchmarks.common import RESULTS
from benchmarks.quality.arms import BLOCK_SIZE, Arm, shared, sink
from benchmarks.quality.forcing import ForcingError
from benchmarks.quality.isolate import WorkError
from benchmarks.quality.perplexity import add_arguments
from benchmarks.quality.store import Store, StoreError
from benchmarks.quality.texts import TextError, Texts
from benchmarks.quality.work import Sampling, run_streams

SINKS = (0, 1, 2, 4, 8)
TEXTS = ("held-out:0/4", "held-out:1/4", "held-out:2/4", "held-out:3/4", "tests:0/2", "tests:1/2")


def groups(capacity: int) -> dict[str, list[Arm]]:
    """The arms of every group, for a model trained for ``capacity`` tokens."""
    quarter = capacity // 4 // BLOCK_SIZE * BLOCK_SIZE
    half = capacity // 2
    strides = [g for g in (32, 64, 96, 128) if g <= half]
    return {
        "sinks": [sink(sinks, capacity) for sinks in SINKS],
        "capacity": [
            sink(4, size)
            for size in (capacity // 4 + BLOCK_SIZE, half, capacity - quarter, capacity)
        ],
        "stride": [sink(4, capacity, stride) for stride in strides],
        "stride-window": [sink(4, half + stride, stride) for stride in strides],
        "dtype": [sink(4, capacity, dtype=dtype) for dtype in ("float32", "bfloat16")],
    }


def unit(arm: Arm) -> str:
    """Arms that occur in two groups run once."""
    return f"S{arm.sinks}-W{arm.window}-g{arm.stride}-{arm.dtype}"


def run(options: argparse.Namespace) -> None:
    """All arms of the chosen groups over all texts, as far as they are not done yet."""
    store = Store(RESULTS / options.name, vars(options))
    model = str(options.model)
    ids = Texts(model, options.books).all(options.texts, options.tokens)
    sampling = Sampling(options.every, options.bucket)
    chosen = [groups(options.capacity)[group] for group in options.groups]
    arms = {unit(arm): arm for group in chosen for arm in group}
    for members in shared(arms.values()):
        units = {unit(arm): arm for arm in members}
        run_streams(store, model, units, ids, sampling, options.how, options.streams)
    store.pack()


def main() -> int:
    """Parse the options and run; 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="ablations", description=__doc__.splitlines()[0])
    add_arguments(parser)
    names = list(groups(256))
    parser.add_argument("--texts", nargs="+", default=TEXTS, help="see texts.py")
    parser.add_argument("--groups", nargs="+", choices=names, default=names)
    try:
        run(parser.parse_args())
    except (ForcingError, StoreError, TextError, WorkError) as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
