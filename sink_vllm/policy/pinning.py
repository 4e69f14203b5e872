"""Where the system message ends in a prompt, whatever the chat template (no torch, no vLLM).

Chat templates are programs, so the end is found by rendering: variations of the messages are
rendered with the same template, and their token ids compared with those of the request's prompt.

- The system message alone. If the template renders it, and the prompt begins with just these
  tokens, they are the answer: headers, content and end-of-turn tokens (Llama-3, ChatML, Mistral
  with ``[SYSTEM_PROMPT]``).
- Two short chats whose system messages differ in their last character. What the two have in
  common at the end begins where the content of the system message ends: the answer for templates
  that write the system message into the user's turn (older Mistral, Gemma).

The answer depends on the messages up to the system message only, so that it is the same in every
turn of a conversation. What a template writes before the system message (tools, dates) is pinned
with it.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SYSTEM_ROLES = ("system", "developer")
_OTHER = "0"  # appended to the system message of the second chat
_QUESTION = {"role": "user", "content": "a"}

Message = Mapping[str, Any]
Render = Callable[[list[Any], bool], Awaitable[Sequence[int] | None]]
"""Token ids of messages, with or without the header of the answer; ``None`` if the template
refuses them."""


def up_to_system_message(messages: Sequence[Message]) -> list[Message] | None:
    """The messages up to the first system message; ``None`` when there is none."""
    for index, message in enumerate(messages):
        if message.get("role") in SYSTEM_ROLES:
            return list(messages[: index + 1])
    return None


@dataclass(frozen=True, slots=True)
class SystemMessage:
    """How a chat template renders a system message, and what comes before it."""

    alone: Sequence[int] | None
    """Token ids without any other message; ``None`` if the template refuses that."""
    chat: Sequence[int]
    """Token ids with a question after it."""
    at_least: int
    """Tokens of ``chat`` that only hold content up to the end of the system message, ..."""
    at_most: int
    """... and with the one that may hold its last character and the next one."""

    @classmethod
    async def probe(cls, head: list[Message], render: Render) -> "SystemMessage":
        """Render variations of ``head``, which ends with the system message.

        Raises:
            ValueError: the template does not render them.
        """
        chat = await render([*head, _QUESTION], True)
        other = await render([*head[:-1], longer(head[-1]), _QUESTION], True)
        if chat is None or other is None:
            raise ValueError(
                "sink_pin='system': the chat template refuses a system message followed by a "
                "user message, so its end cannot be found; use sink_pin='none' and set "
                "sink_tokens."
            )
        return cls(
            alone=await render(head, False),
            chat=chat,
            at_least=common_prefix(chat, other),
            at_most=len(chat) - common_prefix(chat[::-1], other[::-1]),
        )

    def end(self, prompt: Sequence[int]) -> int:
        """Tokens of ``prompt`` up to the end of the system message.

        Raises:
            ValueError: the template does not write it at the start of the prompt.
        """
        if (
            self.alone is not None
            and len(self.alone) >= self.at_least
            and common_prefix(prompt, self.alone) == len(self.alone)
        ):
            return len(self.alone)
        if self.at_most < self.at_least or common_prefix(prompt, self.chat) < self.at_least:
            raise ValueError(
                "sink_pin='system': the chat template does not write the system message at the "
                "start of the prompt, so no first tokens can stand for it; use sink_pin='none' "
                "and set sink_tokens."
            )
        return self.at_most


def longer(message: Message) -> dict[str, Any]:
    """``message`` with one more character at the end of its text."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
        last = parts[-1] if parts else None
        if isinstance(last, dict) and isinstance(last.get("text"), str):
            parts[-1] = {**last, "text": last["text"] + _OTHER}
        else:
            parts.append({"type": "text", "text": _OTHER})
        return {**message, "content": parts}
    return {**message, "content": f"{content or ''}{_OTHER}"}


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that ``a`` and ``b`` have in common at the start."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
