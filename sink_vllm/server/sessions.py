"""A streaming-input session is one request to ``--sink-max-stream-tokens``, whatever its inputs.

The engine knows an input at a time, and an input may wait in the front end while the one before
is being answered, so nobody knows its room beforehand. What the front end does know exactly is
how many tokens a session has; it ends a session there, as vLLM ends a request at a stop string.
"""

from collections.abc import Container, Iterable

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from sink_vllm.policy.request_options import check_bound
from sink_vllm.server.response_state import EndlessRequestState

_DISCARDED = 1  # the last token of an answer, when the next input takes its place


class SessionBound:
    """Counts the tokens of all sessions of one front end.

    Args:
        most: tokens of prompts and outputs of a session together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._sessions: dict[str, EndlessRequestState] = {}

    def open(self, state: EndlessRequestState) -> None:
        self._sessions[state.request_id] = state

    def check(self, request: EngineCoreRequest) -> None:
        """Refuse an input that does not fit behind what its session has.

        While an answer is being made nobody knows yet; :meth:`end` decides then.

        Raises:
            VLLMValidationError: see above. vLLM raises it from ``generate``, and ends the session.
        """
        state = self._sessions.get(request.request_id)
        if state is None or not request.resumable or state.input_chunk_queue is not None:
            return
        tokens = state.position - _DISCARDED + len(request.prompt_token_ids or ())
        try:
            check_bound(tokens, None, self._most)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="prompt") from error

    def end(self, outputs: Iterable[EngineCoreOutput]) -> list[str]:
        """Turn the outputs that fill a session up into its last.

        A session ends with ``finish_reason="length"`` when it has all its tokens, or when an
        answer ends and the input that waits behind it leaves no room for another.

        Returns:
            The requests to abort in the engine, which knows nothing of it.
        """
        ended = []
        for output in outputs:
            state = self._sessions.get(output.request_id)
            if state is None:
                continue
            room = self._most - state.position - len(output.new_token_ids)
            if room > 0 and not (output.finished and self._is_too_long(state, room)):
                continue
            if room < 0:
                kept = len(output.new_token_ids) + room
                del output.new_token_ids[kept:]
                if output.new_logprobs is not None:
                    output.new_logprobs = output.new_logprobs.slice_request(0, kept)
            output.finish_reason = FinishReason.LENGTH
            state.streaming_input = False
            if state.queue is not None:
                state.queue.close()  # takes no further input
            ended.append(output.request_id)
        return ended

    def forget(self, alive: Container[str]) -> None:
        """Only the sessions in ``alive`` are left."""
        for gone in [name for name in self._sessions if name not in alive]:
            del self._sessions[gone]

    def __bool__(self) -> bool:
        return bool(self._sessions)

    def _is_too_long(self, state: EndlessRequestState, room: int) -> bool:
        """Whether the next input of ``state``, if one waits, leaves no ``room``."""
        if not state.input_chunk_queue:
            return False
        return len(state.input_chunk_queue[0].prompt_token_ids or ()) >= room + _DISCARDED
