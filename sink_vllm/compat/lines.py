"""What differs between the vLLM lines that are supported at the same time, and nothing else.

The logic asks what a line offers, never which line it is. Every difference names the last line that
needs it: when that line is no longer supported, tests/compat/test_lines.py asks for its removal.
"""

from typing import NamedTuple


class Difference(NamedTuple):
    """One thing that two supported lines do differently."""

    what: str
    where: str
    """The function that bridges it, in the room whose job it is."""
    dies_with: str
    """The last line that does it the old way, such as ``"0.32"``."""


DIFFERENCES = (
    Difference(
        "vLLM has a second, older Ray executor, which a variable chooses",
        "sink_vllm.gate.facts:older_ray_executor",
        "0.32",
    ),
    Difference(
        "the scheduler's look-up in the prefix cache is given no longest length",
        "sink_vllm.engine.admitting:AdmittingMixin._get_local_prefix_cache_hit",
        "0.32",
    ),
    Difference(
        "streamed chats become events where their chunks are made",
        "sink_vllm.server.events:_told",
        "0.32",
    ),
    Difference(
        "a session keeps its computed tokens, not all but the one sampled last",
        "sink_vllm.engine.scheduler:StreamingLLMMixin._update_request_as_session",
        "0.32",
    ),
    Difference(
        "one function makes groups of layers and their KV cache configurations",
        "sink_vllm.tools.specs:_kv_cache_configs",
        "0.32",
    ),
)
