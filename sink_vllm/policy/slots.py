"""Which page lies in which slot of host memory, and which slot is reused next (pure arithmetic).

Slots are reused in the order in which their pages were last of use. A page that is only *passing*,
kept in case its stream ends here, goes to the front of that order when its stream has gone on
(``pass_by``), unless somebody has counted on it meanwhile (``touch``).

A slot that a copy reads or writes is *held* until that copy is done; its page may be forgotten
before, the slot is not reused. Used by one thread, but for ``in``, which any may ask.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator


class Slots:
    """Pages by key, each in a slot from ``range(count)``."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.slot_of: OrderedDict[bytes, int] = OrderedDict()
        """The page that is reused first comes first."""
        self._free = list(range(count))
        self._held: Counter[int] = Counter()
        self._orphans: set[int] = set()
        """Held slots whose pages were forgotten."""
        self._passing: set[bytes] = set()

    def __contains__(self, key: object) -> bool:
        return key in self.slot_of

    def __len__(self) -> int:
        """Pages that are kept."""
        return len(self.slot_of)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.slot_of)

    def take(self, key: bytes, *, passing: bool = False) -> int | None:
        """A slot for a page that is not kept yet; ``None`` if all are held.

        The least recently used page that is not held makes room.
        """
        assert key not in self.slot_of
        if not self._free:
            oldest = next((k for k, slot in self.slot_of.items() if slot not in self._held), None)
            if oldest is None:
                return None
            self.drop(oldest)
        slot = self._free.pop()
        self.slot_of[key] = slot
        if passing:
            self._passing.add(key)
        return slot

    def touch(self, key: bytes) -> None:
        """The page was of use; it passes no more."""
        self.slot_of.move_to_end(key)
        self._passing.discard(key)

    def pass_by(self, key: bytes) -> None:
        """The stream that passed has no use for the page any more."""
        if key in self._passing:
            self._passing.discard(key)
            self.slot_of.move_to_end(key, last=False)

    def drop(self, key: bytes) -> None:
        """Forget a page."""
        slot = self.slot_of.pop(key)
        self._passing.discard(key)
        if slot in self._held:
            self._orphans.add(slot)
        else:
            self._free.append(slot)

    def clear(self) -> None:
        """Forget all pages."""
        for key in list(self.slot_of):
            self.drop(key)

    def hold(self, slot: int) -> None:
        """A copy will read or write the slot."""
        self._held[slot] += 1

    def release(self, slot: int) -> None:
        """That copy is done."""
        self._held[slot] -= 1
        if not self._held[slot]:
            del self._held[slot]
            if slot in self._orphans:
                self._orphans.discard(slot)
                self._free.append(slot)

    def check(self) -> None:
        """Every slot is free, has one page, or is held by a copy of a page that was forgotten.

        Raises:
            AssertionError: otherwise.
        """
        used = list(self.slot_of.values())
        assert len({*used, *self._free}) == len(used) + len(self._free), "a slot has two uses"
        lost = set(range(self.count)) - {*used, *self._free, *self._orphans}
        assert not lost, f"lost slots: {sorted(lost)}"
        assert self._orphans <= set(self._held), "nobody gives these slots back"
        assert not set(self._free) & set(self._held), "a held slot is free"
        assert self._passing <= set(self.slot_of)
