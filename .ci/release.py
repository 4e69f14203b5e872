#!/usr/bin/env python3
"""`make release-check`: is this checkout a release? Nothing is published, nor changed but `dist/`.

Looks at changelog, version and tag, builds the source distribution and from it the wheel, looks
into the wheel, and lets twine look at both. One line per check; exit code 0 if all hold.

    python .ci/release.py                 # before the changelog is dated
    python .ci/release.py --tag v0.1.0    # as the tag will be pushed: dated, committed, tagged here
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from datetime import date
from email.parser import Parser
from email.policy import compat32
from pathlib import Path
from typing import Any

from environments.lines import read_lines
from environments.steps import ROOT

PACKAGE = "sink_vllm"


class NotReady(Exception):
    """One sentence: what is not as a release has it."""


def read_project() -> dict[str, Any]:
    """The table ``[project]`` of pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def git(*words: str) -> str:
    """What git says; its own sentence where this is no checkout."""
    ran = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise NotReady(f"git {words[0]}: {ran.stderr.strip()}")
    return ran.stdout


def check_changelog(text: str, version: str, releases: list[str], *, dated: bool) -> str:
    """The newest section is the version's, has content, and names every vLLM it was tested with.

    Args:
        text: of CHANGELOG.md.
        version: of the package.
        releases: of vLLM, of all lines in pyproject.toml.
        dated: whether it has to have its date.

    Raises:
        NotReady: it is not.
    """
    found = re.search(r"^## \[(.+?)\] - (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise NotReady("CHANGELOG.md has no section `## [VERSION] - DATE`.")
    newest, when, said = found.groups()
    if newest != version:
        raise NotReady(f"CHANGELOG.md begins with {newest}, and pyproject.toml says {version}.")
    tested = re.search(r"^vLLM: (.+(?:\n\S.*)*)$", said, re.MULTILINE)
    if tested is None:
        raise NotReady(f"the section {newest} of CHANGELOG.md has no line `vLLM: …`.")
    if missing := [release for release in releases if release not in tested[1]]:
        raise NotReady(f"CHANGELOG.md does not say how vLLM {missing[0]} was tested.")
    if not re.search(r"^- \S", said, re.MULTILINE):
        raise NotReady(f"the section {newest} of CHANGELOG.md says nothing of what is new.")
    if when == "unreleased":
        if dated:
            raise NotReady(f"the section {newest} of CHANGELOG.md has no date yet.")
        return f"{newest}, no date yet"
    try:
        date.fromisoformat(when)
    except ValueError:
        raise NotReady(f"CHANGELOG.md: {when} is no date; use YYYY-MM-DD.") from None
    return f"{newest} of {when}"


def check_tag(tag: str, version: str, *, dirty: str, at: str, head: str) -> str:
    """The tag is the version's and names this commit, or nothing yet, and all is committed.

    Args:
        tag: that will be pushed.
        version: of the package.
        dirty: what `git status --porcelain` says.
        at: the commit that the tag names, empty if there is none.
        head: this commit.

    Raises:
        NotReady: it is not.
    """
    if tag != f"v{version}":
        raise NotReady(f"--tag {tag} is not the version {version}: use v{version}.")
    if dirty:
        raise NotReady(f"not committed: {dirty.split()[-1]}; commit or remove it.")
    if at and at != head:
        raise NotReady(f"the tag {tag} is at {at[:9]}, not at this commit {head[:9]}.")
    return f"{tag} at {head[:9]}" if at else f"{tag} is free"


def check_wheel(wheel: Path, project: dict[str, Any], tracked: list[str]) -> str:
    """The wheel has the package as committed and nothing else, and says what pyproject.toml says.

    Args:
        wheel: the file.
        project: table of pyproject.toml.
        tracked: the package's files in git.

    Raises:
        NotReady: it does not.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = archive.read(f"{folder}/METADATA").decode()
        points = archive.read(f"{folder}/entry_points.txt").decode()
    inside = {name for name in names if not name.startswith(f"{folder}/")}
    for what, files in (
        ("lacks", set(tracked) - inside),
        ("has, and git has not,", inside - set(tracked)),
    ):
        if files:
            raise NotReady(f"{wheel.name} {what} {min(files)}.")
    said = Parser(policy=compat32).parsestr(metadata)
    if said["Version"] != project["version"]:
        raise NotReady(f"{wheel.name} is version {said['Version']}, not {project['version']}.")
    extras = set(said.get_all("Provides-Extra") or ())
    if extras != set(project["optional-dependencies"]):
        raise NotReady(f"{wheel.name} has the extras {', '.join(sorted(extras))}.")
    wanted = said.get_all("Requires-Dist") or []
    always = {one for one in wanted if "extra ==" not in one}
    if wrong := always ^ set(project["dependencies"]):
        raise NotReady(f"{wheel.name} brings or lacks {min(wrong)} without an extra.")
    for group in ("console_scripts", *(g for g in project["entry-points"])):
        if f"[{group}]" not in points:
            raise NotReady(f"{wheel.name} has no entry point of the group {group}.")
    return f"{len(inside)} files, extras {', '.join(sorted(extras))}"


def build(folder: Path) -> tuple[Path, Path]:
    """Source distribution, and the wheel made of it, from the files that git has; into ``folder``.

    Raises:
        NotReady: `build` is missing, or fails.
    """
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, PACKAGE)
        for name in git("ls-files").splitlines():
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, source / name)
        shutil.rmtree(folder, ignore_errors=True)
        _tool("build", "--outdir", str(folder), str(source))
    (archive,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


def _tool(name: str, *words: str) -> None:
    ran = subprocess.run([sys.executable, "-m", name, *words], capture_output=True, text=True)
    if f"No module named {name}" in ran.stderr:
        raise NotReady(
            f"{name} is not installed: `make release-check`, or pip install '.[release]'."
        )
    if ran.returncode:
        end = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-12:])
        raise NotReady(f"{name} failed:\n{end}")


def checks(tag: str | None, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every check with its name; each raises NotReady, or says what it found."""
    project = read_project()
    version = project["version"]
    releases = [line.version for line in read_lines().values()]
    log = ROOT / "CHANGELOG.md"
    yield (
        "changelog",
        lambda: check_changelog(log.read_text(), version, releases, dated=tag is not None),
    )
    if tag is not None:
        yield (
            "tag",
            lambda: check_tag(
                tag,
                version,
                dirty=git("status", "--porcelain"),
                at=git("tag", "--list", tag) and git("rev-list", "-n", "1", tag).strip(),
                head=git("rev-parse", "HEAD").strip(),
            ),
        )
    made: list[Path] = []

    def built() -> str:
        made.extend(build(folder))
        return " and ".join(file.name for file in made)

    def contents() -> str:
        if not made:
            raise NotReady("there is none.")
        return check_wheel(made[-1], project, git("ls-files", PACKAGE).splitlines())

    def metadata() -> str:
        if not made:
            raise NotReady("there is nothing to look at.")
        _tool("twine", "check", "--strict", *map(str, made))
        return "passed"

    yield "build", built
    yield "wheel", contents
    yield "twine check", metadata


def main() -> int:
    """Run all checks; 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", help="that will be pushed: v and the version")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the files go")
    given = parser.parse_args()
    wrong = 0
    for name, check in checks(given.tag, given.out):
        try:
            mark, said = "ok", check()
        except NotReady as reason:
            mark, said = "!!", str(reason)
            wrong += 1
        print(f"{mark}  {name:<14}{said}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
