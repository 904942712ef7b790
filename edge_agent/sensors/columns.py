"""From what a driver hands over to rows of exactly the declared types, or an error that names field, value and type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from contract.batches import TS_TYPE, check_schema
from contract.errors import Rejected
from contract.limits import DEFAULT_LIMITS
from contract.names import ROW, TS
from edge_agent import compute as pc
from edge_agent.sensors.port import Block, Reading, SensorConfigError, SensorValueError
from edge_agent.sensors.values import infer_type, scalar_check

_INT64 = pa.int64()
_TS_US_MIN, _TS_US_MAX = -(2**63), 2**63 - 1


class Columns:
    """The declared fields of one stream, and the check of everything that wants to become a row of it.

    Args:
        fields: the fields without `ts`.

    Attributes:
        schema: `ts` (timestamp[us, tz=UTC]), then the fields, in their order.

    Raises:
        SensorConfigError: the fields break the contract (names, types, number, `ts` or `_row` taken).
    """

    def __init__(self, fields: pa.Schema) -> None:
        if not isinstance(fields, pa.Schema):
            raise SensorConfigError(f"the driver's schema is a {type(fields).__name__}; it has to be a pyarrow.Schema")
        for name in (TS, ROW):
            if name in fields.names:
                raise SensorConfigError(f"a sensor field is named {name!r}, which is reserved; rename the field")
        # Metadata of a driver's schema would travel in every payload; it is not part of the contract.
        plain = [pa.field(field.name, field.type, field.nullable) for field in fields]
        self.schema: pa.Schema = pa.schema([pa.field(TS, TS_TYPE), *plain])
        try:
            check_schema(self.schema, DEFAULT_LIMITS)
        except Rejected as error:
            raise SensorConfigError(f"the sensor's fields cannot be sent: {error}") from error
        self._fields = plain
        self._checks = {field.name: (field, scalar_check(field.type)) for field in plain}

    @property
    def fields(self) -> pa.Schema:
        """The fields without `ts`."""
        return pa.schema(self._fields)

    def reading(self, reading: Reading, now_us: int) -> Reading:
        """The same reading, complete, in field order, stamped with `now_us` where it has no time.

        Values are plain Python values exactly as they will be stored: a float for a float32 field is rounded already.

        Raises:
            SensorValueError: naming the field, the value and the type.
        """
        given = reading.values
        values: dict[str, Any] = {}
        for name, (field, check) in self._checks.items():
            value = given.get(name)
            if value is None:
                if not field.nullable:
                    raise SensorValueError(f"field {name!r} is null, but declared as never null; give a value")
                values[name] = None
                continue
            try:
                values[name] = check(value)
            except ValueError as error:
                raise _misfit(name, value, field.type, str(error)) from error
        if not given.keys() <= values.keys():
            raise self._unknown(given)
        ts_us = now_us if reading.ts_us is None else _checked_ts(reading.ts_us)
        return Reading(values=values, ts_us=ts_us)

    def block(self, block: Block, now_us: int) -> pa.RecordBatch:
        """The rows of a block as one record batch of `schema`.

        Raises:
            SensorValueError: a column of another type or length, an unknown field, or no way to know the time.
        """
        arrays = {name: self._column(name, column) for name, column in block.columns.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise SensorValueError(f"the columns of a block have lengths {lengths}; give equal, non-empty columns")
        rows = next(iter(lengths.values()))
        columns = []
        for field in self._fields:
            column = arrays.get(field.name)
            if column is None:
                column = pa.nulls(rows, field.type)
            if column.null_count and not field.nullable:
                raise SensorValueError(f"field {field.name!r} has nulls, but is declared as never null; give values")
            columns.append(column)
        ts = block_times(block, rows, now_us).view(TS_TYPE)
        return pa.RecordBatch.from_arrays([ts, *columns], schema=self.schema)

    def assemble(self, readings: Sequence[Reading]) -> pa.RecordBatch:
        """Readings that passed `reading` as one record batch of `schema`. They are not checked again."""
        ts = pa.array([reading.ts_us for reading in readings], type=_INT64).view(TS_TYPE)
        columns = [
            pa.array([reading.values[field.name] for reading in readings], type=field.type) for field in self._fields
        ]
        return pa.RecordBatch.from_arrays([ts, *columns], schema=self.schema)

    def _column(self, name: str, column: Any) -> pa.Array:
        if name not in self._checks:
            raise self._unknown({name: None})
        field, check = self._checks[name]
        if isinstance(column, list | tuple):
            return self._from_values(field, check, column)
        array = to_array(name, column)
        if pa.types.is_null(array.type):
            return pa.nulls(len(array), field.type)
        if array.type != field.type:
            raise SensorValueError(
                f"field {name!r} is declared {field.type}, but the block holds {array.type}; "
                "declare that type or convert the array in the driver"
            )
        return array

    @staticmethod
    def _from_values(field: pa.Field, check: Any, column: Sequence[Any]) -> pa.Array:
        values: list[Any] = []
        for value in column:
            try:
                values.append(None if value is None else check(value))
            except ValueError as error:
                raise _misfit(field.name, value, field.type, str(error)) from error
        return pa.array(values, type=field.type)

    def _unknown(self, given: Mapping[str, Any]) -> SensorValueError:
        extra = sorted(str(name) for name in given if name not in self._checks)
        return SensorValueError(
            f"unknown fields {extra[:5]} in a reading; the stream's fields are {list(self._checks)[:20]}: "
            "declare them, or leave them out in the driver"
        )


def infer_fields(sample: Reading | Block) -> pa.Schema:
    """The fields of a driver that declares none, from its first reading or block.

    Python bool, int, float, str and bytes become bool, int64, float64, string and binary; numpy values and arrays keep
    their type.

    Raises:
        SensorValueError: no field, or a field whose first value is None, so that its type is unknown.
    """
    fields = []
    given = sample.values if isinstance(sample, Reading) else sample.columns
    for name, value in given.items():
        try:
            kind = infer_type(value) if isinstance(sample, Reading) else _array_type(name, value)
            if pa.types.is_null(kind):
                raise ValueError("None has no type")
        except ValueError as error:
            raise SensorValueError(
                f"the type of field {name!r} does not follow from its first value {value!r:.80} ({error}); "
                "declare the fields"
            ) from error
        fields.append(pa.field(str(name), kind))
    if not fields:
        raise SensorValueError("the first reading has no field; return at least one, or declare the fields")
    return pa.schema(fields)


def to_array(name: str, column: Any) -> pa.Array:
    """A pyarrow array over a column of a block, of the type the column has; foreign memory is copied.

    Raises:
        SensorValueError: it is not a one-dimensional array.
    """
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks()
    if isinstance(column, pa.Array):
        return column
    try:
        if hasattr(column, "dtype"):
            # Copied: pyarrow would share the memory, and the driver may write the next block into it.
            return pa.array(column.copy())
        return _from_buffer(column)
    except (pa.ArrowException, TypeError, ValueError, KeyError) as error:
        raise SensorValueError(
            f"field {name!r}: {type(column).__name__} is not a one-dimensional array ({str(error)[:120]}); "
            "give a pyarrow or numpy array, a typed buffer or a list"
        ) from error


_BUFFER_TYPES: dict[str, pa.DataType] = {
    "b": pa.int8(),
    "B": pa.uint8(),
    "h": pa.int16(),
    "H": pa.uint16(),
    "i": pa.int32(),
    "I": pa.uint32(),
    "l": pa.int64(),
    "L": pa.uint64(),
    "q": pa.int64(),
    "Q": pa.uint64(),
    "e": pa.float16(),
    "f": pa.float32(),
    "d": pa.float64(),
}


def _from_buffer(column: Any) -> pa.Array:
    view = memoryview(column)
    kind = _BUFFER_TYPES[view.format]
    if view.ndim != 1 or view.itemsize * 8 != kind.bit_width:
        raise ValueError(f"{view.ndim} dimensions of {view.itemsize} byte items")
    return pa.Array.from_buffers(kind, len(view), [None, pa.py_buffer(view.tobytes())])


def _array_type(name: str, column: Any) -> pa.DataType:
    if isinstance(column, list | tuple):
        first = next((value for value in column if value is not None), None)
        return infer_type(first)
    return to_array(name, column).type


def block_times(block: Block, rows: int, now_us: int) -> pa.Array:
    """The int64 array of a block's times, microseconds since 1970-01-01 UTC.

    Raises:
        SensorValueError: the times are of another type or number, null, or cannot be known.
    """
    if rows == 0:
        return pa.array([], type=_INT64)
    if block.ts_us is not None:
        return _given_times(block.ts_us, rows)
    if rows == 1 and block.interval_ns is None:
        start_us = now_us if block.start_us is None else block.start_us
        return pa.array([_checked_ts(start_us)], type=_INT64)
    if not isinstance(block.interval_ns, int) or block.interval_ns < 0:
        raise SensorValueError(
            f"a block of {rows} rows has no ts_us and interval_ns = {block.interval_ns!r}; give ts_us, "
            "or an interval_ns of 0 or more"
        )
    span_us = (rows - 1) * block.interval_ns // 1000
    start_us = now_us - span_us if block.start_us is None else block.start_us
    _checked_ts(start_us)
    _checked_ts(start_us + span_us)
    if block.interval_ns == 0 or rows * block.interval_ns > _TS_US_MAX:
        return pa.array([start_us + row * block.interval_ns // 1000 for row in range(rows)], type=_INT64)
    offsets = pc.divide(pa.arange(0, rows * block.interval_ns, block.interval_ns), 1000)
    return pc.add(offsets, start_us)


def _given_times(times: Any, rows: int) -> pa.Array:
    array = pa.array(times, type=_INT64) if isinstance(times, list | tuple) else to_array(TS, times)
    if pa.types.is_timestamp(array.type) and array.type.unit == "us":
        array = array.view(_INT64)
    if array.type != _INT64 or array.null_count or len(array) != rows:
        raise SensorValueError(
            f"ts_us of a block is {array.type} with {len(array)} values and {array.null_count} nulls for {rows} rows; "
            "give int64 microseconds since 1970-01-01 UTC, one per row, without nulls"
        )
    return array


def _checked_ts(ts_us: Any) -> int:
    if hasattr(ts_us, "dtype") and hasattr(ts_us, "item"):
        ts_us = ts_us.item()
    if not isinstance(ts_us, int) or isinstance(ts_us, bool) or not _TS_US_MIN <= ts_us <= _TS_US_MAX:
        raise SensorValueError(f"ts_us = {ts_us!r:.80} is not an int64; give microseconds since 1970-01-01 UTC")
    return ts_us


def _misfit(name: str, value: Any, kind: pa.DataType, remedy: str) -> SensorValueError:
    return SensorValueError(
        f"field {name!r}: value {value!r:.80} ({type(value).__name__}) does not fit {kind}; {remedy}"
    )
