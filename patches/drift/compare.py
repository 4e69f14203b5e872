"""One seam in two releases: what became of it. Pure."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from patches.drift import text
from patches.drift.accepted import Accepted
from patches.drift.callers import still_fits
from patches.drift.seams import Kind, Seam, Symbol
from patches.drift.tree import Found, Tree

GONE = "gone"
"""Stands in the list of what was read for the source of something that is not there."""


class State(IntEnum):
    """From harmless to harmful."""

    UNCHANGED = 0
    ACCEPTED = 1
    """It changed, and somebody has read how."""
    BODY = 2
    SIGNATURE = 3
    GONE = 4

    @property
    def spelled(self) -> str:
        return ("unchanged", "read, and fine", "changed", "signature changed", "gone")[self]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    seam: Seam
    name: Symbol
    """Where the release we stand on defines it."""
    state: State
    digest: str = ""
    """Of the new text."""
    note: str = ""
    diff: str = ""


def compare(seam: Seam, base: Tree, other: Tree) -> Row:
    """What ``other`` has where ``base`` has the seam."""
    before, now = base.find(*seam.symbol), other.find(*seam.symbol)
    if seam.kind is Kind.OWN:
        return _own(seam, now)
    if before is None:
        # A name the guards or we only try for: nothing to compare with.
        return Row(seam, seam.symbol, State.UNCHANGED, note="not in the base release either")
    name = Symbol(before.module.name, before.path)
    if now is None:
        return Row(seam, name, State.GONE, GONE, _resembling(seam.symbol, base, other))
    old, new = _text(seam.kind, before), _text(seam.kind, now)
    moved = f"now in {now.spelled}" if now.spelled != before.spelled else ""
    if old == new:
        return Row(seam, name, State.UNCHANGED, note=moved)
    if seam.kind in _CALLED and still_fits(before, now):
        return Row(seam, name, State.UNCHANGED, note="there is more of it, which may be left out")
    if seam.phrases is not None and seam.phrases.found(text.source(before)):
        broken = seam.phrases.broken(text.source(before), text.source(now))
        if not broken:
            note = "its text changed; all that the guards look for is as it was"
            return Row(seam, name, State.UNCHANGED, note=note)
        note = "the guards look for " + ", ".join(map(repr, broken))
        return _changed(seam, name, before, now, "; ".join(filter(None, [note, moved])))
    return _changed(seam, name, before, now, moved)


def _own(seam: Seam, now: Found | None) -> Row:
    if now is None:
        return Row(seam, seam.symbol, State.UNCHANGED)
    note = f"a name of ours, which {now.spelled} has taken"
    return Row(seam, seam.symbol, State.SIGNATURE, text.digest(text.body(now)), note)


def _changed(seam: Seam, name: Symbol, before: Found, now: Found, note: str) -> Row:
    old, new = text.signature(before), text.signature(now)
    state = State.BODY
    pieces = []
    if old != new:
        state = State.SIGNATURE
        pieces.append(_diff(old + "\n", new + "\n", before.spelled, now.spelled))
    if seam.kind in _BODIES or not pieces:
        pieces.append(_diff(text.source(before), text.source(now), before.spelled, now.spelled))
    digest = text.digest(_text(seam.kind, now))
    return Row(seam, name, state, digest, note, "".join(pieces))


_BODIES = (Kind.PATCH, Kind.OVERRIDE, Kind.PRIVATE, Kind.GUARD, Kind.SWAP)
"""Where more than the way it is called matters."""
_CALLED = (Kind.IMPORT, Kind.PUBLIC)
"""Where we are the ones who call."""


def _text(kind: Kind, found: Found) -> str:
    """What of a symbol matters to us."""
    if kind is Kind.SWAP:
        return text.outline(found)
    return text.body(found) if kind in _BODIES else text.signature(found)


def _diff(old: str, new: str, before: str, now: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), before, now
    )
    return "".join(lines)


def _resembling(symbol: Symbol, base: Tree, other: Tree) -> str:
    """What may have become of a name: a hint for whoever reads the table."""
    if other.module(symbol.module) is None:
        return f"there is no module {symbol.module}"
    owner = other.find(symbol.module, symbol.path[:-1])
    if owner is None:
        return f"there is no {symbol.module}:{'.'.join(symbol.path[:-1])}"
    before = base.find(symbol.module, symbol.path[:-1])
    new = _names(other, owner) - (_names(base, before) if before else set())
    close = difflib.get_close_matches(symbol.path[-1], sorted(new), n=1)
    return f"resembles {close[0]}, which is new" if close else ""


def _names(tree: Tree, owner: Found) -> set[str]:
    cls = owner.as_class
    if cls is None:
        return set(owner.module.scope.defined)
    order = tree.order(cls)
    return {name for one in order for name in (*one.scope.defined, *one.on_instances)}


def table(
    seams: Iterable[Seam], base: Tree, other: Tree, accepted: Iterable[Accepted] = ()
) -> list[Row]:
    """One row per seam; what is inherited by several classes alike is one row."""
    read = {(str(one.symbol), one.source) for one in accepted}
    rows: dict[tuple[Kind, Symbol, str, State], Row] = {}
    for seam in seams:
        row = compare(seam, base, other)
        if row.state > State.ACCEPTED and (str(row.name), row.digest) in read:
            row = replace(row, state=State.ACCEPTED, diff="")
        key = seam.kind, row.name, row.digest, row.state
        known = rows.get(key)
        if known is None:
            rows[key] = row
        else:
            places = tuple(sorted({*known.seam.places, *seam.places}))
            rows[key] = replace(known, seam=replace(known.seam, places=places))
    return list(rows.values())
