"""Sees preemptions of a running scheduler, around vLLM's own."""

from collections.abc import Callable
from typing import Any


def watch_preemptions(
    scheduler: Any,
    *,
    before: Callable[[Any], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Callable[[], None]:
    """Call ``before`` and ``after`` with each request that is preempted from now on.

    Returns:
        What ends the watch.
    """
    preempt = scheduler._preempt_request

    def watched(request: Any, *args: Any, **kwargs: Any) -> None:
        if before is not None:
            before(request)
        preempt(request, *args, **kwargs)
        if after is not None:
            after(request)

    scheduler._preempt_request = watched
    return lambda: setattr(scheduler, "_preempt_request", preempt)
