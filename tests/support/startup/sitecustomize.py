"""Run by every Python process that a test starts, before anything else.

vLLM's processes wait for each other in loops of ``sched_yield`` (``vllm.distributed.utils``). Where
two of them run on two CPUs, Linux 6.18 leaves every other process without a turn for up to 85 s
(measured: a client of a server that generates for another); with a short sleep for a yield, for
0.2 s at most, at 0.8 to 0.95 of the tokens per second.
"""

import os
import time

_WAIT = 20e-6  # seconds


def _wait() -> None:
    time.sleep(_WAIT)


os.sched_yield = _wait
