"""Every model family streams exactly; the ones that cannot are refused; the docs say so.

The judge is transformers' own code for the family (``tests.support.oracle_hf``). Families that
differ from a tested one in nothing that matters to the cache are marked ``slow``.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sink_vllm.gate.model_facts import model_facts
from sink_vllm.gate.refusals import REFUSALS
from tests.conftest import ModelFactory
from tests.support.engine import Engine, Generated, check_all_free, running_engine
from tests.support.families import FAMILIES
from tests.support.families_media import BEGIN, END, IMAGE, VIDEO
from tests.support.family import Family, write_family
from tests.support.judge import (
    TOLERANCE,
    Verdict,
    differences,
    judge,
    judge_rounded,
    random_tokens,
)
from tests.support.models_table import markdown
from tests.support.oracle import Oracle
from tests.support.oracle_hf import HFOracle, classes_restored
from tests.support.paths import DOCS
from tests.support.refused_models import REFUSED, Refused
from tests.support.tiny_models import LLAMA3_ROPE, TinyLlama

PROMPTS = [random_tokens(length, length) for length in (5, 150)]
TURN = 50
"""Tokens of an answer in a conversation."""


def case_of(family: Family, engine: bool = True) -> Any:
    marks = [pytest.mark.engine] if engine else []
    marks += [] if family.quick else [pytest.mark.slow]
    return pytest.param(family, id=family.slug, marks=marks)


@pytest.mark.parametrize("family", [case_of(family) for family in FAMILIES])
def test_family_streams_exactly(
    family: Family, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Through evictions and re-anchorings: the tokens and log-probabilities of transformers."""
    folder = write_family(tmp_path, family)

    with (
        convolutions_of(family),
        classes_restored(family.model_class),
        running_engine(
            folder,
            family.policy,
            max_num_batched_tokens=100,
            enable_prefix_caching=True,
            **family.engine,
        ) as engine,
    ):
        engine.spare_cached = False
        generated = engine.greedy(PROMPTS, family.tokens)
        check_all_free(engine)
        still = [not layer.rotation for layer in engine.runner.attention_layers]
        model = type(engine.runner.get_model()).__name__
        conversation = list(converse(engine, family))
        check_all_free(engine)

    oracle = HFOracle(folder)
    verdict = judge_family(family, oracle, generated)
    record_property("verdict", str(verdict))
    print(family.name, verdict, [len(set(one.tokens)) for one in generated])
    check(family, verdict, generated, model, still)
    if family.dtype == "float32":
        for prompts, answers in conversation:
            judge(oracle, family.policy, prompts, answers)
    else:
        _, (prompts, resumed), (_, whole) = conversation
        rounding = differences(oracle, family.policy, prompts, whole)
        judge_rounded(oracle, family.policy, prompts, resumed, rounding)


def converse(engine: Engine, family: Family) -> Iterator[tuple[list[list[int]], list[Generated]]]:
    """A conversation past its capacity, sent again with a new turn beside a stream that starts.

    It goes on from cached pages behind evictions where the family is ``resumed``.

    Yields:
        What was sent, and the answers, whose tokens are the judge's to say. Where that is a matter
        of rounding, at last what was sent again, from its start on and not from the cache.
    """
    engine.forget_prefixes()
    capacity = family.policy.capacity
    sent = random_tokens(2 * capacity, 1)
    (answer,) = engine.greedy([sent], TURN)
    assert answer.evictions >= 3
    yield [sent], [answer]
    resent = [[*sent, *answer.tokens, *random_tokens(25, 2)], random_tokens(20, 3)]
    answers = engine.greedy(resent, TURN)
    assert (answers[0].cached_tokens > capacity) is family.resumed
    yield resent, answers
    if family.dtype != "float32":
        engine.forget_prefixes()
        whole = engine.greedy(resent, TURN)
        assert whole[0].cached_tokens == 0
        yield resent, whole


