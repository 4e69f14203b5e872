"""Streams on a model runner of vLLM's that is chosen by environment variables."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ENVIRONMENT
from tests.support.drafts import Drafts
from tests.support.engine import Generated, Policy
from tests.support.paths import ROOT
from tests.support.positions_seen import PositionsSeen

INTERPRETED_V2 = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # Some model classes compile their norms; Inductor would ask the stand-in for more.
    "TORCHDYNAMO_DISABLE": "1",
}
"""The V2 runner without a GPU; see ``tests/support/runner_engine.py``."""


@dataclass(frozen=True, slots=True)
class Batch:
    prompts: list[list[int]]
    params: list[dict[str, Any]]
    flat: bool = False
    """From this batch on all tokens are equally likely: noise decides."""
    stored: bool = False
    """Each prompt is appended to the stored stream of its place, which keeps what is generated."""
    forget: bool = False
    """The prefix cache is emptied before."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the engine says of a turn of a stored stream."""

    resumed_from: str | None
    base: int
    """Tokens evicted before the cache was last built anew."""


@dataclass(frozen=True, slots=True)
class Ran:
    scheduler: str
    runner: str
    batches: list[list[Generated]]
    num_poisoned: int
    model: str
    """Class of the model code."""
    still: list[bool]
    """Layer by layer: its keys do not depend on the position."""
    positions: PositionsSeen
    self_test_graphs: list[bool]
    """Steps before the first request (of V2's runner): they may replay a graph of decode steps."""
    drafts: list[Drafts]
    """Of each batch."""
    told: list[list[Told]]
    """Of each batch; nothing of those whose streams are not stored."""


def run_job(
    model: Path,
    batches: Sequence[Batch],
    policy: Policy | None,
    environment: Mapping[str, str],
    *,
    watch: bool = True,
    torch_convolutions: bool = False,
    **engine: Any,
) -> Ran:
    """Run batches one after the other on one engine, in a process of its own.

    Args:
        policy: ``None`` for none.
        environment: variables of the process, which decide the runner.
        watch: note the positions of all steps; the model must have one rotary table.
        torch_convolutions: of gated delta nets, whatever the processor has (``Family``).
        engine: for ``vllm.LLM``.
    """
    job = {
        "model": str(model),
        "policy": policy and {"S": policy.S, "W": policy.W, "g": policy.g},
        "engine": {"max_num_batched_tokens": 100, **engine},
        "batches": [dataclasses.asdict(batch) for batch in batches],
        "watch": watch,
        "torch_convolutions": torch_convolutions,
    }
    result = json_of("tests.support.runner_engine", environment, json.dumps(job))
    result["batches"] = [[Generated(**one) for one in batch] for batch in result["batches"]]
    seen, drafts = PositionsSeen(**result["positions"]), [Drafts(*one) for one in result["drafts"]]
    told = [[Told(*one) for one in batch] for batch in result["told"]]
    return Ran(**result | {"positions": seen, "drafts": drafts, "told": told})


def json_of(module: str, environment: Mapping[str, str], text: str = "") -> Any:
    """The last line that ``module`` prints in a process of its own, which reads ``text``."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=text,
        env=os.environ | ENVIRONMENT | dict(environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])
