"""What holds vLLM in place: patches, supported versions, KV cache specs, checks of all parts."""
