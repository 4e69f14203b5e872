"""New messages behind a stream are what the chat template writes for the whole conversation."""

import asyncio
import itertools
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from sink_vllm.server.streams.join import behind, overlap
from tests.support import chat_templates
from tests.support.chat_templates import tokenizer
from tests.support.paths import MODEL

ENDS = {  # what a model generates at the end of its turn
    "LLAMA_3": "<|eot_id|>",
    "LLAMA_31": "<|eot_id|>",
    "CHATML": "<|im_end|>",
    "QWEN": "<|im_end|>",
    "MISTRAL_FIRST": "</s>",
    "MISTRAL_LAST": "</s>",
    "MISTRAL_BLOCK": "</s>",
}
TEXTS = ["Why?", "The answer is short.", "ü", "\nUse one word"]


class _Template:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def tokens(self, messages: list[dict[str, str]], answer: bool) -> list[int]:
        return self.ids(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer
            )
        )

    async def render(self, messages: list[dict[str, str]], answer: bool) -> list[int]:
        return self.tokens(messages, answer)

    def behind(
        self, stream: list[int], tail: str, messages: list[dict[str, str]], answer: bool = True
    ) -> list[int]:
        return asyncio.run(behind(stream, tail, messages, answer, self.render))


@pytest.fixture(scope="module", params=ENDS)
def family(request: pytest.FixtureRequest) -> tuple[_Template, str]:
    name: str = request.param
    return _Template(tokenizer(getattr(chat_templates, name))), ENDS[name]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("ended", [True, False], ids=["ended by the model", "cut off"])
def test_a_conversation_in_deltas_is_the_whole(family: tuple[_Template, str], ended: bool) -> None:
    """The model's own end of turn is not repeated, and a reply that was cut off gets one."""
    template, end = family
    chat, stream = [_user("What is the question?")], []
    stream += template.tokens(chat, answer=True)
    for reply, question in itertools.product(TEXTS[1:2], TEXTS):
        space = template.tokens([*chat, _assistant("x")], answer=False)
        # Mistral's older formats write a space before the reply, which the model generates.
        spaced = " " + reply if template.tokenizer.decode(space).endswith(" x</s>") else reply
        stream += template.ids(spaced) + (template.ids(end) if ended else [])
        stream += template.behind(stream, "assistant", [_user(question)])
        chat += [_assistant(reply), _user(question)]

        # Text: the tokens of a generated reply need not be those of the same text in a prompt.
        whole = template.tokenizer.decode(template.tokens(chat, answer=True))
        assert template.tokenizer.decode(stream) == whole


@pytest.mark.parametrize("name", ["LLAMA_3", "CHATML", "QWEN"])
def test_messages_behind_messages(name: str) -> None:
    """Nothing was generated: the turn before is closed already."""
    template = _Template(tokenizer(getattr(chat_templates, name)))
    chat = [_user("What?")]
    stream = template.tokens(chat, answer=False)
    for message in (_user("Why?"), _assistant("The answer is short."), _user("a"), _user("b")):
        stream += template.behind(stream, chat[-1]["role"], [message], answer=False)
        chat.append(message)

        assert stream == template.tokens(chat, answer=False)
    stream += template.behind(stream, "user", [])
    assert stream == template.tokens(chat, answer=True)


def test_a_system_message_first() -> None:
    template = _Template(tokenizer(chat_templates.CHATML))
    system = {"role": "system", "content": "Be short."}
    stream = template.tokens([system], answer=False)

    stream += template.behind(stream, "system", [_user("Why?")])

    assert stream == template.tokens([system, _user("Why?")], answer=True)


def test_a_template_may_refuse() -> None:
    template = _Template(tokenizer(chat_templates.MISTRAL_FIRST))

    with pytest.raises(TemplateError, match="alternate"):
        template.behind([1, 2, 3], "user", [_user("Why?")])


@pytest.mark.parametrize("question", TEXTS)
def test_the_repository_model(question: str) -> None:
    """Without special tokens the line end of a reply that was cut off is added."""
    template = _Template(AutoTokenizer.from_pretrained(MODEL))
    stream = template.tokens([_user("Hello")], answer=True)
    stream += template.ids(" the answer")

    stream += template.behind(stream, "assistant", [_user(question)])

    whole = [_user("Hello"), _assistant("the answer"), _user(question)]
    assert template.tokenizer.decode(stream) == template.tokenizer.decode(
        template.tokens(whole, answer=True)
    )


@pytest.mark.parametrize(
    ("stream", "rest", "expected"),
    [
        ([], [1], 0),
        ([1], [], 0),
        ([1, 2], [2, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([2, 1], [1, 1], 1),
        ([1, 2], [3], 0),
        ([5] * 40, [5] * 40, 16),
    ],
)
def test_overlap(stream: list[int], rest: list[int], expected: int) -> None:
    assert overlap(stream, rest) == expected
