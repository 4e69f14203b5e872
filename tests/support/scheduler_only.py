"""vLLM's engine core with the policy's real scheduler and block pool, and no model.

The loop is vLLM's own (``EngineCore.step`` and ``step_with_batch_queue``), and so is everything a
request passes from ``preprocess_add_request`` on. Made up are the sampled tokens, and when a
grammar is ready. Pages may be of any size, since no kernel reads them.
"""

import atexit
import copy
import functools
import gc
import os
import queue
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from vllm.config import LoRAConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
)
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)

from sink_vllm.compat.spec import (
    StreamingLLMSpec,
    StreamingLLMStateSpec,
    StreamingLLMWindowSpec,
)
from sink_vllm.engine.scheduler import make_scheduler
from sink_vllm.plugin import register
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.request_options import RequestPolicy, check_pages, most_sink_tokens
from sink_vllm.policy.schedule import Schedule
from tests.support.page_content import PageContent
from tests.support.tiny_models import TinyLlama, write_tiny_llama

_MOST_SEQUENCES = 64
_ARITHMETIC: dict[str, Any] = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """An engine; all lengths in tokens."""

    schedule: Schedule
    block_size: int
    spare_pages: int = 0
    """Pages of the pool beyond the fewest that vLLM starts with, which hold one stream."""
    caching: bool = True
    max_seqs: int = 8
    budget: int = 1024
    """``max_num_batched_tokens``."""
    long_prefill: int = 0
    """``long_prefill_token_threshold``."""
    policy: Literal["fcfs", "priority"] = "fcfs"
    asynchronous: bool = False
    v2: bool = False
    """Which of vLLM's model runners the scheduler plans for."""
    truncate: bool = False
    reserve_full: bool = True
    """``scheduler_reserve_full_isl``."""
    max_loras: int = 0
    rope_rows: int | None = None
    native_window: int = 0
    """Of windowed layers with page tables of their own; 0: there are none."""
    windowed_first: bool = False
    recurrent: int = 0
    """Groups of recurrent layers, with page tables of their own."""
    log_stats: bool = False
    slots: int = 0
    """Pages that are kept outside the pool when turns end."""
    drafts: int = 0
    """Tokens per request and step that n-grams suggest; 0: no speculation."""

    def additional_config(self) -> dict[str, Any]:
        return SinkConfig(
            schedule=self.schedule,
            block_size=self.block_size,
            sink_prompt="truncate" if self.truncate else "stream",
            host_gib=self.slots * _page_bytes(self) / 2**30,
        ).as_additional_config()


def _page_bytes(settings: Settings) -> int:
    if not settings.slots:
        return 0
    return max(one.page_size_bytes for one in _attention_groups(settings))


@functools.cache
def _base() -> tuple[VllmConfig, StructuredOutputManager]:
    """A finished configuration, and what is slow to build from it; once per process."""
    register()
    folder = Path(tempfile.mkdtemp(prefix="scheduler-only-"))
    write_tiny_llama(folder, TinyLlama(layers=1, heads=1, kv_heads=1))
    arguments = EngineArgs(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_seqs=_MOST_SEQUENCES,
        additional_config=Settings(
            schedule=Schedule(sink_tokens=4, window=92, stride=32), block_size=32
        ).additional_config(),
    )
    config = arguments.create_engine_config()
    gc.freeze()  # what is imported by now stays; going through it again and again is slow
    atexit.register(gc.unfreeze)
    return config, StructuredOutputManager(config)


