"""Servers for the arms of a scenario, all up at the same time so that they can take turns.

An idle server takes no processor time: its processes wait for messages.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from benchmarks.peers import models
from benchmarks.peers.llama_cpp import LlamaServer
from benchmarks.serving.load import MODEL_NAME
from benchmarks.serving.spec import BLOCK, Arm, Scenario, ServerSpec
from examples.serving import Server


def arguments(spec: ServerSpec, scenario: Scenario, dtype: str) -> list[str]:
    """What follows `vllm serve`: the same for all arms but for the flags of ``spec``.

    The RoPE table of the model is made long enough for full attention over whole streams.
    """
    sizes = scenario.sizes()
    own = [flag.format_map(sizes) for flag in spec.flags]
    rows = max(scenario.schedule.capacity + 1, scenario.length, 256)
    overrides = json.dumps({"max_position_embeddings": rows})
    shared = ["--served-model-name", MODEL_NAME, "--dtype", dtype]
    shared += ["--enforce-eager"] if spec.tuning is None else spec.tuning.flags
    shared += ["--block-size", str(BLOCK), "--enable-prompt-tokens-details"]
    shared += ["--num-gpu-blocks-override", str(scenario.pool(spec.kind) + 1)]
    # Room for the short requests of mixed loads beside the streams.
    shared += ["--max-num-seqs", str(max(scenario.streams) + (16 if scenario.rate else 0))]
    shared += ["--hf-overrides", overrides, "--seed", "0"]
    shared += ["--no-enable-log-requests", "--disable-uvicorn-access-log"]
    return [str(models.checkpoint(scenario.model)), *shared, *own]


def servers_of(
    scenario: Scenario, arms: Mapping[str, Arm], dtype: str
) -> Iterator[tuple[str, Server]]:
    """A server of each kind that the scenario's arms need, by its name; none is up yet."""
    named = {name: arms[arm] for arm in scenario.arms if (name := arms[arm].server_name)}
    for name, arm in named.items():
        if arm.llama is not None:
            threads = len(os.sched_getaffinity(0))
            gguf = models.gguf(scenario.model, arm.llama.weights)
            yield name, LlamaServer(arm.llama, scenario, gguf, threads)
        elif (spec := arm.server) is not None:
            environment = {"VLLM_PLUGINS": "sink_vllm" if spec.plugin else ""}
            if spec.tuning is not None:
                environment |= spec.tuning.environment
            yield name, Server(arguments(spec, scenario, dtype), environment)


@contextmanager
def running(scenario: Scenario, arms: Mapping[str, Arm], dtype: str) -> Iterator[dict[str, Server]]:
    """The servers of ``scenario``'s arms, by the name of the kind of server."""
    with ExitStack() as stack:
        servers = {}
        # One after the other: starting takes all cores.
        for name, server in servers_of(scenario, arms, dtype):
            servers[name] = stack.enter_context(server)
            server.wait(lambda _seconds: None)
        yield servers
