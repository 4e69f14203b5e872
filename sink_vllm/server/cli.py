"""The command line flags ``--kv-policy sink`` and friends.

The flags are sugar: while argparse reads them they are written into ``--additional-config``, the
dictionary that vLLM carries to every process for plugins. It has to happen while parsing, because
with several API servers vLLM pickles the parsed arguments and rebuilds its ``EngineArgs`` in
processes that load the plugin too late to see any other hook.

vLLM builds the parsers of ``serve``, ``launch``, ``run-batch`` and ``bench latency`` or
``throughput`` from the same method, so one patch reaches all of them, and YAML files
(``--config``) too, because vLLM turns their keys into command line words first.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from sink_vllm.compat.patching import Patch
from sink_vllm.gate.refused import end_with_the_sentence
from sink_vllm.policy.bound import DEFAULT_CAPACITY
from sink_vllm.policy.options import (
    DEFAULT_SINK_TOKENS,
    OPTION_KEYS,
    PIN_MODES,
    POLICIES,
    POLICY_KEY,
    PROMPT_MODES,
    flag,
)

GROUP_TITLE = "StreamingLLM"
_DEST = "additional_config"
_OPTION = "--additional-config"

_DESCRIPTION = (
    "Endless streams at constant memory and cost per token (sink_vllm): a stream keeps its first "
    "tokens (sink tokens) and its most recent tokens (the window) in the KV cache and evicts "
    "what lies between."
)
_FLAGS: dict[str, dict[str, Any]] = {
    POLICY_KEY: {
        "choices": POLICIES,
        "help": "What happens when a stream is longer than its cache. 'full' is vLLM as it is. "
        "'sink' evicts the oldest tokens that are not sink tokens and goes on, with no limit on "
        "prompt or output. Default: full.",
    },
    "sink_tokens": {
        "type": int,
        "metavar": "TOKENS",
        "help": "First tokens of every stream that are never evicted, in tokens; may cover a "
        "whole system prompt. 0 keeps none (a plain sliding window, which models trained "
        f"without it do not survive). Default: {DEFAULT_SINK_TOKENS}.",
    },
    "sink_window": {
        "type": int,
        "metavar": "TOKENS",
        "help": "Most recent tokens that are always kept, in tokens. Default: what "
        "--max-model-len, or else the smaller of the length the model was trained for and "
        f"{DEFAULT_CAPACITY} tokens, leaves after sink tokens and stride.",
    },
    "sink_stride": {
        "type": int,
        "metavar": "TOKENS",
        "help": "Tokens evicted at once, in tokens; a multiple of --block-size. Smaller is "
        "closer to the paper, larger is cheaper. Default: about a sixteenth of the cache, at "
        "most 256.",
    },
    "sink_prompt": {
        "choices": PROMPT_MODES,
        "help": "What happens to a prompt longer than the cache. 'stream' computes every token "
        "of it, evicting on the way. 'truncate' skips computing the tokens that would be "
        "evicted: faster, and the tokens that are kept have not seen the skipped ones. A "
        "conversation whose pages are still in the prefix cache goes on from them in both, so "
        "with 'truncate' an answer may depend on what is cached. Default: stream.",
    },
    "sink_pin": {
        "choices": PIN_MODES,
        "help": "What else is never evicted. 'system': all tokens up to the end of the first "
        "system message of a chat are its sink tokens (never fewer than --sink-tokens). "
        "Default: none.",
    },
    "sink_max_stream_tokens": {
        "type": int,
        "metavar": "TOKENS",
        "help": "Most tokens of prompt and output of one request, for every request: a prompt "
        "that leaves no room is refused (400), an answer ends there with finish_reason 'length'. "
        "0 sets no bound. Default: 0.",
    },
    "sink_streams": {
        "type": int,
        "metavar": "STREAMS",
        "help": "Most streams that /v1/streams remembers at once; the client that holds the most "
        "loses its least recently used one first. The endpoint is loaded when VLLM_PLUGINS names "
        "sink_vllm. Default: 256.",
    },
    "sink_streams_idle": {
        "type": int,
        "metavar": "SECONDS",
        "help": "After how many seconds without use /v1/streams forgets a stream. Default: 3600.",
    },
    "sink_streams_tokens": {
        "type": int,
        "metavar": "TOKENS",
        "help": "Most tokens that /v1/streams holds of all its streams together, at four bytes "
        "each; the client that holds the most loses its least recently used stream first. "
        "Default: 67108864.",
    },
    "sink_streams_db": {
        "type": str,
        "metavar": "PATH",
        "help": "SQLite database in which the streams of /v1/streams outlive the server; made if "
        "there is none. Default: they are forgotten with it.",
    },
    "sink_host_gib": {
        "type": float,
        "metavar": "GIB",
        "help": "Host memory in which an engine (all its workers together) keeps pages of streams "
        "and conversations whose turn has ended. When the block pool has reused them, they are "
        "copied back instead of computed again. 0 keeps none. Default: 0.",
    },
    "sink_disk": {
        "type": str,
        "metavar": "PATH",
        "help": "Folder in which the same pages are kept beyond host memory and beyond the server; "
        "made if there is none. Needs --sink-host-gib, through which they are read and written. "
        "Default: none.",
    },
    "sink_disk_gib": {
        "type": float,
        "metavar": "GIB",
        "help": "Most that an engine keeps in that folder; the least recently used goes first. "
        "Default: 0.",
    },
}


class _StoreOption(argparse.Action):
    """Store the value of one flag, and put it into ``additional_config`` at once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _refuse_without_engine(parser, self)
        config = dict(getattr(namespace, _DEST, None) or {})  # argparse shares its default dict
        earlier = getattr(namespace, self.dest, None)
        # The flag given twice (YAML, then command line) is an override, not a contradiction.
        if self.dest in config and config[self.dest] not in (values, earlier):
            raise _contradiction(self, self.dest, values, config[self.dest])
        setattr(namespace, self.dest, values)
        setattr(namespace, _DEST, config | {self.dest: values})


