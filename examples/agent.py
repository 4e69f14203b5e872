"""An agent that calls tools turn after turn, and never has to shorten its history.

    vllm serve MODEL --kv-policy sink --enable-auto-tool-choice --tool-call-parser hermes
    python -m examples.agent [--url http://127.0.0.1:8000/v1] [--turns 300]

Each turn the model has to call the tool, with arguments that a JSON schema describes; the result
goes back to it, and the whole history is sent again. The instructions are pinned, so that they are
still there in turn 300; what a tool said long ago is evicted. Whatever the agent must not forget
belongs into the instructions or a store of its own.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletionFunctionToolParam

INSTRUCTIONS = "You watch the sensors of a greenhouse. Read one of them in every turn."
SENSORS = ("north", "south", "roof")
TOOL: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "read_sensor",
        "description": "The temperature at a sensor, in degrees Celsius.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"sensor": {"enum": list(SENSORS)}},
            "required": ["sensor"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A call, what came of it, and the evictions of the answer that made it."""

    sensor: str
    result: str
    evicted_tokens: int


def turns(
    client: openai.OpenAI, model: str, number: int, read: Callable[[str], str]
) -> Iterator[Turn]:
    """Run the agent; ``read`` is the tool."""
    messages: list[Any] = [{"role": "system", "content": INSTRUCTIONS}]
    for turn in range(number):
        messages.append({"role": "user", "content": f"Turn {turn}: which sensor?"})
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "read_sensor"}},
            max_tokens=200,
            extra_body={"vllm_xargs": {"sink_pin": "system"}},
        )
        said = answer.choices[0].message
        if not said.tool_calls:
            raise RuntimeError(f"turn {turn} has no tool call: {said.content!r}")
        call: Any = said.tool_calls[0]
        sensor = json.loads(call.function.arguments)["sensor"]
        result = read(sensor)
        messages.append({"role": "assistant", "content": "", "tool_calls": [call.model_dump()]})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        told = (answer.model_extra or {}).get("kv_transfer_params") or {}
        yield Turn(sensor, result, told.get("streaming_llm", {}).get("evicted_tokens", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--turns", type=int, default=300)
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.url, api_key=os.environ.get("VLLM_API_KEY", "none"))
    model = client.models.list().data[0].id
    temperatures = {sensor: f"{20 + place}.5" for place, sensor in enumerate(SENSORS)}
    for number, turn in enumerate(turns(client, model, options.turns, temperatures.__getitem__)):
        print(f"{number}: {turn.sensor} is {turn.result} ({turn.evicted_tokens:,} tokens evicted)")


if __name__ == "__main__":
    main()
