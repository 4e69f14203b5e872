"""The changes offered to vLLM (``patches/upstream``) apply to 0.33, and do what their texts say."""

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ModelFactory
from tests.support.newest_vllm import PYTHON, apply, copy_changed_files, overlay
from tests.support.paths import ROOT
from tests.support.tiny_models import TinyLlama

FOLDER = ROOT / "patches" / "upstream"
DIFFS = sorted(FOLDER.glob("[0-9]*.diff"))


def test_every_change_has_its_text_and_its_line_in_the_index() -> None:
    index = (FOLDER / "README.md").read_text()

    assert len(DIFFS) >= 5
    assert [path.stem for path in sorted(FOLDER.glob("[0-9]*.md"))] == [d.stem for d in DIFFS]
    assert [diff.name for diff in DIFFS if f"({diff.stem}.md)" not in index] == []


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_a_change_names_what_it_makes_superfluous(diff: Path) -> None:
    text = diff.with_suffix(".md").read_text()
    removes = re.search(r"\*\*Removes here:\*\*(.*?)\n\n", text, re.DOTALL)

    assert removes
    for record in re.findall(r"`(\d{4}-[\w-]+)`", removes[1]):
        assert (ROOT / "patches" / f"{record}.md").exists(), record
    assert "## Purpose" in text
    assert "## Test plan" in text


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_a_change_applies_by_itself(diff: Path, tmp_path: Path) -> None:
    changed = copy_changed_files([diff], tmp_path)
    before = {path: (tmp_path / path).read_text() for path in changed}

    apply(diff, tmp_path)

    for path in changed:
        after = (tmp_path / path).read_text()
        assert after != before[path]
        ast.parse(after)


def test_a_change_that_does_not_fit_is_noticed(tmp_path: Path) -> None:
    changed = copy_changed_files(DIFFS[:1], tmp_path)
    for path in changed:
        (tmp_path / path).write_text("# another vLLM\n")

    with pytest.raises(AssertionError, match="patch failed"):
        apply(DIFFS[0], tmp_path)


@pytest.fixture(scope="module")
def happened(tiny_llama: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a stock engine with all changes did with classes of the test's own."""
    environment = overlay(DIFFS, tmp_path_factory.mktemp("changed"))
    environment |= {
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # to see into the engine core
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    done = subprocess.run(
        [PYTHON, "-m", "tests.support.upstream_job", tiny_llama(TinyLlama(max_positions=128))],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.engine
def test_0001_every_class_of_the_output_processor_can_be_chosen(happened: dict[str, Any]) -> None:
    """With this no class of an object has to be swapped (record 0043)."""
    assert happened["seen"]["state"] == ["OwnState", "OwnDetokenizer"]
    assert "must be a subclass of OutputProcessor" in happened["another class"]
    assert happened["tokens"] == 3


@pytest.mark.engine
def test_0002_the_scheduler_hashes_and_prepares_requests(happened: dict[str, Any]) -> None:
    """With this nothing of the engine core's input thread has to be replaced (record 0023)."""
    [[tokens, hashes]] = happened["seen"]["prepared"]

    assert tokens == 40
    assert hashes > 0, "it is prepared when it has been hashed"
    assert happened["seen"]["hashed"] > 0


@pytest.mark.engine
def test_0003_numbers_of_a_scheduler_reach_a_logger_that_is_wanted(
    happened: dict[str, Any],
) -> None:
    assert happened["wire"] == {"evictions": 3}
    assert happened["seen"]["logged"] == {"evictions": 3}


@pytest.mark.engine
def test_0004_a_request_may_be_longer_or_shorter_than_the_engine_s_length(
    happened: dict[str, Any],
) -> None:
    assert "custom scheduler_cls" in happened["longer without a scheduler"]
    assert happened["lengths"] == [2**31 - 1 - 10, 2**31 - 1 - 640]
    assert "longer than the maximum model length of 8" in happened["shorter"]
    assert happened["unset"][0] == 64 - 10
    assert "longer than the maximum model length of 64" in happened["unset"][1]


@pytest.mark.engine
def test_0005_a_cpu_worker_makes_one_runner(happened: dict[str, Any]) -> None:
    """With this ``StreamingLLMCPUWorker.init_device`` can go: the first runner is the right one."""
    assert happened["seen"]["runners"] == 1
