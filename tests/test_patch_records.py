"""Every patch has a record, every record a patch, and the records say what they must."""

import re
from pathlib import Path

import pytest

from sink_vllm.patches_declared import declared_patches
from sink_vllm.patching import Patch
from sink_vllm.plugin import supported_versions

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "patches").glob("[0-9]*.md"))
ROWS = (
    "Target",
    "Process",
    "vLLM versions",
    "How",
    "Upstream PR",
    "Remove when",
    "Guarded by",
)


def _rows(record: Path) -> dict[str, str]:
    """The table at the top of a record."""
    return dict(re.findall(r"^\| (\w[^|]*?) \| (.*?) \|$", record.read_text(), flags=re.M))


def _names(patches: tuple[Patch, ...]) -> list[str]:
    return [patch.record for patch in patches]


def test_records_are_the_declared_patches() -> None:
    assert sorted({path.stem for path in RECORDS}) == sorted(set(_names(declared_patches())))


def test_numbers_of_records_are_unique() -> None:
    numbers = [path.stem[:4] for path in RECORDS]

    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("patch", declared_patches(), ids=lambda p: p.target)
def test_record_names_the_target(patch: Patch) -> None:
    """A record may describe several patches that only make sense together."""
    record = ROOT / "patches" / f"{patch.record}.md"

    assert f"`{patch.target}`" in _rows(record)["Target"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_record_is_complete(record: Path) -> None:
    rows, text = _rows(record), record.read_text()

    assert [name for name in ROWS if not rows.get(name)] == []
    assert "**Why.**" in text
    assert "**Why not a seam.**" in text
    low, high = rows["vLLM versions"].removeprefix("all but ").split(",")
    assert {low, high} == set(supported_versions().split(","))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_guard_named_by_the_record_exists(record: Path) -> None:
    guards = re.findall(r"`(tests/\S+?\.py)::(\w+)`", _rows(record)["Guarded by"])

    assert guards
    for path, name in guards:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), flags=re.M), name


def test_index_lists_every_record() -> None:
    index = (ROOT / "patches" / "README.md").read_text()

    assert [path.name for path in RECORDS if f"({path.name})" not in index] == []
