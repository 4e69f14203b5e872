"""``server.metrics`` in Ray's own export, where a Ray Serve replica has no ``/metrics``.

Ray Serve LLM gives vLLM's own metrics this way too, labelled with the replica.
"""

from vllm.v1.metrics.ray_wrappers import (
    RayCounterWrapper,
    RayGaugeWrapper,
    RayHistogramWrapper,
)

from sink_vllm.server.metrics import StreamingLLMStatLogger


class RayStreamingLLMStatLogger(StreamingLLMStatLogger):
    """The same counters, in Ray's classes (``ray_sink_vllm_evictions_total`` and so on)."""

    counter = RayCounterWrapper
    gauge = RayGaugeWrapper
    histogram = RayHistogramWrapper
