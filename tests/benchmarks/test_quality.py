"""The quality benchmark itself: buckets, resume, and that it measures what stock vLLM measures."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import work
from benchmarks.quality.arms import Arm, host, shared, sink
from benchmarks.quality.buckets import Buckets, Interval, Series, ratio
from benchmarks.quality.isolate import WorkError, isolated
from benchmarks.quality.short import last_line
from benchmarks.quality.store import Store, StoreError, units
from benchmarks.quality.tables import BEGIN, END, into
from benchmarks.quality.texts import TextError, Texts
from benchmarks.quality.work import Sampling, run_streams, window_before
from tests.conftest import ModelFactory
from tests.support.engine import greedy_params, running_engine
from tests.support.judge import TOLERANCE, random_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_models import TinyLlama

SHAPE = TinyLlama(layers=2)
SMALL = sink(4, 128)  # S = 4, W = 92, g = 32


def rows_of(losses: Sequence[float], every: int, size: int, chunk: int) -> list[dict[str, Any]]:
    """Rows of losses that arrive ``chunk`` at a time."""
    buckets = Buckets(every, size)
    rows = [row for i in range(0, len(losses), chunk) for row in buckets.add(losses[i : i + chunk])]
    return [*rows, *buckets.rest()]


@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
@pytest.mark.parametrize(("every", "size"), [(1, 10), (5, 10), (3, 10), (25, 10), (7, 64)])
def test_buckets_hold_every_loss_once(chunk: int, every: int, size: int) -> None:
    """However the losses arrive: position ``p`` has the loss ``p``, from position 1 on."""
    losses = [float(p) for p in range(1, 204)]

    rows = rows_of(losses, every, size, chunk)
    series = Series.of(rows, every)

    assert sum(row["tokens"] for row in rows) == len(losses)
    assert sum(row["sum"] for row in rows) == sum(losses)
    assert [row["start"] for row in rows] == [1, *range(size, 204, size)]
    assert series.at == {p: float(p) for p in range(1, 204) if p % every == 0}


def test_perplexity_is_of_whole_buckets() -> None:
    rows = rows_of([math.log(2)] * 99 + [math.log(8)] * 100, every=50, size=100, chunk=50)
    series = Series.of(rows, 50)

    assert series.perplexity(end=100) == pytest.approx(2, rel=1e-4)
    assert series.by_bucket(100) == pytest.approx({0: 2, 100: 8}, rel=1e-4)
    assert series.perplexity() == pytest.approx(2 * 4 ** (100 / 199), rel=1e-4)
    assert math.isnan(series.perplexity(begin=200))


def test_ratio_uses_shared_positions_only() -> None:
    one = Series(at={10: 1.0, 20: 2.0, 30: 9.0})
    other = Series(at={10: 0.5, 20: 1.5, 40: 0.0})

    assert ratio(one, other) == pytest.approx(math.exp(0.5))
    assert ratio(one, other, begin=20) == pytest.approx(math.exp(0.5))
    assert math.isnan(ratio(one, other, begin=25))


def test_interval_is_students() -> None:
    """Three values: 4.303 standard errors."""
    interval = Interval.of([1.0, 2.0, 3.0])

    assert interval.mean == 2.0
    assert interval.half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(Interval.of([1.0]).half)


def test_recomputed_window_has_the_streams_length() -> None:
    """As many tokens as the stream has cached at the position, BOS counted."""
    text = list(range(1000))
    for position in (129, 130, 160, 161, 999):
        bare = window_before(text, position, SMALL.schedule, None)
        with_bos = window_before(text, position, SMALL.schedule, 0)

        assert len(bare) == len(with_bos) == SMALL.schedule.cached(position)
        assert bare[-1] == with_bos[-1] == position - 1
        assert with_bos[0] == 0
        assert bare[1:] == with_bos[1:]


def fake_engine(calls: list[list[str]], fail_on: str = "") -> Any:
    """Stands for the process with the engine; a text's losses are its tokens."""

    def isolated(_work: Any, _arm: Arm, _model: str, texts: Any, *_rest: Any) -> Iterator[Any]:
        calls.append(list(texts))
        for name, ids in texts.items():
            if ids[0] == 666:
                raise WorkError(fail_on)
            yield {name: [float(token) for token in ids[1:]]}

    return isolated


