"""Draft tokens on the real scheduler, without a model: what vLLM counts and what a stream has.

Random clients do the rest (``test_episodes.py``); through the engine:
``tests/end_to_end/test_ngrams.py``.
"""

import pytest

from sink_vllm.policy.schedule import Schedule
from tests.support.judge import random_tokens
from tests.support.liveness import Watch
from tests.support.scheduler_only import Settings

pytestmark = pytest.mark.engine

SETTINGS = Settings(
    schedule=Schedule(sink_tokens=4, window=4, stride=4), block_size=4, spare_pages=8, drafts=7
)  # C = 12


@pytest.mark.parametrize("wanted", range(1, 14))
def test_a_turn_that_ends_among_accepted_drafts(wanted: int) -> None:
    """What was accepted behind the end is not computed for the next turn of the session."""
    watch = Watch(SETTINGS)
    talk = watch.send("talk", random_tokens(5, 1), wanted, session=True)
    watch.run(lambda: watch.all_served)
    (request,) = watch.core.scheduler.requests.values()
    assert request.num_computed_tokens == request.num_tokens - 1

    watch.extend(talk, random_tokens(6, 2), 9)
    watch.finish()

    assert watch.core.model.accepted > 0


@pytest.mark.parametrize("length", [5, 9])
def test_padding_in_place_of_drafts_is_left_out(length: int) -> None:
    """A prompt whose last token alone is computed: vLLM pads it, whatever fits."""
    watch = Watch(SETTINGS)
    prompt = random_tokens(length, 1)
    watch.send("first", prompt, 2)
    watch.run(lambda: watch.all_served)
    drafts = []
    observe = watch.core.model.observe

    def see(planned: object) -> None:
        drafts.extend(planned.scheduled_spec_decode_tokens.values())  # type: ignore[attr-defined]
        observe(planned)  # type: ignore[arg-type]

    watch.core.model.observe = see
    again = watch.send("again", prompt, 10)
    watch.step()

    assert not drafts
    watch.finish()
    assert again.cached == length - 1
    assert max(map(len, drafts)) > 0  # as many as before, from the next step on
