"""A flush is cut into files by what its rows take in memory, NULLs and wider columns included.

Mutants tried, each made a test here fail: batches of all schemas in one file; a file for each schema whatever it takes;
sizes as they were sent, not as they are stored; dictionaries counted as they were sent; the union's width left out.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from contract.names import shard_of
from lake.parts import DAY_US, RawBatch, build, sort_key
from lake.plan import BASE_COLUMNS, Columns, WireSchemas, grow
from lake.portions import LINEAGE_BYTES, TOGETHER_SHARE, portions
from tests.contract.lake_suite import CLOCK, EPOCH, NOW_US, rows

TS_BYTES = 8


def batch(device: str, seq: int, content: pa.RecordBatch) -> RawBatch:
    return RawBatch(device, EPOCH, seq, shard_of(device), NOW_US, CLOCK, content)


def columns_for(wire_of: WireSchemas, batches: list[RawBatch]) -> Columns:
    columns: Columns = BASE_COLUMNS
    for item in batches:
        columns = grow(columns, wire_of(item.batch.schema), "s")
    return columns


def cut(batches: list[RawBatch], bytes_max: int) -> list[list[tuple[str, int]]]:
    """Device and seq of the batches of each file."""
    wire_of = WireSchemas()
    found = portions(batches, wire_of, columns_for(wire_of, batches), bytes_max)
    return [[(item.device, item.seq) for item in part] for part in found]


def narrow(count: int) -> pa.RecordBatch:
    return rows(count, x=pa.array(np.zeros(count, np.float32)))


def wide(count: int, fields: int = 1_000) -> pa.RecordBatch:
    return rows(count, **{f"w{number}": pa.array(np.zeros(count)) for number in range(fields)})


def test_a_flush_is_cut_where_a_file_would_take_too_much() -> None:
    batches = [batch("a", seq, narrow(1_000)) for seq in range(1, 9)]
    size = 1_000 * (LINEAGE_BYTES + TS_BYTES + 4)
    assert [len(part) for part in cut(batches, 3 * size)] == [3, 3, 2]
    assert [len(part) for part in cut(batches, 3 * size - 1)] == [2, 2, 2, 2]
    assert [len(part) for part in cut(batches, 1)] == [1] * 8
    assert [one for part in cut(batches, 3 * size) for one in part] == [("a", seq) for seq in range(1, 9)]


def test_a_wide_row_does_not_widen_the_many_rows_beside_it() -> None:
    """One row of 1,000 fields among 200,000 rows of one field: together 1.6 GB of NULLs."""
    batches = [batch("a", 1, narrow(65_536)), batch("b", 1, wide(1)), batch("c", 1, narrow(65_536))]
    assert cut(batches, 1 << 27) == [[("a", 1), ("c", 1)], [("b", 1)]]


def test_a_small_flush_of_many_schemas_is_one_file() -> None:
    batches = [batch(f"d{number}", 1, rows(2, **{f"only_{number}": pa.array([1.0, 2.0])})) for number in range(100)]
    together = 100 * 2 * (LINEAGE_BYTES + TS_BYTES + 100 * 8)
    assert len(cut(batches, TOGETHER_SHARE * together)) == 1
    assert len(cut(batches, TOGETHER_SHARE * (together - 1))) == 100


def test_schemas_that_are_nearly_alike_share_files() -> None:
    batches = [batch("a", seq, wide(1_000, 100 + seq % 2)) for seq in range(1, 5)]
    size = 1_000 * (LINEAGE_BYTES + TS_BYTES + 101 * 8)
    assert cut(batches, 2 * size) == [[("a", 1), ("a", 2)], [("a", 3), ("a", 4)]]


def test_a_wider_column_counts_by_its_width() -> None:
    exact = pa.array([Decimal(1)] * 10, pa.decimal128(38, 0))
    wire_of = WireSchemas()
    small = [batch("a", seq, rows(1_000, x=pa.array(np.zeros(1_000, np.int8)))) for seq in (1, 2)]
    columns = columns_for(wire_of, [batch("b", 1, rows(10, x=exact)), *small])
    size = 1_000 * (LINEAGE_BYTES + TS_BYTES + 16)
    assert [len(part) for part in portions(small, wire_of, columns, 2 * size)] == [2]
    assert [len(part) for part in portions(small, wire_of, columns, 2 * size - 1)] == [1, 1]


def test_a_dictionary_counts_as_the_texts_it_stands_for() -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000, pa.int8()), pa.array(["x" * 1_000]))
    batches = [batch("a", seq, rows(1_000, x=texts)) for seq in (1, 2)]
    assert [len(part) for part in cut(batches, 2_500_000)] == [2]
    assert [len(part) for part in cut(batches, 1_999_999)] == [1, 1]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=12),
    bytes_max=st.integers(10_000, 400_000),
)
def test_no_file_of_several_batches_takes_more_than_it_may(shapes: list[tuple[int, int, int]], bytes_max: int) -> None:
    contents = [
        rows(count, **{f"k{kind}_{number}": pa.array(np.arange(count) * 1.5) for number in range(fields)})
        for count, fields, kind in shapes
    ]
    batches = sorted((batch(f"d{number % 3}", number, item) for number, item in enumerate(contents, 1)), key=sort_key)
    wire_of = WireSchemas()
    columns = columns_for(wire_of, batches)
    found = list(portions(batches, wire_of, columns, bytes_max))
    assert sorted(item.seq for part in found for item in part) == list(range(1, len(batches) + 1))
    for part in found:
        assert part == sorted(part, key=sort_key)
        tables, _ = build(part, wire_of, columns, 31 * DAY_US)
        if len(part) > 1:
            assert sum(one.table.nbytes for one in tables) <= bytes_max + 1_000  # dictionaries of lineage, bitmaps
