"""Runs a job on several workers: ``python -m tests.support.tp_engine result.json < job.json``.

vLLM's executors start processes of their own, so the engine must not be started by an imported
test module. Workers in Ray actors write to the same output, so the result goes to a file.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",  # one core per worker
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the workers for their process ids
}


def process_id(_worker: Any) -> int:
    """Runs in every worker."""
    return os.getpid()


def seconds_to_death(llm: Any, prompt: Any, params: Any) -> dict[str, Any]:
    """Kill the last worker and say what the next request gets, and after how long."""
    pids = llm.collective_rpc(process_id)
    os.kill(pids[-1], signal.SIGKILL)
    killed = time.monotonic()
    try:
        llm.generate([prompt], params)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the result)
        return {"error": type(error).__name__, "seconds": time.monotonic() - killed}
    return {"error": None, "seconds": time.monotonic() - killed}


def talk(llm: Any, talks: list[list[list[int]]], params: Any) -> list[list[dict[str, Any]]]:
    """Conversations that are sent again with every turn, one after the other in every round.

    Args:
        talks: what each appends, turn by turn.

    Returns:
        Of each its turns: the whole prompt, the answer, and tokens that were found.
    """
    from vllm.inputs import TokensPrompt

    made: list[list[dict[str, Any]]] = [[] for _ in talks]
    for turn in range(len(talks[0])):
        for one, turns in zip(talks, made, strict=True):
            before = [*turns[-1]["prompt"], *turns[-1]["tokens"]] if turns else []
            prompt = [*before, *one[turn]]
            (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], params)
            tokens = list(output.outputs[0].token_ids)
            found = output.num_cached_tokens
            turns.append({"prompt": prompt, "tokens": tokens, "cached": found})
    return made


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
        additional_config=job["policy"],
        **job["engine"],
    )
    params = SamplingParams(temperature=0, max_tokens=job["num_tokens"], ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
    outputs = llm.generate(prompts, params) if prompts else []
    result: dict[str, Any] = {
        "streams": [
            {"tokens": list(o.outputs[0].token_ids), "report": o.kv_transfer_params}
            for o in outputs
        ]
    }
    if job.get("talks"):
        result["talks"] = talk(llm, job["talks"], params)
    if job.get("kill_a_worker"):
        result["death"] = seconds_to_death(llm, prompts[0], params)
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
