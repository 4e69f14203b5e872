"""Model classes that vLLM no longer has, for models the paper streams."""

from sink_vllm.models.registry import register

__all__ = ["register"]
