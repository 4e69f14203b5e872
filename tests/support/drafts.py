"""Counts what speculation does on a running engine, around vLLM's scheduler and the policy's."""

from dataclasses import dataclass
from typing import Any

from tests.support.preemptions import watch_preemptions


@dataclass(slots=True)
class Drafts:
    """Tokens, and evictions, since the watch began."""

    verified: int = 0
    """Draft tokens that the model was given."""
    accepted: int = 0
    pending: int = 0
    """Evictions of streams whose next draft had been made: its tokens follow the compacted ones."""
    preemptions: int = 0


def watch_drafts(scheduler: Any) -> Drafts:
    """Count from now on, for as long as ``scheduler`` lives."""
    drafts = Drafts()
    update, evict = scheduler.update_from_output, scheduler.recycler.evict

    def counted_update(planned: Any, ran: Any) -> Any:
        for request_id, tokens in planned.scheduled_spec_decode_tokens.items():
            sampled = ran.sampled_token_ids[ran.req_id_to_index[request_id]]
            drafts.verified += len(tokens)
            drafts.accepted += max(len(sampled) - 1, 0)
        return update(planned, ran)

    def counted_evict(request: Any) -> Any:
        pending = bool(request.spec_token_ids)
        evicted = evict(request)
        drafts.pending += evicted and pending
        return evicted

    def count_preemption(_: Any) -> None:
        drafts.preemptions += 1

    scheduler.update_from_output = counted_update
    scheduler.recycler.evict = counted_evict
    watch_preemptions(scheduler, before=count_preemption)
    return drafts
