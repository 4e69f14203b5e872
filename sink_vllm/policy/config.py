"""The options of the policy: one frozen object, parsed once from ``additional_config``.

The command line flags only fill ``additional_config`` (the channel vLLM offers to plugins), so
``vllm serve``, YAML files, ``LLM(...)`` and Ray deployments share the checks in this file.
Imports neither torch nor vLLM.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sink_vllm.policy.schedule import Schedule

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
)
POLICIES = ("full", "sink")
PROMPT_MODES = ("stream", "truncate")
PIN_MODES = ("none", "system")
DEFAULT_SINK_TOKENS = 4
MOST_STREAM_TOKENS = 2**31 - 1
"""Prompt and output together: vLLM's V2 model runner keeps the sum in an int32."""
_STRIDE_SHARE = 16  # default stride: a sixteenth of the capacity, in whole blocks, ...
_STRIDE_CAP = 256  # ... but not more: a longer stride saves nothing measurable

PromptMode = Literal["stream", "truncate"]
PinMode = Literal["none", "system"]


def _default_stride(basis: int, block_size: int) -> int:
    """A share of ``basis`` tokens, in whole blocks, at least one."""
    share = min(basis // _STRIDE_SHARE, _STRIDE_CAP) // block_size * block_size
    return max(share, block_size)


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
    """Tokens it remembers of all streams together, four bytes each."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkConfig:
    """The policy as it runs: every number decided, in tokens."""

    schedule: Schedule
    block_size: int
    sink_prompt: PromptMode = "stream"
    sink_pin: PinMode = "none"
    max_stream_tokens: int = 0
    """Most tokens of prompt and output of one request; 0 for no bound."""
    native_window: int = 0
    """Longest window (tokens) of layers that have page tables of their own; 0 if none have."""

    @property
    def capacity(self) -> int:
        return self.schedule.capacity

    @property
    def max_model_len(self) -> int:
        """The engine's ``max_model_len``: room for the ``C`` cached tokens and the next one."""
        return self.capacity + 1

    def as_additional_config(self) -> dict[str, Any]:
        """The same policy spelled as options, so that every process parses the same numbers."""
        return {
            POLICY_KEY: "sink",
            "sink_tokens": self.schedule.sink_tokens,
            "sink_window": self.schedule.window,
            "sink_stride": self.schedule.stride,
            "sink_prompt": self.sink_prompt,
            "sink_pin": self.sink_pin,
            "sink_max_stream_tokens": self.max_stream_tokens,
        }

    @classmethod
    def resolve(
        cls,
        options: SinkOptions,
        *,
        block_size: int,
        trained_len: int,
        max_model_len: int | None = None,
    ) -> "SinkConfig":
        """Fill in window and stride, and check every number against the others.

        Args:
            options: what the user asked for.
            block_size: tokens per KV page.
            trained_len: tokens the model was trained for (with its RoPE scaling).
            max_model_len: ``--max-model-len`` as given; the capacity when no window is given.

        Raises:
            ValueError: one sentence that names option, value, rule and way out.
        """
        if max_model_len is not None and max_model_len > trained_len:
            raise ValueError(
                f"--max-model-len={max_model_len} is above the {trained_len} tokens the model was "
                f"trained for, and a stream never needs more cache than that; use "
                f"{trained_len} or less."
            )
        if max_model_len is None:
            limit, limit_name = trained_len, "the length the model was trained for"
        else:
            limit, limit_name = max_model_len, "--max-model-len"
        sinks = options.sink_tokens
        basis = limit if options.sink_window is None else min(sinks + options.sink_window, limit)
        stride = options.sink_stride or _default_stride(basis, block_size)
        room = limit - sinks - stride
        if stride % block_size or room < 1:
            raise ValueError(_no_window(options, stride, block_size, trained_len, max_model_len))
        window = options.sink_window or room
        if window > room:
            raise ValueError(
                f"--sink-window={window} makes a capacity of {sinks + window + stride} tokens "
                f"({sinks} sink tokens + {window} window + {stride} stride), more than the "
                f"{limit} of {limit_name}; use a window of {room} or less."
            )
        return cls(
            schedule=Schedule(sink_tokens=sinks, window=window, stride=stride),
            block_size=block_size,
            sink_prompt=options.sink_prompt,
            sink_pin=options.sink_pin,
            max_stream_tokens=options.sink_max_stream_tokens,
        )

    @classmethod
    def of(cls, vllm_config: Any) -> "SinkConfig | None":
        """The policy of a finished ``VllmConfig``; ``None`` when it is off.

        Start-up has written every number into ``additional_config`` (see
        ``sink_vllm.server.engine_args``), so nothing is chosen here.
        """
        options = SinkOptions.parse(vllm_config.additional_config)
        if options is None:
            return None
        if options.sink_window is None or options.sink_stride is None:
            raise ValueError(
                f"additional_config={vllm_config.additional_config!r} has not been resolved by "
                "sink_vllm; build the VllmConfig with EngineArgs.create_engine_config()."
            )
        return cls(
            schedule=Schedule(
                sink_tokens=options.sink_tokens,
                window=options.sink_window,
                stride=options.sink_stride,
            ),
            block_size=vllm_config.cache_config.block_size,
            sink_prompt=options.sink_prompt,
            sink_pin=options.sink_pin,
            max_stream_tokens=options.sink_max_stream_tokens,
            native_window=_native_window(vllm_config, options.sink_window),
        )


def _no_window(
    options: SinkOptions, stride: int, block_size: int, trained_len: int, max_model_len: int | None
) -> str:
    """Why no window is left, or no whole stride: what to blame, and a value that helps.

    A number of ours, such as the default stride, is never the one to blame.
    """
    sinks = options.sink_tokens
    limit = trained_len if max_model_len is None else max_model_len
    source = "the length the model was trained for" if max_model_len is None else "--max-model-len"
    blocks = (limit - sinks - 1) // block_size  # in the longest possible stride
    if options.sink_stride is not None and blocks > 0:
        if stride % block_size == 0:
            return (
                f"--sink-stride={stride} leaves no window behind {sinks} sink tokens in "
                f"{limit} tokens ({source}); use {blocks * block_size} or less (a multiple of the "
                f"KV block size {block_size})."
            )
        near = {min(max(stride // block_size + up, 1), blocks) * block_size for up in (0, 1)}
        return (
            f"--sink-stride={stride} is not a multiple of the KV block size {block_size}; use "
            f"{' or '.join(map(str, sorted(near)))}."
        )
    if limit <= stride or stride % block_size:
        stride = block_size
    least = sinks + block_size + 1
    if limit <= stride and least > trained_len:  # no --max-model-len is enough
        limit, source = trained_len, "the length the model was trained for"
    if sinks != DEFAULT_SINK_TOKENS and limit > stride:
        return (
            f"--sink-tokens={sinks} leaves no window beside a stride of {stride} in {limit} tokens "
            f"({source}); use {limit - stride - 1} or fewer."
        )
    what = f"--max-model-len={limit}" if limit != trained_len else f"{limit} tokens ({source})"
    way_out = f"{least} or more" if least <= trained_len else "--kv-policy full"
    return (
        f"{what} is no room for a window behind {sinks} sink tokens and a stride of one KV block "
        f"of {block_size} tokens; use {way_out}, or a smaller --block-size."
    )


def _native_window(vllm_config: Any, window: int) -> int:
    """The window of sliding-window layers, if they can have page tables of their own.

    They can if other layers see everything, if their window never reaches the sinks, and unless
    ``--disable-hybrid-kv-cache-manager`` asks for one table.
    """
    text_config = vllm_config.model_config.hf_text_config
    kinds = set(getattr(text_config, "layer_types", None) or ())
    native = getattr(text_config, "sliding_window", None)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager or not (
        native and kinds == {"full_attention", "sliding_attention"}
    ):
        return 0
    # Some models (Cohere2) see one token more than their configuration says.
    return native + 1 if native <= window else 0
