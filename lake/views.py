"""How tables look in SQL: original field names, and values as what they are where SQL has a type for it. Pure text.

A field whose name is taken keeps its stored name (`field_date`). What a column's `headwater.type` says becomes:

=====================================  ===========================================================================
timestamp[s | ms | us]                 TIMESTAMP; with zone: TIMESTAMP WITH TIME ZONE
timestamp[ns], with zone or without    TIMESTAMP_NS (in UTC where there was a zone)
time[s | ms | us]                      TIME
date64                                 DATE
list<one of these>                     a list of it
time[ns], duration, decimal, map       as stored: a number of that unit, text, a list of key and value
=====================================  ===========================================================================

A value beyond what the SQL type can hold reads NULL; the number itself is in the table, which `delta_scan` shows as it
is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pyarrow as pa

from lake.columns import DATE, LINEAGE, unescape
from lake.duck import identifier, literal
from lake.types import label

_LIST = re.compile(r"list<(.*)>")
_TIME_US = {"s": 1_000_000, "ms": 1_000, "us": 1}
# Microseconds that a DuckDB TIMESTAMP can hold.
_TIMESTAMP_US_MIN = -9_223_372_022_400_000_000
_TIMESTAMP_US_MAX = 9_223_372_036_854_775_806
_INT64_MAX = 2**63 - 1


def view_query(uri: str, version: int, schema: pa.Schema) -> str:
    """The SELECT that shows a table as of a version.

    Args:
        uri: where DuckDB finds the table.
        version: its Delta version.
        schema: its columns as of that version.
    """
    fields = [field for field in schema if field.name not in (*LINEAGE, DATE)]
    rest = [field for name in (*LINEAGE, DATE) for field in schema if field.name == name]
    shown = [_shown(field) for field in (*fields, *rest)]
    return f"SELECT {', '.join(shown)} FROM {scan(uri, version)}"


def scan(uri: str, version: int) -> str:
    """A table as it is stored."""
    return f"delta_scan({literal(uri)}, version = {version})"


def empty_query(schema: pa.Schema) -> str:
    """A SELECT without rows, for a table that is not there (yet, or at that time)."""
    return (
        f"SELECT {', '.join(f'NULL::{_sql_type(field.type)} AS {identifier(field.name)}' for field in schema)} LIMIT 0"
    )


def union(queries: Iterable[str]) -> str:
    """All rows of several SELECTs with the same columns."""
    return "\nUNION ALL\n".join(queries)


def _shown(field: pa.Field) -> str:
    name = identifier(field.name)
    value = _value(name, label(field))
    shown = identifier(unescape(field.name))
    return name if value == name == shown else f"{value} AS {shown}"


def _value(name: str, text: str) -> str:
    """The expression that shows a stored value as what its label says; the value itself where SQL has no type for
    it."""
    inner = _LIST.fullmatch(text)
    if inner:
        each = f"{name}_" if name.startswith("e_") else "e_"
        element = _value(each, inner[1])
        return name if element == each else f"list_transform({name}, lambda {each}: {element})"
    kind, _, rest = text.partition("[")
    unit, _, zone = rest.rstrip("]").partition(", ")
    if kind == "timestamp":
        return _timestamp(name, unit, bool(zone))
    if kind == "time" and unit in _TIME_US:
        return f"(TIME '00:00:00' + to_microseconds({name}::BIGINT * {_TIME_US[unit]}))"
    if kind == "date64":
        days = f"{name} // 86400000"
        return f"CASE WHEN {days} BETWEEN -2147483647 AND 2147483646 THEN DATE '1970-01-01' + ({days})::INTEGER END"
    return name


def _timestamp(name: str, unit: str, zoned: bool) -> str:
    if unit == "ns":
        # The outermost numbers mean infinity to DuckDB.
        return f"CASE WHEN {name} BETWEEN -{_INT64_MAX - 1} AND {_INT64_MAX - 1} THEN make_timestamp_ns({name}) END"
    if unit == "us":
        return f"({name} AT TIME ZONE 'UTC')"  # stored as a time with zone
    factor = _TIME_US[unit]
    low, high = -(-_TIMESTAMP_US_MIN // factor), _TIMESTAMP_US_MAX // factor
    make = "make_timestamptz" if zoned else "make_timestamp"
    return f"CASE WHEN {name} BETWEEN {low} AND {high} THEN {make}({name} * {factor}) END"


def _sql_type(kind: pa.DataType) -> str:
    types = pa.types
    if types.is_timestamp(kind):
        return "TIMESTAMPTZ"
    names = {pa.string(): "VARCHAR", pa.int64(): "BIGINT", pa.binary(): "BLOB", pa.date32(): "DATE"}
    return names.get(kind, "VARCHAR")
