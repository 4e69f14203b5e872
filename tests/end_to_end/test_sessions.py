"""vLLM's streaming-input sessions under the policy: inputs without end, one stream.

What a session is, is vLLM's (``Scheduler._update_request_as_session``): every input goes on behind
the computed tokens, so the token sampled last before it is not part of the stream. The oracle gets
the same stream as one prompt, from its first token.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm import RequestOutput
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.request import RequestStatus

from tests.conftest import ModelFactory
from tests.support.engine import (
    BLOCK_SIZE,
    Engine,
    Generated,
    Policy,
    asynchronous_scheduling,
    check_all_free,
    greedy_params,
    logprobs_of,
    running_engine,
)
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=256, seed=1)
POLICY = Policy(5, 91, 32)  # C = 128

# (input, output) tokens. 128 in, 1 out: the cache is full when the next input arrives.
INPUTS = {
    "small steps": [(20, 3), (1, 1), (7, 30), (2, 1), (90, 9), *[(30, 10)] * 12],
    "full cache": [(128, 1), (5, 4), (128 - 8, 1), (32, 1), (1, 1), (64, 1), (96, 40)],
    "long inputs": [(400, 50), (3, 200), (700, 1), (1, 33), (129, 128)],
}


@dataclass(slots=True)
class Session:
    """A session of an in-process engine, fed as ``AsyncLLM`` feeds it."""

    engine: Engine
    name: str
    stream: list[int] = field(default_factory=list)
    """Prompt and computed output tokens so far."""

    def send(self, tokens: Sequence[int], num_tokens: int, **params: Any) -> None:
        self._send(tokens, num_tokens, resumable=True, **params)
        self.stream += tokens

    def close(self) -> None:
        self._send([0], 1, resumable=False)

    def _send(
        self, tokens: Sequence[int], num_tokens: int, *, resumable: bool, **params: Any
    ) -> None:
        llm = self.engine.llm.llm_engine
        request = llm.input_processor.process_inputs(
            self.name,
            {"prompt_token_ids": list(tokens)},
            greedy_params(num_tokens, output_kind=RequestOutputKind.DELTA, **params),
            supported_tasks=("generate",),
            resumable=resumable,
        )
        request.external_req_id = self.name
        llm.output_processor.add_request(request, None, None, 0)
        llm.engine_core.add_request(request)


def run(sessions: dict[str, Session], num_tokens: int) -> dict[str, Generated]:
    """Step until every session has its next ``num_tokens`` tokens."""
    engine = next(iter(sessions.values())).engine
    tokens: dict[str, list[int]] = {name: [] for name in sessions}
    logprobs: dict[str, list[float]] = {name: [] for name in sessions}
    reports: dict[str, dict[str, int]] = {name: {} for name in sessions}
    while min(map(len, tokens.values())) < num_tokens:
        for output in engine.llm.llm_engine.step():
            assert isinstance(output, RequestOutput)
            completion = output.outputs[0]
            new = list(completion.token_ids)
            tokens[output.request_id] += new
            logprobs[output.request_id] += [
                step[token].logprob
                for step, token in zip(logprobs_of(completion), new, strict=True)
            ]
            report = (output.kv_transfer_params or {}).get("streaming_llm")
            reports[output.request_id] = report or reports[output.request_id]
    for name, session in sessions.items():
        session.stream += tokens[name][:-1]
    return {
        name: Generated(
            tokens=tokens[name],
            logprobs=logprobs[name],
            finish_reason=None,
            stop_reason=None,
            text="",
            prompt_len=0,
            cached_tokens=0,
            evicted_tokens=reports[name].get("evicted_tokens", 0),
            evictions=reports[name].get("evictions", 0),
            reanchorings=reports[name].get("rope_reanchorings", 0),
            stream_position=reports[name].get("stream_position"),
        )
        for name in sessions
    }


@pytest.fixture(scope="module")
def oracle(tiny_llama: ModelFactory) -> Oracle:
    return Oracle(tiny_llama(SHAPE))


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, tiny_llama: ModelFactory) -> Iterator[Engine]:
    with (
        asynchronous_scheduling() if request.param else nullcontext(),
        running_engine(
            tiny_llama(SHAPE),
            POLICY,
            enable_prefix_caching=True,
            max_num_batched_tokens=100,
            async_scheduling=request.param,
        ) as engine,
    ):
        yield engine
        check_all_free(engine)


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_a_session_is_one_stream(
    engine: Engine, oracle: Oracle, inputs: list[tuple[int, int]]
) -> None:
    """Two sessions side by side; after every input, the tokens of the stream from its start."""
    sessions = {name: Session(engine, name) for name in ("a", "b")}
    evictions = 0
    for turn, (given, wanted) in enumerate(inputs):
        for number, session in enumerate(sessions.values()):
            session.send(random_tokens(given, 100 * turn + number), wanted)
        streams = [list(session.stream) for session in sessions.values()]
        results = list(run(sessions, wanted).values())
        # A report follows an eviction; nothing new to report is nothing evicted since.
        judge(oracle, POLICY, streams, results)
        evictions = results[0].evictions
    for session in sessions.values():
        session.close()

    assert evictions >= 3
    assert len(sessions["a"].stream) > 3 * POLICY.capacity
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
    check_all_free(engine)


def test_pages_of_a_session_are_found_by_others(engine: Engine, oracle: Oracle) -> None:
    """The prefix cache knows the stream, not the tokens that were sampled and discarded."""
    session = Session(engine, "s")
    for turn in range(12):
        session.send(random_tokens(40, 900 + turn), 25)
        run({"s": session}, 25)
    session.close()
    prompt = session.stream + random_tokens(20, 1)

    (result,) = engine.greedy([prompt], 60)

    judge(oracle, POLICY, [prompt], [result])
    assert result.cached_tokens >= len(session.stream) - BLOCK_SIZE - POLICY.g


def test_repetitions_are_searched_in_each_answer_alone(engine: Engine) -> None:
    """As in vLLM, what was said before an input does not count for the answer to it."""
    detection = RepetitionDetectionParams(max_pattern_size=50, min_pattern_size=50, min_count=5)
    session = Session(engine, "s")
    for turn, (most, made) in enumerate([(240, 240), (400, 250), (400, 250), (90, 90)]):
        session.send(
            random_tokens(20, turn),
            most,
            allowed_token_ids=[97],
            repetition_detection=detection,
        )
        answer = run({"s": session}, made)["s"]
        assert len(answer.tokens) == made
        assert engine.scheduler.requests["s"].status == RequestStatus.WAITING_FOR_STREAMING_REQ
    session.close()
    while engine.llm.llm_engine.has_unfinished_requests():
        assert not engine.llm.llm_engine.step()
    check_all_free(engine)


async def whole_session(
    model: Path, chunks: Sequence[Sequence[int]], wanted: int
) -> list[RequestOutput]:
    """All outputs of a session whose inputs do not wait for the answers to those before."""

    async def inputs() -> AsyncGenerator[StreamingInput, None]:
        for chunk in chunks:
            yield StreamingInput(prompt=tokens_input(list(chunk)))

    arguments = AsyncEngineArgs(
        str(model),
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=32,
        disable_log_stats=True,
        additional_config=POLICY.additional_config(),
    )
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        params = greedy_params(wanted, output_kind=RequestOutputKind.DELTA)
        return [output async for output in engine.generate(inputs(), params, "session")]
    finally:
        engine.shutdown()


def test_async_llm_streams_inputs_without_end(tiny_llama: ModelFactory, oracle: Oracle) -> None:
    """``StreamingInput`` through ``AsyncLLM.generate``, an engine process behind it: the last
    answer is that of the whole stream, and what the front end holds is the last input."""
    wanted = 20
    chunks = [random_tokens(50, 700 + i) for i in range(25)]

    outputs = asyncio.run(whole_session(tiny_llama(SHAPE), chunks, wanted))

    tokens = [token for output in outputs for token in output.outputs[0].token_ids]
    assert len(tokens) == wanted * len(chunks)
    answers = [tokens[i : i + wanted] for i in range(0, len(tokens), wanted)]
    stream: list[int] = []
    for chunk, answer in zip(chunks[:-1], answers[:-1], strict=True):
        stream += [*chunk, *answer[:-1]]
    report = (outputs[-1].kv_transfer_params or {})["streaming_llm"]
    expected = oracle.run([stream + chunks[-1]], POLICY.S, POLICY.W, POLICY.g, wanted)[0]
    assert answers[-1] == expected.tokens
    assert report["evictions"] == expected.evictions >= 10
    assert report["stream_position"] == len(stream) + len(chunks[-1]) + wanted
    assert len(outputs[-1].prompt_token_ids or ()) == len(chunks[-1])
