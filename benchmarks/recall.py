"""Question: does a stream recall a fact whose pages were evicted long ago, and what recalls it?

    python -m benchmarks.recall [--questions 200] [--name NAME]

Two models that were trained alike (`examples/train_model/recall`), one hybrid with recurrent layers
and one with attention alone, answer the same questions through vLLM's engine with
`kv_policy="sink"`. A request's prompt is a stream that ends with the key of a fact that was told
`distance` tokens ago; its one generated token, greedy among all of the vocabulary, is the answer.
Streams of the measurement are none of those of the training.

- `hybrid`, `attention`, or whatever folder `--arms` names: the stream is streamed
  (`sink_prompt="stream"`).
- `hybrid-truncate`: a control. The same model and questions, but evicted tokens are never computed
  (`sink_prompt="truncate"`), so that its states have not seen what its cache has not.

What counts: the response's own account must say what was evicted, and it must be what the schedule
says. Nothing is measured at distances at which some facts are evicted and some are not. Answers of
the first streams of each distance are compared with those of the class that was trained.
Concluded: share of right answers per arm and distance with its 95% interval (Wilson), against
guessing. Holds if `hybrid` is above guessing wherever the fact is gone (and says nothing without).

Not to be concluded: that a trained hybrid remembers what matters in a text. These models have
learned nothing but this task.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt

from benchmarks.common import ROOT, Results, default_name
from benchmarks.rows import Row, Rows
from examples.train_model.recall.model import SCHEDULE, load_model
from examples.train_model.recall.task import CHANCE, FIRST_NOISE, GROUP, Stream, make_stream

MODELS = ROOT / "examples" / "models" / "recall"
DISTANCES = (16, 32, 56, 128, 256, 512, 1024, 2048, 4096)
MOST_BEFORE = 64  # groups before the fact, beside the first one
LEAST = 64  # groups of a stream: more than the cache holds, whatever the distance
CONTROL = "-truncate"
ARMS = ("hybrid", "attention", f"hybrid{CONTROL}")
PAGES_MIB = 64


def streams(distance: int, count: int) -> list[Stream]:
    """Streams that end with a question ``distance`` tokens after its fact."""
    found = []
    for number in range(count):
        random = Random(f"recall {distance} {number}")
        groups = max(distance // GROUP + 1 + random.randint(1, MOST_BEFORE), LEAST)
        found.append(make_stream(random, groups, distance))
    return found


def gone(fact: int, computed: int) -> bool:
    """Whether a token is evicted by the time ``computed`` tokens of its stream are."""
    return SCHEDULE.sink_tokens <= fact < SCHEDULE.window_start(computed)


@contextmanager
def engine(folder: Path, prompts: str) -> Iterator[LLM]:
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=PAGES_MIB << 20,
        additional_config={
            "kv_policy": "sink",
            "sink_tokens": SCHEDULE.sink_tokens,
            "sink_window": SCHEDULE.window,
            "sink_stride": SCHEDULE.stride,
            "sink_prompt": prompts,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def ask(llm: LLM, arm: str, distance: int, asked: Sequence[Stream]) -> list[Row]:
    """One request per stream.

    Raises:
        RuntimeError: what a response says was evicted is not what should have been.
    """
    prompts = [
        TokensPrompt(prompt_token_ids=list(one.tokens[: one.questions[-1].answer])) for one in asked
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    rows = []
    for number, (stream, result) in enumerate(
        zip(asked, llm.generate(prompts, greedy, use_tqdm=False), strict=True)
    ):
        question = stream.questions[-1]
        account = (result.kv_transfer_params or {}).get("streaming_llm", {})
        said, due = account.get("evicted_tokens", 0), SCHEDULE.evicted(question.answer)
        if said != due or not said:
            raise RuntimeError(f"{arm}: {said} tokens evicted of {question.answer}, not {due}")
        rows.append(
            {
                "arm": arm,
                "distance": question.distance,
                "stream": number,
                "computed": question.answer,
                "evicted": said,
                "gone": gone(question.fact, question.answer),
                "evictions_since": SCHEDULE.evictions(question.answer)
                - SCHEDULE.evictions(question.fact + 1),
                "answer": result.outputs[0].token_ids[0],
                "right": stream.tokens[question.answer],
            }
        )
    if len({row["gone"] for row in rows}) != 1:
        raise RuntimeError(f"at distance {distance} some facts are gone and some are not")
    return rows


@torch.inference_mode()
def answers_of_class(model: Any, asked: Sequence[Stream]) -> list[int]:
    """What the class that was trained answers, its attention as in training."""
    found = []
    for stream in asked:
        end = stream.questions[-1].answer
        whole = SCHEDULE.capacity + SCHEDULE.evicted(end)  # noise behind the question is not seen
        tokens = [*stream.tokens[:end], *[FIRST_NOISE] * (whole - end)]
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        found.append(int(logits[0, end - 1].argmax()))
    return found


def interval(right: int, asked: int) -> tuple[float, float]:
    """Wilson's, 95%."""
    z = 1.959964
    share, spread = right / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    return middle - half, middle + half


