"""Exact thresholds: one rule for a single Python value and for a whole Arrow column, so that both give the same answer.

Integer columns are compared with integer bounds, because a float64 cannot tell 2**53 from 2**53 + 1; float columns are
compared as float64, which holds every float16 and float32.
"""

from __future__ import annotations

import math

import pyarrow as pa

from edge_agent import compute as pc


def is_numeric(kind: pa.DataType) -> bool:
    """Whether thresholds make sense for a type: integers and floats."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_integer(kind: pa.DataType) -> bool:
    """Whether the type is an integer type."""
    return bool(pa.types.is_integer(kind))


def widened(column: pa.Array) -> pa.Array:
    """The column as its values are compared: float16 as float32, everything else as it is."""
    return column.cast(pa.float32()) if pa.types.is_float16(column.type) else column


def above(column: pa.Array, limit: float) -> pa.BooleanArray:
    """`value > limit` for each value; False for null and NaN. `limit` may be an int of any size."""
    if not pa.types.is_integer(column.type):
        return pc.greater(widened(column), pa.scalar(float(limit), pa.float64())).fill_null(False)
    low, high = _range(column.type)
    if limit == math.inf or (limit != -math.inf and math.floor(limit) >= high):
        return _all(column, False)
    if limit == -math.inf or math.floor(limit) < low:
        return column.is_valid()
    return pc.greater(column, pa.scalar(math.floor(limit), column.type)).fill_null(False)


def below(column: pa.Array, limit: float) -> pa.BooleanArray:
    """`value < limit` for each value; False for null and NaN. `limit` may be an int of any size."""
    if not pa.types.is_integer(column.type):
        return pc.less(widened(column), pa.scalar(float(limit), pa.float64())).fill_null(False)
    low, high = _range(column.type)
    if limit == -math.inf or (limit != math.inf and math.ceil(limit) <= low):
        return _all(column, False)
    if limit == math.inf or math.ceil(limit) > high:
        return column.is_valid()
    return pc.less(column, pa.scalar(math.ceil(limit), column.type)).fill_null(False)


def nan_mask(column: pa.Array) -> pa.BooleanArray:
    """Where a float column is NaN; False for null."""
    return widened(column).is_nan().fill_null(False)


def _range(kind: pa.DataType) -> tuple[int, int]:
    bits = kind.bit_width
    if pa.types.is_signed_integer(kind):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _all(column: pa.Array, value: bool) -> pa.BooleanArray:
    return pa.repeat(value, len(column))
