"""From batches to files: order, lineage, dates, statistics, encodings.

Mutants tried, each made a test here fail: row numbers counted over the flush; row numbers of a thinned batch
counted; pieces of several schemas put in the wrong place; statistics rounded inwards; a statistic for a year beyond
9999; the first date taken for all; the date taken from `ts` whatever its distance.
"""

from __future__ import annotations

import json
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract.batches import TS_TYPE, Clock
from contract.names import shard_of
from lake.parquet import encode
from lake.parts import COUNTING, DAY_US, REPEATING, Part, RawBatch, build, sort_key
from lake.plan import BASE_COLUMNS, Columns, WireSchemas, grow
from tests.contract.lake_suite import CLOCK, EPOCH, NOW_US, rows

SKEW_US = 31 * DAY_US
LATE = Clock(synced=False, wall_us=5, monotonic_us=7, boot="ef" * 16)


def batch(device: str, seq: int, content: pa.RecordBatch, clock: Clock = CLOCK, received_us: int = NOW_US) -> RawBatch:
    return RawBatch(device, EPOCH, seq, shard_of(device), received_us, clock, content)


def built(*batches: RawBatch) -> tuple[list[Part], int]:
    wire_of = WireSchemas()
    columns: Columns = BASE_COLUMNS
    for item in batches:
        columns = grow(columns, wire_of(item.batch.schema), "s")
    return build(sorted(batches, key=sort_key), wire_of, columns, SKEW_US)


def column(part: Part, name: str) -> list[object]:
    values = part.table.column(name)
    return values.cast(pa.string()).to_pylist() if pa.types.is_dictionary(values.type) else values.to_pylist()


def test_rows_are_ordered_by_device_and_seq_and_keep_their_order_within_a_batch() -> None:
    x = pa.array([3.0, 1.0, 2.0], pa.float32())
    parts, _ = built(batch("b", 2, rows(x=x)), batch("a", 9, rows(x=x)), batch("b", 1, rows(x=x)))
    assert len(parts) == 1
    assert column(parts[0], "_device") == ["a"] * 3 + ["b"] * 6
    assert column(parts[0], "_seq") == [9] * 3 + [1] * 3 + [2] * 3
    assert column(parts[0], "_row") == [0, 1, 2] * 3
    assert column(parts[0], "x") == [3.0, 1.0, 2.0] * 3


def test_every_row_knows_where_it_came_from() -> None:
    first, second = batch("a", 1, rows(2)), batch("a", 2, rows(1), LATE, NOW_US + 5)
    parts, _ = built(first, second)
    part = parts[0]
    assert column(part, "_epoch") == [EPOCH] * 3
    assert [str(value) for value in column(part, "_clock")[:2]] == ["None", "None"]
    assert json.loads(str(column(part, "_clock")[2])) == {"boot": "ef" * 16, "mono_us": 7, "wall_us": 5}
    received = part.table.column("_received_at").cast(pa.int64()).to_pylist()
    assert received == [NOW_US, NOW_US, NOW_US + 5]
    assert column(part, "_schema") == [WireSchemas()(first.batch.schema).fingerprint] * 3


def test_a_thinned_batch_keeps_its_row_numbers() -> None:
    thin = rows(3, x=pa.array([1, 2, 3], pa.int8()), _row=pa.array([0, 4, 9], pa.int32()))
    parts, _ = built(batch("a", 1, rows(2, x=pa.array([1, 2], pa.int8()))), batch("a", 2, thin))
    assert column(parts[0], "_row") == [0, 1, 0, 4, 9]
    assert "field__row" not in parts[0].table.column_names


def test_batches_of_different_schemas_are_interleaved_and_lack_nothing_but_what_they_lack() -> None:
    one, two = rows(2, x=pa.array([1, 2], pa.int8())), rows(2, x=pa.array([3, 4], pa.int8()))
    parts, _ = built(batch("a", 1, one), batch("a", 2, rows(1, y=pa.array(["a"]))), batch("a", 3, two))
    assert column(parts[0], "x") == [1, 2, None, 3, 4]
    assert column(parts[0], "y") == [None, None, "a", None, None]
    assert len(set(column(parts[0], "_schema"))) == 2


def test_dictionaries_that_differ_from_batch_to_batch_are_expanded() -> None:
    one = rows(2, x=pa.array(["a", "b"]).dictionary_encode())
    two = rows(2, x=pa.array(["b", "c"]).dictionary_encode())
    parts, _ = built(batch("a", 1, one), batch("a", 2, two))
    assert column(parts[0], "x") == ["a", "b", "b", "c"]


