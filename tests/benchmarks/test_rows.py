"""Raw rows: plain while a benchmark runs, packed afterwards, the same to whoever reads them."""

import contextlib
import json
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import Results
from benchmarks.rows import PACK, Row, RowsError, main, names, pack, read, unpack, writing

ROWS: dict[str, list[Row]] = {
    "a.jsonl": [{"arm": "sink", "us": [1.5, 2.25]}, {"text": "ü\u2028\n", "none": None}],
    "a-1.jsonl": [{}],
    "b.jsonl": [],
}


def measured(folder: Path) -> dict[str, bytes]:
    """A run that has ended; what its files had in them."""
    for name, rows in ROWS.items():
        with writing(folder / name) as file:
            for row in rows:
                file.add(**row)
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_a_run_goes_on_behind_its_last_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n"')
    with writing(path, go_on=True) as file:
        assert read(tmp_path) == {"a.jsonl": [{"n": 1}, {"n": 2}]}
        file.add(n=3)

    assert read(tmp_path) == {"a.jsonl": [{"n": 1}, {"n": 2}, {"n": 3}]}


def test_packed_and_plain_rows_are_read_alike(tmp_path: Path) -> None:
    """In the order of the file names, which the tables are made in."""
    before = measured(tmp_path)
    plain = read(tmp_path)

    pack(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [PACK]
    assert read(tmp_path) == plain == ROWS
    assert list(read(tmp_path)) == list(plain) == sorted(ROWS)
    assert names(tmp_path) == set(ROWS)

    unpack(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd command is not installed")
def test_packed_rows_can_be_read_without_python(tmp_path: Path) -> None:
    measured(tmp_path)
    pack(tmp_path)

    shown = subprocess.run(["zstd", "-dc", str(tmp_path / PACK)], capture_output=True, check=True)

    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    crc = zlib.crc32(b"a-1.jsonl{}\n")
    assert lines[0] == {"file": "a-1.jsonl", "rows": 1, "crc32": crc}
    assert lines[1:2] + lines[3:5] == [*ROWS["a-1.jsonl"], *ROWS["a.jsonl"]]


def test_a_run_that_went_on_is_packed_again(tmp_path: Path) -> None:
    """New parts come to the packed ones; what was measured again takes the place of the old."""
    measured(tmp_path)
    pack(tmp_path)
    for name in ("b.jsonl", "c.jsonl"):
        with writing(tmp_path / name) as file:
            file.add(new=name)

    assert read(tmp_path)["b.jsonl"] == [{"new": "b.jsonl"}], "before it is packed, too"
    pack(tmp_path)
    pack(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [PACK]
    assert read(tmp_path) == ROWS | {name: [{"new": name}] for name in ("b.jsonl", "c.jsonl")}


@pytest.mark.parametrize("end", ['{"us": [1.5, ', '{"us": 1}'])
def test_rows_of_a_crash_are_kept_as_they_are(tmp_path: Path, end: str) -> None:
    before = measured(tmp_path)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(end)

    with pytest.raises(RowsError, match=r"a\.jsonl .* its run"):
        pack(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == set(before)
    assert (tmp_path / "a.jsonl").read_bytes() == before["a.jsonl"] + end.encode()


def test_a_damaged_file_is_not_read_as_other_rows(tmp_path: Path) -> None:
    """Cut off anywhere, and with a bit turned over: refused, or (in zstd's header) the same."""
    measured(tmp_path)
    pack(tmp_path)
    good = (tmp_path / PACK).read_bytes()
    cut = [good[:at] for at in range(len(good))]
    turned = [
        good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in range(len(good))
    ]

    for damaged in cut:
        (tmp_path / PACK).write_bytes(damaged)
        with pytest.raises(RowsError, match="take it from git again"):
            read(tmp_path)
    for damaged in turned:
        (tmp_path / PACK).write_bytes(damaged)
        with contextlib.suppress(RowsError):
            assert read(tmp_path) == ROWS


def test_a_benchmark_packs_when_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is on disk before the next is measured."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    results = Results("run", {})
    with results.rows("steps.jsonl") as rows:
        for number in range(3):
            rows.add(number=number)
            on_disk = (results.folder / "steps.jsonl").read_text().splitlines()
            assert [json.loads(line)["number"] for line in on_disk] == list(range(number + 1))

    results.summary({"holds": True})

    assert {path.name for path in results.folder.iterdir()} == {"meta.json", "summary.json", PACK}
    assert read(results.folder) == {"steps.jsonl": [{"number": n} for n in range(3)]}


def test_the_command_takes_folders_below_for_runs_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part").mkdir()
    before = [measured(folder) for folder in (tmp_path / "part", tmp_path)]

    assert main(["pack", str(tmp_path)]) == 0
    assert [path for path in tmp_path.rglob("*.jsonl*") if path.name != PACK] == []
    assert main(["unpack", str(tmp_path)]) == 0
    assert (tmp_path / "part" / "a.jsonl").read_bytes() == before[0]["a.jsonl"]

    (tmp_path / "part" / "a.jsonl").write_text("no row\n")
    assert main(["pack", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("rows: ")
