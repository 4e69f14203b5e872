"""The task that a hybrid and an attention-only model are trained for, and how they are trained."""

import argparse
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch

from benchmarks.recall import DISTANCES, gone, streams, verdict
from examples.train_model.recall import task, train
from examples.train_model.recall.attention import rotated, streaming_attention
from examples.train_model.recall.model import SCHEDULE, SMALL, make_config, make_model
from examples.train_model.recall.task import GROUP, Stream, make_stream
from sink_vllm.policy.schedule import Schedule

SINKS = SCHEDULE.sink_tokens
THETA = 10000.0


def groups_with(stream: Stream, key: int) -> list[int]:
    """Groups in which a key stands, wherever in the group."""
    return [position // GROUP for position, token in enumerate(stream.tokens) if token == key]


@pytest.mark.parametrize("groups", [8, 32, 64, 256])
def test_a_question_is_answered_by_its_fact_alone(groups: int) -> None:
    """Its key stands there and in the question, nowhere else, and behind both the same value."""
    for seed in range(50):
        stream = make_stream(Random(seed), groups)
        assert len(stream.tokens) == groups * GROUP
        assert len(stream.questions) >= min(task.MOST_FACTS, groups // 4) - 1
        for question in stream.questions:
            told, asked = question.fact // GROUP, question.answer // GROUP
            key = stream.tokens[question.fact - 1]
            assert groups_with(stream, key) == [told, asked]
            assert stream.tokens[told * GROUP] == task.TELL
            assert stream.tokens[asked * GROUP] == task.ASK
            assert stream.tokens[question.fact] == stream.tokens[question.answer]
            assert question.fact >= SINKS  # sink tokens are never evicted


def test_without_the_fact_the_answer_is_one_of_sixteen() -> None:
    """Answers are even, and the one before says nothing of the next."""
    answers: Counter[int] = Counter()
    as_before = asked = 0
    for seed in range(1000):
        stream = make_stream(Random(seed), 64)
        values = [stream.tokens[one.answer] for one in stream.questions]
        answers.update(values)
        as_before += sum(a == b for a, b in pairwise(values))
        asked += len(values) - 1

    expected = answers.total() * task.CHANCE
    assert len(answers) == task.VALUES
    assert max(abs(count - expected) for count in answers.values()) < 5 * expected**0.5
    assert as_before / asked == pytest.approx(task.CHANCE, abs=0.01)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_last_question_is_as_far_as_asked(distance: int) -> None:
    """And its fact is gone, or is not, in all streams of a distance."""
    asked = streams(distance, 40)
    assert {one.questions[-1].distance for one in asked} == {distance}
    assert {one.questions[-1].answer for one in asked} == {len(one.tokens) - 2 for one in asked}
    found = {gone(one.questions[-1].fact, one.questions[-1].answer) for one in asked}
    assert found == {distance > SCHEDULE.window}
    assert all(SCHEDULE.evicted(one.questions[-1].answer) for one in asked)
    assert len({one.tokens for one in asked}) == 40


def test_streams_are_the_same_for_the_same_seed() -> None:
    assert make_stream(Random(1), 64) == make_stream(Random(1), 64)
    assert make_stream(Random(1), 64) != make_stream(Random(2), 64)


def test_distances_that_do_not_fit_are_refused() -> None:
    for distance in (0, 6, 16):
        with pytest.raises(ValueError, match="no question"):
            make_stream(Random(0), 5, distance)


@pytest.mark.parametrize("schedule", [SCHEDULE, SMALL], ids=["whole", "small"])
@pytest.mark.parametrize("length", [12, 128, 192, 448])
def test_attention_in_training_sees_what_the_cache_will_hold(
    length: int, schedule: Schedule
) -> None:
    """Each query by itself, with keys rotated by their place in the cache."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, length, 32, dtype=torch.float32)
    frequencies = THETA ** (-torch.arange(0.0, 32, 2) / 32)
    angles = torch.outer(torch.arange(float(length)), frequencies)

    attend = streaming_attention(schedule, THETA)
    found, _ = attend(None, rotated(q, angles), rotated(k, angles), v, None, 0.2)

    for position in range(length):
        cached = schedule.cached_positions(position + 1)
        places = angles[: len(cached)]
        query = rotated(q[:, :, position], places[-1])
        scores = torch.einsum("bhd,bhnd->bhn", query, rotated(k[:, :, cached], places)) * 0.2
        expected = torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), v[:, :, cached])
        torch.testing.assert_close(found[:, position], expected, atol=1e-5, rtol=1e-4)


def test_both_models_have_as_many_weights() -> None:
    hybrid, attention = (
        make_model(make_config(layers)).num_parameters()
        for layers in (train.HYBRID, ["attention"] * 2)
    )
    assert abs(hybrid - attention) < 0.05 * attention


def options(folder: Path) -> argparse.Namespace:
    folder.mkdir()
    return argparse.Namespace(layers=train.HYBRID, out=folder, steps=6, lr=3e-3, seed=0)


def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "STEP_TOKENS", 256)
    stages = ((0.5, 128, SMALL), (0.5, 256, SCHEDULE))
    monkeypatch.setattr(train, "STAGES", stages)
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 2)
    whole = train.Run(options(tmp_path / "whole"))
    losses = list(whole.steps())
    assert len(set(losses)) == 6

    interrupted = options(tmp_path / "interrupted")
    steps = train.Run(interrupted).steps()
    for _ in range(5):
        next(steps)
    resumed = train.Run(interrupted)
    assert resumed.state.steps == 4
    assert list(resumed.steps()) == losses[4:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_recall_is_concluded_from_rows() -> None:
    def row(arm: str, right: bool, is_gone: bool, distance: int) -> dict[str, object]:
        known = {"evictions_since": 3 * is_gone, "gone": is_gone, "right": 40}
        return {"arm": arm, "distance": distance, "answer": 40 if right else 41, **known}

    near = [row("hybrid", True, False, 16)] * 50
    far = [row("hybrid", number % 2 == 0, True, 256) for number in range(50)]
    lost = [row("hybrid", number < 3, True, 256) for number in range(50)]

    found = verdict(near + far)
    assert found["holds"]
    assert found["recall"]["hybrid"]["256"]["recall"] == 0.5
    assert verdict(near + lost)["holds"] is False
    assert verdict(near)["holds"] is None, "no fact was gone"
