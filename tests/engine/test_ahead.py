"""How much is composed ahead of evictions, and when: pure arithmetic."""

import pytest

from sink_vllm.engine.ahead import heads_per_batch, pages_per_step, steps_between_batches
from sink_vllm.policy.schedule import Schedule, cdiv


@pytest.mark.parametrize("stride", [16, 32, 48, 64, 544, 1024])
def test_all_streams_in_lockstep_are_done_before_they_evict(stride: int) -> None:
    """However many they are, and with several tables; batches grow with the streams."""
    schedule = Schedule(sink_tokens=4, window=4 * stride - 4, stride=stride)
    between = steps_between_batches(schedule)
    for running in range(1, 600):
        for groups in (1, 2, 3):
            heads = heads_per_batch(running, groups)
            batches = cdiv(running * groups, heads)
            assert batches * between <= stride - stride // 4
            assert batches <= 8
            assert (heads - 1) * 8 < running * groups
        window = cdiv(schedule.capacity, 16)
        steps = cdiv(running * window, pages_per_step(running, window, schedule))
        assert steps <= cdiv(2 * stride, 3)
