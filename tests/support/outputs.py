"""vLLM's output processor fed by hand: two tokenizers, requests, and what an engine would send."""

import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists

from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.memory import adopt

POLICY = SinkConfig(schedule=Schedule(sink_tokens=4, window=92, stride=32), block_size=32)
SPECIAL = ("<bos>", "<eos>", "<pad>")


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2, Llama 3 and Qwen: bytes as characters; ids 0..255 are single bytes."""
    to_char = dict(zip(_gpt2_bytes(), _gpt2_chars(), strict=True))
    vocab = {to_char[byte]: byte for byte in range(256)}
    merges = []
    for left, right in (("t", "h"), ("th", "e"), ("Ã", "©"), ("â", "Ĥ"), ("Ġ", "w")):
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    vocab |= {token: len(vocab) + index for index, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special_tokens(tokenizer)


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama 2: words with ``▁`` for the space, unknown characters as ``<0xNN>`` bytes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in (*"▁abcdefghijklmnopqrstuvwxyz.é日本語", "▁t", "▁th", "▁the", "<unk>"):
        vocab[piece] = len(vocab)
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocab |= {token: len(vocab) + index for index, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _with_special_tokens(tokenizer)


def _with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def _gpt2_bytes() -> list[int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [byte for byte in range(256) if byte not in printable]


def _gpt2_chars() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def params(**given: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 2**31 - 1, "output_kind": RequestOutputKind.DELTA, **given}
    )


class Processor:
    """One request in an output processor, vLLM's own or ours."""

    state: RequestState  # of its first choice

    def __init__(
        self,
        tokenizer: Any,
        sampling_params: SamplingParams,
        *,
        ours: bool,
        prompt: Sequence[int] = (72, 105),
        stream_interval: int = 1,
        queue: RequestOutputCollector | None = None,
    ) -> None:
        self.processor = OutputProcessor(
            tokenizer, log_stats=False, stream_interval=stream_interval
        )
        if ours:
            adopt(self.processor, POLICY)
        self.params = sampling_params
        request = EngineCoreRequest(
            request_id="r",
            external_req_id="client-r",
            prompt_token_ids=list(prompt),
            mm_features=None,
            sampling_params=sampling_params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        parent, self.names = None, ["r"]
        if sampling_params.n > 1:
            parent = ParentRequest(request)
            self.names = [parent.get_child_info(index)[0] for index in range(sampling_params.n)]
        for index, name in enumerate(self.names):
            child = copy.copy(request)
            child.request_id = name
            self.processor.add_request(child, "a prompt", parent, index, queue)
        self.state = self.processor.request_states[self.names[0]]
        self.finished = False

    def step(self, tokens: Sequence[int], choice: int = 0, **fields: Any) -> list[RequestOutput]:
        """Feed the tokens of one engine step; returns what would be sent to the client."""
        if self.params.logprobs is not None:
            fields["new_logprobs"] = _logprobs(tokens, self.params.logprobs)
        name = self.names[choice]
        output = EngineCoreOutput(request_id=name, new_token_ids=list(tokens), **fields)
        processed = self.processor.process_outputs([output])
        self.finished = name not in self.processor.request_states
        return [item for item in processed.request_outputs if isinstance(item, RequestOutput)]

    def run(
        self, steps: Iterable[Sequence[int]], last: FinishReason = FinishReason.LENGTH
    ) -> list[dict[str, Any]]:
        """Everything the client sees of ``steps``, the last of which ends the request."""
        seen: list[dict[str, Any]] = []
        steps = list(steps)
        for index, tokens in enumerate(steps):
            fields = {"finish_reason": last} if index == len(steps) - 1 else {}
            seen += map(visible, self.step(tokens, **fields))
            if self.finished:
                break
        return seen


def visible(output: RequestOutput) -> dict[str, Any]:
    (completion,) = output.outputs
    logprobs = completion.logprobs
    return {
        "text": completion.text,
        "tokens": list(completion.token_ids),
        "finish": completion.finish_reason,
        "stop": completion.stop_reason,
        "cumulative": completion.cumulative_logprob,
        "logprobs": None if logprobs is None else [logprobs[i] for i in range(len(logprobs))],
        "finished": output.finished,
        "params": output.kv_transfer_params,
    }


def _logprobs(tokens: Sequence[int], k: int) -> LogprobsLists:
    ids = np.array([[token, *range(200, 200 + k)] for token in tokens], dtype=np.int32)
    return LogprobsLists(
        logprob_token_ids=ids,
        logprobs=-0.5 - (ids % 7).astype(np.float32),
        sampled_token_ranks=np.ones(len(tokens), dtype=np.int32),
    )
