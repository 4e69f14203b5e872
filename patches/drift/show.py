"""The table of seams, as text. Pure."""

from collections import Counter
from collections.abc import Iterator

from patches.drift.compare import Row, State
from patches.drift.seams import Kind

_MANY = 3
"""Places of one row that are named."""


def whole(rows: list[Row]) -> Iterator[str]:
    """All rows by kind, the worst first, with the diffs of what changed; then the counts."""
    for kind in Kind:
        of_kind = [row for row in rows if row.seam.kind is kind]
        if not of_kind:
            continue
        yield f"\n{kind.value}: {_counts(of_kind)}"
        for row in sorted(of_kind, key=lambda one: (-one.state, str(one.name))):
            yield from _lines(row)
    yield ""
    yield from summary(rows)


def summary(rows: list[Row]) -> Iterator[str]:
    """How many rows of each kind are in which state."""
    width = max(len(kind.value) for kind in Kind)
    for kind in Kind:
        if of_kind := [row for row in rows if row.seam.kind is kind]:
            yield f"{kind.value:{width}}  {_counts(of_kind)}"


def _counts(rows: list[Row]) -> str:
    counts = Counter(row.state for row in rows)
    return ", ".join(f"{counts[state]} {state.spelled}" for state in State if counts[state])


def _lines(row: Row) -> Iterator[str]:
    places = [str(one) for one in row.seam.places]
    more = f" and {len(places) - _MANY} more" if len(places) > _MANY else ""
    record = f"  patches/{row.seam.record}.md" if row.seam.record else ""
    yield f"  {row.state.spelled:17}  {row.name}  {', '.join(places[:_MANY])}{more}{record}"
    if row.note:
        yield f"      {row.note}"
    if row.state in (State.BODY, State.SIGNATURE, State.GONE):
        yield f"      source {row.digest}"
    for line in row.diff.splitlines():
        yield f"      {line}"
