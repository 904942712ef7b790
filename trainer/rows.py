"""The rows of the recipe's stream, device by device, in the order in which each device recorded them.

DuckDB sorts, on disk where the memory does not suffice; here one device's rows at a time are in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lake.catalog import Catalog
from lake.columns import DATE, DEVICE, EPOCH, ROW, SEQ, stored_name
from lake.duck import identifier
from lake.query import Lake, Pins
from lake.raw import table_path
from lake.store import Store
from trainer.errors import DataError, RecipeError
from trainer.recipe import Data, Labels

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

_TIME, _LIFE = "_time", "_life"
"""Columns of our own: `ts` in microseconds, and the number of the epoch among those of the device."""
_OURS = frozenset({"ts", DATE})
_ARROW_NAMES = {"float": "float32", "double": "float64", "halffloat": "float16"}


class DeviceRows(NamedTuple):
    """All rows of one device that the recipe asks for."""

    device: str
    ts_us: Int64s
    """`[N]`, in recorded order, microseconds since 1970-01-01 UTC."""
    values: Float32s
    """`[N, C]`, NaN where the value was null."""
    epochs: Int64s
    """`[E]`: index of the first row of every epoch but the first."""
    nulls: Int64s
    """`[C]`: how many values were null, rather than NaN."""


def base_query(data: Data) -> str:
    """The SELECT of the recipe's rows."""
    return data.sql.strip().rstrip(";") or f"SELECT * FROM {identifier(data.stream)}"


def field_types(store: Store, data: Data, version: int) -> tuple[str, ...]:
    """Arrow types of the fields in the stream's table.

    Raises:
        RecipeError: a field is not in the stream, or is no number.
        StoreUnavailableError: the store did not answer.
    """
    known = _recorded(store, data.stream, version)
    found = []
    for name in data.fields:
        kind = known.get(stored_name(name))
        if kind is None:
            raise RecipeError(
                f"[data] fields: the stream {data.stream} has no field {name!r}; it has {', '.join([*known][:40])}. "
                "A device cuts its windows out of the fields that it records"
            )
        if not _is_number(kind):
            raise RecipeError(f"[data] fields: {name} of {data.stream} is {kind}; a window holds numbers, leave it out")
        found.append(_ARROW_NAMES.get(str(kind), str(kind)))
    return tuple(found)


def check_label_field(store: Store, labels: Labels, version: int) -> None:
    """Refuse a field that the stream of labels does not have.

    Raises:
        RecipeError: naming it, and those that there are.
        StoreUnavailableError: the store did not answer.
    """
    known = _recorded(store, labels.stream, version)
    if stored_name(labels.field) not in known:
        raise RecipeError(
            f"[labels] field: the stream {labels.stream} has no field {labels.field!r}; it has "
            f"{', '.join([*known][:40])}"
        )


def _recorded(store: Store, stream: str, version: int) -> dict[str, pa.DataType]:
    """The fields that devices recorded, by stored name."""
    state = Catalog(store).state(table_path(stream), version)
    schema = pa.schema([]) if state is None else state.schema
    return {field.name: field.type for field in schema if not field.name.startswith("_") and field.name not in _OURS}


def read_devices(lake: Lake, data: Data, pins: Pins) -> Iterator[DeviceRows]:
    """All rows, one device after the other, by name.

    An epoch is one life of a device's buffer; epochs come in the order of their first `ts`.

    Args:
        lake: that is asked.
        data: what of it.
        pins: the version of each table.

    Raises:
        RecipeError: the SQL lacks a column or gives one that is no number.
        DataError: a device has more rows than may be in memory.
        QueryError, StoreUnavailableError: as `Lake.read`.
    """
    parts: list[pa.RecordBatch] = []
    held = 0
    for batch in lake.read(_ordered(lake, data, pins), at=pins):
        for device, piece in _by_device(batch):
            if parts and device != _device_of(parts[0]):
                yield _rows(parts, data)
                parts, held = [], 0
            parts.append(piece)
            held += piece.num_rows
            if held > data.device_rows_max:
                raise DataError(
                    f"device {device} has more than {data.device_rows_max} rows; take fewer with a WHERE in [data] sql,"
                    " or raise [data] device_rows_max if the memory allows (some 50 bytes a row, and of each value 4 "
                    "beside those of its own type: 12 of a double)"
                )
    if parts:
        yield _rows(parts, data)


