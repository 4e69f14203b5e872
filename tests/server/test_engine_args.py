"""From options to a finished ``VllmConfig``, through vLLM's real ``create_engine_config``.

Models are configuration files only: nothing here loads weights or starts an engine.
"""

import copy
import inspect
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from vllm.config import (
    KVTransferConfig,
    VllmConfig,
    get_layers_from_vllm_config,
    set_current_vllm_config,
)
from vllm.config.watermarking import WatermarkConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.selector import _cached_get_attn_backend, get_attn_backend

from sink_vllm.compat.shipping import ShippedConfig
from sink_vllm.gate.facts import Facts, facts_of
from sink_vllm.gate.model_facts import model_facts
from sink_vllm.plugin import register
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.schedule import Schedule
from sink_vllm.server import engine_args as ours
from sink_vllm.server.block_size import settled_block_size
from tests.support.fp8 import HAS_KERNELS

OF_THIS_CPU: dict[str, Any] = {
    "cpu_has_fp8_kernels": HAS_KERNELS,
    "cpu_has_bf16_convolutions": torch.cpu._is_avx512_bf16_supported(),
    "prefix_caching": True,  # vLLM's default
}

TRAINED = 512
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": TRAINED,
    "dtype": "float32",
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 64,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": TRAINED,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",
}
SINK = {"kv_policy": "sink"}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write(tmp_path / "llama", LLAMA)


class LargePages(CPUAttentionBackend):
    """A backend of pages of 128 tokens and no other size, as FlashAttention 4 is in places."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [128]


class AnyPages(CPUAttentionBackend):
    """Multiples of 16, like most backends of GPUs."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's platform as it is for GPUs, as far as block sizes go.

    The backend with large pages is the first choice, and ruled out by a block size that does not
    fit it, which a user may have named.
    """

    def backend_of(cls: Any, selected: Any, attn_selector_config: Any, num_heads: Any) -> str:
        fits = LargePages.supports_block_size(attn_selector_config.block_size)
        return f"{__name__}.{(LargePages if fits else AnyPages).__name__}"

    def check(vllm_config: VllmConfig) -> None:
        block_size = vllm_config.cache_config.block_size
        checked(vllm_config)
        vllm_config.cache_config.block_size = block_size

    checked = CpuPlatform.check_and_update_config
    settle = Platform.__dict__["update_block_size_for_backend"]
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check))
    monkeypatch.setattr(CpuPlatform, "update_block_size_for_backend", settle)
    monkeypatch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(backend_of))
    monkeypatch.setattr(CpuPlatform, "is_cpu", lambda self: False)
    _cached_get_attn_backend.cache_clear()
    yield
    _cached_get_attn_backend.cache_clear()


def write(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def engine_args(model: str, options: dict[str, Any] = SINK, **settings: Any) -> EngineArgs:
    return EngineArgs(
        model=model, skip_tokenizer_init=True, additional_config=dict(options), **settings
    )


def build(model: str, options: dict[str, Any] = SINK, **settings: Any) -> VllmConfig:
    return engine_args(model, options, **settings).create_engine_config()


def test_finished_configuration_is_the_policy(model: str) -> None:
    config = build(model, SINK | {"sink_tokens": 8, "sink_window": 200, "sink_stride": 64})

    assert config.model_config.max_model_len == 8 + 200 + 64 + 1
    assert config.cache_config.block_size == 32
    assert config.scheduler_config.scheduler_cls == ours.SCHEDULER
    assert config.parallel_config.worker_cls == ours.CPU_WORKER
    assert SinkConfig.of(config) == SinkConfig(
        schedule=Schedule(sink_tokens=8, window=200, stride=64), block_size=32
    )


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize(
    ("options", "settings", "block_size", "stride", "window"),
    [
        ({}, {}, 128, 128, TRAINED - 4 - 128),
        ({"sink_window": 100}, {}, 128, 128, 100),
        ({"sink_stride": 256}, {}, 128, 256, TRAINED - 4 - 256),
        ({"sink_window": 100}, {"block_size": 16}, 16, 16, 100),
        ({}, {"block_size": 64}, 64, 64, TRAINED - 4 - 64),
    ],
    ids=["all of the model", "window", "stride", "block size", "larger block size"],
)
def test_stride_follows_the_pages_of_the_backend(
    model: str,
    options: dict[str, Any],
    settings: dict[str, Any],
    block_size: int,
    stride: int,
    window: int,
) -> None:
    """vLLM chooses the backend as without the policy, and the workers find what was foreseen."""
    given = engine_args(model, SINK | options, **settings)
    before = copy.copy(given.block_size)
    config = given.create_engine_config()

    assert SinkConfig.of(config) == SinkConfig(
        schedule=Schedule(sink_tokens=4, window=window, stride=stride), block_size=block_size
    )
    assert config.model_config.max_model_len == 4 + window + stride + 1
    assert config.cache_config.user_specified_block_size == ("block_size" in settings)
    assert given.block_size == before
    with set_current_vllm_config(config):
        backend = get_attn_backend(32, torch.float32, "auto")
    assert backend.__name__ == ("AnyPages" if settings else "LargePages")
    assert settled_block_size(config) == block_size


@pytest.mark.usefixtures("like_a_gpu")
def test_a_stride_that_the_backend_cannot_take_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"^--sink-stride=64 is not a multiple .* 128; use 128"):
        build(model, SINK | {"sink_stride": 64})

    assert build(model, SINK | {"sink_stride": 64}, block_size=64).cache_config.block_size == 64


def test_pages_that_were_not_foreseen_are_refused(model: str) -> None:
    """By every process that reads the policy, the workers first: they know the model's layers."""
    config = build(model, SINK | {"sink_stride": 64})
    config.cache_config.block_size = 32
    assert SinkConfig.of(config) is not None

    config.cache_config.block_size = 128

    with pytest.raises(ValueError, match=r"^--sink-stride=64 .* 128 .*; use --sink-stride 128, or"):
        SinkConfig.of(config)