def finished_config(settings: Settings) -> VllmConfig:
    """What ``EngineArgs.create_engine_config`` would have made of ``settings``."""
    base, _ = _base()
    config = copy.copy(base)
    config.additional_config = settings.additional_config()
    model = config.model_config = copy.copy(base.model_config)
    model.max_model_len = settings.schedule.capacity + 1
    if settings.native_window:
        text: Any = copy.copy(base.model_config.hf_text_config)
        text.layer_types = ["full_attention", "sliding_attention"]
        text.sliding_window = settings.native_window
        model.hf_text_config = text
    cache = config.cache_config = copy.copy(base.cache_config)
    cache.block_size = settings.block_size
    cache.enable_prefix_caching = settings.caching
    scheduler = config.scheduler_config = copy.copy(base.scheduler_config)
    scheduler.max_num_seqs = settings.max_seqs
    scheduler.max_num_batched_tokens = max(settings.budget, settings.max_seqs)
    scheduler.long_prefill_token_threshold = settings.long_prefill
    scheduler.policy = settings.policy
    scheduler.async_scheduling = settings.asynchronous
    scheduler.scheduler_reserve_full_isl = settings.reserve_full
    if settings.drafts:
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=settings.drafts,
            target_model_config=model,
            target_parallel_config=config.parallel_config,
        )
    if settings.max_loras:
        config.lora_config = LoRAConfig(max_loras=settings.max_loras)
    return config


def _groups(settings: Settings) -> list[KVCacheSpec]:
    attention = _attention_groups(settings)
    states = StreamingLLMStateSpec(
        block_size=settings.block_size,
        shapes=((1,),),
        dtypes=(torch.float32,),
        page_size_padded=attention[0].page_size_bytes,
    )
    return [*[states] * settings.recurrent, *attention]


def _attention_groups(settings: Settings) -> list[KVCacheSpec]:
    s = settings.schedule
    full = StreamingLLMSpec(
        block_size=settings.block_size,
        sink_tokens=s.sink_tokens,
        window=s.window,
        stride=s.stride,
        rope_rows=settings.rope_rows,
        **_ARITHMETIC,
    )
    if settings.native_window or settings.recurrent:
        # As `StreamingLLMSpec.wrap` does: room for all sink tokens a request may ask for.
        config = SinkConfig(
            schedule=s, block_size=settings.block_size, native_window=settings.native_window
        )
        full = replace(full, pinnable=most_sink_tokens(config))
    if not settings.native_window:
        return [full]
    windowed = StreamingLLMWindowSpec(
        block_size=settings.block_size, sliding_window=settings.native_window, **_ARITHMETIC
    )
    return [windowed, full] if settings.windowed_first else [full, windowed]


