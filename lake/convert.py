"""Values between wire types and storage types, bit for bit in both directions.

`to_storage` writes an array in a column's type, which may be wider than needed; `from_storage` gives back the array
that was sent. Arrow's own casts are used where they are exact for every value; where they are not (NaN payloads,
times beyond what a cast accepts) the bits are moved by hand. What lies under a null is not a value and is not kept.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lake.columns import escape
from lake.types import is_nothing, map_entry, stored_field

Bits = npt.NDArray[Any]


def to_storage(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Write an array of a wire type in a storage type.

    Args:
        array: values of a wire type.
        target: the type of the column they go to, one that `lake.types.merge` accepted.
    """
    kind = array.type
    types = pa.types
    if is_nothing(kind):
        return pa.nulls(len(array), target)
    if types.is_dictionary(kind):
        return to_storage(array.dictionary, target).take(array.indices)
    if types.is_struct(kind):
        children = [_child_to_storage(array, field) for field in target]
        return _struct(children, target, array)
    if types.is_map(kind):
        lengths, items = _lists(array)
        pairs = pa.StructArray.from_arrays([items.field(0), items.field(1)], fields=list(map_entry(kind)))
        return _list(lengths, to_storage(pairs, target.value_type), target, array)
    if types.is_nested(kind):
        lengths, items = _lists(array)
        return _list(lengths, to_storage(items, target.value_type), target, array)
    if kind == target:
        return array
    if types.is_float16(kind):
        return _refloat(array, _HALF, _SINGLE if target == pa.float32() else _DOUBLE)
    if types.is_float32(kind):
        return _refloat(array, _SINGLE, _DOUBLE)
    if types.is_timestamp(kind) and types.is_timestamp(target):
        return array.view(target)
    if types.is_time32(kind):
        return array.view(pa.int32()).cast(target)
    if types.is_time64(kind) or types.is_duration(kind) or types.is_date64(kind) or types.is_timestamp(kind):
        return array.view(pa.int64()).cast(target)
    if types.is_decimal(kind) and target == pa.string():
        return _decimal_text(array)
    return array.cast(target)


def from_storage(array: pa.Array, wire: pa.DataType) -> pa.Array:
    """Give back the values of a wire type that `to_storage` wrote, whatever wider type the column has."""
    kind = array.type
    types = pa.types
    if is_nothing(wire):
        return _nothing(len(array), wire)
    if types.is_dictionary(wire):
        return _encoded(array, wire)
    if types.is_struct(wire):
        children = [_child_from_storage(array, field) for field in wire]
        return _struct(children, wire, array)
    if types.is_map(wire):
        lengths, items = _lists(array)
        pairs = from_storage(items, map_entry(wire))
        offsets = _offsets(lengths, pa.int32())
        return pa.MapArray.from_arrays(offsets, pairs.field(0), pairs.field(1), type=wire, mask=_mask(array))
    if types.is_fixed_size_list(wire):
        return _fixed_size_list(array, wire)
    if types.is_nested(wire):
        lengths, items = _lists(array)
        return _list(lengths, from_storage(items, wire.value_type), wire, array)
    if kind == wire:
        return array
    if types.is_floating(kind) and types.is_floating(wire):
        source = _DOUBLE if kind == pa.float64() else _SINGLE
        return _refloat(array, source, _SINGLE if wire == pa.float32() else _HALF)
    if types.is_timestamp(wire) or types.is_time64(wire) or types.is_duration(wire) or types.is_date64(wire):
        return array.view(wire)
    if types.is_time32(wire):
        return array.cast(pa.int32()).view(wire)
    if types.is_decimal(wire) and kind == pa.string():
        return _decimal_from_text(array, wire)
    return array.cast(wire)


def _child_to_storage(array: pa.StructArray, field: pa.Field) -> pa.Array:
    """What of a struct's children goes to one field of its column."""
    for index, child in enumerate(array.type):
        stored = stored_field(escape(child.name), child.type)
        if stored is not None and stored.name == field.name:
            return to_storage(array.field(index), field.type)
    return pa.nulls(len(array), field.type)


def _child_from_storage(array: pa.StructArray, child: pa.Field) -> pa.Array:
    stored = stored_field(escape(child.name), child.type)
    index = -1 if stored is None else array.type.get_field_index(stored.name)
    return empty(len(array), child.type) if index < 0 else from_storage(array.field(index), child.type)


def empty(length: int, wire: pa.DataType) -> pa.Array:
    """Nulls of a wire type."""
    return _nothing(length, wire) if is_nothing(wire) else pa.nulls(length, wire)


def _nothing(length: int, wire: pa.DataType) -> pa.Array:
    if pa.types.is_null(wire):
        return pa.nulls(length)
    indices = pa.nulls(length, wire.index_type)
    return pa.DictionaryArray.from_arrays(indices, pa.nulls(0), ordered=wire.ordered)


def _encoded(array: pa.Array, wire: pa.DictionaryType) -> pa.DictionaryArray:
    kind = wire.value_type
    small = pa.types.is_decimal(kind) and kind.bit_width < 128  # for these Arrow has no encoder
    values = from_storage(array, pa.decimal128(kind.precision, kind.scale) if small else kind)
    encoded = values.dictionary_encode()
    indices, dictionary = encoded.indices.cast(wire.index_type), encoded.dictionary.cast(kind)
    return pa.DictionaryArray.from_arrays(indices, dictionary, ordered=wire.ordered)


