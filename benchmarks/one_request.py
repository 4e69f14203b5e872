"""Question: is a request of four million tokens as good, as small and as fast at its end?

    python -m benchmarks.one_request [--tokens 4000000] [--rounds 20] [--name NAME]

Figure 5 of the paper (arXiv 2309.17453) through the product: one request to a real
`vllm serve --kv-policy sink` with the repository's model. Its prompt is `--tokens` tokens of a text
that repeats itself every 100,000 (`quality/texts.py`), and when that has been computed it goes on
generating. `quality/recorder.py` notes the loss of every prompt token in the worker.

Concluded:

- perplexity of the last 100,000 tokens ÷ that of the second, which are the same text (aim: within
  0.5%);
- memory: for every process of the server, mean resident bytes over the last tenth of the prompt ÷
  over the second tenth (aim: within 1%);
- time: when the prompt has ended, a second server begins a young stream, a prompt of two
  capacities, and both generate in turns, one server stopped (SIGSTOP) while the other runs. Seconds
  per token of the old stream ÷ of the young one, median over rounds (aim: at most 1.01).

Also written: seconds per prompt token over the last tenth ÷ over the second, which has whatever
else the machine did in it. Not to be concluded: absolute speed, as the losses are computed beside.

The server keeps pages of the prompt on disk (`--sink-disk`), every 65,536 tokens. A run that was
interrupted goes on with `--name NAME --resume`: the same request is sent again, its first tokens
are found and not computed, and memory is that of the server that computed most. A plot of a run:
`python -m benchmarks.one_request_figure benchmarks/results/RUN`.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import MODEL, Results, default_name, describe
from benchmarks.one_request_prompt import (
    Losses,
    RequestError,
    Stream,
    ask,
    feed,
    memory,
    perplexities,
)
from benchmarks.quality.arms import RECORDER
from benchmarks.quality.texts import REPEATED, Texts
from benchmarks.rows import Rows, read
from examples.serving import Server, ServerError, stop_on_terminate

PERPLEXITY, MEMORY, TIME = 0.005, 0.01, 1.01
SLICE = 3.0  # seconds of a server's turn
SETTLING = 5  # tokens after a server was woken that are not timed
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # its route /collective_rpc asks the recorder
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # see recorder.py
    "VLLM_PLUGINS": "sink_vllm",
}


def serve(options: argparse.Namespace, *more: str) -> Server:
    arguments = [str(options.model), "--served-model-name", "one", "--enforce-eager"]
    arguments += ["--kv-policy", "sink", "--dtype", "float32", *more]
    return Server(arguments, ENVIRONMENT)


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """All processes of a server stand still meanwhile."""
    family = server.processes()
    for one in family:
        one.suspend()
    try:
        yield
    finally:
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.resume()


def per_token(stream: Stream) -> float:
    """Seconds per token of a stream whose server has just been woken."""
    first = len(stream.arrivals)
    time.sleep(SLICE)
    stream.check()
    arrivals = stream.arrivals[first + SETTLING :]
    if len(arrivals) < SETTLING:
        raise RequestError(f"only {len(arrivals)} tokens in {SLICE} s")
    return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)


def take_turns(
    old: tuple[Server, Stream], young: tuple[Server, Stream], rounds: int, rows: Rows
) -> Any:
    """Both generate, one at a time; who begins alternates."""
    order = [("old", old, young), ("young", young, old)]
    ratios = []
    for number in range(rounds):
        found = {}
        for name, (_, stream), (other, _) in order:
            with stopped(other):
                found[name] = per_token(stream)
            rows.add(round=number, arm=name, seconds_per_token=found[name])
        ratios.append(found["old"] / found["young"])
        print(f"round {number + 1}: old ÷ young {ratios[-1]:.3f}", flush=True)
        order.reverse()
    return {"time_ratio": describe(ratios)}


def run(options: argparse.Namespace) -> bool:
    """The prompt, the turns, the verdict."""
    text = Texts(str(options.model)).get("repeated", options.tokens)
    name = options.name or default_name("one_request")
    results = Results(name, vars(options), go_on=options.resume)
    pages = Path(tempfile.gettempdir()) / f"sink-vllm-{name}"
    # Host memory for a few windows: what of it the engine core has read counts as its own, too.
    disk = ["--sink-host-gib", "0.01", "--sink-disk", str(pages), "--sink-disk-gib", "1"]
    quietly: Callable[[float], None] = lambda _waited: None  # noqa: E731
    with serve(options, "--worker-extension-cls", RECORDER, *disk) as server:
        server.wait(quietly)
        ask(server, "quality_start")
        with (
            results.rows("losses.jsonl", go_on=options.resume) as losses,
            results.rows("samples.jsonl", go_on=options.resume) as samples,
        ):
            computed = Losses(read(results.folder)["losses.jsonl"], losses)
            stream = Stream(server, text)
            feed(server, stream, options.tokens, computed, samples)
        samples_of_all = read(results.folder)["samples.jsonl"]
        found = {**perplexities(computed, options.tokens), **memory(samples_of_all)}
        with serve(options, "--worker-extension-cls", RECORDER) as other:
            with stopped(server):
                other.wait(quietly)
                ask(other, "quality_start")
                young = Stream(other, text[: 2 * options.young])
                while not young.arrivals:
                    young.check()
                    time.sleep(0.1)
            with results.rows("turns.jsonl") as rows:
                found |= take_turns((server, stream), (other, young), options.rounds, rows)
            found["generated"] = {"old": len(stream.arrivals), "young": len(young.arrivals)}
            young.end()
        stream.end()
    found["holds"] = {
        "perplexity": abs(found["perplexity_ratio"] - 1) <= PERPLEXITY,
        "memory": max(found["rss_growth"].values()) <= MEMORY,
        "time": found["time_ratio"]["median"] <= TIME,
    }
    results.summary(found)
    shutil.rmtree(pages, ignore_errors=True)
    print(json.dumps(found, indent=2))
    return all(found["holds"].values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="one_request", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of the prompt")
    parser.add_argument("--young", type=int, default=256, help="half of the young stream's prompt")
    parser.add_argument("--rounds", type=int, default=20, help="turns of both servers")
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the interrupted run of that --name"
    )
    options = parser.parse_args()
    if options.resume and options.name is None:
        parser.error("--resume goes on with one run; give its --name")
    if options.tokens <= 3 * REPEATED:
        parser.error(
            f"--tokens={options.tokens} has no last repetition of {REPEATED:,} tokens behind the "
            f"second; use more than {3 * REPEATED}"
        )
    return options


def main() -> int:
    """0 when every figure holds; 1 when one does not, or nothing could be measured."""
    stop_on_terminate()
    try:
        return 0 if run(parse()) else 1
    except (RequestError, ServerError, OSError) as error:
        print(f"one_request: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