class _Grammar(StructuredOutputGrammar):
    """Accepts everything."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None:
        pass

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        pass

    def is_terminated(self) -> bool:
        return False

    def reset(self) -> None:
        pass


class _Grammars(StructuredOutputBackend):
    def compile_grammar(self, *_args: Any, **_kwargs: Any) -> StructuredOutputGrammar:
        return _Grammar()

    def allocate_token_bitmask(self, max_num_seqs: int) -> torch.Tensor:
        return torch.zeros(max_num_seqs, 1, dtype=torch.int32)

    def destroy(self) -> None:
        pass


class _Compiler:
    """Stands in for the thread pool that compiles grammars: ready after a number of steps."""

    def __init__(self) -> None:
        self.steps = 0
        self._due: list[tuple[int, Future[Any], Callable[[], Any]]] = []

    def submit(self, compile_grammar: Callable[[Request], Any], request: Request) -> Future[Any]:
        future: Future[Any] = Future()
        self._due.append((self.steps, future, lambda: compile_grammar(request)))
        return future

    def tick(self) -> None:
        """One step has gone by."""
        waiting = []
        for steps, future, run in self._due:
            if steps > 0:
                waiting.append((steps - 1, future, run))
            else:
                future.set_result(run())
        self._due = waiting


@dataclass
class NoModel:
    """An executor that makes up a token for every request whose chunk reaches its end.

    Its drafts are the tokens it will make up, or stop being so somewhere.
    """

    requests: Mapping[str, Request]
    content: PageContent
    observe: Callable[[SchedulerOutput], None] = lambda _: None
    made: Counter[str] = field(default_factory=Counter)
    drafts: int = 0
    """Tokens to draft per request."""
    accepted: int = 0
    """Draft tokens so far that were right."""
    _drafted: DraftTokenIds | None = None
    _verified: dict[str, list[int]] = field(default_factory=dict)
    _sampling: list[str] | None = None
    _ids: list[str] = field(default_factory=list)

    def execute_model(self, planned: SchedulerOutput, non_block: bool = False) -> Future[Any]:
        """As a worker: an empty step is answered at once, others by ``sample_tokens``."""
        self.observe(planned)
        sampling = self.content.execute(planned)  # an empty step may move pages, too
        future: Future[Any] = Future()
        if not planned.total_num_scheduled_tokens:
            future.set_result(EMPTY_MODEL_RUNNER_OUTPUT)
            return future
        assert self._sampling is None, "two steps without sampling"
        self._ids = list(planned.num_scheduled_tokens)
        self._sampling, self._verified = sampling, planned.scheduled_spec_decode_tokens
        expected = [r for r in self._ids if not self.requests[r].is_prefill_chunk]
        assert self._sampling == expected, f"the scheduler waits for tokens of {expected}"
        future.set_result(None)
        return future

    def sample_tokens(self, _grammar: GrammarOutput | None, non_block: bool = False) -> Any:
        assert self._sampling is not None
        sampled: list[list[int]] = []
        for request_id in self._ids:
            tokens = []
            if request_id in self._sampling:
                for draft in (*self._verified.get(request_id, ()), None):
                    self.made[request_id] += 1
                    tokens.append(made_up(request_id, self.made[request_id]))
                    if tokens[-1] != draft:
                        break
                self.accepted += len(tokens) - 1
                self.content.sampled(request_id, tokens)
            sampled.append(tokens)
        self._drafted = DraftTokenIds(
            self._ids, [self._draft(one) if one in self._sampling else [] for one in self._ids]
        )
        answer = ModelRunnerOutput(
            req_ids=self._ids,
            req_id_to_index={one: index for index, one in enumerate(self._ids)},
            sampled_token_ids=sampled,
        )
        self._sampling = None
        if not non_block:
            return answer
        future: Future[Any] = Future()
        future.set_result(answer)
        return future

    def _draft(self, request_id: str) -> list[int]:
        made = self.made[request_id]
        right = made * 7 % (self.drafts + 1)
        return [
            made_up(request_id, made + number) + (number > right)
            for number in range(1, self.drafts + 1)
        ]

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafted, self._drafted = self._drafted, None
        return drafted


def made_up(request_id: str, number: int) -> int:
    """The ``number``-th output token of a request."""
    return 1000 + (sum(map(ord, request_id)) * 31 + number * 7) % 997


def _pool(pages: int, page_bytes: int, specs: Sequence[KVCacheSpec]) -> KVCacheTensor:
    """Where the only layer of every group lies over that of the others."""
    return KVCacheTensor(
        size=pages * page_bytes,
        layers=[f"{i}" for i in range(len(specs))],
        layer_stride=0,
        block_stride=page_bytes,
    )


class Core(EngineCore):
    """``EngineCore`` on an executor without a model."""

    scheduler: Any  # vLLM's interface lacks what is looked at here

    def __init__(self, settings: Settings) -> None:  # does without vLLM's, which needs a model
        _, manager = _base()
        self.settings = settings
        self.prompts: dict[str, list[int]] = {}
        self.vllm_config = config = finished_config(settings)
        self.log_stats = settings.log_stats
        self.compiler = _Compiler()
        manager.executor = self.compiler  # type: ignore[assignment]
        manager.backend = _Grammars(config, None, 32)  # type: ignore[arg-type]
        self.structured_output_manager = manager
        specs = _groups(settings)
        pages = settings.spare_pages + sum(
            one.max_memory_usage_bytes(config) // one.page_size_bytes for one in specs
        )
        config.cache_config.num_gpu_blocks = pages + 1  # and vLLM's null block
        kv_cache_config = KVCacheConfig(
            num_blocks=pages + 1,
            kv_cache_tensors=[_pool(pages + 1, max(one.page_size_bytes for one in specs), specs)],
            kv_cache_groups=[KVCacheGroupSpec([f"{i}"], one) for i, one in enumerate(specs)],
            prefix_cache_retention_interval=config.cache_config.prefix_cache_retention_interval,
        )
        block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
        # Read once, and not left to whoever starts an engine in this process next.
        with mock.patch.dict(os.environ, VLLM_USE_V2_MODEL_RUNNER=str(int(settings.v2))):
            self.scheduler = make_scheduler(
                config,
                kv_cache_config=kv_cache_config,
                structured_output_manager=manager,
                block_size=block_size,
                hash_block_size=hash_block_size,
                log_stats=settings.log_stats,
            )
        windows = [
            PageContent.RECURRENT
            if isinstance(one, MambaSpec)
            else getattr(one, "sliding_window", None) or 0
            for one in specs
        ]
        content = PageContent(settings.block_size, windows, prompts=self.prompts)
        self.model = NoModel(self.scheduler.requests, content, drafts=settings.drafts)
        self.model_executor = self.model
        self.use_spec_decode = self.check_for_draft_tokens = bool(settings.drafts)
        self.mm_receiver_cache = None
        self.is_mm_encoder_only = self.is_pooling_model = False
        self._weight_version = "default"
        self.batch_queue_size = config.max_concurrent_batches
        self.batch_queue = deque(maxlen=self.batch_queue_size) if settings.asynchronous else None
        self.request_block_hasher = None
        if config.cache_config.enable_prefix_caching:
            hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_function)
            self.request_block_hasher = get_request_block_hasher(hash_block_size, hash_function)
        self.step_fn = self.step_with_batch_queue if settings.asynchronous else self.step
        self.async_scheduling = settings.asynchronous
        self.aborts_queue = queue.Queue()
        self._arrivals = 0

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def managers(self) -> Sequence[Any]:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    @property
    def num_pages(self) -> int:
        """Pages of the pool that streams can use."""
        return self.pool.num_gpu_blocks - 1

    def schedule_of(self, options: Mapping[str, Any] | None) -> Schedule:
        """The schedule of a request with these options, which the front end lets pass.

        Raises:
            ValueError: it does not.
        """
        config = SinkConfig.of(self.vllm_config)
        assert config is not None
        schedule = RequestPolicy.parse(options, config) or config.schedule
        check_pages(schedule, config.block_size, self.num_pages)
        return schedule

    def send(
        self,
        request_id: str,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        options: dict[str, Any] | None = None,
        grammar: int | None = None,
        lora: int = 0,
        priority: int = 0,
        resumable: bool = False,
        stop: Sequence[int] = (),
    ) -> Request:
        """A request, or the next input of a session, arrives.

        Args:
            options: the policy's options of this request.
            grammar: steps until its grammar is ready; ``None``: no structured output.
            lora: number of its adapter; 0: none.
            resumable: another input may follow.
            stop: token ids that end the answer.
        """
        self._arrivals += 1
        self.prompts.setdefault(request_id, list(tokens))
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=list(stop),
            detokenize=False,
            extra_args=options,
            structured_outputs=StructuredOutputsParams(regex=".") if grammar is not None else None,
        )
        if params.structured_outputs is not None:
            params.structured_outputs._backend = "xgrammar"  # as the front end decides
        self.compiler.steps = grammar or 0
        request, wave = self.preprocess_add_request(
            EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=list(tokens),
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=float(self._arrivals),
                lora_request=LoRARequest(f"lora{lora}", lora, "/lora") if lora else None,
                cache_salt=None,
                data_parallel_rank=None,
                priority=priority,
                resumable=resumable,
            )
        )
        self.add_request(request, wave)
        return request

    def outputs(self) -> list[EngineCoreOutput]:
        """One call of vLLM's step, and what it tells the clients."""
        self.compiler.tick()
        told, executed = self.step_fn()
        self.post_step(executed)
        return [output for one in (told or {}).values() for output in one.outputs]

    @property
    def in_flight(self) -> bool:
        """Whether the result of a step is not in yet."""
        return bool(self.batch_queue) and any(
            planned.total_num_scheduled_tokens for _, planned, _ in self.batch_queue or ()
        )

    def could_run(self) -> list[Request]:
        """Requests that wait for nothing but the scheduler."""
        return [request for request in self.scheduler.requests.values() if _is_ready(request)]

    def dump(self) -> str:
        """Queues, statuses and pages, for a failure's message."""
        scheduler = self.scheduler
        held = {
            request_id: [
                len([b for b in one.req_to_blocks.get(request_id, ()) if not b.is_null])
                for one in self.managers
            ]
            for request_id in scheduler.requests
        }
        lines = [
            f"{self.settings}",
            f"free {self.pool.get_num_free_blocks()} of {self.num_pages} pages, "
            f"{scheduler.pause_state.name}",
        ]
        for name in ("running", "waiting", "kv_holding_waiting"):
            lines.append(f"{name}: {[r.request_id for r in getattr(scheduler, name)]}")
        for request_id, request in scheduler.requests.items():
            lines.append(
                f"  {request_id}: {request.status.name}, {request.num_computed_tokens} of "
                f"{request.num_tokens} tokens, {request.num_in_flight_tokens} in flight, "
                f"{held[request_id]} pages in tables, {request.num_preemptions} preemptions"
            )
        return "\n".join(lines)


