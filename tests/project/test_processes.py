"""Process trees are seen as a whole, and processes that end meanwhile are no error."""

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from examples.processes import family, rss, titled

PARENT = """
import subprocess, sys
children = [subprocess.Popen([sys.executable, "-c", "input()", f"child-{n}"]) for n in range(2)]
print("started", flush=True)
input()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process with two children; all three wait for their input to end."""
    command = [sys.executable, "-c", PARENT, "the-parent"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        try:
            yield process
        finally:
            for one in family(process.pid):
                one.kill()


def test_a_family_is_a_process_and_all_below_it(parent: subprocess.Popen[str]) -> None:
    first, *children = family(parent.pid)

    assert first.pid == parent.pid
    assert [child.cmdline()[-1] for child in children] == ["child-0", "child-1"]
    assert {first, *children} <= set(family())


def test_processes_are_found_below_a_process_by_their_title(
    parent: subprocess.Popen[str],
) -> None:
    assert [p.cmdline()[-1] for p in titled("child-", parent.pid)] == ["child-0", "child-1"]
    assert [p.cmdline()[-1] for p in titled("child-1")] == ["child-1"]
    assert titled("the-parent", parent.pid) == []
    assert [p.pid for p in titled("the-parent")] == [parent.pid]


def test_memory_is_of_those_that_are_still_there(parent: subprocess.Popen[str]) -> None:
    processes = family(parent.pid)
    before = rss(processes)
    assert [int(name.rpartition(":")[2]) for name in before] == [p.pid for p in processes]
    assert min(before.values()) > 1_000_000

    for process in processes:
        process.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, (p.pid for p in processes))) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert family(parent.pid) == []
    assert rss(processes) == {}
