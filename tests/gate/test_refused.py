"""How a start that is refused ends: a sentence, and nothing else where we have the last word."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from sink_vllm.gate import refused
from sink_vllm.gate.refused import Refused, refusals
from tests.support.other_vllm import VLLM
from tests.support.paths import ROOT

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 64,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 64,
    "vocab_size": 300,
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is ``vllm serve``, for the time of a test."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.delenv(refused._LAST_WORDS, raising=False)
    monkeypatch.setenv(refused._LAST_WORDS, "")  # so that the test's own is taken back
    monkeypatch.delenv(refused._LAST_WORDS)
    refused.end_with_the_sentence()
    refused.end_with_the_sentence()  # once per parser that vLLM builds
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve", "some/model"])


def uncaught(error: BaseException) -> None:
    sys.excepthook(type(error), error, error.__traceback__)


def refuse(sentence: str) -> None:
    """What an engine core does in a process of its own."""
    with refusals():
        raise ValueError(sentence)


def test_errors_of_ours_are_refusals() -> None:
    with pytest.raises(Refused, match=r"^no$"), refusals():
        raise ValueError("no")
    with pytest.raises(Refused, match=r"^not at all$"), refusals():
        raise Refused("not at all")
    with pytest.raises(TypeError), refusals():
        raise TypeError


@pytest.mark.usefixtures("command")
def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused) as error:
        refuse("no")

    uncaught(error.value)

    assert capsys.readouterr().err == "vllm serve: error: no\n"


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/bin/vllm", "bench", "latency", "--model", "m"], "vllm bench latency"),
        (["/bin/vllm", "run-batch", "-i", "f"], "vllm run-batch"),
        (["/lib/api_server.py", "--model", "m"], "api_server.py"),
    ],
)
def test_the_line_begins_with_the_command(
    argv: list[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", argv)

    uncaught(Refused("no"))

    assert capsys.readouterr().err == f"{name}: error: no\n"


@pytest.mark.usefixtures("command")
def test_other_errors_are_python_s(capsys: pytest.CaptureFixture[str]) -> None:
    uncaught(RuntimeError("something else"))

    text = capsys.readouterr().err
    assert "RuntimeError: something else" in text
    assert "vllm serve" not in text


@pytest.mark.usefixtures("command")
def test_the_sentence_of_another_process_comes_last(capfd: pytest.CaptureFixture[str]) -> None:
    """vLLM's own error in the command's process only says to look above."""
    process = multiprocessing.get_context("spawn").Process(target=refuse, args=("no",))
    process.start()
    process.join()

    uncaught(RuntimeError("Engine core initialization failed. See root cause above."))
    uncaught(RuntimeError("later"))

    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("vllm")] == ["vllm serve: error: no"]
    assert lines[-1] == "RuntimeError: later"
    assert lines.index("vllm serve: error: no") == 1 + lines.index(
        "RuntimeError: Engine core initialization failed. See root cause above."
    )


@pytest.mark.server
def test_a_server_that_is_refused_ends_without_a_traceback(tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text(json.dumps(GPT2))

    done = subprocess.run(
        [VLLM, "serve", str(tmp_path), "--kv-policy", "sink", "--skip-tokenizer-init"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )

    last = done.stderr.splitlines()[-1]
    assert last.startswith("vllm serve: error: --kv-policy sink cannot work with positions that")
    assert last.endswith("serve this model with --kv-policy full.")
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 1
