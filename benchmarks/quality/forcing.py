"""Drive an engine along given texts; yields losses as they come.

A text is a list of token ids. ``losses[i]`` belongs to stream position ``i + 1``: the first token
has nothing before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STEPS = 16
"""Engine steps between two collections of losses."""

Losses = dict[str, list[float]]


class ForcingError(Exception):
    """The engine did not compute exactly the text, once and in order."""


def stream(
    engine: Any,
    texts: Mapping[str, Sequence[int]],
    how: str = "prompt",
    options: Mapping[str, Mapping[str, int]] | None = None,
) -> Iterator[Losses]:
    """Stream every text through one request; all requests run at once.

    Args:
        engine: from ``arms.engine``.
        texts: token ids by name.
        how: ``prompt`` (chunks as large as the schedule allows) or ``decode`` (one token a step).
        options: options of the policy by name of the text, where they are not the engine's.

    Raises:
        ForcingError: losses are missing, or the decoded tokens are not the text.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    noted = dict.fromkeys(texts, 0)
    for name, text in texts.items():
        decode = how == "decode"
        if decode:
            engine.collective_rpc("quality_force", args=(name, list(text)))
        prompt = list(text[:1] if decode else text)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=len(text) - 1 if decode else 1,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=dict(options[name]) if options else None,
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    followed = dict.fromkeys(texts, 1)
    while engine.has_unfinished_requests():
        for _ in range(STEPS):
            for output in engine.step():
                made = output.outputs[0].token_ids
                at = followed[output.request_id]
                if how == "decode" and list(made) != list(
                    texts[output.request_id][at : at + len(made)]
                ):
                    raise ForcingError(f"{output.request_id}: left the text at position {at}")
                followed[output.request_id] += len(made)
            if not engine.has_unfinished_requests():
                break
        (losses,) = engine.collective_rpc("quality_take_losses")
        for name, values in losses.items():
            noted[name] += len(values)
        yield losses
    for name, text in texts.items():
        if noted[name] != len(text) - 1:
            raise ForcingError(f"{name}: {noted[name]} losses for {len(text)} tokens")
        if how == "decode":
            engine.collective_rpc("quality_forget", args=(name,))


def last_losses(
    engine: Any, jobs: Sequence[tuple[str, Sequence[int]]], batch: int
) -> Iterator[dict[str, float]]:
    """The loss of the last token of every given short text, by its name, ``batch`` at once."""
    for first in range(0, len(jobs), batch):
        last: dict[str, float] = {}
        for losses in stream(engine, dict(jobs[first : first + batch])):
            last.update({name: values[-1] for name, values in losses.items()})
        yield last
