"""Report by exception against a slow, obvious reference, over readings, over record batches and over any mixture.

The reference works on exact rationals, row by row, with no state but the last reported row.

Mutants tried, each found: reference = last row instead of last *reported* row; `>=` for `>`; NaN after NaN reported;
null transition ignored in columns; band not capped at the largest float; integer band in float64; heartbeat one
microsecond late; a clock that went back ignored; the page after a hit not looked at again.
"""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.sampling.on_change import OnChangeMode
from edge_agent.sampling.settings import OnChange
from edge_agent.sensors.columns import Columns
from edge_agent.sensors.port import Reading, Sample, SensorConfigError

FIELDS = pa.schema(
    [("f", pa.float32()), ("d", pa.float64()), ("i", pa.int64()), ("u", pa.uint64()), ("s", pa.string())]
)
COLUMNS = Columns(FIELDS)

_FLOAT_MAX = Fraction(sys.float_info.max)


def reference(rows: list[Reading], config: OnChange) -> list[int]:
    """Numbers of the rows that are reported."""
    reported: list[int] = []
    last: Reading | None = None
    for number, row in enumerate(rows):
        if last is None or due(row, last, config) or any(changed(name, row, last, config) for name in FIELDS.names):
            reported.append(number)
            last = row
    return reported


def due(row: Reading, last: Reading, config: OnChange) -> bool:
    assert row.ts_us is not None and last.ts_us is not None
    silence_us = round(config.max_silence_s * 1_000_000)
    return silence_us > 0 and (row.ts_us - last.ts_us >= silence_us or row.ts_us < last.ts_us)


def changed(name: str, row: Reading, last: Reading, config: OnChange) -> bool:
    if config.watch is not None and name not in config.watch:
        return False
    value, before = row.values[name], last.values[name]
    if value is None or before is None:
        return (value is None) != (before is None)
    if isinstance(value, str):
        return bool(value != before)
    if math.isnan(value) or math.isnan(before):
        return math.isnan(value) != math.isnan(before)
    if math.isinf(value) or math.isinf(before):
        return bool(value != before)
    width = config.deadband.get(name, 0.0)
    if isinstance(width, str):
        width = float(width[:-1]) / 100 * abs(before)
    if name in ("i", "u"):
        return abs(Fraction(value) - Fraction(before)) > Fraction(width)
    # Band ends of float fields are float64, as documented: rounding the band is part of the rule.
    low, high = max(before - width, -sys.float_info.max), min(before + width, sys.float_info.max)
    return bool(Fraction(value) < Fraction(low) or Fraction(value) > Fraction(high))


def near(centre: float) -> st.SearchStrategy[float]:
    return st.sampled_from([centre + step * 0.125 for step in range(-12, 13)])


FLOATS = st.one_of(
    near(20.0), near(0.0), st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38]), st.floats(width=32)
)
DOUBLES = st.one_of(near(1e9), st.sampled_from([sys.float_info.max, -sys.float_info.max, 5e-324]), st.floats())
INTS = st.one_of(st.integers(-5, 5), st.integers(2**53 - 2, 2**53 + 3), st.sampled_from([-(2**63), 2**63 - 1]))
UINTS = st.one_of(st.integers(0, 5), st.sampled_from([2**64 - 1, 2**64 - 2, 2**63]))
STEPS = st.one_of(st.just(1_000), st.integers(0, 3_000_000), st.integers(-5_000_000, -1))


@st.composite
def row_values(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "f": draw(st.none() | FLOATS),
        "d": draw(st.none() | DOUBLES),
        "i": draw(st.none() | INTS),
        "u": draw(st.none() | UINTS),
        "s": draw(st.sampled_from([None, "", "on", "off"])),
    }


@st.composite
def readings(draw: st.DrawFn) -> list[Reading]:
    """Runs of equal rows, so that there are quiet stretches longer than a page, with a ts that mostly goes forward."""
    rows: list[Reading] = []
    ts_us = draw(st.sampled_from([0, 1_700_000_000_000_000, 2**62]))
    for values in draw(st.lists(row_values(), min_size=1, max_size=12)):
        kept_fields = draw(st.sets(st.sampled_from(FIELDS.names)))
        if rows:
            # Often only some fields change.
            values = {name: rows[-1].values[name] if name in kept_fields else values[name] for name in values}
        for _ in range(draw(st.sampled_from([1, 1, 2, 70, 400]))):
            ts_us += draw(STEPS) if len(rows) % 50 == 0 else 1_000
            rows.append(COLUMNS.reading(Reading(values, ts_us), 0))
    return rows


@st.composite
def configs(draw: st.DrawFn) -> OnChange:
    width = st.sampled_from([0.0, 0.125, 0.25, 1.0, 1.5, 1e300, "0%", "1%", "10%", "250%"])
    deadband = draw(st.dictionaries(st.sampled_from(["f", "d", "i", "u"]), width))
    watch = draw(st.none() | st.lists(st.sampled_from(FIELDS.names), min_size=1, unique=True).map(tuple))
    if watch is not None:
        deadband = {name: each for name, each in deadband.items() if name in watch}
    return OnChange(deadband=deadband, watch=watch, max_silence_s=draw(st.sampled_from([0.0, 0.003, 0.5, 2.0])))


