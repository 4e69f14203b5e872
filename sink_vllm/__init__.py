"""StreamingLLM inside vLLM's paged KV cache.

Importing the package is light on purpose: vLLM swallows exceptions raised while it imports a
plugin, so everything that can fail happens in :func:`sink_vllm.plugin.register`.
"""

from importlib.metadata import version

__version__ = version("sink-vllm")
