"""The open-weight model families most served with vLLM in 2026, and how each streams.

The list is by downloads, hosted tokens and vLLM's official recipes of that year; its order says
nothing. ``tests/gate/test_registry.py`` asks the gate about every architecture in it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One row of the table of served families."""

    name: str
    """As people call the models."""
    architecture: str
    """In vLLM's registry."""
    tested: str | None = None
    """Name of the tested family (``tests.support.families``) that shows it."""
    caveat: str = ""
    """What that family does not show."""
    refused: str | None = None
    """Name of the row of ``sink_vllm.gate.refusals`` that refuses published checkpoints."""


_SOFTMAX = "with a router by softmax: vLLM's on CPUs takes no sigmoids there"
SERVED = (
    Served(
        name="Qwen3.5, 3.6, 3.8 (dense)",
        architecture="Qwen3_5ForConditionalGeneration",
        tested="Qwen3.5",
        caveat="its text class in bfloat16; the multimodal one around it was not run",
    ),
    Served(
        name="Qwen3.5, 3.6 (MoE)",
        architecture="Qwen3_5MoeForConditionalGeneration",
        tested="Qwen3.5",
        caveat="its dense text class in bfloat16; experts and the multimodal class were not run",
    ),
    Served(name="Qwen3-VL", architecture="Qwen3VLForConditionalGeneration", tested="Qwen3-VL"),
    Served(name="Qwen3 (dense)", architecture="Qwen3ForCausalLM", tested="Qwen3"),
    Served(name="Qwen3 (MoE), Qwen3-Coder", architecture="Qwen3MoeForCausalLM", tested="Qwen3-MoE"),
    Served(name="Qwen2.5", architecture="Qwen2ForCausalLM", tested="Qwen2"),
    Served(
        name="Qwen2.5-VL", architecture="Qwen2_5_VLForConditionalGeneration", tested="Qwen2.5-VL"
    ),
    Served(
        name="Qwen3-Next, Coder-Next",
        architecture="Qwen3NextForCausalLM",
        tested="Qwen3-Next",
        caveat="in bfloat16",
    ),
    Served(
        name="Gemma 4 26B-A4B, 31B",
        architecture="Gemma4ForConditionalGeneration",
        tested="Gemma 4, multimodal",
        caveat="its experts in the class of the text",
    ),
    Served(
        name="Gemma 4 E2B, E4B",
        architecture="Gemma4ForConditionalGeneration",
        tested="Gemma 4 E2B, E4B",
        caveat="its text class; the multimodal one around it was run as Gemma 4, multimodal",
    ),
    Served(
        name="Gemma 3 4B to 27B",
        architecture="Gemma3ForConditionalGeneration",
        tested="Gemma 3 4B+",
    ),
    Served(name="gpt-oss", architecture="GptOssForCausalLM", tested="gpt-oss"),
    Served(name="Llama 3.1, 3.2, 3.3", architecture="LlamaForCausalLM", tested="Llama 3.1"),
    Served(
        name="Llama 4",
        architecture="Llama4ForConditionalGeneration",
        tested="Llama 4, multimodal",
    ),
    Served(name="DeepSeek V4", architecture="DeepseekV4ForCausalLM", refused="sparse attention"),
    Served(
        name="DeepSeek V3, R1, V3.1",
        architecture="DeepseekV3ForCausalLM",
        tested="DeepSeek-V3",
        caveat="on CPUs; on GPUs by the layouts of its pages, on CPU tensors",
    ),
    Served(name="DeepSeek V3.2", architecture="DeepseekV32ForCausalLM", refused="sparse attention"),
    Served(
        name="Kimi K2",
        architecture="DeepseekV3ForCausalLM",
        tested="DeepSeek-V3",
        caveat="on CPUs; on GPUs by the layouts of its pages, on CPU tensors",
    ),
    Served(
        name="Kimi K2.5 to 2.7",
        architecture="KimiK25ForConditionalGeneration",
        tested="Kimi K2.5",
        caveat="on CPUs; on GPUs by the layouts of its pages, on CPU tensors",
    ),
    Served(
        name="Kimi K3", architecture="KimiK3ForConditionalGeneration", refused="recurrent layers"
    ),
    Served(name="GLM-4.5, 4.6, 4.7", architecture="Glm4MoeForCausalLM", tested="GLM-4.5"),
    Served(
        name="GLM-4.7-Flash",
        architecture="Glm4MoeLiteForCausalLM",
        tested="GLM-4.7-Flash, yarn scaling",
        caveat="published ones, without scaling, on GPUs by the layouts of their pages, on CPU "
        "tensors; refused on CPUs",
    ),
    Served(name="GLM-5", architecture="GlmMoeDsaForCausalLM", refused="sparse attention"),
    Served(
        name="MiniMax M2",
        architecture="MiniMaxM2ForCausalLM",
        tested="MiniMax M2",
        caveat=_SOFTMAX,
    ),
    Served(
        name="MiniMax M3",
        architecture="MiniMaxM3SparseForConditionalGeneration",
        refused="sparse attention",
    ),
    Served(name="Hy3", architecture="HYV3ForCausalLM", tested="Hy3"),
    Served(
        name="MiMo-V2-Flash",
        architecture="MiMoV2FlashForCausalLM",
        tested="MiMo-V2-Flash, values as long as keys",
        caveat="published ones, with shorter values, on GPUs by the layouts of their pages, on CPU "
        "tensors; refused on CPUs",
    ),
    Served(
        name="Nemotron 3",
        architecture="NemotronHForCausalLM",
        tested="Nemotron 3",
        caveat="without its experts",
    ),
    Served(
        name="Mistral Small 3",
        architecture="Mistral3ForConditionalGeneration",
        tested="Mistral Small 3",
    ),
    Served(
        name="Ministral 3, Mistral Small 4",
        architecture="Mistral3ForConditionalGeneration",
        tested="Ministral 3, multimodal",
        caveat="Mistral Small 4, with latent attention, was not run",
    ),
    Served(name="Phi-4, Phi-4-reasoning", architecture="Phi3ForCausalLM", tested="Phi-3"),
    Served(name="Phi-4-mini, Phi-3.5-mini", architecture="Phi3ForCausalLM", tested="Phi-4-mini"),
    Served(name="Granite 4 H", architecture="GraniteMoeHybridForCausalLM", tested="Granite 4 H"),
    Served(
        name="LFM2, 2.5",
        architecture="Lfm2ForCausalLM",
        tested="LFM2",
        caveat="with RoPE in torch: vLLM's own op is wrong for it on CPUs",
    ),
    Served(
        name="Step-3.5-Flash",
        architecture="Step3p5ForCausalLM",
        tested="Step-3.5",
        caveat=_SOFTMAX,
    ),
)
