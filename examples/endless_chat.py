"""A chat that never has to be cut: an ordinary OpenAI client for `vllm serve ... --kv-policy sink`.

    vllm serve MODEL --kv-policy sink
    python -m examples.endless_chat [--url http://127.0.0.1:8000/v1]

The whole conversation is sent with every turn, as every chat client does, and it may grow for
ever: the server keeps the sink tokens and the most recent ones, and answers are only as long as the
model or Ctrl-C makes them.
"""

import argparse
import sys

import openai
from openai.types.chat import ChatCompletionMessageParam


def answer(client: openai.OpenAI, model: str, messages: list[ChatCompletionMessageParam]) -> str:
    """Stream the next answer to the terminal; Ctrl-C ends it and keeps what was said."""
    pieces: list[str] = []
    try:
        with client.chat.completions.create(model=model, messages=messages, stream=True) as stream:
            for part in stream:
                piece = part.choices[0].delta.content if part.choices else None
                if piece:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    return "".join(pieces)


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
    options = parser.parse_args()

    client = openai.OpenAI(base_url=options.url, api_key="none")
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
        messages.append({"role": "assistant", "content": answer(client, model, messages)})


if __name__ == "__main__":
    sys.exit(main())
