"""vLLM's Triton kernel for decode steps of latent attention over pages that have been moved.

``python -m tests.support.latent_decode``, in a process of its own for Triton's interpreter (see
``runner_engine``), prints the largest errors as JSON: of the output over the pages after an
eviction, and over the pages as they were, as a control.
"""

import json

from tests.support.runner_engine import keep_masks_boolean, register_stand_in_backend

HEADS, BLOCK, SINKS, TOKENS, DROPPED = 4, 16, 5, 64, 32
SCALE = 0.05


def main() -> None:
    register_stand_in_backend()
    keep_masks_boolean()
    import torch
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    from sink_vllm.policy.plan import PageMove
    from sink_vllm.worker.moves.mover import PageMover
    from tests.support.latent_layers import LATENT, ROTATED, latent_layers, turned

    torch.manual_seed(0)
    layers = latent_layers("TRITON_MLA", "float32", BLOCK)
    latents, keys = torch.randn(TOKENS, LATENT), 2 * torch.randn(TOKENS, ROTATED)
    cache = layers[0].module.kv_cache
    rows = torch.cat([latents, turned(keys, torch.arange(TOKENS)).float()], dim=-1)
    pages = [3, 6, 1, 5]
    for index, page in enumerate(pages):
        cache[page] = rows[index * BLOCK : (index + 1) * BLOCK]
    query, query_key = torch.randn(HEADS, LATENT), 2 * torch.randn(HEADS, ROTATED)
    left = [*range(SINKS), *range(SINKS + DROPPED, TOKENS)]

    def attend(table: list[int]) -> torch.Tensor:
        """From the last token, at cache position + rope offset."""
        position = len(left) - 1 + DROPPED
        q = torch.cat([query, turned(query_key, position).float()], dim=-1)[None]
        out, lse = torch.zeros(1, HEADS, LATENT), torch.zeros(1, HEADS)
        scratch = torch.empty(1, HEADS, 2, LATENT + 1)
        paged = cache.unsqueeze(2)
        decode_attention_fwd(
            q,
            paged,
            paged[..., :LATENT],
            out,
            lse,
            torch.tensor([table], dtype=torch.int32),
            torch.tensor([len(left)], dtype=torch.int32),
            scratch,
            2,
            SCALE,
            BLOCK,
            is_mla=True,
        )
        return out[0]

    # Keys and query by cache position, from what was never rotated.
    cached = turned(keys[left], torch.arange(len(left)))
    scores = query.double() @ latents[left].double().T
    scores += turned(query_key, len(left) - 1) @ cached.T
    expected = (scores * SCALE).softmax(-1) @ latents[left].double()

    head = 7
    window = [PageMove(pages[2], head, SINKS, BLOCK, 0)]
    errors = {}
    for name, delta in (("not moved", 0), ("moved", DROPPED)):
        PageMover(layers, BLOCK).run([PageMove(pages[0], head, 0, SINKS, delta), *window])
        errors[name] = float((attend([head, pages[3]]) - expected).abs().max())
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
