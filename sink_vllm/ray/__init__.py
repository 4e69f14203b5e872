"""vLLM's Ray executor under the policy: on GPUs it is vLLM's own, on CPUs a subclass of it."""
