"""The policy without a server: `LLM(...)` and a prompt longer than the model's context.

    python -m examples.offline [MODEL]

`additional_config` is what the `--kv-policy sink` flags fill; its keys are the flags' names.
"""

import argparse
import textwrap
from pathlib import Path

from vllm import LLM, SamplingParams

MODEL = Path(__file__).parent / "models" / "pystream-2.5m"


def main() -> None:
    """Generate four times the trained context after a prompt that is longer than it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(MODEL))
    options = parser.parse_args()

    llm = LLM(
        options.model,
        enforce_eager=True,  # starts faster
        kv_cache_memory_bytes=256 << 20,  # plenty: a stream never needs more than its capacity
        additional_config={"kv_policy": "sink", "sink_tokens": 4},
    )
    trained = llm.llm_engine.model_config.hf_text_config.max_position_embeddings
    sampling = SamplingParams(max_tokens=4 * trained, temperature=0.8, ignore_eos=True)
    [result] = llm.generate([Path(textwrap.__file__).read_text()[: 8 * trained]], sampling)

    [output] = result.outputs
    print(output.text[-600:])
    print(
        f"\nprompt {len(result.prompt_token_ids or [])} tokens, output {len(output.token_ids)}, "
        f"trained context {trained}; {result.kv_transfer_params}"
    )


if __name__ == "__main__":  # vLLM starts its engine in a new process, which imports this file
    main()
