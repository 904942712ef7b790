"""Triggers and bursts against a slow, obvious reference, over readings, record batches and any mixture.

Mutants tried, each found: history not cleared after a burst (rows twice); post rows counted from the first active
row; re-trigger does not extend; hysteresis ignored on one side; a cut event starting again at once; the ring one row
too long; rate against the previous row although it was null; latch not carried from one block to the next; a column's
first row not compared with the block before; threshold of an integer field in float64; `spent` not ended by one
inactive row.
"""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.sampling.burst import BurstMode
from edge_agent.sampling.settings import Burst, Trigger
from edge_agent.sensors.columns import Columns
from edge_agent.sensors.port import Reading, Sample, SensorConfigError

FIELDS = pa.schema([("f", pa.float32()), ("d", pa.float64()), ("i", pa.int64()), ("b", pa.int8()), ("h", pa.float16())])
COLUMNS = Columns(FIELDS)


class ReferenceTrigger:
    """One condition, written as its sentence in the documentation."""

    def __init__(self, trigger: Trigger) -> None:
        self.t = trigger
        self.active = False
        self.before: tuple[Any, int] | None = None

    def sees(self, row: Reading) -> bool:
        value, t = row.values[self.t.field], self.t
        if value is None or math.isnan(value):
            return self.active
        assert row.ts_us is not None
        begins = ends = False
        if t.above is not None:
            begins, ends = value > t.above, value <= t.above - t.hysteresis
        elif t.below is not None:
            begins, ends = value < t.below, value >= t.below + t.hysteresis
        elif t.outside is not None:
            low, high = t.outside
            begins, ends = value < low or value > high, low + t.hysteresis <= value <= high - t.hysteresis
        elif t.rate_above is not None and self.before is not None and row.ts_us > self.before[1]:
            change, seconds = abs(float(value) - self.before[0]), (row.ts_us - self.before[1]) / 1e6
            begins, ends = change > t.rate_above * seconds, change <= (t.rate_above - t.hysteresis) * seconds
        self.before = (float(value), row.ts_us)
        if begins:
            self.active = True
        elif ends:
            self.active = False
        return self.active


def reference(rows: list[Reading], config: Burst) -> tuple[list[int], int, int]:
    """Numbers of the kept rows, bursts begun, bursts cut."""
    triggers = [ReferenceTrigger(trigger) for trigger in config.trigger]
    kept: list[int] = []
    history: list[int] = []
    in_burst, spent, length, left, bursts, cut = False, False, 0, 0, 0, 0
    for number, row in enumerate(rows):
        active = sum(trigger.sees(row) for trigger in triggers) > 0  # all of them see the row
        if in_burst:
            wanted = active or left > 0
            if wanted and length < config.rows_max:
                kept.append(number)
                length += 1
                left = config.post_rows if active else left - 1
                continue
            in_burst = False
            if wanted:
                cut += 1
                spent = active
        if active and not spent:
            in_burst, length, left = True, len(history) + 1, config.post_rows
            kept += [*history, number]
            history = []
            bursts += 1
        else:
            spent = spent and active
            history = [*history, number][-config.pre_rows :] if config.pre_rows else []
    return kept, bursts, cut


STEPS = st.integers(-6, 6).map(lambda half: half / 2)
ODD = st.sampled_from([None, math.nan, math.inf, -math.inf])
HUGE = st.sampled_from([None, 2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, -(2**63), 2**63 - 1])


@st.composite
def readings(draw: st.DrawFn) -> list[Reading]:
    """Few values near the limits of the triggers, so that they are crossed often; odd values in some examples only."""
    rows: list[Reading] = []
    ts_us = 1_700_000_000_000_000
    levels = draw(st.sampled_from([STEPS, STEPS, STEPS | ODD]))
    integers = draw(st.sampled_from([st.integers(-4, 4), st.integers(-4, 4) | HUGE]))
    pauses = st.sampled_from(
        draw(st.sampled_from([[1_000_000], [1_000_000, 500_000, 0], [1_000_000, -700_000, 2**54]]))
    )
    for _ in range(draw(st.integers(1, 25))):
        values = {
            "f": draw(levels),
            "d": draw(levels),
            "i": draw(integers),
            "b": draw(st.sampled_from([-128, -2, 0, 2, 127])),
            "h": draw(levels),
        }
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 9]))):
            ts_us += draw(pauses)
            rows.append(COLUMNS.reading(Reading(values, ts_us), 0))
    return rows


