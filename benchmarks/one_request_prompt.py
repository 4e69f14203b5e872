"""The prompt of `one_request`: sent, watched, and, where a run was interrupted, gone on with."""

import json
import math
import statistics
import time
import urllib.request
from collections.abc import Iterable, Sequence
from itertools import pairwise
from threading import Thread
from typing import Any

from benchmarks.quality.texts import REPEATED
from benchmarks.rows import Row, Rows
from examples.serving import Server

BUCKET = 1000  # tokens per row of losses
SAMPLE = 5.0  # seconds between two looks at the server


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
        self._thread = Thread(target=self._read, daemon=True)
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


def ask(server: Server, method: str) -> Any:
    """What the worker's method of that name returns."""
    request = urllib.request.Request(
        f"{server.url}/collective_rpc",
        json.dumps({"method": method}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["results"][0]


class Losses:
    """Mean losses of the tokens of a prompt, by thousands: position 1 to 1,000 first."""

    def __init__(self, known: Iterable[Row], rows: Rows) -> None:
        """
        Args:
            known: rows of earlier starts of the run.
            rows: where new ones go.
        """
        self._means = {row["position"]: row["loss"] for row in known}
        self._rows = rows
        self._pending: list[float] = []
        self._first = 1  # position of the first of them

    def begin(self, cached: int) -> None:
        """The server computes from that position on; the recorder notes the token behind."""
        assert not self._pending
        self._first = cached + 1

    @property
    def position(self) -> int:
        """Of the next token whose loss will be noted."""
        return self._first + len(self._pending)

    def note(self, losses: Iterable[float]) -> None:
        """Losses of the next tokens, natural logarithm."""
        self._pending += losses
        self._drop((1 - self._first) % BUCKET)  # begun within a thousand: known from before
        while len(self._pending) >= BUCKET:
            if self._first not in self._means:
                mean = statistics.fmean(self._pending[:BUCKET])
                self._means[self._first] = mean
                self._rows.add(position=self._first, loss=round(mean, 6))
            self._drop(BUCKET)

    def _drop(self, count: int) -> None:
        count = min(count, len(self._pending))
        del self._pending[:count]
        self._first += count

    def perplexity(self, repetition: int) -> float:
        """Of a repetition of the text, counted from 0; it begins at position 1, behind BOS.

        Raises:
            RequestError: a part of it was computed by a server that ended before it was noted.
        """
        first = repetition * REPEATED + 1
        positions = range(first, first + REPEATED, BUCKET)
        missing = [position for position in positions if position not in self._means]
        if missing:
            raise RequestError(f"losses from position {missing[0]} on were lost; begin a new run")
        return math.exp(statistics.fmean(self._means[position] for position in positions))


def feed(server: Server, stream: Stream, tokens: int, losses: Losses, samples: Rows) -> None:
    """Wait for the prompt's end.

    Progress is printed every 5 seconds. A server that found pages of the prompt begins behind
    them.
    """
    started = time.perf_counter()
    cached = None
    while losses.position < tokens:
        time.sleep(SAMPLE)
        server.check()
        stream.check()
        found = [loss for some in ask(server, "quality_take_losses").values() for loss in some]
        if cached is None:
            if not found:
                print(f"{time.perf_counter() - started:7.0f} s the prompt is hashed", flush=True)
                continue
            time.sleep(1)  # what has been found in the cache is told behind the first step
            cached = round(server.metrics().total("vllm:prefix_cache_hits_total"))
            losses.begin(cached)
        losses.note(found[: tokens - losses.position])
        metrics, rss = server.metrics(), server.rss()
        seconds = time.perf_counter() - started
        samples.add(
            seconds=seconds,
            tokens=losses.position,
            kv_pages=metrics.kv_pages,
            evictions=metrics.evictions,
            rss=rss,
        )
        print(
            f"{seconds:7.0f} s {losses.position:>12,} of {tokens:,} tokens "
            f"{metrics.kv_pages:>3} KV pages {sum(rss.values()) / 1e6:,.0f} MB",
            flush=True,
        )


def perplexities(losses: Losses, tokens: int) -> dict[str, float]:
    """Of the second and of the last repetition of the text that is whole."""
    second, last = losses.perplexity(1), losses.perplexity((tokens - 1) // REPEATED - 1)
    return {
        "perplexity_second_100k": second,
        "perplexity_last_100k": last,
        "perplexity_ratio": last / second,
    }


def memory(samples: Sequence[Row]) -> dict[str, Any]:
    """Growth per process, pages, and speed, from the second to the last tenth of what one server
    has computed: of all starts of the run, the one that computed most."""
    starts = [0, *(i for i in range(1, len(samples)) if is_start(samples, i)), len(samples)]
    servers = [samples[begin:end] for begin, end in pairwise(starts)]
    samples = max(servers, key=lambda one: one[-1]["tokens"] - one[0]["tokens"])
    begin, end = samples[0]["tokens"], samples[-1]["tokens"]
    tenth = (end - begin) / 10
    early = [one for one in samples if begin + tenth <= one["tokens"] < begin + 2 * tenth]
    late = [one for one in samples if one["tokens"] >= end - tenth]
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
        "servers": len(servers),
        "memory_of_tokens": [begin, end],
        "kv_pages": [max(one["kv_pages"] for one in part) for part in (early, late)],
        "evictions": late[-1]["evictions"],
        "prompt_seconds": samples[-1]["seconds"],
        "prompt_time_ratio": pace[1] / pace[0],
    }


def is_start(samples: Sequence[Row], index: int) -> bool:
    """Whether the run was interrupted before a sample: seconds count from a server's start."""
    return bool(samples[index]["seconds"] < samples[index - 1]["seconds"])
