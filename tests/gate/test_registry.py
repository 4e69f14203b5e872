"""The gate answers for every generation architecture of vLLM, and the page about it is true."""

import pytest
import vllm

from sink_vllm.gate.refusals import REFUSALS
from tests.support.families import FAMILIES
from tests.support.paths import DOCS
from tests.support.registry_walk import Answer, architectures, markdown, walk
from tests.support.served_families import SERVED


@pytest.fixture(scope="module")
def answers() -> dict[str, Answer]:
    return {one.architecture: one for one in walk()}


@pytest.mark.slow  # imports all of vLLM's model classes
def test_the_page_says_what_the_gate_says(answers: dict[str, Answer]) -> None:
    assert answers.keys() == dict(architectures()).keys()
    if vllm.__version__.split("+")[0] not in (DOCS / "coverage.md").read_text():
        pytest.skip("the page is about another vLLM")
    assert (DOCS / "coverage.md").read_text() == markdown([*answers.values()], vllm.__version__)


@pytest.mark.slow
def test_served_families_are_what_their_table_says(answers: dict[str, Answer]) -> None:
    said = {(one.name, one.architecture): one.refused for one in SERVED}

    assert {(name, of): answers[of].row for name, of in said} == said


def test_served_families_name_what_exists() -> None:
    families = {family.name for family in FAMILIES}
    rows = {row.name for row in REFUSALS}
    known = dict(architectures())

    for one in SERVED:
        assert one.architecture in known
        assert one.tested is None or one.tested in families
        assert one.refused is None or one.refused in rows
        assert (one.refused is None) != (one.tested is None)
    assert len(SERVED) == 35
