"""Patch of vLLM's renderer: chat prompts are tokenized by segment (``server.segments``)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sink_vllm.compat.patching import Patch
from sink_vllm.server.lengths import policy_of

if TYPE_CHECKING:
    from sink_vllm.server.segments import SegmentTokenizer

_LEAST = 2048  # characters; shorter texts are encoded faster than they are looked up
_ATTRIBUTE = "_sink_vllm_segments"


def _wrap_tokenize_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    def _tokenize_prompt(self: Any, prompt: Any, params: Any) -> Any:
        text = prompt["prompt"]
        if len(text) < _LEAST or policy_of(self.config) is None:
            return original(self, prompt, params)
        options = params.get_encode_kwargs()
        # What a tokenizer adds around a text, cuts off it or says of it is its own business.
        if options.get("add_special_tokens", True) or self._wants_offsets(prompt, params):
            return original(self, prompt, params)
        segments = _segments_of(self)
        if segments is None:
            return original(self, prompt, params)
        ids = segments.encode(text)
        # Always a limit in a server, though few prompts reach it (``TokenizeParams``).
        if options.get("truncation") and len(ids) > options["max_length"]:
            return original(self, prompt, params)
        return self._build_tokens_prompt(ids, prompt)

    return _tokenize_prompt


def _segments_of(renderer: Any) -> "SegmentTokenizer | None":
    """That of the renderer's tokenizer; ``None`` if it cannot have one."""
    from sink_vllm.server.segments import SegmentTokenizer

    found: tuple[Any, SegmentTokenizer | None] | None = getattr(renderer, _ATTRIBUTE, None)
    tokenizer = renderer.get_tokenizer()
    if found is None or found[0] is not tokenizer:
        try:
            segments = SegmentTokenizer(tokenizer)
        except ValueError:
            segments = None
        found = tokenizer, segments
        setattr(renderer, _ATTRIBUTE, found)
    return found[1]


PATCHES = (
    Patch(
        target="vllm.renderers.base:BaseRenderer._tokenize_prompt",
        wrapper=_wrap_tokenize_prompt,
        record="0022-chat-prompts-by-segment",
    ),
)
