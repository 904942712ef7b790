"""What a driver hands over becomes rows of exactly the declared types, or an error that names field, value and type.

Mutants tried, each found: check left out for lists; numpy memory shared instead of copied; float32 overflow let
through; bool taken as integer; missing field refused; unknown field dropped silently; nulls in a never-null field.
"""

from __future__ import annotations

import array
import datetime
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from edge_agent.sensors.columns import Columns, infer_fields
from edge_agent.sensors.port import Block, Reading, SensorConfigError, SensorValueError

NOW_US = 1_700_000_000_000_000


def stored(kind: pa.DataType, value: Any) -> Any:
    columns = Columns(pa.schema([("x", kind)]))
    reading = columns.reading(Reading({"x": value}), NOW_US)
    batch = columns.assemble([reading])
    assert batch.schema.field("x").type == kind
    return batch.column("x")[0].as_py()


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (pa.float64(), 0.1, 0.1),
        (pa.float64(), 3, 3.0),
        (pa.float64(), 2**53 + 2, float(2**53 + 2)),
        (pa.float64(), np.float32(0.1), float(np.float32(0.1))),
        (pa.float32(), 0.1, float(np.float32(0.1))),
        (pa.float32(), np.float32(0.1), float(np.float32(0.1))),
        (pa.float32(), math.inf, math.inf),
        (pa.float32(), 16_777_216, 16_777_216.0),
        (pa.float16(), 0.1, float(np.float16(0.1))),
        (pa.int8(), -128, -128),
        (pa.uint64(), 2**64 - 1, 2**64 - 1),
        (pa.int32(), np.int64(7), 7),
        (pa.bool_(), np.bool_(True), True),
        (pa.string(), "Öl", "Öl"),
        (pa.binary(), bytearray(b"\x00\xff"), b"\x00\xff"),
        (pa.list_(pa.float32()), [1, None, math.inf], [1.0, None, math.inf]),
        (pa.list_(pa.int16()), np.array([1, 2], np.int16), [1, 2]),
        (pa.list_(pa.int8(), 2), (1, 2), [1, 2]),
        (pa.decimal128(5, 2), Decimal("1.25"), Decimal("1.25")),
        (pa.date32(), datetime.date(2024, 2, 29), datetime.date(2024, 2, 29)),
        (pa.struct([("a", pa.int8())]), {"a": 1}, {"a": 1}),
        (pa.null(), None, None),
    ],
)
def test_a_value_that_fits_is_stored_as_it_is(kind: pa.DataType, value: Any, expected: Any) -> None:
    assert repr(stored(kind, value)) == repr(expected)


