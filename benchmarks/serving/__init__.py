"""Throughput of `vllm serve` under many concurrent streams, beside what is used today."""
