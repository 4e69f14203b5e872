"""What ``--kv-policy sink`` refuses because of options and platform: see ``refusals``."""

from sink_vllm.gate.facts import Facts
from sink_vllm.gate.refusal import Refusal, when

PLAIN_KV_DTYPES = ("auto", "bfloat16", "float16", "float32")
FP8_KV_DTYPES = ("fp8", "fp8_e4m3")
"""One scale for all keys of a layer or of a head: it cancels when a key is rotated."""
PLATFORMS = ("cpu", "cuda")

_KEPT = "--sink-host-gib"


def _drafted_from_tokens(facts: Facts) -> tuple[str | None, ...]:
    """Methods whose drafts have been tested; V1's ``ngram_gpu`` keeps a copy of the tokens."""
    return (None, "ngram", "ngram_gpu") if facts.v2_runner else (None, "ngram")


OF_SETTINGS: tuple[Refusal, ...] = (
    Refusal(
        "prompt embeddings",
        "prompts given as embeddings",
        lambda f: when(f.prompt_embeds, "--enable-prompt-embeds"),
        "a stream is kept as token ids when it has to be recomputed",
        "drop --enable-prompt-embeds",
    ),
    Refusal(
        "custom logits processors",
        "custom logits processors",
        lambda f: f.custom_logits_processors,
        "they are given a list of output tokens, from which evicted ones are missing",
        "drop --logits-processors, or uninstall the plugin",
    ),
    Refusal(
        "watermarking",
        "watermarks in texts",
        lambda f: f.watermarking,
        "a context is marked once per answer, and evicted tokens are missing from the search",
        "drop --watermark-config",
    ),
    Refusal(
        "routed experts",
        "returning routed experts",
        lambda f: when(f.routed_experts, "--enable-return-routed-experts"),
        "they are recorded per slot of the KV cache, and slots are used again",
        "drop --enable-return-routed-experts",
    ),
    Refusal(
        "platform",
        "platforms other than " + " and ".join(PLATFORMS),
        lambda f: when(f.platform not in PLATFORMS, f.platform),
        "its attention backends may store keys in another layout",
        "run on one of these, or use --kv-policy full",
    ),
    Refusal(
        "Rust front end",
        "the Rust front end",
        lambda f: when(f.rust_frontend, "VLLM_USE_RUST_FRONTEND=1"),
        "it knows nothing of prompts and outputs longer than the cache",
        "unset VLLM_USE_RUST_FRONTEND",
    ),
    Refusal(
        "no chunked prefill",
        "chunked prefill switched off",
        # vLLM switches it off for latent attention on CPUs, which then goes token by token.
        lambda f: when(
            not f.chunked_prefill and not (f.mla and f.platform == "cpu"),
            "--no-enable-chunked-prefill",
        ),
        "a prompt longer than the cache is computed in chunks, evicting between them",
        "drop --no-enable-chunked-prefill",
        final=True,
    ),
    Refusal(
        "packed latents",
        "rows of latent attention that are packed with scales",
        lambda f: when(f.kv_cache_dtype.endswith("_ds_mla"), f.kv_cache_dtype),
        "nothing takes the rotated part out of such a row, in bytes between others",
        "use --kv-cache-dtype fp8 or auto",
    ),
    Refusal(
        "quantised KV cache",
        "a quantised KV cache",
        lambda f: when(f.kv_cache_dtype not in PLAIN_KV_DTYPES + FP8_KV_DTYPES, f.kv_cache_dtype),
        "rotating a key would need the scale of its token",
        "use --kv-cache-dtype fp8 or auto",
    ),
    Refusal(
        "fp8 KV cache on old CPUs",
        "an fp8 KV cache on this CPU",
        lambda f: when(
            f.platform == "cpu" and f.kv_cache_dtype in FP8_KV_DTYPES and not f.cpu_has_fp8_kernels,
            f.kv_cache_dtype,
        ),
        "vLLM's kernels for it need AVX-512 or AMX",
        "use --kv-cache-dtype auto",
        final=True,
    ),
    Refusal(
        "draft models",
        "speculative decoding with draft models or layers (MTP, EAGLE)",
        lambda f: when(f.draft_kv_cache, f.speculative_method),
        "what drafts has a KV cache, whose keys would have to be moved with the model's",
        "use the method ngram, or drop --speculative-config",
    ),
    Refusal(
        "other speculation",
        "speculative decoding with anything but n-grams",
        lambda f: when(f.speculative_method not in _drafted_from_tokens(f), f.speculative_method),
        "what drafts has not been tested with evictions",
        "use the method ngram, or drop --speculative-config",
    ),
    Refusal(  # before the next row: vLLM offloads through a connector
        "KV offloading",
        "KV cache offloading",
        lambda f: when(bool(f.kv_offloading_gib), f"{f.kv_offloading_gib} GiB"),
        "pages that leave the engine would have to carry their rope offset",
        "drop --kv-offloading-size",
    ),
    Refusal(
        "KV connector",
        "KV connectors",
        lambda f: f.kv_connector,
        "pages that leave the engine would have to carry their rope offset",
        "drop --kv-transfer-config",
    ),
    Refusal(
        "prefill context parallelism",
        "prefill context parallelism",
        lambda f: when(f.prefill_context_parallel > 1, f.prefill_context_parallel),
        "the pages of one stream are spread over several workers",
        "use --prefill-context-parallel-size 1",
    ),
    Refusal(
        "decode context parallelism",
        "decode context parallelism",
        lambda f: when(f.decode_context_parallel > 1, f.decode_context_parallel),
        "the pages of one stream are spread over several workers",
        "use --decode-context-parallel-size 1",
    ),
    Refusal(
        "kept pages of recurrent layers",
        "pages kept outside the block pool, of models with recurrent layers",
        lambda f: when(bool(f.recurrent_layers), f.kept_pages),
        "the states of recurrent layers would be missing beside them",
        f"drop {_KEPT}",
    ),
    Refusal(
        "kept pages without prefix caching",
        "pages kept outside the block pool, without the prefix cache",
        lambda f: when(not f.prefix_caching, f.kept_pages),
        "pages are kept and found by its hashes",
        f"use --enable-prefix-caching, or drop {_KEPT}",
    ),
    Refusal(
        "kept pages with pipeline parallelism",
        "pages kept outside the block pool, with pipeline parallelism",
        lambda f: when(f.pipeline_parallel > 1, f.kept_pages),
        "the stages have pages of different sizes, which are counted as one",
        f"use --tensor-parallel-size, or drop {_KEPT}",
    ),
    Refusal(
        "kept pages with KV events",
        "pages kept outside the block pool, with KV events",
        lambda f: when(f.kv_events, f.kept_pages),
        "pages that come back into the block pool are not announced",
        f"drop --kv-events-config, or {_KEPT}",
    ),
    Refusal(
        "pages on disk with workers elsewhere",
        "pages on disk, with workers that are no processes of one machine",
        lambda f: when(f.kept_on_disk, f.executor),
        "engine core and workers share the host memory that files are read into",
        "use --distributed-executor-backend mp on one node, or drop --sink-disk",
    ),
    Refusal(
        "pipeline parallelism",
        "pipeline parallelism on vLLM's V2 model runner",
        lambda f: when(f.pipeline_parallel > 1 and f.v2_runner, f.pipeline_parallel),
        "its stages hand sampled tokens to each other, which has not been tested with evictions",
        "set VLLM_USE_V2_MODEL_RUNNER=0, or use --tensor-parallel-size",
    ),
    Refusal(
        "legacy Ray executor",
        "vLLM's older Ray executor",
        lambda f: when(f.legacy_ray_executor, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0"),
        "its compiled graphs of actors have not been tested with evictions",
        "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
    ),
    Refusal(
        "microbatching",
        "microbatching (dual batch overlap)",
        lambda f: when(f.microbatching, "--enable-dbo or --ubatch-size"),
        "a batch cut in two is given its positions before the rope offsets are added",
        "drop --enable-dbo and --ubatch-size",
    ),
    Refusal(
        "KV sharing fast prefill",
        "fast prefill with KV sharing",
        lambda f: when(f.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill"),
        "it skips tokens of layers whose keys would have to be moved",
        "drop --kv-sharing-fast-prefill",
    ),
)
