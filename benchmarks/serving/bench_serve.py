"""vLLM's own load generator, `vllm bench serve`, for the loads it can express."""

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL
from benchmarks.serving.load import MODEL_NAME, LoadError
from examples.serving import Server


def command(
    server: Server, *, prompt: int, tokens: int, requests: int, rate: float, seed: int
) -> list[str]:
    """Random prompts of ``prompt`` tokens; ``rate`` requests per second, 0: all at once."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    return [
        *(vllm, "bench", "serve", "--base-url", server.url, "--model", MODEL_NAME),
        *("--tokenizer", str(MODEL), "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", str(prompt), "--random-output-len", str(tokens)),
        *("--num-prompts", str(requests), "--seed", str(seed), "--temperature", "0"),
        *("--request-rate", str(rate or "inf")),
    ]


async def run(words: list[str]) -> dict[str, Any]:
    """Run it; what it saves with `--save-detailed`. Its times are of the clock of `perf_counter`.

    Raises:
        LoadError: it failed, or one of its requests did.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *words,
            *("--save-result", "--save-detailed", "--result-dir", folder),
            *("--result-filename", "result.json", "--disable-tqdm"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode:
            tail = output.decode(errors="replace")[-2000:]
            raise LoadError(f"`vllm bench serve` ended with {process.returncode}: {tail}")
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    if found["failed"]:
        raise LoadError(
            f"{found['failed']} requests of `vllm bench serve` failed: {found['errors']}"
        )
    return found
