"""The recurrent layers of a loaded model, whose pages hold states and no tokens."""

from collections.abc import Iterator

from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase

RECURRENT = ("GDN_ATTN", "MAMBA2", "SHORT_CONV")
"""Attention backends of recurrent layers whose states run on; see ``refusals.RECURRENT_LAYERS``."""


def recurrent_layers(vllm_config: VllmConfig) -> Iterator[tuple[str, MambaBase]]:
    """Recurrent layers of this worker and their names, in the order of the model."""
    for name, module in vllm_config.compilation_config.static_forward_context.items():
        if isinstance(module, MambaBase) and module.mamba_type.name in RECURRENT:
            yield name, module
