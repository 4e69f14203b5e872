"""What a response says about the tokens that were evicted while it was made.

It stands in ``kv_transfer_params``, the one per-response dictionary of vLLM's own that the answers
of ``/v1/completions``, ``/v1/chat/completions`` and ``/v1/responses`` carry already (null without
a KV connector, which the policy refuses)::

    "kv_transfer_params": {"streaming_llm": {
        "evicted_tokens": 96, "evictions": 3, "rope_reanchorings": 0, "stream_position": 300}}

``stream_position`` counts prompt and output tokens. ``rebuilds`` is there if it is not 0: how often
the stream, after it had evicted, lost its pages (to a reset, or to a request of higher priority),
did not find them in the prefix cache and was computed again from the tokens left in it. What keys,
and the states of recurrent layers, knew of evicted text is gone then. With ``n > 1`` or several
prompts the numbers are totals, ``stream_position`` is left out, and ``"choices"`` lists every
choice that evicted, with its ``"index"``. Responses that evicted nothing stay as vLLM makes them.
vLLM's streams leave the field out; there it is added to the last chunk of each choice (the one with
its ``finish_reason``), about that choice.

Contract for the scheduler: set ``EngineCoreOutput.kv_transfer_params["streaming_llm"]`` to a
``Report`` of the stream so far, on the first output after each eviction (a skipped part of a
prompt included) and on the last. The first matter because the front end ends requests by itself
(stop strings, aborts); the last one received counts.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

FIELD = "kv_transfer_params"
KEY = "streaming_llm"

Report = dict[str, int]
"""``evicted_tokens``, ``evictions``, ``rope_reanchorings``, ``stream_position`` of one stream, and
``rebuilds`` if there were any."""

_TOTALS = ("evicted_tokens", "evictions", "rope_reanchorings")


def with_account(params: Mapping[str, Any] | None, account: Mapping[str, Any]) -> dict[str, Any]:
    """``kv_transfer_params`` with ``account``, next to whatever others have put there."""
    return {**(params or {}), KEY: account}


def totals(choices: Mapping[int, Report]) -> dict[str, Any]:
    """One account for several streams, by choice index."""
    rebuilds = sum(report.get("rebuilds", 0) for report in choices.values())
    return {
        **{name: sum(report.get(name, 0) for report in choices.values()) for name in _TOTALS},
        **({"rebuilds": rebuilds} if rebuilds else {}),
        "choices": [{"index": index, **choices[index]} for index in sorted(choices)],
    }


class Account:
    """Reports of the streams of one request, one per choice."""

    def __init__(self, *, single: bool) -> None:
        self._single = single
        self._choices: dict[int, Report] = {}

    def update(self, index: int, params: Mapping[str, Any] | None) -> None:
        """Remember the report in the ``kv_transfer_params`` of an engine output, if any."""
        if params and KEY in params:
            self._choices[index] = params[KEY]

    def close(self, index: int, stream_position: int) -> None:
        """The stream has ended here; the engine may have reported earlier, or computed further."""
        if index in self._choices:
            self._choices[index] = {
                **self._choices[index],
                "stream_position": stream_position,
            }

    def onto(self, params: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """``params`` with this account; unchanged while nothing was evicted."""
        if not self._choices:
            return None if params is None else dict(params)
        account = self._choices[0] if self._single else totals(self._choices)
        return with_account(params, account)


def report_of(params: Mapping[str, Any] | None, index: int) -> Report | None:
    """The report about choice ``index`` in the ``kv_transfer_params`` of a request's output."""
    account = (params or {}).get(KEY)
    if account is None or "choices" not in account:
        return account
    for choice in account["choices"]:
        if choice["index"] == index:
            return {name: value for name, value in choice.items() if name != "index"}
    return None


def account_of_batch(outputs: Iterable[Any], choices_per_prompt: int) -> dict[str, Any] | None:
    """One account for the ``RequestOutput`` of several prompts; ``None`` if none evicted."""
    choices: dict[int, Report] = {}
    for prompt_index, output in enumerate(outputs):
        for completion in output.outputs:
            report = report_of(output.kv_transfer_params, completion.index)
            if report is not None:
                choices[prompt_index * choices_per_prompt + completion.index] = report
    return totals(choices) if choices else None


def onto_chunk(chunk: str, reports: dict[int, Report]) -> str:
    """A server-sent event, with the report of the choice that ends in it.

    ``reports``: by choice index, of choices that have ended; those told are removed.
    """
    prefix, separator, rest = chunk.partition("data: {")
    if not separator or prefix:
        return chunk  # the "[DONE]" line
    body = json.loads("{" + rest)
    for choice in body.get("choices", ()):
        if choice.get("finish_reason") and choice.get("index") in reports:
            body[FIELD] = with_account(body.get(FIELD), reports.pop(choice["index"]))
            text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
            return f"data: {text}\n\n"
    return chunk
