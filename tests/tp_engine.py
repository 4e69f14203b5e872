"""Runs a job on two tensor-parallel workers: ``python -m tests.tp_engine < job.json``.

vLLM's multiprocess executor spawns its workers, so the engine must not be started by an imported
test module. The last line of the output is the result, as JSON.
"""

import json
import sys

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",  # one core per worker
}


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    job = json.load(sys.stdin)
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_seqs=8,
        tensor_parallel_size=2,
        additional_config=job["policy"],
    )
    params = SamplingParams(temperature=0, max_tokens=job["num_tokens"], ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
    outputs = llm.generate(prompts, params)
    streams = [
        {"tokens": list(o.outputs[0].token_ids), "report": o.kv_transfer_params} for o in outputs
    ]
    print(json.dumps(streams))


if __name__ == "__main__":
    main()