@pytest.mark.parametrize(
    ("kind", "value", "remedy"),
    [
        (pa.int32(), 1.0, "declare a float"),
        (pa.int32(), True, "declare a float"),
        (pa.int8(), 128, "-128..127"),
        (pa.uint8(), -1, "0..255"),
        (pa.float64(), True, "matching type"),
        (pa.float64(), "1", "matching type"),
        (pa.float64(), 2**53 + 1, "int64"),
        (pa.float64(), 10**400, "int64"),
        (pa.float32(), 1e39, "float64"),
        (pa.float32(), 16_777_217, "not exact"),
        (pa.float16(), 70_000.0, "float64"),
        (pa.bool_(), 1, "True or False"),
        (pa.string(), b"x", "str"),
        (pa.string(), "\ud800", "binary"),
        (pa.binary(), "x", "bytes"),
        (pa.list_(pa.int8()), 1, "list"),
        (pa.list_(pa.int8()), [300], "-128..127"),
        (pa.list_(pa.int8(), 2), [1], "exactly 2"),
        (pa.decimal128(5, 2), Decimal("1.255"), ""),
        (pa.timestamp("s"), datetime.datetime(2024, 1, 1, 0, 0, 0, 5), "stored as"),
        (pa.timestamp("us"), datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), "stored as"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_field_value_type_and_remedy(
    kind: pa.DataType, value: Any, remedy: str
) -> None:
    with pytest.raises(SensorValueError) as caught:
        stored(kind, value)
    message = str(caught.value)
    assert "'x'" in message and f"{value!r:.80}" in message and str(kind) in message and remedy in message


def test_a_reading_is_completed_ordered_and_stamped() -> None:
    columns = Columns(pa.schema([("a", pa.int64()), ("b", pa.string())]))
    reading = columns.reading(Reading({"b": "x"}), NOW_US)
    assert list(reading.values.items()) == [("a", None), ("b", "x")]
    assert reading.ts_us == NOW_US
    assert columns.reading(Reading({}, ts_us=np.int64(5)), NOW_US).ts_us == 5  # type: ignore[arg-type]
    with pytest.raises(SensorValueError, match=r"unknown fields \['c'\].*\['a', 'b'\]"):
        columns.reading(Reading({"a": 1, "c": 2}), NOW_US)
    with pytest.raises(SensorValueError, match=r"ts_us = 1\.5"):
        columns.reading(Reading({"a": 1}, ts_us=1.5), NOW_US)  # type: ignore[arg-type]
    with pytest.raises(SensorValueError, match="ts_us = 9223372036854775808"):
        columns.reading(Reading({"a": 1}, ts_us=2**63), NOW_US)


def test_a_field_declared_as_never_null_must_have_a_value() -> None:
    columns = Columns(pa.schema([pa.field("a", pa.int64(), nullable=False)]))
    with pytest.raises(SensorValueError, match="'a' is null"):
        columns.reading(Reading({}), NOW_US)
    with pytest.raises(SensorValueError, match="'a' has nulls"):
        columns.block(Block({"a": [1, None]}, interval_ns=1), NOW_US)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (np.array([1.5, math.nan, -0.0], np.float32), pa.float32()),
        (np.array([1, 2, 3], np.uint8), pa.uint8()),
        (np.array([[1, 9], [2, 9], [3, 9]], np.int16)[:, 0], pa.int16()),
        (np.array([True, False, True]), pa.bool_()),
        (np.ma.array([1, 2, 3], mask=[False, True, False], dtype=np.int32), pa.int32()),
        (array.array("d", [1.5, math.nan, -0.0]), pa.float64()),
        (memoryview(array.array("h", [1, 2, 3])), pa.int16()),
        (memoryview(bytes(6)).cast("H"), pa.uint16()),
        (pa.array([1, None, 3], pa.int8()), pa.int8()),
        (pa.chunked_array([[1.0], [2.0, 3.0]]), pa.float64()),
        ([1, None, 3], pa.int64()),
        (pa.nulls(3), pa.string()),
    ],
)
def test_a_block_takes_arrays_of_every_kind_bit_for_bit(column: Any, kind: pa.DataType) -> None:
    columns = Columns(pa.schema([("x", kind), ("y", pa.string())]))
    batch = columns.block(Block({"x": column}, ts_us=np.array([1, 2, 3])), NOW_US)
    assert batch.schema == columns.schema
    assert batch.column("ts").view(pa.int64()).to_pylist() == [1, 2, 3]
    expected = column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, kind)
    assert repr(batch.column("x").to_pylist()) == repr(expected.to_pylist())
    assert batch.column("y").null_count == 3


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (np.array([1.0, 2.0]), "declared float, but the block holds double"),
        (np.array([1, 2], np.float16), "declared float, but the block holds halffloat"),
        (array.array("d", [1, 2]), "declared float, but the block holds double"),
        (pa.array([1, 2]), "declared float, but the block holds int64"),
        (np.array([1, 2], np.int32), "declared float, but the block holds int32"),
        (np.zeros((2, 2), np.float32), "not a one-dimensional array"),
        (memoryview(np.zeros((2, 2), np.float32)), "not a one-dimensional array"),
        ("ab", "not a one-dimensional array"),
        (7, "not a one-dimensional array"),
        ([1.0, "x"], "'x' .*does not fit float"),
        ([1.0], "lengths"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(column: Any, message: str) -> None:
    columns = Columns(pa.schema([("x", pa.float32()), ("n", pa.int64())]))
    with pytest.raises(SensorValueError, match=message):
        columns.block(Block({"x": column, "n": [1, 2]}, interval_ns=1), NOW_US)


def test_a_driver_may_fill_the_same_memory_again() -> None:
    columns = Columns(pa.schema([("x", pa.int64()), ("y", pa.int64())]))
    numbers, buffer = np.array([1, 2]), array.array("q", [1, 2])
    batch = columns.block(Block({"x": numbers, "y": buffer}, interval_ns=1), NOW_US)
    numbers[:] = 9
    buffer[0] = buffer[1] = 9
    assert batch.column("x").to_pylist() == batch.column("y").to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("block", "times"),
    [
        (Block({"x": [1, 2, 3]}, ts_us=[5, 4, 4]), [5, 4, 4]),
        (Block({"x": [1, 2, 3]}, ts_us=pa.array([5, 6, 7], pa.timestamp("us", tz="UTC"))), [5, 6, 7]),
        (Block({"x": [1, 2, 3, 4]}, start_us=-10, interval_ns=312_500), [-10, 302, 615, 927]),
        (Block({"x": [1, 2, 3]}, interval_ns=1_000_000), [NOW_US - 2000, NOW_US - 1000, NOW_US]),
        (Block({"x": [1, 2]}, interval_ns=0), [NOW_US, NOW_US]),
        (Block({"x": [1]}), [NOW_US]),
        (Block({"x": [1]}, start_us=7), [7]),
        (Block({"x": []}), []),
    ],
)
def test_the_times_of_a_block(block: Block, times: list[int]) -> None:
    batch = Columns(pa.schema([("x", pa.int64())])).block(block, NOW_US)
    assert batch.column("ts").view(pa.int64()).to_pylist() == times


