"""The schedule against exact arithmetic: no drift, no bursts, and no missed tick uncounted.

Mutants tried, each found: `newest_passed` left out (catches up in a burst); period rounded to whole nanoseconds
(drifts); `overruns` counting the tick that is taken; rounding the tick's time up (wakes late by 1 ns); skipping on to
the next future tick.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.schedule import Schedule

RATES = st.one_of(
    st.sampled_from([0.1, 1 / 3, 1.0, 3.0, 7.0, 50.0, 999.9, 1000.0, 10_000.0]),
    st.floats(min_value=1e-4, max_value=1e4, allow_nan=False),
)
START_NS = st.integers(min_value=0, max_value=2**62)


@given(rate_hz=RATES, start_ns=START_NS, stalls=st.lists(st.integers(0, 20_000_000_000), max_size=50))
@example(rate_hz=0.1, start_ns=0, stalls=[20_000_000_000, 0])  # late by a period less 6e-7 ns
def test_ticks_lie_on_the_grid_move_forward_and_every_skipped_one_is_counted(
    rate_hz: float, start_ns: int, stalls: list[int]
) -> None:
    schedule = Schedule(rate_hz, start_ns)
    period = Fraction(10**9) / Fraction(rate_hz)
    now_ns, last_tick, skipped = start_ns, -1, 0
    for stall_ns in [0, *stalls]:
        due_ns = schedule.next_due(now_ns)
        # The tick whose time rounds down to due_ns, counted in exact arithmetic.
        tick = -(-(due_ns - start_ns) // period)
        assert due_ns == start_ns + (tick * period).__floor__()
        assert tick > last_tick
        assert start_ns + tick * period > now_ns - period, (
            "never a tick that is a whole period late: that would be catching up"
        )
        if tick > last_tick + 1:
            assert (tick + 1) * period > now_ns - start_ns, "the newest tick that has passed is taken"
            assert start_ns + tick * period <= now_ns, "no tick is skipped before its time has come"
        skipped += tick - last_tick - 1
        assert schedule.overruns == skipped
        last_tick = tick
        now_ns = max(now_ns, due_ns) + stall_ns


@given(rate_hz=RATES, ticks=st.integers(1, 300))
def test_a_punctual_reader_gets_every_tick_and_no_overrun(rate_hz: float, ticks: int) -> None:
    schedule = Schedule(rate_hz, 0)
    now_ns = 0
    for _ in range(ticks):
        now_ns = schedule.next_due(now_ns)
    assert schedule.overruns == 0
    assert now_ns == ((ticks - 1) * Fraction(10**9) / Fraction(rate_hz)).__floor__()


def test_a_million_ticks_at_3_hz_do_not_drift_by_a_nanosecond() -> None:
    schedule = Schedule(3.0, 0)
    # 333,333.0 s later, on time: the newest passed tick is the millionth, exactly.
    assert schedule.next_due(0) == 0
    assert schedule.next_due(333_333_000_000_000) == 333_333_000_000_000
    assert schedule.overruns == 999_998


@pytest.mark.parametrize("rate_hz", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_not_a_positive_number_is_refused(rate_hz: float) -> None:
    with pytest.raises(ValueError, match="rate_hz"):
        Schedule(rate_hz, 0)
