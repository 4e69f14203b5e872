"""The table of refusals: every row, its sentence, its documentation.

The rows are tested on facts; that facts are read correctly from real configurations is tested in
tests/server/test_engine_args.py.
"""

import dataclasses
import subprocess
import sys

import pytest

from sink_vllm.gate.check import check, markdown, reason
from sink_vllm.gate.facts import Facts
from sink_vllm.gate.refusal import Refusal
from sink_vllm.gate.refusals import REFUSALS
from sink_vllm.gate.refusals_of_models import KNOWN_ROPE_TYPES
from sink_vllm.gate.refusals_of_settings import FP8_KV_DTYPES, PLAIN_KV_DTYPES
from tests.support.paths import DOCS

# One case per row: the facts that make it apply, and the value its sentence must show.
CASES: dict[str, tuple[Facts, str]] = {
    "encoder-decoder": (
        Facts(encoder_decoder=True, architecture="BartForConditionalGeneration"),
        "BartForConditionalGeneration",
    ),
    "pooling": (Facts(runner="pooling"), "--runner pooling"),
    "attention-free": (
        Facts(
            attention_free=True,
            recurrent_layers=("mamba1",),
            positions="other",
            architecture="Mamba",
        ),
        "Mamba",
    ),
    "bidirectional": (Facts(bidirectional=True), "LlamaForCausalLM"),
    "diffusion": (Facts(diffusion=True), "LlamaForCausalLM"),
    "recurrent layers": (Facts(recurrent_layers=("mamba1", "mamba2")), "['mamba1']"),
    "speculation with recurrent layers": (
        Facts(recurrent_layers=("short_conv",), speculative_method="ngram"),
        "ngram",
    ),
    "pipeline parallelism with recurrent layers": (
        Facts(recurrent_layers=("mamba2",), pipeline_parallel=2),
        "(2)",
    ),
    "replayed states": (
        Facts(recurrent_layers=("mamba2",), replayed_states=True),
        "--use-replayssm",
    ),
    "Qwen3.5 on CPUs with AVX512-BF16": (
        Facts(
            convolves_part_of_projection=True,
            cpu_has_bf16_convolutions=True,
            architecture="Qwen3_5ForCausalLM",
        ),
        "Qwen3_5ForCausalLM",
    ),
    "LFM2 on CPUs": (
        Facts(heads_rotated_apart=True, rotary_op=True, architecture="Lfm2ForCausalLM"),
        "Lfm2ForCausalLM",
    ),
    "sparse attention": (Facts(sparse_attention=True), "LlamaForCausalLM"),
    "MLA without RoPE scaling on CPUs": (
        Facts(mla=True, rope_types=("default",), architecture="DeepseekV3ForCausalLM"),
        "DeepseekV3ForCausalLM",
    ),
    "hidden latents": (Facts(hidden_latents="kv_lora_rank=512"), "kv_lora_rank=512"),
    "static sinks": (Facts(static_sinks="param_sink_number=128"), "param_sink_number=128"),
    "prefix language models": (
        Facts(prefix_lm=True, architecture="HrmTextForCausalLM"),
        "HrmTextForCausalLM",
    ),
    "chunked attention": (
        Facts(chunked_attention="rswa_window=128"),
        "rswa_window=128",
    ),
    "values of another size on CPUs": (Facts(value_size=128), "(128)"),
    "learned absolute positions": (
        Facts(positions="other", rope_types=(), architecture="GPT2LMHeadModel"),
        "GPT2LMHeadModel",
    ),
    "scaling after rotation": (
        Facts(architecture="HunYuanDenseV1ForCausalLM", scaled_after_rotation=True),
        "HunYuanDenseV1ForCausalLM",
    ),
    "RoPE scaling": (Facts(rope_types=("default", "fope")), "['fope']"),
    "RoPE of transformers that depends on the length": (
        Facts(rope_types=("longrope",), transformers_backend=True),
        "longrope",
    ),
    "position-scaled attention": (
        Facts(position_scaled_attention="llama_4_scaling_beta=0.1"),
        "llama_4_scaling_beta=0.1",
    ),
    "M-RoPE": (Facts(foreign_mrope="4 sections", multimodal=True), "4 sections"),
    "multimodal": (Facts(multimodal=True, architecture="Llava"), "Llava"),
    "prompt embeddings": (Facts(prompt_embeds=True), "--enable-prompt-embeds"),
    "custom logits processors": (
        Facts(custom_logits_processors="--logits-processors"),
        "--logits-processors",
    ),
    "watermarking": (Facts(watermarking="gumbel"), "gumbel"),
    "routed experts": (Facts(routed_experts=True), "--enable-return-routed-experts"),
    "platform": (Facts(platform="xpu"), "xpu"),
    "Rust front end": (Facts(rust_frontend=True), "VLLM_USE_RUST_FRONTEND=1"),
    "no chunked prefill": (Facts(chunked_prefill=False), "--no-enable-chunked-prefill"),
    "packed latents": (
        Facts(mla=True, rope_types=("yarn",), platform="cuda", kv_cache_dtype="fp8_ds_mla"),
        "fp8_ds_mla",
    ),
    "quantised KV cache": (Facts(kv_cache_dtype="fp8_e5m2"), "fp8_e5m2"),
    "fp8 KV cache on old CPUs": (
        Facts(kv_cache_dtype="fp8_e4m3", cpu_has_fp8_kernels=False),
        "fp8_e4m3",
    ),
    "draft models": (Facts(speculative_method="mtp", draft_kv_cache=True), "mtp"),
    "other speculation": (Facts(speculative_method="suffix"), "suffix"),
    "KV offloading": (
        Facts(kv_offloading_gib=2.5, kv_connector="OffloadingConnector"),
        "2.5 GiB",
    ),
    "KV connector": (Facts(kv_connector="LMCacheConnectorV1"), "LMCacheConnectorV1"),
    "prefill context parallelism": (Facts(prefill_context_parallel=2), "2"),
    "decode context parallelism": (Facts(decode_context_parallel=4), "4"),
    "kept pages of recurrent layers": (
        Facts(recurrent_layers=("mamba2",), kept_pages="--sink-host-gib=2"),
        "--sink-host-gib=2",
    ),
    "kept pages without prefix caching": (
        Facts(kept_pages="--sink-host-gib=2"),
        "--sink-host-gib=2",
    ),
    "kept pages with pipeline parallelism": (
        Facts(kept_pages="--sink-host-gib=2", prefix_caching=True, pipeline_parallel=2),
        "--sink-host-gib=2",
    ),
    "kept pages with KV events": (
        Facts(kept_pages="--sink-host-gib=2", prefix_caching=True, kv_events=True),
        "--sink-host-gib=2",
    ),
    "pages on disk with workers elsewhere": (
        Facts(
            kept_pages="--sink-host-gib=2", prefix_caching=True, kept_on_disk=True, executor="ray"
        ),
        "ray",
    ),
    "pipeline parallelism": (Facts(pipeline_parallel=2, v2_runner=True), "2"),
    "legacy Ray executor": (
        Facts(legacy_ray_executor=True),
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0",
    ),
    "microbatching": (Facts(microbatching=True), "--enable-dbo"),
    "KV sharing fast prefill": (Facts(kv_sharing_fast_prefill=True), "--kv-sharing-fast-prefill"),
}


