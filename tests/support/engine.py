"""vLLM's real engine in this process, with every free page poisoned and every page accounted for.

After each engine step the pages in the pool's free queue are filled with NaN (except those the
prefix cache may still hand out) and the pages are counted. A poisoned page is cleaned when the
pool hands it out: vLLM's CPU attention multiplies the unused slots of a page by zero, which NaN
would survive. So a NaN in the output means that a page was read while it was free.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams, TokensPrompt
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.logprobs import Logprob
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.kv_cache_utils import KVCacheBlock

BLOCK_SIZE = 32  # the smallest page of vLLM's CPU attention


@dataclass(frozen=True, slots=True)
class Policy:
    """Sink tokens, window and stride, as the user writes them."""

    S: int
    W: int
    g: int
    prompt: str = "stream"

    @property
    def capacity(self) -> int:
        return self.S + self.W + self.g

    def additional_config(self) -> dict[str, Any]:
        return {
            "kv_policy": "sink",
            "sink_tokens": self.S,
            "sink_window": self.W,
            "sink_stride": self.g,
            "sink_prompt": self.prompt,
        }


@dataclass(frozen=True, slots=True)
class Generated:
    """What one request got, and the account of its evictions."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None
    stop_reason: int | str | None
    text: str
    prompt_len: int
    cached_tokens: int
    evicted_tokens: int
    evictions: int
    reanchorings: int
    stream_position: int | None

    @classmethod
    def of(cls, output: RequestOutput, index: int = 0) -> "Generated":
        completion = output.outputs[index]
        report = (output.kv_transfer_params or {}).get("streaming_llm", {})
        return cls(
            tokens=list(completion.token_ids),
            logprobs=[
                step[token].logprob
                for step, token in zip(logprobs_of(completion), completion.token_ids, strict=False)
            ],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            text=completion.text,
            prompt_len=len(output.prompt_token_ids or ()),
            cached_tokens=output.num_cached_tokens or 0,
            evicted_tokens=report.get("evicted_tokens", 0),
            evictions=report.get("evictions", 0),
            reanchorings=report.get("rope_reanchorings", 0),
            stream_position=report.get("stream_position"),
        )


def logprobs_of(completion: CompletionOutput) -> list[dict[int, Logprob]]:
    """Log-probabilities per generated token; empty when none were asked for."""
    steps: Iterable[dict[int, Logprob] | None] = completion.logprobs or ()
    return [step for step in steps if step is not None]