def rows_of(samples: list[Sample]) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for sample in samples:
        if isinstance(sample, Reading):
            found.append((sample.ts_us, dict(sample.values)))
        else:
            times = sample.column(0).view(pa.int64()).to_pylist()
            found += [(ts, row) for ts, row in zip(times, sample.drop_columns(["ts"]).to_pylist(), strict=True)]
    return found


def same(left: list[Any], right: list[Any]) -> bool:
    # repr tells 0.0 from -0.0, and takes NaN for NaN.
    return [repr(each) for each in left] == [repr(each) for each in right]


@settings(max_examples=150)
@given(rows=readings(), config=configs(), cuts=st.lists(st.integers(1, 900), max_size=6), single=st.booleans())
@example(
    rows=[COLUMNS.reading(Reading({"d": v}, i), 0) for i, v in enumerate([math.inf] * 100 + [1.0] * 100)],
    config=OnChange(deadband={"d": "10%"}),
    cuts=[],
    single=False,
)
def test_the_same_rows_are_reported_as_by_the_rule_read_aloud(
    rows: list[Reading], config: OnChange, cuts: list[int], single: bool
) -> None:
    expected = [(rows[number].ts_us, dict(rows[number].values)) for number in reference(rows, config)]

    one_by_one = OnChangeMode(config, COLUMNS.schema)
    assert same(rows_of([kept for row in rows for kept in one_by_one.feed(row)]), expected)

    # Blocks of the drawn sizes, every second piece as single readings if so drawn, one state throughout.
    mixed = OnChangeMode(config, COLUMNS.schema)
    kept: list[Sample] = []
    start = 0
    for turn, size in enumerate([*cuts, len(rows)]):
        piece = rows[start : start + size]
        start += size
        if not piece:
            continue
        if single and turn % 2:
            kept += [each for row in piece for each in mixed.feed(row)]
        else:
            kept += mixed.feed(COLUMNS.assemble(piece))
    assert same(rows_of(kept), expected)


def test_slow_drift_is_reported_because_the_reference_is_the_last_reported_row() -> None:
    mode = OnChangeMode(OnChange(deadband={"d": 1.0}, watch=("d",), max_silence_s=0), COLUMNS.schema)
    values = [0.25 * step for step in range(20)]
    kept = [v for v in values if mode.feed(COLUMNS.reading(Reading({"d": v}, 0), 0))]
    assert kept == [0.0, 1.25, 2.5, 3.75]


def test_a_silent_field_is_reported_at_the_heartbeat_and_at_once_when_the_clock_was_set_back() -> None:
    mode = OnChangeMode(OnChange(max_silence_s=10), COLUMNS.schema)
    seconds = [0, 1, 9, 10, 11, 19, 20, 5, 6, 15]
    kept = [s for s in seconds if mode.feed(COLUMNS.reading(Reading({"i": 7}, s * 1_000_000), 0))]
    assert kept == [0, 10, 20, 5, 15]


def kept_rows(values: list[dict[str, Any]], config: OnChange) -> list[int]:
    """Numbers of the reported rows, one row a millisecond: the same row by row and as one block."""
    rows = [COLUMNS.reading(Reading(each, number * 1000), 0) for number, each in enumerate(values)]
    mode = OnChangeMode(config, COLUMNS.schema)
    one_by_one = [(row.ts_us or 0) // 1000 for row in rows if mode.feed(row)]
    block = OnChangeMode(config, COLUMNS.schema).feed(COLUMNS.assemble(rows))
    assert [ts // 1000 for ts, _ in rows_of(block)] == one_by_one
    return one_by_one


QUIET = 500
"""Rows enough that a block is scanned in pages and no longer row by row."""


def test_the_heartbeat_of_a_quiet_block_comes_on_its_row() -> None:
    assert kept_rows([{"i": 7}] * 1200, OnChange(max_silence_s=0.5)) == [0, 500, 1000]


@pytest.mark.parametrize(
    ("field", "before", "after"),
    [
        ("s", "on", None),
        ("s", None, "on"),
        ("s", "on", "off"),
        ("i", 1, None),
        ("i", None, 1),
        ("d", 1.0, math.nan),
        ("d", math.nan, 1.0),
        ("d", math.nan, None),
        ("d", None, math.nan),
        ("d", math.inf, -math.inf),
        ("d", sys.float_info.max, math.inf),
        ("d", 1.0, -math.inf),
    ],
)
def test_every_kind_of_transition_is_reported_after_a_quiet_stretch(field: str, before: Any, after: Any) -> None:
    deadband: dict[str, float | str] = {} if field == "s" else {field: "250%"}
    rows = [{field: before}] * QUIET + [{field: after}] * QUIET
    assert kept_rows(rows, OnChange(deadband=deadband, max_silence_s=0)) == [0, QUIET]


@pytest.mark.parametrize("value", [0.0, math.nan, None, math.inf])
def test_what_stays_the_same_is_not_reported_again(value: float | None) -> None:
    assert kept_rows([{"d": value}] * QUIET, OnChange(max_silence_s=0)) == [0]
    assert kept_rows([{"d": 0.0}, {"d": -0.0}], OnChange(max_silence_s=0)) == [0]


@pytest.mark.parametrize("config", [OnChange(watch=("nope",)), OnChange(deadband={"nope": 1.0})])
def test_a_field_that_the_sensor_does_not_have_is_named(config: OnChange) -> None:
    with pytest.raises(SensorConfigError, match="'nope'"):
        OnChangeMode(config, COLUMNS.schema)
