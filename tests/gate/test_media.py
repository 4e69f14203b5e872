"""Multimodal models: refused with their media, accepted without, from vLLM's own configuration."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig

from sink_vllm.gate.check import reason
from sink_vllm.gate.facts import Facts
from sink_vllm.gate.model_facts import model_facts
from tests.support.families_media import MEDIA
from tests.support.family import Family, config_of

FAMILIES = {family.model: family for family in MEDIA}
QWEN = FAMILIES["Qwen3VL"]
GEMMA = FAMILIES["Gemma3"]


def facts(folder: Path, family: Family, **options: Any) -> Facts:
    config_of(family).save_pretrained(folder)
    return Facts(**model_facts(ModelConfig(str(folder), skip_tokenizer_init=True, **options)))


@pytest.mark.parametrize("family", [QWEN, GEMMA], ids=["M-RoPE", "both directions in images"])
@pytest.mark.parametrize(
    "options",
    [{}, {"limit_mm_per_prompt": {"image": 1}}, {"limit_mm_per_prompt": {"audio": 0}}],
    ids=["no option", "one image", "a medium it does not know"],
)
def test_media_are_refused_and_the_sentence_names_the_flag(
    family: Family, options: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever else is special about images, the user is told what to do about them."""
    sentence = reason(facts(tmp_path, family, **options))

    assert sentence == (
        f"--kv-policy sink does not work with images, audio and other media in requests yet "
        f"({family.architecture}): an image could be cut in two by an eviction; add "
        f"--language-model-only to serve the model's text (and drop --enable-mm-embeds)."
    )


@pytest.mark.parametrize(
    ("family", "limits"),
    [(QWEN, {"image": 0, "video": 0}), (GEMMA, {"image": 0})],
    ids=["M-RoPE", "both directions in images"],
)
def test_text_alone_is_accepted(family: Family, limits: dict[str, int], tmp_path: Path) -> None:
    """By the flag, or by a limit of 0 for every medium, which means the same to vLLM."""
    alone = facts(tmp_path, family, language_model_only=True)

    assert reason(alone) is None
    assert not alone.bidirectional
    assert facts(tmp_path, family, limit_mm_per_prompt=limits) == alone


def test_some_media_left_are_refused(tmp_path: Path) -> None:
    left = facts(tmp_path, QWEN, limit_mm_per_prompt={"image": 0})
    embedded = facts(tmp_path, QWEN, language_model_only=True, enable_mm_embeds=True)

    for one in (left, embedded):
        assert "--language-model-only" in (reason(one) or "")


@pytest.mark.parametrize(
    "of_text",
    [{"recurrent_layers": ("mamba1",)}, {"sparse_attention": True}],
    ids=lambda facts: next(iter(facts)),
)
def test_what_its_text_cannot_do_is_said_first(of_text: dict[str, Any]) -> None:
    """Nobody is sent to a flag behind which the next refusal waits."""
    alone = Facts(**of_text)

    assert reason(alone) is not None
    assert reason(dataclasses.replace(alone, multimodal=True)) == reason(alone)
