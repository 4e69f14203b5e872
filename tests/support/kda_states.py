"""Kimi delta attention on the states that the policy moves: vLLM's kernel, interpreted.

Run in a process of its own by ``tests/worker/test_kda.py``, because Triton decides at its import
whether it interprets. Prints one JSON object.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from sink_vllm.policy.plan import PageMove
from tests.support.runner_engine import keep_masks_boolean, register_stand_in_backend

HEADS, SIZE, PAGES, STEPS = 2, 32, 6, 12
AT, COPY, MOVED = 1, 3, 5
"""Pages: of the stream, of its state at a boundary, and of a stream that is resumed there."""
BOUNDARY = 7
"""Steps before the copy."""


@triton.jit
def interpreted_exp(x: Any) -> Any:
    return tl.exp(x)


def inputs(steps: int) -> list[dict[str, torch.Tensor]]:
    """Of one token each: ``q, k, v, g`` ``[1, 1, heads, size]``, ``beta`` ``[1, 1, heads]``."""
    drawn = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        q, k, v, g = (torch.randn(1, 1, HEADS, SIZE, generator=drawn) for _ in range(4))
        beta = torch.rand(1, 1, HEADS, generator=drawn)
        # Gates are logarithms of what a channel keeps; slow ones, so that states remember.
        found.append({"q": q, "k": k, "v": v, "g": -0.1 * g.exp(), "beta": beta})
    return found


def kernel(page: int, states: torch.Tensor, token: dict[str, torch.Tensor]) -> torch.Tensor:
    """One decode step of vLLM's kernel, the state of ``page`` written in place."""
    from vllm.third_party.flash_linear_attention.ops.kda import fused_recurrent_kda

    indices: Any = torch.tensor([page], dtype=torch.int32)
    output, _ = fused_recurrent_kda(
        q=token["q"],
        k=token["k"],
        v=token["v"],
        g=token["g"],
        beta=token["beta"],
        initial_state=states,
        inplace_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        ssm_state_indices=indices,
    )
    return output[0, 0]


def recurrence(state: torch.Tensor, token: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same step as the paper writes it (Kimi Linear, arXiv 2510.26692, section 3): decay by
    channel, delta rule, readout. ``state`` ``[heads, key, value]`` is changed."""
    q, k, v, g, beta = (token[name][0, 0] for name in ("q", "k", "v", "g", "beta"))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    state *= g.exp()[:, :, None]
    seen = torch.einsum("hk,hkv->hv", k, state)
    state += torch.einsum("hk,hv->hkv", k, beta[:, None] * (v - seen))
    return torch.einsum("hk,hkv->hv", q * SIZE**-0.5, state)


def main() -> None:
    register_stand_in_backend()  # before vLLM is imported
    keep_masks_boolean()
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
    from vllm.third_party.flash_linear_attention.ops import fused_recurrent

    from sink_vllm.worker.moves.states import StateMover

    # The interpreter replaces functions where they are looked up, and this is an alias of one.
    fused_recurrent.exp = interpreted_exp
    conv, recurrent = MambaStateShapeCalculator.kda_state_shape(1, HEADS, SIZE)
    layer: Any = SimpleNamespace(
        kv_cache=[torch.randn(PAGES, *conv), torch.zeros(PAGES, *recurrent)]
    )
    inputs_of_convolution = layer.kv_cache[0].clone()
    states = layer.kv_cache[1]
    states[[0, *range(2, PAGES)]] = torch.nan  # nobody else's
    mover = StateMover([(0, layer)])
    tokens, expected = inputs(STEPS), torch.zeros(HEADS, SIZE, SIZE)
    worst = 0.0
    for step, token in enumerate(tokens):
        if step == BOUNDARY:  # two moves: to the prefix cache, and to who is resumed from it
            mover.run([PageMove(AT, COPY, 0, 0, 0, group=0)])
            mover.run([PageMove(COPY, MOVED, 0, 0, 0, group=0)])
        difference = kernel(AT, states, token) - recurrence(expected, token)
        worst = max(worst, float(difference.abs().max()))
    resumed = [kernel(MOVED, states, token) for token in tokens[BOUNDARY:]]
    went_on = torch.equal(states[MOVED], states[AT])
    untouched = not torch.equal(states[COPY], states[AT])
    # A state of zeros instead of the one that was copied: the outputs say so.
    states[COPY] = 0
    forgot = [kernel(COPY, states, token) for token in tokens[BOUNDARY:]]
    apart = min(
        float((one - other).abs().max()) for one, other in zip(resumed, forgot, strict=True)
    )
    print(
        json.dumps(
            {
                "worst": worst,
                "went_on": went_on,
                "untouched": untouched,
                "convolution": torch.equal(layer.kv_cache[0][MOVED], inputs_of_convolution[AT]),
                "apart": apart,
            }
        )
    )


if __name__ == "__main__":
    main()
