"""One arm of a benchmark: an engine in a process of its own, driven over a pipe."""

import gc
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from benchmarks.common import MODEL
from sink_vllm.policy.schedule import Schedule

UNTIMED_STEPS = 4  # at the beginning of a round: caches are cold after the other arm's turn
SETTLING_STRIDES = 3  # evictions of every stream of the sink arm before anything is timed
FIRST_WORD = 3  # token ids below are special in the small models


class ArmError(Exception):
    """An arm died, or did not do what the benchmark measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What both arms have in common."""

    window: int
    stride: int
    max_streams: int
    sink_tokens: int = 4
    block_size: int = 32
    model: str = str(MODEL)
    dtype: str = "bfloat16"
    prefix_caching: bool = True
    """Of both arms."""
    context: int | None = None
    """Length the model is said to be trained for (``max_position_embeddings``)."""
    eager: bool = True
    """The model is not compiled."""

    @property
    def schedule(self) -> Schedule:
        return Schedule(sink_tokens=self.sink_tokens, window=self.window, stride=self.stride)

    def engine_arguments(self, *, sink: bool) -> dict[str, Any]:
        capacity = self.schedule.capacity
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "block_size": self.block_size,
            "enforce_eager": self.eager,
            "max_num_seqs": self.max_streams,
            # All prompts in one step, so that all streams stay in lockstep.
            "max_num_batched_tokens": max(self.max_streams * capacity, 2048),
            "kv_cache_memory_bytes": 1 << 30,
            "disable_log_stats": True,
            "seed": 0,
        }
        if self.context is not None:
            arguments["hf_overrides"] = {"max_position_embeddings": self.context}
        if not self.prefix_caching:
            arguments["enable_prefix_caching"] = False
        if sink:
            arguments["additional_config"] = {
                "kv_policy": "sink",
                "sink_tokens": self.sink_tokens,
                "sink_window": self.window,
                "sink_stride": self.stride,
            }
        else:
            # Room for the round's last token and its successor.
            arguments["max_model_len"] = capacity + self.stride
        return arguments


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step in which every stream got one token, or waited for one."""

    seconds: float
    cached: int
    """Cached tokens every stream attended to."""
    evicting: bool


class Engine:
    """Streams in lockstep on an in-process engine."""

    def __init__(self, setup: Setup, *, sink: bool) -> None:
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.setup = setup
        self.sink = sink
        llm = LLM(**setup.engine_arguments(sink=sink))
        self._engine = llm.llm_engine
        self._vocabulary = llm.llm_engine.model_config.get_vocab_size()
        self._sampling = SamplingParams(
            temperature=0.0,
            max_tokens=1 << 30 if sink else 2 * setup.stride,
            ignore_eos=True,
            # What a server does: outputs are handed on, not collected.
            output_kind=RequestOutputKind.DELTA,
        )
        self._requests: list[str] = []
        self._streams = 0
        self._computed = 0  # tokens of every stream with keys in the cache, or evicted
        self._evictions = 0  # as the engine reports them, summed over streams
        self._serial = 0
        # Long-lived objects out of the collector's way, as vLLM's engine process does.
        gc.collect()
        gc.freeze()

    def start(self, streams: int) -> None:
        """Begin ``streams`` streams; those of the sink arm run until eviction is routine."""
        self._streams = streams
        if self.sink:
            self._prefill()
            self.advance((SETTLING_STRIDES + 1) * self.setup.stride)

    def round(self) -> list[Step]:
        """``g`` timed steps."""
        if not self.sink:
            self._prefill()
        self.advance(UNTIMED_STEPS)
        steps = self.advance(self.setup.stride)
        if not self.sink:
            self._abort()
        return steps

    def finish(self) -> None:
        """End the streams, after comparing the evictions made with those scheduled."""
        expected = self.setup.schedule.evictions(self._computed) * self._streams
        if self.sink and self._evictions != expected:
            raise ArmError(f"{self._evictions} evictions reported, {expected} scheduled")
        self._abort()

    def advance(self, tokens: int) -> list[Step]:
        """Step until every stream has ``tokens`` more tokens."""
        schedule = self.setup.schedule
        steps = []
        for _ in range(tokens):
            seconds = self._step()
            before, self._computed = self._computed, self._computed + 1
            evicting = self.sink and schedule.evictions(self._computed) > schedule.evictions(before)
            cached = schedule.cached(self._computed) if self.sink else self._computed
            # To 0.1 µs: what lies below is noise, and half of the published bytes.
            steps.append(Step(seconds=round(seconds, 7), cached=cached, evicting=evicting))
        return steps

    def advance_untimed(self, tokens: int) -> None:
        """The same without an account of it."""
        self.advance(tokens)

    def _step(self) -> float:
        """One token for every stream; seconds it took."""
        seconds, made = 0.0, 0
        while made == 0:  # with asynchronous scheduling a stream waits one step before it evicts
            began = time.perf_counter()
            outputs: list[Any] = self._engine.step()
            seconds += time.perf_counter() - began
            made = sum(len(output.outputs[0].token_ids) for output in outputs)
        if made != self._streams:
            raise ArmError(f"{made} tokens in a step of {self._streams} streams: not in lockstep")
        if self.sink:
            self._count_evictions(outputs)
        return seconds

    def _count_evictions(self, outputs: list[Any]) -> None:
        reports = [(output.kv_transfer_params or {}).get("streaming_llm") for output in outputs]
        if any(reports):
            self._evictions = sum(report["evictions"] for report in reports if report)

    def _prefill(self) -> None:
        """New streams, computed up to ``UNTIMED_STEPS`` short of the measured lengths."""
        length = self.setup.schedule.capacity - self.setup.stride - UNTIMED_STEPS
        for _ in range(self._streams):
            # Other tokens every time, or prompts would be found in the prefix cache and lie side by
            # side in memory, which no pages of a server do that has run for a while: 6% of a step.
            words = random.Random(self._serial)
            prompt = [
                0,
                *(words.randrange(FIRST_WORD, self._vocabulary) for _ in range(length - 1)),
            ]
            self._serial += 1
            self._requests.append(f"stream-{self._serial}")
            self._engine.add_request(
                self._requests[-1], {"prompt_token_ids": prompt}, self._sampling.clone()
            )
        self._step()
        self._computed = length

    def _abort(self) -> None:
        self._engine.abort_request(self._requests)
        self._requests.clear()
        while self._engine.has_unfinished_requests():
            self._engine.step()


class ArmProcess:
    """The parent's end of an arm; a context manager that ends the process.

    ``make`` builds what answers in the process: :class:`Engine`, or a part of it.
    """

    def __init__(self, name: str, setup: Setup, make: type[Engine] = Engine) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, name, setup, make), daemon=True
        )

    def __enter__(self) -> "ArmProcess":
        self._process.start()
        self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.join()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def start(self, streams: int) -> None:
        self.ask("start", streams)

    def advance(self, tokens: int) -> None:
        """Let every stream make ``tokens`` more tokens; nothing of it is measured."""
        self.ask("advance_untimed", tokens)

    def round(self) -> list[Step]:
        return list(self.ask("round"))

    def finish(self) -> None:
        self.ask("finish")

    def ask(self, what: str, *arguments: Any) -> Any:
        """What the method of that name returns in the arm's process.

        Raises:
            ArmError: the arm has died, or what it was asked for is not what it does.
        """
        self._pipe.send((what, *arguments))
        return self._answer()

    def _answer(self) -> Any:
        while not self._pipe.poll(1):
            if not self._process.is_alive():
                raise ArmError(f"arm {self.name} died (exit code {self._process.exitcode})")
        answer = self._pipe.recv()
        if isinstance(answer, ArmError):
            raise ArmError(f"arm {self.name}: {answer}")
        return answer


def _serve(pipe: Connection, name: str, setup: Setup, make: type[Engine]) -> None:
    """The arm's process: build the engine, then answer until it is terminated."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_PLUGINS"] = "sink_vllm" if name == "sink" else ""
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # stock: see Setup.engine_arguments
    engine = make(setup, sink=name == "sink")
    pipe.send(None)  # ready
    while True:
        what, *arguments = pipe.recv()
        try:
            pipe.send(getattr(engine, what)(*arguments))
        except ArmError as error:
            pipe.send(error)
