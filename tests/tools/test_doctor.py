"""`sink-vllm doctor` finds what is wrong, says all of it, and tells by its exit code."""

import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from sink_vllm.tools import findings
from sink_vllm.tools.main import main
from tests.support.paths import ROOT

MODEL = str(ROOT / "examples" / "models" / "pystream-2.5m")


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """What the table says of each thing; wrong ones with ``!!`` in front."""
    rows: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if row := re.fullmatch(r"(ok|!!)  (\S.{23})(.+)", line):
            mark, what, found = row.groups()
            rows.setdefault(what.strip(), []).append(("!! " if mark == "!!" else "") + found)
    return rows


def test_an_installation_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", MODEL]) == 0
    rows = said(capsys)

    assert re.match(r"0\.3\d.*supported: ", rows["vLLM"][0])
    assert "workers" in rows["vllm.general_plugins"][0]
    number, all_of_them = re.findall(r"\d+", rows["changes of vLLM"][0])
    assert number == all_of_them != "0"
    assert rows["platform"] == ["cpu (CPU)"]
    assert rows["attention backend"] == ["CPU_ATTN"]
    assert rows["--kv-policy sink"] == ["accepted, capacity 256 tokens"]


def test_all_reasons_for_a_refusal_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The server would stop at the first."""
    words = ["--enable-prompt-embeds", "--kv-transfer-config"]
    connector = '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'

    assert main(["doctor", "--model", MODEL, *words, connector]) == 1
    reasons = said(capsys)["--kv-policy sink"]
    assert len(reasons) == 2
    assert all(reason.startswith("!! ") for reason in reasons)


def test_numbers_that_do_not_fit_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", MODEL, "--sink-window", "1000"]) == 1
    (reason,) = said(capsys)["--kv-policy sink"]
    assert reason.startswith("!! --sink-window=1000 makes a capacity")


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(tmp_path)]) == 1
    assert f"vLLM itself refuses {tmp_path}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "general", "endpoint", "code"),
    [
        (None, "loaded", "not loaded; VLLM_PLUGINS=sink_vllm", 0),
        ("sink_vllm", "loaded", "loaded in API server", 0),
        ("other", "!! VLLM_PLUGINS='other' leaves it out", "not loaded", 1),
    ],
)
def test_which_processes_load_the_plugin(
    variable: str | None,
    general: str,
    endpoint: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_PLUGINS", variable)

    assert main(["doctor"]) == code
    rows = said(capsys)
    assert rows["vllm.general_plugins"][0].startswith(general)
    assert rows["vllm.endpoint_plugins"][0].startswith(endpoint)


def test_another_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing more is looked at: the plugin stands aside there."""
    monkeypatch.setattr("vllm.__version__", "0.99.0")

    assert main(["doctor"]) == 1
    rows = said(capsys)
    assert "needs vLLM" in rows["vLLM"][0]
    assert "found vLLM 0.99.0" in rows["vLLM"][0]
    assert "platform" not in rows


def test_an_installation_without_entry_points(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkout on the path that nobody has installed: vLLM never finds the plugin."""

    def others(**_: str) -> EntryPoints:
        return EntryPoints([EntryPoint("other", "other:register", "vllm.general_plugins")])

    monkeypatch.setattr(findings, "entry_points", others)

    assert main(["doctor"]) == 1
    assert "no entry point; install sink-vllm again" in said(capsys)["vllm.general_plugins"][0]


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--sink-window", "9"])

    assert ended.value.code == 2
    assert "options of vllm serve need a model" in capsys.readouterr().err
