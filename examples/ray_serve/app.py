"""The application of ``cpu.yaml`` or ``gpu.yaml`` with another router or number of replicas.

    serve run examples.ray_serve.app:build routing=prefix
    serve run examples.ray_serve.app:build config=examples/ray_serve/gpu.yaml replicas=8

The YAML files need no code of this repository on the nodes of a cluster, this module does.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from ray.serve import Application
from ray.serve.llm import build_openai_app

ROOT = Path(__file__).resolve().parents[2]
Routing = Literal["session", "prefix", "round-robin"]
ROUTERS: dict[Routing, dict[str, Any]] = {
    # A hash ring over the replicas; the session id comes from the header `x-session-id`.
    "session": {
        "request_router_class": (
            "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
        ),
        "request_router_kwargs": {"num_fallback_replicas": 0},
    },
    # A tree of the texts each replica has seen; clients send no session id.
    "prefix": {
        "request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
        # Without a threshold it never looks at load, and all may end up on one replica.
        "request_router_kwargs": {"do_eviction": True, "imbalanced_threshold": 4},
    },
    # No affinity at all, for comparison.
    "round-robin": {
        "request_router_class": "ray.serve.experimental.round_robin_router.RoundRobinRouter",
    },
}


class Options(BaseModel):
    """What ``serve run examples.ray_serve.app:build KEY=VALUE …`` takes."""

    config: Path = ROOT / "examples" / "ray_serve" / "cpu.yaml"
    replicas: int | None = None
    """Instead of the number, or the autoscaling settings, of the file."""
    routing: Routing | None = None


def build(options: Options) -> Application:
    """The application of ``options.config`` with the other options applied."""
    return build_openai_app(application_args(options))


def application_args(options: Options) -> dict[str, Any]:
    """Arguments of Ray's ``build_openai_app``."""
    (application,) = yaml.safe_load(options.config.read_text())["applications"]
    args: dict[str, Any] = application["args"]
    (llm,) = args["llm_configs"]
    model = llm["model_loading_config"]
    if (ROOT / model["model_source"]).is_dir():
        model["model_source"] = str(ROOT / model["model_source"])
    deployment = llm["deployment_config"]
    if options.replicas is not None:
        deployment.pop("autoscaling_config", None)
        deployment["num_replicas"] = options.replicas
    if options.routing is not None:
        deployment["request_router_config"] = ROUTERS[options.routing]
    return args
