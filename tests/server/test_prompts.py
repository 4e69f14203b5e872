"""What holds the prompt of a streamed response lets go of it; a real server is in
tests/server/test_open_responses.py."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest
from starlette.requests import Request
from vllm import CompletionOutput, RequestOutput
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.v1.engine.async_llm import AsyncLLM

from sink_vllm.server.prompts import Luggage, OutputsOf, ToldPrompt, forget_body, own_messages
from tests.support.outputs import POLICY

LONG, SHORT = [7] * (POLICY.capacity + 1), [7] * POLICY.capacity


def test_a_told_prompt_has_a_length_and_nothing_else() -> None:
    told = ToldPrompt(1000)

    assert len(told) == 1000
    assert told
    assert repr(told) == "ToldPrompt(1000)"
    reads: tuple[Callable[[Any], Any], ...] = (
        list,
        lambda told: told[0],
        lambda told: told[:5],
        lambda told: 7 in told,
        lambda told: list(reversed(told)),
    )
    for read in reads:
        with pytest.raises(LookupError, match=r"1000 token ids .* first output") as error:
            read(told)
        assert not isinstance(error.value, IndexError), "would end a loop silently"


async def _outputs(prompt: dict[str, Any]) -> AsyncIterator[int]:
    """Like ``AsyncLLM.generate``: reads its prompt first, and keeps it."""
    length = len(prompt["prompt_token_ids"])
    for _ in range(3):
        yield length


def test_outputs_free_the_prompt_of_their_generator() -> None:
    async def read() -> None:
        prompt = {"prompt_token_ids": LONG}
        outputs = OutputsOf(_outputs(prompt), prompt)  # type: ignore[arg-type]
        assert await anext(outputs) == len(LONG)
        assert prompt
        assert [output async for output in outputs] == [len(LONG)] * 2
        assert not prompt

    asyncio.run(read())


@pytest.mark.parametrize("read", [0, 1])
def test_outputs_are_closed_like_those_of_the_generator(read: int) -> None:
    closed = []

    async def source(prompt: dict[str, Any]) -> AsyncGenerator[int, None]:
        try:
            while True:
                yield len(prompt)
        finally:
            closed.append(True)

    async def use() -> None:
        outputs = OutputsOf(source({}), {})
        assert isinstance(outputs, AsyncGenerator)
        for _ in range(read):
            await anext(outputs)
        await outputs.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)

    asyncio.run(use())
    assert closed == [True] * read


def _output(prompt: list[int], *choices: int, tokens: int = 1) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=prompt,
        prompt_logprobs=None,
        outputs=[CompletionOutput(index, "", [7] * tokens, None, None) for index in choices],
        finished=False,
    )


def test_luggage_of_a_completion() -> None:
    request = CompletionRequest(model="m", seed=None, prompt=[LONG, LONG], n=2, echo=True)
    given = [{"type": "token", "prompt": "text", "prompt_token_ids": LONG} for _ in range(2)]
    arguments: dict[str, Any] = {"request": request, "engine_inputs": given}

    luggage = Luggage(arguments, POLICY)

    assert arguments["request"].prompt == ""
    assert arguments["request"].echo
    inputs = arguments["engine_inputs"]
    luggage.told(0, _output(LONG, 0))
    luggage.told(1, _output(LONG, 0, 1, tokens=0))  # no token: echo is still to come
    assert inputs == given
    luggage.told(0, _output(LONG, 1))
    assert luggage.untold == 1
    assert (len(inputs[0]["prompt_token_ids"]), inputs[0].get("prompt")) == (len(LONG), None)
    assert inputs[1] == given[1]
    luggage.told(1, _output(LONG, 0, 1))
    assert luggage.untold == 0
    assert isinstance(inputs[1]["prompt_token_ids"], ToldPrompt)
    # The handler's own are untouched.
    assert request.prompt == [LONG, LONG]
    assert all(one["prompt_token_ids"] is LONG for one in given)


@pytest.mark.parametrize(("prompt", "left"), [(SHORT, 1), (LONG, 0)])
def test_luggage_of_a_chat(prompt: list[int], left: int) -> None:
    """Parsers of tool calls count those in the messages before the first token."""
    messages: list[Any] = [{"role": "user", "content": "a" * 1000}]
    request = ChatCompletionRequest(model="m", seed=None, messages=messages)
    outer: dict[str, Any] = {"request": own_messages(request), "conversation": [*messages]}
    arguments = dict(outer)  # of a generator inside another, as in 0.33

    luggage = Luggage(arguments, POLICY)

    assert arguments["request"].messages == messages
    luggage.told(0, _output(prompt, 0))
    assert luggage.untold == 0
    for held in (arguments, outer):
        assert len(held["request"].messages) == len(held["conversation"]) == left
    # The caller's own are untouched.
    assert len(request.messages) == len(messages) == 1


def test_body_of_a_request_is_forgotten_and_not_empty() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"prompt": "a"}'}

    async def read() -> None:
        request = Request({"type": "http"}, receive)
        assert await request.json() == {"prompt": "a"}
        assert {"_body", "_json"} <= vars(request).keys()

        forget_body(request)

        assert not {"_body", "_json"} & vars(request).keys()
        with pytest.raises(RuntimeError, match="consumed"):
            await request.json()

    asyncio.run(read())


def test_guard_who_reads_the_prompt_when() -> None:
    generate = inspect.getsource(inspect.unwrap(AsyncLLM.generate))
    body = generate[generate.rindex('"""') :]
    assert "prompt" not in body[body.index("finished = False") :]

    completion = inspect.getsource(
        inspect.unwrap(OpenAIServingCompletion.completion_stream_generator)
    )
    assert "request.prompt" not in completion
    assert completion.count("engine_inputs[") == 1
    assert "prompt_text = self._extract_prompt_text(engine_input)" in completion

    formerly = OpenAIServingChat.chat_completion_stream_generator  # in 0.32
    chunks = getattr(OpenAIServingChat, "chat_completion_stream_generator_raw", formerly)
    chat = inspect.getsource(inspect.unwrap(chunks))
    assert "request.messages" not in chat
    role = chat.index("self.get_chat_request_role(request)")
    assert chat.index("if first_iteration:") < role < chat.index("first_iteration = False")
    first = chat[chat.index("if first_iteration:") : chat.index("first_iteration = False")]
    conversation = chat[chat.index("created_time") :].count("conversation")
    assert conversation == first.count("conversation")
    for create in (
        OpenAIServingCompletion.create_completion,
        OpenAIServingChat.create_chat_completion,
    ):
        assert [*inspect.signature(create).parameters] == ["self", "request", "raw_request"]
