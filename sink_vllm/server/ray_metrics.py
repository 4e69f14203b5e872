"""The policy's metrics in Ray's own export, which is what a Ray Serve replica has.

Ray Serve LLM gives vLLM's metrics this way too, labelled with the replica; there is no
``/metrics`` route to read Prometheus counters from.
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
