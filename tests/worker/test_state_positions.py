"""The object around a model state of the V2 runner is that state in all but the positions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sink_vllm.worker.runner_v2 import StateWithPositions


class State:
    """What a model brings along may have any attributes."""

    supports_mm_inputs = False

    def __init__(self) -> None:
        self._mamba_spec: Any = "spec"

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {"positions": input_batch.positions, "more": req_states}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {"requests": num_reqs}


def around(state: State) -> Any:
    buffer = torch.arange(100, 108)
    return StateWithPositions(
        state, lambda batch: buffer[: len(batch.positions)], lambda num_tokens: buffer[:num_tokens]
    )


def test_positions_are_the_model_s_own_and_all_else_stays() -> None:
    batch = SimpleNamespace(positions=torch.arange(3))

    inputs = around(State()).prepare_inputs(batch, "states")
    dummy = around(State()).prepare_dummy_inputs(2, num_tokens=4)

    assert inputs["positions"].tolist() == [100, 101, 102]
    assert inputs["more"] == "states"
    assert dummy["positions"].tolist() == [100, 101, 102, 103]
    assert dummy["requests"] == 2


def test_attributes_are_those_of_the_state() -> None:
    """vLLM clears some from outside, after profiling."""
    state = State()
    own = around(state)

    own._mamba_spec = None
    own.added = 1

    assert (state._mamba_spec, vars(state)["added"]) == (None, 1)
    assert own.supports_mm_inputs is False
    assert not hasattr(own, "encoder_runner")
    del own.added
    with pytest.raises(AttributeError):
        _ = own.added
