"""What the documentation names exists: tests, files, options."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sink_vllm.policy.options import OPTION_KEYS, flag
from tests.support import claims
from tests.support.paths import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "patches").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_named_in_a_page_exist(page: Path) -> None:
    """An invariant is only as good as the test that pins it."""
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", page.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page: Path) -> None:
    """With their path in the repository, in the package, or beside the page."""
    if page.name in ("LOG.md", "claims.md"):
        return  # tells of files as they were; is compared as a whole
    for file in re.findall(r"`([\w/-]+\.py)\b", page.read_text()):
        above = (ROOT, ROOT / "sink_vllm", page.parent)
        found = any((folder / file).exists() for folder in above)
        assert found or any((ROOT / "sink_vllm").rglob(file)), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def _pages(nav: list[dict[str, Any]]) -> list[str]:
    """Of a navigation of MkDocs, in its order."""
    found: list[str] = []
    for entry in nav:
        for value in entry.values():
            found += [value] if isinstance(value, str) else _pages(value)
    return found


def test_the_site_has_every_page() -> None:
    """`make docs` checks links; a page that the navigation forgets would have none to it."""
    pages = _pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])

    assert len(set(pages)) == len(pages)
    assert [page for page in pages if not (ROOT / page).is_file()] == []
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(pages)


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
    folders = [ROOT]
    for line in tree.strip().splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth + 1 :]
        paths = [folders[-1] / name for name in names if "." in name or name.endswith("/")]
        assert paths, line
        assert all(path.exists() for path in paths), line
        folders.append(paths[0])


def test_readme_tree_names_every_room() -> None:
    """A new folder of the package, or module of its top level, gets its line."""
    text = (ROOT / "README.md").read_text()
    package = ROOT / "sink_vllm"
    rooms = {f"{path.parent.name}/" for path in package.rglob("*.py")} - {"sink_vllm/"}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}

    assert {name for name in rooms | modules if name not in text} == set()


def test_claims_are_those_of_the_tests() -> None:
    """Run ``python -m tests.support.claims > docs/claims.md`` when a module came, or says more.

    A claim that loses its test must leave the page by hand: look twice before it goes.
    """
    assert claims.PAGE.read_text() == claims.page()
