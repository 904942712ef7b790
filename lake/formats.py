"""Answers as bytes: Arrow, Parquet, CSV, JSON, JSON lines, or a table for a person; piece by piece, in bounded memory.

In JSON and CSV a time is ISO 8601 (with Z where it has a zone) to its last digit and of any year, bytes are base64,
decimals are text, durations are numbers of their unit, NaN and infinities are null in JSON, and what is nested is JSON
in CSV.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import chain
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

TABLE_ROWS_MAX = 1_000
"""A person reads no more; every other format is complete."""
_PIECE_ROWS = 10_000
_WIDTH_MIN, _WIDTH_PER_COLUMN = 80, 40


class Format(StrEnum):
    """How rows are written."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    ARROW = "arrow"
    PARQUET = "parquet"


CONTENT_TYPES = {
    Format.TABLE: "text/plain; charset=utf-8",
    Format.JSON: "application/json",
    Format.JSONL: "application/jsonl",
    Format.CSV: "text/csv; charset=utf-8",
    Format.ARROW: "application/vnd.apache.arrow.stream",
    Format.PARQUET: "application/vnd.apache.parquet",
}


def write(batches: Iterable[pa.RecordBatch], form: Format, sink: BinaryIO) -> int:
    """Write rows.

    Args:
        batches: at least one, all of one schema (as `Lake.read` gives them).
        form: the format. Of `table` at most TABLE_ROWS_MAX rows are written, and the number of the others.
        sink: where to.

    Returns:
        How many rows came.
    """
    pieces = iter(batches)
    first = next(pieces)
    counted = _Counted(chain((first,), pieces))
    match form:
        case Format.ARROW:
            with pa.ipc.new_stream(sink, first.schema) as stream:
                for batch in counted:
                    stream.write_batch(batch)
        case Format.PARQUET:
            with pq.ParquetWriter(sink, first.schema, compression="zstd") as parquet:
                for batch in counted:
                    parquet.write_batch(batch)
        case Format.CSV:
            _write_csv(counted, sink)
        case Format.JSON:
            sink.write(b"[")
            for number, line in enumerate(_lines(counted)):
                sink.write(b",\n" if number else b"\n")
                sink.write(line)
            sink.write(b"\n]\n")
        case Format.JSONL:
            for line in _lines(counted):
                sink.write(line + b"\n")
        case Format.TABLE:
            _write_table(first.schema.names, counted, sink)
    return counted.rows


class _Counted:
    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = batches
        self.rows = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch


def plain(array: pa.Array) -> list[Any]:
    """Values as JSON can hold them; None for null."""
    kind = array.type
    types = pa.types
    if types.is_dictionary(kind):
        return plain(array.dictionary.take(array.indices))
    if types.is_timestamp(kind) or types.is_date(kind):
        return _times(array)
    if types.is_struct(kind):
        children = [plain(array.field(index)) for index in range(kind.num_fields)]
        names = [child.name for child in kind]
        rows = (dict(zip(names, row, strict=True)) for row in zip(*children, strict=True))
        return [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    if types.is_map(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [None if item is None else plain(item) for item in (scalar.values for scalar in array)]
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return [None if value is None else base64.b64encode(value).decode() for value in array.to_pylist()]
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind):
        return list(array.to_pylist())
    if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind):
        return list(array.to_pylist())
    if types.is_duration(kind):
        return list(array.view(pa.int64()).to_pylist())
    if types.is_decimal(kind) or types.is_time(kind):
        return list(array.cast(pa.string()).to_pylist())
    return [None if value is None else str(value) for value in array.to_pylist()]


def _times(array: pa.Array) -> list[str | None]:
    """ISO 8601 by numpy, which knows every year that 64 bits can say; Python's own types end in the year 9999."""
    kind = array.type
    unit = "D" if pa.types.is_date32(kind) else "ms" if pa.types.is_date64(kind) else kind.unit
    numbers = array.cast(pa.int32()).cast(pa.int64()) if pa.types.is_date32(kind) else array.view(pa.int64())
    values = numbers.fill_null(0).to_numpy(zero_copy_only=False).astype(f"datetime64[{unit}]")
    if pa.types.is_date64(kind):
        values = values.astype("datetime64[D]")
    zone = "Z" if pa.types.is_timestamp(kind) and kind.tz else ""
    texts = (f"{text}{zone}" for text in np.datetime_as_string(values).tolist())
    # The lowest number of 64 bits is numpy's "not a time": it stays a number.
    texts = (f"{-(2**63)} {unit}" if text.startswith("NaT") else text for text in texts)
    return [text if valid else None for text, valid in zip(texts, array.is_valid().to_pylist(), strict=True)]


def _pieces(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for start in range(0, batch.num_rows, _PIECE_ROWS):
            yield batch.slice(start, _PIECE_ROWS)


def _lines(batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    for piece in _pieces(batches):
        columns = [plain(column) for column in piece.columns]
        for row in zip(*columns, strict=True):
            yield encode(dict(zip(piece.schema.names, row, strict=True)))


def _write_csv(batches: Iterable[pa.RecordBatch], sink: BinaryIO) -> None:
    writer: Any = None
    try:
        for batch in batches:
            flat = pa.RecordBatch.from_arrays([_flat(column) for column in batch.columns], names=batch.schema.names)
            if writer is None:
                writer = pacsv.CSVWriter(sink, flat.schema)
            writer.write_batch(flat)
    finally:
        if writer is not None:
            writer.close()


def _flat(array: pa.Array) -> pa.Array:
    kind = array.type
    types = pa.types
    if types.is_dictionary(kind):
        return _flat(array.dictionary.take(array.indices))
    if types.is_nested(kind):
        texts = [None if value is None else msgspec.json.encode(value).decode() for value in plain(array)]
        return pa.array(texts, pa.string())
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_string(kind):
        return array
    return pa.array([None if value is None else str(value) for value in plain(array)], pa.string())


def _write_table(names: list[str], batches: Iterable[pa.RecordBatch], sink: BinaryIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    shown = total = 0
    for batch in batches:
        total += batch.num_rows
        piece = batch.slice(0, TABLE_ROWS_MAX - shown)
        shown += piece.num_rows
        for row in zip(*(plain(column) for column in piece.columns), strict=True):
            table.add_row(*("" if value is None else str(value) for value in row))
    text = io.StringIO()
    width = max(_WIDTH_MIN, _WIDTH_PER_COLUMN * len(names))
    console = Console(file=text, width=width, markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    if total > shown:
        console.print(f"{total:,} rows, of which {shown:,} are shown; the other formats have all")
    sink.write(text.getvalue().encode())
