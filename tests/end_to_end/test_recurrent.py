"""Models with recurrent layers: states run on, while attention forgets."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.end_to_end.test_parked import Setup
from tests.end_to_end.test_sessions import Session
from tests.support.engine import (
    Engine,
    Generated,
    asynchronous_scheduling,
    check_all_free,
    greedy_params,
    logprobs_of,
    running_engine,
)
from tests.support.families_hybrid import HYBRIDS
from tests.support.family import write_family
from tests.support.judge import TOLERANCE, judge, random_tokens
from tests.support.oracle_hf import HFOracle
from tests.support.serving import Client, report, tiny_server
from tests.support.tiny_models import VOCAB_SIZE

PAGE = 64
FALCON = next(one for one in HYBRIDS if one.name == "Falcon-H1")
POLICY = FALCON.policy
STREAM_PAGES = POLICY.capacity // POLICY.g + 1 + 1  # with a head page and a state
PROMPTS = [random_tokens(length, length) for length in (3, 127, 128, 300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("falcon-h1"), FALCON)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """Chunks smaller than a page, steps that run ahead, pages for two streams and a half."""
    with (
        asynchronous_scheduling(),
        running_engine(
            folder,
            POLICY,
            max_num_batched_tokens=48,
            enable_prefix_caching=True,
            async_scheduling=True,
            num_gpu_blocks_override=2 * STREAM_PAGES + 3,
        ) as engine,
    ):
        assert type(engine.scheduler).__name__ == "StreamingLLMAsyncScheduler"
        yield engine
        check_all_free(engine)


@pytest.mark.engine
def test_streams_that_wait_for_pages_equal_the_judge(engine: Engine, folder: Path) -> None:
    """Two run at a time, none is preempted, and all are exact: the state of one never ends up in
    another, whose page it takes."""
    running: list[int] = []
    preempted: list[str] = []
    engine.after_step.append(lambda: running.append(len(engine.scheduler.running)))
    preempt = engine.scheduler._preempt_request

    def noted(request: Any, *args: Any, **kwargs: Any) -> None:
        if engine.scheduler.recycler.streams[request.request_id].evictions:
            preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    engine.scheduler._preempt_request = noted
    results = engine.greedy(PROMPTS, 330)
    engine.after_step.pop()
    engine.scheduler._preempt_request = preempt

    verdict = judge(HFOracle(folder), POLICY, PROMPTS, results)
    print(verdict)
    assert verdict.least_evictions >= 3
    assert max(running) == 2
    assert not preempted
    assert engine.num_poisoned > 0
    assert min(len(set(one.tokens)) for one in results) >= 50


@pytest.mark.engine
def test_a_conversation_goes_on_from_its_state(engine: Engine, folder: Path) -> None:
    """Three turns beside another stream, with chunks that end anywhere: what is sent again is not
    computed again, and what follows is what the whole stream would have generated."""
    oracle = HFOracle(folder)
    conversation = random_tokens(170, 170)
    for turn in range(3):
        beside = random_tokens(20 + turn, 9 + turn)
        answers = engine.greedy([conversation, beside], 70)
        print(judge(oracle, POLICY, [conversation, beside], answers))
        if turn:
            assert answers[0].cached_tokens > POLICY.capacity
            assert len(conversation) - answers[0].cached_tokens <= 25 + 1 + PAGE
            assert answers[0].evictions >= 2
        conversation = conversation + answers[0].tokens + random_tokens(25, turn)


@pytest.mark.engine
def test_random_requests_and_aborts_leave_all_pages_free(engine: Engine) -> None:
    """Conversations that begin alike, sent again or cut off anywhere, on a pool for two."""
    rng = random.Random(18)
    llm: Any = engine.llm.llm_engine
    sent = [random_tokens(rng.randint(1, 260), salt) for salt in range(3)]
    evictions, found, sends, aborts = 0, 0, 0, 0
    while sends < 100 or llm.has_unfinished_requests():
        if sends < 100 and rng.random() < 0.4:
            tokens = rng.choice(sent)
            tokens = tokens[: rng.randint(1, len(tokens))] if rng.random() < 0.3 else tokens
            params = greedy_params(rng.randint(1, 9))
            llm.add_request(f"random {sends}", {"prompt_token_ids": tokens}, params)
            sends += 1
        if rng.random() < 0.04 and (running := list(engine.scheduler.requests)):
            llm.abort_request([rng.choice(running)], internal=True)
            aborts += 1
        for output in llm.step():
            if output.finished:
                result = Generated.of(output)
                evictions += result.evictions
                found += result.cached_tokens > POLICY.capacity

    check_all_free(engine)
    print(evictions, found, aborts)
    assert evictions >= 30
    assert found >= 5
    assert aborts >= 5


def turn_of(session: Session, before: Generated | None) -> Generated:
    """Step until a session waits for its next input; what it said, and its account by then."""
    engine = session.engine
    outputs: list[Any] = []
    while engine.scheduler.requests[session.name].status != RequestStatus.WAITING_FOR_STREAMING_REQ:
        outputs += engine.llm.llm_engine.step()
    steps: list[Any] = [one.outputs[0] for one in outputs]
    told = [one.kv_transfer_params["streaming_llm"] for one in outputs if one.kv_transfer_params]
    assert not any("rebuilds" in one for one in told)
    evictions = told[-1]["evictions"] if told else before.evictions if before else 0
    tokens = [token for one in steps for token in one.token_ids]
    session.stream += tokens[:-1]
    return replace(
        Generated.of(outputs[-1]),
        tokens=tokens,
        logprobs=[
            known[token].logprob
            for one in steps
            for known, token in zip(logprobs_of(one), one.token_ids, strict=True)
        ],
        evictions=evictions,
        evicted_tokens=evictions * POLICY.g,
    )


@pytest.mark.engine
def test_a_session_goes_on_from_the_state_before_its_last_token(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that runs ahead of the token that ends a turn has put that token into the state.
    The session loses its pages for it, and finds them again: one stream, from its first token."""
    lost: list[int] = []
    give_way = engine.scheduler._give_way

    def noted(request: Any) -> None:
        lost.append(engine.scheduler.recycler.streams[request.request_id].evictions)
        give_way(request)

    monkeypatch.setattr(engine.scheduler, "_give_way", noted)
    oracle, session, answer = HFOracle(folder), Session(engine, "talk"), None
    for number in range(8):
        stops = list(range(number, VOCAB_SIZE, 16))
        session.send(random_tokens(70, 70 + number), 60, stop_token_ids=stops)
        stream = list(session.stream)
        answer = turn_of(session, answer)
        print(judge(oracle, POLICY, [stream], [answer]), len(answer.tokens))
    session.close()
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()

    assert sum(evictions > 0 for evictions in lost) >= 4
    check_all_free(engine)


