"""vLLM's own load generator, `vllm bench serve`, for the loads it can express.

It is started before the load it is to be measured beside: on a machine whose cores are all taken,
the imports alone take minutes (``python -m benchmarks.serving.bench_serve`` is that process).
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, ROOT
from benchmarks.serving.load import MODEL_NAME, LoadError
from examples.serving import Server

READY = b"the generator is ready\n"


def arguments(
    server: Server, *, prompt: int, tokens: int, requests: int, rate: float, seed: int
) -> list[str]:
    """Random prompts of ``prompt`` tokens; ``rate`` requests per second, 0: all at once."""
    return [
        *("--base-url", server.url, "--model", MODEL_NAME),
        *("--tokenizer", str(MODEL), "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", str(prompt), "--random-output-len", str(tokens)),
        *("--num-prompts", str(requests), "--seed", str(seed), "--temperature", "0"),
        *("--request-rate", str(rate or "inf")),
    ]


class Generator:
    """A process that is ready to generate its load, once."""

    def __init__(self, process: asyncio.subprocess.Process, result: Path) -> None:
        self._process = process
        self._result = result

    async def run(self) -> dict[str, Any]:
        """What it saves with `--save-detailed`; times are of the clock of `perf_counter`.

        Raises:
            LoadError: it failed, or one of its requests did.
        """
        output, _ = await self._process.communicate(b"go\n")
        if self._process.returncode:
            raise LoadError(_failure(self._process.returncode, output))
        found: dict[str, Any] = json.loads(self._result.read_text())
        if found["failed"]:
            errors = dict.fromkeys(error.strip() for error in found["errors"] if error)
            raise LoadError(
                f"{found['failed']} of {len(found['errors'])} requests of `vllm bench serve` "
                f"failed: {' | '.join(errors)[-2000:]}"
            )
        return found


@asynccontextmanager
async def started(words: list[str]) -> AsyncIterator[Generator]:
    """A generator that has done everything but begin.

    Raises:
        LoadError: it ended before it was ready.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.serving.bench_serve", *words),
            *("--save-result", "--save-detailed", "--result-dir", folder),
            *("--result-filename", "result.json", "--disable-tqdm"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=ROOT,
        )
        assert process.stdout is not None
        try:
            said = b""
            while not said.endswith(READY):
                line = await process.stdout.readline()
                if not line:
                    raise LoadError(_failure(await process.wait(), said))
                said += line
            yield Generator(process, Path(folder) / "result.json")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def _failure(code: int, output: bytes) -> str:
    tail = output.decode(errors="replace")[-2000:]
    return f"`vllm bench serve` ended with {code}: {tail}"


async def run(words: list[str]) -> dict[str, Any]:
    """Start it and run it; see :meth:`Generator.run`."""
    async with started(words) as generator:
        return await generator.run()


def main() -> None:
    """`vllm bench serve`, after a word on standard input."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    options = parser.parse_args()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    sys.stdin.readline()
    bench_serve(options)


if __name__ == "__main__":
    main()
