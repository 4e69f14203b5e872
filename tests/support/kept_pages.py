"""Watches pages outside the pool, on the scheduler without a model.

What comes back is compared with what the page held when it went out, by hash.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from sink_vllm.engine.hibernation.kept import Hibernation
from sink_vllm.policy.plan import StepPlan
from tests.support.page_content import PageContent


@dataclass(slots=True)
class KeptPages:
    """See above."""

    hibernation: Hibernation
    content: PageContent
    went_out: dict[bytes, list[int]] = field(default_factory=dict)
    brought_back: int = 0

    def learn(self, keys: dict[int, bytes], planned: SchedulerOutput) -> None:
        """Before the step runs: what its copies are of; ``keys`` says what slots are to hold."""
        plan = StepPlan.of(planned) or StepPlan()
        assert len({one.slot for one in plan.stores}) == len(plan.stores), "a slot is written twice"
        assert len({one.block for one in plan.loads}) == len(plan.loads), "a block is written twice"
        slots = dict(self.content.slots)
        for copy in plan.stores:
            slots[copy.slot] = page = list(self.content._page(copy.group, copy.block))
            assert -1 not in page, "a page goes out that is not full"
            if copy.slot in keys:
                known = self.went_out.setdefault(keys[copy.slot], page)
                assert known == page, "two pages with one hash"
        for copy in plan.loads:
            self.brought_back += 1
            assert copy.slot in slots, "a page comes back that never went out"
            if copy.slot in keys:
                assert slots[copy.slot] == self.went_out[keys[copy.slot]], "another page came back"

    def check(self) -> None:
        """Every slot has one use."""
        self.hibernation.slots.check()

    def check_idle(self) -> None:
        """No copy is under way."""
        self.check()
        assert not self.hibernation.slots._held, f"held for ever: {self.hibernation.slots._held}"


def watch_pages(core: Any) -> KeptPages:
    """Compare the copies of every step that ``core`` plans."""
    hibernation, model = core.scheduler.hibernation, core.model
    hibernation._most_loads = 1  # others wait for the next step, which a real page is too small for
    kept = KeptPages(hibernation, model.content)
    execute = model.execute_model

    def watched(planned: SchedulerOutput, non_block: bool = False) -> Any:
        kept.learn({slot: key for key, slot in hibernation.slots.slot_of.items()}, planned)
        return execute(planned, non_block)

    model.execute_model = watched
    return kept
