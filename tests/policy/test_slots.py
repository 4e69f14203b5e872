"""Slots of host memory: each has one use, and the least recently used page goes first."""

import random

import pytest

from sink_vllm.policy.slots import Slots


def test_the_least_recently_used_page_goes_first() -> None:
    slots = Slots(2)
    first, second = slots.take(b"a"), slots.take(b"b")
    slots.touch(b"a")
    assert slots.take(b"c") == second
    assert list(slots) == [b"a", b"c"]
    assert slots.slot_of[b"a"] == first


def test_what_a_stream_has_passed_goes_before_all_others() -> None:
    """Unless it was of use meanwhile, or was never just passing."""
    slots = Slots(3)
    for key, passing in ((b"a", False), (b"b", True), (b"c", True)):
        slots.take(key, passing=passing)
    slots.touch(b"b")
    for key in (b"a", b"b", b"c", b"unknown"):
        slots.pass_by(key)
    slots.take(b"d")
    assert list(slots) == [b"a", b"b", b"d"]


def test_a_held_slot_is_not_reused() -> None:
    """Nor when its page is forgotten, until the copy is done."""
    slots = Slots(1)
    slot = slots.take(b"a")
    assert slot is not None
    slots.hold(slot)
    assert slots.take(b"b") is None
    slots.drop(b"a")
    assert slots.take(b"b") is None
    slots.release(slot)
    assert slots.take(b"b") == slot


@pytest.mark.parametrize("seed", range(20))
def test_random_uses_lose_no_slot(seed: int) -> None:
    rng = random.Random(seed)
    slots, held = Slots(rng.randint(1, 6)), []
    for _ in range(400):
        key = bytes([rng.randint(0, 9)])
        kind = rng.random()
        if kind < 0.5:
            if key in slots:
                slots.touch(key)
            elif (slot := slots.take(key, passing=rng.random() < 0.5)) is not None:
                slots.hold(slot)
                held.append(slot)
        elif kind < 0.6:
            slots.pass_by(key)
        elif kind < 0.7 and key in slots:
            slots.drop(key)
        elif kind < 0.72:
            slots.clear()
        elif held:
            slots.release(held.pop(rng.randrange(len(held))))
        slots.check()
    for slot in held:
        slots.release(slot)
    slots.clear()
    slots.check()
    assert len(slots._free) == slots.count