def test_guard_vllm_settles_block_sizes_by_the_layers() -> None:
    """Its function, and the place where layers are found, of which we give it stand-ins."""
    settle = inspect.getsource(Platform.update_block_size_for_backend)
    assert "cls._find_non_ssm_backends(vllm_config)" in settle
    assert "if not cache_config.user_specified_block_size:" in settle
    find = inspect.getsource(Platform._find_non_ssm_backends)
    assert "get_layers_from_vllm_config(" in find
    assert "static_forward_context" in inspect.getsource(get_layers_from_vllm_config)


def test_scheduler_and_worker_that_are_named_exist() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    assert callable(resolve_obj_by_qualname(ours.SCHEDULER))
    assert isinstance(resolve_obj_by_qualname(ours.CPU_WORKER), type)


@pytest.mark.parametrize(
    ("options", "max_model_len", "capacity"),
    [
        ({}, None, TRAINED),
        ({}, 256, 256),
        ({"sink_window": 100}, None, 4 + 100 + 32),
        ({"sink_window": 100, "sink_stride": 96}, 512, 4 + 100 + 96),
        ({"sink_tokens": 0, "sink_stride": 128}, None, TRAINED),
    ],
    ids=["all of the model", "all of --max-model-len", "window", "window below the limit", "S=0"],
)
def test_capacity(
    model: str, options: dict[str, Any], max_model_len: int | None, capacity: int
) -> None:
    config = build(model, SINK | options, max_model_len=max_model_len)

    assert config.model_config.max_model_len == capacity + 1
    policy = SinkConfig.of(config)
    assert policy is not None
    assert policy.capacity == capacity


@pytest.mark.parametrize(
    ("options", "settings", "block_size"),
    [
        ({}, {}, 64),  # 128 would leave 4 blocks per stream
        ({"sink_window": 200}, {}, 32),
        ({"sink_window": 300, "sink_stride": 160}, {}, 32),  # 64 does not divide the stride
        ({"sink_stride": 128}, {}, 64),
        ({"sink_window": 20, "sink_stride": 32}, {}, 32),
        ({}, {"max_model_len": 100}, 32),
        ({"sink_window": 200}, {"block_size": 128}, 128),  # the user's own
    ],
)
def test_block_size(
    model: str, options: dict[str, Any], settings: dict[str, Any], block_size: int
) -> None:
    config = build(model, SINK | options, **settings)

    policy = SinkConfig.of(config)
    assert policy is not None
    assert config.cache_config.block_size == policy.block_size == block_size
    assert policy.schedule.stride % block_size == 0


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("sink_window", 100_000, r"^--sink-window=100000 .* use a window of (\d+) or less\.$"),
        ("sink_stride", 5, r"^--sink-stride=5 is not a multiple of .* size 32; use (32)\.$"),
        ("sink_stride", 100_000, r"^--sink-stride=100000 leaves no window .* use (\d+) or less"),
        ("sink_tokens", 100_000, r"^--sink-tokens=100000 leaves no window .* use (\d+) or fewer"),
    ],
)
def test_advice_is_accepted(model: str, option: str, value: int, sentence: str) -> None:
    """Also where the block size is chosen: only for the options that were given."""
    with pytest.raises(ValueError, match=sentence) as error:
        build(model, SINK | {option: value})

    found = re.match(sentence, str(error.value))
    assert found is not None
    policy = SinkConfig.of(build(model, SINK | {option: int(found[1])}))
    assert policy is not None
    assert policy.as_additional_config()[option] == int(found[1])


