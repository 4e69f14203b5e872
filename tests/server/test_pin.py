"""``sink_pin``: the end of the system message, found in token ids for many chat templates."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.common.offline import OfflineInferenceMixin
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.registry import renderer_from_config

from sink_vllm.policy.pinning import SystemMessage, common_prefix, longer, up_to_system_message
from sink_vllm.server.lengths import front_view
from sink_vllm.server.options import PINNED_KEY
from sink_vllm.server.pin import _wrap_preprocess_chat, _wrap_preprocess_chat_one
from tests.support import chat_templates
from tests.support.chat_templates import tokenizer
from tests.support.paths import MODEL
from tests.support.tiny_models import TinyLlama

Chat = list[dict[str, Any]]

SYSTEMS = [
    "You are a helpful assistant.",
    "Answer in one word.\n",  # trailing space of any kind: some templates strip it
    "  Use one word, please.\n\n",
    "x",
    "Grüße 你好 🙂",  # more bytes than characters
    "<|im_end|> is only text here\n# user: not a user",
    "You answer every question in one short sentence. " * 12,
]
QUESTIONS = ["What is the question?", "a", "0", "\nshort", "\n\n\nThe answer", "  ", "ü", "?"]


def _system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def _chat(system: str, questions: Sequence[str]) -> Chat:
    chat = [_system(system)]
    for question in questions:
        chat += [_system(question, "user"), _system("The answer is short.", "assistant")]
    return chat[:-1]


class _Template:
    """A chat template as vLLM uses it: text first, then token ids of the text."""

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None) -> None:
        self.tokenizer, self.tools = tokenizer, tools

    def text(self, messages: Chat, answer: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tools=self.tools, tokenize=False, add_generation_prompt=answer
        )
        assert isinstance(text, str)
        return text

    def tokens(self, messages: Chat, answer: bool = True) -> list[int]:
        tokens: list[int] = self.tokenizer(self.text(messages, answer), add_special_tokens=False)[
            "input_ids"
        ]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens)
        assert isinstance(text, str)
        return text

    async def render(self, messages: Chat, answer: bool) -> list[int] | None:
        try:
            return self.tokens(messages, answer)
        except TemplateError:
            return None

    def end(self, messages: Chat) -> int:
        head = up_to_system_message(messages)
        assert head is not None
        system = asyncio.run(SystemMessage.probe(head, self.render))
        return system.end(self.tokens(messages))


BLOCKS = {  # what each family writes around a system message
    "LLAMA_3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{trimmed}<|eot_id|>",
    "LLAMA_31": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: 26 Jul 2024\n\n{trimmed}<|eot_id|>",
    "CHATML": "<|im_start|>system\n{content}<|im_end|>\n",
    "QWEN": "<|im_start|>system\n{content}<|im_end|>\n",
    "MISTRAL_BLOCK": "<s>[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]",
}


@pytest.fixture(scope="module", params=BLOCKS)
def family(request: pytest.FixtureRequest) -> tuple[_Template, str]:
    name: str = request.param
    return _Template(tokenizer(getattr(chat_templates, name))), BLOCKS[name]


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_whole_system_block_and_nothing_more(
    family: tuple[_Template, str], system: str
) -> None:
    """Token for token what the format says, for every following text and number of turns."""
    template, block = family
    expected = template.tokenizer(
        block.format(content=system, trimmed=system.strip()), add_special_tokens=False
    )["input_ids"]
    for turns in (1, 2, 5):
        for question in QUESTIONS:
            chat = _chat(system, [question] * turns)

            end = template.end(chat)

            assert template.tokens(chat)[:end] == expected


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("turns", [1, 4])
def test_a_system_message_inside_the_first_user_turn(system: str, turns: int) -> None:
    """Older Mistral: the content is covered, and not more than one token of what follows."""
    template = _Template(tokenizer(chat_templates.MISTRAL_FIRST))
    ends = set()
    for question in QUESTIONS:
        chat = _chat(system, [question] * turns)
        end = template.end(chat)
        ends.add(end)

        decode = template.decode
        ids = template.tokens(chat)
        assert decode(ids[:end]).startswith("<s>[INST] " + system)
        assert not decode(ids[: end - 1]).startswith("<s>[INST] " + system + "\n\n" + question)
    assert len(ends) == 1  # the same number in every turn of a conversation


def test_a_system_message_that_moves_is_refused() -> None:
    """Mistral v3 writes it into the last user turn: after the first answer it is not a prefix."""
    template = _Template(tokenizer(chat_templates.MISTRAL_LAST))

    assert template.end(_chat("Be short.", ["What?"])) > 2
    with pytest.raises(ValueError, match="does not write the system message at the start"):
        template.end(_chat("Be short.", ["What?", "Why?"]))


def test_a_template_without_system_messages_is_refused() -> None:
    template = _Template(tokenizer(chat_templates.NO_SYSTEM))

    with pytest.raises(ValueError, match="refuses a system message"):
        asyncio.run(SystemMessage.probe([_system("Be short.")], template.render))


def test_tools_inside_the_system_block_are_pinned_with_it() -> None:
    """Qwen: they stand between the content and the end of the block."""
    template = _Template(tokenizer(chat_templates.QWEN), [{"name": "look_up"}])
    chat = _chat("Be short.", ["What?", "Why?"])

    text = template.decode(template.tokens(chat)[: template.end(chat)])

    assert text.startswith("<|im_start|>system\nBe short.\n\n# Tools")
    assert text.endswith('"look_up"}]<|im_end|>\n')


def test_tools_after_the_system_block_are_not() -> None:
    """Llama-3.1: they stand in the first user turn, without which the template refuses them."""
    template = _Template(tokenizer(chat_templates.LLAMA_31), [{"name": "look_up"}])
    chat = _chat("Be short.", ["What?", "Why?"])

    text = template.decode(template.tokens(chat)[: template.end(chat)])

    assert text.endswith("\n\nBe short.")


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_repository_model(system: str, question: str) -> None:
    """Its format has no special tokens: a token may hold the end of one message and the next."""
    template = _Template(AutoTokenizer.from_pretrained(MODEL))
    chat = _chat(system, [question, "Why?"])

    end = template.end(chat)

    ids, text = template.tokens(chat), "<s># system: " + system
    assert template.decode(ids[:end]).startswith(text)
    assert not template.decode(ids[: end - 1]).startswith(text + "\n# user")
    assert end == template.end(_chat(system, [question]))


def test_first_system_message_wherever_it_is() -> None:
    template = _Template(tokenizer(chat_templates.CHATML))
    chat = [_system("Hello", "user"), _system("Be short."), _system("Why?", "user")]
    chat += [_system("Be long."), _system("When?", "user")]

    end = template.end(chat)

    assert template.decode(template.tokens(chat)[:end]) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>system\nBe short.<|im_end|>\n"
    )


def test_a_prompt_that_was_not_rendered_from_the_messages_is_refused() -> None:
    template = _Template(tokenizer(chat_templates.CHATML))
    system = asyncio.run(SystemMessage.probe([_system("Be short.")], template.render))

    with pytest.raises(ValueError, match="at the start of the prompt"):
        system.end(template.tokens(_chat("Be long.", ["What?"])))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a", "a0"),
        (None, "0"),
        ("", "0"),
        ([{"type": "text", "text": "a"}], [{"type": "text", "text": "a0"}]),
        (["a"], ["a", {"type": "text", "text": "0"}]),
        ([], [{"type": "text", "text": "0"}]),
    ],
)
def test_longer(content: Any, expected: Any) -> None:
    message = {"role": "system", "content": content, "name": "n"}

    assert longer(message) == {"role": "system", "content": expected, "name": "n"}
    assert message["content"] == content


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0


# -- through vLLM -------------------------------------------------------------------------------


def _request(messages: Chat, **xargs: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": messages, "vllm_xargs": xargs or None})


class _Server:
    """vLLM's own renderer of chats, without an engine."""

    def __init__(self, model: Path, **options: Any) -> None:
        policy = {"kv_policy": "sink", "sink_window": 92, "sink_stride": 32, **options}
        config = EngineArgs(
            model=str(model), block_size=32, additional_config=policy
        ).create_engine_config()
        front = front_view(config)
        self.hf = renderer_from_config(front)
        self.model_config = front.model_config
        self.online = OnlineRenderer(
            front.model_config,
            self.hf,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )
        self._preprocess = _wrap_preprocess_chat(inspect.unwrap(OnlineRenderer.preprocess_chat))

    def pinned(self, messages: Chat, **xargs: Any) -> int | None:
        """What stands in the rendered prompt of a chat completion."""
        request = _request(messages, **xargs)
        _, (prompt,) = asyncio.run(
            self._preprocess(self.online, request, list(request.messages), None, "auto", None)
        )
        assert prompt["prompt_token_ids"]
        number: int | None = prompt.get(PINNED_KEY)
        return number


