"""Answers as bytes: every format holds every row, of any year and any type.

Mutants tried, each made a test here fail: Python's own times; the lowest time as numpy says it; names left as they are;
a repeat that takes a name which is there; one sign for a whole interval.
"""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from lake.errors import QueryError
from lake.formats import Format, write
from tests.property.arrow_values import bits

LOWEST, HIGHEST = -(2**63), 2**63 - 1
BATCH = pa.record_batch(
    {
        "ts": pa.array([0, LOWEST + 1, HIGHEST, None], pa.int64()).view(pa.timestamp("us", "UTC")),
        "ns": pa.array([1, HIGHEST, LOWEST, None], pa.int64()).view(pa.timestamp("ns")),
        "day": pa.array([0, 2**31 - 1, -(2**31), None], pa.int32()).view(pa.date32()),
        "at": pa.array([1, 86_399, 0, None], pa.int32()).view(pa.time32("s")),
        "took": pa.array([1, LOWEST, HIGHEST, None], pa.int64()).view(pa.duration("ns")),
        "x": pa.array([1.5, float("nan"), float("-inf"), None]),
        "big": pa.array([0, 2**64 - 1, 1, None], pa.uint64()).cast(pa.decimal128(20, 0)),
        "raw": pa.array([b"\x00\xff", b"", b"a", None]),
        "word": pa.array(["a", "b", "a", None]).dictionary_encode(),
        "list": pa.array([[1, None], [], [3], None]),
        "pair": pa.array(
            [{"t": 1, "n": "x"}, {"t": None, "n": None}, {"t": 2, "n": ""}, None],
            pa.struct([("t", pa.timestamp("s", "UTC")), ("n", pa.string())]),
        ),
        'odd "name", ü': pa.array(['a "b", c', "line\nline", "", None]),
    }
)


