"""How a turn of ``/v1/streams`` generates: the server's defaults and limits, then the store's."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.lengths import FRONT_MAX
from sink_vllm.server.streams.bodies import Generate
from sink_vllm.server.streams.handler import Handler, engine_of
from sink_vllm.server.streams.store import StreamStore

SCHEDULE = Schedule(sink_tokens=4, window=92, stride=32)
MOST_TOKENS = 1000


def _params(
    generate: Generate | None,
    position: int,
    defaults: dict[str, float] | None = None,
    full: bool = False,
) -> SamplingParams:
    """Of a server with these defaults, as ``--override-generation-config`` gives them."""
    defaults = defaults or {}
    store = StreamStore(most_streams=4, most_tokens=MOST_TOKENS, idle_seconds=60)
    completions = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=FRONT_MAX),
        default_sampling_params=defaults,
        override_max_tokens=defaults.get("max_tokens"),
    )
    stream = store.create("a", "m", None if full else SCHEDULE, {})
    handler = Handler(cast(Any, completions), SCHEDULE.capacity)
    return handler.params(stream, generate, position, store.limits.most_tokens)


@pytest.mark.parametrize(
    ("asked", "limit", "position", "full", "most"),
    [
        (None, None, 100, False, 900),  # until the store is full
        (None, 20, 100, False, 20),
        (None, 20, 990, False, 10),
        (7, 20, 100, False, 7),
        (700, 20, 100, False, 20),
        (700, 20, 980, False, 20),  # what the server makes of it fits
        (None, None, 100, True, 28),  # until the capacity is reached
        (None, 20, 100, True, 20),
        (None, 200, 100, True, 28),
        (28, None, 100, True, 28),
    ],
)
def test_the_smallest_limit_holds(
    asked: int | None, limit: int | None, position: int, full: bool, most: int
) -> None:
    defaults: dict[str, float] = {} if limit is None else {"max_tokens": limit}

    assert _params(Generate(max_tokens=asked), position, defaults, full).max_tokens == most


@pytest.mark.parametrize(
    ("generate", "position"),
    [(Generate(max_tokens=11), 990), (Generate(), 1000), (None, 1000), (Generate(), 2000)],
)
def test_what_the_store_has_no_room_for_is_refused(
    generate: Generate | None, position: int
) -> None:
    with pytest.raises(VLLMValidationError, match=r"--sink-streams-tokens"):
        _params(generate, position)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("top_p", 0.5),
        ("top_k", 5),
        ("min_p", 0.5),
        ("repetition_penalty", 1.5),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
    ],
)
def test_the_servers_defaults_hold_unless_the_client_chooses(name: str, value: float) -> None:
    """The penalties used to be 0 whatever the server's default was."""
    assert getattr(_params(Generate(), 10, {name: value}), name) == value
    chosen = Generate.model_validate({name: 1})
    assert getattr(_params(chosen, 10, {name: value}), name) == 1


def test_a_turn_that_only_computes_samples_one_token() -> None:
    params = _params(None, 10, {"max_tokens": 20, "temperature": 0.5})

    assert (params.max_tokens, params.temperature, params.detokenize) == (1, 0.0, False)


def test_all_turns_of_a_stream_go_to_one_of_several_engines() -> None:
    store = StreamStore(most_streams=400, most_tokens=MOST_TOKENS, idle_seconds=60)
    ids = [store.create("a", "m", SCHEDULE, {}).id for _ in range(400)]

    chosen = [engine_of(stream_id, 4) for stream_id in ids]

    assert chosen == [engine_of(stream_id, 4) for stream_id in ids]
    assert all(60 < chosen.count(engine) < 140 for engine in range(4))
