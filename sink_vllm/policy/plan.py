"""What the scheduler tells the workers about evictions, one object per step.

It travels as the attribute ``StepPlan.ATTRIBUTE`` of vLLM's ``SchedulerOutput`` (a plain
dataclass without slots, so the attribute survives the pickling of the multiprocess and Ray
executors). Imports neither torch nor vLLM: both sides of the engine load it.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple


class PageMove(NamedTuple):
    """Copy slots ``[begin, end)`` of page ``src`` to the same slots of page ``dst``.

    Keys are rotated by ``delta`` rope positions on the way, values are copied as they are.
    ``src == dst`` rewrites the page in place. All moves of a step read before any of them
    writes, and no two of them write the same slot.
    """

    src: int
    dst: int
    begin: int
    end: int
    delta: int
    group: int = 0
    """KV cache group whose layers have these pages."""


class PageCopy(NamedTuple):
    """Copy a whole page between the KV cache and a slot of host memory, as it is."""

    block: int
    slot: int
    group: int = 0
    """KV cache group whose layers have the page."""


class Refresh(NamedTuple):
    """What replaces the state of a request in the workers, when its tokens were compacted."""

    rope_offset: int
    """Added to the cache positions of the request from this step on."""
    evicted: int
    """Tokens evicted so far: stream positions minus cache positions of window and new tokens."""
    output_token_ids: list[int]
    """Generated tokens still in the cache or about to be computed (V1 runner)."""


@dataclass(slots=True)
class StepPlan:
    """What the workers do before the forward pass of a step, in the order of these fields."""

    ATTRIBUTE: ClassVar[str] = "streaming_llm"

    stores: list[PageCopy] = field(default_factory=list)
    """Pages that are copied out, before anything of the step writes; no slot twice."""
    loads: list[PageCopy] = field(default_factory=list)
    """Pages that are copied back; no block twice."""
    moves: list[PageMove] = field(default_factory=list)
    """Page moves of evictions and resumptions."""
    refreshes: dict[str, Refresh] = field(default_factory=dict)
    """Requests whose state is replaced."""

    def __bool__(self) -> bool:
        return bool(self.stores or self.loads or self.moves or self.refreshes)

    @classmethod
    def of(cls, scheduler_output: Any) -> "StepPlan | None":
        """The plan attached to a ``SchedulerOutput``; ``None`` for warm-up and dummy steps."""
        return getattr(scheduler_output, cls.ATTRIBUTE, None)
