"""`gaps` says what is missing and nothing else, for every set of batches: against a count by hand.

Mutants tried, each made a test here fail: gaps counted from the first seq that is there; one epoch's seqs taken for
another's; quarantine of another stream subtracted; one row less missing of each thinned batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lake.gaps import SCHEMA, gaps_query

DEVICES, EPOCHS, STREAMS = ("a", "b"), ("e1", "e2"), ("s", "t")
SEQS = st.integers(1, 9)
LANES = st.tuples(st.sampled_from(STREAMS), st.sampled_from(DEVICES), st.sampled_from(EPOCHS))
ROWS = st.one_of(
    st.integers(1, 3).map(lambda count: list(range(count))),
    st.sets(st.integers(1, 6), max_size=4).map(lambda kept: [0, *sorted(kept)]),
)
RAW = pa.schema([("_device", pa.string()), ("_epoch", pa.string()), ("_seq", pa.int64()), ("_row", pa.int32())])
ASIDE = pa.schema([("stream", pa.string()), ("device", pa.string()), ("epoch", pa.string()), ("seq", pa.int64())])


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        yield connection


def by_hand(
    batches: dict[tuple[tuple[str, str, str], int], list[int]], aside: set[tuple[tuple[str, str, str], int]]
) -> set[tuple[object, ...]]:
    expected: set[tuple[object, ...]] = set()
    lanes = {lane for lane, _ in (*batches, *aside)}
    for lane in lanes:
        seqs = {seq for found, seq in (*batches, *aside) if found == lane}
        missing = sorted(set(range(1, max(seqs))) - seqs)
        for _, run in groupby(enumerate(missing), lambda item: item[1] - item[0]):
            found = [seq for _, seq in run]
            expected.add((*lane, "missing", found[0], found[-1], len(found), None))
    for (lane, seq), rows in batches.items():
        lost = max(rows) + 1 - len(rows)
        if lost:
            expected.add((*lane, "thinned", seq, seq, 1, lost))
    return expected


@given(
    batches=st.dictionaries(st.tuples(LANES, SEQS), ROWS, max_size=25),
    aside=st.sets(st.tuples(LANES, SEQS), max_size=10),
    repeats=st.integers(1, 2),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gaps_are_what_a_count_by_hand_finds(
    connection: duckdb.DuckDBPyConnection,
    batches: dict[tuple[tuple[str, str, str], int], list[int]],
    aside: set[tuple[tuple[str, str, str], int]],
    repeats: int,
) -> None:
    for stream in STREAMS:
        rows = [
            (device, epoch, seq, row)
            for ((of, device, epoch), seq), numbers in batches.items()
            if of == stream
            for row in numbers
        ]
        connection.register(
            f"raw_{stream}", pa.Table.from_pylist([dict(zip(RAW.names, row, strict=True)) for row in rows], RAW)
        )
    records = [(*lane, seq) for lane, seq in aside] * repeats + [("s", "a", None, None)]
    connection.register(
        "aside", pa.Table.from_pylist([dict(zip(ASIDE.names, row, strict=True)) for row in records], ASIDE)
    )
    query = gaps_query({stream: f"raw_{stream}" for stream in STREAMS}, "aside", None)
    found = connection.execute(query).fetchall()
    assert len(found) == len(set(found))
    assert set(found) == by_hand(batches, aside)


def test_a_lake_without_streams_has_no_gaps(connection: duckdb.DuckDBPyConnection) -> None:
    empty = connection.execute(gaps_query({}, None, None)).to_arrow_table()
    assert empty.num_rows == 0
    assert empty.column_names == SCHEMA.names
