"""The flags, through vLLM's own parsers and commands."""

import argparse
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sink_vllm.plugin import register
from sink_vllm.policy.options import OPTION_KEYS
from sink_vllm.server import cli

ALL_FLAGS = [
    *("--kv-policy", "sink"),
    *("--sink-tokens", "8"),
    *("--sink-window", "1000"),
    *("--sink-stride", "64"),
    *("--sink-prompt", "truncate"),
]
ALL_KEYS = {
    "kv_policy": "sink",
    "sink_tokens": 8,
    "sink_window": 1000,
    "sink_stride": 64,
    "sink_prompt": "truncate",
}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


@pytest.fixture
def parser() -> FlexibleArgumentParser:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def additional_config(parser: FlexibleArgumentParser, *words: str) -> dict[str, Any]:
    return parser.parse_args([*words]).additional_config


def test_every_flag_lands_in_additional_config(parser: FlexibleArgumentParser) -> None:
    assert additional_config(parser, *ALL_FLAGS) == ALL_KEYS


def test_underscores_and_equal_signs_are_the_same_flags(parser: FlexibleArgumentParser) -> None:
    assert additional_config(parser, "--kv_policy=sink", "--sink_window=1000") == {
        "kv_policy": "sink",
        "sink_window": 1000,
    }


def test_nothing_given_leaves_the_namespace_as_vllm_made_it(
    parser: FlexibleArgumentParser,
) -> None:
    cli.PATCHES[0].revert()
    try:
        stock = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    finally:
        cli.PATCHES[0].apply()

    assert vars(parser.parse_args([])) == vars(stock.parse_args([]))


def test_one_parse_does_not_leak_into_the_next(parser: FlexibleArgumentParser) -> None:
    """argparse hands out one default dictionary for all parses."""
    additional_config(parser, *ALL_FLAGS)

    assert additional_config(parser) == {}


@pytest.mark.parametrize(
    "words",
    [
        ["--additional-config", '{"other": 1}', "--kv-policy", "sink"],
        ["--kv-policy", "sink", "--additional-config", '{"other": 1}'],
        ["--kv-policy", "sink", "--additional-config.other", "1"],
        ["--additional-config.other", "1", "--kv-policy", "sink"],
        ["--kv-policy", "sink", "--additional-config", '{"other": 1, "kv_policy": "sink"}'],
    ],
    ids=["json first", "flag first", "dotted", "dotted first", "both say the same"],
)
def test_flags_and_json_are_merged(parser: FlexibleArgumentParser, words: list[str]) -> None:
    assert additional_config(parser, *words) == {"other": 1, "kv_policy": "sink"}


