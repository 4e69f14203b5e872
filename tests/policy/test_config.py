"""The options: what is accepted, what is decided, and every error sentence."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sink_vllm.policy.bound import Bound
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import OPTION_KEYS, SinkOptions, flag
from sink_vllm.policy.schedule import Schedule

SINK = {"kv_policy": "sink"}
OPTIONS = f"the options are {', '.join(OPTION_KEYS)}."


@pytest.mark.parametrize(
    "additional_config",
    [None, {}, {"kv_policy": None}, {"kv_policy": "full"}, {"other": 1}, object()],
)
def test_policy_is_off_unless_asked_for(additional_config: object) -> None:
    assert SinkOptions.parse(additional_config) is None


def test_defaults() -> None:
    options = SinkOptions.parse(SINK | {"other_plugin": {"sink": 1}})

    assert options == SinkOptions(
        sink_tokens=4, sink_window=None, sink_stride=None, sink_prompt="stream"
    )


def test_null_in_json_means_not_given() -> None:
    given = SINK | {"sink_tokens": None, "sink_window": None}

    assert SinkOptions.parse(given) == SinkOptions()


def test_all_options() -> None:
    given = SINK | {
        "sink_tokens": 0,
        "sink_window": 1020,
        "sink_stride": 128,
        "sink_prompt": "truncate",
    }

    assert SinkOptions.parse(given) == SinkOptions(
        sink_tokens=0, sink_window=1020, sink_stride=128, sink_prompt="truncate"
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"kv_policy": "lru"},
            "--kv-policy='lru' is not a policy; use one of full, sink.",
        ),
        (
            {"kv_policy": True},
            "--kv-policy=True is not a policy; use one of full, sink.",
        ),
        (
            SINK | {"sink_windows": 9},
            "additional_config['sink_windows']=9 is not an option of sink_vllm; did you mean "
            f"'sink_window'? {OPTIONS}",
        ),
        (
            SINK | {"sink_qqqqqqqqqqqqqqq": 9},
            f"additional_config['sink_qqqqqqqqqqqqqqq']=9 is not an option of sink_vllm; {OPTIONS}",
        ),
        (
            {"kv-policy": "sink"},
            "additional_config['kv-policy']='sink' is not an option of sink_vllm; did you mean "
            f"'kv_policy'? {OPTIONS}",
        ),
        (
            SINK | {"SinkTokens": 2},
            "additional_config['SinkTokens']=2 is not an option of sink_vllm; did you mean "
            f"'sink_tokens'? {OPTIONS}",
        ),
        (
            {"sink_window": 9},
            "--sink-window=9 has no effect by itself; use --kv-policy sink or drop --sink-window.",
        ),
        (
            {"kv_policy": "full", "sink_tokens": 9},
            "--sink-tokens=9 contradicts --kv-policy full; use --kv-policy sink or drop "
            "--sink-tokens.",
        ),
        (
            SINK | {"sink_window": "9"},
            "--sink-window='9' is a str; use a whole number of tokens, 1 or more.",
        ),
        (
            SINK | {"sink_stride": 32.0},
            "--sink-stride=32.0 is a float; use a whole number of tokens, 1 or more.",
        ),
        (
            SINK | {"sink_tokens": True},
            "--sink-tokens=True is a bool; use a whole number of tokens, 0 or more.",
        ),
        (
            SINK | {"sink_tokens": -1},
            "--sink-tokens=-1 is too small; use 0 or more (tokens).",
        ),
        (
            SINK | {"sink_window": 0},
            "--sink-window=0 is too small; use 1 or more (tokens).",
        ),
        (
            SINK | {"sink_stride": 0},
            "--sink-stride=0 is too small; use 1 or more (tokens).",
        ),
        (
            SINK | {"sink_max_stream_tokens": -1},
            "--sink-max-stream-tokens=-1 is too small; use 0 or more (tokens).",
        ),
        (
            SINK | {"sink_max_stream_tokens": 1},
            "--sink-max-stream-tokens=1 leaves no room for output; use 2 to 2147483647 tokens, or "
            "0 for no bound.",
        ),
        (
            SINK | {"sink_max_stream_tokens": 2**31},
            "--sink-max-stream-tokens=2147483648 is more than vLLM counts; use 2 to 2147483647 "
            "tokens, or 0 for no bound.",
        ),
        (
            SINK | {"sink_host_gib": -1},
            "--sink-host-gib=-1 is no size; use a number of GiB, or 0 for none.",
        ),
        (
            SINK | {"sink_disk": ""},
            "--sink-disk='' is no path of a folder; use one.",
        ),
        (
            SINK | {"sink_host_gib": 1, "sink_disk": "/pages"},
            "--sink-disk='/pages' is nothing without --sink-disk-gib; use both, or drop it.",
        ),
        (
            SINK | {"sink_host_gib": 1, "sink_disk_gib": 0.5},
            "--sink-disk-gib=0.5 is nothing without --sink-disk; use both, or drop it.",
        ),
        (
            SINK | {"sink_disk": "/pages", "sink_disk_gib": 1},
            "--sink-disk='/pages' is read and written through host memory, and there is none; use "
            "--sink-host-gib, too.",
        ),
        (
            SINK | {"sink_prompt": "cut"},
            "--sink-prompt='cut' is not a prompt mode; use one of stream, truncate.",
        ),
        (
            SINK | {"sink_prompt": ["stream"]},
            "--sink-prompt=['stream'] is not a prompt mode; use one of stream, truncate.",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(list(value.items())[-1]),
)
def test_options_that_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"use|options are") as error:
        SinkOptions.parse(given)

    assert str(error.value) == sentence


def resolve(trained_len: int = 4096, others: Sequence[Bound] = (), **options: Any) -> SinkConfig:
    """Resolve ``options`` for blocks of 16 tokens, or what ``options`` say."""
    block_size = options.pop("block_size", 16)
    max_model_len = options.pop("max_model_len", None)
    return SinkConfig.resolve(
        SinkOptions(**options),
        block_size=block_size,
        bound=Bound.of(trained_len, others),
        max_model_len=max_model_len,
    )


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        # A sixteenth of 4096 is 256, the most a default stride is.
        ({}, Schedule(sink_tokens=4, window=3836, stride=256)),
        # However long the model was trained for: 8192 tokens unless somebody asks for more.
        ({"trained_len": 131072}, Schedule(sink_tokens=4, window=7932, stride=256)),
        ({"trained_len": 8193}, Schedule(sink_tokens=4, window=7932, stride=256)),
        ({"trained_len": 8191}, Schedule(sink_tokens=4, window=7931, stride=256)),
        (
            {"trained_len": 131072, "max_model_len": 131072},
            Schedule(sink_tokens=4, window=130812, stride=256),
        ),
        (
            {"trained_len": 131072, "sink_window": 20000},
            Schedule(sink_tokens=4, window=20000, stride=256),
        ),
        ({"max_model_len": 1024}, Schedule(sink_tokens=4, window=956, stride=64)),
        # A sixteenth of 1000 is 62, 48 in whole blocks.
        ({"max_model_len": 1000}, Schedule(sink_tokens=4, window=948, stride=48)),
        ({"sink_window": 1020}, Schedule(sink_tokens=4, window=1020, stride=64)),
        ({"sink_window": 1}, Schedule(sink_tokens=4, window=1, stride=16)),
        ({"sink_window": 1, "block_size": 128}, Schedule(sink_tokens=4, window=1, stride=128)),
        ({"sink_stride": 16}, Schedule(sink_tokens=4, window=4076, stride=16)),
        ({"sink_tokens": 0}, Schedule(sink_tokens=0, window=3840, stride=256)),
        ({"sink_tokens": 4079, "sink_stride": 16}, Schedule(sink_tokens=4079, window=1, stride=16)),
        # The window decides; --max-model-len may be larger.
        (
            {"sink_window": 100, "sink_stride": 32, "max_model_len": 2000},
            Schedule(sink_tokens=4, window=100, stride=32),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_numbers_that_are_decided(options: dict[str, Any], schedule: Schedule) -> None:
    config = resolve(**options)

    assert config.schedule == schedule
    assert config.max_model_len == schedule.capacity + 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"max_model_len": 5000},
            "--max-model-len=5000 is above 4096, the length the model was trained for; use 4096 "
            "or less.",
        ),
        (
            {"sink_stride": 40},
            "--sink-stride=40 is not a multiple of the KV block size 16; use 32 or 48.",
        ),
        (
            {"sink_stride": 5},
            "--sink-stride=5 is not a multiple of the KV block size 16; use 16.",
        ),
        (
            {"sink_stride": 5000},
            "--sink-stride=5000 is not a multiple of the KV block size 16; use 4080.",
        ),
        (
            {"sink_window": 100_000, "trained_len": 256, "block_size": 32},
            "--sink-window=100000 makes a capacity of 100036 tokens (4 sink tokens + 100000 window "
            "+ 32 stride), more than the 256 of the length the model was trained for; use a window "
            "of 220 or less.",
        ),
        (
            {"sink_window": 4000},
            "--sink-window=4000 makes a capacity of 4244 tokens (4 sink tokens + 4000 window + "
            "240 stride), more than the 4096 of the length the model was trained for; use a "
            "window of 3852 or less.",
        ),
        (
            {"sink_window": 500, "max_model_len": 512, "sink_stride": 16},
            "--sink-window=500 makes a capacity of 520 tokens (4 sink tokens + 500 window + 16 "
            "stride), more than the 512 of --max-model-len; use a window of 492 or less.",
        ),
        (
            {"sink_tokens": 4096},
            "--sink-tokens=4096 leaves no window beside a stride of 256 in 4096 tokens (the length "
            "the model was trained for); use 3839 or fewer.",
        ),
        (
            {"sink_stride": 512, "max_model_len": 512, "sink_window": 8},
            "--sink-stride=512 leaves no window behind 4 sink tokens in 512 tokens "
            "(--max-model-len); use 496 or less (a multiple of the KV block size 16).",
        ),
        (
            {"max_model_len": 20},
            "--max-model-len=20 is no room for a window behind 4 sink tokens and a stride of one "
            "KV block of 16 tokens; use 21 or more, or a smaller --block-size.",
        ),
        (
            {"trained_len": 20, "block_size": 32},
            "20 tokens (the length the model was trained for) is no room for a window behind 4 "
            "sink tokens and a stride of one KV block of 32 tokens; use --kv-policy full, or a "
            "smaller --block-size.",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_numbers_that_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="; use ") as error:
        resolve(**options)

    assert str(error.value) == sentence


_ADVICE = {
    "sink_stride": r"^--sink-stride=.*use (\d+)",
    "sink_window": r"^--sink-window=.*use a window of (\d+) or less",
    "sink_tokens": r"^--sink-tokens=.*use (\d+) or fewer",
    "max_model_len": r"^--max-model-len=.*use (\d+) or",
}


def advised(sentence: str) -> tuple[str, int]:
    """The option that a refusal names first, and the value it advises."""
    ((option, found),) = (
        (option, found) for option, rule in _ADVICE.items() if (found := re.search(rule, sentence))
    )
    return option, int(found[1])


def refusal_of(given: dict[str, Any]) -> str | None:
    try:
        resolve(**given)
    except ValueError as error:
        return str(error)
    return None


def test_advice_is_about_what_was_given_and_is_accepted() -> None:
    """Whoever follows each refusal starts, and never changes one option twice."""
    rng = random.Random(0)
    refusals: Counter[str] = Counter()
    for _ in range(20_000):
        most = rng.choice((40, 300, 5000))
        given = {
            "sink_tokens": rng.choice((4, rng.randrange(most))),
            "sink_window": rng.choice((None, rng.randrange(1, most))),
            "sink_stride": rng.choice((None, rng.randrange(1, most), 16 * rng.randrange(1, 40))),
            "max_model_len": rng.choice((None, rng.randrange(1, most))),
        }
        given = {key: value for key, value in given.items() if value is not None}
        fixed: dict[str, Any] = {"trained_len": rng.choice((64, 256, 4096)), "block_size": 16}
        changed: set[str] = set()
        while (refusal := refusal_of(given | fixed)) is not None:
            option, value = advised(refusal)
            assert option in given, (given, refusal)
            assert f"{flag(option)}={given[option]}" in refusal
            assert option not in changed, (given, refusal)
            refusals[option] += 1
            changed.add(option)
            given[option] = value
    assert min(refusals[option] for option in _ADVICE) > 100, refusals


SHORT = Bound(most=1000, default=500, name="the first positions of one temperature")


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        ({}, 500),
        ({"max_model_len": 1000}, 1000),
        ({"max_model_len": 300}, 300),
        ({"sink_window": 964, "sink_stride": 32}, 1000),
        ({"trained_len": 400}, 400),  # shorter than the other bound, and its default
        ({"trained_len": 700}, 500),
    ],
    ids=str,
)
def test_the_shortest_bound_counts(options: dict[str, Any], capacity: int) -> None:
    """It is the most a user can ask for; who asks for nothing gets the shortest default."""
    assert resolve(others=[SHORT], **options).capacity == capacity


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"max_model_len": 1001},
            "--max-model-len=1001 is above 1000, the first positions of one temperature; use 1000 "
            "or less.",
        ),
        (
            {"sink_window": 965, "sink_stride": 32},
            "--sink-window=965 makes a capacity of 1001 tokens (4 sink tokens + 965 window + 32 "
            "stride), more than the 1000 of the first positions of one temperature; use a window "
            "of 964 or less.",
        ),
        (
            {"sink_tokens": 490},
            "--sink-tokens=490 leaves no window beside a stride of 16 in 500 tokens (the default; "
            "--max-model-len may be up to 1000); use 483 or fewer.",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sentences_of_a_bound(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="--") as error:
        resolve(others=[SHORT], **options)

    assert str(error.value) == sentence


def test_every_number_is_consistent_or_refused() -> None:
    """Exhaustive small grid: what comes out satisfies every rule, whatever goes in."""
    accepted = 0
    for block, sinks, window, stride, limit in itertools.product(
        (1, 4, 16), (0, 1, 4, 20), (None, 1, 9, 40), (None, 1, 4, 16, 48), (None, 16, 50, 64)
    ):
        given: dict[str, Any] = {
            "sink_tokens": sinks,
            "sink_window": window,
            "sink_stride": stride,
        }
        try:
            config = resolve(64, **given, block_size=block, max_model_len=limit)
        except ValueError as error:
            assert "; use " in str(error)  # noqa: PT017 - both outcomes are right here
            continue
        accepted += 1
        schedule = config.schedule
        assert schedule.sink_tokens == sinks
        assert schedule.window >= 1
        assert schedule.stride >= block
        assert schedule.stride % block == 0
        assert config.capacity <= (limit or 64)
        assert window in (None, schedule.window)
        assert stride in (None, schedule.stride)
        # Without a window, nothing of the limit is left unused.
        assert window is not None or config.capacity == (limit or 64)
    assert accepted > 200


def test_resolved_options_are_parsed_to_the_same_policy() -> None:
    config = resolve(sink_window=1000, sink_prompt="truncate", sink_max_stream_tokens=5000)

    spelled = {"other": 1} | config.as_additional_config()

    assert set(config.as_additional_config()) <= set(OPTION_KEYS)
    assert SinkConfig.of(_vllm_config(spelled)) == config


def test_of_an_unresolved_configuration_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"build the VllmConfig with EngineArgs"):
        SinkConfig.of(_vllm_config(SINK | {"sink_window": 10}))


def test_of_a_configuration_without_the_policy_is_none() -> None:
    assert SinkConfig.of(_vllm_config({})) is None
    assert SinkConfig.of(_vllm_config(object())) is None


def test_flag_spelling() -> None:
    assert [flag(key) for key in OPTION_KEYS[:2]] == ["--kv-policy", "--sink-tokens"]


@pytest.mark.parametrize(
    ("native", "kinds", "one_table", "expected"),
    [
        (1000, ["sliding_attention", "full_attention"], False, 1001),
        (1001, ["sliding_attention", "full_attention"], False, 0),  # reaches the sinks
        (1000, ["sliding_attention", "full_attention"], True, 0),
        (1000, ["sliding_attention"], False, 0),  # no layer left to keep the sinks
        (None, ["full_attention"], False, 0),
        (1000, None, False, 0),
    ],
)
def test_windows_that_have_page_tables_of_their_own(
    native: int | None, kinds: list[str] | None, one_table: bool, expected: int
) -> None:
    spelled = resolve(sink_window=1000).as_additional_config()
    model = {"sliding_window": native, "layer_types": kinds}

    config = SinkConfig.of(_vllm_config(spelled, one_table=one_table, **model))

    assert config is not None
    assert config.native_window == expected


def _vllm_config(
    additional_config: object, one_table: bool = False, **model: object
) -> SimpleNamespace:
    """The fields of a ``VllmConfig`` that are read; the real one is in test_engine_args."""
    return SimpleNamespace(
        additional_config=additional_config,
        cache_config=SimpleNamespace(block_size=16),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=one_table),
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**model), is_hybrid=False),
    )


def test_what_is_said_of_a_page_that_must_hold_a_state() -> None:
    """Why it is so large; and no smaller ``--block-size`` is advised, which would not help."""
    bound = Bound.of(4096, [])
    with pytest.raises(ValueError, match=r"^--sink-stride=32 .* 528, in which the state of a rec"):
        SinkConfig.resolve(SinkOptions(sink_stride=32), block_size=528, bound=bound, states=True)
    with pytest.raises(ValueError, match=r"tokens, in which the state .*; use 533 or more\.$"):
        SinkConfig.resolve(
            SinkOptions(), block_size=528, bound=bound, max_model_len=500, states=True
        )
