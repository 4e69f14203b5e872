"""``python -m tests.support.models_table`` prints the page ``docs/models.md``.

What works is the table of the tests, ``tests.support.families``; what does not is decided by
the gate.
"""

from sink_vllm.gate.refusals import REFUSALS
from tests.support.families import FAMILIES
from tests.support.family import Family
from tests.support.refused_models import REFUSED
from tests.support.served_families import SERVED, Served

HEAD = """\
# Which models stream under `--kv-policy sink`

Printed by `python -m tests.support.models_table`; `tests/models/test_models.py` fails when it
differs.

## Tested

Each row is a tiny model with random weights, made in the test and run by the model code that vLLM
uses for the real one: its own, that of transformers (vLLM's Transformers backend), or, for MPT,
which vLLM dropped after 0.28, this project's (`sink_vllm/models/mpt.py`). The tokens
and log-probabilities of whole streams equal those of the same checkpoint run by transformers, one
token at a time, with keys renumbered by cache position (float32, 1e-4); states of recurrent layers
run on ([what one remembered of evicted text](quality.md#what-a-hybrid-remembers)). Where vLLM's
kernels need bfloat16, the measure is how far they are from transformers in float32 before the first
eviction: its median and 90th percentile may at most double afterwards.

Streams have 500 tokens, 100 different ones among them, and 10 or more evictions (650 and 8
where a page that holds a state is larger), and a re-anchoring where keys are rotated (with ALiBi
and NoPE they are not). On V1 a conversation past the capacity is sent again, too, and resumed from
the cache (not with latent attention, for which vLLM keeps no prefixes on CPUs). The streams are the
same ones on both of vLLM's model runners:

- **V1**, which vLLM uses on CPUs;
- **V2**, which it uses on GPUs, here under Triton's interpreter. Models with recurrent layers go on
  from states in the prefix cache there, too, with steps that run ahead
  (`tests/worker/test_v2_runner.py`).

Routers of experts that are a sigmoid in published checkpoints of MiniMax M2 and Step 3.5 are a
softmax here: vLLM's router on CPUs takes nothing else where experts have no groups.
In Qwen3-Next all experts are chosen: a router that chooses some takes others now and then where
bfloat16 rounds, before evictions as well, and that difference would hide every other.

*Text alone* is a multimodal model with `--language-model-only`, run by vLLM's multimodal class.
Prompts contain what stands for an image in its vocabulary, as text; requests with images get a 400
from vLLM (`tests/server/test_text_alone.py`).
"""
REFUSED_HEAD = """
## Refused

At start-up, with the reason; see [limitations](limitations.md) for all that is refused.

| Model | Configuration | Because of | |
|---|---|---|---|
"""
SERVED_HEAD = """
## The families people serve

The 35 open-weight families most served with vLLM in 2026, by downloads, hosted tokens and vLLM's
recipes; what the gate says is said for GPUs. "Tested as" names the row above that stands for
it, with random weights. [coverage.md](coverage.md) has every architecture that vLLM knows.

| Family | Architecture in vLLM | Streams | How tested, or why not |
|---|---|---|---|
"""
TAIL = """
## Everything else

A model that is in neither table is not refused by its name: if nothing in its configuration is in
the table of [limitations](limitations.md), it starts, and the start-up self-test decides. It runs
one token at two positions through the real model and compares, layer by layer, the keys that the
model computes with those that moving a page makes of them. A second token, decoded behind the
first, shows that the graphs that a GPU replays for decode steps get the rope offsets, too.

## A second judge

`tests/support/oracle_dense.py` computes a whole stream in one dense pass, with xformers' attention
biases (`BlockDiagonalCausalFromBottomRightMask`) saying which keys a query may see; the engine's
log-probabilities agree with it, too (`tests/end_to_end/test_xformers.py`, Llama). Those biases are
Python and run anywhere. xformers' memory-efficient attention has no kernels for CPUs; on a GPU it
is the baseline of `benchmarks/gpu/attention.py`, which also runs torch's.

## GPUs

None of this has run on a GPU yet. What a GPU adds is tested on a CPU: the V2 runner under an
interpreter, asynchronous scheduling, and page moves in every memory layout that vLLM gives to
FlashAttention, FlashInfer, Triton and FlexAttention, with fp8 too (`tests/worker/test_layouts.py`).

Latent attention (DeepSeek V2 and V3, Kimi K2, and without RoPE scaling, which only vLLM's CPU
backend gets wrong, Moonlight and GLM-4.7-Flash) is accepted on GPUs although whole streams have run
on vLLM's CPU backend only. It rests on rows of `[latent | rotated part]` numbers being what vLLM
writes for FlashInfer MLA, TokenSpeed, CUTLASS, FlashAttention MLA, FlashMLA and Triton MLA, in
bfloat16 and with one scale of a layer in fp8: read in vLLM's own declarations, and moved on a CPU
in every page size and memory layout (`tests/worker/test_latent_layouts.py`); and on what vLLM's
Triton kernel reads from moved pages under an interpreter. The start-up self-test decides on the
device.

With `--kv-cache-dtype fp8` a key is rounded to 3 bits again whenever it is rotated: once for sinks,
which are always rotated from the originals, and at every re-anchoring for the window. Keys beyond
the range of the format become its largest numbers. Pages of vLLM's CPU attention in fp8 are moved
in both of its packings (`tests/worker/test_fp8_cpu.py`), but whole streams with fp8 have not been
compared with anything: its kernels need AVX-512 or AMX, which the machines used so far lack.
Where they run, the start-up self-test decides, as everywhere.

One command does all of it on a GPU and leaves the raw output in `benchmarks/results/`:

    make bench-gpu DEVICE=gpu

- the tests marked `gpu`: page moves in every layout and dtype on the GPU's memory, vLLM's
  cache-write op, and streams through both model runners, with and without CUDA graphs, against
  token-by-token StreamingLLM; in bfloat16 and fp8 that rounding does not build up (in bfloat16
  that test runs on CPUs, too);
- milliseconds of an eviction for 32 layers of 8 KV heads of 128 with 4 and 1,024 sink tokens,
  against the bandwidth of the memory;
- xformers' and torch's attention over the same cache, with keys rotated once and with keys rotated
  at every read, as StreamingLLM was published.
"""


