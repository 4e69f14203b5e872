"""What holds vLLM in place: patches, supported versions, KV cache specs, and whether all parts are ours."""
