"""What sink_vllm changes in the processes that build the configuration and talk to clients."""