def test_arguments_are_the_users_own_afterwards(model: str) -> None:
    args = engine_args(model, SINK | {"other": 1}, max_model_len=300)
    watched = ("max_model_len", "block_size", "scheduler_cls", "worker_cls", "additional_config")
    before = {name: copy.deepcopy(getattr(args, name)) for name in watched}

    first = args.create_engine_config()
    second = args.create_engine_config()

    assert {name: getattr(args, name) for name in watched} == before
    assert first.additional_config == second.additional_config
    assert first.model_config.max_model_len == second.model_config.max_model_len == 301


def test_arguments_come_back_after_a_failure(model: str) -> None:
    args = engine_args(model, nnodes=2, data_parallel_backend="ray")

    with pytest.raises(ValueError, match="requires"):
        args.create_engine_config()

    assert args.worker_cls == "auto"
    assert args.additional_config == SINK


@pytest.mark.parametrize("options", [{}, {"kv_policy": "full"}, {"other": 1}])
def test_policy_off_is_vllms_own_configuration(model: str, options: dict[str, Any]) -> None:
    patch = ours.PATCHES[0]
    patch.revert()
    try:
        stock = build(model, options)
    finally:
        patch.apply()

    config = build(model, options)

    # The representation names every setting; both have an id of their own.
    own_id = str(config.instance_id)
    assert repr(config).replace(own_id, str(stock.instance_id)) == repr(stock)
    assert config.compute_hash() == stock.compute_hash()
    assert type(config.additional_config) is dict
    assert SinkConfig.of(config) is None


def test_async_engine_args_are_patched_too(model: str) -> None:
    args = AsyncEngineArgs(model=model, skip_tokenizer_init=True, additional_config=SINK)

    assert args.create_engine_config().scheduler_config.scheduler_cls == ours.SCHEDULER


