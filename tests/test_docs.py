"""What the documentation names exists: tests, files, options."""

import re
from pathlib import Path

import pytest

from sink_vllm.config import OPTION_KEYS, flag

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_named_in_a_page_exist(page: Path) -> None:
    """An invariant is only as good as the test that pins it."""
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_design_names_a_test_for_every_invariant() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| (\d) \|.*\|(.*)\|$", text, re.MULTILINE)

    assert [number for number, _ in rows] == list("12345678")
    assert all("`tests/" in tests for _, tests in rows)


def test_readme_lists_every_option() -> None:
    """The table of the README has one row per option, with its flag."""
    rows = re.findall(r"^\| `(--[\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)

    assert rows == [flag(key) for key in OPTION_KEYS]


def test_readme_tree_is_the_repository() -> None:
    """Every folder and file of the tree in the README exists."""
    tree = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT / names[0]
            assert folder.is_dir(), line
        else:
            paths = [name for name in names if "." in name or name.endswith("/")]
            assert all((folder / name).exists() for name in paths), line


def test_readme_tree_names_every_module() -> None:
    """A new module of the package's top level gets its line."""
    text = (ROOT / "README.md").read_text()
    modules = {path.name for path in (ROOT / "sink_vllm").glob("*.py")} - {"__init__.py"}

    assert {name for name in modules if name not in text} == set()
