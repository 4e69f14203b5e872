"""Question: what can a stream still answer about lines it saw d lines ago (paper, section 4.4)?

    python -m benchmarks.quality.streameval --name NAME [--model MODEL] [--form copy|registers]

The recipe as published (its data and code never were): new lines for ever, a question every 10
lines about a line some lines back, accuracy by that distance and by the size of the cache. Run as
streams of a real ``vllm serve --kv-policy sink``: lines and questions are appended over
``/v1/streams``, nothing is resent. Caches of different sizes are options of the streams.

A model of a few million weights answers no questions. The default form asks for the exact
continuation of a line of code that is begun again (``forms.py``); the ``unseen`` distance, lines
the stream has never had, says what guessing gives. ``--form registers`` is the paper's own.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, RESULTS
from benchmarks.quality.answers import answered
from benchmarks.quality.forms import FORMS, Form
from benchmarks.quality.store import Store, StoreError
from benchmarks.quality.texts import tokenizer_of
from benchmarks.service import Api
from examples.serving import Server, ServerError, stop_on_terminate

SERVED = "model"
QUESTION_EVERY = 10  # lines
UNSEEN = 0  # distance: a line the stream has never had
GREEDY = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Cache:
    """Sink tokens and window of a stream."""

    sinks: int
    window: int

    @property
    def unit(self) -> str:
        return f"S{self.sinks}-W{self.window}"


def ask(
    api: Api, form: Form, cache: Cache, bos: int | None, lines: int, distances: list[int]
) -> Iterator[dict[str, Any]]:
    """One stream; a row per question."""
    options = {"sink_tokens": cache.sinks, "sink_window": cache.window}
    stream = api.json("/v1/streams", {**({} if bos is None else {"tokens": [bos]}), **options})[
        "id"
    ]
    path = f"/v1/streams/{stream}/append"
    asked = 0
    for first in range(0, lines, QUESTION_EVERY):
        last = first + QUESTION_EVERY
        distance = distances[asked % len(distances)]
        asked += 1
        number = last - distance if distance != UNSEEN else lines + asked
        if number < 0:
            continue
        question = form.question(number)
        tokens = [token for line in range(first, last) for token in form.line(line)]
        answer = api.json(
            path,
            {
                "tokens": tokens + question.prompt,
                "generate": {**GREEDY, "max_tokens": question.tokens},
                "return_token_ids": True,
            },
        )
        made = answer["token_ids"]
        yield {
            "line": last,
            "distance": distance,
            "position": answer["stream"]["position"],
            "right": question.judge(made),
        }
        api.json(path, {"tokens": form.line(number)[-1:]})  # the answer ends its line


def run(options: argparse.Namespace) -> None:
    """All caches, as far as they are not done yet."""
    store = Store(RESULTS / options.name, vars(options))
    measure(store, options)
    store.pack()


def measure(store: Store, options: argparse.Namespace) -> None:
    tokenizer = tokenizer_of(str(options.model))
    caches = [Cache(sinks, window) for window in options.windows for sinks in options.sinks]
    todo = [cache for cache in caches if not store.done(cache.unit)]
    if not todo:
        return
    flags = ["--served-model-name", SERVED, "--dtype", options.dtype, "--enforce-eager"]
    flags += ["--block-size", "32", "--kv-policy", "sink", "--sink-stride", "32"]
    flags += ["--sink-window", str(max(options.windows)), "--sink-tokens", str(max(options.sinks))]
    with Server([str(options.model), *flags], {"VLLM_PLUGINS": "sink_vllm"}) as server:
        server.wait(lambda waited: None)
        api = Api(server)
        for cache in todo:
            forms = [FORMS[options.form](tokenizer, seed) for seed in range(options.streams)]

            def one(form: Form, cache: Cache = cache) -> list[dict[str, Any]]:
                bos = tokenizer.bos_token_id
                return list(ask(api, form, cache, bos, options.lines, options.distances))

            facts = {"sinks": cache.sinks, "window": cache.window, "form": options.form}
            answered(store, cache.unit, {"benchmark": "streameval", **facts}, one, forms)


def main() -> int:
    """Parse the options and run; 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="streameval", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--name", required=True, help="folder of the results")
    parser.add_argument("--form", choices=FORMS, default="copy")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lines", type=int, default=600, help="lines of every stream")
    parser.add_argument(
        "--streams", type=int, default=4, help="streams per cache, other lines each"
    )
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--windows", type=int, nargs="+", default=[60, 124, 220])
    parser.add_argument(
        "--distances", type=int, nargs="+", default=[1, 3, 5, 10, 15, 20, 40, UNSEEN]
    )
    stop_on_terminate()
    random.seed(0)
    try:
        run(parser.parse_args())
    except (ServerError, StoreError) as error:
        print(f"streameval: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