def _is_ready(request: Request) -> bool:
    if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        structured = request.structured_output_request
        return structured is not None and structured.is_grammar_ready
    return request.status in (
        RequestStatus.RUNNING,
        RequestStatus.WAITING,
        RequestStatus.PREEMPTED,
    )


def check_integrity(core: Core) -> None:
    """Every page is free or owned, and every reference has an owner.

    Raises:
        AssertionError: naming the pages.
    """
    pool = core.pool
    free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
    assert len(free) == pool.get_num_free_blocks(), "free twice"
    unreferenced = {b.block_id for b in pool.blocks if b.ref_cnt == 0 and not b.is_null}
    assert free == unreferenced, f"free, but referenced or lost: {sorted(free ^ unreferenced)}"
    own = getattr(core.scheduler, "check_integrity", None)
    if own is not None:
        own()
        return
    owners: Counter[int] = Counter()
    for manager in core.managers:
        for blocks in (*manager.req_to_blocks.values(), *_sink_pages(manager)):
            owners.update(block.block_id for block in blocks if not block.is_null)
    wrong = {
        block.block_id: (block.ref_cnt, owners[block.block_id])
        for block in pool.blocks
        if block.ref_cnt != owners[block.block_id] and not block.is_null
    }
    assert not wrong, f"page: (references, owners) {wrong}"


def _sink_pages(manager: Any) -> Iterator[Sequence[Any]]:
    yield from getattr(manager, "sink_pages", {}).values()


def leftovers(core: Core, request_ids: set[str]) -> dict[str, Any]:
    """State of requests that have ended: where it is kept, and some of it."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("scheduler", core.scheduler)]
    todo += [(f"manager{i}", one) for i, one in enumerate(core.managers)]
    while todo:
        path, owner = todo.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        names = [*getattr(owner, "__dict__", ()), *getattr(type(owner), "__slots__", ())]
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, dict | set | list | deque):
                stale = [key for key in value if _belongs(key, request_ids)]
                if stale:
                    found[f"{path}.{name}"] = stale[:3]
            elif type(value).__module__.startswith("sink_vllm."):
                todo.append((f"{path}.{name}", value))
    return found


def _belongs(key: object, request_ids: set[str]) -> bool:
    if isinstance(key, tuple):
        return any(_belongs(one, request_ids) for one in key)
    if isinstance(key, Request):
        return key.request_id in request_ids
    return isinstance(key, str) and key in request_ids
