"""Question: what does a token cost in the front end at the 1,000th and the 10,000,000th character?

    python -m benchmarks.micro_front_end [--characters 10000000] [--name NAME]

vLLM's output processor, as the API server runs it (detokenizer, one request), is fed by hand:
real tokens of Python source, one per engine step. The arms are vLLM's own processor and
the policy's. On the way to the late position tokens come in larger steps, which is faster and not
timed. Per arm and position: microseconds per token, and the memory the process has gained.

vLLM's own processor copies all of the text for every token, so the way there takes it very long; it
is measured up to ``--stock-characters``.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from benchmarks.common import MODEL, Results, default_name
from benchmarks.quality.isolate import isolated

TIMED = 2000  # tokens per measurement
REPEATS = 5
EARLY = 1_000
BULK = 100  # tokens per untimed step


class FrontEnd:
    """One endless request in an output processor, and how many characters it has delivered."""

    def __init__(self, *, ours: bool) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.tokenizers import get_tokenizer
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.output_processor import OutputProcessor

        from sink_vllm.policy.config import SinkConfig
        from sink_vllm.policy.schedule import Schedule
        from sink_vllm.server.memory import adopt

        tokenizer = get_tokenizer(str(MODEL))
        self._processor = OutputProcessor(tokenizer, log_stats=False)
        if ours:
            schedule = Schedule(sink_tokens=4, window=220, stride=32)
            adopt(self._processor, SinkConfig(schedule=schedule, block_size=32))
        source = (MODEL.parent.parent / "serving.py").read_text()
        self._tokens = itertools.cycle(tokenizer.encode(source, add_special_tokens=False))
        self.characters = 0
        sampling = SamplingParams(
            max_tokens=2**31 - 1, output_kind=RequestOutputKind.DELTA, ignore_eos=True
        )
        request = EngineCoreRequest(
            request_id="endless",
            external_req_id="endless",
            prompt_token_ids=[0],
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._processor.add_request(request, None)

    def step(self, count: int) -> None:
        """An engine step that brings ``count`` tokens."""
        from vllm import RequestOutput
        from vllm.v1.engine import EngineCoreOutput

        output = EngineCoreOutput(
            request_id="endless", new_token_ids=list(itertools.islice(self._tokens, count))
        )
        for item in self._processor.process_outputs([output]).request_outputs:
            assert isinstance(item, RequestOutput)
            self.characters += len(item.outputs[0].text)

    def microseconds(self) -> float:
        """Per token, over the next ``TIMED`` tokens."""
        began = time.perf_counter()
        for _ in range(TIMED):
            self.step(1)
        return 1e6 * (time.perf_counter() - began) / TIMED


def work(ours: bool, positions: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One arm: yields a measurement at every position."""
    front_end = FrontEnd(ours=ours)
    process = psutil.Process()
    for target in positions:
        while front_end.characters < target:
            front_end.step(min(BULK, 1 + (target - front_end.characters) // 10))
        yield {
            "arm": "sink" if ours else "stock",
            "characters": front_end.characters,
            "us_per_token": [front_end.microseconds() for _ in range(REPEATS)],
            "rss": process.memory_info().rss,
        }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--characters", type=int, default=10_000_000)
    parser.add_argument("--stock-characters", type=int, default=1_000_000)
    parser.add_argument("--name", default=default_name("micro_front_end"))
    options = parser.parse_args()
    results = Results(options.name, vars(options))
    positions = {EARLY, options.stock_characters, options.characters}
    summary: dict[str, Any] = {}
    with results.rows("positions.jsonl") as rows:
        for ours, end in ((False, options.stock_characters), (True, options.characters)):
            first = None
            for row in isolated(work, ours, sorted(at for at in positions if at <= end)):
                rows.add(**row)
                first = first or row
                cost, before = (statistics.median(one["us_per_token"]) for one in (row, first))
                found = {
                    "us_per_token": cost,
                    "ratio_to_early": cost / before,
                    "rss_grown_mb": (row["rss"] - first["rss"]) / 1e6,
                }
                summary.setdefault(row["arm"], {})[str(row["characters"])] = found
                print(
                    f"{row['arm']:6} {cost:8.1f} µs at {row['characters']:,} characters "
                    f"({cost / before:.2f}), memory +{found['rss_grown_mb']:.1f} MB",
                    flush=True,
                )
    results.summary(summary)


if __name__ == "__main__":
    main()
