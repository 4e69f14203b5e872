"""`make drift`: what became of a symbol in another release of vLLM."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from patches.drift.__main__ import NOTHING_TO_COMPARE, exit_code, main
from patches.drift.accepted import Accepted, read_accepted
from patches.drift.compare import State, table
from patches.drift.fetch import Files, installed, read_archive, release
from patches.drift.seams import Kind, Phrases, Place, Seam, Symbol
from patches.drift.tree import Tree
from tests.support.paths import ROOT

SOURCE = '''
class Base:
    limit = 1

    def inherited(self):
        return 0


class Engine(Base):
    """Runs."""

    def __init__(self, config, log=None):
        self._state = {}

    def step(self, tokens):
        """One step."""
        return tokens + 1
'''
STEP = Symbol.of("vllm.engine:Engine.step")


def _tree(source: str) -> Tree:
    return Tree({"vllm/__init__.py": b"", "vllm/engine.py": source.encode()})


def _state(kind: Kind, symbol: str, old: str, new: str) -> tuple[State, str]:
    assert old in SOURCE
    seam = Seam(kind, Symbol.of(symbol), (Place("sink_vllm/a.py", 1),))
    [row] = table([seam], _tree(SOURCE), _tree(SOURCE.replace(old, new)))
    return row.state, row.note


@pytest.mark.parametrize(
    ("kind", "path", "old", "new", "state"),
    [
        (Kind.OVERRIDE, "Engine.step", "tokens + 1", "tokens + 1  # why", State.UNCHANGED),
        (Kind.OVERRIDE, "Engine.step", '"""One step."""', '"""A step."""', State.UNCHANGED),
        (Kind.OVERRIDE, "Engine.step", "tokens + 1", "tokens + 2", State.BODY),
        (Kind.OVERRIDE, "Engine.step", "tokens):", "tokens, log=None):", State.SIGNATURE),
        (Kind.OVERRIDE, "Engine.step", "def step", "async def step", State.SIGNATURE),
        (Kind.OVERRIDE, "Engine.step", "def step", "def run", State.GONE),
        (Kind.OVERRIDE, "Engine.inherited", "(Base)", "", State.GONE),
        (Kind.OVERRIDE, "Engine.limit", "limit = 1", "limit = 2", State.BODY),
        (Kind.PRIVATE, "Engine._state", "_state = {}", "_state = []", State.BODY),
        (Kind.PRIVATE, "Engine._state", "_state = {}", "_states = {}", State.GONE),
        # We call it: what may be left out does not matter, nor what it does.
        (Kind.PUBLIC, "Engine.step", "tokens):", "tokens, log=None):", State.UNCHANGED),
        (Kind.PUBLIC, "Engine.step", "tokens + 1", "tokens + 2", State.UNCHANGED),
        (Kind.PUBLIC, "Engine.step", "tokens):", "tokens, log):", State.SIGNATURE),
        (Kind.PUBLIC, "Engine.step", "tokens):", "token):", State.SIGNATURE),
        (Kind.IMPORT, "Engine", "log=None", "log=None, name=None", State.UNCHANGED),
        (Kind.IMPORT, "Engine", "config, log", "config, name, log", State.SIGNATURE),
        (Kind.IMPORT, "Engine", "class Engine", "class Motor", State.GONE),
        # Its place is taken: whoever is made of more is another thing.
        (Kind.SWAP, "Engine", "tokens + 1", "tokens + 2", State.UNCHANGED),
        (Kind.SWAP, "Engine", "_state = {}", "_state = []", State.BODY),
        (Kind.SWAP, "Engine", '"""Runs."""', '__slots__ = ("_state",)', State.SIGNATURE),
        # A name of ours that vLLM begins to use.
        (Kind.OWN, "Engine._stream", "_state = {}", "_state = {}", State.UNCHANGED),
        (Kind.OWN, "Engine._stream", "_state = {}", "_stream = {}", State.SIGNATURE),
    ],
)
def test_ranks(kind: Kind, path: str, old: str, new: str, state: State) -> None:
    assert _state(kind, f"vllm.engine:{path}", old, new)[0] is state


def test_a_renamed_method_is_found_with_its_new_name() -> None:
    assert _state(Kind.OVERRIDE, str(STEP), "def step", "def one_step") == (
        State.GONE,
        "resembles one_step, which is new",
    )


def test_a_method_that_moved_to_a_base_is_still_there() -> None:
    step = SOURCE[SOURCE.index("    def step") :]
    moved = SOURCE.replace(step, "").replace("class Base:", f"class Base:\n{step}    more = 2\n")
    [row] = table([Seam(Kind.OVERRIDE, STEP, ())], _tree(SOURCE), _tree(moved))

    assert row.state is State.UNCHANGED
    assert row.note == "now in vllm.engine:Base.step"


def test_the_change_of_the_signature_comes_first() -> None:
    new = SOURCE.replace("tokens):", "tokens, log):").replace("tokens + 1", "tokens + 2")
    [row] = table([Seam(Kind.OVERRIDE, STEP, ())], _tree(SOURCE), _tree(new))
    lines = row.diff.splitlines()

    assert "+def step(self, tokens, log)" in lines
    assert lines.index("+def step(self, tokens, log)") < lines.index("+    return tokens + 2")


@pytest.mark.parametrize(
    ("phrases", "new", "state"),
    [
        (Phrases(present=frozenset({"return tokens"})), "tokens + 2", State.UNCHANGED),
        (Phrases(present=frozenset({"tokens + 1"})), "tokens + 2", State.BODY),
        (Phrases(frozenset({"return"}), absent=frozenset({"log"})), "log(tokens)", State.BODY),
        (Phrases(counted=frozenset({"tokens"})), "tokens + tokens", State.BODY),
        (Phrases(), "tokens + 2", State.BODY),  # it takes the source apart in its own way
    ],
)
def test_a_guard_fears_for_what_it_looks_for(phrases: Phrases, new: str, state: State) -> None:
    seam = Seam(Kind.GUARD, STEP, (), phrases=phrases)
    [row] = table([seam], _tree(SOURCE), _tree(SOURCE.replace("tokens + 1", new)))

    assert row.state is state


def test_what_was_read_is_clean_until_it_changes_again() -> None:
    seam = Seam(Kind.OVERRIDE, STEP, ())
    read, again = (_tree(SOURCE.replace("tokens + 1", f"tokens + {n}")) for n in (2, 3))
    [row] = table([seam], _tree(SOURCE), read)
    accepted = [Accepted(STEP, "0.2", row.digest, "adds two")]
    clean = table([seam], _tree(SOURCE), read, accepted)

    assert [one.state for one in clean] == [State.ACCEPTED]
    assert exit_code(clean) == 0
    assert exit_code(table([seam], _tree(SOURCE), again, accepted)) == 1


@pytest.mark.parametrize("missing", ["why", "version"])
def test_an_entry_without_a_reason_is_refused(tmp_path: Path, missing: str) -> None:
    keys = {"symbol": "vllm.engine:Engine.step", "version": "1", "source": "ab", "why": "because"}
    lines = [f'{key} = "{"" if key == missing else text}"' for key, text in keys.items()]
    path = tmp_path / "accepted.toml"
    path.write_text("\n".join(["[[accepted]]", *lines]))

    with pytest.raises(ValueError, match=r"accepted.toml: entry 1 \(vllm.engine:Engine.step\)"):
        read_accepted(path)


def _write(files: Files, folder: Path) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def test_a_planted_drift_is_found_by_name(tmp_path: Path) -> None:
    """A copy of the wheel's Python files in which one method has another name, and nothing else."""
    files = installed()[1]
    scheduler = "vllm/v1/core/sched/scheduler.py"
    renamed = files[scheduler].replace(b"def _preempt_request(", b"def _preempt_one_request(")
    assert renamed != files[scheduler]
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        for name, text in {**files, scheduler: renamed}.items():
            wheel.writestr(name, text)

    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from patches.drift.__main__ import main; code = main(sys.argv[1:])\n"
            "assert 'vllm' not in sys.modules and 'torch' not in sys.modules; sys.exit(code)",
            str(tmp_path / "vllm.whl"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    rows = [line for line in ran.stdout.splitlines() if re.match(r"  \S.*vllm\.", line)]
    [row] = [line for line in rows if not line.startswith("  unchanged ")]

    assert (ran.returncode, ran.stderr) == (2, "")
    assert len(rows) > 500
    assert row.split()[:2] == ["gone", "vllm.v1.core.sched.scheduler:Scheduler._preempt_request"]
    assert "sink_vllm/" in row
    assert "resembles _preempt_one_request, which is new" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "drift: the following arguments are required: VLLM"),
        (["newest"], "drift: VLLM=newest is neither a version such as 0.33.0 nor the path"),
        (["{tmp}"], "holds no folder `vllm`"),
        (["{tmp}/text.whl"], "text.whl is neither a wheel nor an sdist."),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.whl").write_text("no archive")
    try:
        code = main([one.format(tmp=tmp_path) for one in arguments])
    except SystemExit as ended:
        code = int(str(ended.code))

    assert code == NOTHING_TO_COMPARE
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1


