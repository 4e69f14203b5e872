"""Compares turns of stored streams with the oracle: of whole streams, or of what survived."""

from collections.abc import Sequence
from dataclasses import replace

from tests.support.engine import Generated, Policy
from tests.support.judge import Verdict, judge
from tests.support.oracle import Oracle
from tests.support.remembered import schedule_of
from tests.support.runner_job import Batch, Told


def judge_chain(
    oracle: Oracle, policy: Policy, tokens: list[int], answer: Generated, base: int
) -> Verdict:
    """``answer`` is that of a stream that began with ``tokens``, but for its own account.

    Args:
        base: tokens evicted before ``tokens``.
    """
    evictions = answer.evictions - base // policy.g
    answer = replace(answer, evicted_tokens=answer.evicted_tokens - base, evictions=evictions)
    return judge(oracle, policy, [tokens], [answer])


def judge_turns(
    oracle: Oracle,
    policy: Policy,
    turns: Sequence[Batch],
    answers: Sequence[Sequence[Generated]],
    told: Sequence[Sequence[Told]],
) -> list[Verdict]:
    """Turns of a job's stored streams from their first tokens on, a verdict for each answer.

    Where the engine says that a stream has gone on from its survivors, the oracle begins anew with
    those that its schedule has; else it goes on with all tokens since.
    """
    schedule = schedule_of(policy)
    verdicts = []
    for place, _ in enumerate(turns[0].prompts):
        stream: list[int] = []
        chain: list[int] = []
        base = 0
        for turn, made, said in zip(turns, answers, told, strict=True):
            if said[place].resumed_from == "survivors":
                chain = [stream[p] for p in schedule.cached_positions(len(stream))]
                base = schedule.evicted(len(stream))
            assert said[place].base == base
            chain += turn.prompts[place]
            verdicts.append(judge_chain(oracle, policy, chain, made[place], base))
            chain += made[place].tokens
            stream += [*turn.prompts[place], *made[place].tokens]
            assert made[place].stream_position == len(stream)
    return verdicts
