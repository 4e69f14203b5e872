"""Token-by-token StreamingLLM for any model of transformers: the judge of the model families.

The eviction rule is that of ``tests.support.oracle``; the forward pass is the model's own code of
transformers. The cache keeps *un-rotated* keys: while a model runs, its
module's ``apply_rotary_pos_emb`` rotates the query and leaves the key alone, and the cache rotates
all keys of a layer, at every step, by their cache positions, with that same function. So pairing,
partial rotation, scaling and magnitude are whatever transformers does, layers that do not call
the function do not rotate, and ALiBi counts the tokens in the cache.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from tests.support.family import FOR_TRANSFORMERS
from tests.support.oracle import Oracle

Rotate = Callable[[torch.Tensor, int], torch.Tensor]
"""Keys ``[1, heads, n, head_size]`` of a layer, rotated by their index."""


class UnrotatedCache(DynamicCache):
    """Keys as they were before rotation, and how to rotate ``n`` of them by their index.

    Layers with a sliding window keep all of them, too: the model's mask, made from the number of
    cached tokens, lets a query see the last ``sliding_window`` of them.
    """

    rotate: Rotate | None = None
    """Set by ``_Rotary`` when the layer that runs has rotated its query, cleared by ``update``."""
    latent = False
    """Multi-head latent attention: it caches a latent and then the part of the key to rotate."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx)
        rotate, self.rotate = self.rotate, None
        if rotate is None:
            return keys, values
        if self.latent:
            return keys, rotate(values, layer_idx)
        return rotate(keys, layer_idx), values

    def drop(self, begin: int, end: int) -> None:
        """Remove cache positions ``[begin, end)``; later ones move down."""
        for layer in self.layers:
            if not isinstance(layer, DynamicLayer):
                continue  # a recurrent layer: its state runs on
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys = torch.cat((layer.keys[:, :, :begin], layer.keys[:, :, end:]), dim=2)
            layer.values = torch.cat((layer.values[:, :, :begin], layer.values[:, :, end:]), dim=2)


@dataclass(slots=True)
class Caches:
    """One cache per stream, as ``tests.support.oracle`` uses them."""

    rows: list[UnrotatedCache] = field(default_factory=list)

    def drop(self, row: int, begin: int, end: int) -> None:
        self.rows[row].drop(begin, end)

    def select(self, rows: Sequence[int]) -> "Caches":
        return Caches([self.rows[row] for row in rows])