def written(form: Format, *batches: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    given = batches or (BATCH.slice(0, 2), BATCH.slice(2))
    assert write(given, form, sink) == sum(batch.num_rows for batch in given)
    return sink.getvalue()


def test_arrow_and_parquet_hold_the_very_values() -> None:
    whole = pa.Table.from_batches([BATCH])
    sent = pa.ipc.open_stream(written(Format.ARROW)).read_all()
    assert sent.schema.equals(whole.schema)
    for name, column in zip(whole.column_names, sent.columns, strict=True):
        assert bits(column.combine_chunks()) == bits(whole.column(name).combine_chunks())
    plain = whole.drop_columns(["took"])  # Parquet has no durations but through Arrow's own metadata
    found = pq.read_table(io.BytesIO(written(Format.PARQUET)))
    assert found.num_rows == 4
    assert found.column("ns").cast(pa.int64()).to_pylist() == [1, HIGHEST, LOWEST, None]
    assert set(plain.column_names) < set(found.column_names)


def test_json_says_every_time_to_its_last_digit() -> None:
    lines = [json.loads(line) for line in written(Format.JSONL).splitlines()]
    assert json.loads(written(Format.JSON)) == lines
    assert [line["ts"] for line in lines] == [
        "1970-01-01T00:00:00.000000Z",
        "-290308-12-21T19:59:05.224193Z",
        "294247-01-10T04:00:54.775807Z",
        None,
    ]
    assert [line["ns"] for line in lines][:2] == ["1970-01-01T00:00:00.000000001", "2262-04-11T23:47:16.854775807"]
    assert lines[2]["ns"] == f"{LOWEST} ns"
    assert [line["day"] for line in lines] == ["1970-01-01", "5881580-07-11", "-5877641-06-23", None]
    assert [line["at"] for line in lines] == ["00:00:01", "23:59:59", "00:00:00", None]
    assert [line["took"] for line in lines] == [1, LOWEST, HIGHEST, None]
    assert [line["x"] for line in lines] == [1.5, None, None, None]
    assert [line["big"] for line in lines] == ["0", "18446744073709551615", "1", None]
    assert [line["raw"] for line in lines] == ["AP8=", "", "YQ==", None]
    assert [line["word"] for line in lines] == ["a", "b", "a", None]
    assert [line["list"] for line in lines] == [[1, None], [], [3], None]
    assert lines[0]["pair"] == {"t": "1970-01-01T00:00:01Z", "n": "x"}
    assert lines[3]["pair"] is None
    assert [line['odd "name", ü'] for line in lines] == ['a "b", c', "line\nline", "", None]


def test_csv_can_be_read_back() -> None:
    options = pacsv.ConvertOptions(
        column_types={name: pa.string() for name in BATCH.schema.names},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    parse = pacsv.ParseOptions(newlines_in_values=True)
    found = pacsv.read_csv(io.BytesIO(written(Format.CSV)), convert_options=options, parse_options=parse)
    assert found.column_names == BATCH.schema.names
    assert found.column("ts")[2].as_py() == "294247-01-10T04:00:54.775807Z"
    assert found.column("list").to_pylist() == ["[1,null]", "[]", "[3]", None]
    assert found.column('odd "name", ü').to_pylist() == ['a "b", c', "line\nline", "", None]
    assert found.column("x").to_pylist()[:2] == ["1.5", "nan"]


def test_columns_of_one_name_are_all_there_and_told_apart() -> None:
    columns = [pa.array([n]) for n in range(5)]
    batch = pa.record_batch(columns, names=["a", "a", "a_1", "a", "b"])
    wanted = {"a": 0, "a_2": 1, "a_1": 2, "a_3": 3, "b": 4}
    assert json.loads(written(Format.JSONL, batch)) == wanted
    assert json.loads(written(Format.JSON, batch)) == [wanted]
    assert written(Format.CSV, batch).splitlines()[0] == b'"a","a_2","a_1","a_3","b"'
    assert pq.read_table(io.BytesIO(written(Format.PARQUET, batch))).to_pylist() == [wanted]
    assert pa.ipc.open_stream(written(Format.ARROW, batch)).read_all().to_pylist() == [wanted]


def test_members_of_a_struct_without_names_all_come() -> None:
    """SQL's row(1, 2) has two members of no name."""
    pair = pa.StructArray.from_arrays([pa.array([1, 3]), pa.array([2, 4])], names=["", ""])
    batch = pa.record_batch({"r": pair})
    wanted = [{"r": {"": 1, "_1": 2}}, {"r": {"": 3, "_1": 4}}]
    assert json.loads(written(Format.JSON, batch)) == wanted
    assert [json.loads(line) for line in written(Format.JSONL, batch).splitlines()] == wanted
    assert written(Format.CSV, batch).splitlines()[1] == b'"{"""":1,""_1"":2}"'


def test_intervals_are_iso_8601_durations() -> None:
    """Months, days and nanoseconds do not add up to each other, so each has its own sign."""
    given = [(2, 3, 1_500_000_000), (-14, 0, 0), (0, -1, -250_000_000), (0, 0, 1), (0, 0, 0), None]
    said = ["P2M3DT1.5S", "P-14M", "P-1DT-0.25S", "PT0.000000001S", "PT0S", None]
    batch = pa.record_batch({"i": pa.array(given, pa.month_day_nano_interval())})
    assert [row["i"] for row in json.loads(written(Format.JSON, batch))] == said
    nested = pa.record_batch({"l": pa.array([given], pa.list_(pa.month_day_nano_interval()))})
    assert json.loads(written(Format.JSON, nested)) == [{"l": said}]
    assert written(Format.CSV, batch).splitlines()[1:3] == [b'"P2M3DT1.5S"', b'"P-14M"']
    with pytest.raises(QueryError, match=r"'i' is an interval.*::VARCHAR"):
        written(Format.PARQUET, batch)


@pytest.mark.parametrize("form", list(Format))
def test_an_answer_without_rows_has_a_schema(form: Format) -> None:
    data = written(form, BATCH.slice(0, 0))
    if form is Format.ARROW:
        assert pa.ipc.open_stream(data).schema.equals(BATCH.schema)
    elif form is Format.PARQUET:
        assert pq.read_schema(io.BytesIO(data)).names == BATCH.schema.names
    elif form is Format.CSV:
        assert data.startswith(b'"ts","ns"')
    elif form is Format.JSON:
        assert json.loads(data) == []
    elif form is Format.JSONL:
        assert data == b""
