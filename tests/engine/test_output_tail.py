"""The tail of evicted output tokens: vLLM's own search sees the stream it would see unevicted."""

import inspect
import random
import re
from pathlib import Path

import pytest
import vllm.v1.core.sched.utils as sched_utils
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams
from vllm.v1 import core, engine, structured_output
from vllm.v1.core.sched.utils import check_sequence_repetition, check_stop
from vllm.v1.request import Request, RequestStatus
from vllm.v1.utils import ConstantList

from sink_vllm.engine.output_tail import OutputTail, forget_evicted
from sink_vllm.engine.stream import Stream, compact
from sink_vllm.policy.schedule import Schedule

SEARCHES = [(1, 2), (2, 3), (3, 2), (5, 4), (7, 5), (40, 3)]  # (longest pattern, count)


def open_request(prompt: int, search: tuple[int, int] | None, min_tokens: int = 0) -> Request:
    pattern, count = search or (0, 0)
    sampling = SamplingParams(
        max_tokens=10**6,
        min_tokens=min_tokens,
        repetition_detection=RepetitionDetectionParams(max_pattern_size=pattern, min_count=count),
    )
    return Request("r", list(range(prompt)), sampling, None)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("prompt", [1, 3, 6, 14])
@pytest.mark.parametrize(
    ("sinks", "window", "stride"), [(0, 3, 2), (4, 5, 2), (4, 2, 6), (9, 1, 4)]
)
def test_every_search_equals_that_of_the_whole_output(
    sinks: int, window: int, stride: int, prompt: int, search: tuple[int, int]
) -> None:
    """Token after token, over outputs that repeat often, some of whose tokens are sinks."""
    stream = Stream(Schedule(sink_tokens=sinks, window=window, stride=stride))
    request = open_request(prompt, search)
    assert request.sampling_params is not None
    detection = request.sampling_params.repetition_detection
    assert detection is not None
    rng = random.Random(sinks * 100 + prompt)
    whole: list[int] = []
    found = 0
    while len(whole) < 600:
        word = [rng.randrange(3) for _ in range(rng.randrange(1, 8))]
        for token in word * rng.randrange(1, 7):
            whole.append(token)
            request.append_output_token_ids(token)
            request.num_computed_tokens = request.num_tokens - 1
            wanted = check_sequence_repetition(whole, detection)
            found += wanted
            assert check_stop(request, 2**31) == wanted
            assert list(request.output_token_ids[-5:]) == whole[-5:]
            while request.num_computed_tokens >= stream.capacity:
                compact(request, stream)
    assert stream.evictions > 40
    assert found > 0
    view = request.output_token_ids
    assert len(view) <= stream.capacity + search[0] * search[1]  # O(what was asked for)


def test_the_search_waits_for_min_tokens() -> None:
    """All checks are vLLM's own, in its order."""
    stream = Stream(Schedule(sink_tokens=1, window=3, stride=2))
    request = open_request(4, (1, 10), min_tokens=100)
    for made in range(1, 101):
        request.append_output_token_ids(7)
        request.num_computed_tokens = request.num_tokens - 1
        assert check_stop(request, 2**31) == (made == 100)
        while request.num_computed_tokens >= stream.capacity:
            compact(request, stream)
    assert request.status == RequestStatus.FINISHED_REPETITION
    assert request.stop_reason == "repetition_detected"


def test_requests_that_do_not_ask_keep_the_view_of_vllm() -> None:
    stream = Stream(Schedule(sink_tokens=1, window=3, stride=2))
    request = open_request(4, None)
    for _ in range(50):
        request.append_output_token_ids(7)
        request.num_computed_tokens = request.num_tokens - 1
        while request.num_computed_tokens >= stream.capacity:
            compact(request, stream)
    assert isinstance(request.output_token_ids, ConstantList)


def test_a_new_answer_of_a_session_starts_with_nothing() -> None:
    view = OutputTail([1, 2], 0, 5)
    view.evict([8, 9])
    request = open_request(4, (2, 3))
    request.output_token_ids = view  # type: ignore[assignment]

    forget_evicted(request)

    assert list(request.output_token_ids) == []
    request.append_output_token_ids(3)
    assert list(request.output_token_ids) == [3]


def test_a_view_is_a_sequence() -> None:
    """Sink tokens come first as long as nothing is missing behind them."""
    cached = [1, 2, 5, 6]
    view = OutputTail(cached, 2, 3)
    view.evict([3, 4])
    assert list(view) == view[:] == [1, 2, 3, 4, 5, 6]
    assert [view[-k] for k in range(1, 7)] == [6, 5, 4, 3, 2, 1]
    view.evict([5, 6])
    cached[2:] = [7, 8]
    assert list(view) == [4, 5, 6, 7, 8]
    assert view[-2:] == [7, 8]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            view[outside]


def test_guard_only_the_stop_check_reads_the_view() -> None:
    """Everything else in the engine core reads lists that hold the cached tokens."""
    readers = {
        str(path.relative_to(folder.parent))
        for folder in (Path(module.__path__[0]) for module in (core, engine, structured_output))
        for path in folder.rglob("*.py")
        if re.search(r"\breq(uest)?\.output_token_ids", path.read_text())
    }
    assert readers == {"core/sched/utils.py"}
    assert inspect.getsource(sched_utils).count("request.output_token_ids") == 2
    assert "ConstantList(self._output_token_ids)" in inspect.getsource(Request.__init__)
