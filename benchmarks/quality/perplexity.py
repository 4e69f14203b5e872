"""Question: does a stream stay as good as recomputing its window, however long it gets?

    python -m benchmarks.quality.perplexity --name NAME [--model MODEL] [--tokens N]
        [--texts held-out:0/4 python …] [--arms full window sink absolute recompute recompute-bos]

Every text is streamed through one request of the engine per arm, teacher-forced, and the loss of
every token is measured (``recorder.py``). The same command again continues an interrupted run.

- ``full`` is stock vLLM with all tokens in its cache, up to ``--full-limit`` tokens.
- ``sink``, ``window`` and ``absolute`` have a cache of ``--capacity`` tokens; see ``arms.py``.
- ``recompute`` prefills, for every ``--every``-th position, as many of the last tokens as the
  stream has cached there, with stock vLLM; ``recompute-bos`` has BOS as the first of them.

Arms are compared on the positions they share. Tables: ``python -m benchmarks.quality.tables``.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.common import MODEL, RESULTS, commit
from benchmarks.quality.arms import BLOCK_SIZE, Arm, shared, sink
from benchmarks.quality.forcing import ForcingError
from benchmarks.quality.isolate import WorkError
from benchmarks.quality.store import Store, StoreError
from benchmarks.quality.texts import TextError, Texts
from benchmarks.quality.work import Sampling, run_streams, run_windows

STREAMED = ("sink", "window", "full", "absolute")
ARMS = (*STREAMED, "recompute", "recompute-bos")


def run(options: argparse.Namespace, folder: Path) -> None:
    """All arms over all texts, as far as they are not done yet."""
    store = Store(folder, vars(options))
    model = str(options.model)
    texts = Texts(model, options.books)
    ids = texts.all(options.texts, options.tokens)
    sampling = Sampling(options.every, options.bucket)
    engines = shared(arm_of(name, options) for name in options.arms if name in STREAMED)
    for arms in engines:
        # The stock arms and the control have an end; the others take all of every text.
        some = {text: tokens[: arms[0].limit or None] for text, tokens in ids.items()}
        units = {f"{options.prefix}{arm.name}": arm for arm in arms}
        run_streams(store, model, units, some, sampling, options.how, options.streams)
    for name in options.arms:
        if name not in STREAMED:
            run_windows(
                store,
                f"{options.prefix}{name}",
                model,
                sink(options.sinks, options.capacity, options.stride).schedule,
                ids,
                sampling,
                texts.bos if name == "recompute-bos" else None,
                begin=options.capacity + 1,
                end=options.tokens,
                dtype=options.dtype,
            )
    store.pack()


def arm_of(name: str, options: argparse.Namespace) -> Arm:
    """The streamed arm of that name."""
    sinks, capacity, stride = options.sinks, options.capacity, options.stride
    limit = min(options.tokens, options.full_limit)
    if name == "full":
        return Arm(name=name, kind="full", limit=limit, dtype=options.dtype)
    arm = sink(sinks if name != "window" else 0, capacity, stride, name, options.dtype)
    return arm if name != "absolute" else replace(arm, kind="absolute", limit=limit)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all benchmarks of this folder share."""
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--books", type=Path, help="folder of .txt files to take texts from")
    parser.add_argument("--name", default=f"quality_{commit()[:8]}", help="folder of the results")
    parser.add_argument("--prefix", default="", help="in front of the names of result files")
    parser.add_argument("--capacity", type=int, default=256, help="tokens cached at most")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--stride", type=int, default=BLOCK_SIZE)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--streams", type=int, default=40, help="requests at once")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of every text")
    parser.add_argument("--every", type=int, default=50, help="positions kept one by one")
    parser.add_argument("--bucket", type=int, default=1000, help="tokens per row of raw data")
    parser.add_argument("--how", choices=("prompt", "decode"), default="prompt")


def main() -> int:
    """Parse the options and run; 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="perplexity", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument(
        "--texts", nargs="+", default=["held-out:0/4"], help="see texts.py; name@tokens is shorter"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument(
        "--full-limit", type=int, default=8192, help="most tokens of full and absolute"
    )
    options = parser.parse_args()
    try:
        run(options, RESULTS / options.name)
    except (ForcingError, StoreError, TextError, WorkError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
