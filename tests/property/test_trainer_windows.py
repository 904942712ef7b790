"""Windows cut with numpy are those that reading row by row gives, whatever the times are.

Mutants tried, each made a test here fail: `>` of the gap as `>=`; `ts` that goes back not a break; one window too few
per run; majority of equals the first instead of the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from contract.models import Window
from trainer.windows import MIXED, UNLABELLED, runs_of, views, window_codes, window_starts

windows = st.builds(
    Window, rows=st.integers(2, 9), stride=st.integers(1, 12), gap_s=st.sampled_from((0.000_01, 0.5, 1.0, 3_600.0))
)
steps = st.one_of(st.integers(0, 3), st.sampled_from((10, 11, 500_000, 500_001, -1, -1_000_000, 4_000_000_000)))


@st.composite
def times(draw: st.DrawFn) -> np.ndarray:
    start = draw(st.integers(-(2**40), 2**50))
    return np.cumsum([start, *draw(st.lists(steps, max_size=60))])


def row_by_row(ts_us: np.ndarray, window: Window, epochs: Collection[int] = ()) -> list[int]:
    """The rule of `contract.models.Window`, read aloud."""
    starts, run, since = [], 0, 0
    for number, moment in enumerate(ts_us.tolist()):
        if number and (number in epochs or not 0 <= moment - int(ts_us[number - 1]) <= window.gap_us):
            run, since = number, 0
        since += 1
        if since >= window.rows and (since - window.rows) % window.stride == 0:
            starts.append(run + since - window.rows)
    return starts


@given(times(), windows, st.sets(st.integers(1, 60)))
def test_windows_are_those_of_the_rule(ts_us: np.ndarray, window: Window, epochs: set[int]) -> None:
    assert window_starts(ts_us, window).tolist() == row_by_row(ts_us, window)
    begins = sorted(number for number in epochs if number < len(ts_us))
    found = window_starts(ts_us, window, np.array(begins, dtype=np.int64))
    assert found.tolist() == row_by_row(ts_us, window, begins)


@given(times(), windows)
def test_no_window_goes_over_a_gap_or_back_in_time(ts_us: np.ndarray, window: Window) -> None:
    for start in window_starts(ts_us, window):
        within = np.diff(ts_us[start : start + window.rows])
        assert len(within) == window.rows - 1
        assert (within >= 0).all()
        assert (within <= window.gap_us).all()


@given(times(), windows)
def test_runs_cover_every_row_once(ts_us: np.ndarray, window: Window) -> None:
    runs = runs_of(ts_us, window)
    covered = [row for start, length in zip(*runs, strict=True) for row in range(start, start + length)]
    assert covered == list(range(len(ts_us)))


@given(times(), windows, st.integers(1, 3))
def test_a_window_holds_the_rows_from_its_start(ts_us: np.ndarray, window: Window, channels: int) -> None:
    values = np.arange(len(ts_us) * channels, dtype=np.float32).reshape(-1, channels)
    starts = window_starts(ts_us, window)
    if len(starts):
        cut = views(values, window.rows)[starts]
        assert cut.shape == (len(starts), window.rows, channels)
        for found, start in zip(cut, starts, strict=True):
            assert (found == values[start : start + window.rows]).all()


@given(st.data(), times(), windows, st.sampled_from(("drop", "majority", "last")))
def test_a_windows_label_is_that_of_its_rows(data: st.DataObject, ts_us: np.ndarray, window: Window, span: str) -> None:
    count = len(ts_us)
    codes = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count)), dtype=np.int32)
    starts = window_starts(ts_us, window)
    found = window_codes(codes, starts, window.rows, span)
    assert len(found) == len(starts)
    for code, start in zip(found.tolist(), starts, strict=True):
        inside = codes[start : start + window.rows].tolist()
        if span == "last" or len(set(inside)) == 1:
            expected = inside[-1]
        elif span == "drop":
            expected = MIXED
        else:
            counts = Counter(inside)
            best = max(counts.values())
            expected = next(one for one in reversed(inside) if counts[one] == best)
        assert code == expected


def test_no_rows_give_no_windows() -> None:
    window = Window(rows=4, stride=2, gap_s=1.0)
    nothing = np.zeros(0, np.int64)
    assert len(window_starts(nothing, window)) == 0
    assert len(window_codes(np.zeros(0, np.int32), nothing, 4, "drop")) == 0
    assert UNLABELLED != MIXED
