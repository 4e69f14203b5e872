"""Arms and scenarios as data: `arms.json` and `scenarios.json`, parsed and checked (no vLLM).

An arm is a way to serve streams: a kind of server with a kind of client, llama.cpp's server, or a
peer in plain transformers. A scenario is a load with the sizes all of its arms share.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.serving import ONE_PROCESS
from sink_vllm.policy.schedule import Schedule, cdiv, pages_per_stream

FOLDER = Path(__file__).parent
BLOCK = 32
"""Tokens per KV page: the smallest of vLLM's CPU attention."""
CLIENTS = ("endless", "truncate", "recompute")
KINDS = ("endless", "prompts", "conversations", "mixed")
PEERS = ("streaming", "recompute")
DISCARDS = ("half", "stride")


class SpecError(Exception):
    """An arm or a scenario that cannot be run."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """A way to start `vllm serve`; flags may name a scenario's sizes in braces."""

    kind: str
    plugin: bool
    flags: tuple[str, ...]
    tuning: "Tuning | None" = None

    @property
    def name(self) -> str:
        """What tells it from the other servers of a scenario."""
        return self.kind if self.tuning is None else f"{self.kind}-{self.tuning.name}"


@dataclass(frozen=True, slots=True)
class Tuning:
    """What `vllm serve` can be given to be faster on few processors, in place of the defaults."""

    name: str
    flags: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LlamaSpec:
    """A way to start llama.cpp's server (``benchmarks/peers``)."""

    cache_type: str
    flash_attention: str
    discard: str
    """What a full slot gives up: ``half`` of it, llama.cpp's default, or a ``stride`` of ours."""
    weights: str = "f32"
    """Type of the weights' matrices, of those of ``benchmarks/peers/gguf_of.py``."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Who serves the streams, and what the client does when the context is full."""

    name: str
    label: str
    server: ServerSpec | None = None
    client: str = "endless"
    transformers: str | None = None
    """Peer in plain transformers, instead of a server."""
    llama: LlamaSpec | None = None
    """llama.cpp's server, instead of vLLM's."""

    @property
    def server_name(self) -> str | None:
        """The server that it needs, by the name it has among those that are up."""
        if self.llama is not None:
            return self.name
        return None if self.server is None else self.server.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A load; lengths in tokens."""

    name: str
    kind: str
    arms: tuple[str, ...]
    streams: tuple[int, ...]
    sinks: int
    window: int
    stride: int
    prompt: int
    """First prompt of a stream; new tokens per turn in conversations."""
    tokens: int
    """Generated per stream, or per turn."""
    seconds: float
    """A run ends this long after every stream has had a token; 0: no limit."""
    repetitions: int
    pages: int | None = None
    """KV pages of every server; default: what the largest number of streams needs."""
    length: int = 0
    """Longest stream the full-attention arm must hold."""
    turns: int = 0
    short_requests: int = 0
    rate: float = 0.0
    """Short requests per second."""
    short_prompt: int = 0
    short_tokens: int = 0
    model: str = "repository"
    """The repository's model, or one of ``benchmarks/peers/models.py``."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecError(f"{self.name}: kind={self.kind!r} is none of {', '.join(KINDS)}")
        if not self.streams or min(self.streams) < 1:
            raise SpecError(f"{self.name}: streams={self.streams} must be positive numbers")
        if self.repetitions < 1:
            raise SpecError(f"{self.name}: repetitions={self.repetitions} must be 1 or more")
        if "full" in self.arms and self.length < self.longest:
            raise SpecError(
                f"{self.name}: length={self.length} is too short for the arm full; its streams "
                f"have {self.longest} tokens"
            )

    @property
    def schedule(self) -> Schedule:
        return Schedule(sink_tokens=self.sinks, window=self.window, stride=self.stride)

    @property
    def longest(self) -> int:
        """Tokens of a stream at its end."""
        return (self.prompt + self.tokens) * max(self.turns, 1)

    def pool(self, kind: str) -> int:
        """KV pages of a kind of server, without vLLM's null page."""
        if self.pages is not None:
            return self.pages
        per_stream = pages_per_stream(self.schedule, BLOCK)
        if kind == "long":
            per_stream = cdiv(self.length, BLOCK)
        extra = 8 * per_stream if self.kind == "mixed" else 0
        return max(self.streams) * (per_stream + 1) + extra

    def sizes(self) -> dict[str, int]:
        """What the flags of a server may name."""
        return {
            "sinks": self.sinks,
            "window": self.window,
            "stride": self.stride,
            "capacity_plus_1": self.schedule.capacity + 1,
            "length": self.length,
        }


