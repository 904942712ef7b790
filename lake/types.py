"""Wire types ⇄ storage types: which Arrow type holds a field in a table, and whether a column can take one more type.

Delta knows fewer types than Arrow. What it lacks is stored in a type that holds the same bits, and the column says so
in its metadata `headwater.type`, so that a reader can show the value as what it is:

==================================================  ===========================  ==============================
wire type                                           stored as                    `headwater.type` of the column
==================================================  ===========================  ==============================
bool, int8, int16, int32, int64, float32, float64   the same
uint8, uint16, uint32                               int16, int32, int64
uint64                                              decimal(20, 0)
float16                                             float32
string, large_string                                string
binary, large_binary, fixed_size_binary             binary
date32                                              date
timestamp[us, any zone]                             timestamp[us, UTC]
timestamp[us]                                       timestamp[us, UTC]           timestamp[us]
timestamp[s | ms | ns], with or without zone        int64                        timestamp[unit], timestamp[unit, UTC]
time32, time64                                      int32, int64                 time[unit]
duration                                            int64                        duration[unit]
date64                                              int64                        date64
decimals with precision ≤ 38 and 0 ≤ scale ≤ it     decimal(precision, scale)
other decimals                                      string                       decimal
list, large_list, fixed_size_list of X              array of X                   list<…of X>, where X has one
struct                                              struct                       (its fields carry their own)
map                                                 array of struct<key, value>  map
dictionary of X                                     as X
null                                                no column
==================================================  ===========================  ==============================

A map is an array of pairs because Arrow allows a key twice, and DuckDB refuses to read a Parquet map that has one
twice. A type that says nothing but null in some shape, such as list<null>, stands in a column of its own (`x%null`),
with bool in place of null, so that an empty first reading does not decide what the lists of later readings hold.

A narrower wire type fits a wider column when no value changes: int8 → int16 → int32 → int64 → decimal, small integers
and float32 into float64. The other way round, and everything else, is a conflict: rows that are written cannot be
widened.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from lake.columns import SHAPE_SUFFIX, escape

LABEL_KEY = b"headwater.type"
ELEMENT = "element"
MAP_KEY = "key"
MAP_VALUE = "value"
MAP_LABEL = "map"
STORED_TIMESTAMP = pa.timestamp("us", tz="UTC")

_DECIMAL_DIGITS_MAX = 38
_INTEGERS = {pa.int8(): 3, pa.int16(): 5, pa.int32(): 10, pa.int64(): 19}
"""Storage integers from narrow to wide, with the decimal digits they need."""
_UNSIGNED = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
}
_EXACT_IN_FLOAT = {
    pa.float32(): (pa.int8(), pa.int16()),
    pa.float64(): (pa.int8(), pa.int16(), pa.int32(), pa.float32()),
}
_SAME = (pa.bool_(), *_INTEGERS, pa.float32(), pa.float64())


class TypeConflictError(Exception):
    """A type does not fit a column. Stays within `lake`: its callers see `contract.errors.Rejected`."""

    def __init__(self, path: str, have: str, need: str) -> None:
        super().__init__(f"{path}: {have} cannot take {need}")
        self.path = path
        self.have = have
        self.need = need


class CaseConflictError(Exception):
    """A name differs from an existing one only by case. Stays within `lake` like the above."""

    def __init__(self, have: str, need: str) -> None:
        super().__init__(f"{need} beside {have}")
        self.have = have
        self.need = need


def stored_field(name: str, wire: pa.DataType, *, shape: bool = False) -> pa.Field | None:
    """The column (or the field of a struct) that holds values of a wire type.

    Args:
        name: its stored name (`lake.columns`).
        wire: the type on the wire.
        shape: whether null stands as bool: within columns that hold nothing but shapes.

    Returns:
        None where there is nothing to store: all values of type null are null.
    """
    if is_nothing(wire):
        return _labelled(name, pa.bool_(), "") if shape else None
    found = _stored(wire, shape)
    if found is None:
        name, found = name + SHAPE_SUFFIX, _stored(wire, True)
        assert found is not None, wire
    return _labelled(name, *found)


def is_nothing(wire: pa.DataType) -> bool:
    """Whether all values of a type are null: the type null, and a dictionary of it."""
    return bool(pa.types.is_null(wire) or (pa.types.is_dictionary(wire) and pa.types.is_null(wire.value_type)))


def label(field: pa.Field) -> str:
    """The `headwater.type` of a column, empty where the storage type says all."""
    return str((field.metadata or {}).get(LABEL_KEY, b""), "utf-8")


def map_entry(wire: pa.MapType) -> pa.StructType:
    """A map's entry as a struct type."""
    return pa.struct([(MAP_KEY, wire.key_type), (MAP_VALUE, wire.item_type)])


def merge(have: pa.Field, need: pa.Field) -> pa.Field:
    """The column after it took one more type: the same, or with more fields in its structs.

    Raises:
        TypeConflictError: a value could change, or be read as something else than it is.
        CaseConflictError: fields of a struct would differ only by case.
    """
    if label(have) != label(need):
        raise TypeConflictError(have.name, _shown(have), _shown(need))
    return have.with_type(_merge_types(have.type, need.type, have.name))


