"""Runs vLLM with ``patches/upstream`` applied, and something of its own in every new seam.

``python -m tests.support.upstream_job MODEL``, with ``VLLM_PLUGINS`` empty: a stock engine, without
this project's plugin. The last line of the output is what happened, as JSON.
"""
# Much of what is used here only exists once the diffs are applied.
# mypy: disable-error-code="attr-defined, call-arg, misc"

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

HERE = "tests.support.upstream_job"
MAX_MODEL_LEN = 64
SEEN: dict[str, Any] = {"hashed": 0, "prepared": [], "runners": 0}


class OwnDetokenizer(IncrementalDetokenizer):
    @classmethod
    def from_new_request(cls, tokenizer: Any, request: Any) -> IncrementalDetokenizer:
        return cls()


class OwnState(RequestState):
    detokenizer_cls = OwnDetokenizer


class OwnProcessor(OutputProcessor):
    request_state_cls = OwnState

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super().add_request(request, *args, **kwargs)
        state = self.request_states[request.request_id]
        SEEN["state"] = [type(state).__name__, type(state.detokenizer).__name__]


class OwnScheduler(Scheduler):
    def make_request_block_hasher(self, *args: Any, **kwargs: Any) -> Any:
        hasher = super().make_request_block_hasher(*args, **kwargs)

        def counted(request: Any) -> Any:
            SEEN["hashed"] += 1
            return hasher(request)

        return counted

    def preprocess_request(self, request: Any) -> None:
        assert request.request_id not in self.requests
        SEEN["prepared"].append([request.num_prompt_tokens, len(request.block_hashes)])

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.custom_stats = {"evictions": 3}
        return stats


class OwnRunner(CPUModelRunner):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        SEEN["runners"] += 1
        super().__init__(*args, **kwargs)


class OwnWorker(CPUWorker):
    def _make_model_runner(self) -> Any:
        return OwnRunner(self.vllm_config, self.device)


class OwnLogger(StatLoggerBase):
    """A stat logger that a plugin would bring, for engines with ``OwnScheduler``."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

    @classmethod
    def is_wanted(cls, vllm_config: Any, log_stats: bool) -> bool:
        return log_stats and vllm_config.scheduler_config.scheduler_cls is not None

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            SEEN["logged"] = scheduler_stats.custom_stats

    def log_engine_initialized(self) -> None: ...


def refused(**options: Any) -> str:
    """Why vLLM does not start with these options."""
    try:
        EngineArgs(**options).create_engine_config()
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def over_the_wire(stats: SchedulerStats) -> Any:
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    return MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats.custom_stats


def lengths(engine: Any, prompt_length: int) -> Any:
    """What the front end makes of a prompt: ``max_tokens``, or its refusal."""
    try:
        request = engine.input_processor.process_inputs(
            "r", {"type": "token", "prompt_token_ids": [5] * prompt_length},
            SamplingParams(max_tokens=None), supported_tasks=("generate",),
        )  # fmt: skip
    except VLLMValidationError as error:
        return str(error)
    return request.sampling_params.max_tokens


def main(model: str) -> dict[str, Any]:
    import vllm.v1.metrics.loggers as loggers

    # As if an installed plugin had named it.
    loggers.load_plugins_by_group = lambda group: {"own": OwnLogger}  # type: ignore[dict-item]
    small: dict[str, Any] = {"model": model, "max_model_len": MAX_MODEL_LEN, "enforce_eager": True}
    small |= {"skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 2, "block_size": 32}
    result: dict[str, Any] = {
        "longer without a scheduler": refused(**small, max_request_len=MAX_MODEL_LEN + 1),
        "another class": EngineArgs(**small, output_processor_cls=f"{HERE}.OwnScheduler"),
        "wire": over_the_wire(SchedulerStats(custom_stats={"evictions": 3})),
    }
    try:
        config = result["another class"].create_engine_config()
        result["another class"] = config.scheduler_config.get_output_processor_cls().__name__
    except TypeError as error:
        result["another class"] = str(error)
    llm = LLM(
        **small,
        scheduler_cls=OwnScheduler,
        worker_cls=f"{HERE}.OwnWorker",
        output_processor_cls=OwnProcessor,
        max_request_len=-1,
        disable_log_stats=False,
    )
    engine = llm.llm_engine
    result["lengths"] = [lengths(engine, 10), lengths(engine, 10 * MAX_MODEL_LEN)]
    engine.model_config.max_request_len = 8
    result["shorter"] = lengths(engine, 10)
    engine.model_config.max_request_len = None
    result["unset"] = [lengths(engine, 10), lengths(engine, MAX_MODEL_LEN + 1)]
    params = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=[5] * 40)], params, use_tqdm=False)
    result["tokens"] = len(outputs[0].outputs[0].token_ids)
    return result | {"seen": SEEN}


if __name__ == "__main__":
    import tests.support.upstream_job as imported  # the classes that the engine finds by name

    print(json.dumps(imported.main(sys.argv[1])))