@st.composite
def triggers(draw: st.DrawFn) -> Trigger:
    field = draw(st.sampled_from(FIELDS.names))
    hysteresis = draw(st.sampled_from([0.0, 0.5, 1.0]))
    limit = draw(STEPS | st.sampled_from([-200.0, 126.5, 127.0, 2.0**53, 1e300]))
    shape = draw(st.sampled_from(["above", "below", "outside", "rate_above"]))
    if shape == "outside":
        width = draw(st.sampled_from([2.0, 3.0, 1e18]))
        return Trigger(field=field, outside=(limit, limit + width), hysteresis=min(hysteresis, width / 2))
    if shape == "rate_above":
        return Trigger(
            field=field, rate_above=hysteresis + draw(st.sampled_from([0.0, 0.5, 2.0])), hysteresis=hysteresis
        )
    return Trigger(field=field, hysteresis=hysteresis, **{shape: limit})  # type: ignore[arg-type]


@st.composite
def configs(draw: st.DrawFn) -> Burst:
    pre, post = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    room = draw(st.sampled_from([0, 1, 5, 30, 10_000]))
    found = draw(st.lists(triggers(), min_size=1, max_size=2))
    return Burst(trigger=tuple(found), pre_rows=pre, post_rows=post, rows_max=pre + 1 + post + room)


def numbered(samples: list[Sample], rows: list[Reading]) -> list[Any]:
    found: list[Any] = []
    for sample in samples:
        if isinstance(sample, Reading):
            found.append(repr((sample.ts_us, dict(sample.values))))
        else:
            times = sample.column(0).view(pa.int64()).to_pylist()
            body = sample.drop_columns(["ts"]).to_pylist()
            found += [repr(pair) for pair in zip(times, body, strict=True)]
    return found


@settings(max_examples=250)
@given(rows=readings(), config=configs(), cuts=st.lists(st.integers(1, 60), max_size=6), single=st.booleans())
def test_the_same_rows_are_kept_as_by_the_rule_read_aloud(
    rows: list[Reading], config: Burst, cuts: list[int], single: bool
) -> None:
    numbers, bursts, cut = reference(rows, config)
    expected = [repr((rows[number].ts_us, dict(rows[number].values))) for number in numbers]

    one_by_one = BurstMode(config, COLUMNS.schema)
    kept: list[Sample] = []
    for row in rows:
        kept += one_by_one.feed(row)
        assert one_by_one.held_rows <= config.pre_rows
    assert numbered(kept, rows) == expected
    assert (one_by_one.bursts, one_by_one.truncated) == (bursts, cut)

    mixed = BurstMode(config, COLUMNS.schema)
    kept, start = [], 0
    for turn, size in enumerate([*cuts, len(rows)]):
        piece = rows[start : start + size]
        start += size
        if single and turn % 2:
            kept += [each for row in piece for each in mixed.feed(row)]
        elif piece:
            kept += mixed.feed(COLUMNS.assemble(piece))
        assert mixed.held_rows <= config.pre_rows
    assert numbered(kept, rows) == expected
    assert (mixed.bursts, mixed.truncated) == (bursts, cut)


def burst_of(values: list[float | None], config: Burst, field: str = "d") -> list[int]:
    """Numbers of the kept rows, one row a second: the same row by row, and as two blocks cut anywhere."""
    rows = [COLUMNS.reading(Reading({field: value}, number * 1_000_000), 0) for number, value in enumerate(values)]
    mode = BurstMode(config, COLUMNS.schema)
    kept = seconds([each for row in rows for each in mode.feed(row)])
    for cut in range(1, len(rows)):
        mode = BurstMode(config, COLUMNS.schema)
        first, second = COLUMNS.assemble(rows[:cut]), COLUMNS.assemble(rows[cut:])
        assert seconds(mode.feed(first) + mode.feed(second)) == kept, f"blocks cut at row {cut}"
    return kept


