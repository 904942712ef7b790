"""Live windows equal those cut by the rule, whatever the pieces in which the readings come."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contract.models import Window
from edge_agent.models import window as module
from edge_agent.models.window import WindowRing
from edge_agent.sensors.port import Reading
from trainer.windows import window_starts

FIELDS = ("a", "b", "c")
SCHEMA = pa.schema(
    [
        ("ts", pa.timestamp("us", "UTC")),
        ("a", pa.float64()),
        ("b", pa.int64()),
        ("unused", pa.string()),
        ("c", pa.bool_()),
    ]
)


def by_the_rule(rows: list[dict], window: Window) -> list[tuple[int, int, np.ndarray]]:
    """The rule, said as simply as possible."""
    runs: list[list[dict]] = []
    for row in rows:
        step_us = row["ts"] - runs[-1][-1]["ts"] if runs else -1
        if step_us < 0 or step_us > window.gap_s * 1e6:
            runs.append([])
        runs[-1].append(row)
    found = []
    for run in runs:
        for end in range(window.rows, len(run) + 1, window.stride):
            cut = run[end - window.rows : end]
            values = np.array([[np.float32("nan") if r[f] is None else as_float32(r[f]) for f in FIELDS] for r in cut])
            found.append((cut[0]["ts"], cut[-1]["ts"], values.astype(np.float32)))
    return found


def as_float32(value: float | int | bool) -> np.float32:
    return np.int64(value).astype(np.float32) if type(value) is int else np.float32(value)


def fed(rows: list[dict], window: Window, pieces: list[int]) -> list[tuple[int, int, np.ndarray]]:
    """In pieces: 1 is a single reading, more a block."""
    ring, found, at, turn = WindowRing(window, FIELDS), [], 0, 0
    while at < len(rows):
        count = min(pieces[turn % len(pieces)], len(rows) - at)
        part = rows[at : at + count]
        if count == 1:
            sample = Reading({name: part[0][name] for name in FIELDS}, part[0]["ts"])
        else:
            columns = [pa.array([r["ts"] for r in part], pa.int64()).cast(SCHEMA.field(0).type)]
            columns += [pa.array([r.get(f.name) for r in part], f.type) for f in list(SCHEMA)[1:]]
            sample = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        found += [(cut.start_us, cut.end_us, cut.values[0]) for cut in ring.feed(sample)]
        at, turn = at + count, turn + 1
    return found


def same(left: list[tuple[int, int, np.ndarray]], right: list[tuple[int, int, np.ndarray]]) -> None:
    assert [each[:2] for each in left] == [each[:2] for each in right]
    for (_, _, ours), (_, _, theirs) in zip(left, right, strict=True):
        assert ours.dtype == np.float32
        assert ours.tobytes() == theirs.tobytes() or np.array_equal(ours, theirs, equal_nan=True)


row = st.fixed_dictionaries(
    {
        "step": st.sampled_from([0, 1, 1, 1, 1, 1, 2, 5, -1, 9]),
        "a": st.none() | st.floats(allow_nan=True, width=32) | st.floats(-1e30, 1e30),
        "b": st.none() | st.integers(-(2**63), 2**63 - 1),
        "c": st.none() | st.booleans(),
    }
)


@given(
    rows=st.lists(row, max_size=120),
    size=st.integers(2, 12),
    stride=st.integers(1, 15),
    gap=st.sampled_from([1, 2, 4, 8]),
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    slack=st.sampled_from([1, 3, 1024]),
    aside=st.sampled_from([1, 3, 32]),
)
@example(
    rows=[{"step": 1, "a": 0.1, "b": 2**60 + 1, "c": True}] * 9, size=3, stride=2, gap=1, pieces=[1], slack=1, aside=2
)
def test_live_windows_equal_the_rule_and_the_trainers_in_whatever_pieces_the_readings_come(
    rows, size, stride, gap, pieces, slack, aside
) -> None:
    ts, stamped = 1_700_000_000_000_000, []
    for each in rows:
        ts += each["step"] * 1_000_000
        stamped.append(each | {"ts": ts})
    window = Window(rows=size, stride=stride, gap_s=float(gap))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLACK_ROWS_MIN", slack)
        patch.setattr(module, "READINGS_ASIDE_MAX", aside)
        live = fed(stamped, window, pieces)
    same(live, by_the_rule(stamped, window))
    ts_us = np.array([each["ts"] for each in stamped], np.int64)
    starts = window_starts(ts_us, window)
    assert [cut[:2] for cut in live] == [(int(ts_us[at]), int(ts_us[at + size - 1])) for at in starts]


def test_a_window_is_its_own_memory_so_that_later_readings_do_not_change_it() -> None:
    ring = WindowRing(Window(rows=2, stride=1, gap_s=10), ["a"])
    cuts = [cut for n in range(5) for cut in ring.feed(Reading({"a": float(n)}, n))]
    assert [cut.values[0, :, 0].tolist() for cut in cuts] == [[0, 1], [1, 2], [2, 3], [3, 4]]


def test_a_window_is_there_with_its_last_reading() -> None:
    ring = WindowRing(Window(rows=100, stride=40, gap_s=10), ["a"])
    found = [len(list(ring.feed(Reading({"a": 1.0}, n)))) for n in range(200)]
    assert [n for n, count in enumerate(found) if count] == [99, 139, 179]


def test_a_window_of_a_new_run_is_there_with_its_last_reading_where_strides_are_long() -> None:
    """Mutant tried: readings put aside for as long as the run that a gap ended would have had to wait."""
    ring = WindowRing(Window(rows=4, stride=20, gap_s=1), ["a"])
    ts_us = [*range(6), *range(10_000_000, 10_000_004)]
    found = [len(list(ring.feed(Reading({"a": 1.0}, us)))) for us in ts_us]
    assert [n for n, count in enumerate(found) if count] == [3, 9]


def test_after_a_reading_that_does_not_fit_a_new_run_begins_with_the_next() -> None:
    """Mutant tried: what was put aside after it forgotten."""
    ring, cuts = WindowRing(Window(rows=4, stride=4, gap_s=10), ["a"]), []
    for n in range(12):
        try:
            cuts += ring.feed(Reading({"a": "bad" if n == 2 else float(n)}, n))
        except ValueError:
            ring.reset()
    assert [cut.values[0, :, 0].tolist() for cut in cuts] == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_a_field_that_is_not_in_the_stream_any_more_is_nan() -> None:
    ring = WindowRing(Window(rows=2, stride=2, gap_s=10), ["gone"])
    block = pa.RecordBatch.from_pydict({"ts": pa.array([0, 1]).cast(pa.timestamp("us", "UTC")), "a": [1.0, 2.0]})
    (cut,) = ring.feed(block)
    assert all(math.isnan(value) for value in cut.values.ravel())