@pytest.mark.engine
def test_a_stored_stream_goes_on_from_its_state(engine: Engine, folder: Path) -> None:
    """What ``/v1/streams`` sends of it, to steps that run ahead: the tokens of one stream."""
    setup = Setup(POLICY, engine, HFOracle(folder))
    (stream,) = streams = setup.streams(1)
    resumed = 0
    for turn in range(7):
        before, gap = list(stream.all), stream.held.missing
        new = random_tokens(50 + 9 * turn, 20 + turn)
        answers, (chain,) = setup.append(streams, [new], 45)
        print(judge(setup.oracle, POLICY, [[*before, *new]], answers))
        assert chain.base == 0
        if gap:
            resumed += chain.resumed_from == "cache"
            assert len(before) - answers[0].cached_tokens <= 1 + PAGE + POLICY.g
    assert resumed >= 3


@pytest.mark.engine
def test_account_tells_that_a_state_was_rebuilt(engine: Engine, folder: Path) -> None:
    """An operator's reset: the stream goes on from its survivors as from a prompt, and says so."""
    llm: Any = engine.llm.llm_engine
    survivors: list[int] = []
    before = 0
    outputs: list[Any] = []
    llm.add_request("0", {"prompt_token_ids": PROMPTS[0]}, greedy_params(300))
    while llm.has_unfinished_requests():
        outputs = llm.step() or outputs
        generated = len(outputs[0].outputs[0].token_ids) if outputs else 0
        if generated >= 150 and not survivors:
            assert engine.llm.reset_prefix_cache(reset_running_requests=True)
            (request,) = engine.scheduler.requests.values()
            survivors = list(request._all_token_ids)
            before = generated

    account = (outputs[0].kv_transfer_params or {})["streaming_llm"]
    assert account["rebuilds"] == 1
    result = Generated.of(outputs[0])
    assert result.evictions >= 3
    expected = HFOracle(folder).run(
        [survivors],
        POLICY.S,
        POLICY.W,
        POLICY.g,
        150,
        forced=[result.tokens[before : before + 150]],
    )
    assert expected[0].logprobs == pytest.approx(result.logprobs[before:300], abs=TOLERANCE)


@pytest.mark.engine
def test_what_is_cut_from_a_prompt_is_not_in_the_state(folder: Path) -> None:
    """``--sink-prompt truncate``: the state begins with the survivors, as the cache does."""
    truncate = replace(POLICY, prompt="truncate")
    with running_engine(folder, truncate) as engine:
        cut = engine.greedy([PROMPTS[3], PROMPTS[0]], 200)
        check_all_free(engine)

    oracle = HFOracle(folder)
    verdict = judge(oracle, truncate, [PROMPTS[3], PROMPTS[0]], cut)
    (streamed,) = oracle.run([PROMPTS[3]], POLICY.S, POLICY.W, POLICY.g, 20)
    assert verdict.least_evictions >= 2
    assert streamed.tokens != cut[0].tokens[:20]


@pytest.mark.server
def test_a_hybrid_over_http(folder: Path) -> None:
    """Served without a word about recurrent layers; a stored stream goes on from its state."""
    flags = ["--sink-window", str(POLICY.W), "--sink-stride", str(POLICY.g)]
    with tiny_server(folder, *flags, environment={"VLLM_PLUGINS": "sink_vllm"}) as server:
        server.wait(lambda _waited: None)
        client = Client(server)
        evictions = client.counter("sink_vllm:evictions_total")

        *_, last = client.chunks("/v1/completions", prompt=PROMPTS[3], max_tokens=300)

        told = report(last)
        assert told is not None
        assert told["stream_position"] == 600
        assert told["evictions"] == -(-(599 - POLICY.capacity) // POLICY.g)
        assert "rebuilds" not in told
        assert client.counter("sink_vllm:evictions_total") - evictions == told["evictions"]

        created = client.http.post("/v1/streams", json={})
        path = f"/v1/streams/{created.json()['id']}/append"
        turns = []
        for turn in range(4):
            generate = {"temperature": 0, "max_tokens": 80, "ignore_eos": True}
            tokens = random_tokens(60, turn)
            answer = client.http.post(path, json={"tokens": tokens, "generate": generate})
            assert answer.status_code == 200, answer.text
            turns.append(answer.json())
        assert [one["usage"]["resumed_from"] for one in turns[2:]] == ["cache", "cache"]
        assert turns[3]["stream"]["evicted"] >= 5 * POLICY.g
        assert turns[3]["usage"]["cached_tokens"] > POLICY.capacity
        assert turns[3]["usage"]["computed_tokens"] <= 60 + 1 + PAGE
        client.wait_idle()
