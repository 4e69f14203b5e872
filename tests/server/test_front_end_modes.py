"""``LLM`` in process and with an engine process: the same freedom of length.

``AsyncLLM`` is in test_async_llm.py; one and several API servers of `vllm serve` are in
tests/end_to_end/test_server.py.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from sink_vllm.server.lengths import FRONT_MAX
from tests.conftest import ModelFactory
from tests.support.serving import CAPACITY, SCHEDULE, evicted, prompt_of
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 64,
    "disable_log_stats": False,
    "additional_config": {
        "kv_policy": "sink",
        "sink_tokens": SCHEDULE.sink_tokens,
        "sink_window": SCHEDULE.window,
        "sink_stride": SCHEDULE.stride,
    },
}


@pytest.fixture(scope="module")
def model(tiny_llama: ModelFactory) -> Path:
    return tiny_llama(TinyLlama())


@pytest.fixture(scope="module", params=["in process", "engine process"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        processes = "0" if request.param == "in process" else "1"
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        llm = LLM(str(model), **ARGS)
        yield llm
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: LLM, num_tokens: int, **params: Any) -> RequestOutput:
    greedy = {"temperature": 0.0, "ignore_eos": True, **params}
    prompt: Any = {"prompt_token_ids": prompt_of(num_tokens)}
    (output,) = llm.generate([prompt], SamplingParams(**greedy), use_tqdm=False)
    return output


def test_prompt_and_output_beyond_the_capacity(llm: LLM) -> None:
    assert llm.llm_engine.model_config.max_model_len == FRONT_MAX

    output = generate(llm, 5 * CAPACITY, max_tokens=3 * CAPACITY)

    assert len(output.prompt_token_ids or ()) == 5 * CAPACITY
    assert len(output.outputs[0].token_ids) == 3 * CAPACITY
    assert output.kv_transfer_params is not None
    told = output.kv_transfer_params["streaming_llm"]
    assert told["evicted_tokens"] == evicted(5 * CAPACITY, 3 * CAPACITY)


def test_no_max_tokens_goes_on_until_the_model_stops(llm: LLM) -> None:
    wanted = generate(llm, 50, max_tokens=400).outputs[0]
    stop = next(
        token
        for index, token in enumerate(wanted.token_ids)
        if index > 250 and token not in wanted.token_ids[:index]
    )

    output = generate(llm, 50, max_tokens=None, stop_token_ids=[stop]).outputs[0]

    assert output.finish_reason == "stop"
    assert list(output.token_ids) == list(wanted.token_ids)[: len(output.token_ids)]
    assert len(output.token_ids) > 250


def test_several_samples(llm: LLM) -> None:
    output = generate(llm, 50, max_tokens=200, n=3, temperature=1.0, seed=1)

    assert [len(completion.token_ids) for completion in output.outputs] == [200] * 3
    assert output.kv_transfer_params is not None
    told = output.kv_transfer_params["streaming_llm"]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert told["evicted_tokens"] == 3 * evicted(50, 200)


def test_counters(llm: LLM) -> None:
    """``LLM`` has them too, for ``llm.get_metrics`` style readers of the Prometheus registry."""
    from prometheus_client import REGISTRY

    model_name = str(llm.llm_engine.model_config.served_model_name)
    labels = {"model_name": model_name, "engine": "0"}
    before = REGISTRY.get_sample_value("sink_vllm:evicted_tokens_total", labels)
    assert before is not None

    generate(llm, 300, max_tokens=10)

    after = REGISTRY.get_sample_value("sink_vllm:evicted_tokens_total", labels)
    assert after == before + evicted(300, 10)


def test_refusals(llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="max_tokens"):
        generate(llm, 50, max_tokens=2**31)
    with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
        generate(llm, CAPACITY + 1, prompt_logprobs=1)
    with pytest.raises(VLLMValidationError, match="beam search"):
        llm.beam_search(
            [{"prompt_token_ids": prompt_of(5)}], BeamSearchParams(beam_width=2, max_tokens=5)
        )
    assert len(generate(llm, 50, max_tokens=5).outputs[0].token_ids) == 5
