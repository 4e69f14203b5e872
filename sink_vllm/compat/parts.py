"""The parts of an engine that only work together, and whether what runs is all ours.

Start-up names scheduler and worker and writes the numbers into ``VllmConfig``. Then others have
their hands on it: the platform's ``check_and_update_config``, other plugins, and the command line
of another node, which starts engines or workers from a configuration of its own. A stock scheduler
behind a front end without length limit ends at the first long prompt, and a stock worker behind our
scheduler goes on with wrong keys. So nobody trusts the others: the finished configuration is
checked where it is made and in the engine core, the engine core asks its workers, and the front end
its engines.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sink_vllm.gate.refused import Refused
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import POLICY_KEY, flag

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

SCHEDULER = "sink_vllm.engine.scheduler.make_scheduler"
CPU_WORKER = "sink_vllm.worker.cpu_worker.StreamingLLMCPUWorker"
GPU_WORKER = "sink_vllm.worker.gpu_worker.StreamingLLMGPUWorker"
WORKERS = (CPU_WORKER, GPU_WORKER)
TOLD = "kv_policy"
"""Field of an engine's ready message: the policy it runs, as options."""


def check_config(
    vllm_config: "VllmConfig", config: SinkConfig | None, max_model_len: int | None = None
) -> None:
    """Refuse a configuration that is not, or not as a whole, what the policy made it.

    Args:
        vllm_config: in the process that is about to use it.
        config: the policy that start-up resolved, or that is left in ``vllm_config``; ``None``
            when it is off.
        max_model_len: what must be there; by default the policy's.

    Raises:
        Refused: names the setting, what it is and what it was set to.
    """
    scheduler = vllm_config.scheduler_config.scheduler_cls
    worker = vllm_config.parallel_config.worker_cls
    if config is None:
        found = next((cls for cls in (scheduler, worker) if cls in (SCHEDULER, *WORKERS)), None)
        if found is not None:
            raise Refused(
                f"{found} is part of --kv-policy sink, which additional_config="
                f"{vllm_config.additional_config!r} does not ask for; start with --kv-policy sink, "
                "or without that class."
            )
        return
    given: Any = vllm_config.additional_config
    wanted = config.as_additional_config()
    length = config.max_model_len if max_model_len is None else max_model_len
    for name, is_now, was in (
        ("scheduler_cls", scheduler, (SCHEDULER,)),
        ("worker_cls", worker, WORKERS),
        ("max_model_len", vllm_config.model_config.max_model_len, (length,)),
        (
            "additional_config",
            {key: given.get(key) for key in wanted} if isinstance(given, Mapping) else given,
            (wanted,),
        ),
    ):
        if is_now not in was:
            raise Refused(
                f"{name}={is_now!r} in the finished configuration is not what --kv-policy sink "
                f"needs ({' or '.join(map(str, was))}): a platform or another plugin has changed "
                "it; leave that plugin out of VLLM_PLUGINS, or drop --kv-policy sink."
            )


def check_workers(specs: Iterable[Mapping[str, "KVCacheSpec"]], config: SinkConfig | None) -> None:
    """Refuse workers that run another policy than their engine core.

    Args:
        specs: KV cache specs by layer, as every worker reports them.
        config: the engine core's policy; ``None`` when it is off.

    Raises:
        Refused: names the layer and both policies.
    """
    from vllm.v1.kv_cache_interface import MambaSpec

    from sink_vllm.compat.spec import StreamingLLMSpec, StreamingLLMWindowSpec

    ours = (StreamingLLMSpec, StreamingLLMWindowSpec)
    for name, spec in ((name, spec) for of_worker in specs for name, spec in of_worker.items()):
        if isinstance(spec, MambaSpec):
            continue  # the same with and without the policy
        schedule = spec.schedule if isinstance(spec, StreamingLLMSpec) else None
        if isinstance(spec, ours) == (config is not None) and (
            config is None or schedule in (None, config.schedule)
        ):
            continue
        theirs: dict[str, Any] | None = None
        if isinstance(spec, ours):
            theirs = {POLICY_KEY: "sink"}
        if schedule is not None:
            theirs = {
                POLICY_KEY: "sink",
                "sink_tokens": schedule.sink_tokens,
                "sink_window": schedule.window,
                "sink_stride": schedule.stride,
            }
        raise Refused(_disagree(f"The worker of {name}", theirs, "its engine core", config))


def check_engine(rank: int, told: dict[str, Any] | None, config: SinkConfig | None) -> None:
    """Refuse an engine that runs another policy than its front end.

    Args:
        rank: of the engine, among data-parallel ones.
        told: the policy it says it runs, as options; ``None`` when it is off.
        config: the front end's policy.

    Raises:
        Refused: names both policies.
    """
    if told != (None if config is None else config.as_additional_config()):
        raise Refused(_disagree(f"Engine {rank}", told, "this server", config))


def _disagree(
    who: str, theirs: dict[str, Any] | None, whose: str, config: SinkConfig | None
) -> str:
    ours = None if config is None else config.as_additional_config()
    return (
        f"{who} runs {_as_flags(theirs)}, {whose} {_as_flags(ours)}; start every node with the "
        "same options of the policy."
    )


def _as_flags(options: dict[str, Any] | None) -> str:
    if options is None:
        return f"{flag(POLICY_KEY)} full"
    return " ".join(f"{flag(key)} {value}" for key, value in options.items())
