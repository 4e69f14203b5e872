"""The workers: page moves, rotation of keys, positions, for both of vLLM's model runners."""
