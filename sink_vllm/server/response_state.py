"""The front end's state of one response, vLLM's own, which forgets what it has sent.

``sink_vllm.server.memory`` makes it so, and tells what is forgotten and what stays.
"""

from typing import Any, cast

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestState, StreamingUpdate
from vllm.v1.engine.parallel_sampling import ParentRequest

from sink_vllm.policy.report import Account
from sink_vllm.server.detokenizer import make_endless
from sink_vllm.server.prompts import ToldPrompt

STALLED_AFTER = 65_536
"""Tokens that a client has not read, after which its request is aborted."""
_FORGET_EVERY = 8  # outputs
_FORGET_LOGPROBS_AFTER = 64  # positions
_KEEP_LOGPROBS = 8  # positions


class Shared:
    """What the choices of one request have in common."""

    def __init__(self, parent: ParentRequest | None) -> None:
        self.account = Account(single=parent is None)
        self.untold = 1 if parent is None else parent.sampling_params.n
        """Choices whose first token has not been told. Until all have been, outputs name the
        whole prompt: outputs that a client has not read yet are merged with later ones."""


class EndlessRequestState(RequestState):
    """vLLM's state of one response, which forgets what it has sent."""

    def begin(self, shared: Shared, stalled: list[str], capacity: int, not_sent: int = 0) -> None:
        """Take over from vLLM's class, before the first output.

        Args:
            shared: with the other choices of the request.
            stalled: where to name this request if its client stops reading.
            capacity: tokens; a prompt that is longer is forgotten when it has been told.
            not_sent: tokens of the stream before those of the prompt, which count as prompt.
        """
        self.prompt_len += not_sent
        self._shared, self._account = shared, shared.account
        self._stalled = stalled
        self._capacity = capacity
        self._told = False
        self._delta = self.output_kind == RequestOutputKind.DELTA
        self._keeps_prompt = self._delta
        self._sent = 0  # outputs
        self._discarded = 0  # output tokens that a session's next input took the place of
        if self._delta and self.detokenizer is not None:
            self._endless = make_endless(self.detokenizer, self.prompt_token_ids)

    @property
    def position(self) -> int:
        """Tokens of prompt and output so far, of all inputs of a session together."""
        assert self.detokenizer is not None
        return self.prompt_len + self.detokenizer.num_output_tokens() - self._discarded

    def apply_streaming_update(self, update: StreamingUpdate) -> None:
        """Of a session's inputs, only the last one stays; vLLM would keep and send all of them."""
        before = self.prompt_len
        if self._delta:
            self.prompt, self.prompt_token_ids = None, None
        super().apply_streaming_update(update)
        self._discarded += 1
        if self._delta:
            self.prompt_len += before
            self._keeps_prompt = True
            if self._told:
                self._told = False
                self._shared.untold += 1

    def make_request_output(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: int | str | None,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.detokenizer is None:  # pooling; refused at start-up
            return super().make_request_output(
                new_token_ids,
                pooling_output,
                finish_reason,
                stop_reason,
                kv_transfer_params,
                *args,
                **kwargs,
            )
        # Once per token of every response: what is rarely needed is asked for first.
        if self._keeps_prompt and not self._shared.untold:
            self._forget_prompt()
        if kv_transfer_params is not None:
            self._account.update(self.request_index, kv_transfer_params)
        if finish_reason is not None:
            self._account.close(self.request_index, self.position)
        elif self._delta and self.queue is not None and self._unread() > STALLED_AFTER:
            self._stalled.append(self.request_id)
        output = super().make_request_output(
            new_token_ids,
            pooling_output,
            finish_reason,
            stop_reason,
            self._account.onto(kv_transfer_params),
            *args,
            **kwargs,
        )
        if self._delta and output is not None:
            self._sent += 1
            if self._sent % _FORGET_EVERY == 0:
                self._forget()
            if not self._told and (new_token_ids or finish_reason is not None):
                self._told = True
                self._shared.untold -= 1
        return output

    def _unread(self) -> int:
        """Tokens in outputs that have been made but not collected."""
        waiting = self.queue.output if self.queue is not None else None
        if not isinstance(waiting, RequestOutput):
            return 0
        return sum(len(completion.token_ids) for completion in waiting.outputs)

    def _forget_prompt(self) -> None:
        """What was sent has the prompt; what follows names its length."""
        self._keeps_prompt = False
        if self.prompt_token_ids is not None and len(self.prompt_token_ids) > self._capacity:
            self.prompt = None
            self.prompt_token_ids = cast(list[int], ToldPrompt(len(self.prompt_token_ids)))
            self._endless.forget()  # may have a copy

    def _forget(self) -> None:
        self._endless.forget()
        processor = self.logprobs_processor
        if processor is None or processor.logprobs is None:
            return
        if len(processor.logprobs) > _FORGET_LOGPROBS_AFTER:
            processor.logprobs = processor.logprobs[-_KEEP_LOGPROBS:]
