"""Answers as bytes: Arrow, Parquet, CSV, JSON or JSON lines; piece by piece, in bounded memory.

In JSON and CSV a time is ISO 8601 (with Z where it has a zone) to its last digit and of any year, bytes are base64,
decimals are text, durations are numbers of their unit, intervals are ISO 8601 durations, NaN and infinities are null in
JSON, and what is nested is JSON in CSV. Columns of one name get numbers: `a`, `a_1`, `a_2`; in JSON so do members of
structs.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from lake.errors import QueryError

_PIECE_ROWS = 10_000


class Format(StrEnum):
    """How rows are written."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    ARROW = "arrow"
    PARQUET = "parquet"


def write(batches: Iterable[pa.RecordBatch], form: Format, sink: BinaryIO) -> int:
    """Write rows.

    Args:
        batches: at least one, all of one schema (as `Lake.read` gives them).
        form: the format.
        sink: where to.

    Returns:
        How many rows came.

    Raises:
        QueryError: the format has no such type.
    """
    pieces = _named_apart(batches)
    first = next(pieces)
    counted = _Counted(chain((first,), pieces))
    match form:
        case Format.ARROW:
            with pa.ipc.new_stream(sink, first.schema) as stream:
                for batch in counted:
                    stream.write_batch(batch)
        case Format.PARQUET:
            _check_parquet(first.schema)
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
    return counted.rows


def names_apart(names: Sequence[str]) -> list[str]:
    """Names without repeats: a repeat gets the lowest number that makes it a name of its own, `a`, `a_1`, `a_2`."""
    taken, found = set(names), []
    seen: dict[str, int] = {}
    for name in names:
        if name not in seen:
            seen[name] = 0
            found.append(name)
            continue
        while (apart := f"{name}_{seen[name] + 1}") in taken:
            seen[name] += 1
        taken.add(apart)
        found.append(apart)
    return found


def _named_apart(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        names = names_apart(batch.schema.names)
        yield batch if names == batch.schema.names else batch.rename_columns(names)


def _check_parquet(schema: pa.Schema) -> None:
    for field in schema:
        if pa.types.is_interval(field.type):
            raise QueryError(f"column {field.name!r} is an interval, and Parquet has none; ask for it ::VARCHAR")


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
        # What SQL's row(1, 2) makes has no names.
        names = names_apart([child.name for child in kind])
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
    if types.is_interval(kind):
        return [None if value is None else _interval(*value) for value in array.to_pylist()]
    if types.is_decimal(kind) or types.is_time(kind):
        return list(array.cast(pa.string()).to_pylist())
    return [None if value is None else str(value) for value in array.to_pylist()]


def _interval(months: int, days: int, nanoseconds: int) -> str:
    """An ISO 8601 duration; each part has its own sign (as PostgreSQL does), as months and days do not add up."""
    date = (f"{months}M" if months else "") + (f"{days}D" if days else "")
    whole, rest = divmod(abs(nanoseconds), 1_000_000_000)
    fraction = f".{rest:09}".rstrip("0") if rest else ""
    time = f"T{'-' if nanoseconds < 0 else ''}{whole}{fraction}S" if nanoseconds or not date else ""
    return f"P{date}{time}"


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
