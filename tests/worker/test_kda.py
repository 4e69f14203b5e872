"""Kimi delta attention, layer by layer: states that the policy copies go on as if never moved."""

import json
import os
import subprocess
import sys

from tests.conftest import ENVIRONMENT
from tests.support.paths import ROOT
from tests.support.runner_job import INTERPRETED_V2


def test_states_of_kimi_delta_attention_go_on_from_a_copy() -> None:
    """vLLM has no kernel of it for CPUs, so no model of it runs here, and the gate refuses them
    all. What the policy would do to its states is shown on vLLM's decode kernel, interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kda_states"],
        env={**os.environ, **ENVIRONMENT, **INTERPRETED_V2, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["worst"] < 1e-6, "vLLM's kernel is not the recurrence of the paper"
    assert found["went_on"], "a stream resumed from the copy has another state"
    assert found["untouched"], "the copy went on with the stream it was made of"
    assert found["convolution"], "inputs of the convolution were not copied"
    assert found["apart"] > 1e-3, "the state makes no difference: nothing was tested"
