"""Rows of an answer, written to stdout in the format that was asked for."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from headwater import output

TABLE_ROWS_MAX = 1_000
"""A person reads no more; every other format is complete."""
_PIECE_ROWS = 10_000


def write_rows(rows: pa.Table, form: str) -> None:
    """Write a table.

    Args:
        rows: what to write.
        form: `table` (at most TABLE_ROWS_MAX rows, the rest counted), `json` (one object per line), `csv`, `arrow` (IPC
            stream), `parquet`.
    """
    match form:
        case "json":
            for row in _plain(rows):
                output.say_json(row)
        case "csv":
            sink = io.BytesIO()
            pacsv.write_csv(_flat(rows), sink)
            output.say_bytes(sink.getvalue())
        case "arrow":
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, rows.schema) as writer:
                writer.write_table(rows)
            output.say_bytes(sink.getvalue())
        case "parquet":
            sink = io.BytesIO()
            pq.write_table(rows, sink, compression="zstd")
            output.say_bytes(sink.getvalue())
        case _:
            shown = rows.slice(0, TABLE_ROWS_MAX)
            output.say_table(rows.column_names, (list(row.values()) for row in _plain(shown)))
            if rows.num_rows > TABLE_ROWS_MAX:
                output.complain(f"{rows.num_rows:,} rows, of which {TABLE_ROWS_MAX:,} are shown; --format csv has all")


def binary_to_terminal(form: str) -> bool:
    """Whether this format would fill somebody's terminal with bytes."""
    return form in ("arrow", "parquet") and sys.stdout.isatty()


def _plain(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries, some thousands at a time; nanoseconds that Python's types cannot hold as text."""
    for batch in _flat_times(rows).to_batches(max_chunksize=_PIECE_ROWS):
        yield from batch.to_pylist()


def _flat_times(rows: pa.Table) -> pa.Table:
    for place, field in enumerate(rows.schema):
        if "[ns" in str(field.type) and not pa.types.is_nested(field.type):
            rows = rows.set_column(place, field.name, rows.column(place).cast(pa.string()))
    return rows


def _flat(rows: pa.Table) -> pa.Table:
    """CSV has no nested values and no bytes: they become JSON and hexadecimal text."""
    for place, field in enumerate(rows.schema):
        kind = field.type
        if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            column = rows.column(place)
            texts = [None if value is None else _text(value) for value in column.to_pylist()]
            rows = rows.set_column(place, field.name, pa.array(texts, pa.string()))
        elif pa.types.is_dictionary(kind):
            rows = rows.set_column(place, field.name, rows.column(place).cast(kind.value_type))
    return rows


def _text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else output.json_line(value)
