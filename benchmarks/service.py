"""Question: does the 150th turn of a conversation start as fast as the 10th, and cost as little?

    python -m benchmarks.service [--turns 150] [--turn-tokens 400] [--conversations 64]

Arms, over HTTP against a real `vllm serve --kv-policy sink` with the repository's model:

- `chat`: `/v1/chat/completions`, the whole history resent with every turn.
- `streams`: `/v1/streams`, only what is new.
- `crowd`: many such chats at once, on a KV cache that holds a quarter of them.

Measured per turn: time to first token (client side), prompt tokens, and computed prompt tokens =
prompt tokens - `cached_tokens` of the answer's usage. Reported: medians of late and early turns,
their ratio, and whether some turns give the same tokens as the same conversation as one prompt
that no page is cached of (`cache_salt`), which is one uninterrupted stream.

Late and early turns of one conversation are minutes apart, in which the speed of a shared machine
changes more than what is measured. So the last turns alternate with the early turns of other
conversations on the same server, and `interleaved` compares these two.

What does not follow: the model is tiny, so the share of tokenizing the history in the time to
first token is far larger than with a model worth serving; the ratio of `chat` is an upper bound.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx

from benchmarks.common import MODEL, Results, default_name, describe
from benchmarks.rows import Rows
from examples.serving import Server
from sink_vllm.policy.schedule import Schedule, pages_per_stream

NAME = "model"
BLOCK = 32
SCHEDULE = Schedule(sink_tokens=4, window=188, stride=64)  # the model is trained for 256 tokens
_INTERLEAVED = 30  # turns, the last
GREEDY = {"temperature": 0, "ignore_eos": True}
WORDS = [
    "self",
    "value",
    "return",
    "index",
    "total",
    "count",
    "name",
    "list",
    "data",
    "item",
    "result",
    "first",
    "last",
    "next",
]


class Api:
    """One server."""

    def __init__(self, server: Server, key: str | None = None) -> None:
        self.server = server
        self._http = httpx.Client(
            base_url=server.url,
            timeout=3600,
            limits=httpx.Limits(max_connections=256),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
        )

    def get(self, path: str) -> dict[str, Any]:
        answer = self._http.get(path)
        answer.raise_for_status()
        parsed: dict[str, Any] = answer.json()
        return parsed

    def json(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        answer.raise_for_status()
        parsed: dict[str, Any] = answer.json()
        return parsed

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._http.stream("POST", path, json={**body, "stream": True}) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


class ChatArm:
    """A conversation that is resent with every turn."""

    def __init__(self, api: Api, output_tokens: int) -> None:
        self._api, self._output_tokens = api, output_tokens
        self.messages: list[dict[str, str]] = []

    def turn(self, question: str) -> dict[str, Any]:
        self.messages.append({"role": "user", "content": question})
        # No token ids: the first event would bring those of the whole prompt.
        options = {"stream_options": {"include_usage": True}}
        started, first, text = time.perf_counter(), 0.0, ""
        usage: dict[str, Any] = {}
        for event in self._api.events("/v1/chat/completions", {**self.body(), **options}):
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter() - started
                    text += piece
            usage = event.get("usage") or usage
        self.messages.append({"role": "assistant", "content": text})
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        return {
            "ttft_s": first,
            "prompt_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "computed_tokens": usage["prompt_tokens"] - cached,
            "output": text,
        }

    def body(self) -> dict[str, Any]:
        return {
            "model": NAME,
            "messages": self.messages,
            "max_tokens": self._output_tokens,
            **GREEDY,
        }

    def uninterrupted(self, turn: int) -> str:
        """Text of ``turn`` (from 1), from a prompt that no page is cached of."""
        body = {**self.body(), "messages": self.messages[: 2 * turn - 1]}
        body["cache_salt"] = random.randbytes(8).hex()
        answer = self._api.json("/v1/chat/completions", body)
        text: str = answer["choices"][0]["message"]["content"]
        return text


class StreamArm:
    """A conversation of which only what is new is sent, as token ids."""

    def __init__(self, api: Api, output_tokens: int) -> None:
        self._api, self._output_tokens = api, output_tokens
        self._id = api.json("/v1/streams", {})["id"]
        self._prompt: list[int] = []
        self._answer: list[int] = []
        self._lengths: list[int] = []

    def turn(self, question: str) -> dict[str, Any]:
        text = f"# user: {question}\n# assistant:"
        new = self._api.json("/tokenize", {"model": NAME, "prompt": text})["tokens"]
        body = {
            "tokens": new,
            "generate": {**GREEDY, "max_tokens": self._output_tokens},
            "return_token_ids": True,
        }
        started, first = time.perf_counter(), 0.0
        account: dict[str, Any] = {}
        for event in self._api.events(f"/v1/streams/{self._id}/append", body):
            first = first or time.perf_counter() - started
            account = event
        self._prompt += [*self._answer, *new]
        self._lengths.append(len(self._prompt))
        self._answer = account["token_ids"]
        return {
            "ttft_s": first,
            "prompt_tokens": len(self._prompt),
            "output_tokens": len(self._answer),
            "computed_tokens": account["usage"]["computed_tokens"],
            "output": self._answer,
        }

    def uninterrupted(self, turn: int) -> list[int]:
        """Tokens of ``turn`` (from 1), from a prompt that no page is cached of."""
        body = {
            "model": NAME,
            "prompt": self._prompt[: self._lengths[turn - 1]],
            "max_tokens": self._output_tokens,
            "return_token_ids": True,
            "cache_salt": random.randbytes(8).hex(),
            **GREEDY,
        }
        tokens: list[int] = self._api.json("/v1/completions", body)["choices"][0]["token_ids"]
        return tokens


Arm = ChatArm | StreamArm


def questions(turns: int, words: int, seed: int) -> list[str]:
    """Texts of about ``words`` words, different in every turn."""
    draw = random.Random(seed)
    return [
        " ".join(f"{draw.choice(WORDS)}{draw.randrange(100)}" for _ in range(words))
        for _ in range(turns)
    ]


ENVIRONMENT = {"VLLM_PLUGINS": "sink_vllm"}


def serve(
    pages: int, requests: int, *flags: str, environment: Mapping[str, str] = ENVIRONMENT
) -> Server:
    """The server of all arms: ``pages`` KV pages for streams, ``requests`` at once."""
    policy = ["--kv-policy", "sink", "--sink-tokens", str(SCHEDULE.sink_tokens)]
    policy += ["--sink-window", str(SCHEDULE.window), "--sink-stride", str(SCHEDULE.stride)]
    engine = ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"]
    engine += ["--block-size", str(BLOCK), "--enable-prompt-tokens-details"]
    engine += ["--num-gpu-blocks-override", str(pages + 1), "--max-num-seqs", str(requests)]
    return Server([str(MODEL), *engine, *policy, *flags], environment)


def long_chat(
    rows: Rows, make: Callable[[], Arm], name: str, texts: Sequence[str], checks: Sequence[int]
) -> dict[str, Any]:
    """All turns of one conversation; ``checks``: turns to compare with an uninterrupted stream."""
    arm = make()
    turns: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    equal: dict[int, bool] = {}
    beside = early_turns(make, len(texts[0].split()))
    for number, text in enumerate(texts, start=1):
        before = turns[-1]["prompt_tokens"] + turns[-1]["output_tokens"] if turns else 0
        if number > len(texts) - _INTERLEAVED:
            others.append(next(beside))
            rows.add(arm=f"{name}-beside", turn=number, **others[-1])
        turn = arm.turn(text)
        turn["new_tokens"] = turn["prompt_tokens"] - before
        rows.add(arm=name, turn=number, **turn)
        turns.append(turn)
    for number in checks:  # afterwards: they take the pages of the conversation
        equal[number] = arm.uninterrupted(number) == turns[number - 1]["output"]
        rows.add(arm=name, turn=number, equals_uninterrupted=equal[number])
    early, late = turns[10:20], turns[-10:]
    extra = [turn["computed_tokens"] - turn["new_tokens"] for turn in turns[10:]]
    ttft = {
        side: statistics.median(t["ttft_s"] for t in part)
        for side, part in (("early", early), ("late", late))
    }
    return {
        "turns": len(turns),
        "stream_tokens": turns[-1]["prompt_tokens"] + turns[-1]["output_tokens"],
        "ttft_early_s": ttft["early"],
        "ttft_late_s": ttft["late"],
        "ttft_ratio": ttft["late"] / ttft["early"],
        "interleaved": interleaved(turns[-len(others) :], others),
        "computed_minus_new_tokens": describe(extra),
        "equals_uninterrupted": {str(turn): same for turn, same in equal.items()},
    }


def early_turns(make: Callable[[], Arm], words: int) -> Iterator[dict[str, Any]]:
    """Turns 11 to 20 of one conversation after the other."""
    for seed in itertools.count(2):
        arm = make()
        for number, text in enumerate(questions(20, words, seed), start=1):
            turn = arm.turn(text)
            if number > 10:
                yield turn


def interleaved(
    late: Sequence[dict[str, Any]], early: Sequence[dict[str, Any]]
) -> dict[str, float | int]:
    """Medians of turns that alternated, and the ratio of these."""
    late_s, early_s = (statistics.median(t["ttft_s"] for t in side) for side in (late, early))
    tokens = round(statistics.mean(turn["prompt_tokens"] for turn in late))
    return {
        "turns": len(late),
        "late_tokens": tokens,
        "ttft_early_s": early_s,
        "ttft_late_s": late_s,
        "ttft_ratio": late_s / early_s,
    }


def crowd(rows: Rows, api: Api, conversations: int, turns: int, words: int) -> dict[str, Any]:
    """Many conversations at once; the last turn of every eighth is compared."""
    arms = [ChatArm(api, 16) for _ in range(conversations)]
    texts = [questions(turns, words, seed=100 + number) for number in range(conversations)]
    last: list[dict[str, Any]] = []
    started = time.perf_counter()
    with ThreadPoolExecutor(conversations) as pool:
        for number in range(turns):
            jobs = [
                pool.submit(arm.turn, text[number]) for arm, text in zip(arms, texts, strict=True)
            ]
            last = [job.result() for job in jobs]
            for conversation, turn in enumerate(last):
                rows.add(arm="crowd", conversation=conversation, turn=number + 1, **turn)
    elapsed = time.perf_counter() - started
    equal = [arms[n].uninterrupted(turns) == last[n]["output"] for n in range(0, conversations, 8)]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and api.server.metrics().kv_pages:
        time.sleep(0.2)
    return {
        "conversations": conversations,
        "turns": turns,
        "stream_tokens": last[0]["prompt_tokens"] + last[0]["output_tokens"],
        "elapsed_s": elapsed,
        "completed": len(last) == conversations,
        "equals_uninterrupted": all(equal),
        "pages_held_afterwards": api.server.metrics().kv_pages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=150)
    parser.add_argument("--turn-tokens", type=int, default=400, help="about so many are new")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--crowd-turns", type=int, default=20)
    parser.add_argument("--arms", nargs="+", default=["chat", "streams", "crowd"])
    parser.add_argument("--name", default=default_name("service"))
    args = parser.parse_args()
    per_stream = pages_per_stream(SCHEDULE, BLOCK)
    results = Results(args.name, vars(args) | {"schedule": str(SCHEDULE), "block_size": BLOCK})
    summary: dict[str, Any] = {}
    texts = questions(args.turns, max(args.turn_tokens * 2 // 7, 1), seed=1)
    checks = {args.turns // 10, args.turns // 3, args.turns}
    with results.rows("turns.jsonl") as rows:
        if {"chat", "streams"} & set(args.arms):
            # Room for the pages of all turns that alternate: a miss would be measured otherwise.
            with serve(64 * per_stream, 8) as server:
                server.wait(lambda _seconds: None)
                api = Api(server)
                for name, arm in (("chat", ChatArm), ("streams", StreamArm)):
                    if name in args.arms:
                        make = partial(arm, api, 16)
                        summary[name] = long_chat(rows, make, name, texts, sorted(checks))
        if "crowd" in args.arms:
            with serve(per_stream * args.conversations // 4, args.conversations) as server:
                server.wait(lambda _seconds: None)
                summary["crowd"] = crowd(
                    rows, Api(server), args.conversations, args.crowd_turns, 15
                )
    results.summary(summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
