"""Beside a vLLM that this release was not made for: stock, or one sentence with the flag."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.serving import Server
from sink_vllm.compat.versions import refusal_of
from tests.conftest import ModelFactory
from tests.support.other_vllm import VLLM, environment_of
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server  # all of them start processes of vLLM

OLDER, NEWER = "0.31.0", "0.34.0"
STANDS_ASIDE = "it stands aside"

# All that a user could ask of the policy, in one process because every process costs 15 seconds.
_ASK = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from sink_vllm.compat.changes import start_up_patches
from sink_vllm.plugin import register

def attempt(ask):
    try:
        return str(ask())
    except ValueError as error:
        return f"{type(error).__name__}: {error}"

parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
register()
def config_of(options):
    args = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, additional_config=options)
    return args.create_engine_config().scheduler_config.scheduler_cls
print(json.dumps({
    "patched": [patch.target for patch in start_up_patches() if patch.is_applied],
    "help": parser.format_help(),
    "flags": [attempt(lambda: parser.parse_args(words)) for words in (
        ["--kv-policy", "sink"], ["--kv_policy=sink"], ["--sink-tokens", "4"])],
    "full": vars(parser.parse_args(["--kv-policy", "full"])) == vars(parser.parse_args([])),
    "options": attempt(lambda: config_of({"kv_policy": "sink"})),
    "none": config_of({"other": 1}),
}))
"""


@pytest.fixture(scope="module")
def older(tiny_llama: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process beside ``OLDER`` answers, and its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(tiny_llama(TinyLlama()))],
        env=environment_of(OLDER, tmp_path_factory.mktemp("older")),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stdout + done.stderr}


def test_nothing_is_changed_and_one_warning_is_given(older: dict[str, Any]) -> None:
    assert older["none"] is None  # vLLM's own scheduler
    assert "--kv-policy" not in older["help"]
    assert older["full"]
    assert older["log"].count(STANDS_ASIDE) == 1
    assert f"found vLLM {OLDER}" in older["log"]
    # Two targets are shared with the patches that refuse the policy.
    assert older["patched"] == []


def test_flags_and_options_are_refused(older: dict[str, Any]) -> None:
    sentence = f"Refused: {refusal_of(OLDER)}"

    assert older["flags"] == [sentence] * 3
    assert older["options"] == sentence


def test_a_command_with_the_flag_ends_with_the_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [VLLM, "serve", "some/model", "--kv-policy", "sink"],
        env=environment_of(NEWER, tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"vllm serve: error: {refusal_of(NEWER)}"
    assert "Traceback" not in done.stdout + done.stderr


def test_a_server_without_the_flag_is_stock(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    model = tiny_llama(TinyLlama())
    flags = ["--dtype", "float32", "--enforce-eager", "--num-gpu-blocks-override", "64"]
    environment = environment_of(NEWER, tmp_path)
    with Server([str(model), "--served-model-name", "tiny", *flags], environment) as server:
        server.wait(lambda _: None)
        (card,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        body = {"model": "tiny", "prompt": [256, 97], "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        log = server.log.read_text()

    assert answer.status_code == 200
    assert card["max_model_len"] == TinyLlama().max_positions
    assert log.count(STANDS_ASIDE) == 1  # of API server, engine core and worker
    assert "Traceback" not in log
    assert "StreamingLLM" not in log
