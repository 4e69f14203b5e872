"""Question: does one endless stream cost the same memory and time at its end as at its beginning?

    python -m benchmarks.soak [--tokens 100000] [--name NAME] [-- any further vllm serve options]

One stream from `/v1/completions` of a real `vllm serve --kv-policy sink` with the repository's
model. Every few seconds one row is written: tokens the engine has generated and KV pages in use
(vLLM's own metrics), evictions, resident memory of every process of the server. What is concluded,
and from what:

- KV pages: over the last tenth of the stream never more in use than over the tenth right after the
  first eviction (between two evictions the number may move by the pages of one stride);
- memory: for every process, mean RSS over the last tenth of the stream against mean RSS over the
  second tenth (the first is warm-up) grows by at most 1%;
- rate: tokens per second over the last tenth of the stream are at least 0.97 of those over the
  tenth right after the first eviction.

Exit code 0 when all three hold. Not to be concluded: anything about absolute speed (client and
server share the machine), or about many streams (see `overhead.py`).
"""

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import openai

from benchmarks.common import MODEL, Results, default_name
from examples.serving import Server, ServerError, stop_on_terminate

RSS_GROWTH = 0.01
RATE_RATIO = 0.97
PROMPT = "import os\n\n\ndef main():\n"


@dataclass(frozen=True, slots=True)
class Sample:
    """The server after ``tokens`` tokens, ``seconds`` after the request was sent."""

    seconds: float
    tokens: int
    kv_pages: int
    evictions: int
    rss: dict[str, int]


class SoakError(Exception):
    """The stream did not do what the benchmark measures."""


def consume(server: Server, tokens: int) -> int:
    """Read one stream of ``tokens`` tokens to its end; returns the tokens received."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=None)
    stream = client.completions.create(
        model="soak",
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=1.0,
        seed=0,
        stream=True,
        extra_body={"stream_options": {"include_usage": True}, "ignore_eos": True},
    )
    received = [part.usage.completion_tokens for part in stream if part.usage is not None]
    return received[-1]


def soak(server: Server, tokens: int, interval: float) -> Iterator[Sample]:
    """Stream, and yield a sample every ``interval`` seconds while the stream is alive."""
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(consume, server, tokens)
        started = time.monotonic()
        while not wait([client], interval).done:
            metrics = server.metrics()
            done = int(metrics.total("vllm:generation_tokens_total"))
            if done < tokens:
                seconds = time.monotonic() - started
                yield Sample(seconds, done, metrics.kv_pages, metrics.evictions, server.rss())
        if client.result() < tokens:
            raise SoakError(f"the stream ended after {client.result()} of {tokens} tokens")


def rate(samples: list[Sample]) -> float:
    """Tokens per second between the first and the last of the samples."""
    first, last = samples[0], samples[-1]
    return (last.tokens - first.tokens) / (last.seconds - first.seconds)


def verdict(samples: list[Sample], tokens: int) -> dict[str, Any]:
    """The three ratios, and whether they hold."""
    evicting = [sample for sample in samples if sample.evictions]
    if not evicting:
        raise SoakError("nothing was evicted: the stream was shorter than the cache")
    tenth = tokens / 10
    first = evicting[0].tokens
    begin = [sample for sample in evicting if sample.tokens <= first + tenth]
    early = [sample for sample in samples if tenth <= sample.tokens < 2 * tenth]
    late = [sample for sample in samples if sample.tokens >= tokens - tenth]
    counts = len(begin), len(early), len(late)
    if min(counts) < 2:
        raise SoakError(
            f"too few samples after the first eviction, in the second and in the last tenth "
            f"{counts}; use a shorter --interval or a longer stream"
        )
    growth = {
        name: fmean(sample.rss[name] for sample in late)
        / fmean(sample.rss[name] for sample in early)
        - 1
        for name in late[-1].rss
        if all(name in sample.rss for sample in (*early, *late))
    }
    pages = max(sample.kv_pages for sample in begin), max(sample.kv_pages for sample in late)
    rates = rate(begin), rate(late)
    return {
        "tokens": tokens,
        "evictions": evicting[-1].evictions,
        "kv_pages_after_first_eviction": pages[0],
        "kv_pages_at_end": pages[1],
        "rss_growth": growth,
        "rate_after_first_eviction": rates[0],
        "rate_at_end": rates[1],
        "rate_ratio": rates[1] / rates[0],
        "holds": pages[1] <= pages[0]
        and max(growth.values()) <= RSS_GROWTH
        and rates[1] / rates[0] >= RATE_RATIO,
    }


def run(options: argparse.Namespace) -> bool:
    """Serve, stream, write, conclude."""
    arguments = [str(options.model), "--served-model-name", "soak", "--enforce-eager"]
    arguments += ["--kv-policy", "sink", *options.serve]
    results = Results(options.name or default_name("soak"), vars(options))
    samples: list[Sample] = []
    with Server(arguments) as server, results.rows("samples.jsonl") as rows:
        print("starting the server", flush=True)
        server.wait(lambda waited: None)
        for sample in soak(server, options.tokens, options.interval):
            samples.append(sample)
            rows.add(**asdict(sample))
            before = samples[-2] if len(samples) > 1 else Sample(0, 0, 0, 0, {})
            speed = (sample.tokens - before.tokens) / max(sample.seconds - before.seconds, 1e-9)
            print(
                f"{sample.seconds:7.0f} s {sample.tokens:>9,} tokens {speed:6.0f} tokens/s "
                f"{sample.evictions:>6,} evictions {sample.kv_pages:>3} KV pages "
                f"{sum(sample.rss.values()) / 1e6:,.0f} MB",
                flush=True,
            )
    found = verdict(samples, options.tokens)
    results.summary(found)
    print(
        f"{'HOLDS' if found['holds'] else 'FAILS'}: {found['tokens']:,} tokens, "
        f"{found['evictions']:,} evictions; KV pages {found['kv_pages_after_first_eviction']} "
        f"after the first eviction, {found['kv_pages_at_end']} at the end; "
        f"RSS growth at most {max(found['rss_growth'].values()):+.2%} (allowed +{RSS_GROWTH:.0%}); "
        f"rate {found['rate_after_first_eviction']:.1f} to {found['rate_at_end']:.1f} tokens/s, "
        f"ratio {found['rate_ratio']:.3f} (at least {RATE_RATIO})"
    )
    return bool(found["holds"])


def main() -> int:
    """Parse the options and run; 1 when a criterion fails or nothing could be measured."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the stream")
    parser.add_argument("--interval", type=float, default=5, help="seconds between samples")
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    parser.add_argument("serve", nargs="*", help="further options of `vllm serve`, after --")
    options = parser.parse_args()
    stop_on_terminate()
    try:
        return 0 if run(options) else 1
    except (SoakError, ServerError, OSError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
