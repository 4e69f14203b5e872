"""The examples do what they say, on the server that `make demo ARGS="--open"` starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from langchain_core.messages import BaseMessage, SystemMessage
from openai.types.chat import ChatCompletionMessageParam

from examples import agent, batch, endless_chat, langchain_chat, transcription
from examples.serving import FEW_PROCESSORS, ONE_PROCESS, for_few_processors
from tests.support.paths import ROOT

pytestmark = pytest.mark.server

MODEL = ROOT / "examples" / "models" / "pystream-2.5m"
CAPACITY, STRIDE = 256, 32  # of the repository's model
CODE = "def add(first, second):\n    return first + second\n\n\n"


class _Demo:
    """`make demo ARGS="--open"`, and what it has printed."""

    def __init__(self) -> None:
        words = [sys.executable, "-m", "examples.demo", "--open", "--times", "2", "--"]
        tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        # White space is free in JSON, and this model writes it for ever.
        grammar = {"backend": "xgrammar", "disable_any_whitespace": True}
        tools += ["--structured-outputs-config", json.dumps(grammar)]
        # Its own browser must not open where somebody runs the tests.
        outside = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
        outside["VLLM_ENFORCE_STRICT_TOOL_CALLING"] = "0"  # grammars that do not know that setting
        self._process = subprocess.Popen(
            [*words, *tools], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=outside
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        self.printed = ""
        for line in self._lines:
            self.printed += line
            if found := re.search(r"the page: (\S+)/streams#key=(\S+)", line):
                self.url, self.key = found.groups()
                return
        raise AssertionError(f"it ended: {self.printed}")

    def end(self) -> tuple[int, str]:
        """As Ctrl-C does; exit code and what it said."""
        self._process.send_signal(signal.SIGINT)
        said = self._lines.read()
        return self._process.wait(60), said


def test_the_demo_shows_what_it_is_there_to_show() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--times", "4"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )

    assert ran.returncode == 0, ran.stderr
    last = ran.stdout.splitlines()[-1]
    found = re.match(r"([\d,]+) tokens, 4 x the .* evictions of ([\d,]+) tokens; ", last)
    prompt = re.search(r"prompt of ([\d,]+) tokens", ran.stdout)
    assert found, last
    assert prompt
    heard, evicted, asked = (int(one.replace(",", "")) for one in (*found.groups(), prompt[1]))
    assert heard >= 4 * CAPACITY
    assert evicted > asked + heard - CAPACITY - STRIDE


@pytest.mark.parametrize(("processors", "own"), [(1, True), (4, True), (8, False), (None, True)])
def test_where_processors_are_few_the_server_is_one_process_less(
    monkeypatch: pytest.MonkeyPatch, processors: int | None, own: bool
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    assert ("VLLM_ENABLE_V1_MULTIPROCESSING" in for_few_processors()) == own
    for name in ONE_PROCESS:
        monkeypatch.setenv(name, "as the caller wants")
    assert for_few_processors() == {}


@pytest.mark.skipif((os.cpu_count() or 1) > FEW_PROCESSORS, reason="there are processors for it")
def test_the_demo_has_no_worker_of_its_own(demo: _Demo) -> None:
    names = [child.name() for child in psutil.Process(demo.pid).children(recursive=True)]

    assert any(name.startswith("VLLM::Engine") for name in names), names
    assert not any(name.startswith("VLLM::Worker") for name in names), names


@pytest.fixture(scope="module")
def demo() -> Iterator[_Demo]:
    demo = _Demo()
    yield demo
    code, said = demo.end()
    assert code == 130
    assert "stopping the server" in said


@pytest.fixture(scope="module")
def http(demo: _Demo) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {demo.key}"}
    with httpx.Client(base_url=demo.url, headers=headers, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def client(demo: _Demo) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo.url}/v1", api_key=demo.key, max_retries=0)


def test_the_demo_serves_the_page_with_a_stream_on_it(demo: _Demo, http: httpx.Client) -> None:
    """The address that it prints is the page's; the stream goes past the capacity by itself."""
    assert 'src="streams/page.js"' in httpx.get(f"{demo.url}/streams").text
    for _ in range(600):
        streams = http.get("/v1/streams").json()["data"]
        if streams and streams[0]["turns"]:
            break
        time.sleep(0.2)
    (stream,) = streams
    assert stream["metadata"] == {"name": "Python without end"}
    assert stream["evicted"] > 2 * CAPACITY


def test_endless_chat(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    """Resent turn by turn past the capacity; options reach the server, accounts come back."""
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": CODE}]
    accounts = []
    for _ in range(6):
        messages.append({"role": "user", "content": CODE})
        text, account = endless_chat.answer(
            client, "demo", messages, {"sink_pin": "system"}, max_tokens=40
        )
        messages.append({"role": "assistant", "content": text})
        accounts.append(account)
        assert text.strip() in capsys.readouterr().out

    assert accounts[0] == {}, "evicted too soon to show anything"
    assert accounts[-1]["evicted_tokens"] >= 2 * STRIDE
    with pytest.raises(openai.BadRequestError, match="sink_tokens=100000"):
        endless_chat.answer(client, "demo", messages, {"sink_tokens": 100_000})


def test_agent(client: openai.OpenAI) -> None:
    """Every turn is a call of the tool by its schema, long after the first turns are evicted."""
    asked: list[str] = []

    def read(sensor: str) -> str:
        asked.append(sensor)
        return f"{20 + len(asked)} degrees"

    turns = list(agent.turns(client, "demo", 12, read))

    assert [turn.sensor for turn in turns] == asked
    assert set(asked) <= set(agent.SENSORS)
    assert turns[0].evicted_tokens == 0
    assert turns[-1].evicted_tokens >= 2 * STRIDE


def test_transcription(http: httpx.Client) -> None:
    """Lines are computed as they come; a question computes itself and the rest of a page."""
    transcript = transcription.Transcript(http, "Answer from the transcript.")
    heard = [transcript.hear(f"At {minute} minutes: {CODE}") for minute in range(20)]
    text, usage = transcript.ask("What was said?", max_tokens=8)

    assert heard[0]["evicted"] == 0
    assert heard[-1]["evicted"] >= 2 * STRIDE
    assert heard[-1]["position"] == sum(
        after["position"] - before["position"]
        for before, after in zip([{"position": 0}, *heard], heard, strict=False)
    )
    assert text
    assert 0 < usage["generated_tokens"] <= 8
    assert usage["resumed_from"] == "cache"
    assert usage["computed_tokens"] <= usage["appended_tokens"] + 32
    transcript.close()


def test_langchain(demo: _Demo) -> None:
    """Its history grows past the capacity, and it neither cuts nor refuses it."""
    model = langchain_chat.chat(
        f"{demo.url}/v1", demo.key, {"sink_pin": "system"}, max_completion_tokens=20
    )
    history: list[BaseMessage] = [SystemMessage(CODE)]
    for _ in range(8):
        assert langchain_chat.turn(model, history, CODE)
    usage: Any = history[-1]
    assert usage.usage_metadata["input_tokens"] > CAPACITY


def test_batch(tmp_path: Path) -> None:
    """Prompts far longer than the context are answered; the account says what was evicted."""
    lines, answers = tmp_path / "batch.jsonl", tmp_path / "answers.jsonl"
    prompts = [CODE * 40, CODE]
    lines.write_text("\n".join(batch.requests(str(MODEL), prompts, max_tokens=8)) + "\n")
    batch.run(str(MODEL), lines, answers, ["--enforce-eager"])

    evicted = batch.evicted(answers)
    assert evicted["0"] > CAPACITY
    assert evicted["1"] == 0