def check_case(names: Iterable[str], known: dict[str, str]) -> None:
    """Add names to `known` (case-folded name → name).

    Raises:
        CaseConflictError: one differs from a known one only by case.
    """
    for name in names:
        have = known.setdefault(name.casefold(), name)
        if have != name:
            raise CaseConflictError(have, name)


def _labelled(name: str, kind: pa.DataType, text: str) -> pa.Field:
    return pa.field(name, kind, nullable=True, metadata={LABEL_KEY: text.encode()} if text else None)


def _shown(field: pa.Field) -> str:
    return label(field) or str(field.type)


def _stored(wire: pa.DataType, shape: bool) -> tuple[pa.DataType, str] | None:
    """Storage type and label of a wire type; None where it is nothing but null in some shape, unless shapes are asked
    for."""
    types = pa.types
    if is_nothing(wire):
        return (pa.bool_(), "") if shape else None
    if types.is_dictionary(wire):
        return _stored(wire.value_type, shape)
    if types.is_struct(wire):
        children = (stored_field(escape(child.name), child.type, shape=shape) for child in wire)
        fields = [child for child in children if child is not None]
        return (pa.struct(fields), "") if fields else None
    if types.is_map(wire):
        entry = _stored(map_entry(wire), shape)
        return None if entry is None else (pa.list_(pa.field(ELEMENT, entry[0])), MAP_LABEL)
    if types.is_list(wire) or types.is_large_list(wire) or types.is_fixed_size_list(wire):
        element = _stored(wire.value_type, shape)
        if element is None:
            return None
        kind, text = element
        return pa.list_(pa.field(ELEMENT, kind)), f"list<{text}>" if text else ""
    return _stored_plain(wire)


def _stored_plain(wire: pa.DataType) -> tuple[pa.DataType, str]:
    types = pa.types
    if wire in _SAME:
        return wire, ""
    if wire in _UNSIGNED:
        return _UNSIGNED[wire], ""
    if types.is_float16(wire):
        return pa.float32(), ""
    if types.is_string(wire) or types.is_large_string(wire):
        return pa.string(), ""
    if types.is_binary(wire) or types.is_large_binary(wire) or types.is_fixed_size_binary(wire):
        return pa.binary(), ""
    if types.is_date32(wire):
        return wire, ""
    if types.is_timestamp(wire):
        if wire.unit == "us":
            return STORED_TIMESTAMP, "" if wire.tz else "timestamp[us]"
        return pa.int64(), f"timestamp[{wire.unit}, UTC]" if wire.tz else f"timestamp[{wire.unit}]"
    if types.is_time(wire):
        return pa.int32() if types.is_time32(wire) else pa.int64(), f"time[{wire.unit}]"
    if types.is_duration(wire):
        return pa.int64(), f"duration[{wire.unit}]"
    if types.is_date64(wire):
        return pa.int64(), "date64"
    if types.is_decimal(wire):
        if wire.precision <= _DECIMAL_DIGITS_MAX and 0 <= wire.scale <= wire.precision:
            return pa.decimal128(wire.precision, wire.scale), ""
        return pa.string(), "decimal"
    raise AssertionError(f"the contract does not carry {wire}")


def _merge_types(have: pa.DataType, need: pa.DataType, path: str) -> pa.DataType:
    types = pa.types
    if types.is_struct(have) and types.is_struct(need):
        return _merge_structs(have, need, path)
    if types.is_list(have) and types.is_list(need):
        return pa.list_(pa.field(ELEMENT, _merge_types(have.value_type, need.value_type, f"{path}[]")))
    if have == need or _holds(have, need):
        return have
    raise TypeConflictError(path, str(have), str(need))


def _merge_structs(have: pa.StructType, need: pa.StructType, path: str) -> pa.StructType:
    fields = {field.name: field for field in have}
    known: dict[str, str] = {}
    check_case(fields, known)
    for field in need:
        check_case([field.name], known)
        if field.name in fields:
            inner = fields[field.name]
            if label(inner) != label(field):
                raise TypeConflictError(f"{path}.{field.name}", _shown(inner), _shown(field))
            fields[field.name] = inner.with_type(_merge_types(inner.type, field.type, f"{path}.{field.name}"))
        else:
            fields[field.name] = field
    return pa.struct(list(fields.values()))


def _holds(have: pa.DataType, need: pa.DataType) -> bool:
    """Whether every value of one storage type is a value of another, to the last bit."""
    if need in _EXACT_IN_FLOAT.get(have, ()):
        return True
    if pa.types.is_decimal(have):
        if pa.types.is_decimal(need):
            return bool(have.scale >= need.scale and have.precision - have.scale >= need.precision - need.scale)
        return need in _INTEGERS and bool(have.precision - have.scale >= _INTEGERS[need])
    return need in _INTEGERS and have in _INTEGERS and _INTEGERS[have] >= _INTEGERS[need]