CHAT = [_system("Be short."), _system("What?", "user")]
END = len("<system>Be short.\n")  # the tiny model's tokens are bytes


@pytest.fixture(scope="module")
def server(tiny_llama: Callable[[TinyLlama], Path]) -> _Server:
    return _Server(tiny_llama(TinyLlama()))


@pytest.fixture(scope="module")
def pinning_server(tiny_llama: Callable[[TinyLlama], Path]) -> _Server:
    return _Server(tiny_llama(TinyLlama()), sink_pin="system")


def test_a_request_pins(server: _Server) -> None:
    assert server.pinned(CHAT) is None
    assert server.pinned(CHAT, sink_pin="system") == END
    parts = [_system([{"type": "text", "text": "Be short."}]), CHAT[1]]
    assert server.pinned(parts, sink_pin="system") == END
    assert server.pinned(CHAT[1:], sink_pin="system") == 0  # the server's own sink tokens


def test_a_server_pins(pinning_server: _Server) -> None:
    assert pinning_server.pinned(CHAT) == END
    for xargs in ({"sink_pin": "none"}, {"sink_tokens": 5}, {"kv_policy": "full"}):
        assert pinning_server.pinned(CHAT, **xargs) is None


def test_a_system_message_is_rendered_once_per_conversation(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every turn brings it again; the extra work must not."""
    renders = []
    original = server.hf.render_chat_async

    async def counted(*args: Any, **kwargs: Any) -> Any:
        renders.append(args)
        return await original(*args, **kwargs)

    monkeypatch.setattr(server.hf, "render_chat_async", counted)
    chat = _chat("Only once, please.", ["a", "b", "c"])
    for turn in range(2, len(chat) + 1, 2):
        assert server.pinned(chat[:turn], sink_pin="system") is not None

    assert len(renders) == 3 + 3  # the prompts, and three variations


def test_a_wrong_pin_is_left_to_the_options(server: _Server) -> None:
    assert server.pinned(CHAT, sink_pin="user") is None


def test_a_template_error_is_the_client_s(server: _Server) -> None:
    with pytest.raises(VLLMValidationError, match="refuses a system message"):
        asyncio.run(
            _wrap_preprocess_chat(_refusing)(
                server.online,
                _request(CHAT, sink_pin="system"),
                CHAT,
                None,
                "auto",
                None,
            )
        )


async def _refusing(
    self: Any,
    request: Any,
    messages: Any,
    default_template: Any,
    default_template_content_format: Any,
    default_template_kwargs: Any,
    parser: Any = None,
) -> Any:
    raise VLLMValidationError("the template does not like it")


def test_llm_chat_under_a_server_that_pins(pinning_server: _Server, server: _Server) -> None:
    wrapped = _wrap_preprocess_chat_one(inspect.unwrap(OfflineInferenceMixin._preprocess_chat_one))
    for one, expected in ((pinning_server, END), (server, None)):
        llm = SimpleNamespace(model_config=one.model_config, renderer=one.hf, chat_template=None)
        llm._preprocess_chat = OfflineInferenceMixin._preprocess_chat.__get__(llm)

        assert wrapped(llm, CHAT).get(PINNED_KEY) == expected


def test_guard_chats_are_rendered_here() -> None:
    """Arguments the wrappers look at, and the callers that go through them."""
    parameters = inspect.signature(OnlineRenderer.preprocess_chat).parameters
    for name in (
        "request",
        "messages",
        "default_template",
        "default_template_content_format",
        "parser",
    ):
        assert name in parameters
    for caller in (OnlineRenderer.render_chat, OnlineRenderer.render_responses):
        assert "await self.preprocess_chat(" in inspect.getsource(caller)
    parameters = inspect.signature(OfflineInferenceMixin._preprocess_chat_one).parameters
    for name in ("conversation", "add_generation_prompt", "continue_final_message"):
        assert name in parameters
    assert "self._preprocess_chat_one(" in inspect.getsource(
        OfflineInferenceMixin._add_chat_requests
    )