def test_an_ordinary_start_is_accepted() -> None:
    assert reason(Facts()) is None
    check(Facts())


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name)
def test_row_raises_its_sentence(row: Refusal) -> None:
    facts, value = CASES[row.name]

    with pytest.raises(ValueError, match="--kv-policy sink") as error:
        check(facts)

    sentence = str(error.value)
    assert value in sentence
    assert sentence.endswith(f"): {row.why}; {row.way_out}.")
    assert (" yet (" in sentence) is not row.final


def test_every_row_has_a_case_and_a_name_of_its_own() -> None:
    names = [row.name for row in REFUSALS]

    assert names == list(CASES)


def test_every_fact_is_looked_at_by_some_row() -> None:
    """A fact without a row is a refusal that somebody forgot."""
    shown = {"architecture"}  # only names the model in the sentences
    default = Facts()
    changed = {
        field.name
        for facts, _ in CASES.values()
        for field in dataclasses.fields(facts)
        if getattr(facts, field.name) != getattr(default, field.name)
    }

    assert changed | shown == {field.name for field in dataclasses.fields(Facts)}


@pytest.mark.parametrize("rope_type", KNOWN_ROPE_TYPES)
def test_known_rope_scalings_are_accepted(rope_type: str) -> None:
    assert reason(Facts(rope_types=(rope_type,))) is None


def test_latent_attention_is_accepted_on_cpus() -> None:
    """vLLM switches chunked prefill off for it."""
    facts = Facts(mla=True, rope_types=("yarn",), chunked_prefill=False)
    assert reason(facts) is None
    assert reason(dataclasses.replace(facts, platform="cuda")) is not None


@pytest.mark.parametrize("rope_type", ["default", "yarn"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", *FP8_KV_DTYPES])
def test_latent_attention_is_accepted_on_gpus(rope_type: str, dtype: str) -> None:
    """What is wrong without scaling is vLLM's CPU backend."""
    facts = Facts(mla=True, rope_types=(rope_type,), platform="cuda", kv_cache_dtype=dtype)

    assert reason(facts) is None


@pytest.mark.parametrize("positions", ["alibi", "none"])
def test_positions_that_are_in_no_key_are_accepted(positions: str) -> None:
    """ALiBi counts tokens of the cache; who has no positions (NoPE) has nothing to move."""
    assert reason(Facts(positions=positions, rope_types=())) is None


def test_n_grams_are_accepted() -> None:
    """V1's other n-grams keep tokens on the device, and do not hear of evictions."""
    assert reason(Facts(speculative_method="ngram")) is None
    assert reason(Facts(speculative_method="ngram", v2_runner=True)) is None
    assert reason(Facts(speculative_method="ngram_gpu", v2_runner=True)) is None
    assert reason(Facts(speculative_method="ngram_gpu")) is not None


@pytest.mark.parametrize("dtype", PLAIN_KV_DTYPES)
def test_plain_kv_dtypes_are_accepted(dtype: str) -> None:
    assert reason(Facts(kv_cache_dtype=dtype)) is None


@pytest.mark.parametrize("dtype", FP8_KV_DTYPES)
def test_fp8_is_accepted_where_vllm_has_kernels(dtype: str) -> None:
    assert reason(Facts(kv_cache_dtype=dtype)) is None
    assert reason(Facts(kv_cache_dtype=dtype, platform="cuda", cpu_has_fp8_kernels=False)) is None


def test_documentation_is_the_table() -> None:
    """Regenerate with ``python -m sink_vllm.gate`` when this fails."""
    assert markdown() in (DOCS / "limitations.md").read_text()


def test_table_prints_without_torch_or_vllm() -> None:
    code = (
        "import runpy, sys; runpy.run_module('sink_vllm.gate', run_name='__main__'); "
        "assert not {'torch', 'vllm'} & set(sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == markdown()
