"""What a client asked for and is told stays right across evictions."""

from collections.abc import Iterator

import pytest
import torch
from vllm import SamplingParams

from tests.conftest import ModelFactory
from tests.support.engine import (
    Engine,
    Generated,
    Policy,
    check_all_free,
    greedy_params,
    logprobs_of,
    running_engine,
)
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle, Stream, penalties
from tests.support.tiny_models import EOS, TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(max_positions=256)
POLICY = Policy(5, 59, 32)  # C = 96
LENGTHS = (7, 90, 96, 97, 250)
PROMPTS = [random_tokens(length, length) for length in LENGTHS]


def sampled(num_tokens: int, seed: int, n: int = 1) -> SamplingParams:
    return greedy_params(num_tokens, temperature=1.0, seed=seed, n=n)


@pytest.fixture(scope="module")
def engine(tiny_llama: ModelFactory) -> Iterator[Engine]:
    with running_engine(
        tiny_llama(SHAPE), POLICY, max_num_batched_tokens=128, enable_prefix_caching=True
    ) as engine:
        yield engine
        check_all_free(engine)


@pytest.fixture(scope="module")
def oracle(tiny_llama: ModelFactory) -> Oracle:
    return Oracle(tiny_llama(SHAPE))


@pytest.fixture(scope="module")
def free(engine: Engine) -> list[Generated]:
    """The greedy streams of all prompts, which nobody asked anything else of."""
    return engine.greedy(PROMPTS, 540)