def verdict(rows: Sequence[Row]) -> dict[str, Any]:
    """Recall by arm and distance, from the rows alone."""
    recall: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        recall[arm] = {}
        for distance in sorted({row["distance"] for row in rows}):
            of = [r for r in rows if (r["arm"], r["distance"]) == (arm, distance)]
            right = sum(row["answer"] == row["right"] for row in of)
            checked = [row for row in of if "of_class" in row]
            recall[arm][str(distance)] = {
                "questions": len(of),
                "gone": all(row["gone"] for row in of),
                "least_evictions_since": min(row["evictions_since"] for row in of),
                "recall": right / len(of),
                "interval": interval(right, len(of)),
                "checked": len(checked),
                "as_class": sum(row["of_class"] == row["answer"] for row in checked),
            }
    beyond = [one for one in recall.get("hybrid", {}).values() if one["gone"]]
    holds = all(one["interval"][0] > CHANCE for one in beyond) if beyond else None
    return {"chance": CHANCE, "recall": recall, "holds": holds}


def measure(options: argparse.Namespace, rows: Rows) -> list[Row]:
    found = []
    for arm in options.arms:
        folder = options.models / arm.removesuffix(CONTROL)
        prompts = "truncate" if arm.endswith(CONTROL) else "stream"
        model = load_model(folder) if prompts == "stream" else None
        with engine(folder, prompts) as llm:
            for distance in options.distances:
                asked = streams(distance, options.questions)
                of = ask(llm, arm, distance, asked)
                if model is not None:
                    said = answers_of_class(model, asked[: options.checked])
                    for row, answer in zip(of, said, strict=False):
                        row["of_class"] = answer
                for row in of:
                    rows.add(**row)
                right = sum(row["answer"] == row["right"] for row in of)
                print(f"{arm} {distance}: {right} of {len(of)}", flush=True)
                found += of
    return found


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="their folders")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="models, and what is a control")
    parser.add_argument("--questions", type=int, default=200, help="per distance and arm")
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES, help="tokens")
    parser.add_argument("--checked", type=int, default=16, help="per distance, by the class")
    parser.add_argument("--name", default=default_name("recall"), help="folder below results/")
    options = parser.parse_args()
    trained = {
        path.name: json.loads((path / "training_run.json").read_text())
        for path in sorted(options.models.iterdir())
        if (path / "training_run.json").exists()
    }
    results = Results(options.name, vars(options))
    with results.rows("questions.jsonl") as rows:
        concluded = verdict(measure(options, rows))
    results.summary({"trained": trained, **concluded})
    return 1 if concluded["holds"] is False else 0


if __name__ == "__main__":  # vLLM starts its engine in a new process, which imports this file
    sys.exit(main())
