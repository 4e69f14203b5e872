"""Multimodal families that serve their text side alone: vLLM's multimodal classes, no images.

What stands for images in their vocabularies may occur in a text, and does in the tests' prompts.
"""

from tests.support.families_special import DEEPSEEK_V3, GEMMA_3, LLAMA_4
from tests.support.family import HIDDEN, MINISTRAL_3, MOE, Family, rope

IMAGE, VIDEO, BEGIN, END = 289, 296, 284, 286
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
}
QWEN_MEDIA = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
QWEN3_VL = {
    **QWEN_MEDIA,
    "vision_config": {
        **QWEN_VISION,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
}
# vLLM gives M-RoPE four rows per position: with fewer positions than elsewhere streams re-anchor.
SECTIONS = {"max_position_embeddings": 96}
INTERLEAVED = rope(mrope_section=[6, 5, 5], mrope_interleaved=True) | SECTIONS

MEDIA = (
    Family(
        name="Qwen3-VL",
        quick=True,
        model="Qwen3VL",
        special="M-RoPE, interleaved sections",
        settings=INTERLEAVED,
        media=QWEN3_VL,
    ),
    Family(
        name="Qwen3-VL-MoE",
        model="Qwen3VLMoe",
        special="M-RoPE, interleaved sections, mixture of experts",
        settings={
            **INTERLEAVED,
            "num_experts": 4,
            "norm_topk_prob": True,
            **MOE,
            "moe_intermediate_size": 96,  # square weights would not show that they are turned
        },
        turned="mlp.experts.",
        media=QWEN3_VL,
    ),
    Family(
        name="Qwen3-VL, yarn scaling",
        model="Qwen3VL",
        special="M-RoPE, magnitude in the table",
        settings={
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mrope_section=[6, 5, 5],
                mrope_interleaved=True,
            ),
        },
        media=QWEN3_VL,
    ),
    Family(
        name="Qwen2.5-VL",
        model="Qwen2_5_VL",
        special="M-RoPE, sections one behind the other",
        settings=rope(mrope_section=[4, 6, 6]) | SECTIONS,
        media={**QWEN_MEDIA, "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]}},
    ),
    Family(
        name="GLM-4.1V",
        model="Glm4v",
        special="M-RoPE, interleaved pairs, partial rotation",
        settings={
            **rope(mrope_section=[2, 3, 3], partial_rotary_factor=0.5),
            **SECTIONS,
            "attention_bias": True,
        },
        media={
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": BEGIN,
            "image_end_token_id": END,
            "video_start_token_id": BEGIN,
            "video_end_token_id": END,
            "vision_config": QWEN_VISION,
        },
    ),
    Family(
        name="Mistral Small 3",
        model="Mistral3",
        special="GQA",
        settings={"sliding_window": None},
        media={"image_token_id": IMAGE, "vision_config": {"model_type": "pixtral", **VISION}},
    ),
    Family(
        name="Gemma 3 4B+",
        quick=True,
        model="Gemma3",
        special="hybrid, two bases of rotation",
        settings=GEMMA_3,
        media={
            "image_token_id": IMAGE,
            "boi_token_id": BEGIN,
            "eoi_token_id": END,
            "mm_tokens_per_image": 4,
            "vision_config": VISION,
        },
        tied_gain=1.0,
    ),
    Family(
        name="LLaVA",
        model="Llava",
        special="GQA",
        media={
            "image_token_id": IMAGE,
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
    ),
    Family(
        name="InternVL 3",
        model="InternVL",
        special="biases of queries and keys",
        media={
            "image_token_id": IMAGE,
            "vision_config": {
                "model_type": "internvl_vision",
                **VISION,
                "image_size": [28, 28],
                "patch_size": [14, 14],
            },
        },
    ),
    Family(
        name="Llama 4, multimodal",
        model="Llama4",
        special=LLAMA_4.special,
        still=LLAMA_4.still,
        generation=LLAMA_4.generation,
        settings=LLAMA_4.settings,
        media={
            "image_token_index": IMAGE,
            "boi_token_index": BEGIN,
            "eoi_token_index": END,
            "vision_config": {**VISION, "vision_output_dim": 32, "projector_output_dim": 32},
        },
    ),
    Family(
        name="Ministral 3, multimodal",
        model="Mistral3",
        special="queries scaled by their position, yarn scaling",
        settings={"model_type": "ministral3", **MINISTRAL_3},
        media={"image_token_id": IMAGE, "vision_config": {"model_type": "pixtral", **VISION}},
    ),
    Family(
        name="Kimi K2.5",
        model="Kimi_K25",
        served_as="KimiK25ForConditionalGeneration",
        special="latent attention (MLA), latent queries",
        page=16,
        settings={"model_type": "deepseek_v3", **DEEPSEEK_V3},
        media={
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": BEGIN,
            "vision_end_token_id": END,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "projection_hidden_size": 32,
        },
        renamed=(".blocks.", ".layers."),
        dropped=("vision_tower.", "mm_projector."),
        processor={
            "media_proc_cfg": {
                "patch_size": 14,
                "merge_kernel_size": 2,
                "temporal_merge_kernel_size": 1,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "in_patch_limit": 16,
                "in_patch_limit_each_frame": None,
                "patch_limit_on_one_side": 4,
                "fixed_output_tokens": None,
            }
        },
    ),
)