@pytest.mark.parametrize("max_tokens", [1, 31, 32, 33, 95, 96, 97, 500])
def test_max_tokens_is_exact(engine: Engine, max_tokens: int) -> None:
    """Evicted output tokens still count: every stream ends at its limit, with reason length."""
    results = engine.greedy(PROMPTS, max_tokens)

    for prompt, result in zip(PROMPTS, results, strict=True):
        assert len(result.tokens) == len(result.logprobs) == max_tokens
        assert result.finish_reason == "length"
        computed = len(prompt) + max_tokens - 1
        assert result.evictions == -(-max(computed - POLICY.capacity, 0) // POLICY.g)


def test_usage_reports_the_whole_stream(engine: Engine) -> None:
    """Prompt length and stream position count evicted tokens too."""
    results = engine.greedy(PROMPTS, 300)

    assert [result.prompt_len for result in results] == list(LENGTHS)
    assert [result.stream_position for result in results] == [n + 300 for n in LENGTHS]


def first_late_token(tokens: list[int], after: int) -> tuple[int, int]:
    """Index and value of the first token from ``after`` on that was not generated before."""
    for index in range(after, len(tokens)):
        if tokens[index] not in tokens[:index]:
            return index, tokens[index]
    raise AssertionError("the model repeats itself; choose another seed")


@pytest.mark.parametrize("number", range(len(PROMPTS)), ids=map(str, LENGTHS))
def test_stop_token_ends_the_stream(engine: Engine, free: list[Generated], number: int) -> None:
    """A stop token that first appears after several evictions ends the stream there."""
    tokens = free[number].tokens
    index, token = first_late_token(tokens, after=130)

    (stopped,) = engine.greedy([PROMPTS[number]], 500, stop_token_ids=[token])

    assert stopped.tokens == tokens[: index + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert stopped.evictions >= 1


def test_eos_ends_the_stream_unless_ignored(engine: Engine) -> None:
    """With a bias that makes EOS win, the stream ends after its last forbidden step."""
    params = {"logit_bias": {EOS: 100.0}, "ignore_eos": False}

    results = engine.greedy(PROMPTS, 500, **params, min_tokens=201)
    ignored = engine.greedy(PROMPTS, 250, **params | {"ignore_eos": True})

    for result in results:
        assert len(result.tokens) == 202
        assert result.tokens.index(EOS) == 201
        assert result.finish_reason == "stop"
        assert result.evictions >= 3
    assert all(result.tokens == [EOS] * 250 for result in ignored)


def test_min_tokens_forbids_stopping_and_nothing_else(
    engine: Engine, oracle: Oracle, free: list[Generated]
) -> None:
    """Until ``min_tokens`` the stop tokens are masked; the rest is the masked oracle's stream."""
    stops = sorted({token for result in free for token in result.tokens[100:110]})
    limit = 280

    def masked(logits: torch.Tensor, stream: Stream) -> torch.Tensor:
        if len(stream.output) < limit:
            logits[[*stops, EOS]] = -torch.inf  # vLLM masks EOS, ignored or not
        return logits

    results = engine.greedy(PROMPTS, 281, stop_token_ids=stops, min_tokens=limit)

    for result in results:
        assert len(result.tokens) >= limit
        assert not set(result.tokens[:limit]) & set(stops)
    common = [_first(result, limit) for result in results]
    expected = oracle.run(PROMPTS, POLICY.S, POLICY.W, POLICY.g, limit, adjust=masked)
    assert common == [truth.tokens for truth in expected]


def _first(result: Generated, count: int) -> list[int]:
    return result.tokens[:count]


def test_stop_string_found_after_evictions(engine: Engine) -> None:
    """The detokenizer in the front end never notices an eviction; the account still arrives."""
    letters = sorted(
        engine.llm.get_tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    )
    (free,) = engine.greedy([PROMPTS[1]], 400, allowed_token_ids=letters)
    assert len(free.text) == 400
    word = next(
        free.text[i : i + 3] for i in range(200, 397) if free.text.index(free.text[i : i + 3]) == i
    )

    (stopped,) = engine.greedy([PROMPTS[1]], 400, allowed_token_ids=letters, stop=[word])

    assert stopped.text == free.text[: free.text.index(word)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", word)
    computed = len(PROMPTS[1]) + len(stopped.tokens) - 1
    assert stopped.evictions == -(-(computed - POLICY.capacity) // POLICY.g)


def test_a_seed_fixes_the_stream_alone_and_in_a_batch(engine: Engine) -> None:
    """Same seed, same tokens, whatever runs beside it; another seed, other tokens."""
    prompt = PROMPTS[1]

    (alone,) = engine.generate([prompt], sampled(400, seed=7))
    batch = engine.generate(
        [*PROMPTS, prompt], [*(sampled(400, seed=s) for s in range(5)), sampled(400, seed=7)]
    )

    tokens = list(alone.outputs[0].token_ids)
    assert list(batch[-1].outputs[0].token_ids) == tokens
    assert Generated.of(alone).evictions >= 10
    late = [list(output.outputs[0].token_ids)[200:] for output in batch]
    assert len({tuple(tail) for tail in late}) == len(late)


@pytest.mark.parametrize(
    "strengths",
    [
        {"repetition": 1.5},
        {"frequency": 0.7},
        {"presence": 1.1},
        {"repetition": 1.2, "frequency": 0.3, "presence": -0.4},
    ],
    ids=["repetition", "frequency", "presence", "all"],
)
def test_penalties_cover_the_tokens_in_the_cache(
    engine: Engine, oracle: Oracle, free: list[Generated], strengths: dict[str, float]
) -> None:
    """Penalties see the cached prompt and output tokens; evicted tokens are forgotten."""
    params = {f"{name}_penalty": value for name, value in strengths.items()}

    results = engine.greedy(PROMPTS, 540, **params)

    verdict = judge(oracle, POLICY, PROMPTS, results, adjust=penalties(**strengths))
    assert verdict.least_evictions >= 15
    assert results[0].tokens != free[0].tokens


def test_logprobs_of_every_generated_token(engine: Engine) -> None:
    """``logprobs=5`` gives the chosen and the five best tokens of each step."""
    (output,) = engine.generate([PROMPTS[2]], greedy_params(400, logprobs=5))

    completion = output.outputs[0]
    steps = logprobs_of(completion)
    assert len(steps) == 400
    for token, step in zip(completion.token_ids, steps, strict=True):
        assert len(step) == 5
        assert step[token].rank == 1
        assert step[token].logprob == max(entry.logprob for entry in step.values())
    chosen = [step[t].logprob for t, step in zip(completion.token_ids, steps, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))


def test_two_samples_per_prompt(engine: Engine) -> None:
    """``n=2`` are two streams that share their prompt's pages and nothing else."""
    prompt = PROMPTS[1]

    (pair,) = engine.generate([prompt], sampled(300, seed=5, n=2))
    singles = engine.generate([prompt, prompt], [sampled(300, seed=5), sampled(300, seed=6)])

    # vLLM gives sample i the seed plus i.
    expected = [list(single.outputs[0].token_ids) for single in singles]
    assert [list(completion.token_ids) for completion in pair.outputs] == expected
    assert expected[0][-100:] != expected[1][-100:]
    accounts = [Generated.of(single).evictions for single in singles]
    assert min(accounts) >= 6
    assert Generated.of(pair).evictions == sum(accounts)
