"""What ``--kv-policy sink`` refuses: one table for the gate, its messages, the docs and the test.

Anything that is not known to work is refused before a model is loaded; nothing falls back
silently. The first row that applies is reported, so the rows go from the model's nature to
single settings. Imports neither torch nor vLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sink_vllm.gate.facts import Facts

KNOWN_ROPE_TYPES = (
    "default",
    "dynamic",
    "linear",
    "llama3",
    "longrope",
    "ntk",
    "proportional",
    "yarn",
)
ROPE_TYPES_OF_LENGTH = ("dynamic", "longrope")
"""vLLM's own modules choose frequencies once; those of transformers by the positions of a step."""
RECURRENT_LAYERS = ("gated_delta_net", "mamba2", "short_conv")
"""Kinds whose states have been seen to run on across evictions, by vLLM's names of their shapes.
They know no positions, and go on from the state they find if any tokens are computed already."""
PLAIN_KV_DTYPES = ("auto", "bfloat16", "float16", "float32")
FP8_KV_DTYPES = ("fp8", "fp8_e4m3")
"""One scale for all keys of a layer or of a head: it cancels when a key is rotated."""
PLATFORMS = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row of the table."""

    name: str
    what: str
    found: Callable[[Facts], object]
    """The value that was found when the row applies; ``None``, ``False`` or ``0`` otherwise."""
    why: str
    way_out: str
    final: bool = False
    """Whether the method itself does not apply; otherwise sink_vllm cannot do it *yet*."""

    def reason(self, facts: Facts) -> str | None:
        """One sentence with option, value, rule and way out, when the row applies."""
        found = self.found(facts)
        if not found:
            return None
        verb, when = ("cannot work with", "") if self.final else ("does not work with", " yet")
        return f"--kv-policy sink {verb} {self.what}{when} ({found}): {self.why}; {self.way_out}."


_OTHER_MODEL = "serve this model with --kv-policy full"
_KEPT = "--sink-host-gib"
_OTHER_PLATFORM = f"{_OTHER_MODEL} on a GPU"


def _if(applies: bool, value: object) -> object:
    return value if applies else None


def _drafted_from_tokens(facts: Facts) -> tuple[str | None, ...]:
    """Methods whose drafts have been tested; V1's ``ngram_gpu`` keeps a copy of the tokens."""
    return (None, "ngram", "ngram_gpu") if facts.v2_runner else (None, "ngram")


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "encoder-decoder",
        "encoder-decoder models",
        lambda f: _if(f.encoder_decoder, f.architecture),
        "cross-attention reads the encoder's states, which must all stay",
        _OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "pooling",
        "pooling and embedding models",
        lambda f: _if(f.runner != "generate", f"--runner {f.runner}"),
        "they read the whole input at once and generate no stream",
        _OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "attention-free",
        "attention-free models",
        lambda f: _if(f.attention_free, f.architecture),
        "they have no KV cache to bound",
        _OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "bidirectional",
        "bidirectional attention",
        lambda f: _if(f.bidirectional, f.architecture),
        "a key is not final until tokens after it are known, so it cannot be cached for ever",
        _OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "diffusion",
        "diffusion language models",
        lambda f: _if(f.diffusion, f.architecture),
        "they rewrite tokens that are already in the cache",
        _OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "recurrent layers",
        "recurrent layers other than gated delta nets, Mamba2 and short convolutions",
        lambda f: [kind for kind in f.recurrent_layers if kind not in RECURRENT_LAYERS],
        "that their state runs on when tokens are evicted has not been tested: vLLM has no kernels "
        "for them on CPUs, or they count positions",
        _OTHER_MODEL,
    ),
    Refusal(
        "speculation with recurrent layers",
        "speculative decoding of models with recurrent layers",
        lambda f: _if(bool(f.recurrent_layers), f.speculative_method),
        "a stream would have a state for every draft, and an eviction would have to know which "
        "of them goes on",
        "drop --speculative-config",
    ),
    Refusal(
        "pipeline parallelism with recurrent layers",
        "pipeline parallelism of models with recurrent layers",
        lambda f: _if(bool(f.recurrent_layers) and f.pipeline_parallel > 1, f.pipeline_parallel),
        "a stage without attention takes no part in the start-up self-test, for which others wait",
        "use --tensor-parallel-size",
    ),
    Refusal(
        "replayed states",
        "recurrent states that are replayed from a buffer",
        lambda f: _if(f.replayed_states, "--use-replayssm"),
        "that the buffer outlives evictions has not been tested",
        "drop --use-replayssm",
    ),
    Refusal(
        "Qwen3.5 on CPUs with AVX512-BF16",
        "Qwen3.5 on CPUs with AVX512-BF16",
        lambda f: _if(
            f.convolves_part_of_projection and f.platform == "cpu" and f.cpu_has_bf16_convolutions,
            f.architecture,
        ),
        "vLLM itself fails there on a prompt, or the rest of one, of one token",
        _OTHER_PLATFORM,
    ),
    Refusal(
        "LFM2 on CPUs",
        "LFM2 with vLLM's rotary op on CPUs",
        lambda f: _if(
            f.heads_rotated_apart and f.platform == "cpu" and f.rotary_op, f.architecture
        ),
        "vLLM itself rotates only one head of a token there",
        'add --compilation-config \'{"custom_ops": ["-rotary_embedding"]}\'',
    ),
    Refusal(
        "sparse attention",
        "sparse attention",
        lambda f: _if(f.sparse_attention, f.architecture),
        "its index cache would have to be evicted with the keys",
        _OTHER_MODEL,
    ),
    Refusal(
        "MLA without RoPE scaling on CPUs",
        "multi-head latent attention without RoPE scaling on CPUs",
        lambda f: _if(f.mla and f.platform == "cpu" and "default" in f.rope_types, f.architecture),
        "vLLM itself rotates the wrong numbers of queries there, in an op of its CPU backend",
        _OTHER_PLATFORM,
    ),
    Refusal(
        "hidden latents",
        "keys of low rank where vLLM manages no latent attention",
        lambda f: f.hidden_latents,
        "only a part of such a key is rotated, and which one is not known",
        _OTHER_MODEL,
    ),
    Refusal(
        "static sinks",
        "keys that a model adds to the cache in front of all tokens",
        lambda f: f.static_sinks,
        "they would be in pages that no token belongs to",
        _OTHER_MODEL,
    ),
    Refusal(
        "prefix language models",
        "prompts that are read in both directions",
        lambda f: _if(f.prefix_lm, f.architecture),
        "a prompt that is longer than the cache cannot be seen as a whole",
        _OTHER_MODEL,
    ),
    Refusal(
        "chunked attention",
        "dual-chunk, reference-window or other attention to a part of the text",
        lambda f: f.chunked_attention,
        "what a token sees depends on where it is in the text, not only on what is how far back",
        _OTHER_MODEL,
    ),
    Refusal(
        "values of another size on CPUs",
        "values that are shorter than their keys on CPUs",
        lambda f: f.value_size if f.platform == "cpu" else None,
        "vLLM has no kernels for such attention there",
        "run on a GPU",
        final=True,
    ),
    Refusal(
        "learned absolute positions",
        "positions that are not rotary (RoPE), such as learned absolute embeddings",
        lambda f: _if(f.positions == "other", f.architecture),
        "a position that is part of a token's hidden state cannot be changed in its cached key",
        _OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "scaling after rotation",
        "keys that are scaled, number by number, after their rotation",
        lambda f: _if(f.scaled_after_rotation, f.architecture),
        "scores then depend on positions themselves, and not on their differences alone",
        _OTHER_MODEL,
    ),
    Refusal(
        "RoPE scaling",
        "RoPE scaling other than " + ", ".join(KNOWN_ROPE_TYPES),
        lambda f: [t for t in f.rope_types if t not in KNOWN_ROPE_TYPES],
        "rotations by two positions may not add up to one, and then no cached key can be moved",
        "use a checkpoint with one of these scalings, or --kv-policy full",
    ),
    Refusal(
        "RoPE of transformers that depends on the length",
        "RoPE scaling that depends on the length, in models that transformers implements",
        lambda f: _if(
            f.transformers_backend, [t for t in f.rope_types if t in ROPE_TYPES_OF_LENGTH]
        ),
        "transformers changes the frequencies when positions pass the original length",
        _OTHER_MODEL,
    ),
    Refusal(
        "position-scaled attention",
        "queries that are scaled by their absolute position, from an unknown one on",
        lambda f: f.position_scaled_attention,
        "positions in the cache are not those of the text, but where queries are not scaled yet",
        _OTHER_MODEL,
    ),
    Refusal(
        "M-RoPE",
        "positions in sections (M-RoPE) other than three of them in vLLM's own model classes",
        lambda f: f.foreign_mrope,
        "that the sections of a text are equal, so that one offset moves all, is not known there",
        _OTHER_MODEL,
    ),
    Refusal(  # after all that is so of its text, too: here something can be done
        "multimodal",
        "images, audio and other media in requests",
        lambda f: _if(f.multimodal, f.architecture),
        "an image could be cut in two by an eviction",
        "add --language-model-only to serve the model's text (and drop --enable-mm-embeds)",
    ),
    Refusal(
        "prompt embeddings",
        "prompts given as embeddings",
        lambda f: _if(f.prompt_embeds, "--enable-prompt-embeds"),
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
        lambda f: _if(f.routed_experts, "--enable-return-routed-experts"),
        "they are recorded per slot of the KV cache, and slots are used again",
        "drop --enable-return-routed-experts",
    ),
    Refusal(
        "platform",
        "platforms other than " + " and ".join(PLATFORMS),
        lambda f: _if(f.platform not in PLATFORMS, f.platform),
        "its attention backends may store keys in another layout",
        "run on one of these, or use --kv-policy full",
    ),
    Refusal(
        "Rust front end",
        "the Rust front end",
        lambda f: _if(f.rust_frontend, "VLLM_USE_RUST_FRONTEND=1"),
        "it knows nothing of prompts and outputs longer than the cache",
        "unset VLLM_USE_RUST_FRONTEND",
    ),
    Refusal(
        "no chunked prefill",
        "chunked prefill switched off",
        # vLLM switches it off for latent attention on CPUs, which then goes token by token.
        lambda f: _if(
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
        lambda f: _if(f.kv_cache_dtype.endswith("_ds_mla"), f.kv_cache_dtype),
        "nothing takes the rotated part out of such a row, in bytes between others",
        "use --kv-cache-dtype fp8 or auto",
    ),
    Refusal(
        "quantised KV cache",
        "a quantised KV cache",
        lambda f: _if(f.kv_cache_dtype not in PLAIN_KV_DTYPES + FP8_KV_DTYPES, f.kv_cache_dtype),
        "rotating a key would need the scale of its token",
        "use --kv-cache-dtype fp8 or auto",
    ),
    Refusal(
        "fp8 KV cache on old CPUs",
        "an fp8 KV cache on this CPU",
        lambda f: _if(
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
        lambda f: _if(f.draft_kv_cache, f.speculative_method),
        "what drafts has a KV cache, whose keys would have to be moved with the model's",
        "use the method ngram, or drop --speculative-config",
    ),
    Refusal(
        "other speculation",
        "speculative decoding with anything but n-grams",
        lambda f: _if(f.speculative_method not in _drafted_from_tokens(f), f.speculative_method),
        "what drafts has not been tested with evictions",
        "use the method ngram, or drop --speculative-config",
    ),
    Refusal(  # before the next row: vLLM offloads through a connector
        "KV offloading",
        "KV cache offloading",
        lambda f: _if(bool(f.kv_offloading_gib), f"{f.kv_offloading_gib} GiB"),
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
        lambda f: _if(f.prefill_context_parallel > 1, f.prefill_context_parallel),
        "the pages of one stream are spread over several workers",
        "use --prefill-context-parallel-size 1",
    ),
    Refusal(
        "decode context parallelism",
        "decode context parallelism",
        lambda f: _if(f.decode_context_parallel > 1, f.decode_context_parallel),
        "the pages of one stream are spread over several workers",
        "use --decode-context-parallel-size 1",
    ),
    Refusal(
        "kept pages of recurrent layers",
        "pages kept outside the block pool, of models with recurrent layers",
        lambda f: _if(bool(f.recurrent_layers), f.kept_pages),
        "the states of recurrent layers would be missing beside them",
        f"drop {_KEPT}",
    ),
    Refusal(
        "kept pages without prefix caching",
        "pages kept outside the block pool, without the prefix cache",
        lambda f: _if(not f.prefix_caching, f.kept_pages),
        "pages are kept and found by its hashes",
        f"use --enable-prefix-caching, or drop {_KEPT}",
    ),
    Refusal(
        "kept pages with pipeline parallelism",
        "pages kept outside the block pool, with pipeline parallelism",
        lambda f: _if(f.pipeline_parallel > 1, f.kept_pages),
        "the stages have pages of different sizes, which are counted as one",
        f"use --tensor-parallel-size, or drop {_KEPT}",
    ),
    Refusal(
        "kept pages with KV events",
        "pages kept outside the block pool, with KV events",
        lambda f: _if(f.kv_events, f.kept_pages),
        "pages that come back into the block pool are not announced",
        f"drop --kv-events-config, or {_KEPT}",
    ),
    Refusal(
        "pages on disk with workers elsewhere",
        "pages on disk, with workers that are no processes of one machine",
        lambda f: _if(f.kept_on_disk, f.executor),
        "engine core and workers share the host memory that files are read into",
        "use --distributed-executor-backend mp on one node, or drop --sink-disk",
    ),
    Refusal(
        "pipeline parallelism",
        "pipeline parallelism on vLLM's V2 model runner",
        lambda f: _if(f.pipeline_parallel > 1 and f.v2_runner, f.pipeline_parallel),
        "its stages hand sampled tokens to each other, which has not been tested with evictions",
        "set VLLM_USE_V2_MODEL_RUNNER=0, or use --tensor-parallel-size",
    ),
    Refusal(
        "legacy Ray executor",
        "vLLM's older Ray executor",
        lambda f: _if(f.legacy_ray_executor, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0"),
        "its compiled graphs of actors have not been tested with evictions",
        "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
    ),
    Refusal(
        "microbatching",
        "microbatching (dual batch overlap)",
        lambda f: _if(f.microbatching, "--enable-dbo or --ubatch-size"),
        "a batch cut in two is given its positions before the rope offsets are added",
        "drop --enable-dbo and --ubatch-size",
    ),
    Refusal(
        "KV sharing fast prefill",
        "fast prefill with KV sharing",
        lambda f: _if(f.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill"),
        "it skips tokens of layers whose keys would have to be moved",
        "drop --kv-sharing-fast-prefill",
    ),
)
