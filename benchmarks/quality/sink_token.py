"""Question: what does a dedicated sink token in every training sample change (paper, Table 3)?

    train="python -m examples.train_model.train --float32 --batch 8 --steps 4000"   # 90 minutes
    $train --out out/with
    $train --out out/without --no-sink-token
    python -m benchmarks.quality.sink_token --name NAME --with FOLDER --without FOLDER

Two models trained alike, on the same samples in the same order; one of them has had BOS, which
occurs nowhere else, in front of every sample. Both stream the same texts with 0 + W, 1 + (W - 1)
and 4 + (W - 4) tokens; streams of the first start with BOS, streams of the second with the text.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.quality.ablations import TEXTS
from benchmarks.quality.arms import sink
from benchmarks.quality.forcing import ForcingError
from benchmarks.quality.isolate import WorkError
from benchmarks.quality.perplexity import add_arguments
from benchmarks.quality.store import Store, StoreError
from benchmarks.quality.texts import TextError, Texts
from benchmarks.quality.work import Sampling, run_streams

SINKS = (0, 1, 4)


def run(options: argparse.Namespace) -> None:
    """Both models with all numbers of sinks, as far as they are not done yet."""
    options.model = f"{options.with_token.name}, {options.without.name}"
    store = Store(RESULTS / options.name, vars(options))
    sampling = Sampling(options.every, options.bucket)
    for kind, folder in (("with", options.with_token), ("without", options.without)):
        texts = Texts(str(folder), options.books, bos=kind == "with")
        ids = texts.all(options.texts, options.tokens)
        arms = {
            f"{kind}-S{sinks}": sink(sinks, options.capacity, options.stride, dtype=options.dtype)
            for sinks in SINKS
        }
        run_streams(store, str(folder), arms, ids, sampling, streams=options.streams)
    store.pack()


def main() -> int:
    """Parse the options and run; 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="sink_token", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--with", dest="with_token", type=Path, required=True)
    parser.add_argument("--without", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", default=TEXTS, help="see texts.py")
    try:
        run(parser.parse_args())
    except (ForcingError, StoreError, TextError, WorkError) as error:
        print(f"sink_token: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
