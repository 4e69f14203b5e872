"""`make demo`: an endless stream from the standard vLLM server, at constant memory.

Starts `vllm serve` with the repository's small model and `--kv-policy sink`, sends a prompt
several times longer than the context the model was trained for, streams at least twenty times
that context through the OpenAI API, and shows what it costs while it runs. The stream would never
end: the client stops listening.

    python -m examples.demo [--model DIR] [--times 20] [-- any further vllm serve options]

With `--open` it serves the page at `/streams` instead, with such a stream on it, until Ctrl-C.
"""

import argparse
import json
import random
import sys
import textwrap
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import openai

from examples.demo_page import page
from examples.serving import Server, ServerError, for_few_processors, stop_on_terminate

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "models" / "pystream-2.5m"
PROMPT_CONTEXTS = 5  # the prompt is about this many times longer than the model's context
CHARACTERS_PER_TOKEN = 2.8  # of Python source, roughly, with a small vocabulary
TAIL_CHARACTERS = 700


class DemoError(Exception):
    """The demo ran, but did not show what it is there to show."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of the stream: new text, and tokens so far."""

    text: str
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment of the stream."""

    seconds: float
    tokens: int
    evictions: int
    evicted_tokens: int
    kv_pages: int
    rss: int

    @classmethod
    def take(cls, server: Server, seconds: float, tokens: int) -> "Sample":
        metrics = server.metrics()
        return cls(
            seconds=seconds,
            tokens=tokens,
            evictions=metrics.evictions,
            evicted_tokens=metrics.evicted_tokens,
            kv_pages=metrics.kv_pages,
            rss=sum(server.rss().values()),
        )

    def line(self, before: "Sample | None", goal: int) -> str:
        tokens, seconds = self.tokens, self.seconds
        if before is not None:
            tokens, seconds = tokens - before.tokens, seconds - before.seconds
        return (
            f"  {self.tokens:>7,} / {goal:,} tokens  {tokens / seconds:5.0f} tokens/s  "
            f"{self.evictions:>5,} evictions  {self.kv_pages:>3} KV pages  "
            f"{self.rss / 1e9:.2f} GB RSS"
        )


class Status:
    """One line that is rewritten on a terminal, and a new line now and then elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.interval = 0.0 if self.live else 10.0
        self.last = float("-inf")

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", flush=True)

    def end(self, text: str) -> None:
        """Replace the line for good."""
        print(f"\r\033[K{text}" if self.live else text, flush=True)


def long_prompt(context: int) -> str:
    """Python source of the standard library, about ``PROMPT_CONTEXTS`` contexts long."""
    source = Path(random.__file__).read_text() + Path(textwrap.__file__).read_text()
    return source[: round(PROMPT_CONTEXTS * context * CHARACTERS_PER_TOKEN)]


def completion(server: Server, prompt: str) -> Generator[Chunk, None, None]:
    """What follows ``prompt``, as it arrives from `/v1/completions`, for as long as one listens."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with client.completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=1_000_000_000,
        temperature=1.0,
        top_p=0.95,
        stream=True,
        # vLLM's extensions: token counts in every piece, and no end before max_tokens.
        extra_body={
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "ignore_eos": True,
        },
    ) as answer:
        for part in answer:
            if part.usage is not None:
                text = part.choices[0].text if part.choices else ""
                yield Chunk(text, part.usage.prompt_tokens, part.usage.completion_tokens)


def watch(server: Server, context: int, goal: int) -> tuple[list[Sample], str]:
    """Listen for ``goal`` tokens; returns a sample per second and the end of the text."""
    status, samples, tail = Status(), list[Sample](), ""
    sent = time.monotonic()
    first = 0.0
    with closing(completion(server, long_prompt(context))) as chunks:
        for chunk in chunks:
            now = time.monotonic()
            if not first:
                first = now
                if chunk.prompt_tokens < 2 * context:
                    raise DemoError(f"the prompt has only {chunk.prompt_tokens} tokens")
                ratio = chunk.prompt_tokens / context
                print(
                    f"  prompt of {chunk.prompt_tokens:,} tokens, {ratio:.1f} x the trained "
                    f"context of {context}: first token after {now - sent:.1f} s"
                )
            tail = (tail + chunk.text)[-TAIL_CHARACTERS:]
            last = chunk.tokens >= goal
            if last or now - first > 1 + (samples[-1].seconds if samples else 0):
                sample = Sample.take(server, now - first, chunk.tokens)
                recent = next((old for old in samples if sample.seconds - old.seconds < 10), None)
                (status.end if last else status.show)(sample.line(recent, goal))
                samples.append(sample)
            if last:
                return samples, tail
    raise DemoError(f"the stream ended before {goal} tokens")


def summary(samples: list[Sample], context: int) -> str:
    """One line that says what happened.

    Raises:
        DemoError: nothing was evicted, so the demo showed nothing.
    """
    last = samples[-1]
    if last.evictions == 0:
        raise DemoError("nothing was evicted: --kv-policy sink was not at work")
    pages = sorted({sample.kv_pages for sample in samples})
    pages_text = f"{pages[0]}" if len(pages) == 1 else f"{pages[0]} to {pages[-1]}"
    return (
        f"{last.tokens:,} tokens, {last.tokens / context:.0f} x the trained context, in "
        f"{last.seconds:.0f} s ({last.tokens / last.seconds:.0f} tokens/s); "
        f"{last.evictions:,} evictions of {last.evicted_tokens:,} tokens; "
        f"{pages_text} KV pages from beginning to end; "
        f"RSS {samples[0].rss / 1e9:.2f} GB after {samples[0].tokens:,} tokens, "
        f"{last.rss / 1e9:.2f} GB at the end"
    )


def run(options: argparse.Namespace) -> None:
    """Serve, stream, report."""
    config = options.model / "config.json"
    if not config.is_file():
        raise DemoError(
            f"{options.model} is not a model: it has no config.json; give another --model"
        )
    context = json.loads(config.read_text())["max_position_embeddings"]
    # Eager, because compiling would take longer than the demo.
    arguments = [str(options.model), "--served-model-name", "demo", "--enforce-eager"]
    arguments += ["--kv-policy", "sink", *options.serve]
    if options.open:
        page(arguments, long_prompt(context), options.times * context)
        return
    with Server(arguments, for_few_processors()) as server:
        print("$", " ".join(["vllm serve", *arguments]).replace(f"{ROOT}/", ""), flush=True)
        status = Status()
        server.wait(lambda waited: status.show(f"  starting, {waited:.0f} s"))
        status.end(f"  serving at {server.url}/v1")
        samples, tail = watch(server, context, options.times * context)
        print("  stopping the server", flush=True)
    print(f"\nThe end of the text:\n\n{textwrap.indent(tail, '  | ', lambda line: True)}\n")
    print(summary(samples, context))


def main() -> int:
    """Parse the options and run; 1 with one sentence when the demo shows nothing."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model to serve")
    parser.add_argument(
        "--times", type=int, default=20, help="tokens to stream, in trained contexts (default 20)"
    )
    parser.add_argument(
        "--open", action="store_true", help="serve the page at /streams, until Ctrl-C"
    )
    parser.add_argument("serve", nargs="*", help="further options of `vllm serve`, after --")
    options = parser.parse_args()
    stop_on_terminate()
    try:
        run(options)
    except (DemoError, ServerError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
