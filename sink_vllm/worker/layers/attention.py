"""The attention layers of a loaded model, each with its KV cache and the rotation of its keys.

vLLM keeps both, but not together: the caches hang on the ``Attention`` objects of
``compilation_config.static_forward_context``, the rotary modules somewhere above them in the
module tree. Owning a rotary module is no proof that a layer applies it (Command R and EXAONE 4
own one in layers without rotation): ``sink_vllm.worker.self_test`` finds out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.rotary_embedding import (
    DualChunkRotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from sink_vllm.gate.refusals_of_settings import FP8_KV_DTYPES
from sink_vllm.worker.layers.recurrent import recurrent_layers
from sink_vllm.worker.layers.rotation import Rotation
from sink_vllm.worker.layers.rotation_longrope import LongRotation
from sink_vllm.worker.layers.rotation_transformers import (
    TransformersRotation,
    is_transformers_rotary,
    kind_of_layer,
)

# The last two are rotary modules of vLLM that do not derive from its base class.
_ROTARY = (RotaryEmbeddingBase, DualChunkRotaryEmbedding, Phi3LongRoPEScaledRotaryEmbedding)


@dataclass(slots=True)
class AttentionLayer:
    """One attention layer that has a KV cache of its own."""

    name: str
    """Name in ``static_forward_context``, such as ``model.layers.0.self_attn.attn``."""
    module: Attention | MLAAttention
    rotation: Rotation | None
    """Rotation of its keys; ``None`` if keys do not depend on the position (NoPE, ALiBi)."""
    group: int = 0
    """KV cache group: which of a stream's page tables is its own."""

    @property
    def kv_cache(self) -> torch.Tensor:
        """Its pages, logically ``[kernel blocks, heads, tokens, content]``; bound anew at times."""
        cache = self.module.kv_cache
        # Latent attention has one head, and vLLM drops its dimension.
        return cache.unsqueeze(1) if isinstance(self.module, MLAAttention) else cache

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the numbers in its pages: vLLM keeps 8-bit floating-point numbers as bytes."""
        if self.kv_cache.dtype == torch.uint8 and self.module.kv_cache_dtype in FP8_KV_DTYPES:
            return torch.float8_e4m3fn
        return self.kv_cache.dtype


def attention_layers(model: nn.Module, vllm_config: VllmConfig) -> list[AttentionLayer]:
    """All attention layers of this worker, in the order of the model.

    Layers that share the cache of another layer (``kv_sharing_target_layer_name``) are left out,
    their pages are moved with it. So are recurrent layers, in whose pages no token has a place
    (``recurrent``). Callable as soon as the model is loaded.

    Raises:
        ValueError: a layer caches something else than keys and values, or its rotary module
            cannot be used (see ``Rotation``); names the layer.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    rotations: dict[tuple[int, str | None], Rotation] = {}
    layers = []
    for name, module in _cached(vllm_config):
        rotary = _rotary_above(model, paths.get(id(module), ""), name)
        rotation = None
        if rotary is not None:
            key = (id(rotary), kind_of_layer(rotary, name))
            if key not in rotations:
                rotations[key] = _rotation_of(rotary, name, module.head_size)
            rotation = rotations[key]
        layers.append(AttentionLayer(name, module, rotation))
    return layers


def shared_layers(vllm_config: VllmConfig) -> dict[str, str]:
    """Layers that read the cache of another layer, by name, and that layer."""
    layers = vllm_config.compilation_config.static_forward_context.items()
    targets = {name: getattr(one, "kv_sharing_target_layer_name", None) for name, one in layers}
    return {name: target for name, target in targets.items() if target is not None}


def _rotation_of(rotary: nn.Module, name: str, head_size: int) -> Rotation:
    if is_transformers_rotary(rotary):
        return TransformersRotation(rotary, name, head_size)
    if type(rotary) is Phi3LongRoPEScaledRotaryEmbedding:
        return LongRotation(rotary, name)
    return Rotation(rotary, name)


def rope_rows(layers: Iterable[AttentionLayer]) -> int | None:
    """Rope positions every rotating layer has a table row for; ``None`` if no layer rotates."""
    return min((one.rotation.table_rows for one in layers if one.rotation), default=None)


def check_windows(layers: Iterable[AttentionLayer]) -> None:
    """Refuse a backend that cannot serve layers of several windows from one table of pages.

    FlashInfer plans the attention of all layers that share a page table at once, for one window.
    vLLM would say so in the middle of the first step.

    Raises:
        ValueError: names a layer, the windows and the way out.
    """
    windows: dict[int, dict[int | None, str]] = {}
    for one in layers:
        if one.module.attn_backend.get_name() == "FLASHINFER":
            window = getattr(one.module, "sliding_window", None)
            windows.setdefault(one.group, {})[window] = one.name
    for name_of in windows.values():
        if len(name_of) > 1:
            several = ", ".join(sorted(str(window or "none") for window in name_of))
            name = next(name for window, name in name_of.items() if window)
            raise ValueError(
                f"{name}: FLASHINFER plans one attention window for all layers that share pages, "
                f"and here they have several ({several}); use --attention-backend FLASH_ATTN or "
                f"TRITON_ATTN."
            )


def _cached(vllm_config: VllmConfig) -> Iterator[tuple[str, Attention | MLAAttention]]:
    recurrent = dict(recurrent_layers(vllm_config))
    for name, module in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(module, AttentionLayerBase) or name in recurrent:
            continue
        if not isinstance(module, (Attention, MLAAttention)):
            raise ValueError(
                f"{name}: {type(module).__name__} caches neither keys and values nor latents, and "
                f"its pages cannot be moved; serve this model with --kv-policy full."
            )
        if getattr(module, "kv_sharing_target_layer_name", None) is None:
            yield name, module


def _rotary_above(model: nn.Module, path: str, name: str) -> nn.Module | None:
    """The rotary module owned by the nearest ancestor of ``path`` that owns one."""
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        owned = [
            child
            for child in owner.children()
            if isinstance(child, _ROTARY) or is_transformers_rotary(child)
        ]
        if len(owned) > 1:
            kinds = ", ".join(type(rotary).__name__ for rotary in owned)
            raise ValueError(
                f"{name}: {path or 'the model'} owns several rotary modules ({kinds}) and it "
                f"does not show which of them rotates this layer; serve this model with "
                f"--kv-policy full."
            )
        if owned:
            return owned[0]
    return None
