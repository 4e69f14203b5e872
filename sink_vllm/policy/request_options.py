"""What one request may choose for itself, inside what the server was started with.

Over the OpenAI API the options stand in ``vllm_xargs``, elsewhere in ``SamplingParams.extra_args``
(vLLM copies the one into the other)::

    {"kv_policy": "full"}                        this request as in stock vLLM, at most C tokens
    {"sink_tokens": 300, "sink_window": 128}     other sink tokens, a smaller window

The front end checks them once and leaves the normalised options in ``extra_args``; the scheduler
reads those with the same function. Absent means the server's own value. The stride is the
server's, and so is the capacity: ``S' + W' + g <= C``. Imports neither torch nor vLLM.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import PIN_MODES, POLICIES, POLICY_KEY, flag
from sink_vllm.policy.schedule import Schedule, cdiv, pages_per_stream

TOKENS_KEY = "sink_tokens"
WINDOW_KEY = "sink_window"
PIN_KEY = "sink_pin"
BOUND_KEY = "sink_max_stream_tokens"  # the operator's; no request chooses it
REQUEST_KEYS = (POLICY_KEY, TOKENS_KEY, WINDOW_KEY, PIN_KEY)
SCHEDULE_KEYS = (POLICY_KEY, TOKENS_KEY, WINDOW_KEY)
"""What the engine gets to see: a pin has become a number of sink tokens by then."""


def minimum_window(config: SinkConfig) -> int:
    """Fewest window tokens a request may leave by asking for many sink tokens.

    One KV block (or the server's whole window, if that is less): with a full block behind the
    sinks, the prefix-cache hashes of the stream go on after evictions. Layers with a window and
    page tables of their own need that window.
    """
    return max(min(config.schedule.window, config.block_size), config.native_window - 1)


def most_sink_tokens(config: SinkConfig) -> int:
    """Most sink tokens a request may ask for: ``C - g - minimum window``."""
    return config.capacity - config.schedule.stride - minimum_window(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPolicy:
    """The options of one request; ``None`` where it leaves the choice to the server."""

    kv_policy: str | None = None
    sink_tokens: int | None = None
    sink_window: int | None = None

    @staticmethod
    def parse(extra_args: Mapping[str, Any] | None, config: SinkConfig) -> Schedule | None:
        """The schedule of a request with these ``extra_args``; ``None`` for ``full``.

        Raises:
            ValueError: one sentence that names option, value, rule and way out.
        """
        return RequestPolicy.read(extra_args).schedule(config)

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> "RequestPolicy":
        """The options in ``extra_args``, each checked by itself; keys of others are left alone.

        Raises:
            ValueError: unknown ``sink_…`` key, wrong type, value out of range, or a
                ``sink_pin`` that nobody has turned into ``sink_tokens``.
        """
        given = {key: value for key, value in (extra_args or {}).items() if _is_ours(key)}
        for key, value in given.items():
            if key not in REQUEST_KEYS:
                raise ValueError(_unknown(key, value))
        given = {key: value for key, value in given.items() if value is not None}
        check_pin(given)
        if given.pop(PIN_KEY, "none") != "none":
            raise ValueError(
                "sink_pin='system' needs chat messages to find the end of the system message; "
                "send the request to /v1/chat/completions, or count its tokens and set "
                "sink_tokens."
            )
        policy = given.get(POLICY_KEY)
        if policy not in (None, *POLICIES):
            raise ValueError(
                f"kv_policy={policy!r} is not a policy; use one of {', '.join(POLICIES)}."
            )
        for key, least in ((TOKENS_KEY, 0), (WINDOW_KEY, 1)):
            value = given.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(
                    f"{key}={value!r} is a {type(value).__name__}; use a whole number of tokens, "
                    f"{least} or more."
                )
            if value < least:
                raise ValueError(f"{key}={value} is too small; use {least} or more (tokens).")
            if policy == "full":
                raise ValueError(
                    f"{key}={value} contradicts kv_policy='full', which evicts nothing; drop one "
                    "of them."
                )
        return cls(**given)

    def schedule(self, config: SinkConfig) -> Schedule | None:
        """The schedule these options make of the server's; ``None`` for ``full``.

        Raises:
            ValueError: more tokens than the server's capacity or window has room for.
        """
        if self.kv_policy == "full":
            return None
        server = config.schedule
        capacity, stride = server.capacity, server.stride
        sinks = server.sink_tokens if self.sink_tokens is None else self.sink_tokens
        if sinks > max(most_sink_tokens(config), server.sink_tokens):
            raise ValueError(
                f"sink_tokens={sinks} leaves no window: the server's capacity of {capacity} "
                f"tokens holds sink tokens, a window of at least {minimum_window(config)} and a "
                f"stride of {stride}; use {most_sink_tokens(config)} or fewer, or a server with "
                "a larger capacity (--max-model-len)."
            )
        room = capacity - stride - sinks
        if self.sink_window is None:
            window = min(server.window, room)
            return Schedule(sink_tokens=sinks, window=window, stride=stride)
        if self.sink_window > server.window:
            raise ValueError(
                f"sink_window={self.sink_window} is larger than the server's window of "
                f"{server.window} tokens; use {server.window} or less, or a server with a larger "
                f"{flag(WINDOW_KEY)}."
            )
        if self.sink_window < config.native_window - 1:
            raise ValueError(
                f"sink_window={self.sink_window} is smaller than the sliding window of some "
                f"layers of the model; use {config.native_window - 1} or more, or a server with "
                f"--disable-hybrid-kv-cache-manager."
            )
        if self.sink_window > room:
            raise ValueError(
                f"sink_window={self.sink_window} does not fit beside sink_tokens={sinks} and a "
                f"stride of {stride} in the server's capacity of {capacity} tokens; use a window "
                f"of {room} or less, or {capacity - stride - self.sink_window} or fewer sink "
                "tokens."
            )
        return Schedule(sink_tokens=sinks, window=self.sink_window, stride=stride)

    def normalised(self, config: SinkConfig) -> dict[str, Any]:
        """The options as the engine reads them: valid, and only those that change something.

        Raises:
            ValueError: as :meth:`schedule`.
        """
        schedule, server = self.schedule(config), config.schedule
        if schedule is None:
            return {POLICY_KEY: "full"}
        changed: dict[str, Any] = {}
        if schedule.sink_tokens != server.sink_tokens:
            changed[TOKENS_KEY] = schedule.sink_tokens
        if schedule.window != server.window:
            changed[WINDOW_KEY] = schedule.window
        return changed


def check_pin(options: Mapping[str, Any]) -> None:
    """Refuse an unknown pin mode, and a pin together with another answer to its question.

    Raises:
        ValueError: see above.
    """
    pin = options.get(PIN_KEY)
    if pin is not None and pin not in PIN_MODES:
        raise ValueError(f"sink_pin={pin!r} is not a pin; use one of {', '.join(PIN_MODES)}.")
    if pin != "system":
        return
    if options.get(POLICY_KEY) == "full":
        raise ValueError(
            "sink_pin='system' contradicts kv_policy='full', which evicts nothing; drop one of "
            "them."
        )
    if options.get(TOKENS_KEY) is not None:
        raise ValueError(
            f"sink_pin='system' and sink_tokens={options[TOKENS_KEY]!r} both choose the sink "
            "tokens; drop one of them."
        )


def pinned_sink_tokens(pinned: int, extra_args: Mapping[str, Any], config: SinkConfig) -> int:
    """Sink tokens of a request whose system message ends after ``pinned`` tokens of its prompt.

    Never fewer than the server's own.

    Raises:
        ValueError: the options contradict each other, or the message does not fit; it is never
            cut.
    """
    check_pin(extra_args)
    window = extra_args.get(WINDOW_KEY)
    if not isinstance(window, int) or not 0 < window <= config.schedule.window:
        window = 0  # refused where it is read
    most = min(most_sink_tokens(config), config.capacity - config.schedule.stride - window)
    if pinned > max(most, config.schedule.sink_tokens):
        raise ValueError(
            f"sink_pin='system': the prompt's first {pinned} tokens, up to the end of the system "
            f"message, cannot all be sink tokens, because the server's capacity of "
            f"{config.capacity} tokens has room for {most} beside a window of at least "
            f"{max(window, minimum_window(config))} and a stride of {config.schedule.stride}; "
            "shorten the system message, or use sink_pin='none'."
        )
    return max(pinned, config.schedule.sink_tokens)


def check_pages(schedule: Schedule, block_size: int, pool_pages: int) -> None:
    """Refuse a stream that needs more pages than the whole KV cache has.

    Args:
        schedule: of the request.
        block_size: tokens per page.
        pool_pages: pages of the KV cache that streams can use.

    Raises:
        ValueError: see above.
    """
    pages = pages_per_stream(schedule, block_size)
    if pages > pool_pages:
        fitting = (pool_pages - cdiv(schedule.capacity, block_size)) * block_size
        raise ValueError(
            f"sink_tokens={schedule.sink_tokens} makes a stream of {pages} KV cache pages "
            f"(capacity {schedule.capacity} tokens and a second copy of the sink tokens, "
            f"{block_size} tokens per page) and the server has {pool_pages}; use {fitting} or "
            "fewer sink tokens."
        )


def check_full(prompt_tokens: int, max_tokens: int | None, capacity: int) -> int:
    """``max_tokens`` of a request with ``kv_policy="full"``, which has no more than ``capacity``.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: as asked for; ``None`` for as many as fit.
        capacity: most tokens of prompt and output together.

    Raises:
        ValueError: prompt and output do not fit.
    """
    room = capacity - prompt_tokens
    if room < 1:
        raise ValueError(
            f"kv_policy='full': a prompt of {prompt_tokens} tokens leaves no room for output in "
            f"the server's capacity of {capacity} tokens; send at most {capacity - 1} tokens, or "
            "leave kv_policy out."
        )
    if max_tokens is not None and max_tokens > room:
        raise ValueError(
            f"kv_policy='full': a prompt of {prompt_tokens} tokens and max_tokens={max_tokens} "
            f"do not fit in the server's capacity of {capacity} tokens; use max_tokens={room} or "
            "less, or leave kv_policy out."
        )
    return room if max_tokens is None else max_tokens


def check_bound(prompt_tokens: int, max_tokens: int | None, most: int) -> int:
    """``max_tokens`` of a request under ``--sink-max-stream-tokens``: what is asked for, or fits.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: as asked for; ``None`` for as many as fit.
        most: tokens of prompt and output together, as the operator allows.

    Raises:
        ValueError: the prompt leaves no room for output.
    """
    room = most - prompt_tokens
    if room < 1:
        option = flag(BOUND_KEY)
        raise ValueError(
            f"{option}={most}: a prompt of {prompt_tokens} tokens leaves no room for output in the "
            f"{most} tokens of prompt and output that this server allows a request; send at most "
            f"{most - 1} tokens, or use a server with a larger {option}."
        )
    return room if max_tokens is None else min(max_tokens, room)


def _is_ours(key: str) -> bool:
    return key == POLICY_KEY or key.startswith("sink_")


def _unknown(key: str, value: object) -> str:
    near = difflib.get_close_matches(key, REQUEST_KEYS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{key}={value!r} is not an option of a request; {hint}the options are "
        f"{', '.join(REQUEST_KEYS)}."
    )
