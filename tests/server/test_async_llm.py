"""``AsyncLLM`` in one engine: streams beyond the capacity, sessions, and the bound of both.

The bound over HTTP is in ``test_bounds.py``.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from vllm import RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.conftest import ModelFactory
from tests.support.serving import CAPACITY, SCHEDULE, evicted, prompt_of
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

MOST = 300
SENTENCE = f"--sink-max-stream-tokens={MOST}: a prompt of "


def _params(max_tokens: int | None, kind: RequestOutputKind) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, output_kind=kind)


async def _session(
    engine: AsyncLLM, inputs: Sequence[tuple[int, int | None]], wait: bool
) -> list[tuple[list[int], str | None]]:
    """The answers to inputs of so many tokens, with so many ``max_tokens``."""
    answers: list[tuple[list[int], str | None]] = []
    answered = asyncio.Event()

    async def source() -> AsyncGenerator[StreamingInput, None]:
        for number, (tokens, max_tokens) in enumerate(inputs):
            if wait and number:
                await answered.wait()
                answered.clear()
            params = _params(max_tokens, RequestOutputKind.DELTA)
            yield StreamingInput(tokens_input(prompt_of(tokens)), params)

    made: list[int] = []
    params = _params(1, RequestOutputKind.DELTA)
    async for output in engine.generate(source(), params, f"s{next(_NUMBERS)}"):
        for completion in output.outputs:
            made += completion.token_ids
            if completion.finish_reason is not None:
                answers.append((made, completion.finish_reason))
                made = []
                answered.set()
    assert not made
    return answers


_NUMBERS = itertools.count()


async def _deltas(engine: AsyncLLM) -> None:
    assert CAPACITY < 150
    told = [
        output
        async for output in engine.generate(
            {"prompt_token_ids": prompt_of(150)},
            SamplingParams(
                max_tokens=140,
                temperature=0,
                ignore_eos=True,
                logprobs=0,
                output_kind=RequestOutputKind.DELTA,
            ),
            "deltas",
        )
    ]
    assert sum(len(output.outputs[0].token_ids) for output in told) == 140
    assert sum(len(output.outputs[0].logprobs or ()) for output in told) == 140
    account = (told[-1].kv_transfer_params or {})["streaming_llm"]
    assert account["evicted_tokens"] == evicted(150, 140)


async def _requests(engine: AsyncLLM) -> None:
    for kind in (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY):
        outputs: list[RequestOutput] = [
            output
            async for output in engine.generate(
                {"prompt_token_ids": prompt_of(200)}, _params(None, kind), f"r{kind}"
            )
        ]
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == MOST - 200
        assert outputs[-1].outputs[0].finish_reason == "length"
    with pytest.raises(VLLMValidationError, match=SENTENCE):
        engine.generate({"prompt_token_ids": prompt_of(MOST)}, _params(1, kind), "no room")


async def _sessions(engine: AsyncLLM) -> None:
    # An answer's last token is discarded for the next input: 100 + 49, + 20 + 49, + 40 + 42.
    inputs: list[tuple[int, int | None]] = [(100, 50), (20, 50), (40, None), (1, 1)]
    for wait in (False, True):
        answers = await _session(engine, inputs, wait)
        assert [len(tokens) for tokens, _ in answers] == [50, 50, MOST - 100 - 49 - 20 - 49 - 40]
        assert answers[-1][1] == "length"
    unbounded = await _session(engine, [(100, 50), (20, 50), (40, 10)], wait=True)
    assert [tokens for tokens, _ in unbounded[:2]] == [tokens for tokens, _ in answers[:2]]
    assert unbounded[2][0] == answers[2][0][:10]


async def _inputs_without_room(engine: AsyncLLM) -> None:
    fitting = [(100, 50), (MOST - 149 - 1, 5)]
    assert [len(tokens) for tokens, _ in await _session(engine, fitting, wait=True)] == [50, 1]
    with pytest.raises(VLLMValidationError, match=f"{SENTENCE}{MOST} tokens leaves no room"):
        await _session(engine, [(100, 50), (MOST - 149, 5)], wait=True)
    # It waits while the answer is made, so it is the answer that tells.
    answers = await _session(engine, [(100, 50), (MOST - 149, 5)], wait=False)
    assert [(len(tokens), reason) for tokens, reason in answers] == [(50, "length")]


_CHECKS: tuple[Callable[[AsyncLLM], Any], ...] = (
    _deltas,
    _requests,
    _sessions,
    _inputs_without_room,
)


def test_async_llm_and_its_sessions(tiny_llama: ModelFactory) -> None:
    """All in one engine, because it takes long to start."""
    args = AsyncEngineArgs(
        str(tiny_llama(TinyLlama())),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_seqs=4,
        num_gpu_blocks_override=64,
        additional_config={
            "kv_policy": "sink",
            "sink_tokens": SCHEDULE.sink_tokens,
            "sink_window": SCHEDULE.window,
            "sink_stride": SCHEDULE.stride,
            "sink_max_stream_tokens": MOST,
        },
    )

    async def talk() -> None:
        engine = AsyncLLM.from_engine_args(args)
        try:
            for check in _CHECKS:
                await asyncio.wait_for(check(engine), 120)
                assert not engine.output_processor.has_unfinished_requests()
        finally:
            engine.shutdown()

    asyncio.run(talk())
