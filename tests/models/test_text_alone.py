"""The text of a multimodal model, resumed: positions in sections follow a stream's rope offset."""

from pathlib import Path

import pytest

from tests.models.test_models import PROMPTS
from tests.support.engine import check_all_free, running_engine
from tests.support.families_media import MEDIA
from tests.support.family import write_family
from tests.support.judge import judge, random_tokens
from tests.support.oracle_hf import HFOracle


@pytest.mark.engine
def test_a_resent_conversation_is_resumed_exactly(tmp_path: Path) -> None:
    """Turns behind evictions start from cached pages, beside a stream that starts anew."""
    family = next(family for family in MEDIA if family.name == "Qwen2.5-VL")
    folder = write_family(tmp_path, family)
    oracle = HFOracle(folder)
    conversation = PROMPTS[1]

    with running_engine(
        folder, family.policy, enable_prefix_caching=True, **family.engine
    ) as engine:
        for turn in range(3):
            prompts = [conversation, random_tokens(20, turn)]
            answers = engine.greedy(prompts, 90)
            judge(oracle, family.policy, prompts, answers)
            assert answers[0].cached_tokens > (family.policy.capacity if turn else -1)
            conversation = [*conversation, *answers[0].tokens, *random_tokens(25, 50 + turn)]
        check_all_free(engine)
