"""What a stream knows of evicted tokens: its recurrent states, and what attention never gives back.

Two models that were trained alike to answer questions about facts (`examples/models/recall`); the
pages of evicted facts are full of NaN, or belong to somebody else.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.recall import ask, interval, streams
from examples.train_model.recall.model import SCHEDULE
from tests.support.engine import Engine, Policy, check_all_free, running_engine
from tests.support.paths import ROOT

FOLDER = ROOT / "examples" / "models" / "recall"
NEAR, FAR = 32, 512
QUESTIONS = 48


@pytest.fixture(params=["hybrid", "attention", "hybrid-truncate"])
def arm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(arm: str) -> Iterator[Engine]:
    name, _, prompts = arm.partition("-")
    policy = Policy(
        SCHEDULE.sink_tokens, SCHEDULE.window, SCHEDULE.stride, prompt=prompts or "stream"
    )
    folder: Path = FOLDER / name
    with running_engine(folder, policy, block_size=64, skip_tokenizer_init=True) as engine:
        yield engine
        check_all_free(engine)


@pytest.mark.engine
def test_a_state_recalls_what_the_cache_has_dropped(arm: str, engine: Engine) -> None:
    """The hybrid does, with states that have seen the fact; the others guess."""
    right = {}
    for distance in (NEAR, FAR):
        asked = streams(distance, QUESTIONS)
        rows = ask(engine.llm, arm, distance, asked)
        assert {row["gone"] for row in rows} == {distance == FAR}
        right[distance] = sum(row["answer"] == row["right"] for row in rows)
    print(arm, right)

    assert engine.num_poisoned > 0
    low, high = interval(right[FAR], QUESTIONS)
    if arm == "hybrid":
        assert low > 0.5
    else:
        assert high < 0.3  # one in sixteen is right by chance
