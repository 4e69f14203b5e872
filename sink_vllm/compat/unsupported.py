"""Beside a vLLM that this release was not made for: nothing, but that the policy is refused.

Nothing of such a vLLM is known, so little is asked of it: that ``EngineArgs`` builds parsers and
configurations by the names it has had for years. Flags are taken without being shown, so that they
can be refused; ``additional_config`` is looked at, because vLLM would carry it around and run
without the policy. If even those names are gone, vLLM itself refuses the flags, as unknown ones.
"""

import argparse
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from sink_vllm.compat.patching import Patch
from sink_vllm.compat.versions import refusal_of
from sink_vllm.gate.refused import Refused, end_with_the_sentence
from sink_vllm.policy.options import OPTION_KEYS, POLICY_KEY, flag


def refuse_the_policy() -> None:
    """Let whoever asks for the policy get a sentence; nobody else notices. Idempotent."""
    for patch in PATCHES:
        with contextlib.suppress(RuntimeError):  # no such name in this vLLM
            patch.apply()


def _refused() -> Refused:
    from vllm import __version__ as found

    return Refused(refusal_of(found))


class _RefuseOption(argparse.Action):
    """One of our flags; ``--kv-policy full`` is what runs anyway."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *args: Any
    ) -> None:
        if (self.dest, values) != (POLICY_KEY, "full"):
            raise _refused()


def _wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(*args: Any, **kwargs: Any) -> Any:
        parser = original(*args, **kwargs)
        if isinstance(parser, argparse.ArgumentParser):
            end_with_the_sentence()
            for key in OPTION_KEYS:
                with contextlib.suppress(argparse.ArgumentError):  # this vLLM has it
                    parser.add_argument(
                        flag(key),
                        action=_RefuseOption,
                        dest=key,
                        default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS,
                    )
        return parser

    return add_cli_args


def _wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = getattr(self, "additional_config", None)
        if isinstance(options, Mapping) and options.get(POLICY_KEY) == "sink":
            raise _refused()
        return original(self, *args, **kwargs)

    return create_engine_config


_RECORD = "0040-beside-another-vllm"
PATCHES = (
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        wrapper=_wrap_add_cli_args,
        record=_RECORD,
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        wrapper=_wrap_create_engine_config,
        record=_RECORD,
    ),
)
