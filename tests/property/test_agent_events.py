"""However events come and go, every row of them is told once, and little is held."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.events import HOLD_S, OPEN_KEYS_MAX, Event, EventLog, Kind

MOMENTS = st.lists(
    st.tuples(
        st.floats(0.0, 30.0),  # seconds since the moment before
        st.sampled_from([Kind.EVICTED, Kind.DROPPED, Kind.OVERRUN]),
        st.integers(0, 400),  # stream
        st.sampled_from(["bytes_max", "age_max"]),
        st.integers(1, 1_000),  # rows
        st.booleans(),  # whether the recorder comes by
    ),
    max_size=300,
)


@given(MOMENTS)
def test_every_row_is_told_once_and_what_waits_is_bounded(
    moments: list[tuple[float, Kind, int, str, int, bool]],
) -> None:
    log = EventLog()
    reported: Counter[Kind] = Counter()
    told: list[Event] = []
    now_s = 0.0
    for seconds, kind, stream, cause, rows, taken in moments:
        now_s += seconds
        log.report(Event(kind, f"s{stream}", "e", 1, 1, rows, {"cause": cause}), round(now_s * 1e6), now_s)
        reported[kind] += rows
        if taken:
            told += log.take(now_s)
            assert len(log._windows) <= OPEN_KEYS_MAX + len(Kind)
    told += log.take(now_s, all_of_them=True)
    summed: Counter[Kind] = Counter()
    for event in told:
        summed[event.kind] += event.rows or 0
    assert summed == reported
    assert sum(event.count for event in told) == len(moments)


@given(st.lists(st.floats(0.0, 10.0), max_size=200))
def test_one_kind_of_one_stream_is_told_at_most_once_a_minute_after_the_first(pauses: list[float]) -> None:
    log = EventLog()
    told_at = []
    now_s = 0.0
    for pause in pauses:
        now_s += pause
        log.report(Event(Kind.EVICTED, "s", "e", 1, 1, 1, {"cause": "bytes_max"}), 0, now_s)
        told_at += [now_s] * len(log.take(now_s))
    assert all(later - earlier > HOLD_S - 1e-6 for earlier, later in itertools.pairwise(told_at))
