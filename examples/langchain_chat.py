"""LangChain in front of a server with `--kv-policy sink`: no trimming, no summary memory.

    pip install langchain-openai
    vllm serve MODEL --kv-policy sink
    python -m examples.langchain_chat [--url http://127.0.0.1:8000/v1]

`ChatOpenAI` is an ordinary client. The history that LangChain keeps may grow for ever, so
`trim_messages` and summarising memories can go. Options of the policy go through `extra_body`.
"""

import argparse
import os
from typing import Any

import openai
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr


def chat(url: str, key: str, options: dict[str, Any], **limits: Any) -> ChatOpenAI:
    """A model of LangChain for the first model that the server has."""
    model = openai.OpenAI(base_url=url, api_key=key).models.list().data[0].id
    return ChatOpenAI(
        model=model,
        base_url=url,
        api_key=SecretStr(key),
        extra_body={"vllm_xargs": options},
        **limits,
    )


def turn(model: ChatOpenAI, history: list[BaseMessage], question: str) -> str:
    """Ask, and remember question and answer in ``history``."""
    history.append(HumanMessage(question))
    answer = model.invoke(history)
    history.append(answer)
    return answer.text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--system", default="You are a helpful assistant.")
    options = parser.parse_args()
    key = os.environ.get("VLLM_API_KEY", "none")
    model = chat(options.url, key, {"sink_pin": "system"})
    history: list[BaseMessage] = [SystemMessage(options.system)]
    while question := input("> "):
        print(turn(model, history, question))


if __name__ == "__main__":
    main()