@dataclass(slots=True)
class Engine:
    """A running engine and its inner parts."""

    llm: LLM
    after_step: list[Callable[[], None]] = field(default_factory=list)
    poisoned: set[int] = field(default_factory=set)
    num_poisoned: int = 0
    spare_cached: bool = True
    """Leave free pages alone that the prefix cache may hand out; no prompt may begin alike else."""
    broken: bool = False
    """A step was left by an exception: requests hang in the engine, nothing more is learnt."""

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def manager(self) -> Any:
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return manager

    @property
    def managers(self) -> list[Any]:
        return list(self.scheduler.kv_cache_manager.coordinator.single_type_managers)

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        priority: list[int] | None = None,
    ) -> list[RequestOutput]:
        """Run all prompts as one batch."""
        assert not self.broken, "an earlier test broke this engine"
        return self.llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            params,
            use_tqdm=False,
            priority=priority,
        )

    def greedy(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, **params: Any
    ) -> list[Generated]:
        """``num_tokens`` greedy tokens per prompt with their log-probabilities."""
        outputs = self.generate(prompts, greedy_params(num_tokens, **params))
        return [Generated.of(output) for output in outputs]

    def poison_free_pages(self) -> None:
        """Fill all free pages with NaN, in all layers."""
        free = {
            block.block_id
            for block in free_pages(self.pool)
            if block.block_hash is None or not self.spare_cached
        }
        self._fill(free - self.poisoned, torch.nan)
        self.num_poisoned += len(free - self.poisoned)
        self.poisoned |= free

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, which from now on may be used."""
        assert self.llm.reset_prefix_cache()
        self.spare_cached = True

    def _fill(self, pages: set[int], value: float) -> None:
        if pages:
            index = torch.tensor(sorted(pages))
            for cache in self.runner.kv_caches:
                # A page with a state of a recurrent layer is bytes; all bits set are a NaN, too.
                cache[index] = (-1 if value else 0) if cache.dtype == torch.int8 else value

    def _hook(self) -> None:
        """Clean pages when they are handed out; observe every step."""
        get_new_blocks, step = self.pool.get_new_blocks, self.llm.llm_engine.step

        def get_clean_blocks(*args: Any, **kwargs: Any) -> list[KVCacheBlock]:
            blocks: list[KVCacheBlock] = get_new_blocks(*args, **kwargs)
            dirty = {block.block_id for block in blocks} & self.poisoned
            self._fill(dirty, 0.0)
            self.poisoned -= dirty
            return blocks

        def observed_step() -> Any:
            self.broken = True
            outputs = step()
            for observe in self.after_step:
                observe()
            self.broken = False
            return outputs

        self.pool.get_new_blocks = get_clean_blocks
        self.llm.llm_engine.step = observed_step  # type: ignore[method-assign]


def greedy_params(num_tokens: int, **params: Any) -> SamplingParams:
    defaults = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True, "logprobs": 0}
    return SamplingParams(**(defaults | params))


@contextmanager
def running_engine(
    model: Path,
    policy: Policy | None,
    *,
    guarded: bool = True,
    compiles: bool = False,
    **engine_args: Any,
) -> Iterator[Engine]:
    """Start the engine with ``policy`` (``None``: stock vLLM) and stop it afterwards.

    Args:
        guarded: poison free pages and check the page accounts after every step.
        compiles: vLLM's code of the model imports numba; it may have been imported before.
        engine_args: for ``vllm.LLM``; the defaults are a small pool and float32.
    """
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 128,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "additional_config": policy.additional_config() if policy else {},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # The CPU worker forbids this for the rest of the process; the next engine needs it.
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        with pytest.MonkeyPatch.context() as starting:
            # vLLM collects garbage ten times while it starts: seconds in a process with so many
            # modules. What there is goes in the collection at the end.
            starting.setattr(gc, "collect", lambda *_: 0)
            if compiles or "numba" in sys.modules:
                _hide_llvmlite(starting)
            engine = Engine(LLM(str(model), **(defaults | engine_args)))
        if guarded:
            engine.after_step += [lambda: check_pages(engine), engine.poison_free_pages]
        engine._hook()
        engine.poison_free_pages()
        try:
            yield engine
        finally:
            engine.llm.llm_engine.engine_core.shutdown()
            engine.after_step.clear()
            del engine.llm
            cleanup_dist_env_and_memory()  # it collects garbage


def _hide_llvmlite(patch: pytest.MonkeyPatch) -> None:
    """Take numba's compiler off the list of modules, all of which vLLM looks through on a CPU.

    It stumbles over an object there that has no dictionary, and does not start.
    """
    importlib.import_module("numba")
    for name in [name for name in sys.modules if name.split(".")[0] == "llvmlite"]:
        patch.delitem(sys.modules, name)


@contextmanager
def asynchronous_scheduling() -> Iterator[None]:
    """Let engines started inside use it on CPUs, if they ask for it.

    vLLM's CPU platform switches it off at the end of its own checks; it works when it is switched
    on again.
    """
    check: Callable[[Any], None] = CpuPlatform.check_and_update_config

    def check_and_keep(vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_keep))
        yield


def free_pages(pool: Any) -> list[KVCacheBlock]:
    return pool.free_block_queue.get_all_free_blocks()


def check_pages(engine: Engine) -> None:
    """Free pages + held pages + pinned pages are all pages, and every reference is owned.

    Raises:
        AssertionError: naming the pages that are lost, owned twice, or free but owned.
    """
    check = getattr(engine.scheduler, "check_integrity", None)
    if check is not None:  # of the policy
        check()


def check_all_free(engine: Engine) -> None:
    """No request is left and every page is free."""
    check_pages(engine)
    assert not engine.scheduler.requests
    assert len(free_pages(engine.pool)) == engine.pool.num_gpu_blocks - 1  # all but vLLM's null
