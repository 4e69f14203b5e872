"""Start-up proof, on the real model and the real runner, that cached keys can be re-rotated.

Attention over a single key does not depend on its position. So a sequence of one token, run at
rope offset 0 and again at rope offset delta, has the same hidden states, and in every layer

    K(delta) = R(delta) K(0)        V(delta) = V(0)

must hold, with R as ``PageMover`` computes it. One comparison proves rotary module, pairing,
partial dimensions, scaling, page layout and packing of the model at hand, and that rope offsets
reach the model. Layers whose keys do not depend on the position (NoPE) are found and left
alone, everything else is refused.

A second step computes the same token behind the first. That is a decode step, which on a GPU is
another CUDA graph than a prefill, with addresses of its own: both must be seen to get the rope
offsets. It attends to two keys, so it is compared less exactly (``_check_decoding``).

The steps run through ``execute_model`` with hand-made ``SchedulerOutput`` objects, as vLLM's own
``warmup_kernels`` does.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from sink_vllm.policy.plan import PageMove, Refresh, StepPlan
from sink_vllm.worker.layers.attention import AttentionLayer, rope_rows
from sink_vllm.worker.moves.mover import PageMover

logger = logging.getLogger("vllm.sink_vllm")

_Pages = Sequence[int]
"""One page of each KV cache group."""
_NEAR = 3  # rope positions of the near delta; the far one is the end of the table
_Token = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Trial:
    """A token at rope offsets 0 and ``delta``: its key and value in every layer."""

    delta: int
    at_zero: _Token
    at_delta: _Token
    moved: _Token
    """``at_zero`` after a page move with ``delta``."""


def self_test(runner: Any, worker: Any = None) -> None:
    """Compare ``runner.page_mover`` with the model; run once, before any request.

    Two pages per KV cache group are used and left zeroed, from page 1 on. Layers that turn out not
    to rotate lose their ``rotation``, and the mover is told.

    Args:
        runner: model runner with ``attention_layers`` and ``page_mover``, caches bound.
        worker: its worker; needed with pipeline parallelism, where it passes hidden states on.

    Raises:
        ValueError: a layer's keys or values are not what page moves make of them; names layer,
            largest error and way out.
    """
    layers, mover = runner.attention_layers, runner.page_mover
    if not layers:
        return  # a pipeline stage without attention
    groups = len(runner.kv_cache_config.kv_cache_groups)
    # Page 0 is vLLM's null block; groups have pages in one pool.
    reference, scratch = range(1, groups + 1), range(groups + 1, 2 * groups + 1)
    # CPU attention reads whole pages, and NaN times a weight of zero is still NaN.
    mover.clear((*reference, *scratch))
    # All steps first: a rank that raised between them would leave the others waiting.
    steps = runner if worker is None else worker
    trials, decoded = _run_trials(runner, steps, reference, scratch)
    still = [layer for layer in layers if not _rotates(layer, trials)]
    if len(still) == len(layers) and rope_rows(layers) is not None:
        raise ValueError(
            f"{layers[0].name} and all other layers have the same keys at every position, though "
            f"the model has rotary modules: rope offsets do not reach the model, or keys are read "
            f"from the wrong place; serve it with --kv-policy full."
        )
    for layer in still:
        layer.rotation = None
    mover.rebind()
    mover.clear((*reference, *scratch))
    _check_decoding(layers, decoded)
    worst = max((_key_error(layer, trial) for layer in layers for trial in trials), default=0.0)
    logger.info(
        "Start-up self-test: keys re-rotate in %d layers, do not depend on positions in %d; "
        "largest relative error %.1e; prefill and decode steps get their rope offsets.",
        len(layers) - len(still),
        len(still),
        worst,
    )


def _run_trials(
    runner: Any, steps: Any, reference: _Pages, scratch: _Pages
) -> tuple[list[_Trial], list[_Trial]]:
    """Trials of the first token of a sequence, and of the one decoded behind it."""
    mover, rows = runner.page_mover, rope_rows(runner.attention_layers)
    far = _NEAR if rows is None else rows - 2  # the second token is one further
    vocabulary = runner.model_config.get_vocab_size()
    first: list[_Trial] = []
    second: list[_Trial] = []
    for token in sorted({vocabulary // 2, vocabulary // 3}):
        for delta in sorted({min(_NEAR, far), far}):
            _run_token_twice(steps, token, pages=reference, offset=0)
            _run_token_twice(steps, token, pages=scratch, offset=delta)
            at_zero, at_delta = _read(mover, reference), _read(mover, scratch)
            pairs = enumerate(zip(reference, scratch, strict=True))
            mover.run([PageMove(src, dst, 0, 2, delta, group) for group, (src, dst) in pairs])
            read = (at_zero, at_delta, _read(mover, scratch))
            for slot, trials in enumerate((first, second)):
                trials.append(_Trial(delta, *(_token(one, slot) for one in read)))
    return first, second


def _run_token_twice(steps: Any, token: int, *, pages: _Pages, offset: int) -> None:
    """Run a request of two equal tokens, in slots 0 and 1 of ``pages``, one token at a time.

    Args:
        offset: rope position of the first.
    """
    req_id = f"_sink_vllm_self_test_{pages[0]}"
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [
        NewRequestData(
            req_id=req_id,
            prompt_token_ids=[token, token],
            prefill_token_ids=[token, token],
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=1),
            pooling_params=None,
            block_ids=tuple([page] for page in pages),
            num_computed_tokens=0,
            lora_request=None,
        )
    ]
    refresh = Refresh(rope_offset=offset, evicted=0, output_token_ids=[])
    setattr(step, StepPlan.ATTRIBUTE, StepPlan(refreshes={req_id: refresh}))
    _run_step(steps, step, req_id)
    # A token of the prompt, and not the one that was sampled, which may be any. What runs is a
    # decode step all the same, as after an eviction: one new token behind what is cached.
    step = SchedulerOutput.make_empty()
    step.scheduled_cached_reqs = CachedRequestData.make_empty()
    step.scheduled_cached_reqs.req_ids = [req_id]
    step.scheduled_cached_reqs.new_block_ids = [None]
    step.scheduled_cached_reqs.num_computed_tokens = [1]
    step.scheduled_cached_reqs.num_output_tokens = [0]
    _run_step(steps, step, req_id)
    finish = SchedulerOutput.make_empty()
    finish.finished_req_ids = {req_id}
    steps.execute_model(finish)


def _run_step(steps: Any, step: SchedulerOutput, req_id: str) -> None:
    step.num_scheduled_tokens = {req_id: 1}
    step.total_num_scheduled_tokens = 1
    if steps.execute_model(step) is None:
        steps.sample_tokens(None)


def _read(mover: PageMover, pages: _Pages) -> _Token:
    """Keys and values ``[slots, heads, head_size]``, by layer."""
    return {
        name: token
        for group, page in enumerate(pages)
        for name, token in mover.read_page(page, group).items()
    }


def _token(read: _Token, slot: int) -> _Token:
    """Key and value ``[heads, head_size]`` of a slot, by layer."""
    return {name: (keys[slot], values[slot]) for name, (keys, values) in read.items()}


def _rotates(layer: AttentionLayer, trials: Sequence[_Trial]) -> bool:
    """Whether the layer's keys rotate (``True``) or do not depend on the position.

    Raises:
        ValueError: neither, or nothing was written, or its values depend on the position.
    """
    name = layer.name
    if not all(bool(part.any()) for one in trials for part in one.at_zero[name]):
        raise ValueError(
            f"{name}: a token that was run has left only zeros where its key and value should be, "
            f"so its pages are not laid out as expected; serve this model with --kv-policy full."
        )
    values = max(_relative(one.at_delta[name][1], one.at_zero[name][1]) for one in trials)
    if not values <= _allowed(layer, 0):
        raise ValueError(
            f"{name}: values of one token differ by {values:.1e} between two rope positions, so "
            f"the model uses positions in another way than rotating keys; serve it with "
            f"--kv-policy full."
        )
    # First, so that keys read where nothing ever changes do not count as rotated.
    if all(
        _relative(one.at_delta[name][0], one.at_zero[name][0]) <= _allowed(layer, one.delta)
        for one in trials
    ):
        return False
    if layer.rotation is None:
        raise ValueError(
            f"{name}: its keys depend on the position, but no rotary module was found above it; "
            f"serve this model with --kv-policy full."
        )
    if all(_key_error(layer, one) <= _allowed(layer, one.delta) for one in trials):
        return True
    error, delta = max((_key_error(layer, one), one.delta) for one in trials)
    raise ValueError(
        f"{name}: keys re-rotated with its {type(layer.rotation.rotary).__name__} by {delta} "
        f"positions differ by {error:.1e} from the model's own (allowed "
        f"{_allowed(layer, delta):.1e}); serve this model with --kv-policy full."
    )


def _check_decoding(layers: Sequence[AttentionLayer], trials: Sequence[_Trial]) -> None:
    """Refuse a model whose decode steps do not get the rope offsets.

    Rounding moves scores, and from the second layer on hidden states; there is no telling how far
    in a deep model of few bits. But positions are the same for all layers, and offsets that do not
    arrive leave all keys where they were: so the question is only what they are nearer to.

    Raises:
        ValueError: with both distances, and the way out.
    """
    pairs = [(layer, one) for layer in layers if layer.rotation is not None for one in trials]
    if not pairs:
        return
    from_moved = fmean(_key_error(layer, one) for layer, one in pairs)
    from_still = fmean(
        _relative(one.at_delta[layer.name][0], one.at_zero[layer.name][0]) for layer, one in pairs
    )
    if not from_moved <= from_still / 2:
        raise ValueError(
            f"Decode steps compute keys that are {from_moved:.1e} from where their rope offsets "
            f"belong and {from_still:.1e} from keys without any, though prefills get them: CUDA "
            f"graphs read other positions than the policy writes; use --enforce-eager, or serve "
            f"this model with --kv-policy full."
        )


def _key_error(layer: AttentionLayer, trial: _Trial) -> float:
    """How far a moved key is from the one the model computes."""
    return _relative(trial.at_delta[layer.name][0], trial.moved[layer.name][0])


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of a head relative to the length of its vector; ``[heads, size]``."""
    found, expected = found.float(), expected.float()
    length = expected.norm(dim=-1)
    # Heads with next to nothing in them would turn rounding into errors.
    length = length.clamp_min(max(float(length.max()) * 1e-3, torch.finfo(torch.float32).tiny))
    return float(((found - expected).norm(dim=-1) / length).max())


def _allowed(layer: AttentionLayer, delta: int) -> float:
    """Relative error that rounding explains.

    A key is rounded when it is written, and was rotated with a rounded table: four roundings of
    the cache's dtype. The table's angles were float32 products: half a unit in their last place
    each, which is the larger part far out in a float32 table.
    """
    eps = torch.finfo(layer.cache_dtype).eps
    # Of 8 bits, four roundings in the same direction would hide a small rotation; the keys of a
    # head are not all rounded in the same direction.
    precision = eps if layer.cache_dtype.itemsize == 1 else max(4 * eps, 1e-4)
    if layer.rotation is None:
        return precision
    return precision + delta * float(layer.rotation.frequencies.max()) * 2.0**-23