@pytest.mark.parametrize(
    "words",
    [
        ["--sink-window", "10", "--additional-config", '{"sink_window": 20}'],
        ["--additional-config", '{"sink_window": 20}', "--sink-window", "10"],
        ["--additional-config.sink_window", "20", "--sink-window", "10"],
    ],
    ids=["flag first", "json first", "dotted"],
)
def test_flag_against_json_is_an_error(
    parser: FlexibleArgumentParser, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(words)

    assert (
        "--sink-window=10 contradicts --additional-config with sink_window=20; give one of them."
        in capsys.readouterr().err
    )


def test_json_twice_is_what_vllm_makes_of_it(parser: FlexibleArgumentParser) -> None:
    """The later one replaces the earlier one; only our flags are merged."""
    words = ["--additional-config", '{"a": 1}', "--additional-config", '{"b": 2}']

    assert additional_config(parser, *words) == {"b": 2}
    assert additional_config(parser, *words, "--sink-tokens", "0") == {"b": 2, "sink_tokens": 0}


def test_flag_twice_takes_the_later_one(parser: FlexibleArgumentParser) -> None:
    """That is how the command line overrides a YAML file."""
    words = ["--sink-window", "10", "--sink-window", "20"]

    assert additional_config(parser, *words) == {"sink_window": 20}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-policy", "lru"], "invalid choice: 'lru'"),
        (["--sink-prompt", "drop"], "invalid choice: 'drop'"),
        (["--sink-window", "4k"], "invalid int value: '4k'"),
        (["--sink-tokens"], "expected one argument"),
    ],
)
def test_bad_words_end_with_the_flag_and_the_value(
    parser: FlexibleArgumentParser,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(words)

    error = capsys.readouterr().err
    assert words[0] in error
    assert message in error


@pytest.mark.parametrize("keyword", ["StreamingLLM", "streamingllm"])
def test_help_of_the_group_shows_every_flag(
    parser: FlexibleArgumentParser, keyword: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args([f"--help={keyword}"])

    text = capsys.readouterr().out
    assert [key for key in OPTION_KEYS if "--" + key.replace("_", "-") not in text] == []
    assert text.count("Default:") == len(OPTION_KEYS)
    assert "None" not in text


class _Command:
    """Runs the ``vllm`` command up to the point where it would start working."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.entrypoints.cli.benchmark.latency import BenchmarkLatencySubcommand
        from vllm.entrypoints.cli.benchmark.throughput import BenchmarkThroughputSubcommand
        from vllm.entrypoints.cli.serve import ServeSubcommand

        self.seen: list[argparse.Namespace] = []
        self._monkeypatch = monkeypatch
        commands = (ServeSubcommand, BenchmarkLatencySubcommand, BenchmarkThroughputSubcommand)
        for command in commands:
            monkeypatch.setattr(command, "cmd", staticmethod(self.seen.append))

    def __call__(self, *words: str) -> dict[str, Any]:
        from vllm.entrypoints.cli.main import main

        self._monkeypatch.setattr("sys.argv", ["vllm", *words])
        main()
        return self.seen[-1].additional_config


@pytest.fixture
def vllm_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Command]:
    # The command sets this for its children; not for the other tests of this process.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    yield _Command(monkeypatch)
    FlexibleArgumentParser._search_keyword = None


@pytest.mark.parametrize(
    "command",
    [["serve", "some/model"], ["bench", "latency"], ["bench", "throughput"]],
    ids=" ".join,
)
def test_guard_every_command_builds_its_parser_from_the_patched_method(
    vllm_command: _Command, command: list[str]
) -> None:
    assert vllm_command(*command, *ALL_FLAGS) == ALL_KEYS


def test_yaml_file_takes_the_flags_and_the_command_line_overrides_it(
    vllm_command: _Command, tmp_path: Path
) -> None:
    settings = tmp_path / "serve.yaml"
    settings.write_text(
        "model: some/model\nkv-policy: sink\nsink_window: 500\nsink-tokens: 0\n"
        "additional-config:\n  other:\n    deep: 1\n"
    )

    given = vllm_command("serve", "--config", str(settings), "--sink-window", "600")

    assert given == {
        "kv_policy": "sink",
        "sink_window": 600,
        "sink_tokens": 0,
        "other": {"deep": 1},
    }
    assert json.loads(json.dumps(given)) == given


@pytest.mark.parametrize(
    "words", [["--kv-policy", "sink"], ["--additional-config", '{"kv_policy": "sink"}']]
)
def test_render_server_refuses_the_options(
    vllm_command: _Command, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no engine, builds no engine configuration, and would ignore them."""
    with pytest.raises(SystemExit):
        vllm_command("launch", "render", "some/model", *words)

    assert "no effect on a render server" in capsys.readouterr().err


def test_guard_additional_config_is_a_plain_store_action() -> None:
    """We change the class of this action; a class of vLLM's own must not be lost."""
    cli.PATCHES[0].revert()
    try:
        stock = EngineArgs.add_cli_args(FlexibleArgumentParser())
    finally:
        cli.PATCHES[0].apply()

    assert type(stock._option_string_actions["--additional-config"]) is argparse._StoreAction


def test_guard_add_cli_args_is_a_static_method_of_one_parser() -> None:
    stored = inspect.getattr_static(EngineArgs, "add_cli_args")

    assert isinstance(stored, staticmethod)
    assert list(inspect.signature(EngineArgs.add_cli_args).parameters) == ["parser"]
