"""What differs between the vLLM lines that are supported at the same time, and nothing else.

The logic asks what a line offers, never which line it is. Every difference names the last line that
needs it: when that line is no longer supported, tests/test_lines.py asks for its removal.
"""

from typing import NamedTuple

from vllm import envs


class Difference(NamedTuple):
    """One thing that two supported lines do differently."""

    what: str
    where: str
    """The module, or the function of this one, that bridges it."""
    dies_with: str
    """The last line that does it the old way, such as ``"0.32"``."""


DIFFERENCES = (
    Difference(
        "vLLM has a second, older Ray executor, which a variable chooses",
        "sink_vllm.compat.lines:older_ray_executor",
        "0.32",
    ),
    Difference(
        "the scheduler's look-up in the prefix cache is given no longest length",
        "sink_vllm.scheduler.admitting:AdmittingMixin._get_local_prefix_cache_hit",
        "0.32",
    ),
    Difference(
        "a session keeps its computed tokens, not all but the one sampled last",
        "sink_vllm.scheduler.scheduler:StreamingLLMMixin._update_request_as_session",
        "0.32",
    ),
)


def older_ray_executor() -> bool:
    """Whether Ray would run vLLM's older executor, which 0.33 no longer has."""
    return not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)
