"""How fields are named in a table: as the device named them, unless the name is taken or Delta, Spark and Parquet
refuse it.

Both ways are pure and lose nothing: two fields whose names differ by more than case get names that differ by more than
case, and `field_name(stored_name(x)) == x` for every name the contract allows.
"""

from __future__ import annotations

import re

DEVICE = "_device"
EPOCH = "_epoch"
SEQ = "_seq"
ROW = "_row"
RECEIVED_AT = "_received_at"
CLOCK = "_clock"
SCHEMA = "_schema"
DATE = "date"

LINEAGE = (DEVICE, EPOCH, SEQ, ROW, RECEIVED_AT, CLOCK, SCHEMA)
"""Columns the lake adds to every row, in this order, behind the fields; then the partition column `date`."""

_PREFIX = "field_"
# Refused by Spark's Parquet writer without column mapping: space , ; { } ( ) \n \t =. Quotes are escaped besides,
# because they make names that nobody can type, and % because it begins an escape.
_REFUSED = re.compile(r"[\x00-\x20\x7f,;{}()=\"'`%]")
_ESCAPED = re.compile(r"(?:%[0-9A-F]{2})")

SHAPE_SUFFIX = "%null"
"""Ends the name of a column for values whose type says nothing but null, such as a list<null>: `x%null` beside a
later `x`. No stored field name ends so, because `%` is always followed by two digits."""


def stored_name(field: str) -> str:
    """The column in which a top-level field stands."""
    escaped = escape(field)
    return _PREFIX + escaped if _is_reserved(_stem(escaped)) else escaped


def field_name(column: str) -> str:
    """The field that stands in a column: the inverse of `stored_name`."""
    if column.startswith(_PREFIX) and _is_reserved(_stem(column)):
        column = column[len(_PREFIX) :]
    return unescape(column)


def escape(name: str) -> str:
    """Write the characters that a table format refuses as %XX. Enough for the fields within a struct."""
    return _REFUSED.sub(lambda found: f"%{ord(found[0]):02X}", name)


def unescape(name: str) -> str:
    """The inverse of `escape`."""
    return _ESCAPED.sub(lambda found: chr(int(found[0][1:], 16)), name)


def _stem(name: str) -> str:
    while name.startswith(_PREFIX):
        name = name[len(_PREFIX) :]
    return name


def _is_reserved(name: str) -> bool:
    return name.startswith("_") or name.casefold() == DATE
