"""The command ``sink-vllm``: what a user asks before a server runs."""