def test_archives_are_read_without_what_is_not_python(tmp_path: Path) -> None:
    _write(
        {"vllm/__init__.py": b"a = 1", "vllm/_C.so": b"\0", "tests/t.py": b""},
        tmp_path / "vllm-1.0",
    )
    files = {"vllm/__init__.py": b"a = 1"}
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        for path in sorted((tmp_path / "vllm-1.0").rglob("*.*")):
            wheel.write(path, path.relative_to(tmp_path / "vllm-1.0"))
    with tarfile.open(tmp_path / "vllm.tar.gz", "w:gz") as sdist:
        sdist.add(tmp_path / "vllm-1.0", "vllm-1.0")

    assert read_archive(tmp_path / "vllm.whl") == files
    assert read_archive(tmp_path / "vllm.tar.gz") == files
    assert release(str(tmp_path / "vllm-1.0")) == ("vllm-1.0", files)


def test_a_fetched_release_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pip out of reach, the Python files kept from the first time are enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    kept = tmp_path / "sink_vllm" / "drift" / "vllm-7.8.9.zip"
    kept.parent.mkdir(parents=True)
    with zipfile.ZipFile(kept, "w") as archive:
        archive.writestr("vllm/__init__.py", "a = 1")

    assert release("7.8.9") == ("7.8.9", {"vllm/__init__.py": b"a = 1"})
    assert main(["7.8.8"]) == NOTHING_TO_COMPARE