def test_configuration_carries_the_plugin(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickling it registers the plugin; copies of it are of the same kind."""
    config = build(model, SINK | {"other": {"deep": [1]}})
    calls: list[None] = []
    monkeypatch.setattr("sink_vllm.plugin.register", lambda: calls.append(None))

    shipped = pickle.loads(pickle.dumps(config))

    assert calls
    for twin in (shipped, copy.deepcopy(config), copy.copy(config)):
        assert type(twin.additional_config) is ShippedConfig
        assert twin.additional_config == config.additional_config
    deep = cast(ShippedConfig, copy.deepcopy(config).additional_config)
    assert deep["other"] is not cast(ShippedConfig, config.additional_config)["other"]
    assert json.loads(json.dumps(config.additional_config)) == config.additional_config
    assert config.compute_hash() == shipped.compute_hash()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"scheduler_cls": "mine.Scheduler"},
            "--scheduler-cls='mine.Scheduler' contradicts --kv-policy sink, which brings its own; "
            "drop one of the two.",
        ),
        (
            {"worker_cls": "mine.Worker"},
            "--worker-cls='mine.Worker' contradicts --kv-policy sink, which brings its own; "
            "drop one of the two.",
        ),
        (
            {"block_size": 48},
            "--block-size=48 is not a multiple of 32, which vLLM's CPU attention asks for; use "
            "one of 128, 64, 32, or drop --block-size.",
        ),
        (
            {"max_model_len": -1},
            "--max-model-len=auto leaves the length to the free memory, but --kv-policy sink needs "
            "to know the size of its cache; give a number, or drop --max-model-len.",
        ),
        (
            {"max_model_len": TRAINED + 1},
            f"--max-model-len={TRAINED + 1} is above {TRAINED}, the length the model was trained "
            f"for; use {TRAINED} or less.",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_contradict_the_policy(
    model: str, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match="--") as error:
        build(model, **settings)

    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rope_parameters": {"rope_type": "default", "use_fope": True}}, "RoPE scaling"),
        ({"rswa_window": 64}, "rswa_window=64"),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types: chunked_attention",
        ),
        (
            {"layer_types": ["full_attention", "window_attention"]},
            "layer_types: window_attention",
        ),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        ({"is_causal": False}, "bidirectional"),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 4, 4, 4],
                }
            },
            "M-RoPE) other than three of them in vLLM's own model classes yet (4 sections)",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_models_that_are_refused(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    path = write(tmp_path / "model", LLAMA | changes)

    with pytest.raises(ValueError, match=r"--kv-policy sink .*; (serve|use) ") as error:
        build(path)

    assert what in str(error.value)


def test_learned_positions_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "gpt2", GPT2)

    with pytest.raises(ValueError, match=r"learned absolute embeddings \(GPT2LMHeadModel\)"):
        build(path)


def test_pooling_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"pooling and embedding models \(--runner pooling\)"):
        build(model, runner="pooling", convert="embed")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"enable_chunked_prefill": False}, "--no-enable-chunked-prefill"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "fp8_e5m2"),
        ({"kv_offloading_size": 1.0}, "1.0 GiB"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"logits_processors": ["mine:Processor"]}, "--logits-processors"),
        (
            {
                "speculative_config": {
                    "method": "ngram_gpu",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                }
            },
            "speculative decoding with anything but n-grams yet (ngram_gpu)",
        ),
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="ExampleConnector", kv_role="kv_both"
                )
            },
            "ExampleConnector",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_features_that_are_refused(model: str, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=r"--kv-policy sink .*; (drop|use) ") as error:
        build(model, **settings)

    assert what in str(error.value)


def test_draft_models_are_refused_and_n_grams_are_not(model: str) -> None:
    drafted = {"method": "draft_model", "model": model, "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match=r"\(MTP, EAGLE\) yet \(draft_model\): .* method ngram,"):
        build(model, speculative_config=drafted)

    config = build(model, speculative_config={"method": "ngram", "num_speculative_tokens": 2})

    assert config.scheduler_config.scheduler_cls is not None


def test_installed_logits_processors_are_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM loads those that a package registers without being told to."""
    package = tmp_path / "mine-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vllm.logits_processors]\nours = mine:Processor\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(ValueError, match=r"the installed plugin 'ours'.*uninstall the plugin"):
        build(model)


def test_watermarks_are_a_fact(model: str) -> None:
    """On CPUs vLLM itself refuses to build such a configuration: its V2 runner needs Triton."""
    config = EngineArgs(model=model, block_size=32).create_engine_config()
    assert facts_of(config).watermarking is None

    config.watermark_config = WatermarkConfig(key=1)

    assert facts_of(config).watermarking == "gumbel"


def test_fp8_is_refused_where_vllm_has_no_kernels(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM itself would say so only after the workers have started."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    with pytest.raises(ValueError, match=r"on this CPU \(fp8\): .*; use --kv-cache-dtype auto"):
        build(model, kv_cache_dtype="fp8")


def test_rust_front_end_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")

    with pytest.raises(ValueError, match=r"--kv-policy sink .*; unset VLLM_USE_RUST_FRONTEND"):
        build(model)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAINED // 2},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": TRAINED // 4,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scalings_that_are_accepted(tmp_path: Path, rope: dict[str, Any]) -> None:
    path = write(tmp_path / "model", LLAMA | {"rope_parameters": rope | {"rope_theta": 10000.0}})

    facts = facts_of(build(path))

    assert facts.rope_types == (rope["rope_type"],)
    assert facts == Facts(
        rope_types=facts.rope_types,
        kv_cache_dtype=facts.kv_cache_dtype,
        **OF_THIS_CPU,
    )


def test_guard_create_engine_config_is_what_we_rely_on() -> None:
    """Its parameters, the arguments we set, and that it starts from ``create_model_config``."""
    original = inspect.unwrap(EngineArgs.create_engine_config)

    assert list(inspect.signature(original).parameters) == ["self", "usage_context", "headless"]
    source = inspect.getsource(original)
    assert "self.create_model_config()" in source
    settings = ("block_size", "scheduler_cls", "worker_cls", "additional_config")
    for setting in (*settings, "enable_prefix_caching"):
        assert f"{setting}=self.{setting}" in source
    assert "max_model_len=self.max_model_len" in inspect.getsource(EngineArgs.create_model_config)
    assert vars(AsyncEngineArgs).get("create_engine_config") is None


def test_guard_facts_read_settings_that_exist(model: str) -> None:
    """A renamed setting of vLLM must fail here, not read as "not set" in the gate."""
    config = build(model, {})

    assert set(model_facts(config.model_config)) < set(Facts.__dataclass_fields__)
    assert facts_of(config) == Facts(kv_cache_dtype=config.cache_config.cache_dtype, **OF_THIS_CPU)