def seconds(samples: list[Sample]) -> list[int]:
    times: list[int] = []
    for sample in samples:
        ts = [sample.ts_us] if isinstance(sample, Reading) else sample.column(0).view(pa.int64()).to_pylist()
        times += [each // 1_000_000 for each in ts]
    return times


def test_history_event_and_aftermath_are_kept_once_and_in_order() -> None:
    config = Burst(trigger=(Trigger(field="d", above=5.0),), pre_rows=2, post_rows=3)
    assert burst_of([0, 0, 0, 0, 9, 9, 0, 0, 0, 0, 0, 0], config) == [2, 3, 4, 5, 6, 7, 8]


def test_an_event_in_the_aftermath_extends_the_burst() -> None:
    config = Burst(trigger=(Trigger(field="d", above=5.0),), pre_rows=1, post_rows=2)
    assert burst_of([0, 0, 9, 0, 9, 0, 0, 0, 0], config) == [1, 2, 3, 4, 5, 6]


def test_hysteresis_keeps_an_event_open_until_the_value_is_really_back() -> None:
    config = Burst(trigger=(Trigger(field="d", above=5.0, hysteresis=2.0),))
    assert burst_of([0, 6, 4, 4, 3, 4, 6, 0], config) == [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("trigger", "values", "active"),
    [
        (Trigger(field="d", above=2.0), [2, 3, 2, 3, 1], [1, 3]),
        (Trigger(field="d", above=2.0, hysteresis=1.0), [3, 1.5, 1, 1.5], [0, 1]),
        (Trigger(field="d", below=2.0), [2, 1, 2, 1, 3], [1, 3]),
        (Trigger(field="d", below=2.0, hysteresis=1.0), [1, 2.5, 3, 2.5], [0, 1]),
        (Trigger(field="d", outside=(0, 4)), [0, -1, 4, 5, 0], [1, 3]),
        (Trigger(field="d", outside=(0, 4), hysteresis=1.0), [-1, 0.5, 1, 0.5, 5, 3.5, 3, 3.5], [0, 1, 4, 5]),
        (Trigger(field="d", rate_above=1.0), [0, 1, 2.5, 3, 1.5, 1.5], [2, 4]),
        (Trigger(field="d", rate_above=1.0, hysteresis=0.5), [0, 2, 2.75, 3.25, 4], [1, 2]),
    ],
)
def test_a_condition_begins_beyond_its_limit_and_ends_when_back_by_the_hysteresis(
    trigger: Trigger, values: list[float | None], active: list[int]
) -> None:
    assert burst_of(values, Burst(trigger=(trigger,))) == active


def test_null_and_nan_neither_begin_nor_end_an_event() -> None:
    above = Burst(trigger=(Trigger(field="d", above=2.0),))
    assert burst_of([math.nan, 3, math.nan, None, 3, 1, None, math.nan, 3], above) == [1, 2, 3, 4, 8]
    # From 0 to 3 in three seconds is a rate of 1, whatever stands between.
    rate = Burst(trigger=(Trigger(field="d", rate_above=1.5),))
    assert burst_of([0, None, math.nan, 3, 5, None, 5], rate) == [4, 5]


def test_a_rate_needs_time_to_pass() -> None:
    mode = BurstMode(Burst(trigger=(Trigger(field="d", rate_above=1.0),)), COLUMNS.schema)
    times = [0, 0, -5, -5, 1_000_000]
    rows = [COLUMNS.reading(Reading({"d": float(100 * n)}, ts), 0) for n, ts in enumerate(times)]
    assert [row.ts_us for row in rows if mode.feed(row)] == [1_000_000]
    block = BurstMode(Burst(trigger=(Trigger(field="d", rate_above=1.0),)), COLUMNS.schema)
    assert [batch.num_rows for batch in block.feed(COLUMNS.assemble(rows))] == [1]


def test_an_endless_event_is_cut_and_the_next_burst_waits_for_its_end() -> None:
    config = Burst(trigger=(Trigger(field="d", above=5.0),), pre_rows=1, post_rows=1, rows_max=4)
    assert burst_of([0, 9, 9, 9, 9, 9, 9, 0, 9, 0, 0], config) == [0, 1, 2, 3, 7, 8, 9]


def test_a_text_field_cannot_trigger() -> None:
    schema = Columns(pa.schema([("s", pa.string())])).schema
    with pytest.raises(SensorConfigError, match="'s' of type string"):
        BurstMode(Burst(trigger=(Trigger(field="s", above=1.0),)), schema)
