"""`sink-vllm plan` says what a server says when it starts; it neither loads nor starts one."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.engine.arg_utils import EngineArgs

from examples.serving import Server
from sink_vllm.engine.sizing import Sizing
from sink_vllm.gate.refused import Refused
from sink_vllm.tools.main import main
from sink_vllm.tools.planning import Plan, engine_args, plan
from sink_vllm.tools.specs import outline_of
from tests.support.engine import running_engine
from tests.support.families import FAMILIES
from tests.support.family import Family, config_of, write_family

GIB = 2**30
QUICK = ("Llama 3.1", "Falcon-H1", "Gemma 4 E2B, E4B")
SLOW = (
    *("Gemma 3", "Mixtral", "DeepSeek-V3", "Qwen3", "Command R7B", "Granite 4 H"),
    *("Gemma 4 31B", "Gemma 4 26B-A4B", "Gemma 4, multimodal"),
)


def family(name: str) -> Family:
    return next(one for one in FAMILIES if one.name == name)


@pytest.mark.engine
@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_plan_equals_the_start_up_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers made without memory have the pages of the loaded ones: bytes, pages, streams."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    row = family(name)
    folder = write_family(tmp_path, row)
    args = {**row.engine, "num_gpu_blocks_override": None}

    planned = plan(
        EngineArgs(
            str(folder),
            enforce_eager=True,
            additional_config=row.policy.additional_config(),
            **args,
        ),
        kv_bytes=GIB,
    )
    with running_engine(folder, row.policy, guarded=False, **args) as engine:
        scheduler = engine.scheduler
        real = Sizing.of(scheduler.recycler.tables, scheduler.kv_cache_config)

    assert real.streams > 1
    assert planned.sizing == real
    assert planned.start_up_line == f"StreamingLLM: {real}"


def llama(folder: Path, positions: int) -> Path:
    """A configuration alone, of 1 KiB of keys and values per token."""
    config = config_of(family("Llama 3.1"))
    config.update(
        {
            "max_position_embeddings": positions,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "torch_dtype": "float16",
        }
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama"), 131072)


def planned(model: Path, *words: str, **memory: int) -> Plan:
    return plan(engine_args(str(model), words), **memory)


def test_arithmetic_of_a_long_model(long_model: Path) -> None:
    """By hand: 8,192 tokens by default, 64 pages of 128 tokens and one of sinks, 128 KiB each."""
    made = planned(long_model, "--dtype", "float16", kv_bytes=GIB, wanted=200)

    assert made.sizing.schedule.capacity == 8192
    assert made.longest == 131072
    assert made.sizing.stream_bytes == 65 * 128 * 1024
    assert made.sizing.streams == (GIB // (128 * 1024) - 1) // 65 == 126
    assert not made.fits
    advised = made.command
    assert "--sink-window 7932 --sink-stride 256 --max-num-seqs 200" in advised


def test_the_capacity_that_is_advised_fits(
    long_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(long_model), "--dtype", "float16", "--kv-memory", "1", "--streams", "200"]

    assert main(words) == 1
    said = capsys.readouterr().out
    advised = said.split("--capacity ")[1].split(",")[0]
    assert main([*words, "--capacity", advised]) == 0
    assert "200 streams         take" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sink-window", "200000"], "--sink-window=200000 makes a capacity"),
        (["--max-model-len", "200000"], "--max-model-len=200000 is above 131072"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_refused_ends_with_its_sentence(
    words: list[str], sentence: str, long_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(long_model), *words]) == 1
    assert f"sink-vllm plan: error: {sentence}" in capsys.readouterr().err


def test_a_model_that_vllm_does_not_know_ends_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuch"]}')

    assert main(["plan", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"sink-vllm plan: error: vLLM itself refuses {tmp_path}: " in said
    assert "NoSuch" in said
    assert "Traceback" not in said


def test_a_model_that_is_nowhere_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert main(["plan", "no-such/model"]) == 1
    said = capsys.readouterr().err
    assert "sink-vllm plan: error: vLLM itself refuses no-such/model: " in said


def test_arithmetic_of_a_split_model(long_model: Path) -> None:
    """By hand: one of two heads and one of two layers, so a quarter of 128 KiB per page."""
    words = ("--dtype", "float16", "--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")
    made = planned(long_model, *words, kv_bytes=GIB)

    assert made.split == (2, 2)
    assert made.sizing.stream_bytes == 65 * 32 * 1024
    assert made.sizing.streams == (GIB // (32 * 1024) - 1) // 65 == 504
    assert "--tensor-parallel-size 2 --pipeline-parallel-size 2" in made.command
    assert "workers             4; all sizes are of one" in made.lines()


@pytest.mark.slow
@pytest.mark.server
def test_a_split_model_equals_its_servers_line(tmp_path: Path) -> None:
    """Four workers, in two stages of unequal layers: what each of them holds, and what fits."""
    folder = write_family(tmp_path, family("Llama 3.1"))
    words = ["--dtype", "float32", "--enforce-eager"]
    words += ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"]
    made = planned(folder, *words, kv_bytes=GIB)

    said = {"VLLM_LOGGING_LEVEL": "INFO"}
    with Server([str(folder), "--kv-policy", "sink", *words], said) as server:
        server.wait(lambda _: None)
        (line,) = re.findall(r"StreamingLLM: sink tokens.*", server.log.read_text())
    assert made.start_up_line == line


def test_workers_of_other_kinds_are_refused() -> None:
    config = SimpleNamespace(world_size=4, tensor_parallel_size=2, pipeline_parallel_size=1)

    with pytest.raises(Refused, match=r"4 workers are more than --tensor-parallel-size"):
        outline_of(cast(Any, SimpleNamespace(parallel_config=config)))
