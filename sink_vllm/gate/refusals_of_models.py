"""What ``--kv-policy sink`` refuses because of the model: see ``refusals``."""

from sink_vllm.gate.refusal import OTHER_MODEL, Refusal, when

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

_OTHER_PLATFORM = f"{OTHER_MODEL} on a GPU"

OF_MODELS: tuple[Refusal, ...] = (
    Refusal(
        "encoder-decoder",
        "encoder-decoder models",
        lambda f: when(f.encoder_decoder, f.architecture),
        "cross-attention reads the encoder's states, which must all stay",
        OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "pooling",
        "pooling and embedding models",
        lambda f: when(f.runner != "generate", f"--runner {f.runner}"),
        "they read the whole input at once and generate no stream",
        OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "attention-free",
        "attention-free models",
        lambda f: when(f.attention_free, f.architecture),
        "they have no KV cache to bound",
        OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "bidirectional",
        "bidirectional attention",
        lambda f: when(f.bidirectional, f.architecture),
        "a key is not final until tokens after it are known, so it cannot be cached for ever",
        OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "diffusion",
        "diffusion language models",
        lambda f: when(f.diffusion, f.architecture),
        "they rewrite tokens that are already in the cache",
        OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "recurrent layers",
        "recurrent layers other than gated delta nets, Mamba2 and short convolutions",
        lambda f: [kind for kind in f.recurrent_layers if kind not in RECURRENT_LAYERS],
        "that their state runs on when tokens are evicted has not been tested: vLLM has no kernels "
        "for them on CPUs, or they count positions",
        OTHER_MODEL,
    ),
    Refusal(
        "speculation with recurrent layers",
        "speculative decoding of models with recurrent layers",
        lambda f: when(bool(f.recurrent_layers), f.speculative_method),
        "a stream would have a state for every draft, and an eviction would have to know which "
        "of them goes on",
        "drop --speculative-config",
    ),
    Refusal(
        "pipeline parallelism with recurrent layers",
        "pipeline parallelism of models with recurrent layers",
        lambda f: when(bool(f.recurrent_layers) and f.pipeline_parallel > 1, f.pipeline_parallel),
        "a stage without attention takes no part in the start-up self-test, for which others wait",
        "use --tensor-parallel-size",
    ),
    Refusal(
        "replayed states",
        "recurrent states that are replayed from a buffer",
        lambda f: when(f.replayed_states, "--use-replayssm"),
        "that the buffer outlives evictions has not been tested",
        "drop --use-replayssm",
    ),
    Refusal(
        "Qwen3.5 on CPUs with AVX512-BF16",
        "Qwen3.5 on CPUs with AVX512-BF16",
        lambda f: when(
            f.convolves_part_of_projection and f.platform == "cpu" and f.cpu_has_bf16_convolutions,
            f.architecture,
        ),
        "vLLM itself fails there on a prompt, or the rest of one, of one token",
        _OTHER_PLATFORM,
    ),
    Refusal(
        "LFM2 on CPUs",
        "LFM2 with vLLM's rotary op on CPUs",
        lambda f: when(
            f.heads_rotated_apart and f.platform == "cpu" and f.rotary_op, f.architecture
        ),
        "vLLM itself rotates only one head of a token there",
        'add --compilation-config \'{"custom_ops": ["-rotary_embedding"]}\'',
    ),
    Refusal(
        "sparse attention",
        "sparse attention",
        lambda f: when(f.sparse_attention, f.architecture),
        "its index cache would have to be evicted with the keys",
        OTHER_MODEL,
    ),
    Refusal(
        "MLA without RoPE scaling on CPUs",
        "multi-head latent attention without RoPE scaling on CPUs",
        lambda f: when(f.mla and f.platform == "cpu" and "default" in f.rope_types, f.architecture),
        "vLLM itself rotates the wrong numbers of queries there, in an op of its CPU backend",
        _OTHER_PLATFORM,
    ),
    Refusal(
        "hidden latents",
        "keys of low rank where vLLM manages no latent attention",
        lambda f: f.hidden_latents,
        "only a part of such a key is rotated, and which one is not known",
        OTHER_MODEL,
    ),
    Refusal(
        "static sinks",
        "keys that a model adds to the cache in front of all tokens",
        lambda f: f.static_sinks,
        "they would be in pages that no token belongs to",
        OTHER_MODEL,
    ),
    Refusal(
        "prefix language models",
        "prompts that are read in both directions",
        lambda f: when(f.prefix_lm, f.architecture),
        "a prompt that is longer than the cache cannot be seen as a whole",
        OTHER_MODEL,
    ),
    Refusal(
        "chunked attention",
        "dual-chunk, reference-window or other attention to a part of the text",
        lambda f: f.chunked_attention,
        "what a token sees depends on where it is in the text, not only on what is how far back",
        OTHER_MODEL,
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
        lambda f: when(f.positions == "other", f.architecture),
        "a position that is part of a token's hidden state cannot be changed in its cached key",
        OTHER_MODEL,
        final=True,
    ),
    Refusal(
        "scaling after rotation",
        "keys that are scaled, number by number, after their rotation",
        lambda f: when(f.scaled_after_rotation, f.architecture),
        "scores then depend on positions themselves, and not on their differences alone",
        OTHER_MODEL,
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
        lambda f: when(
            f.transformers_backend, [t for t in f.rope_types if t in ROPE_TYPES_OF_LENGTH]
        ),
        "transformers changes the frequencies when positions pass the original length",
        OTHER_MODEL,
    ),
    Refusal(
        "position-scaled attention",
        "queries that are scaled by their absolute position, from an unknown one on",
        lambda f: f.position_scaled_attention,
        "positions in the cache are not those of the text, but where queries are not scaled yet",
        OTHER_MODEL,
    ),
    Refusal(
        "M-RoPE",
        "positions in sections (M-RoPE) other than three of them in vLLM's own model classes",
        lambda f: f.foreign_mrope,
        "that the sections of a text are equal, so that one offset moves all, is not known there",
        OTHER_MODEL,
    ),
    Refusal(  # after all that is so of its text, too: here something can be done
        "multimodal",
        "images, audio and other media in requests",
        lambda f: when(f.multimodal, f.architecture),
        "an image could be cut in two by an eviction",
        "add --language-model-only to serve the model's text (and drop --enable-mm-embeds)",
    ),
)