def test_a_run_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished texts are not computed again; unfinished ones leave no rows behind."""
    calls: list[list[str]] = []
    monkeypatch.setattr(work, "isolated", fake_engine(calls))
    settings = {"model": "m", "dtype": "float32"}
    texts = {"a": [0, 1, 2], "b": [666, 1, 2], "c": [0, 3]}

    def run(texts: dict[str, list[int]]) -> None:
        store = Store(tmp_path / "run", settings)
        run_streams(store, "m", {"sink": SMALL}, texts, Sampling(1, 10), streams=1)
        store.pack()

    with pytest.raises(WorkError):
        run(texts)
    run(texts | {"b": [0, 5, 6]})
    run(texts)

    assert len(calls) == 4, "a and the failing b, then b and c, then nothing"
    found = {facts["text"]: series.at for facts, series in units(tmp_path / "run")}
    assert found == {"a": {1: 1.0, 2: 2.0}, "b": {1: 5.0, 2: 6.0}, "c": {1: 3.0}}
    assert len(json.loads((tmp_path / "run" / "meta.json").read_text())) == 3


def test_a_folder_belongs_to_one_model(tmp_path: Path) -> None:
    Store(tmp_path / "run", {"model": "one", "dtype": "float32"})

    with pytest.raises(StoreError, match="give another --name"):
        Store(tmp_path / "run", {"model": "two", "dtype": "float32"})


def test_texts_are_what_they_say(tmp_path: Path) -> None:
    """Pieces do not overlap, the repeated text repeats, unknown and short texts are refused."""
    (tmp_path / "book.txt").write_text("call me Ishmael " * 100)
    texts = Texts("examples/models/pystream-2.5m", tmp_path)

    halves = [texts.get(f"book:{part}/2", 100) for part in (0, 1)]
    whole = texts.get("book", texts.length("book"))
    assert [half[0] for half in halves] == [texts.bos] * 2
    assert whole[1 + (len(whole) - 1) // 2 :][:99] == halves[1][1:]
    repeated = texts.get("repeated", 200_001)
    assert repeated[1:100_001] == repeated[100_001:]
    with pytest.raises(TextError, match="no text 'poem'"):
        texts.get("poem", 10)
    with pytest.raises(TextError, match="are needed"):
        texts.get("book", 100_000)


def losses_of(
    arm: Arm, model: Path, texts: dict[str, list[int]], how: str
) -> dict[str, list[float]]:
    """What the real engine gives, from a process of its own."""
    found: dict[str, list[float]] = {name: [] for name in texts}
    for losses in isolated(work._stream, arm, str(model), texts, how):
        for name, values in losses.items():
            found[name] += values
    return found


SHORT = {f"short{i}": random_tokens(count, i) for i, count in enumerate((2, 33, 120))}
LONG = {f"long{i}": random_tokens(count, i) for i, count in enumerate((400, 391))}


@pytest.fixture(scope="module")
def model(tiny_llama: ModelFactory) -> Path:
    return tiny_llama(SHAPE)


@pytest.fixture(scope="module")
def losses(model: Path) -> dict[str, dict[str, list[float]]]:
    """Of texts shorter and longer than the capacity, as prompt and as decode; one engine each."""
    return {how: losses_of(SMALL, model, SHORT | LONG, how) for how in ("prompt", "decode")}


def close(one: Sequence[float], other: Sequence[float]) -> None:
    assert len(one) == len(other)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=TOLERANCE, rtol=0)


@pytest.mark.engine
def test_short_texts_equal_the_prompt_logprobs_of_stock_vllm(
    model: Path, losses: dict[str, dict[str, list[float]]]
) -> None:
    """Stock vLLM's own numbers; the recorder's in the stock arm, and as prompt and as decode."""
    with running_engine(model, None) as engine:
        outputs = engine.generate(list(SHORT.values()), greedy_params(1, prompt_logprobs=0))
    expected = {
        name: [
            -step[token].logprob for step, token in zip(steps[1:], text[1:], strict=True) if step
        ]
        for (name, text), output in zip(SHORT.items(), outputs, strict=True)
        if (steps := output.prompt_logprobs)
    }

    stock = losses_of(Arm(name="full", kind="full", limit=128), model, SHORT, "prompt")
    for found in (stock, losses["prompt"], losses["decode"]):
        for name in SHORT:
            close(found[name], expected[name])


@pytest.mark.engine
def test_long_texts_equal_the_oracle(
    model: Path, losses: dict[str, dict[str, list[float]]]
) -> None:
    """Through evictions and chunks: token-by-token StreamingLLM, forced along the text."""
    S, W, g = SMALL.sinks, SMALL.window, SMALL.stride
    expected = {
        name: Oracle(model).run([text[:1]], S, W, g, len(text) - 1, forced=[text[1:]])[0].logprobs
        for name, text in LONG.items()
    }

    for found in losses.values():
        for name in LONG:
            close(found[name], [-logprob for logprob in expected[name]])


@pytest.mark.engine
def test_sinks_at_absolute_positions_are_another_arm(
    model: Path, losses: dict[str, dict[str, list[float]]]
) -> None:
    """The negative control: the product until sinks have been moved, something else after."""
    text = {"long0": LONG["long0"]}
    control = Arm(
        name="absolute",
        kind="absolute",
        sinks=SMALL.sinks,
        window=SMALL.window,
        stride=SMALL.stride,
        limit=400,
    )

    right = losses["prompt"]["long0"]
    wrong = losses_of(control, model, text, "prompt")["long0"]

    capacity = SMALL.schedule.capacity
    close(right[: capacity - 1], wrong[: capacity - 1])
    apart = [abs(a - b) for a, b in zip(right[capacity:], wrong[capacity:], strict=True)]
    assert max(apart) > 100 * TOLERANCE


@pytest.mark.server
def test_an_error_in_the_process_is_reported() -> None:
    with pytest.raises(WorkError, match="ZeroDivisionError"):
        list(isolated(_divide, 0))


def _divide(number: int) -> Iterator[int]:
    yield 1 // number


def test_arms_that_share_an_engine_fit_into_it() -> None:
    """No request may have more window or more tokens than the engine's own."""
    arms = [sink(sinks, capacity) for sinks in (0, 4, 8) for capacity in (96, 256)]
    other = [sink(4, 256, 64), Arm(name="full", kind="full", limit=100)]

    groups = shared([*arms, *other])
    engine = host(groups[0])

    assert groups == [arms, *([one] for one in other)]
    assert engine.schedule.capacity == 256
    assert all(arm.window <= engine.window for arm in arms)
    assert all(arm.schedule.capacity <= 256 for arm in arms)
    assert host(groups[1]) is other[0]


def test_the_short_version_ends_with_its_line() -> None:
    """Tokens of all arms, and perplexities at the positions shared with recomputation."""
    runs = {
        arm: {text: Series(rows=[{"tokens": 10}], at={5: 1.0 + more, 6: 9.0}) for text in "ab"}
        for arm, more in (("sink", 0.0), ("window", 0.5), ("full", 2.0))
    }
    runs["recompute-bos"] = {text: Series(at={5: 1.0}) for text in "ab"}

    assert last_line(runs) == (
        "quality: tokens=60 sink/recompute=1.000 window/recompute=1.649 full/recompute=7.389"
    )


def test_tables_replace_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")

    into(page, "new")

    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
