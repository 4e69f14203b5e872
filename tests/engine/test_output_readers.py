"""What reads a stream's tokens in the engine sees what it must, however much has been evicted.

The table in ``docs/design.md`` ("What reads a stream's tokens") lists every such feature of vLLM;
those that other files test are named there.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from vllm import RequestOutput
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from tests.conftest import ModelFactory
from tests.support.engine import (
    Engine,
    Generated,
    Policy,
    check_all_free,
    greedy_params,
    running_engine,
)
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle, Stream
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(layers=2, max_positions=512)
POLICY = Policy(5, 219, 32)  # C = 256
CASES = [(125, 2), (128, 2), (150, 2), (64, 4), (100, 3), (60, 5)]  # (pattern, count)
LETTER = 97
LETTERS = list(range(65, 91))


@pytest.fixture(scope="module")
def model(tiny_llama: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer knows where reasoning begins and ends."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(tiny_llama(SHAPE), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with running_engine(
        model,
        POLICY,
        enable_prefix_caching=True,
        max_num_batched_tokens=300,
        reasoning_parser="deepseek_r1",
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    ) as engine:
        yield engine
        check_all_free(engine)


@pytest.fixture(scope="module")
def done_thinking(engine: Engine) -> list[int]:
    """A long prompt that ended its reasoning in tokens that are evicted before the answer."""
    end = engine.llm.get_tokenizer().convert_tokens_to_ids("</think>")
    return [*random_tokens(100, 1), end, *(token % 256 for token in random_tokens(500, 2))]


def search(pattern: int, count: int) -> RepetitionDetectionParams:
    """A pattern of exactly so many tokens, so many times."""
    return RepetitionDetectionParams(
        max_pattern_size=pattern, min_pattern_size=pattern, min_count=count
    )


def repeating(pattern: int, count: int, **params: Any) -> Any:
    """Parameters of an answer that says the same token all the time."""
    return greedy_params(
        700, allowed_token_ids=[LETTER], repetition_detection=search(pattern, count), **params
    )


def ended(result: Generated) -> tuple[int, str | None, int | str | None]:
    return len(result.tokens), result.finish_reason, result.stop_reason


@pytest.mark.parametrize("prompt", [3, 90, 600])
def test_repetitions_are_found_across_evictions(engine: Engine, prompt: int) -> None:
    """Each answer ends with the token that completes its pattern; outputs may be sink tokens."""
    prompts = [random_tokens(prompt, 10)] * len(CASES)

    outputs = engine.generate(prompts, [repeating(*case) for case in CASES])

    results = [Generated.of(output) for output in outputs]
    assert [ended(result) for result in results] == [
        (pattern * count, "repetition", "repetition_detected") for pattern, count in CASES
    ]
    assert max(result.evictions for result in results) >= 2


def test_repetitions_are_those_of_the_whole_stream(
    engine: Engine, done_thinking: list[int]
) -> None:
    """A long word again and again: found after five times, and only by the length it has."""
    word = "".join(chr(65 + 7 * i % 26) + chr(97 + i % 26) for i in range(30))
    grammar = StructuredOutputsParams(regex=f"({word}){{40}}")

    def asking(pattern: int, count: int) -> Any:
        return greedy_params(
            700, structured_outputs=grammar, repetition_detection=search(pattern, count)
        )

    outputs = engine.generate([done_thinking] * 3, [asking(60, 5), asking(61, 5), asking(120, 5)])

    found, never, twice = (Generated.of(output) for output in outputs)
    assert found.text == word * 5
    assert (found.finish_reason, twice.finish_reason) == ("repetition", "repetition")
    assert twice.text == word * 10
    assert ended(never) == (700, "length", None)


def test_each_of_n_answers_is_searched(engine: Engine) -> None:
    """``n=2``, and a prompt that is resumed from the prefix cache: prompts are not looked at."""
    prompt = [LETTER] * 400
    engine.generate([prompt], repeating(1, 2))

    (output,) = engine.generate([prompt], repeating(64, 5, n=2, temperature=1.0))

    results = [Generated.of(output, index) for index in range(2)]
    assert [ended(result) for result in results] == [(320, "repetition", "repetition_detected")] * 2
    assert results[0].cached_tokens > 300


def test_preempted_answers_are_searched_on(engine: Engine) -> None:
    """What was kept of an answer survives the loss of its pages."""
    llm = engine.llm.llm_engine
    for index, case in enumerate(CASES):
        prompt = random_tokens(30, index)
        llm.add_request(str(index), {"prompt_token_ids": prompt}, repeating(*case))
    lengths: dict[str, int] = {}
    steps = 0
    while llm.has_unfinished_requests():
        steps += 1
        if steps in (120, 240, 290):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in llm.step():
            assert isinstance(output, RequestOutput)
            lengths[output.request_id] = len(output.outputs[0].token_ids)
    assert [lengths[str(i)] for i in range(len(CASES))] == [p * c for p, c in CASES]


def test_bad_words_are_recognised_across_evictions(engine: Engine, model: Path) -> None:
    """A word's last letter is forbidden behind its others, wherever in the stream it turns up."""
    prompts = [random_tokens(length, length) for length in (3, 400)]
    (free,) = engine.greedy(prompts[:1], 450, allowed_token_ids=LETTERS)
    words = [free.text[at : at + size] for at, size in ((30, 1), (300, 2), (360, 3), (420, 2))]

    results = engine.greedy(prompts, 450, allowed_token_ids=LETTERS, bad_words=words)

    letters = [[engine.llm.get_tokenizer().convert_tokens_to_ids(c) for c in w] for w in words]

    def mask(logits: torch.Tensor, stream: Stream) -> torch.Tensor:
        allowed = torch.full_like(logits, -torch.inf)
        allowed[LETTERS] = logits[LETTERS]
        for *rest, last in letters:
            if not rest or stream.output[-len(rest) :] == rest:
                allowed[last] = -torch.inf
        return allowed

    judge(Oracle(model), POLICY, prompts, results, adjust=mask)
    for result, word in itertools.product(results, letters):
        ends = range(len(word), len(result.tokens) + 1)
        assert not any(result.tokens[end - len(word) : end] == word for end in ends)
    assert min(result.evictions for result in results) >= 6


