"""The options of the policy: one frozen object, parsed once from ``additional_config``.

The command line flags only fill ``additional_config`` (the channel vLLM offers to plugins), so
``vllm serve``, YAML files, ``LLM(...)`` and Ray deployments share the checks in this file.
Imports neither torch nor vLLM.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

POLICY_KEY = "kv_policy"
OPTION_KEYS = (
    POLICY_KEY,
    "sink_tokens",
    "sink_window",
    "sink_stride",
    "sink_prompt",
    "sink_pin",
    "sink_max_stream_tokens",
    "sink_streams",
    "sink_streams_idle",
    "sink_streams_tokens",
    "sink_streams_db",
    "sink_host_gib",
    "sink_disk",
    "sink_disk_gib",
)
POLICIES = ("full", "sink")
PROMPT_MODES = ("stream", "truncate")
PIN_MODES = ("none", "system")
DEFAULT_SINK_TOKENS = 4
MOST_STREAM_TOKENS = 2**31 - 1
"""Prompt and output together: vLLM's V2 model runner keeps the sum in an int32."""
PromptMode = Literal["stream", "truncate"]
PinMode = Literal["none", "system"]


def flag(key: str) -> str:
    """The command line spelling of an ``additional_config`` key."""
    return "--" + key.replace("_", "-")


def _is_ours(key: object) -> bool:
    """Whether ``key`` is one of our options, or a misspelling that nobody else would use."""
    if not isinstance(key, str):
        return False
    bare = key.replace("-", "").replace("_", "").lower()
    return key.startswith(("sink_", POLICY_KEY)) or bare in (
        k.replace("_", "") for k in OPTION_KEYS
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkOptions:
    """What the user asked for; ``None`` means "choose for me"."""

    sink_tokens: int = DEFAULT_SINK_TOKENS
    sink_window: int | None = None
    sink_stride: int | None = None
    sink_prompt: PromptMode = "stream"
    sink_pin: PinMode = "none"
    sink_max_stream_tokens: int = 0
    """Most tokens of prompt and output of one request; 0 for no bound."""
    sink_streams: int = 256
    """Streams that ``/v1/streams`` remembers at once."""
    sink_streams_idle: int = 3600
    """Seconds after which it forgets a stream nobody appends to."""
    sink_streams_tokens: int = 2**26
    """Tokens it holds of all streams together, four bytes each."""
    sink_streams_db: str | None = None
    """Database that its streams outlive the server in."""
    sink_host_gib: float = 0
    """Host memory for pages that the block pool has reused, of all workers of an engine."""
    sink_disk: str | None = None
    """Folder for pages that outlive the server."""
    sink_disk_gib: float = 0
    """Bytes in it, in GiB."""

    @classmethod
    def parse(cls, additional_config: object) -> "SinkOptions | None":
        """Options in ``additional_config``; ``None`` when the policy is off.

        Keys of other plugins are left alone, and so is anything that is not a mapping (vLLM
        allows other objects there).

        Raises:
            ValueError: unknown ``sink_…`` or ``kv_policy…`` key, wrong type, value out of range,
                or sink options without ``kv_policy="sink"``.
        """
        if not isinstance(additional_config, Mapping):
            return None
        given = {key: value for key, value in additional_config.items() if _is_ours(key)}
        for key, value in given.items():
            if key not in OPTION_KEYS:
                near = difflib.get_close_matches(key, OPTION_KEYS, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"additional_config[{key!r}]={value!r} is not an option of sink_vllm; "
                    f"{hint}the options are {', '.join(OPTION_KEYS)}."
                )
        policy = given.pop(POLICY_KEY, None)
        if policy not in (None, *POLICIES):
            raise ValueError(
                f"{flag(POLICY_KEY)}={policy!r} is not a policy; use one of {', '.join(POLICIES)}."
            )
        given = {key: value for key, value in given.items() if value is not None}
        if policy == "sink":
            return cls(**given)
        if given:
            key, value = next(iter(given.items()))
            clash = "contradicts --kv-policy full" if policy else "has no effect by itself"
            raise ValueError(
                f"{flag(key)}={value!r} {clash}; use {flag(POLICY_KEY)} sink or drop {flag(key)}."
            )
        return None

    def __post_init__(self) -> None:
        for key, least, unit in (
            ("sink_tokens", 0, "tokens"),
            ("sink_window", 1, "tokens"),
            ("sink_stride", 1, "tokens"),
            ("sink_max_stream_tokens", 0, "tokens"),
            ("sink_streams", 1, "streams"),
            ("sink_streams_idle", 1, "seconds"),
            ("sink_streams_tokens", 1, "tokens"),
        ):
            value = getattr(self, key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(
                    f"{flag(key)}={value!r} is a {type(value).__name__}; use a whole number of "
                    f"{unit}, {least} or more."
                )
            if value < least:
                raise ValueError(f"{flag(key)}={value} is too small; use {least} or more ({unit}).")
        path: object = self.sink_streams_db
        if path is not None and (not isinstance(path, str) or not path):
            raise ValueError(f"{flag('sink_streams_db')}={path!r} is no path of a file; name one.")
        self._check_tiers()
        if (most := self.sink_max_stream_tokens) == 1 or most > MOST_STREAM_TOKENS:
            reason = "leaves no room for output" if most == 1 else "is more than vLLM counts"
            raise ValueError(
                f"{flag('sink_max_stream_tokens')}={most} {reason}; use 2 to {MOST_STREAM_TOKENS} "
                "tokens, or 0 for no bound."
            )
        for key, modes, what in (
            ("sink_prompt", PROMPT_MODES, "prompt mode"),
            ("sink_pin", PIN_MODES, "pin"),
        ):
            if (mode := getattr(self, key)) not in modes:
                raise ValueError(
                    f"{flag(key)}={mode!r} is not a {what}; use one of {', '.join(modes)}."
                )

    def _check_tiers(self) -> None:
        for key in ("sink_host_gib", "sink_disk_gib"):
            gib: object = getattr(self, key)
            if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 <= gib < 2**20:
                raise ValueError(
                    f"{flag(key)}={gib!r} is no size; use a number of GiB, or 0 for none."
                )
        path: object = self.sink_disk
        if path is not None and (not isinstance(path, str) or not path):
            raise ValueError(f"{flag('sink_disk')}={path!r} is no path of a folder; use one.")
        if bool(self.sink_disk) != bool(self.sink_disk_gib):
            given, other = ("sink_disk", "sink_disk_gib")[:: 1 if self.sink_disk else -1]
            raise ValueError(
                f"{flag(given)}={getattr(self, given)!r} is nothing without {flag(other)}; use "
                "both, or drop it."
            )
        if self.sink_disk and not self.sink_host_gib:
            raise ValueError(
                f"{flag('sink_disk')}={self.sink_disk!r} is read and written through host memory, "
                f"and there is none; use {flag('sink_host_gib')}, too."
            )
