"""Kimi delta attention, layer by layer: states that the policy copies go on as if never moved."""

from tests.support.runner_job import INTERPRETED_V2, json_of


def test_states_of_kimi_delta_attention_go_on_from_a_copy() -> None:
    """vLLM has no kernel of it for CPUs, so no model of it runs here, and the gate refuses them
    all. What the policy would do to its states is shown on vLLM's decode kernel, interpreted."""
    found = json_of("tests.support.kda_states", INTERPRETED_V2)

    assert found["worst"] < 1e-6, "vLLM's kernel is not the recurrence of the paper"
    assert found["went_on"], "a stream resumed from the copy has another state"
    assert found["untouched"], "the copy went on with the stream it was made of"
    assert found["convolution"], "inputs of the convolution were not copied"
    assert found["apart"] > 1e-3, "the state makes no difference: nothing was tested"
