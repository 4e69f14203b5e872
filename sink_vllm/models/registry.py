"""Tells vLLM's ``ModelRegistry`` about the classes of this package."""

_CLASSES = {
    # As written by MosaicML and by transformers.
    "MPTForCausalLM": "sink_vllm.models.mpt:MptForCausalLM",
    "MptForCausalLM": "sink_vllm.models.mpt:MptForCausalLM",
}


def register() -> None:
    """Add what vLLM does not have itself; classes are imported when a model needs them."""
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, path in _CLASSES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, path)