def load_arms(path: Path = FOLDER / "arms.json") -> dict[str, Arm]:
    """All arms.

    Raises:
        SpecError: one names a server, a client or a peer that does not exist.
    """
    content = json.loads(path.read_text())
    servers = {
        name: ServerSpec(name, entry["plugin"], tuple(entry["flags"]))
        for name, entry in content["servers"].items()
    }
    tunings = {
        name: Tuning(name, tuple(entry["flags"]), ONE_PROCESS if entry["one_process"] else {})
        for name, entry in content["tunings"].items()
    }
    return {name: _arm(name, entry, servers, tunings) for name, entry in content["arms"].items()}


def _arm(
    name: str,
    entry: Mapping[str, Any],
    servers: Mapping[str, ServerSpec],
    tunings: Mapping[str, Tuning],
) -> Arm:
    peer = entry.get("transformers")
    if peer is not None:
        if peer not in PEERS:
            raise SpecError(f"arm {name}: transformers={peer!r} is none of {', '.join(PEERS)}")
        return Arm(name, entry["label"], transformers=peer)
    if (llama := entry.get("llama")) is not None:
        if llama["discard"] not in DISCARDS:
            raise SpecError(
                f"arm {name}: discard={llama['discard']!r} is none of {', '.join(DISCARDS)}"
            )
        return Arm(name, entry["label"], llama=LlamaSpec(**llama))
    if entry["server"] not in servers:
        raise SpecError(f"arm {name}: server={entry['server']!r} is none of {', '.join(servers)}")
    if entry["client"] not in CLIENTS:
        raise SpecError(f"arm {name}: client={entry['client']!r} is none of {', '.join(CLIENTS)}")
    server = servers[entry["server"]]
    if (tuning := entry.get("tuning")) is not None:
        if tuning not in tunings:
            raise SpecError(f"arm {name}: tuning={tuning!r} is none of {', '.join(tunings)}")
        server = dataclasses.replace(server, tuning=tunings[tuning])
    return Arm(name, entry["label"], server, entry["client"])


def load_scenarios(
    chosen: str, arms: Mapping[str, Arm], path: Path = FOLDER / "scenarios.json"
) -> list[Scenario]:
    """The scenarios of the set ``chosen`` (short or full).

    Raises:
        SpecError: the set, an option or an arm of it does not exist, or its sizes contradict.
    """
    content = json.loads(path.read_text())
    if chosen not in content:
        raise SpecError(f"set {chosen!r} is none of {', '.join(content)}")
    return [scenario(entry, arms) for entry in content[chosen]]


def scenario(entry: Mapping[str, Any], arms: Mapping[str, Arm]) -> Scenario:
    """One scenario from its entry."""
    known = {field.name for field in dataclasses.fields(Scenario)}
    unknown = set(entry) - known
    if unknown:
        raise SpecError(f"scenario {entry.get('name')}: unknown {', '.join(sorted(unknown))}")
    for arm in entry["arms"]:
        if arm not in arms:
            raise SpecError(f"scenario {entry['name']}: arm {arm!r} is none of {', '.join(arms)}")
    values = {**entry, "arms": tuple(entry["arms"]), "streams": tuple(entry["streams"])}
    return Scenario(**values)
