"""The forgetting detokenizers tell the client exactly what vLLM's own do.

Every test feeds the same tokens to vLLM's output processor and to ours.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine import FinishReason, detokenizer
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, SlowIncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor

from sink_vllm.server.detokenizer import EndlessFastDetokenizer, Tail, _Forgetful, make_endless
from tests.support.outputs import SPECIAL, Processor, byte_fallback, byte_level, params

TEXT = "the cats saw the cat. thé 日本語 — naïve 😀 the end\n"
TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(params=["fast", "slow"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """vLLM chooses the slow detokenizer for tokenizers that are not Rust; here for any."""
    if request.param == "slow":
        monkeypatch.setattr(detokenizer, "uses_fast_detokenizer", lambda _tokenizer: False)
    return str(request.param)


def both(tokenizer: Any, steps: Sequence[Sequence[int]], **given: Any) -> Any:
    """What the client sees from vLLM, asserted to be what it sees from us."""
    made_for = {key: given.pop(key) for key in ("prompt", "stream_interval") if key in given}
    last = given.pop("last", FinishReason.LENGTH)
    stock, ours = (
        Processor(tokenizer, params(**given), ours=is_ours, **made_for).run(steps, last)
        for is_ours in (False, True)
    )
    assert ours == stock
    return ours


def text_tokens(tokenizer: Any, repeats: int, then: str = "") -> list[int]:
    return list(tokenizer.encode(TEXT * repeats + then, add_special_tokens=False))


def in_steps(tokens: Sequence[int], sizes: Iterator[int]) -> list[list[int]]:
    steps, begin = [], 0
    while begin < len(tokens):
        end = begin + next(sizes)
        steps.append(list(tokens[begin:end]))
        begin = end
    return steps


def ones() -> Iterator[int]:
    while True:
        yield 1


def one_to(most: int, seed: int = 0) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield rng.randint(1, most)


@pytest.mark.parametrize("interval", [1, 5, 7])
@pytest.mark.parametrize("sizes", [ones, lambda: one_to(4)], ids=["single", "several"])
def test_text_and_tokens(tokenizer: Any, interval: int, sizes: Callable[[], Iterator[int]]) -> None:
    steps = in_steps(text_tokens(tokenizer, 40), sizes())

    seen = both(tokenizer, steps, stream_interval=interval)

    assert "日本語" in "".join(output["text"] for output in seen)


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("seed", range(5))
def test_random_tokens(tokenizer: Any, seed: int, interval: int) -> None:
    """Bytes that are no text, special tokens and characters in pieces come and go."""
    rng = random.Random(seed)
    pieces = [token for token in text_tokens(tokenizer, 1) if token > 32]
    tokens = [
        rng.choice((rng.randrange(len(tokenizer)), *rng.choices(pieces, k=2))) for _ in range(2000)
    ]

    both(tokenizer, in_steps(tokens, one_to(3, seed)), stream_interval=interval)
    both(tokenizer, in_steps(tokens, ones()), skip_special_tokens=False)
    both(
        tokenizer,
        in_steps(tokens, ones()),
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("interval", [1, 5, 7])
@pytest.mark.parametrize("stop", [["語 — naïve 😀 the end\nEND"], ["zz", "cat. END", "D"]])
def test_stop_strings(tokenizer: Any, stop: list[str], interval: int, include: bool) -> None:
    """The stop string begins in text that is older than what is remembered of it."""
    tokens = text_tokens(tokenizer, 60, then="END the cat. END the cat")
    for sizes in (ones(), one_to(4)):
        seen = both(
            tokenizer,
            in_steps(tokens, sizes),
            stop=stop,
            include_stop_str_in_output=include,
            stream_interval=interval,
        )

        assert seen[-1]["finish"] == "stop"
        assert seen[-1]["stop"] in stop


def test_stop_string_only_after_min_tokens(tokenizer: Any) -> None:
    tokens = text_tokens(tokenizer, 60)

    seen = both(tokenizer, in_steps(tokens, one_to(4)), stop=["naïve"], min_tokens=1500)

    assert seen[-1]["stop"] == "naïve"
    assert sum(len(output["tokens"]) for output in seen) > 1500


def test_stop_token_is_left_out_of_the_text(tokenizer: Any) -> None:
    both(tokenizer, in_steps(text_tokens(tokenizer, 20), ones()), last=FinishReason.STOP)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("interval", [1, 7])
def test_logprobs(tokenizer: Any, interval: int, flat: bool) -> None:
    """The text of alternatives to a split character depends on the tokens before it."""
    tokens = text_tokens(tokenizer, 20)

    seen = both(
        tokenizer,
        in_steps(tokens, one_to(3)),
        logprobs=2,
        flat_logprobs=flat,
        stream_interval=interval,
    )

    assert sum(len(output["logprobs"]) for output in seen) == len(tokens)


def test_without_detokenization(tokenizer: Any) -> None:
    both(tokenizer, in_steps(range(97, 123), ones()) * 40, detokenize=False)


def test_prompt_that_ends_inside_a_character(tokenizer: Any) -> None:
    both(tokenizer, in_steps(text_tokens(tokenizer, 10), ones()), prompt=(72, 105, 0xE2, 0x82))


@pytest.mark.parametrize("seed", range(20))
def test_long_prompts_of_any_end(tokenizer: Any, seed: int, kind: str) -> None:
    """Only their end is decoded: bytes that are no text, special tokens, spaces, whole words."""
    rng = random.Random(seed)
    prompt = text_tokens(tokenizer, 5)
    prompt += [rng.randrange(len(tokenizer)) for _ in range(rng.choice((0, 1, 40)))]
    prompt += [tokenizer.convert_tokens_to_ids(SPECIAL[0])] * rng.choice((0, 0, 1, 40, 70))
    prompt += text_tokens(tokenizer, 1)[: rng.choice((0, 1, 2, 20))]
    answer = text_tokens(tokenizer, 2)[rng.randint(0, 20) :]

    both(tokenizer, in_steps(answer, ones()), prompt=prompt)

    if kind == "fast":
        ours = Processor(tokenizer, params(), ours=True, prompt=prompt)
        unfinished = tokenizer.decode(prompt, skip_special_tokens=True).endswith(
            "\N{REPLACEMENT CHARACTER}"
        )
        detokenizer = ours.state.detokenizer
        assert isinstance(detokenizer, EndlessFastDetokenizer)
        assert unfinished or len(detokenizer._context) < min(len(prompt), 200)


@pytest.mark.parametrize(
    "endless",
    [[0x80], [0xE2, 0x82], [0xF0, 0x9F, 0x98], [0xFF, 0xC3, 0xA9], [-1]],
    ids=["stray bytes", "unfinished", "unfinished emoji", "broken run", "skipped specials"],
)
def test_endless_tokens_without_text(tokenizer: Any, endless: list[int]) -> None:
    """The text is vLLM's, only told earlier; the text after it has its spaces and characters.

    After the line feed, a byte token for the second tokenizer, vLLM drops the broken run.
    """
    special = tokenizer.convert_tokens_to_ids(SPECIAL[0])
    endless = [special if token == -1 else token for token in endless]
    tokens = [
        *text_tokens(tokenizer, 1),
        *(endless * 700)[:700],
        *text_tokens(tokenizer, 1)[:-1],
        *(endless * 400)[:400],
        *text_tokens(tokenizer, 2),
    ]

    stock, ours = (
        Processor(tokenizer, params(), ours=is_ours).run(in_steps(tokens, ones()))
        for is_ours in (False, True)
    )

    assert "".join(o["text"] for o in ours) == "".join(o["text"] for o in stock)
    assert [o["tokens"] for o in ours] == [o["tokens"] for o in stock]


def test_tail_refuses_forgotten_tokens() -> None:
    tail = Tail([7, 8, 9], dropped=100)

    assert tail[101:] == [8, 9]
    for wrong in (slice(99, None), slice(None), slice(101, 102), 101):
        with pytest.raises(IndexError):
            tail[wrong]


def test_unknown_detokenizer_is_refused() -> None:
    class Other:
        pass

    with pytest.raises(TypeError, match="Other"):
        make_endless(Other(), None)


def test_guard_detokenizers_keep_the_state_that_is_shortened() -> None:
    """Names that the subclasses reach for; a rename in vLLM must fail here first."""
    for ours, tokenizer in ((False, byte_level()), (True, byte_level())):
        state = Processor(tokenizer, params(stop=["x"]), ours=ours).state
        assert {"token_ids", "output_text", "_last_output_text_offset", "stop", "stream"} <= vars(
            state.detokenizer
        ).keys() or not isinstance(state.detokenizer, FastIncrementalDetokenizer)
    assert {"tokens", "prefix_offset", "read_offset", "prompt_len"} <= set(
        SlowIncrementalDetokenizer.__init__.__code__.co_names
    )
    assert LogprobsProcessor._get_sampled_context_ids.__defaults__ == (4,)  # positions looked back
    assert isinstance(FlatLogprobs()[-8:], FlatLogprobs)
    assert issubclass(_Forgetful, detokenizer.IncrementalDetokenizer)