def _ordered(lake: Lake, data: Data, pins: Pins) -> str:
    base = base_query(data)
    schema = _schema(lake, base, pins)
    for name in (DEVICE, "ts", *data.fields):
        if name not in schema.names:
            raise RecipeError(f"[data] sql gives the columns {', '.join(schema.names)} and no {name!r}; add it")
    if not pa.types.is_timestamp(schema.field("ts").type):
        raise RecipeError(f"[data] sql: ts is {schema.field('ts').type}, not a time; write ts::TIMESTAMPTZ")
    for name in data.fields:
        if not _is_number(schema.field(name).type):
            raise RecipeError(
                f"[data] fields: {name} is {schema.field(name).type} in SQL; write {identifier(name)}::DOUBLE AS "
                f"{identifier(name)} in [data] sql"
            )
    wanted = ", ".join(f"r.{identifier(name)}" for name in data.fields)
    time = f"epoch_us(r.ts) AS {_TIME}"
    if not {EPOCH, SEQ, ROW} <= set(schema.names):
        # Nothing says which of two rows of one moment came first. By their values the order is at least always the
        # same: what is left equal then is the same row.
        return (
            f"SELECT r.{DEVICE}, {time}, 1::BIGINT AS {_LIFE}, {wanted} FROM ({base}) r "
            f"ORDER BY r.{DEVICE}, {_TIME}, {wanted}"
        )
    # NOT MATERIALIZED: reading the files twice costs less than keeping all rows in between.
    return (
        f"WITH r AS NOT MATERIALIZED ({base}), "
        f"e AS (SELECT {DEVICE}, {EPOCH}, row_number() OVER (PARTITION BY {DEVICE} ORDER BY min(ts), {EPOCH}) "
        f"AS {_LIFE} FROM r GROUP BY {DEVICE}, {EPOCH}) "
        f"SELECT r.{DEVICE}, {time}, e.{_LIFE}, {wanted} FROM r JOIN e USING ({DEVICE}, {EPOCH}) "
        f"ORDER BY r.{DEVICE}, e.{_LIFE}, r.{SEQ}, r.{ROW}"
    )


def _schema(lake: Lake, query: str, pins: Mapping[str, int]) -> pa.Schema:
    return lake.sql(f"SELECT * FROM ({query}) LIMIT 0", at=pins).schema


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _device_of(batch: pa.RecordBatch) -> str | None:
    device: str | None = batch.column(0)[0].as_py()
    return device


def _by_device(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    """A batch, cut where the device changes."""
    if not batch.num_rows:
        return
    codes = batch.column(0).dictionary_encode()
    numbers = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), batch.num_rows]
    for begin, end in itertools.pairwise(edges):
        if numbers[begin] < 0:
            raise DataError("[data] sql gives rows whose _device is null; leave them out with a WHERE")
        yield codes.dictionary[int(numbers[begin])].as_py(), batch.slice(begin, end - begin)


def _rows(parts: list[pa.RecordBatch], data: Data) -> DeviceRows:
    table = pa.Table.from_batches(parts)
    times = table.column(1)
    device = str(_device_of(parts[0]))
    if times.null_count:
        raise DataError(f"device {device} has {times.null_count} rows without ts; leave them out with a WHERE")
    values = np.empty((table.num_rows, len(data.fields)), np.float32)
    nulls = np.zeros(len(data.fields), np.int64)
    for number in range(len(data.fields)):
        column = table.column(3 + number)
        values[:, number] = as_float32(column)
        nulls[number] = column.null_count
    epochs = np.flatnonzero(np.diff(table.column(2).to_numpy())) + 1
    return DeviceRows(device, np.asarray(times.to_numpy(), np.int64), values, epochs, nulls)


def as_float32(column: pa.ChunkedArray) -> Float32s:
    """Numbers or truth values as a window holds them: cast once, from their own type; null is NaN; beyond float32
    infinite."""
    missing = column.is_null().to_numpy() if column.null_count else None
    zero = False if pa.types.is_boolean(column.type) else 0
    if missing is not None:
        column = column.fill_null(pa.scalar(zero, column.type))
    with np.errstate(over="ignore"):
        values = np.asarray(column.to_numpy(), dtype=np.float32)
    if missing is not None:
        values = values.copy()
        values[missing] = np.nan
    return values
