"""The policy as it runs: every number decided, and checked against the others.

Start-up resolves the user's options once, for a model and a page size, and writes the numbers back
into ``additional_config``; every other process reads them there. Imports neither torch nor vLLM.
"""

from dataclasses import dataclass
from typing import Any

from sink_vllm.policy.bound import Bound
from sink_vllm.policy.options import (
    DEFAULT_SINK_TOKENS,
    POLICY_KEY,
    PinMode,
    PromptMode,
    SinkOptions,
)
from sink_vllm.policy.schedule import Schedule, cdiv

_STRIDE_SHARE = 16  # default stride: a sixteenth of the capacity, in whole blocks, ...
_STRIDE_CAP = 256  # ... but not more: a longer stride saves nothing measurable


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
    recurrent: bool = False
    """Whether there are recurrent layers, which have page tables of their own."""
    host_gib: float = 0
    """Host memory for pages that the block pool has reused, of all workers of an engine."""
    disk: str | None = None
    """Folder for pages that outlive the server."""
    disk_gib: float = 0

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
            "sink_host_gib": self.host_gib,
            "sink_disk": self.disk,
            "sink_disk_gib": self.disk_gib,
        }

    @classmethod
    def resolve(
        cls,
        options: SinkOptions,
        *,
        block_size: int,
        bound: Bound,
        max_model_len: int | None = None,
        states: bool = False,
    ) -> "SinkConfig":
        """Fill in window and stride, and check every number against the others.

        Args:
            options: what the user asked for.
            block_size: tokens per KV page.
            bound: of the capacity: the length the model was trained for, or a shorter one.
            max_model_len: ``--max-model-len`` as given; the capacity when no window is given.
            states: a page holds the state of a recurrent layer, too, which decides its size.

        Raises:
            ValueError: one sentence that names option, value, rule and way out.
        """
        if max_model_len is not None and max_model_len > bound.most:
            raise ValueError(
                f"--max-model-len={max_model_len} is above {bound.most}, {bound.name}; "
                f"use {bound.most} or less."
            )
        limit, limit_name = bound.limit(options.sink_window, max_model_len)
        sinks = options.sink_tokens
        basis = limit if options.sink_window is None else min(sinks + options.sink_window, limit)
        stride = options.sink_stride or _default_stride(basis, block_size)
        room = limit - sinks - stride
        if stride % block_size or room < 1:
            raise ValueError(_no_window(options, stride, block_size, bound, max_model_len, states))
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
            host_gib=options.sink_host_gib,
            disk=options.sink_disk,
            disk_gib=options.sink_disk_gib,
        )

    @classmethod
    def of(cls, vllm_config: Any) -> "SinkConfig | None":
        """The policy of a finished ``VllmConfig``; ``None`` when it is off.

        Start-up has written every number into ``additional_config`` (see
        ``sink_vllm.server.engine_args``), so nothing is chosen here.

        Raises:
            ValueError: they have not been written, or vLLM has chosen pages since then that the
                stride does not fit.
        """
        options = SinkOptions.parse(vllm_config.additional_config)
        if options is None:
            return None
        if options.sink_window is None or options.sink_stride is None:
            raise ValueError(
                f"additional_config={vllm_config.additional_config!r} has not been resolved by "
                "sink_vllm; build the VllmConfig with EngineArgs.create_engine_config()."
            )
        block_size = vllm_config.cache_config.block_size
        if options.sink_stride % block_size:
            raise ValueError(
                f"--sink-stride={options.sink_stride} is not a multiple of the {block_size} tokens "
                f"of a KV block, which vLLM chose for the attention of this model; use "
                f"--sink-stride {cdiv(options.sink_stride, block_size) * block_size}, or another "
                f"--attention-backend."
            )
        return cls(
            schedule=Schedule(
                sink_tokens=options.sink_tokens,
                window=options.sink_window,
                stride=options.sink_stride,
            ),
            block_size=block_size,
            sink_prompt=options.sink_prompt,
            sink_pin=options.sink_pin,
            max_stream_tokens=options.sink_max_stream_tokens,
            native_window=_native_window(vllm_config, options.sink_window),
            recurrent=vllm_config.model_config.is_hybrid,
            host_gib=options.sink_host_gib,
            disk=options.sink_disk,
            disk_gib=options.sink_disk_gib,
        )


def _no_window(
    options: SinkOptions,
    stride: int,
    block_size: int,
    bound: Bound,
    max_model_len: int | None,
    states: bool,
) -> str:
    """Why no window is left, or no whole stride: what to blame, and a value that helps.

    A number of ours, such as the default stride, is never the one to blame.
    """
    sinks = options.sink_tokens
    limit, source = bound.limit(options.sink_window, max_model_len)
    blocks = (limit - sinks - 1) // block_size  # in the longest possible stride
    why = ", in which the state of a recurrent layer must fit" if states else ""
    if options.sink_stride is not None and blocks > 0:
        if stride % block_size == 0:
            return (
                f"--sink-stride={stride} leaves no window behind {sinks} sink tokens in "
                f"{limit} tokens ({source}); use {blocks * block_size} or less (a multiple of the "
                f"KV block size {block_size}{why})."
            )
        near = {min(max(stride // block_size + up, 1), blocks) * block_size for up in (0, 1)}
        return (
            f"--sink-stride={stride} is not a multiple of the KV block size {block_size}{why}; use "
            f"{' or '.join(map(str, sorted(near)))}."
        )
    if limit <= stride or stride % block_size:
        stride = block_size
    least = sinks + block_size + 1
    if limit <= stride and least > bound.most:  # no --max-model-len is enough
        limit, source = bound.most, bound.name
    if sinks != DEFAULT_SINK_TOKENS and limit > stride:
        return (
            f"--sink-tokens={sinks} leaves no window beside a stride of {stride} in {limit} tokens "
            f"({source}); use {limit - stride - 1} or fewer."
        )
    given = limit == max_model_len != bound.most
    what = f"--max-model-len={limit}" if given else f"{limit} tokens ({source})"
    way_out = f"{least} or more" if least <= bound.most else "--kv-policy full"
    if not states:
        way_out += ", or a smaller --block-size"
    return (
        f"{what} is no room for a window behind {sinks} sink tokens and a stride of one KV block "
        f"of {block_size} tokens{why}; use {way_out}."
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


def _default_stride(basis: int, block_size: int) -> int:
    """A share of ``basis`` tokens, in whole blocks, at least one."""
    share = min(basis // _STRIDE_SHARE, _STRIDE_CAP) // block_size * block_size
    return max(share, block_size)
