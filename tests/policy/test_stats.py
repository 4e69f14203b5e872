"""The scheduler's numbers arrive in Prometheus, whole and once, and leave vLLM's own alone."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from prometheus_client.core import REGISTRY
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import KV_FETCH_STAGES, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from sink_vllm.policy.stats import GAUGES, StreamingLLMStats
from sink_vllm.server import metrics
from sink_vllm.server.metrics import StreamingLLMStatLogger

STATS = StreamingLLMStats(
    streams=1, tokens=96, evictions=3, reanchorings=2, composed_ahead=1, resumed=1
)
CONFIG: Any = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))


@pytest.fixture(autouse=True)
def _leave_no_counters() -> Iterator[None]:
    yield
    metrics._unregister()


def over_the_wire(stats: SchedulerStats) -> SchedulerStats:
    """As from the engine core process to the front end."""
    message = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    arrived = MsgpackDecoder(EngineCoreOutputs).decode(message).scheduler_stats
    assert isinstance(arrived, SchedulerStats)
    return arrived


def step(stats: StreamingLLMStats) -> SchedulerStats:
    scheduler_stats = SchedulerStats(num_kv_fetch_reqs_by_stage=dict.fromkeys(KV_FETCH_STAGES, 0))
    stats.attach(scheduler_stats)
    return over_the_wire(scheduler_stats)


def counted(logger_name: str, engine: int) -> float:
    value = REGISTRY.get_sample_value(logger_name, {"model_name": "m", "engine": str(engine)})
    assert value is not None
    return value


def test_numbers_survive_the_wire_and_leave_no_trace() -> None:
    arrived = step(STATS)

    assert StreamingLLMStats.take(arrived) == STATS
    assert arrived == over_the_wire(
        SchedulerStats(num_kv_fetch_reqs_by_stage=dict.fromkeys(KV_FETCH_STAGES, 0))
    )
    assert StreamingLLMStats.take(arrived) == StreamingLLMStats()


def test_step_without_evictions_sends_gauges_only() -> None:
    scheduler_stats = SchedulerStats()

    StreamingLLMStats().attach(scheduler_stats)

    assert len(scheduler_stats.num_kv_fetch_reqs_by_stage) == len(GAUGES)
    assert StreamingLLMStats.take(scheduler_stats) == StreamingLLMStats()
    assert scheduler_stats == SchedulerStats()


def test_gauges_are_those_of_the_last_step() -> None:
    """They go up and down, and a step without events says so too."""
    logger = StreamingLLMStatLogger(CONFIG, [0])
    for waiting, stalled, residents in ((3, 7, 2), (0, 0, 1)):
        gauges = StreamingLLMStats(
            waiting_for_pages=waiting, steps_stalled=stalled, residents=residents
        )
        logger.record(step(gauges), None)

        assert counted("sink_vllm:waiting_for_pages", 0) == waiting
        assert counted("sink_vllm:stalled_steps", 0) == stalled
        assert counted("sink_vllm:resident_streams", 0) == residents


def test_counters_add_up_per_engine() -> None:
    logger = StreamingLLMStatLogger(CONFIG, [0, 1])
    logger.record(None, None)
    for engine in (0, 0, 1):
        logger.record(step(STATS), None, engine_idx=engine)
    logger.record(step(StreamingLLMStats()), None, engine_idx=1)

    assert counted("sink_vllm:streams_evicted_total", 0) == 2
    assert counted("sink_vllm:evicted_tokens_total", 0) == 192
    assert counted("sink_vllm:evictions_total", 1) == 3
    assert counted("sink_vllm:reanchorings_total", 1) == 2
    assert counted("sink_vllm:evictions_composed_ahead_total", 1) == 1


def test_second_engine_of_a_process_starts_at_zero() -> None:
    StreamingLLMStatLogger(CONFIG, [0]).record(step(STATS), None)

    StreamingLLMStatLogger(CONFIG, [0])

    assert counted("sink_vllm:evictions_total", 0) == 0


_API_SERVER = """
from types import SimpleNamespace
from vllm.v1.metrics.stats import SchedulerStats
from sink_vllm.server.metrics import StreamingLLMStatLogger
from sink_vllm.policy.stats import GAUGES, StreamingLLMStats

config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
stats = SchedulerStats()
StreamingLLMStats(tokens=32, evictions=1).attach(stats)
StreamingLLMStatLogger(config, [0]).record(stats, None)
"""


@pytest.mark.server
def test_several_api_servers_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's numbers go to one of them; Prometheus' multiprocess mode sums them."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for _ in range(2):
        subprocess.run([sys.executable, "-c", _API_SERVER], check=True, timeout=300)

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    lines = generate_latest(registry).decode().splitlines()

    assert 'sink_vllm:evicted_tokens_total{engine="0",model_name="m"} 64.0' in lines


def test_guard_statistics_have_a_dictionary_of_the_steps_own() -> None:
    assert SchedulerStats().num_kv_fetch_reqs_by_stage == {}
    assert "self._kv_fetch_counts.copy()" in inspect.getsource(Scheduler.make_stats)


def test_guard_loggers_given_by_argument_come_first() -> None:
    """Ours takes its numbers out before vLLM's loggers read the statistics."""
    source = inspect.getsource(StatLoggerManager.__init__)

    assert source.index("custom_stat_loggers)") < source.index("LoggingStatLogger")
    assert source.index("custom_stat_loggers)") < source.index("PrometheusStatLogger(vllm_config")


def test_guard_statistics_go_to_one_front_end() -> None:
    """Why the numbers are increments: each front end sees some of the steps only."""
    source = inspect.getsource(Scheduler.update_from_output)

    assert "next(iter(engine_core_outputs.values()), None)" in source
