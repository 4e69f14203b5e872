"""Scheduler, workers, engines and front end are all ours, or nothing starts."""

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreReadyResponse
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import MPClient
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.worker_base import WorkerWrapperBase

from sink_vllm.compat.parts import CPU_WORKER, SCHEDULER
from sink_vllm.compat.spec import StreamingLLMSpec
from sink_vllm.gate.refused import Refused
from sink_vllm.plugin import register
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.plan import StepPlan
from tests.conftest import ModelFactory
from tests.support.tiny_models import TinyLlama

SINK = {"kv_policy": "sink", "sink_tokens": 4, "sink_window": 92, "sink_stride": 32}
OTHER = SINK | {"sink_window": 60}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


@pytest.fixture(scope="module")
def model(tiny_llama: ModelFactory) -> Path:
    return tiny_llama(TinyLlama())


def build(model: Path, options: dict[str, Any]) -> VllmConfig:
    args = EngineArgs(
        model=str(model), skip_tokenizer_init=True, block_size=32, additional_config=options
    )
    return args.create_engine_config()


@pytest.fixture(scope="module")
def config(model: Path) -> VllmConfig:
    return build(model, SINK)


@pytest.fixture(scope="module")
def stock(model: Path) -> VllmConfig:
    return build(model, {})


# What a platform, or a plugin that wraps its hook, may do to a configuration.
CHANGES: dict[str, Any] = {
    "scheduler_cls": lambda c: setattr(
        c.scheduler_config, "scheduler_cls", "vllm.v1.core.sched.scheduler.Scheduler"
    ),
    "worker_cls": lambda c: setattr(
        c.parallel_config, "worker_cls", "vllm.v1.worker.cpu_worker.CPUWorker"
    ),
    "max_model_len": lambda c: setattr(c.model_config, "max_model_len", 64),
    "additional_config": lambda c: setattr(c, "additional_config", {"other": 1}),
    "sink_window": lambda c: setattr(c, "additional_config", c.additional_config | OTHER),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_platform_that_changes_the_configuration_is_found(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through vLLM's own hook, at the time at which other plugins use it."""
    hook = CpuPlatform.check_and_update_config

    def other_plugins_hook(vllm_config: VllmConfig) -> None:
        hook(vllm_config)
        CHANGES[name](vllm_config)

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(other_plugins_hook))

    with pytest.raises(Refused, match=r"in the finished configuration is not what") as error:
        build(model, SINK)

    assert str(error.value).startswith(name if name != "sink_window" else "additional_config")
    assert "another plugin" in str(error.value)


def core_of(vllm_config: VllmConfig, specs: list[dict[str, Any]]) -> Any:
    """What an engine core is when its workers have started; the rest of it would start a model."""
    core: Any = EngineCore.__new__(EngineCore)
    core.vllm_config = vllm_config
    core.model_executor = SimpleNamespace(get_kv_cache_specs=lambda: specs)
    return core


def spec_of(options: dict[str, Any] | None) -> dict[str, Any]:
    """What a worker with these options reports of one layer."""
    shape: dict[str, Any] = {
        "block_size": 32,
        "num_kv_heads": 2,
        "head_size": 32,
        "dtype": torch.float32,
    }
    if options is None:
        return {"layer": FullAttentionSpec(**shape)}
    names = ("sink_tokens", "sink_window", "sink_stride")
    sinks, window, stride = (options[name] for name in names)
    schedule = {"sink_tokens": sinks, "window": window, "stride": stride}
    return {"layer": StreamingLLMSpec(**shape, **schedule, rope_rows=64)}


def test_an_engine_core_whose_configuration_was_changed_does_not_start(config: VllmConfig) -> None:
    """After it was finished: by whoever carries it to the engine core."""
    for change in ("scheduler_cls", "worker_cls", "max_model_len"):
        changed = copy.deepcopy(config)
        CHANGES[change](changed)

        with pytest.raises(Refused, match=f"^{change}="):
            core_of(changed, [])._initialize_kv_caches(changed)


def test_parts_without_the_policy_do_not_start(config: VllmConfig, stock: VllmConfig) -> None:
    """``additional_config`` got lost on the way, or somebody named the classes by hand."""
    changed = copy.deepcopy(config)
    changed.additional_config = {}
    by_hand = copy.deepcopy(stock)
    by_hand.parallel_config.worker_cls = CPU_WORKER

    for lost, part in ((changed, SCHEDULER), (by_hand, CPU_WORKER)):
        with pytest.raises(Refused, match=f"^{part} is part of --kv-policy sink"):
            core_of(lost, [])._initialize_kv_caches(lost)


@pytest.mark.parametrize("theirs", [None, OTHER], ids=["stock", "other numbers"])
def test_workers_of_another_policy_are_found(
    config: VllmConfig, theirs: dict[str, Any] | None
) -> None:
    """A second node, started without the flag or with other numbers."""
    specs = [spec_of(SINK), spec_of(theirs)]
    found = "--kv-policy full" if theirs is None else "--sink-window 60"

    with pytest.raises(Refused, match=f"worker of layer runs .*{found}.*--sink-window 92"):
        core_of(config, specs)._initialize_kv_caches(config)


def ready(vllm_config: VllmConfig) -> bytes:
    """The message of an engine that has started, as it is sent."""
    core: Any = EngineCoreProc.__new__(EngineCoreProc)
    core.vllm_config = vllm_config
    core.frontend_stats_publish_address = None
    core.engine_index = 1
    core.addresses = SimpleNamespace(coordinator_input=None, coordinator_output=None)
    core.scheduler = SimpleNamespace(get_kv_event_publisher_config=lambda: None)
    return msgspec.msgpack.encode(core._make_ready_response())


def told(vllm_config: VllmConfig, payload: bytes) -> None:
    """A front end gets such a message."""
    client: Any = MPClient.__new__(MPClient)
    client.vllm_config = copy.deepcopy(vllm_config)
    client._effective_attention_block_sizes = set()
    client._kv_event_sources = {}
    client.stats_update_address = None
    client._apply_ready_response(payload)


def test_front_end_and_engine_of_one_policy_start(config: VllmConfig, stock: VllmConfig) -> None:
    for either in (config, stock):
        told(either, ready(either))


def test_front_end_refuses_an_engine_of_another_policy(
    model: Path, config: VllmConfig, stock: VllmConfig
) -> None:
    """Data parallelism over nodes: ``vllm serve --headless`` has a command line of its own."""
    other = build(model, OTHER)
    for front, engine, sentence in (
        (config, stock, r"Engine 1 runs --kv-policy full, this server --kv-policy sink .*92"),
        (stock, config, r"Engine 1 runs --kv-policy sink .*92.*, this server --kv-policy full"),
        (config, other, r"Engine 1 runs .*--sink-window 60.*, this server .*--sink-window 92"),
    ):
        with pytest.raises(Refused, match=sentence):
            told(front, ready(engine))


def test_a_plan_that_nobody_consumes_ends_the_step() -> None:
    class StockRunner:
        pass

    wrapper: Any = WorkerWrapperBase.__new__(WorkerWrapperBase)
    wrapper.mm_receiver_cache = None
    steps: list[Any] = []
    wrapper.worker = SimpleNamespace(model_runner=StockRunner(), execute_model=steps.append)
    step = SchedulerOutput.make_empty()
    wrapper.execute_model(step)
    setattr(step, StepPlan.ATTRIBUTE, StepPlan())

    with pytest.raises(RuntimeError, match=r"a step with evictions reached .* with StockRunner"):
        wrapper.execute_model(step)

    assert steps == [step]


def test_copies_that_vllm_makes_of_a_configuration_are_of_the_policy(config: VllmConfig) -> None:
    """``__post_init__`` runs again behind the handshake of an engine core, and in ``replace``."""
    again = copy.deepcopy(config)
    again.__post_init__()

    assert SinkConfig.of(again) == SinkConfig.of(config)
    assert again.scheduler_config.scheduler_cls == SCHEDULER
    assert again.model_config.max_model_len == config.model_config.max_model_len


def test_guard_caches_are_initialized_before_the_scheduler_is_made() -> None:
    source = inspect.getsource(EngineCore.__init__)

    order = [
        source.index(call)
        for call in (
            "load_general_plugins()",
            "executor_class(vllm_config)",
            "self._initialize_kv_caches(vllm_config)",
            "get_scheduler_cls()",
        )
    ]
    assert order == sorted(order)
    assert list(inspect.signature(EngineCore._initialize_kv_caches).parameters) == [
        "self",
        "vllm_config",
    ]


def test_guard_the_ready_message_may_have_a_field_more(config: VllmConfig) -> None:
    payload = ready(config)

    assert msgspec.msgpack.decode(payload, type=EngineCoreReadyResponse).data_parallel_rank == 1
    assert "self._make_ready_response()" in inspect.getsource(EngineCoreProc.process_input_sockets)
    assert "self._apply_ready_response(payload)" in inspect.getsource(MPClient.__init__)


def test_guard_workers_get_their_steps_through_the_wrapper() -> None:
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    assert "WorkerWrapperBase(" in inspect.getsource(WorkerProc)
    assert "WorkerWrapperBase(" in inspect.getsource(UniProcExecutor)
    assert "self.worker.execute_model(scheduler_output)" in inspect.getsource(
        inspect.unwrap(WorkerWrapperBase.execute_model)
    )
