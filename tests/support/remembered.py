"""Stored streams as `/v1/streams` holds them and sends their turns, without a server."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm import SamplingParams

from sink_vllm.policy.parked import CHAIN, KEY, Chain
from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.held import Held
from tests.support.engine import Engine, Generated, Policy


def schedule_of(policy: Policy) -> Schedule:
    return Schedule(sink_tokens=policy.S, window=policy.W, stride=policy.g)


@dataclass(slots=True)
class Remembered:
    """A stream as a server holds it, beside all its tokens for the oracle."""

    schedule: Schedule
    all: list[int] = field(default_factory=list)
    held: Held = field(default_factory=Held)

    def commit(self, chain: Chain, new: list[int], answer: list[int]) -> None:
        self.held.extend([*new, *answer])
        self.held.told(chain)
        self.held.trim(self.schedule, sampled=bool(answer))
        self.all += [*new, *answer]


def append(
    engine: Engine,
    streams: Sequence[Remembered],
    new: Sequence[list[int]],
    params: Sequence[SamplingParams],
) -> tuple[list[Generated], list[Chain]]:
    """One turn of each stream, in one batch."""
    for stream, one in zip(streams, params, strict=True):
        one.extra_args = {KEY: stream.held.parked(stream.schedule)}
    prompts = [[*one.held.tokens, *more] for one, more in zip(streams, new, strict=True)]
    outputs = engine.generate(prompts, params)
    answers = [Generated.of(output) for output in outputs]
    chains = [
        Chain.read((output.kv_transfer_params or {})["streaming_llm"][CHAIN]) for output in outputs
    ]
    for stream, chain, more, answer in zip(streams, chains, new, answers, strict=True):
        stream.commit(chain, more, answer.tokens)
        assert answer.stream_position == stream.held.position == len(stream.all)
    return answers, chains
