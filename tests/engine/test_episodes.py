"""Random clients and operators: no hang, no livelock, no page lost, whatever they do.

On the real scheduler without a model. A failing episode says its seed; ``LIVENESS_SEEDS=17 pytest
tests/engine/test_episodes.py`` runs it alone, ``python -m tests.support.liveness 17`` too.
"""

import os
from collections import Counter

import pytest

from tests.support.liveness import run_many, seeds_of

pytestmark = pytest.mark.engine

EPISODES = "0:20000"
_PART = 2_500
"""Episodes of one test: half a minute of a core. Parts of this file may run in several processes
(``tests/support/repeating.py``)."""

REACH = {
    "evictions": 3,
    "reanchorings": 0.5,
    "resends": 0.3,
    "resumptions": 0.05,
    "preemptions": 0.05,
    "sessions extended": 0.03,
    "grammars": 0.1,
    "LoRA skips": 0.1,
    "aborts": 0.1,
    "resets": 0.1,
    "pauses": 0.03,
    "asynchronous": 0.3,
    "v2": 0.3,
    "truncate": 0.1,
    "windowed": 0.1,
    "recurrent": 0.1,
    "states found": 0.02,
    "found again": 0.0004,
    "drafts accepted": 1,
    "pages brought back": 0.1,
    "evictions with drafts": 0.3,
    "evictions composed ahead": 0.2,
    "heads given back": 0.003,
}
"""What must have happened, per episode."""


def parts(seeds: range) -> list[range]:
    return [seeds[i : i + _PART] for i in range(0, len(seeds), _PART)]


@pytest.mark.parametrize(
    "seeds",
    parts(seeds_of(os.environ.get("LIVENESS_SEEDS", EPISODES))),
    ids=lambda seeds: f"{seeds.start}:{seeds.stop}",
)
def test_random_episodes(seeds: range) -> None:
    """Nobody hangs, starves or loses a page, whatever clients and operators do."""
    reach, failures = run_many(seeds)

    kinds = Counter(failure.kind for failure in failures)
    assert not failures, f"{kinds} in {len(seeds)} episodes; the first:\n{failures[0].text}"
    if len(seeds) >= 1000:
        missed = {k: reach[k] for k, least in REACH.items() if reach[k] < least * len(seeds)}
        assert not missed, f"not reached often enough: {missed} of {dict(reach)}"
