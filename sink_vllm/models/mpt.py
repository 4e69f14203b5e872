"""MPT (MosaicML) for vLLM, which dropped its own class after 0.28.

Written from ``transformers.models.mpt`` and the ALiBi paper (arXiv 2108.12409), for causal text
models with ALiBi: one of the four families of arXiv 2309.17453. Positions are not rotated; the
attention kernels add ALiBi's bias by cache position, so nothing needs doing when a stream evicts.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import nn
from transformers import MptConfig
from transformers.models.mpt.configuration_mpt import MptAttentionConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

_MLP_FACTOR = 4  # transformers ignores ``expansion_ratio`` too; no published model has another


def alibi_slopes(heads: int, bias_max: float) -> list[float]:
    """Slope of each of ``heads`` heads, as MPT was trained with.

    ``bias_max`` is the exponent of the smallest slope, ``2 ** -bias_max``. Numbers of heads that
    are no power of two take every second slope of the next power first, then those in between.
    """
    power = 1 << (heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * (head + 1) / power) for head in range(power)]
    return slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]


def _config(vllm_config: VllmConfig) -> MptConfig:
    config = vllm_config.model_config.hf_config
    assert isinstance(config, MptConfig)
    return config


def _attention(config: MptConfig) -> MptAttentionConfig:
    settings = config.attn_config
    assert isinstance(settings, MptAttentionConfig)  # made of what else it may be, by transformers
    return settings


def check(config: MptConfig) -> None:
    """Refuse what this class does not compute.

    Raises:
        ValueError: a setting of ``attn_config`` other than those of the published text models.
    """
    required = {
        "alibi": True,
        "attn_type": "multihead_attention",
        "prefix_lm": False,
        "qk_ln": False,
    }
    for name, value in required.items():
        found = getattr(_attention(config), name)
        if found != value:
            raise ValueError(
                f"attn_config.{name}={found!r} of this MPT model is not supported, only {value!r} "
                "is; use another checkpoint."
            )
    if config.logit_scale is not None or not config.no_bias:
        raise ValueError(
            f"logit_scale={config.logit_scale!r} and no_bias={config.no_bias!r} of this MPT model "
            "are not supported, only None and True are; use another checkpoint."
        )


class MptAttention(nn.Module):
    """All heads of a layer: ``[tokens, d_model]`` to ``[tokens, d_model]``."""

    def __init__(self, config: MptConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        workers = get_tensor_model_parallel_world_size()
        if config.n_heads % workers:
            raise ValueError(
                f"--tensor-parallel-size {workers} does not divide the {config.n_heads} heads of "
                "this model; choose a divisor."
            )
        size, heads = config.d_model // config.n_heads, config.n_heads // workers
        quantization = vllm_config.quant_config
        settings = _attention(config)
        self.clip = settings.clip_qkv
        self.Wqkv = QKVParallelLinear(
            config.d_model,
            size,
            config.n_heads,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.Wqkv",
        )
        self.out_proj = RowParallelLinear(
            config.d_model,
            config.d_model,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.out_proj",
        )
        first = get_tensor_model_parallel_rank() * heads
        slopes = alibi_slopes(config.n_heads, settings.alibi_bias_max)
        self.attn = Attention(
            heads,
            size,
            settings.softmax_scale or size**-0.5,
            alibi_slopes=slopes[first : first + heads],
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        fused, _ = self.Wqkv(hidden)
        if self.clip:
            fused = fused.clamp(-self.clip, self.clip)
        output, _ = self.out_proj(self.attn(*fused.chunk(3, dim=-1)))
        return output


class MptFeedForward(nn.Module):
    """``[tokens, d_model]`` to ``[tokens, d_model]``."""

    def __init__(self, config: MptConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(
            config.d_model,
            _MLP_FACTOR * config.d_model,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.up_proj",
        )
        self.act = nn.GELU()
        self.down_proj = RowParallelLinear(
            _MLP_FACTOR * config.d_model,
            config.d_model,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide, _ = self.up_proj(hidden)
        output, _ = self.down_proj(self.act(wide))
        return output


class MptBlock(nn.Module):
    """One layer with its residual connections."""

    def __init__(self, config: MptConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.norm_1 = _norm(config)
        self.attn = MptAttention(config, vllm_config, f"{prefix}.attn")
        self.norm_2 = _norm(config)
        self.ffn = MptFeedForward(config, vllm_config, f"{prefix}.ffn")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm_1(hidden))
        return hidden + self.ffn(self.norm_2(hidden))


def _norm(config: MptConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=False)


@support_torch_compile
class MptModel(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = _config(vllm_config)
        self.wte = VocabParallelEmbedding(config.vocab_size, config.d_model)
        self.start_layer, self.end_layer, self.blocks = make_layers(
            config.n_layers,
            lambda prefix: MptBlock(config, vllm_config, prefix),
            prefix=f"{prefix}.blocks",
        )
        self.norm_f = _norm(config)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.d_model
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.wte(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            hidden = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            hidden = inputs_embeds
        else:
            assert input_ids is not None
            hidden = self.embed_input_ids(input_ids)
        for block in islice(self.blocks, self.start_layer, self.end_layer):
            hidden = block(hidden)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden})
        normed: torch.Tensor = self.norm_f(hidden)
        return normed


class MptForCausalLM(nn.Module, SupportsPP):
    """What vLLM asks of a text model (``vllm.model_executor.models.interfaces_base``)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = _config(vllm_config)
        check(config)
        self.config = config
        self.transformer = MptModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.d_model,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.transformer.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.transformer.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        output: torch.Tensor | IntermediateTensors = self.transformer(
            input_ids, positions, intermediate_tensors, inputs_embeds
        )
        return output

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        tied = self.config.tie_word_embeddings
        named = (
            (name, weight)
            for name, weight in _named(weights)
            if not (tied and name.startswith("lm_head."))
        )
        loaded: set[str] = AutoWeightsLoader(self).load_weights(named)
        return loaded


def _named(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Base models are saved without the name of their part of the whole."""
    for name, weight in weights:
        known = name.startswith(("transformer.", "lm_head."))
        yield (name if known else f"transformer.{name}"), weight
