"""The oracle itself: against transformers, and against the definition of the method."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support.oracle import Oracle, Stream, penalties
from tests.support.tiny_models import LLAMA3_ROPE, VOCAB_SIZE, TinyLlama, write_tiny_llama

SHAPES = {
    "mha": TinyLlama(),
    "gqa": TinyLlama(heads=4, kv_heads=2, layers=2),
    "tied": TinyLlama(heads=4, kv_heads=1, layers=2, tied=True),
    "llama3": TinyLlama(layers=2, rope=LLAMA3_ROPE),
}


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_below_capacity_it_is_transformers(name: str, tmp_path: Path) -> None:
    """Before the first eviction every log-probability is that of ``LlamaForCausalLM``."""
    folder = write_tiny_llama(tmp_path, SHAPES[name])
    prompts = [random_tokens(count, seed) for seed, count in enumerate((1, 20, 70))]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    results = Oracle(folder).run(prompts, 4, 100, 32, 60)

    for prompt, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + result.tokens])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + 59)
        expected = logits[at, torch.tensor(result.tokens)]
        assert result.evictions == 0
        assert logits[at].argmax(-1).tolist() == result.tokens
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize(("S", "W", "g"), [(0, 20, 8), (1, 20, 8), (5, 17, 6), (9, 15, 1)])
def test_one_layer_equals_recomputation_of_the_survivors(
    S: int, W: int, g: int, tmp_path: Path
) -> None:
    """In one layer keys depend on their own token only, so a dense re-prefill is exact."""
    folder = write_tiny_llama(tmp_path, TinyLlama(layers=1))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [random_tokens(count, seed) for seed, count in enumerate((3, 30, 90))]
    capacity = S + W + g

    results = Oracle(folder).run(prompts, S, W, g, 80)

    for prompt, result in zip(prompts, results, strict=True):
        stream = prompt + result.tokens
        for index, logprob in enumerate(result.logprobs):
            survivors: list[int] = []  # one token after the other, as the method is defined
            for token in stream[: len(prompt) + index]:
                if len(survivors) == capacity:
                    survivors = survivors[:S] + survivors[S + g :]
                survivors.append(token)
            with torch.inference_mode():
                logits = model(torch.tensor([survivors])).logits[0, -1].log_softmax(-1)
            assert int(logits.argmax()) == result.tokens[index]
            assert float(logits[result.tokens[index]]) == pytest.approx(logprob, abs=3e-5)


def test_survivors_of_deeper_layers_remember_evicted_text(tmp_path: Path) -> None:
    """With two layers a re-prefill of the survivors is *not* the method: the oracle must differ."""
    folder = write_tiny_llama(tmp_path, TinyLlama(layers=2))
    prompt = random_tokens(60, 1)

    streamed, truncated = (
        Oracle(folder).run([prompt], 4, 20, 8, 30, truncate=mode)[0] for mode in (False, True)
    )

    assert streamed.tokens != truncated.tokens


@pytest.mark.parametrize("truncate", [False, True])
def test_evictions_are_counted_by_stream_position(truncate: bool, tmp_path: Path) -> None:
    """One eviction at C + 1 computed tokens, then one per g; the last token is not computed."""
    folder = write_tiny_llama(tmp_path, TinyLlama(layers=1))
    S, W, g = 4, 20, 8  # C = 32
    prompts = [random_tokens(count, count) for count in (22, 23, 24, 31, 32, 33, 40, 41, 100)]

    results = Oracle(folder).run(prompts, S, W, g, 10, truncate=truncate)

    # 22 + 9 = 31, 32 | 33 evicts once, up to 40 | 41 twice, 42 | 49, 50 three | 109: ceil(77 / 8)
    assert [result.evictions for result in results] == [0, 0, 1, 1, 2, 2, 3, 3, 10]


def test_forcing_its_own_tokens_changes_nothing(tmp_path: Path) -> None:
    """Teacher forcing with the greedy tokens gives the greedy log-probabilities."""
    folder = write_tiny_llama(tmp_path, TinyLlama(layers=2))
    prompts = [random_tokens(10, 1), random_tokens(50, 2)]
    oracle = Oracle(folder)
    free = oracle.run(prompts, 4, 20, 8, 40)

    forced = oracle.run(prompts, 4, 20, 8, 40, forced=[result.tokens for result in free])
    other = oracle.run(prompts, 4, 20, 8, 40, forced=[[7] * 40, [7] * 40])

    for one, led in zip(free, forced, strict=True):
        assert (led.tokens, led.evictions) == (one.tokens, one.evictions)
        assert led.logprobs == pytest.approx(one.logprobs, abs=3e-5)
    assert all(result.tokens == [7] * 40 and min(result.gaps) < 0 for result in other)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_tokens_that_are_known_may_be_computed_together(
    name: str, truncate: bool, tmp_path: Path
) -> None:
    """Whole spans between two evictions give what one token after the other gives."""
    prompts = [random_tokens(count, count) for count in (1, 31, 32, 33, 50, 200)]
    oracle = Oracle(write_tiny_llama(tmp_path, SHAPES[name]))

    one_by_one = oracle.run(prompts, 5, 16, 11, 120, truncate=truncate, at_once=1)
    forced = [result.tokens for result in one_by_one]
    for given in (None, forced):
        together = oracle.run(prompts, 5, 16, 11, 120, truncate=truncate, forced=given)

        assert [result.tokens for result in together] == forced
        for one, other in zip(one_by_one, together, strict=True):
            assert one.evictions == other.evictions >= 8
            assert one.logprobs == pytest.approx(other.logprobs, abs=3e-5)
            assert one.gaps == pytest.approx(other.gaps, abs=1e-4)


def test_what_adjusts_logits_sees_the_cache_of_its_token(tmp_path: Path) -> None:
    """Penalties of a span computed together are those of each token's own past."""
    prompts = [random_tokens(count, count) for count in (3, 40)]
    oracle = Oracle(write_tiny_llama(tmp_path, TinyLlama(layers=2)))
    adjust = penalties(repetition=1.3, frequency=0.4, presence=0.2)

    free = oracle.run(prompts, 4, 20, 8, 60, adjust=adjust, at_once=1)
    forced = [result.tokens for result in free]
    together = oracle.run(prompts, 4, 20, 8, 60, adjust=adjust, forced=forced)

    for one, other in zip(free, together, strict=True):
        assert min(other.gaps) > -1e-4
        assert one.gaps == pytest.approx(other.gaps, abs=1e-4)


def test_streams_do_not_see_each_other(tmp_path: Path) -> None:
    """A stream in a batch gives the tokens it gives alone."""
    folder = write_tiny_llama(tmp_path, TinyLlama(layers=2))
    prompts = [random_tokens(count, count) for count in (1, 33, 90)]
    oracle = Oracle(folder)

    together = oracle.run(prompts, 4, 20, 8, 60)

    for prompt, result in zip(prompts, together, strict=True):
        assert oracle.run([prompt], 4, 20, 8, 60)[0].tokens == result.tokens


def test_penalties_count_cached_tokens_only() -> None:
    """Evicted tokens are not penalised; prompt tokens by repetition only."""
    stream = Stream(tokens=[0, 1, 2, 3, 3, 4], prompt_len=3, num_tokens=9, cached=[0, 2, 3, 4])
    logits = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])

    adjusted = penalties(repetition=2.0, frequency=0.25, presence=0.125)(logits, stream)

    # 0 and 2: prompt; 1: evicted; 3: generated twice; 4: not computed yet
    assert adjusted.tolist() == [0.5, 1.0, -2.0, 0.5 - 2 * 0.25 - 0.125, 1.0]
