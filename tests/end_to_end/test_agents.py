"""What agents ask for, far past evictions: answers by a JSON schema turn after turn, tool calls.

Text that a grammar determines to the last letter does not depend on what the model has forgotten,
so it must be the same with evictions and without.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from examples.serving import Server
from tests.conftest import ModelFactory
from tests.support.engine import BLOCK_SIZE, Engine, Policy, check_all_free, running_engine
from tests.support.judge import random_tokens
from tests.support.serving import Client, report
from tests.support.tiny_models import TinyLlama

POLICY = Policy(4, 220, 32)  # C = 256
TURNS = 20
QUESTION = 30  # tokens

CHAT = "/v1/chat/completions"
MODEL = "tiny"
SMALL = {"sink_window": 92}  # C = 128: what is below the server's capacity evicts
CITY = "Reykjavik, " * 12
NOTES = ["the quick brown fox jumps over the lazy dog " * 2] * 3
ARGUMENTS = {"city": CITY, "notes": NOTES, "days": 7}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {key: {"const": value} for key, value in arguments.items()},
                "required": list(arguments),
                "additionalProperties": False,
            },
        },
    }
    for name, arguments in (("weather", ARGUMENTS), ("nothing", {"why": "-"}))
]
WEATHER = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def engine(tiny_llama: ModelFactory) -> Iterator[Engine]:
    with running_engine(
        tiny_llama(TinyLlama(layers=2, max_positions=512)),
        POLICY,
        enable_prefix_caching=True,
        max_num_batched_tokens=300,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    ) as engine:
        yield engine
        check_all_free(engine)


def letters(count: int, seed: int) -> list[int]:
    """Tokens of a text, not of bytes that are none."""
    return [65 + token % 26 for token in random_tokens(count, seed)]


@pytest.mark.engine
@pytest.mark.parametrize("beginning", [40, 700])
def test_every_turn_by_a_schema_costs_what_is_new(engine: Engine, beginning: int) -> None:
    """Twenty turns that resend all of it: each computes what is new and at most a block more."""
    schema = {
        "type": "object",
        "properties": {"done": {"type": "boolean"}, "note": {"enum": ["ab" * 9, "xyz" * 7]}},
        "required": ["done", "note"],
        "additionalProperties": False,
    }
    grammar = StructuredOutputsParams(json=schema)
    conversation = letters(beginning, beginning)
    new, costs = beginning, []
    for turn in range(TURNS):
        (answer,) = engine.greedy([conversation], 200, structured_outputs=grammar, ignore_eos=False)
        assert answer.finish_reason == "stop"
        assert set(json.loads(answer.text)) == {"done", "note"}
        costs.append((len(conversation) - answer.cached_tokens, new))
        conversation = conversation + answer.tokens + letters(QUESTION, turn)
        new = QUESTION + 1  # the last token of an answer is not computed

    assert len(conversation) > 4 * POLICY.capacity
    assert all(cost <= new + BLOCK_SIZE for cost, new in costs), costs


@pytest.fixture(scope="module")
def client(tiny_llama: ModelFactory) -> Iterator[Client]:
    """A server that holds the requests of this file whole, unless they ask for a small window."""
    model = tiny_llama(TinyLlama(layers=2, max_positions=8192))
    policy = ["--kv-policy", "sink", "--sink-tokens", "4", "--sink-window", "4060"]
    with Server(
        [
            *(str(model), "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
            *("--block-size", "32", "--max-num-seqs", "8", "--num-gpu-blocks-override", "400"),
            *(*policy, "--sink-stride", "32", "--enable-auto-tool-choice"),
            *("--tool-call-parser", "hermes"),
        ]
    ) as server:
        server.wait(lambda _waited: None)
        yield Client(server)


def history(turns: int) -> list[dict[str, str]]:
    """A conversation of some 60 tokens per turn that ends with a question."""
    said = [
        {"role": role, "content": f"{turn}: " + "tell me about the weather "}
        for turn in range(turns)
        for role in ("user", "assistant")
    ]
    return [*said, {"role": "user", "content": "and now?"}]


def whole_call(client: Client, **body: Any) -> tuple[list[dict[str, Any]], str, int]:
    """Tool calls, finish reason and evictions of an answer in one piece."""
    answer = client.ask(CHAT, **body)
    choice = answer["choices"][0]
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    told = report(answer)
    return calls, choice["finish_reason"], told["evictions"] if told else 0


def streamed_call(client: Client, **body: Any) -> tuple[list[dict[str, Any]], str, int]:
    """The same put together from the events of a streamed answer."""
    calls: list[dict[str, Any]] = []
    finish, evictions = "", 0
    for chunk in client.chunks(CHAT, **body):
        evictions = (report(chunk) or {}).get("evictions", evictions)
        choice = chunk["choices"][0]
        finish = choice["finish_reason"] or finish
        for call in choice["delta"].get("tool_calls") or ():
            if call["index"] == len(calls):
                calls.append({"name": "", "arguments": ""})
            for key, text in call["function"].items():
                calls[call["index"]][key] += text or ""
    return calls, finish, evictions


@pytest.mark.server
@pytest.mark.parametrize("choice", [WEATHER, "required"], ids=["named", "required"])
def test_tool_calls_past_evictions_are_those_below_capacity(client: Client, choice: Any) -> None:
    """A history and arguments longer than the cache, streamed and in one piece: with evictions
    before and during the call what it is without."""
    tools = TOOLS if choice == WEATHER else TOOLS[:1]
    # A model that knows nothing would put blanks between its words for ever.
    blanks = client.ask("/tokenize", prompt=" \n\r\t", add_special_tokens=False)["tokens"]
    body = {
        "logit_bias": {str(blank): -100 for blank in blanks},
        "messages": history(15),
        "tools": tools,
        "tool_choice": choice,
        "max_tokens": 600,
        "ignore_eos": False,
    }

    below = whole_call(client, **body)
    below_streamed = streamed_call(client, **body)
    past = whole_call(client, **body, vllm_xargs=SMALL)
    past_streamed = streamed_call(client, **body, vllm_xargs=SMALL)

    calls, _, evictions = below
    assert evictions == below_streamed[2] == 0
    assert [call["name"] for call in calls] == ["weather"]
    assert json.loads(calls[0]["arguments"]) == ARGUMENTS
    assert past[2] == past_streamed[2] >= 40
    assert below[:2] == past[:2]
    assert below_streamed[:2] == past_streamed[:2]
    assert json.loads(past_streamed[0][0]["arguments"]) == ARGUMENTS
