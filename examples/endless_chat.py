"""A chat that never has to be cut: an ordinary OpenAI client for `vllm serve ... --kv-policy sink`.

    vllm serve MODEL --kv-policy sink
    python -m examples.endless_chat [--url http://127.0.0.1:8000/v1] [--options JSON]

The whole conversation is sent with every turn, as every chat client does, and it may grow for
ever: the server keeps the sink tokens and the most recent ones, and answers are only as long as the
model or Ctrl-C makes them. Two things are more than OpenAI's API has: what a request chooses for
itself (`vllm_xargs`), and what its answer says of evictions (`kv_transfer_params`).
"""

import argparse
import json
import os
import sys
from typing import Any

import openai
from openai.types.chat import ChatCompletionMessageParam


def answer(
    client: openai.OpenAI,
    model: str,
    messages: list[ChatCompletionMessageParam],
    options: dict[str, Any],
    **limits: Any,
) -> tuple[str, dict[str, int]]:
    """Stream the next answer to the terminal; Ctrl-C ends it and keeps what was said.

    Returns:
        The text, and what was evicted (nothing: no account).
    """
    pieces: list[str] = []
    account: dict[str, int] = {}
    try:
        with client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            extra_body={"vllm_xargs": options} if options else None,
            **limits,
        ) as stream:
            for part in stream:
                told = (part.model_extra or {}).get("kv_transfer_params") or {}
                account = told.get("streaming_llm", account)
                piece = part.choices[0].delta.content if part.choices else None
                if piece:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    return "".join(pieces), account


def main() -> int:
    """Chat until end of input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000/v1", help="OpenAI API of the server"
    )
    parser.add_argument("--model", help="name of the model; default: the first one served")
    parser.add_argument(
        "--system", help="system prompt; --sink-tokens of its length keep it for ever"
    )
    parser.add_argument(
        "--options", type=json.loads, default={}, help="vllm_xargs of every request, as JSON"
    )
    options = parser.parse_args()

    client = openai.OpenAI(base_url=options.url, api_key=os.environ.get("VLLM_API_KEY", "none"))
    try:
        model = options.model or client.models.list().data[0].id
    except openai.APIConnectionError:
        print(f"no server at {options.url}; start one with: vllm serve MODEL --kv-policy sink")
        return 1
    messages: list[ChatCompletionMessageParam] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    print(f"talking to {model}; Ctrl-C ends an answer, Ctrl-D the chat")
    while True:
        try:
            question = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        messages.append({"role": "user", "content": question})
        text, account = answer(client, model, messages, options.options)
        messages.append({"role": "assistant", "content": text})
        if account:
            print(f"  [{account['evicted_tokens']:,} of the conversation's tokens are evicted]")


if __name__ == "__main__":
    sys.exit(main())
