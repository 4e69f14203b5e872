"""``sink-vllm plan``: the numbers of a server that has not been started."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sink_vllm.engine.sizing import Sizing
from sink_vllm.gate.lengths import own_bound_of
from sink_vllm.gate.refused import Refused
from sink_vllm.policy.schedule import cdiv
from sink_vllm.tools.specs import outline_of, sizing_of

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What ``sink-vllm plan`` prints."""

    model: str
    platform: str
    sizing: Sizing
    longest: int
    """The largest capacity of this model (tokens)."""
    weight_bytes: int
    """Of the worker that has most of them."""
    split: tuple[int, int]
    """``--tensor-parallel-size`` and ``--pipeline-parallel-size``; all bytes are of one worker."""
    kv_bytes: int | None
    """Of the KV cache; ``None`` if nobody said how much there is."""
    estimated: bool
    """Whether ``kv_bytes`` is what weights leave of a GPU, rather than given."""
    wanted: int | None
    """Streams that are to fit."""

    @property
    def fits(self) -> bool:
        """Whether as many streams fit as are wanted; yes if nobody asked."""
        if self.kv_bytes is None or self.wanted is None:
            return True
        return self.sizing.streams >= self.wanted

    @property
    def start_up_line(self) -> str:
        """What the server logs, word for word, if its KV cache is of ``kv_bytes``."""
        return f"StreamingLLM: {self.sizing}"

    def lines(self) -> list[str]:
        """For people."""
        sizing, schedule = self.sizing, self.sizing.schedule
        share = schedule.capacity / self.longest
        rows = [
            ("capacity", f"{schedule.capacity} tokens, {share:.1%} of the {self.longest} it takes"),
            ("pages", f"of {sizing.block_size} tokens on {self.platform}"),
            ("KV cache per stream", f"{_size(sizing.stream_bytes)} in {sizing.pages} pages"),
            ("an eviction every", f"{schedule.stride} tokens of a stream"),
            ("weights", _size(self.weight_bytes)),
        ]
        if self.split != (1, 1):
            workers = self.split[0] * self.split[1]
            rows.append(("workers", f"{workers}; all sizes are of one"))
        if self.kv_bytes is not None:
            source = "before activations and graphs" if self.estimated else "as given"
            rows.append(("KV cache", f"{_size(self.kv_bytes)} ({source})"))
            rows.append(("streams that fit", str(sizing.streams)))
        if self.wanted is not None:
            needed = _size(sizing.bytes_for(self.wanted))
            rows.append((f"{self.wanted} streams", f"take {needed} of KV cache"))
            if not self.fits:
                rows.append(("", self._way_out()))
        if self.fits:
            rows.append(("start it with", self.command))
        line = [self.start_up_line, ""] if self.kv_bytes is not None else []
        return [*line, *(f"{name:<20}{value}" for name, value in rows)]

    @property
    def command(self) -> str:
        """What a user may paste."""
        schedule = self.sizing.schedule
        split = "".join(
            f" --{how}-parallel-size {number}"
            for how, number in zip(("tensor", "pipeline"), self.split, strict=True)
            if number > 1
        )
        most = "" if self.wanted is None else f" --max-num-seqs {self.wanted}"
        return (
            f"vllm serve {self.model} --kv-policy sink --sink-tokens {schedule.sink_tokens} "
            f"--sink-window {schedule.window} --sink-stride {schedule.stride}{split}{most}"
        )

    def _way_out(self) -> str:
        assert self.kv_bytes is not None
        assert self.wanted is not None
        sizing = self.sizing
        sinks = cdiv(sizing.schedule.sink_tokens, sizing.block_size)
        # Exact for one table of pages, and a good guess for more.
        pages = (self.kv_bytes // sizing.page_bytes - 1) // self.wanted
        capacity = (pages - sinks) * sizing.block_size
        least = sizing.schedule.sink_tokens + sizing.block_size + 1
        if capacity < least:
            return "do not fit, whatever the capacity is: more memory, or fewer of them"
        return f"do not fit; they do with --capacity {capacity}, or with more memory"


def engine_args(model: str, words: Sequence[str]) -> EngineArgs:
    """What ``vllm serve MODEL --kv-policy sink`` and ``words`` would start with.

    Raises:
        Refused: vLLM does not find the model.
    """
    load_general_plugins()
    parser = FlexibleArgumentParser(prog="sink-vllm")
    EngineArgs.add_cli_args(parser)
    # A configuration is enough, without a tokenizer.
    named = ["--model", model, "--kv-policy", "sink", "--skip-tokenizer-init"]
    given = parser.parse_args([*named, *words])
    with _as_a_sentence(model):
        return EngineArgs.from_cli_args(given)


def configuration(engine_args: EngineArgs) -> VllmConfig:
    """What vLLM makes of ``engine_args``.

    Raises:
        Refused: by us, or by vLLM.
    """
    with _as_a_sentence(engine_args.model):
        return engine_args.create_engine_config()


@contextmanager
def _as_a_sentence(model: str) -> Iterator[None]:
    """What vLLM raises inside, for a model it does not know or cannot find, is a refusal.

    Raises:
        Refused: with the beginning of what vLLM says, which may be many lines.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:3]) or type(error).__name__
        raise Refused(f"vLLM itself refuses {model}: {said}") from error


def plan(
    engine_args: EngineArgs,
    *,
    kv_bytes: int | None = None,
    gpu_bytes: int | None = None,
    wanted: int | None = None,
) -> Plan:
    """Look at a model.

    Args:
        engine_args: with the policy.
        kv_bytes: of the KV cache of one worker.
        gpu_bytes: of each GPU, of which weights take a part.
        wanted: streams that are to fit.

    Raises:
        Refused: the model is, by vLLM or by us, or not even one stream fits.
    """
    stages = [deepcopy(engine_args) for _ in range(engine_args.pipeline_parallel_size)]
    configs = [configuration(one) for one in stages]
    outlines = [outline_of(config, stage) for stage, config in enumerate(configs)]
    vllm_config = configs[0]
    weight_bytes = max(one.weight_bytes for one in outlines)
    if gpu_bytes is not None:
        share = vllm_config.cache_config.gpu_memory_utilization
        kv_bytes = max(int(gpu_bytes * share) - weight_bytes, 0)
    return Plan(
        model=engine_args.model,
        platform=current_platform.device_type,
        sizing=sizing_of(vllm_config, [one.specs for one in outlines], kv_bytes),
        longest=own_bound_of(vllm_config.model_config).most,
        weight_bytes=weight_bytes,
        split=(engine_args.tensor_parallel_size, engine_args.pipeline_parallel_size),
        kv_bytes=kv_bytes,
        estimated=gpu_bytes is not None,
        wanted=wanted,
    )


def _size(count: int) -> str:
    if count >= _GIB:
        return f"{count / _GIB:.2f} GiB"
    return f"{count / 2**20:.2f} MiB"