@contextmanager
def convolutions_of(family: Family) -> Iterator[None]:
    """The kernels that ``family.torch_convolutions`` asks for, wherever the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        if family.torch_convolutions:
            patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        yield


def judge_family(family: Family, oracle: HFOracle, generated: Sequence[Generated]) -> Verdict:
    """By transformers in float32; a model of fewer bits is measured by itself, before it evicts."""
    judged = judge if family.dtype == "float32" else judge_rounded
    return judged(oracle, family.policy, PROMPTS, generated)


def check(
    family: Family,
    verdict: Verdict,
    generated: Sequence[Generated],
    model: str,
    still: Sequence[bool],
) -> None:
    """That streams have gone through what the table of models says.

    Args:
        family: row of the table.
        verdict: the streams equal the judge's.
        generated: the streams.
        model: class of the model code that vLLM chose.
        still: layer by layer: the self-test found that its keys do not depend on the position.
    """
    assert verdict.least_evictions >= family.evictions
    assert model.startswith("Transformers") == (family.backend == "transformers")
    assert model.endswith("ForConditionalGeneration") or not family.text_alone
    if family.positions == "rope":
        assert verdict.least_reanchorings >= 1
        assert tuple(i for i, one in enumerate(still) if one) == family.still
    else:
        assert all(still)
    assert len(verdict.ties) <= 3  # more would mean that the model is no good judge
    assert min(len(set(one.tokens)) for one in generated) >= family.distinct  # and so would a loop


def test_prompts_contain_what_stands_for_media() -> None:
    """Somebody may write it into a text, where it is a token like any other."""
    assert {IMAGE, VIDEO, BEGIN, END} <= set(PROMPTS[1])


@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE], ids=["default", "llama3"])
def test_oracles_agree_on_llama(tiny_llama: ModelFactory, rope: dict[str, float | str]) -> None:
    """The judge of the families is the judge of everything else, where both know the model."""
    folder = tiny_llama(TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=128, rope=rope))

    known = Oracle(folder).run(PROMPTS, 4, 20, 16, 80)
    generic = HFOracle(folder).run(PROMPTS, 4, 20, 16, 80)

    for one, other in zip(known, generic, strict=True):
        assert one.evictions == other.evictions >= 2
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@pytest.mark.parametrize("family", [case_of(one, engine=False) for one in FAMILIES])
def test_judges_take_known_tokens_together(family: Family, tmp_path: Path) -> None:
    """Whole spans between two evictions give what one token after the other gives."""
    oracle = HFOracle(write_family(tmp_path, family))

    one_by_one = oracle.run(PROMPTS, 4, 28, 16, 40, at_once=1)
    forced = [result.tokens for result in one_by_one]
    together = oracle.run(PROMPTS, 4, 28, 16, 40, forced=forced)

    for one, other in zip(one_by_one, together, strict=True):
        assert min(other.gaps) > -TOLERANCE
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


@pytest.mark.slow  # vLLM looks at each model class in a process of its own
@pytest.mark.parametrize("refused", REFUSED, ids=lambda one: one.name)
def test_refused_models_are_refused(refused: Refused, tmp_path: Path) -> None:
    """The gate reads the reason from the configuration that transformers makes of the family."""
    from vllm.config import ModelConfig

    from sink_vllm.gate.facts import Facts

    config = getattr(transformers, refused.config)(**refused.settings)
    config.architectures = [_architecture(refused.config)]
    config.save_pretrained(tmp_path)
    assert "architectures" in json.loads((tmp_path / "config.json").read_text())

    facts = Facts(**model_facts(ModelConfig(str(tmp_path), skip_tokenizer_init=True)))

    applied = [row.name for row in REFUSALS if row.reason(facts) is not None]
    assert applied[:1] == [refused.row]


@pytest.mark.engine
@pytest.mark.slow
def test_keys_that_are_scaled_after_their_rotation_fail_the_self_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the gate knows by the name of the class, the start finds without it."""
    monkeypatch.setattr("sink_vllm.gate.facts._SCALED_CLASSES", ("none",))
    family = Family(
        name="HunYuan", model="HunYuanDenseV1", special="norms with weights after the rotation"
    )
    folder = write_family(tmp_path, family)

    with (
        classes_restored(family.model_class),
        pytest.raises(ValueError, match=r"layers\.0"),
        running_engine(folder, family.policy, **family.engine),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("config", ["DeepseekV2Config", "DeepseekV3Config", "Glm4MoeLiteConfig"])
def test_latent_attention_passes_on_gpus(config: str, tmp_path: Path) -> None:
    """Whatever its RoPE scaling is: that is vLLM's CPU backend's to get wrong."""
    from vllm.config import ModelConfig

    from sink_vllm.gate.facts import Facts

    made = getattr(transformers, config)(architectures=[_architecture(config)])
    made.save_pretrained(tmp_path)

    facts = model_facts(ModelConfig(str(tmp_path), skip_tokenizer_init=True))

    assert facts["mla"]
    assert not [r.name for r in REFUSALS if r.reason(Facts(**facts, platform="cuda"))]


def _architecture(config: str) -> str:
    """Name of the generative model class of a configuration."""
    names = {
        "WhisperConfig": "WhisperForConditionalGeneration",
        "GPT2Config": "GPT2LMHeadModel",
        "LlavaConfig": "LlavaForConditionalGeneration",
        "Qwen2VLConfig": "Qwen2VLForConditionalGeneration",
        "Gemma3Config": "Gemma3ForConditionalGeneration",
        "Gemma3TextConfig": "Gemma3ForCausalLM",
        "Qwen3_5Config": "Qwen3_5ForConditionalGeneration",
        "Llama4TextConfig": "Llama4ForCausalLM",
    }
    return names.get(config) or config.replace("Config", "ForCausalLM")


def test_documentation_is_the_table() -> None:
    """Regenerate with ``python -m tests.support.models_table > docs/models.md`` when this fails."""
    assert (DOCS / "models.md").read_text() == markdown()
