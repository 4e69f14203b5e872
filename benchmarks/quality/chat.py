"""Question: does a chat that never ends answer as well as a fresh one (paper, Table 5)?

    python -m benchmarks.quality.chat --name NAME [--model MODEL] [--rounds 60]

Rounds are sent to ``/v1/chat/completions`` of a real ``vllm serve --kv-policy sink``:

- ``one-shot``: every round is a chat of its own;
- ``sinks``, ``no sinks``: every round follows all rounds before it, in one chat that is resent and
  far longer than the cache, with 4 sink tokens and with none.

A round gives some lines and asks for one of them. In the form a small model can do, the lines
are real code, and the assistant has begun to repeat one (the last message is to be continued,
``continue_final_message``); right is the same continuation, character by character. Only the
history differs between the arms, so the comparison is one-shot accuracy against streaming
accuracy, not accuracy itself.
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
from benchmarks.quality.forms import LONGEST, code_lines
from benchmarks.quality.store import Store, StoreError
from benchmarks.service import Api
from examples.serving import Server, ServerError, stop_on_terminate

SERVED = "model"
LINES = 4  # lines given in a round
CHARACTERS = 5  # of the continuation that are compared
ARMS: dict[str, dict[str, Any] | None] = {
    "one-shot": None,
    "sinks": {"sink_tokens": 4},
    "no-sinks": {"sink_tokens": 0},
}
"""Options of the streaming arms; a fresh chat has no history."""


@dataclass(frozen=True, slots=True)
class Round:
    """Lines, and the one of them that is begun again."""

    lines: tuple[str, ...]
    asked: int

    @property
    def begun(self) -> str:
        line = self.lines[self.asked]
        return line[: len(line) // 2]

    @property
    def rest(self) -> str:
        line = self.lines[self.asked]
        return line[len(line) // 2 :]

    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": "\n" + "\n".join(self.lines)},
            {"role": "assistant", "content": f"\n{self.begun}"},
        ]

    def finished(self) -> list[dict[str, str]]:
        """The round as the history of the next ones: with the right answer."""
        return [self.messages()[0], {"role": "assistant", "content": f"\n{self.begun}{self.rest}"}]


def rounds(count: int, seed: int) -> list[Round]:
    """Rounds of different lines."""
    draw = random.Random(seed)
    lines = code_lines(seed)
    return [
        Round(tuple(lines[i * LINES : (i + 1) * LINES]), draw.randrange(LINES))
        for i in range(count)
    ]


def chat(api: Api, arm: str, todo: list[Round]) -> Iterator[dict[str, Any]]:
    """One conversation; a row per round."""
    options = ARMS[arm]
    history: list[dict[str, str]] = []
    for number, one in enumerate(todo, start=1):
        answer = api.json(
            "/v1/chat/completions",
            {
                "model": SERVED,
                "messages": [*history, *one.messages()],
                "add_generation_prompt": False,
                "continue_final_message": True,
                "max_tokens": CHARACTERS,
                "temperature": 0,
                "ignore_eos": True,
                "vllm_xargs": options or {},
            },
        )
        made = answer["choices"][0]["message"]["content"]
        yield {
            "round": number,
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "back": LINES - one.asked,
            "right": made[:CHARACTERS] == one.rest[:CHARACTERS],
        }
        if options is not None:
            history += one.finished()


def run(options: argparse.Namespace) -> None:
    """All arms, as far as they are not done yet."""
    store = Store(RESULTS / options.name, vars(options))
    measure(store, options)
    store.pack()


def measure(store: Store, options: argparse.Namespace) -> None:
    flags = ["--served-model-name", SERVED, "--dtype", options.dtype, "--enforce-eager"]
    flags += ["--block-size", "32", "--kv-policy", "sink", "--sink-stride", "32"]
    todo = [arm for arm in ARMS if not store.done(arm)]
    if not todo:
        return
    with Server([str(options.model), *flags]) as server:
        server.wait(lambda waited: None)
        api = Api(server)
        for arm in todo:
            conversations = [rounds(options.rounds, seed) for seed in range(options.chats)]

            def one(conversation: list[Round], arm: str = arm) -> list[dict[str, Any]]:
                return list(chat(api, arm, conversation))

            facts = {"benchmark": "chat", "arm": arm, "longest": LONGEST}
            answered(store, arm, facts, one, conversations)


def main() -> int:
    """Parse the options and run; 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="chat", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--name", required=True, help="folder of the results")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of every chat")
    parser.add_argument("--chats", type=int, default=4, help="chats per arm, other lines each")
    stop_on_terminate()
    try:
        run(parser.parse_args())
    except (ServerError, StoreError) as error:
        print(f"chat: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
