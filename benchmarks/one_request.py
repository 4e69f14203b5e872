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

A request ends with its server, so a run that is interrupted begins anew. A plot of a run:
`python -m benchmarks.one_request_figure benchmarks/results/RUN`.
"""

import argparse
import json
import math
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import MODEL, Results, default_name, describe
from benchmarks.quality.arms import RECORDER
from benchmarks.quality.texts import REPEATED, Texts
from benchmarks.rows import Rows
from examples.serving import Server, ServerError, stop_on_terminate

PERPLEXITY, MEMORY, TIME = 0.005, 0.01, 1.01
BUCKET = 1000  # tokens per row of losses
SAMPLE = 5.0  # seconds between two looks at the server
SLICE = 3.0  # seconds of a server's turn
SETTLING = 5  # tokens after a server was woken that are not timed
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # its route /collective_rpc asks the recorder
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # see recorder.py
    "VLLM_PLUGINS": "sink_vllm",
}


class RequestError(Exception):
    """The server did not do what the benchmark measures."""


class Stream:
    """One streamed completion, read by a thread: when its tokens arrived."""

    def __init__(self, server: Server, prompt: list[int]) -> None:
        body = {
            "model": "one",
            "prompt": prompt,
            "max_tokens": 1 << 30,
            "ignore_eos": True,
            "temperature": 1.0,
            "seed": 0,
            "stream": True,
        }
        self._request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        self.arrivals: list[float] = []
        self.error: Exception | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=24 * 3600) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        self.arrivals.append(time.perf_counter())
                    if self._ended:
                        return
        except OSError as error:
            self.error = error

    def check(self) -> None:
        """Raise if the request has ended, which it never does by itself."""
        if self.error is not None or not self._thread.is_alive():
            raise RequestError(f"the request ended: {self.error or 'the answer was complete'}")

    def end(self) -> None:
        self._ended = True


def serve(options: argparse.Namespace, *more: str) -> Server:
    arguments = [str(options.model), "--served-model-name", "one", "--enforce-eager"]
    arguments += ["--kv-policy", "sink", "--dtype", "float32", *more]
    return Server(arguments, ENVIRONMENT)


def ask(server: Server, method: str) -> Any:
    """What the worker's method of that name returns."""
    request = urllib.request.Request(
        f"{server.url}/collective_rpc",
        json.dumps({"method": method}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["results"][0]


def feed(server: Server, stream: Stream, tokens: int, losses: Rows, samples: Rows) -> Any:
    """Wait for the prompt's end; what was concluded of losses and memory."""
    started = time.perf_counter()
    noted: list[float] = []
    seen: list[dict[str, Any]] = []
    written = 0
    while len(noted) < tokens - 1:
        time.sleep(SAMPLE)
        server.check()
        stream.check()
        for found in ask(server, "quality_take_losses").values():
            noted += found[: tokens - 1 - len(noted)]
        while written + BUCKET <= len(noted):
            loss = statistics.fmean(noted[written : written + BUCKET])
            losses.add(position=written + 1, loss=round(loss, 6))
            written += BUCKET
        metrics = server.metrics()
        seen.append(
            {
                "seconds": time.perf_counter() - started,
                "tokens": len(noted) + 1,
                "kv_pages": metrics.kv_pages,
                "evictions": metrics.evictions,
                "rss": server.rss(),
            }
        )
        samples.add(**seen[-1])
        print(
            f"{seen[-1]['seconds']:7.0f} s {seen[-1]['tokens']:>12,} of {tokens:,} tokens "
            f"{seen[-1]['kv_pages']:>3} KV pages {sum(seen[-1]['rss'].values()) / 1e6:,.0f} MB",
            flush=True,
        )
    return {**perplexities(noted), **memory(seen, tokens)}


def perplexities(losses: list[float]) -> dict[str, float]:
    """Of the second and of the last repetition of the text that is whole.

    ``losses[i]`` is of stream position ``i + 1``; the text proper begins there, behind BOS.
    """
    repetitions = len(losses) // REPEATED
    second, last = (
        math.exp(statistics.fmean(losses[n * REPEATED : (n + 1) * REPEATED]))
        for n in (1, repetitions - 1)
    )
    return {
        "perplexity_second_100k": second,
        "perplexity_last_100k": last,
        "perplexity_ratio": last / second,
    }


def memory(samples: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Growth per process, pages, and speed, from the second to the last tenth of the prompt."""
    tenth = tokens / 10
    early = [one for one in samples if tenth <= one["tokens"] < 2 * tenth]
    late = [one for one in samples if one["tokens"] >= tokens - tenth]
    if min(len(early), len(late)) < 2:
        raise RequestError(f"{len(early)} and {len(late)} samples are too few; use more --tokens")
    growth = {
        name: statistics.fmean(one["rss"][name] for one in late)
        / statistics.fmean(one["rss"][name] for one in early)
        - 1
        for name in late[-1]["rss"]
        if all(name in one["rss"] for one in (*early, *late))
    }
    pace = [
        (part[-1]["seconds"] - part[0]["seconds"]) / (part[-1]["tokens"] - part[0]["tokens"])
        for part in (early, late)
    ]
    return {
        "rss_growth": growth,
        "kv_pages": [max(one["kv_pages"] for one in part) for part in (early, late)],
        "evictions": late[-1]["evictions"],
        "prompt_seconds": samples[-1]["seconds"],
        "prompt_time_ratio": pace[1] / pace[0],
    }


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
    results = Results(options.name or default_name("one_request"), vars(options))
    quietly: Callable[[float], None] = lambda _waited: None  # noqa: E731
    with serve(options, "--worker-extension-cls", RECORDER) as server:
        server.wait(quietly)
        ask(server, "quality_start")
        with results.rows("losses.jsonl") as losses, results.rows("samples.jsonl") as samples:
            stream = Stream(server, text)
            found = feed(server, stream, options.tokens, losses, samples)
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
    print(json.dumps(found, indent=2))
    return all(found["holds"].values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="one_request", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of the prompt")
    parser.add_argument("--young", type=int, default=256, help="half of the young stream's prompt")
    parser.add_argument("--rounds", type=int, default=20, help="turns of both servers")
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    return parser.parse_args()


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