def markdown() -> str:
    head = HEAD
    rows = "\n".join(_tested(family) for family in FAMILIES)
    tested = (
        f"\n| Model | Configuration | Special | Model code | V1 | V2 |\n{'|---' * 6}|\n{rows}\n"
    )
    what = {row.name: row for row in REFUSALS}
    refused = "\n".join(
        f"| {one.name} | `{one.config}` | {what[one.row].what} | "
        f"{'cannot work' if what[one.row].final else 'not yet'} |"
        for one in REFUSED
    )
    served = "\n".join(_served(one) for one in SERVED)
    return f"{head}{tested}{SERVED_HEAD}{served}\n{REFUSED_HEAD}{refused}\n{TAIL}"


def _served(one: Served) -> str:
    if one.refused is not None:
        why = next(row.what for row in REFUSALS if row.name == one.refused)
        return f"| {one.name} | `{one.architecture}` | no | refused: {why} |"
    tested = f"tested as {one.tested}"
    how = f"{tested}; {one.caveat}" if one.caveat else tested
    return f"| {one.name} | `{one.architecture}` | yes | {how} |"


def _tested(family: Family) -> str:
    special = f"text alone; {family.special}" if family.text_alone else family.special
    exact = "exact" if family.dtype == "float32" else "as close as before evictions"
    return (
        f"| {family.name} | `{family.model}Config` | {special} | {family.backend} "
        f"| {exact} | {exact} |"
    )


if __name__ == "__main__":
    print(markdown(), end="")
