"""A Ray cluster and the application on this machine: what the tests and the benchmark share."""

import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from examples.processes import titled

ENVIRONMENT = {
    # When a replica is killed, its engine core and workers go with it. Without this they stay.
    "RAY_process_group_cleanup_enabled": "true",
    # Ray lowers its workers' priority by 15, which starves them beside anything else.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NODE_MEMORY = 100 * 2**20  # bytes of a node's object store; Ray's default is a third of the RAM
APPLICATION, DEPLOYMENT = "streams", "LLMServer:pystream"
START_LIMIT = 400.0  # seconds; two engines on two shared cores take about a hundred


@contextmanager
def local_cluster(nodes: int, cpus_per_node: int = 1) -> Iterator[str]:
    """Start ``nodes`` Ray nodes on loopback, yield the address, end all their processes.

    To vLLM and Ray Serve they are as different as two machines: actors are placed on one or the
    other, and what crosses between them goes through sockets.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray.cluster_utils import Cluster

    resources: dict[str, Any] = {"num_cpus": cpus_per_node, "object_store_memory": NODE_MEMORY}
    cluster = Cluster(
        initialize_head=True, head_node_args={**resources, "include_dashboard": False}
    )
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**resources)
        yield cluster.address
    finally:
        cluster.shutdown()


@dataclass(frozen=True, slots=True)
class LocalApp:
    """The running application, seen from outside."""

    url: str

    def running(self) -> int:
        """Replicas that Serve calls healthy."""
        from ray import serve

        deployments = serve.status().applications[APPLICATION].deployments
        return {str(k): n for k, n in deployments[DEPLOYMENT].replica_states.items()}.get(
            "RUNNING", 0
        )

    def wait_for_replicas(self, count: int, limit: float = START_LIMIT) -> float:
        """Seconds until ``count`` replicas are healthy.

        Raises:
            TimeoutError: not within ``limit`` seconds.
        """
        started = time.monotonic()
        while (running := self.running()) != count:
            if time.monotonic() - started > limit:
                raise TimeoutError(f"{running} of {count} replicas run after {limit:.0f} s")
            time.sleep(0.2)
        return time.monotonic() - started

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas; each has an engine core and its workers below it."""
        return titled(f"ray::ServeReplica:{APPLICATION}:{DEPLOYMENT}")

    def totals(self, *names: str) -> dict[str, dict[str, float]]:
        """Engine counters by replica and name, from the metrics every Ray node exports.

        Ray collects them every few seconds only: wait before reading final numbers.
        """
        import ray

        found: dict[str, dict[str, float]] = {}
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=30) as answer:
                text = answer.read().decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    name = sample.name.removeprefix("ray_").removesuffix("_total")
                    if name in names:
                        of_replica = found.setdefault(sample.labels["ReplicaId"], {})
                        of_replica[name] = of_replica.get(name, 0.0) + sample.value
        return found


@contextmanager
def running_app(port: int, **options: Any) -> Iterator[LocalApp]:
    """Deploy ``examples.ray_serve.app`` with ``options`` on the connected cluster, then delete it.

    Args:
        port: of Serve's HTTP proxy on the head node; the first call decides.
        options: fields of ``examples.ray_serve.app.Options``.
    """
    from ray import serve

    from examples.ray_serve.app import Options, build

    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(Options(**options)), name=APPLICATION, route_prefix="/")
    try:
        yield LocalApp(f"http://127.0.0.1:{port}")
    finally:
        serve.delete(APPLICATION)