def test_rows_stand_under_the_day_of_their_ts() -> None:
    midnight = NOW_US - NOW_US % DAY_US
    over_midnight = pa.record_batch(
        {
            "ts": pa.array([midnight - 1, midnight, midnight + DAY_US]).view(TS_TYPE),
            "x": pa.array([1, 2, 3], pa.int8()),
        }
    )
    parts, skewed = built(batch("a", 1, over_midnight), batch("b", 1, over_midnight))
    day = date.fromisoformat(str(np.datetime64(midnight, "us"))[:10])
    assert [part.date for part in parts] == [date.fromordinal(day.toordinal() + n).isoformat() for n in (-1, 0, 1)]
    assert [column(part, "x") for part in parts] == [[1, 1], [2, 2], [3, 3]]
    assert [column(part, "_row") for part in parts] == [[0, 0], [1, 1], [2, 2]]
    assert skewed == 0


@pytest.mark.parametrize(
    ("ts_us", "off"),
    [
        (NOW_US + SKEW_US, False),
        (NOW_US - SKEW_US, False),
        (NOW_US + SKEW_US + 1, True),
        (NOW_US - SKEW_US - 1, True),
        (0, True),
        (-(2**63), True),
        (2**63 - 1, True),
    ],
)
def test_a_ts_too_far_from_its_arrival_stands_under_the_day_of_arrival(ts_us: int, off: bool) -> None:
    content = pa.record_batch({"ts": pa.array([ts_us], pa.int64()).view(TS_TYPE), "x": pa.array([1])})
    parts, skewed = built(batch("a", 1, content))
    today = str(np.datetime64(NOW_US, "us"))[:10]
    assert skewed == int(off)
    assert (parts[0].date == today) == off
    assert parts[0].table.column("ts").cast(pa.int64()).to_pylist() == [ts_us]


def test_statistics_bound_the_rows_from_outside() -> None:
    content = pa.record_batch(
        {"ts": pa.array([NOW_US + 1, NOW_US + 1_001], pa.int64()).view(TS_TYPE), "x": pa.array([1, 2])}
    )
    parts, _ = built(batch("b", 3, content), batch("a", 7, content))
    stats = json.loads(parts[0].stats)
    assert stats["numRecords"] == 4
    low, high = stats["minValues"], stats["maxValues"]
    assert (low["_device"], high["_device"]) == ("a", "b")
    assert (low["_seq"], high["_seq"]) == (3, 7)
    assert np.datetime64(low["ts"][:-1]) <= np.datetime64(NOW_US + 1, "us")
    assert np.datetime64(high["ts"][:-1]) >= np.datetime64(NOW_US + 1_001, "us")
    assert low["ts"].endswith("Z")
    assert stats["nullCount"] == {"ts": 0, "_device": 0, "_seq": 0, "_received_at": 0}


@pytest.mark.parametrize("ts_us", [-(2**63), 2**63 - 1, -62_135_596_800_000_001, 253_402_300_800_000_000])
def test_a_time_beyond_what_a_log_can_say_is_left_out_of_the_statistics(ts_us: int) -> None:
    content = pa.record_batch({"ts": pa.array([ts_us, NOW_US], pa.int64()).view(TS_TYPE), "x": pa.array([1, 2])})
    parts, _ = built(batch("a", 1, content))
    for part in parts:
        stats = json.loads(part.stats)
        assert ("ts" in stats["minValues"]) == (part.table.column("ts").cast(pa.int64()).to_pylist() == [NOW_US])
        assert "_received_at" in stats["minValues"]


def encodings(values: pa.Array) -> set[str]:
    file = pq.ParquetFile(pa.BufferReader(encode(pa.table({"x": values}), frozenset(), frozenset())))
    assert file.read().column("x").combine_chunks().equals(values)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    return set(file.metadata.row_group(0).column(0).encodings)


def test_encodings_follow_the_values() -> None:
    random = np.random.default_rng(1)
    measured = random.normal(size=20_000)
    assert "BYTE_STREAM_SPLIT" in encodings(pa.array(measured.astype(np.float32)))
    assert "BYTE_STREAM_SPLIT" in encodings(pa.array(measured))
    assert "RLE_DICTIONARY" in encodings(pa.array(measured.round(1)))
    assert encodings(pa.array(measured.round(5))) <= {"PLAIN", "RLE"}
    assert "DELTA_BINARY_PACKED" in encodings(pa.array(np.arange(20_000) * 7))
    assert "RLE_DICTIONARY" in encodings(pa.array(random.integers(0, 5, 20_000)))
    assert "RLE_DICTIONARY" in encodings(pa.array(["on", "off"] * 10_000))
    assert "BYTE_STREAM_SPLIT" in encodings(pa.array([row.tolist() for row in measured.reshape(200, 100)]))
    assert encodings(pa.array([None] * 5, pa.float64()))


def test_lineage_is_small() -> None:
    parts, _ = built(*(batch(f"device-{n % 10}", n // 10 + 1, rows(500)) for n in range(100)))
    size = encode(
        parts[0].table.select(["_device", "_epoch", "_seq", "_row", "_schema", "_clock", "_received_at"]),
        REPEATING,
        COUNTING,
    ).size
    assert size / parts[0].table.num_rows < 0.2
