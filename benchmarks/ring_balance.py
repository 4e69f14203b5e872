"""Question: how evenly does Ray's consistent-hash ring spread sessions, and how many move?

    python -m benchmarks.ring_balance [--sessions 200000] [--name NAME]

Builds the ring of Ray Serve's ``ConsistentHashRouter`` (its hash function, its number of virtual
nodes, random replica ids) for growing numbers of replicas, and looks random session ids up in it:

- `fullest`: sessions of the fullest replica over the mean; capacity has to be planned for it;
- `moved_when_one_dies`, `moved_when_replaced`: share of all sessions whose replica is another one
  after a replica has left the ring, and after its successor, which has a new id, has joined;
- `build_ms`, `lookup_us`: time of a router to build the ring and to look one session up.

No engine runs: this is the router's arithmetic alone.
"""

import argparse
import bisect
import time
import uuid
from collections import Counter
from typing import Any

from ray.serve.experimental.consistent_hash_router import DEFAULT_NUM_VIRTUAL_NODES, _hash_bytes

from benchmarks.common import Results, default_name

REPLICAS = (2, 8, 100, 800)


class Ring:
    """Hashes in order, and the replica each belongs to."""

    def __init__(self, replicas: list[str]) -> None:
        points = sorted(
            (_hash_bytes(f"{replica}:{index}".encode()), replica)
            for replica in replicas
            for index in range(DEFAULT_NUM_VIRTUAL_NODES)
        )
        self.hashes = [point for point, _ in points]
        self.owners = [owner for _, owner in points]

    def owner(self, session: str) -> str:
        at = bisect.bisect_right(self.hashes, _hash_bytes(session.encode()))
        return self.owners[at % len(self.owners)]


def measure(count: int, sessions: list[str]) -> dict[str, Any]:
    replicas = [uuid.uuid4().hex[:8] for _ in range(count)]
    started = time.perf_counter()
    ring = Ring(replicas)
    built = time.perf_counter()
    owners = [ring.owner(session) for session in sessions]
    looked_up = time.perf_counter()
    without = Ring(replicas[1:])
    after = [without.owner(session) for session in sessions]
    replaced = Ring([*replicas[1:], uuid.uuid4().hex[:8]])
    joined = [replaced.owner(session) for session in sessions]
    share = Counter(owners)
    return {
        "replicas": count,
        "fullest": max(share.values()) * count / len(sessions),
        "emptiest": min(share[replica] for replica in replicas) * count / len(sessions),
        "moved_when_one_dies": _changed(owners, after),
        "moved_when_replaced": _changed(after, joined),
        "build_ms": 1e3 * (built - started),
        "lookup_us": 1e6 * (looked_up - built) / len(sessions),
    }


def _changed(before: list[str], after: list[str]) -> float:
    return sum(b != a for b, a in zip(before, after, strict=True)) / len(before)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=200_000)
    parser.add_argument("--name", default=default_name("ring_balance"))
    options = parser.parse_args()
    results = Results(options.name, {"sessions": options.sessions})
    sessions = [uuid.uuid4().hex for _ in range(options.sessions)]
    rows = [measure(count, sessions) for count in REPLICAS]
    for row in rows:
        print(row)
    results.summary({str(row["replicas"]): row for row in rows})


if __name__ == "__main__":
    main()
