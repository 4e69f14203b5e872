"""A dictionary that loads the plugin wherever it is unpickled.

vLLM pickles the finished ``VllmConfig`` into engine cores, workers, Ray actors and Ray Serve
replicas. Most of them load plugins early enough by themselves; a Ray Serve replica builds its
engine from the pickle without ever doing so. Riding on ``VllmConfig.additional_config`` closes
that hole, and turns a node without sink_vllm into an import error instead of a server without
the policy.
"""

from importlib.metadata import entry_points
from typing import Any

from sink_vllm.compat.versions import is_supported, refusal_of
from sink_vllm.gate.refused import Refused

GROUP, NAME = "vllm.general_plugins", "sink_vllm"
"""Where vLLM finds the plugin, and so does this module."""


class ShippedConfig(dict[str, Any]):
    """``additional_config`` of a ``VllmConfig`` under the policy; a plain dict to everyone."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (dict(self),)


def _rebuild(options: dict[str, Any]) -> ShippedConfig:
    """Raises Refused where vLLM is another one than where the policy was configured."""
    from vllm import __version__ as found

    for plugin in entry_points(group=GROUP, name=NAME):
        plugin.load()()
    if not is_supported(found):
        raise Refused(refusal_of(found))
    return ShippedConfig(options)
