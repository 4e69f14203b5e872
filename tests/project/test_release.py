"""`make release-check` passes only with changelog, version, tag and wheel in order."""

import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from release import NotReady, build, check_changelog, check_tag, check_wheel, git, read_project
from tests.support.paths import ROOT

LOG = (ROOT / "CHANGELOG.md").read_text()
DATED = (
    "# Changelog\n\n## [1.2.0] - 2026-11-29\n\nvLLM: 7.1.0, and\n7.2.0\n\n- new\n\n## [1.1.0] - x\n"
)
RELEASES = ["7.1.0", "7.2.0"]


def test_a_changelog_in_order() -> None:
    assert check_changelog(DATED, "1.2.0", RELEASES, dated=True) == "1.2.0 of 2026-11-29"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("## [", "## ", "has no section"),
        ("[1.2.0]", "[1.2.1]", "begins with 1.2.1, and pyproject.toml says 1.2.0"),
        ("vLLM: ", "", "has no line `vLLM: …`"),
        ("7.2.0", "7.3.0", "does not say how vLLM 7.2.0 was tested"),
        ("- new", "", "says nothing of what is new"),
        ("2026-11-29", "unreleased", "has no date yet"),
        ("2026-11-29", "29.11.2026", "29.11.2026 is no date; use YYYY-MM-DD"),
    ],
)
def test_a_changelog_that_is_not(old: str, new: str, sentence: str) -> None:
    with pytest.raises(NotReady, match=sentence):
        check_changelog(DATED.replace(old, new), "1.2.0", RELEASES, dated=True)


def test_this_changelog_is_in_order() -> None:
    """But for the date, which it gets on the day of a release."""
    from environments.lines import read_lines

    releases = [line.version for line in read_lines().values()]
    assert check_changelog(LOG, read_project()["version"], releases, dated=False)


@pytest.mark.parametrize(
    ("tag", "dirty", "at", "sentence"),
    [
        ("1.2.0", "", "", "--tag 1.2.0 is not the version 1.2.0: use v1.2.0"),
        ("v1.2.0", " M README.md\n", "", "not committed: README.md"),
        ("v1.2.0", "", "b" * 40, "the tag v1.2.0 is at bbbbbbbbb, not at this commit aaaaaaaaa"),
    ],
)
def test_a_tag_that_is_not_in_order(tag: str, dirty: str, at: str, sentence: str) -> None:
    with pytest.raises(NotReady, match=sentence):
        check_tag(tag, "1.2.0", dirty=dirty, at=at, head="a" * 40)


def test_a_tag_in_order() -> None:
    assert check_tag("v1.2.0", "1.2.0", dirty="", at="", head="a" * 40) == "v1.2.0 is free"
    assert check_tag("v1.2.0", "1.2.0", dirty="", at="a" * 40, head="a" * 40).startswith(
        "v1.2.0 at"
    )


def changed(wheel: Path, folder: Path, edits: dict[str, str], add: str = "") -> Path:
    """The wheel with text replaced in its metadata, or a file more."""
    made = folder / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith((".dist-info/METADATA", ".dist-info/entry_points.txt")):
                text = content.decode()
                for before, after in edits.items():
                    text = text.replace(before, after)
                content = text.encode()
            new.writestr(name, content)
        if add:
            new.writestr(add, "")
    return made


def test_the_wheel_is_in_order(wheel: Path) -> None:
    package = tracked()
    assert check_wheel(wheel, read_project(), package).startswith(f"{len(package)} files")


def tracked() -> list[str]:
    return git("ls-files", "sink_vllm").splitlines()


@pytest.mark.parametrize(
    ("edits", "add", "sentence"),
    [
        ({}, "tests/test_a.py", "has, and git has not, tests/test_a.py"),
        ({"\nVersion: ": "\nVersion: 7."}, "", "is version 7"),
        ({"Provides-Extra: gpu\n": ""}, "", "has the extras bench, cpu"),
        ({'; extra == "gpu"': ""}, "", "brings or lacks vllm.* without an extra"),
        ({"Requires-Dist: wrapt": "Requires-Nothing: "}, "", "brings or lacks wrapt.* without"),
        ({"[vllm.endpoint_plugins]": "[other]"}, "", "no entry point of the group vllm.endpoint"),
    ],
)
def test_a_wheel_that_is_not_in_order(
    edits: dict[str, str], add: str, sentence: str, wheel: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotReady, match=sentence):
        check_wheel(changed(wheel, tmp_path, edits, add), read_project(), tracked())


def test_a_wheel_that_lacks_a_module(wheel: Path) -> None:
    with pytest.raises(NotReady, match=r"lacks sink_vllm/aaa\.py"):
        check_wheel(wheel, read_project(), [*tracked(), "sink_vllm/aaa.py"])


@pytest.mark.skipif(find_spec("build") is None, reason="build (`make release-check`) is not there")
def test_the_wheel_is_made_of_the_source_distribution(tmp_path: Path) -> None:
    archive, made = build(tmp_path / "dist")

    assert archive.name == f"sink_vllm-{read_project()['version']}.tar.gz"
    assert check_wheel(made, read_project(), tracked())


def test_a_missing_tool_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, which says of each check whether it holds, and ends with 1."""
    import release

    monkeypatch.setattr("sys.argv", ["release.py", "--tag", "v0", "--out", str(tmp_path)])
    monkeypatch.setattr("sys.executable", "/usr/bin/env")  # knows no modules
    assert release.main() == 1
    said = capsys.readouterr().out
    assert "!!  tag           --tag v0 is not the version" in said
    assert "!!  build         build failed:" in said