class _MergeOptions(argparse._StoreAction):
    """``--additional-config`` that keeps what flags of ours have put there before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if isinstance(values, dict) and POLICY_KEY in values:
            _refuse_without_engine(parser, self)
        given = {key: getattr(namespace, key, None) for key in OPTION_KEYS}
        given = {key: value for key, value in given.items() if value is not None}
        if given:
            values = dict(values or {})
            for key, value in given.items():
                if values.setdefault(key, value) != value:
                    raise _contradiction(self, key, value, values[key])
        super().__call__(parser, namespace, values, option_string)


def _refuse_without_engine(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    """``vllm launch render`` would drop the options silently: it builds no engine configuration."""
    if parser.prog.endswith(" render"):  # argparse puts the usage of "vllm launch" in front
        raise argparse.ArgumentError(
            action,
            "--kv-policy and its options have no effect on a render server, which keeps vLLM's "
            "length limits; use vllm serve.",
        )


def _contradiction(
    action: argparse.Action, key: str, by_flag: Any, by_json: Any
) -> argparse.ArgumentError:
    return argparse.ArgumentError(
        action,
        f"{flag(key)}={by_flag!r} contradicts {_OPTION} with {key}={by_json!r}; give one of them.",
    )


def _wrap_add_cli_args(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        end_with_the_sentence()
        group = parser.add_argument_group(title=GROUP_TITLE, description=_DESCRIPTION)
        for key, settings in _FLAGS.items():
            # SUPPRESS: what is not given is not in the namespace, which stays as vLLM made it.
            group.add_argument(
                flag(key), action=_StoreOption, default=argparse.SUPPRESS, **settings
            )
        # argparse offers no other way to reach an option that somebody else has added.
        parser._option_string_actions[_OPTION].__class__ = _MergeOptions
        return parser

    return add_cli_args


PATCHES = (
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        wrapper=_wrap_add_cli_args,
        record="0001-engine-args-add-cli-args",
    ),
)