class _Rotary:
    """Stands in for a module's ``apply_rotary_pos_emb`` while its model runs."""

    function = "apply_rotary_pos_emb"
    tokens = 2
    """Which dimension of its arguments they are."""

    def __init__(self, model: Any, capacity: int) -> None:
        model = model.get_decoder()  # of a multimodal model, its text side
        self.module = sys.modules[type(model).__module__]
        self.original: Callable[..., Any] | None = getattr(self.module, self.function, None)
        self.angles = _angles(model, capacity)
        self.layer_types = list(getattr(model.config, "layer_types", None) or ())
        self.cache = UnrotatedCache()

    @contextmanager
    def installed(self, cache: UnrotatedCache) -> Iterator[None]:
        self.cache = cache
        if self.original is None:
            yield
            return
        setattr(self.module, self.function, self.apply)
        try:
            yield
        finally:
            setattr(self.module, self.function, self.original)

    def apply(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        *angles: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.original is not None
        size = k.shape[-1]  # smaller than the head where the caller splits it
        self.cache.rotate = lambda keys, layer: self._by_index(keys, layer, size)
        return self.original(q, k, *angles)[0], k

    def _by_index(self, keys: torch.Tensor, layer: int, size: int) -> torch.Tensor:
        assert self.original is not None
        part = keys[..., :size]
        tokens = keys.shape[self.tokens]
        rotated = self.original(part, part, *self._angles_of(layer, tokens))[1]
        return torch.cat((rotated, keys[..., size:]), dim=-1)

    def _angles_of(self, layer: int, n: int) -> list[torch.Tensor]:
        """What the function is given for cache positions ``0..n-1`` in a layer."""
        one = next(iter(self.angles)) if len(self.angles) == 1 else self.layer_types[layer]
        return [part[:, :n] for part in self.angles[one]]


class _RotaryGPTJ(_Rotary):
    """GPT-J rotates key and query in two calls, key first, with heads and tokens swapped."""

    calls = 0

    def apply(self, tensor: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        assert self.original is not None
        self.calls += 1
        if self.calls % 2 == 0:
            return self.original(tensor, sin, cos)
        size = tensor.shape[-1]
        self.cache.rotate = lambda keys, layer: self._by_index(keys, layer, size)
        return tensor

    def _by_index(self, keys: torch.Tensor, layer: int, size: int) -> torch.Tensor:
        assert self.original is not None
        cos, sin = self._angles_of(layer, keys.shape[2])
        part = keys[..., :size].transpose(1, 2)
        rotated = self.original(part, sin, cos).transpose(1, 2)
        return torch.cat((rotated, keys[..., size:]), dim=-1)


class _RotaryGemma4(_Rotary):
    """Query and key are rotated in two calls, query first; layers that read the cache of another
    layer have no key, and are given that of the other, as it was rotated there."""

    calls = 0

    def __init__(self, model: Any, capacity: int) -> None:
        super().__init__(model, capacity)
        config = model.get_decoder().config
        owners = config.num_hidden_layers - config.num_kv_shared_layers
        self.is_key = [False, True] * owners + [False] * config.num_kv_shared_layers
        """Call by call of a forward pass."""

    def apply(self, tensor: torch.Tensor, *angles: torch.Tensor, **named: int) -> torch.Tensor:  # type: ignore[override]
        assert self.original is not None
        is_key = self.is_key[self.calls % len(self.is_key)]
        self.calls += 1
        if not is_key:
            rotated: torch.Tensor = self.original(tensor, *angles, **named)
            return rotated
        self.cache.rotate = self._rotated
        return tensor

    def _rotated(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        assert self.original is not None
        rotated: torch.Tensor = self.original(keys, *self._angles_of(layer, keys.shape[2]))
        return rotated


class _RotaryComplex(_Rotary):
    """Angles are complex numbers."""

    function = "apply_rotary_emb"


class _RotaryLlama4(_RotaryComplex):
    """The same, with heads and tokens swapped. Keys are normalised, by their length, afterwards."""

    tokens = 1

    def _by_index(self, keys: torch.Tensor, layer: int, size: int) -> torch.Tensor:
        return super()._by_index(keys.transpose(1, 2), layer, size).transpose(1, 2)


class _RotaryDeepseekV3(_Rotary):
    """Queries and keys come out in another order of dimensions, the same for both."""

    function = "apply_rotary_pos_emb_interleave"


_ROTARIES = {
    "gptj": _RotaryGPTJ,
    "gemma3n_text": _RotaryGemma4,
    "gemma4_text": _RotaryGemma4,
    "deepseek_v2": _RotaryComplex,
    "deepseek_v3": _RotaryDeepseekV3,
    "glm4_moe_lite": _RotaryDeepseekV3,
    "llama4_text": _RotaryLlama4,
}


def _angles(model: Any, capacity: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """What the model's rotary module makes of cache positions ``0..capacity-1``.

    By type of layer, for models whose types rotate differently (Gemma 3); else under one name.
    """
    positions = torch.arange(capacity)[None]
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            types = getattr(module, "layer_types", None)
            if types is None:
                made = module(torch.zeros(1), positions)
                # Frequencies that depend on the longest position stay those of the whole cache, as
                # in vLLM, where they are chosen once.
                module.rope_type = "default"
                return {"all": made if isinstance(made, tuple) else (made,)}
            return {one: module(torch.zeros(1), positions, one) for one in types}
        if hasattr(module, "embed_positions"):  # GPT-J: a table [sin | cos] in every layer
            sin, cos = module.embed_positions[:capacity][None].chunk(2, dim=-1)
            return {"all": (cos, sin)}
    return {}


def _as_configured(model: Any) -> Any:
    """Where transformers' code is another function than the configuration says.

    BLOOM's GELU is approximated; the routers of MiniMax M2 and Step 3.5 are sigmoids, whatever
    vLLM reads there; vLLM's class of Gemma 3n's text looks up no embeddings per layer, which its
    multimodal class does for it. Each shows before any eviction.
    """
    for module in model.modules():
        if type(module).__name__ == "BloomGelu":
            module.forward = torch.nn.functional.gelu
        elif type(module).__name__ in ("MiniMaxM2TopKRouter", "Step3p7TopKRouter"):
            module.forward = functools.partial(_softmax_routes, module)
        elif type(module).__name__ == "Gemma3nTextModel":
            module.get_per_layer_inputs = _no_embeddings
    return model.eval()


def _no_embeddings(_: torch.Tensor) -> None:
    """What Gemma 3n adds to its layers is then made of hidden states alone."""


def _softmax_routes(
    router: Any, hidden: torch.Tensor, *_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, weights that sum to one, and experts ``[tokens, top k]`` of a softmax router."""
    logits = torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
    best, experts = logits.softmax(-1).topk(router.top_k, dim=-1)
    return logits, best / best.sum(-1, keepdim=True), experts


def _has_states(config: Any) -> bool:
    return any(
        isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in DynamicCache(config=config).layers
    )


class HFModel:
    """A checkpoint run by transformers, in the shape ``tests.support.oracle`` calls."""

    def __init__(self, folder: Path) -> None:
        inner = folder / FOR_TRANSFORMERS
        folder = inner if inner.exists() else folder
        config = AutoConfig.from_pretrained(folder)
        # Falcon's eager attention adds ALiBi twice, in the mask and to the scores.
        falcon = config.model_type == "falcon"
        if config.model_type == "cohere2":
            # It was trained with one token more than its window says; vLLM adds it, transformers
            # does not.
            config.sliding_window += 1
        if config.model_type in ("kimi_k25", "gemma4"):
            # Their tokens that stand for media are masked, media or not; in a text they are tokens.
            config.image_token_id = config.video_token_id = -1
        # Multimodal models have no entry among causal language models.
        known = type(config).__name__.replace("Config", "ForConditionalGeneration")
        model_class = getattr(transformers, config.architectures[0], None)
        model_class = model_class or getattr(transformers, known)
        self.model = _as_configured(
            model_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="sdpa" if falcon else "eager",
            )
        )

    def new_cache(self, streams: int, capacity: int) -> Caches:
        kind = self.model.get_decoder().config.model_type
        self.rotary = _ROTARIES.get(kind, _Rotary)(self.model, capacity)
        # Without its configuration, so that layers with a sliding window keep all of the cache.
        config = self.model.config if _has_states(self.model.config) else None
        caches = [UnrotatedCache(config=config) for _ in range(streams)]
        for cache in caches:
            cache.latent = kind.startswith("deepseek") or kind == "glm4_moe_lite"
        return Caches(caches)

    def step(
        self, tokens: Sequence[Sequence[int]], cache: Caches, sampling: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Append tokens to every stream; logits ``[len(sampling), vocab]``.

        Args:
            sampling: stream, and which of its ``tokens`` the logits are wanted of.
        """
        logits = [self._step(some, row) for some, row in zip(tokens, cache.rows, strict=True)]
        wanted = [logits[row][column] for row, column in sampling]
        return torch.stack(wanted) if wanted else torch.empty(0)

    def _step(self, tokens: Sequence[int], cache: UnrotatedCache) -> torch.Tensor:
        at = cache.get_seq_length()
        end = at + len(tokens)
        inputs: dict[str, Any] = {"attention_mask": torch.ones(1, end, dtype=torch.long)}
        if self.rotary.original is not None:
            inputs["position_ids"] = torch.arange(at, end)[None]
        with self.rotary.installed(cache):
            result = self.model(torch.tensor([tokens]), past_key_values=cache, **inputs)
        kept: Cache = result.past_key_values
        assert kept is cache
        assert cache.get_seq_length() == end
        logits: torch.Tensor = result.logits[0]
        return logits


@contextmanager
def classes_restored(model_class: Any) -> Iterator[None]:
    """Undo what vLLM's Transformers backend does to the decoder's class, for the whole process.

    It decorates the class for torch.compile, and then transformers cannot use it any more.
    """
    source = sys.modules[model_class.__module__]
    classes = [one for one in vars(source).values() if isinstance(one, type)]
    before = [(one, one.__bases__, dict(vars(one))) for one in classes]
    try:
        yield
    finally:
        for one, bases, attributes in before:
            if one.__bases__ != bases:
                one.__bases__ = bases
                for name, value in list(vars(one).items()):
                    if name not in attributes:
                        delattr(one, name)
                    elif value is not attributes[name]:
                        setattr(one, name, attributes[name])


class HFOracle(Oracle):
    """``tests.support.oracle.Oracle`` on a model of transformers."""

    def __init__(self, folder: Path) -> None:
        self.llama = HFModel(folder)  # type: ignore[assignment]
