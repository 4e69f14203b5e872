"""What the tests claim, folder by folder: ``python -m tests.support.claims > docs/claims.md``.

A row is a module: its claim is the first sentence of its docstring.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "claims.md"
_HEAD = """# What the tests claim

One row per test module: the claim it is there for, and how many test functions hold it (many run
with several parameters). Made by `python -m tests.support.claims`. A test fails when this page
differs: a claim that loses its test must leave this page by hand.
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """One test module."""

    path: Path
    """Relative to the repository."""
    text: str
    tests: int

    @classmethod
    def of(cls, file: Path) -> "Claim":
        """
        Raises:
            ValueError: the module does not say what it claims.
        """
        tree = ast.parse(file.read_text())
        said = ast.get_docstring(tree)
        if not said:
            raise ValueError(f"{file.relative_to(ROOT)} has no docstring: what does it claim?")
        paragraph = " ".join(said.split("\n\n")[0].split())
        sentence = re.split(r"(?<=[.!?]) ", paragraph)[0].rstrip(":")
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        tests = sum(node.name.startswith("test_") for node in functions)
        return cls(file.relative_to(ROOT), sentence.replace("``", "`").replace("|", r"\|"), tests)


def claims() -> Iterator[Claim]:
    """All modules, in the order of their paths."""
    return map(Claim.of, sorted((ROOT / "tests").rglob("test_*.py")))


def page() -> str:
    lines, folder = [_HEAD], None
    for claim in claims():
        if claim.path.parent != folder:
            folder = claim.path.parent
            lines.append(f"\n## {folder}\n\n| Claim | Module | Tests |\n|---|---|---:|\n")
        lines.append(f"| {claim.text} | `{claim.path.relative_to(folder)}` | {claim.tests} |\n")
    return "".join(lines)


if __name__ == "__main__":
    print(page(), end="")