def test_grammars_go_on_across_evictions(engine: Engine, done_thinking: list[int]) -> None:
    """The state of a grammar is not made of tokens in the cache: a long answer obeys its schema."""
    schema = {
        "type": "object",
        "properties": {"name": {"const": "ab" * 200}, "tags": {"const": ["x" * 90] * 4}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    grammar = StructuredOutputsParams(json=schema)
    prompts = [done_thinking, done_thinking[95:110]]

    results = engine.greedy(prompts, 1_500, structured_outputs=grammar, ignore_eos=False)

    for result in results:
        assert result.finish_reason == "stop", result.text[-300:]
        assert json.loads(result.text) == {"name": "ab" * 200, "tags": ["x" * 90] * 4}
        assert result.evictions >= 15


def test_an_evicted_end_of_reasoning_counts(engine: Engine, done_thinking: list[int]) -> None:
    """A prompt whose reasoning has ended is answered by the grammar from its first token on."""
    tokenizer = engine.llm.get_tokenizer()
    begin = tokenizer.convert_tokens_to_ids("<think>")
    grammar = StructuredOutputsParams(choice=["yes" * 20, "no" * 30])
    thinking = [*done_thinking[:150], begin, *done_thinking[150:]]

    ended, open_end = engine.greedy([done_thinking, thinking], 60, structured_outputs=grammar)

    assert ended.text in ("yes" * 20, "no" * 30)
    assert open_end.text not in ("yes" * 20, "no" * 30)  # still reasoning: unconstrained