def _struct(children: list[pa.Array], kind: pa.StructType, like: pa.Array) -> pa.StructArray:
    return pa.StructArray.from_arrays(children, fields=list(kind), mask=_mask(like))


def _list(lengths: Bits, items: pa.Array, kind: pa.DataType, like: pa.Array) -> pa.Array:
    large = pa.types.is_large_list(kind)
    offsets = _offsets(lengths, pa.int64() if large else pa.int32())
    make = pa.LargeListArray if large else pa.ListArray
    return make.from_arrays(offsets, items, type=kind, mask=_mask(like))


def _fixed_size_list(array: pa.Array, wire: pa.FixedSizeListType) -> pa.Array:
    lengths, items = _lists(array)
    values = from_storage(items, wire.value_type)
    validity = None
    if array.null_count:
        # A null list takes room here: put nulls there.
        starts = np.cumsum(lengths) - lengths
        places = starts[:, None] + np.arange(wire.list_size)
        under_null = np.repeat(np.asarray(array.is_null())[:, None], wire.list_size, axis=1)
        values = values.take(pa.array(places.ravel(), pa.int64(), mask=under_null.ravel()))
        validity = array.is_valid().buffers()[1]
    # Not FixedSizeListArray.from_arrays: it divides by the list size, which may be 0.
    return pa.Array.from_buffers(wire, len(array), [validity], children=[values])


def _lists(array: pa.Array) -> tuple[Bits, pa.Array]:
    """The lengths of lists and their items, those included that Arrow allows to lie under nulls."""
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        return np.full(len(array), size), array.values.slice(array.offset * size, len(array) * size)
    offsets = np.asarray(array.offsets)
    first, last = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, 0)
    return np.diff(offsets), array.values.slice(first, last - first)


def _offsets(lengths: Bits, kind: pa.DataType) -> pa.Array:
    return pa.array(np.concatenate(([0], np.cumsum(lengths))), kind)


def _mask(array: pa.Array) -> pa.Array | None:
    return array.is_null() if array.null_count else None


def _decimal_text(array: pa.Array) -> pa.Array:
    """Decimals as text, the exponent kept: Arrow's own text loses values whose scale is beyond the precision."""
    data = array.buffers()[1]
    width = array.type.bit_width // 8
    texts: list[str | None] = []
    for at, valid in enumerate(array.is_valid().to_pylist(), array.offset):
        number = int.from_bytes(data[at * width : (at + 1) * width], "little", signed=True) if valid else 0
        digits = tuple(map(int, str(abs(number))))
        texts.append(str(Decimal((number < 0, digits, -array.type.scale))) if valid else None)
    return pa.array(texts, pa.string())


def _decimal_from_text(array: pa.Array, wire: pa.DataType) -> pa.Array:
    width = wire.bit_width // 8
    data = bytearray()
    for text in array.to_pylist():
        number = Decimal(text or 0).as_tuple()
        unscaled = int("".join(map(str, number.digits)))
        data += (-unscaled if number.sign else unscaled).to_bytes(width, "little", signed=True)
    validity = array.is_valid().buffers()[1] if array.null_count else None
    return pa.Array.from_buffers(wire, len(array), [validity, pa.py_buffer(bytes(data))])


class _Float(NamedTuple):
    """An IEEE 754 type."""

    arrow: pa.DataType
    values: np.dtype[Any]
    bits: np.dtype[Any]
    mantissa: int


_HALF = _Float(pa.float16(), np.dtype(np.float16), np.dtype(np.uint16), 10)
_SINGLE = _Float(pa.float32(), np.dtype(np.float32), np.dtype(np.uint32), 23)
_DOUBLE = _Float(pa.float64(), np.dtype(np.float64), np.dtype(np.uint64), 52)
_UNSIGNED = {16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}


def _refloat(array: pa.Array, source: _Float, target: _Float) -> pa.Array:
    """Another float type that holds the same values. Hardware would quiet signalling NaNs: NaNs are moved as bits."""
    data = array.buffers()[1]
    if data is None or len(array) == 0:
        return pa.nulls(len(array), target.arrow)
    bits = np.frombuffer(data, source.bits)[array.offset : array.offset + len(array)]
    values = bits.view(source.values)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):  # what lies under nulls may be anything
        moved = values.astype(target.values).view(target.bits)
    nan = np.isnan(values)
    if nan.any():
        moved[nan] = _move_nan(bits[nan].astype(np.uint64), source, target).astype(target.bits)
    if not array.null_count:
        return pa.Array.from_buffers(target.arrow, len(moved), [None, pa.py_buffer(moved)])
    return pa.array(moved, _UNSIGNED[target.arrow.bit_width], mask=np.asarray(array.is_null())).view(target.arrow)


def _move_nan(bits: Bits, source: _Float, target: _Float) -> Bits:
    """Sign and payload of NaNs in another width: the payload keeps its place behind the exponent."""
    width = 8 * source.bits.itemsize
    target_width = 8 * target.bits.itemsize
    sign = (bits >> (width - 1)) << (target_width - 1)
    exponent = ((1 << (target_width - 1 - target.mantissa)) - 1) << target.mantissa
    payload = bits & ((1 << source.mantissa) - 1)
    shift = target.mantissa - source.mantissa
    return sign | np.uint64(exponent) | (payload << shift if shift > 0 else payload >> -shift)
