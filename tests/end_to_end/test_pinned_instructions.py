"""Pinned instructions are followed after 50,000 tokens of something else; unpinned ones are gone.

The repository's model writes Python, so its instruction is an example to follow: methods named
``handle`` call ``self.log_zebra(event)``, which nothing else in the stream does. Its trained
context is 256 tokens, so the instruction has about 130.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import RequestOutput

from examples.train_model.corpus import held_out_files
from tests.support.engine import Engine, Policy, check_all_free, greedy_params, running_engine
from tests.support.paths import MODEL

pytestmark = [pytest.mark.engine, pytest.mark.slow]

POLICY = Policy(4, 188, 64)
STREAM = 50_000  # tokens
INSTRUCTION = "def handle(self, event):\n    self.log_zebra(event)\n" * 5
QUESTION = "\n\ndef handle(self, event):\n    self.log_"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = {**POLICY.additional_config(), "sink_pin": "system"}
    with running_engine(
        MODEL, POLICY, guarded=False, num_gpu_blocks_override=64, additional_config=config
    ) as engine:
        yield engine
        check_all_free(engine)


def conversation(engine: Engine) -> list[Any]:
    """The instruction, ``STREAM`` tokens of held-out Python, and the beginning of an answer."""
    tokenizer = engine.llm.get_tokenizer()
    tokens: list[int] = []
    for path in held_out_files():
        tokens += tokenizer.encode(path.read_text(errors="ignore"), add_special_tokens=False)
        if len(tokens) >= STREAM:
            break
    text = tokenizer.decode(tokens[:STREAM])
    assert "zebra" not in text
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": text},
        {"role": "assistant", "content": QUESTION},
    ]


def ask(engine: Engine, **extra_args: Any) -> RequestOutput:
    (output,) = engine.llm.chat(
        conversation(engine),
        greedy_params(12, extra_args=extra_args or None),
        use_tqdm=False,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    report = (output.kv_transfer_params or {})["streaming_llm"]
    assert report["evicted_tokens"] > STREAM - POLICY.capacity
    return output


def test_a_pinned_instruction_is_followed(engine: Engine) -> None:
    """And the pages it was computed in are never written again."""
    pinned: list[tuple[list[int], torch.Tensor]] = []

    def remember() -> None:
        for request in engine.scheduler.running:
            blocks = engine.scheduler.ledger.pinned(0, request.request_id)
            if not blocks:
                continue
            pages = [block.block_id for block in blocks]
            pinned.append((pages, torch.stack([c[pages] for c in engine.runner.kv_caches])))

    engine.after_step.append(remember)
    output = ask(engine)
    engine.after_step.remove(remember)

    assert output.outputs[0].text.startswith("zebra(event)")
    pages, contents = pinned[0]
    assert len(pinned) > STREAM // POLICY.g - 10
    assert len(pages) >= 4  # of 32 tokens
    assert all(later == pages for later, _ in pinned)
    # The last of these pages is shared with the window's first tokens, also the original ones.
    assert all(torch.equal(later, contents) for _, later in pinned[:: len(pinned) // 50])


def test_an_unpinned_instruction_is_lost(engine: Engine) -> None:
    output = ask(engine, sink_tokens=4)

    assert "zebra" not in output.outputs[0].text
