"""What a table must have to hold batches of one wire schema. Pure: schemas in, columns out."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa

from contract.errors import Reason, Rejected
from contract.names import ROW as WIRE_ROW
from contract.names import TS
from lake import columns
from lake.types import (
    STORED_TIMESTAMP,
    CaseConflictError,
    TypeConflictError,
    check_case,
    merge,
    stored_field,
)

COLUMNS_MAX = 4_096
"""Columns of one table, lineage included."""

Columns = Mapping[str, pa.Field]
"""Columns of a table by stored name; the partition column is not among them."""

BASE_COLUMNS: Columns = {
    field.name: field
    for field in (
        pa.field(TS, STORED_TIMESTAMP),
        pa.field(columns.DEVICE, pa.string()),
        pa.field(columns.EPOCH, pa.string()),
        pa.field(columns.SEQ, pa.int64()),
        pa.field(columns.ROW, pa.int32()),
        pa.field(columns.RECEIVED_AT, STORED_TIMESTAMP),
        pa.field(columns.CLOCK, pa.string()),
        pa.field(columns.SCHEMA, pa.string()),
    )
}
"""What every raw table has."""


class Slot(NamedTuple):
    """Where one field of a wire schema goes."""

    place: int
    """Its index in the wire schema."""
    field: pa.Field
    """The column it needs."""


class WireSchema(NamedTuple):
    """A wire schema and what it needs of a table."""

    schema: pa.Schema
    fingerprint: str
    """First 16 hexadecimal digits of the SHA-256 of `serialized`."""
    serialized: bytes
    """The schema as an encapsulated Arrow IPC message, metadata included."""
    slots: tuple[Slot, ...]
    """`ts` and the fields. A field of type null has none, and `_row` goes to the lineage."""
    row_index: int
    """Place of `_row` in a thinned batch, else -1."""


class WireSchemas:
    """Wire schemas by content, because a fleet sends few different ones, each in many objects. Not thread-safe."""

    def __init__(self, kept_max: int = 4_096) -> None:
        self._kept_max = kept_max
        self._last: WireSchema | None = None
        self._kept: OrderedDict[bytes, WireSchema] = OrderedDict()

    def __call__(self, schema: pa.Schema) -> WireSchema:
        """What a schema that the contract accepts needs of a table."""
        if self._last is not None and schema.equals(self._last.schema, check_metadata=True):
            return self._last
        serialized = schema.serialize().to_pybytes()
        wire = self._kept.get(serialized)
        if wire is None:
            wire = self._kept[serialized] = read_schema(schema, serialized)
            if len(self._kept) > self._kept_max:
                self._kept.popitem(last=False)
        self._last = wire
        return wire


def read_schema(schema: pa.Schema, serialized: bytes) -> WireSchema:
    """Work out what a schema that the contract accepts needs of a table."""
    slots = []
    for index, field in enumerate(schema):
        if field.name == WIRE_ROW:
            continue
        stored = stored_field(columns.stored_name(field.name), field.type)
        if stored is not None:
            slots.append(Slot(index, stored))
    return WireSchema(schema, fingerprint(serialized), serialized, tuple(slots), schema.get_field_index(WIRE_ROW))


def fingerprint(serialized: bytes) -> str:
    """The name of a schema: 16 hexadecimal digits."""
    return hashlib.sha256(serialized).hexdigest()[:16]


def grow(have: Columns, wire: WireSchema, stream: str, columns_max: int = COLUMNS_MAX) -> Columns:
    """The columns of a table after batches of a wire schema came in: the same object where nothing is added.

    Raises:
        Rejected: a type or a name conflicts with a column, or there would be too many; the message names both.
    """
    grown: dict[str, pa.Field] | None = None
    known: dict[str, str] | None = None
    for slot in wire.slots:
        need = slot.field
        column = have.get(need.name)
        try:
            if column is None:
                if known is None:
                    known = {name.casefold(): name for name in have}
                check_case([need.name], known)
                merged = need
            else:
                merged = merge(column, need)
        except TypeConflictError as conflict:
            raise _type_conflict(conflict, wire.schema.field(slot.place), stream) from None
        except CaseConflictError as conflict:
            raise Rejected(
                Reason.NAME_CONFLICT,
                f"field {columns.unescape(conflict.need)!r} of stream {stream!r} differs only by case from "
                f"{columns.unescape(conflict.have)!r}, which the table has; send it under that name or another",
            ) from None
        if merged is not column and (column is None or not merged.equals(column, check_metadata=True)):
            grown = dict(have) if grown is None else grown
            grown[merged.name] = merged
    if grown is None:
        return have
    if len(grown) > columns_max:
        raise Rejected(
            Reason.TABLE_TOO_WIDE,
            f"stream {stream!r} would have {len(grown)} columns, more than {columns_max}; "
            "split it into several streams or send a list field",
        )
    return grown


def columns_of(schema: pa.Schema) -> Columns:
    """The columns of a table, from its Arrow schema."""
    return {field.name: field for field in schema if field.name != columns.DATE}


def table_schema(have: Columns) -> pa.Schema:
    """The Arrow schema of a raw table: fields, lineage, partition column."""
    fields = [field for name, field in have.items() if name not in columns.LINEAGE]
    lineage = [have[name] for name in columns.LINEAGE]
    return pa.schema([*fields, *lineage, pa.field(columns.DATE, pa.date32())])


def _type_conflict(conflict: TypeConflictError, field: pa.Field, stream: str) -> Rejected:
    inside = "" if conflict.path == columns.stored_name(field.name) else f" (at {conflict.path})"
    return Rejected(
        Reason.TYPE_CONFLICT,
        f"field {field.name!r} of stream {stream!r} has type {str(field.type)[:200]}, which needs a column of "
        f"{conflict.need[:200]}; the table has {conflict.have[:200]}{inside}, and rows that are written "
        "cannot be changed: send it in the column's type or under a new name",
    )
