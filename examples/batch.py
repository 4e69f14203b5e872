"""A batch file whose prompts may be longer than any context: `vllm run-batch --kv-policy sink`.

    python -m examples.batch MODEL prompts.txt answers.jsonl [-- any further vllm run-batch options]

Every line of `prompts.txt` becomes a request of OpenAI's batch format, whose `vllm_xargs` choose
options of the policy; `answers.jsonl` has one answer for each, in any order.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def requests(model: str, prompts: Iterable[str], **body: Any) -> Iterator[str]:
    """Lines of a batch file."""
    for number, prompt in enumerate(prompts):
        request = {
            "custom_id": f"{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": prompt}], **body},
        }
        yield json.dumps(request)


def run(model: str, batch: Path, answers: Path, options: Sequence[str] = ()) -> None:
    """What `vllm run-batch` makes of a batch file."""
    vllm = Path(sys.executable).with_name("vllm")
    files = ["-i", str(batch), "-o", str(answers)]
    command = [str(vllm), "run-batch", *files, "--model", model, "--kv-policy", "sink", *options]
    subprocess.run(command, check=True)


def evicted(answers: Path) -> dict[str, int]:
    """Evicted tokens of each answer, by its request's ``custom_id``."""
    found = {}
    for line in answers.read_text().splitlines():
        answer = json.loads(line)
        told = answer["response"]["body"].get("kv_transfer_params") or {}
        found[answer["custom_id"]] = told.get("streaming_llm", {}).get("evicted_tokens", 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("options", nargs="*", help="of vllm run-batch, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder) / "batch.jsonl"
        prompts = given.prompts.read_text().splitlines()
        batch.write_text("\n".join(requests(given.model, prompts, max_tokens=256)) + "\n")
        run(given.model, batch, given.answers, given.options)
    for number, tokens in sorted(evicted(given.answers).items()):
        print(f"request {number}: {tokens:,} tokens evicted")


if __name__ == "__main__":
    main()