@pytest.mark.parametrize(
    "block",
    [
        Block({"x": [1, 2]}),
        Block({"x": [1, 2]}, interval_ns=-1),
        Block({"x": [1, 2]}, interval_ns=1.5),  # type: ignore[arg-type]
        Block({"x": [1, 2]}, ts_us=[1]),
        Block({"x": [1, 2]}, ts_us=[1, None]),
        Block({"x": [1, 2]}, ts_us=np.array([1.0, 2.0])),
        Block({"x": [1, 2]}, start_us=2**63 - 1, interval_ns=10_000),
        Block({}),
    ],
)
def test_a_block_whose_times_cannot_be_known_is_refused(block: Block) -> None:
    with pytest.raises(SensorValueError):
        Columns(pa.schema([("x", pa.int64())])).block(block, NOW_US)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (pa.schema([("ts", pa.int64())]), "'ts', which is reserved"),
        (pa.schema([("_row", pa.int32())]), "'_row', which is reserved"),
        (pa.schema([("", pa.int64())]), "field name"),
        (pa.schema([("a", pa.int64()), ("A", pa.int64())]), "differ"),
        (pa.schema([("a", pa.month_day_nano_interval())]), "not carried"),
        (pa.schema([]), "no field"),
        ({"a": "int64"}, "has to be a pyarrow.Schema"),
    ],
)
def test_fields_that_the_protocol_does_not_carry_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(SensorConfigError, match=message):
        Columns(fields)


def test_metadata_of_a_driver_does_not_travel() -> None:
    fields = pa.schema([pa.field("a", pa.int64(), metadata={"unit": "m"})], metadata={"made": "by"})
    schema = Columns(fields).schema
    assert schema.metadata is None and schema.field("a").metadata is None


def test_fields_are_inferred_from_the_first_reading_or_block() -> None:
    values = {"b": True, "i": 1, "f": 1.0, "s": "x", "y": b"x", "n": np.float32(1), "u": np.uint8(1), "l": [1]}
    kinds = [
        pa.bool_(),
        pa.int64(),
        pa.float64(),
        pa.string(),
        pa.binary(),
        pa.float32(),
        pa.uint8(),
        pa.list_(pa.int64()),
    ]
    assert infer_fields(Reading(values)) == pa.schema(list(zip(values, kinds, strict=True)))
    block = Block({"a": np.zeros(2, np.float32), "b": [None, 1], "c": array.array("B", [1, 2])})
    assert infer_fields(block) == pa.schema([("a", pa.float32()), ("b", pa.int64()), ("c", pa.uint8())])


@pytest.mark.parametrize("sample", [Reading({"x": None}), Reading({"x": object()}), Block({"x": [None]}), Reading({})])
def test_what_says_nothing_about_its_type_is_refused(sample: Reading | Block) -> None:
    with pytest.raises(SensorValueError, match=r"declare the fields"):
        infer_fields(sample)
