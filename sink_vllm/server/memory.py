"""The output processor, under which streamed responses of any length take constant memory.

What vLLM accumulates per request (in ``OutputProcessor``) and what becomes of it here, for
streamed (DELTA) requests only; a response in one piece is as long as it is:

==================================  ==========================================================
token ids, text, held-back text     ``sink_vllm.server.detokenizer``
log-probabilities                   the last few stay (vLLM looks back 4 for split characters)
deltas a client has not read        at most ``STALLED_AFTER`` tokens, then the request is aborted
text of a chat response             ``sink_vllm.server.events``
prompt, if longer than C tokens     its length stays (``sink_vllm.server.prompts``)
inputs of a streaming-input session the last one stays
==================================  ==========================================================

Deltas that a client has not read yet are merged by vLLM into one, so a slow client catches up
with its next read. The limit is reached only by a client that has stopped reading altogether:
its connection takes no more bytes while that many tokens are made. Generating on for it would
fill the memory. The request ends as aborted; everything made until then is still delivered, with
``finish_reason`` ``"abort"``.
"""

from typing import Any
from weakref import WeakKeyDictionary

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    OutputProcessorOutput,
    RequestOutputCollector,
)
from vllm.v1.engine.parallel_sampling import ParentRequest

from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.parked import KEY as PARKED_KEY
from sink_vllm.policy.parked import Parked
from sink_vllm.server.response_state import STALLED_AFTER, EndlessRequestState, Shared
from sink_vllm.server.sessions import SessionBound

logger = init_logger(__name__)


class EndlessOutputProcessor(OutputProcessor):
    """vLLM's output processor with ``EndlessRequestState`` for its requests."""

    def begin(self, policy: SinkConfig) -> None:
        self._capacity = policy.capacity
        most = policy.max_stream_tokens
        self._sessions = SessionBound(most) if most else None
        self._stalled: list[str] = []
        self._shared: WeakKeyDictionary[ParentRequest, Shared] = WeakKeyDictionary()

    def add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None = None,
        request_index: int = 0,
        queue: RequestOutputCollector | None = None,
    ) -> None:
        if self._sessions:
            self._sessions.check(request)
        super().add_request(request, prompt, parent_req, request_index, queue)
        state = self.request_states.get(request.request_id)
        if state is None or isinstance(state, EndlessRequestState):
            return  # the end of a session, or its next input
        state.__class__ = EndlessRequestState
        assert isinstance(state, EndlessRequestState)
        shared, not_sent = self._shared_by(parent_req), _not_sent(request)
        state.begin(shared, self._stalled, self._capacity, not_sent)
        if self._sessions is not None and request.resumable:
            self._sessions.open(state)

    def _shared_by(self, parent_req: ParentRequest | None) -> Shared:
        if parent_req is None:
            return Shared(None)
        return self._shared.setdefault(parent_req, Shared(parent_req))

    def process_outputs(
        self, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any
    ) -> OutputProcessorOutput:
        ended = self._sessions.end(engine_core_outputs) if self._sessions else ()
        processed = super().process_outputs(engine_core_outputs, *args, **kwargs)
        processed.reqs_to_abort += ended
        if self._stalled:
            for request_id in self._stalled:
                logger.warning(
                    "The client of request %s has left more than %d tokens unread; the request "
                    "is aborted.",
                    request_id,
                    STALLED_AFTER,
                )
            processed.reqs_to_abort += self.abort_requests(self._stalled, internal=True)
            self._stalled.clear()
        if self._sessions:
            self._sessions.forget(self.request_states)
        return processed


def _not_sent(request: EngineCoreRequest) -> int:
    """Tokens of a stored stream before those that its request names; they count as prompt."""
    params = request.sampling_params
    wire = (params.extra_args or {}).get(PARKED_KEY) if params is not None else None
    return 0 if wire is None else Parked.read(wire).not_sent


def adopt(output_processor: Any, policy: SinkConfig) -> None:
    """Make vLLM's output processor one for the endless responses of ``policy``.

    Call it before the first request.

    Raises:
        TypeError: it is not vLLM's own class.
    """
    if type(output_processor) is not OutputProcessor:
        raise TypeError(
            f"--kv-policy sink needs vLLM's own OutputProcessor, found "
            f"{type(output_processor).__name__}; drop the plugin that replaces it."
        )
    output_processor.__class__ = EndlessOutputProcessor
    assert isinstance(output_processor, EndlessOutputProcessor)
    output_processor.begin(policy)
