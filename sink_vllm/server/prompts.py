"""The prompt of a streamed response is forgotten once its first token has been told.

vLLM's front end keeps the prompt of a response, as token ids, text and messages, until the
response ends. A client that reads without end would pin it for ever, so what holds it lets go
(``FREE`` stands for nothing kept, ``LENGTH`` for the number of tokens)::

    EngineInput in AsyncLLM.generate     FREE     OutputsOf, here
    RequestState, RequestOutput          LENGTH   sink_vllm.server.response_state
    detokenizer                          FREE     sink_vllm.server.detokenizer
    arguments of the event generators    LENGTH   Luggage, here, for sink_vllm.server.events
    body of the HTTP request             FREE     forget_body, here, for sink_vllm.server.events

The first output of every choice still has the whole prompt, which ``echo``, ``return_token_ids``
and parsers of tool calls and reasoning read. Later ones have its length, which usage is made of.
Prompts of at most C tokens are left as they are: they are O(C), and so nothing differs from vLLM.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, overload

from sink_vllm.policy.config import SinkConfig


class ToldPrompt(Sequence[int]):
    """Stands for the token ids of a prompt that nobody keeps any more: a length."""

    __slots__ = ("_length",)

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        self._refuse()

    def __iter__(self) -> Iterator[int]:
        self._refuse()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._length})"

    def _refuse(self) -> NoReturn:
        # No IndexError: it would end a loop over the tokens as if there were none.
        raise LookupError(
            f"The {self._length} token ids of this prompt stand in the first output of a streamed "
            "response only; read them there."
        )


class OutputsOf(AsyncGenerator[Any, None]):
    """The outputs of ``AsyncLLM.generate``, whose frame holds on to its argument ``prompt``.

    Args:
        outputs: what ``generate`` returned.
        prompt: the dictionary it was given, which must belong to nobody else.
    """

    def __init__(self, outputs: AsyncGenerator[Any, None], prompt: dict[str, Any]) -> None:
        self._outputs = outputs
        self._prompt: dict[str, Any] | None = prompt
        self._begun = False

    def __anext__(self) -> Any:
        if self._begun and self._prompt is not None:
            self._prompt.clear()  # read before the first output only
            self._prompt = None
        self._begun = True
        return self._outputs.__anext__()

    def asend(self, value: None) -> Any:
        return self._outputs.asend(value)

    def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> Any:
        return self._outputs.athrow(typ, val, tb)

    def aclose(self) -> Any:
        return self._outputs.aclose()


class Luggage:
    """What the arguments of a generator of server-sent events hold of its prompts.

    Forgets the prompts while the generator runs. Of a completion, copies that it puts into
    ``arguments`` (by name) do; of a chat, the arguments themselves, since the generator may run
    inside another that holds the same ones: they must be nobody else's (``own_messages``).
    """

    def __init__(self, arguments: dict[str, Any], policy: SinkConfig) -> None:
        request = arguments["request"]
        self._capacity = policy.capacity
        self._choices = request.n or 1
        self._told: dict[int, set[int]] = {}
        """By number of the prompt: choices whose first token the generator has told."""
        self._inputs: list[dict[str, Any]] = []
        self._conversation: list[Any] = []
        self._messages: Any = None  # the request that has them
        if "engine_inputs" in arguments:  # completions never read request.prompt
            self._inputs = [dict(engine_input) for engine_input in arguments["engine_inputs"]]
            arguments["engine_inputs"] = self._inputs
            arguments["request"] = request.model_copy(update={"prompt": ""})
        else:  # chats read messages until the first token
            self._conversation = arguments["conversation"]
            self._messages = request
        self.untold = len(self._inputs) or 1
        """Prompts of which some choice has not told its first token."""

    def told(self, prompt: int, output: Any) -> None:
        """The generator has told ``output``, which is about prompt number ``prompt``."""
        told = self._told.setdefault(prompt, set())
        if len(told) == self._choices:
            return
        told.update(
            choice.index
            for choice in output.outputs
            if choice.token_ids or choice.finish_reason is not None
        )
        if len(told) == self._choices:
            self.untold -= 1
            if len(output.prompt_token_ids or ()) > self._capacity:
                self._forget(prompt)

    def _forget(self, prompt: int) -> None:
        if self._messages is None:
            forget_input(self._inputs[prompt])
        else:
            self._conversation.clear()
            self._messages.messages = []


def own_messages(request: Any) -> Any:
    """A copy of a chat's ``request`` whose messages can be forgotten, the caller keeps its own."""
    return request.model_copy()


def forget_input(engine_input: dict[str, Any]) -> None:
    """Keep nothing of the prompt in ``engine_input`` but its length."""
    engine_input["prompt_token_ids"] = ToldPrompt(len(engine_input["prompt_token_ids"]))
    engine_input.pop("prompt", None)


def forget_body(raw_request: Any) -> None:
    """Drop the bytes and the JSON that Starlette keeps of a request it has parsed."""
    for kept in ("_body", "_json"):
        vars(raw_request).pop(kept, None)
