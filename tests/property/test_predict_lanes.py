"""Windows of rows that come in pieces are those of all rows at once, wherever the pieces end and cutting went on.

Mutants tried, each made a test fail: going on at the last row, or a stride behind the last window; windows of the rest
given again; the rest of an earlier run kept.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.models import Window
from trainer.lanes import LaneCutter, LaneRows
from trainer.windows import views, window_starts

STEPS = st.integers(0, 80).flatmap(
    lambda count: st.lists(st.sampled_from([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9, -3]), min_size=count, max_size=count)
)
RULES = st.builds(Window, rows=st.integers(2, 6), stride=st.integers(1, 9), gap_s=st.just(2.0))


def lane(steps) -> LaneRows:
    ts = np.cumsum(np.array(steps, np.int64)) * 1_000_000
    count = len(ts)
    numbers = np.arange(count)
    values = np.stack([numbers, -numbers], axis=1).astype(np.float32).reshape(count, 2)
    return LaneRows(ts, numbers // 3 + 1, (numbers % 3).astype(np.int32), values)


def whole(rows: LaneRows, window: Window) -> list[tuple]:
    starts = window_starts(rows.ts_us, window)
    found = views(rows.values, window.rows)[starts] if len(starts) else []
    last = starts + window.rows - 1
    return [(int(rows.seq[end]), int(rows.row[end]), values.tolist()) for end, values in zip(last, found, strict=True)]


def given_by(cutter: LaneCutter, rows: LaneRows, cuts: list[int]) -> list[tuple]:
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(rows.ts_us)], strict=True):
        if begin == end:
            continue
        made = cutter.feed(rows.part(begin, end))
        for number, last in enumerate(made.ends):
            values = made.windows(number, number + 1)[0]
            found.append((int(made.rows.seq[last]), int(made.rows.row[last]), values.tolist()))
    return found


@given(STEPS, RULES, st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_give_the_windows_of_the_whole(steps, window, data):
    rows = lane(steps)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(steps)), max_size=8)))
    assert given_by(LaneCutter(window), rows, cuts) == whole(rows, window)


@given(STEPS, RULES, st.data())
@settings(max_examples=150, deadline=None)
def test_going_on_at_the_first_row_of_any_window_gives_what_follows(steps, window, data):
    rows = lane(steps)
    expected = whole(rows, window)
    starts = window_starts(rows.ts_us, window)
    if not len(starts):
        return
    number = data.draw(st.integers(0, len(starts) - 1))
    assert given_by(LaneCutter(window), rows.part(int(starts[number])), []) == expected[number:]


@given(STEPS, RULES)
@settings(max_examples=100, deadline=None)
def test_what_is_kept_is_less_than_a_window_and_a_stride(steps, window):
    cutter = LaneCutter(window)
    rows = lane(steps)
    for begin in range(len(steps)):
        cutter.feed(rows.part(begin, begin + 1))
        assert len(cutter._rest.ts_us) < window.rows + window.stride
