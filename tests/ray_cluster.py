"""A real Ray cluster of several nodes on this machine, as a context manager."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NODE_MEMORY = 100 * 2**20  # bytes of a node's object store; Ray's default is a third of the RAM


@contextmanager
def local_cluster(nodes: int, cpus_per_node: int = 1) -> Iterator[str]:
    """Start ``nodes`` Ray nodes on loopback, yield the address, end all their processes.

    To vLLM and Ray Serve they are as different as two machines: actors are placed on one or the
    other, and what crosses between them goes through sockets.
    """
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
