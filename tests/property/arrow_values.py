"""Arrow batches of every kind that the contract carries, drawn by their bits, and a comparison that sees every bit."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from contract.batches import TS_TYPE

ROWS_MAX = 6
UNITS = ("s", "ms", "us", "ns")
ZONES = (None, "UTC", "Europe/Berlin", "-07:30")

# What a careless conversion would change: signed zeros, infinities, quiet and signalling NaNs with payloads,
# subnormals.
FLOAT_BITS = {
    16: [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7E01, 0xFE55, 0x7C01, 0xFD55, 0x0001, 0x03FF, 0x7BFF],
    32: [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FC12345, 0xFFC00001, 0x7F800001, 0xFFA54321, 1, 0x7FFFFF],
    64: [
        0,
        1 << 63,
        0x7FF << 52,
        0xFFF << 52,
        0x7FF8 << 48,
        0x7FF8000000012345,
        0x7FF0000000000001,
        0xFFF4000000000777,
        1,
    ],
}


@cache
def _integers(bits: int) -> st.SearchStrategy[int]:
    extremes = [0, 1, (1 << (bits - 1)) - 1, 1 << (bits - 1), (1 << bits) - 1]
    return st.one_of(st.sampled_from(extremes), st.integers(0, (1 << bits) - 1))


@cache
def _plain_types() -> st.SearchStrategy[pa.DataType]:
    numbers = [
        pa.bool_(),
        pa.int8(),
        pa.int16(),
        pa.int32(),
        pa.int64(),
        pa.uint8(),
        pa.uint16(),
        pa.uint32(),
        pa.uint64(),
    ]
    floats = [pa.float16(), pa.float32(), pa.float64()]
    texts = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.binary(3)]
    times = [pa.date32(), pa.date64(), pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")]
    return st.one_of(
        st.sampled_from([*numbers, *floats, *texts, *times]),
        st.builds(pa.duration, st.sampled_from(UNITS)),
        st.builds(pa.timestamp, st.sampled_from(UNITS), st.sampled_from(ZONES)),
        _decimals(),
    )


@st.composite
def _decimals(draw: st.DrawFn) -> pa.DataType:
    make, digits = draw(
        st.sampled_from([(pa.decimal32, 9), (pa.decimal64, 18), (pa.decimal128, 38), (pa.decimal256, 76)])
    )
    precision = draw(st.integers(1, digits))
    return make(precision, draw(st.one_of(st.integers(0, precision), st.integers(-5, precision + 5))))


@cache
def _names() -> st.SearchStrategy[str]:
    odd = [
        "date",
        "Date",
        "_x",
        "_row",
        "field_date",
        "a b",
        "a,b",
        'q"',
        "100%",
        "a%20b",
        "a.b",
        "ü",
        "element",
        "key",
    ]
    return st.one_of(
        st.sampled_from(odd), st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=8)
    )


@cache
def types(depth: int = 3) -> st.SearchStrategy[pa.DataType]:
    """Types of rule 4 of the contract, nested at most `depth` deep."""
    return st.deferred(lambda: _types(depth))  # deferred: else Hypothesis writes out all nested strategies as text


def _types(depth: int) -> st.SearchStrategy[pa.DataType]:
    plain = st.one_of(_plain_types(), st.just(pa.null()))
    dictionary = st.builds(
        pa.dictionary,
        st.sampled_from(
            [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]
        ),
        _plain_types(),
        st.booleans(),
    )
    leaf = st.one_of(plain, dictionary)
    if depth == 0:
        return leaf
    inner = types(depth - 1)
    element = st.builds(pa.field, st.sampled_from(["item", "element", "x y"]), inner)
    keys = _plain_types()
    return st.one_of(
        leaf,
        st.builds(pa.list_, element),
        st.builds(pa.large_list, element),
        st.builds(pa.list_, element, st.integers(0, 3)),
        st.lists(st.tuples(_names(), inner), min_size=1, max_size=3, unique_by=lambda item: item[0].casefold()).map(
            pa.struct
        ),
        st.builds(pa.map_, keys, inner, st.booleans()),
    )


@st.composite
def arrays(draw: st.DrawFn, kind: pa.DataType, length: int, nullable: bool = True) -> pa.Array:
    """Values of a type, drawn by their bits, some null."""
    is_ = pa.types
    mask = np.array(
        draw(st.lists(st.booleans(), min_size=length, max_size=length)) if nullable else [False] * length, bool
    )
    nulls = pa.array(mask) if mask.any() else None
    if is_.is_null(kind):
        return pa.nulls(length)
    if is_.is_dictionary(kind):
        return draw(_dictionaries(kind, length, mask))
    if is_.is_struct(kind):
        children = [draw(arrays(child.type, length)) for child in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=nulls)
    if is_.is_fixed_size_list(kind):
        items = draw(arrays(kind.value_type, length * kind.list_size))
        # Not from_arrays: it divides by the list size, which may be 0.
        return pa.Array.from_buffers(kind, length, [_validity(mask)], children=[items])
    if is_.is_map(kind) or is_.is_list(kind) or is_.is_large_list(kind):
        # Also under nulls there may be items: Arrow allows it, and they are not values.
        lengths = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
        offsets = pa.array(
            np.concatenate(([0], np.cumsum(lengths))), pa.int64() if is_.is_large_list(kind) else pa.int32()
        )
        total = sum(lengths)
        if is_.is_map(kind):
            keys = draw(arrays(kind.key_type, total, nullable=False))
            return pa.MapArray.from_arrays(offsets, keys, draw(arrays(kind.item_type, total)), type=kind, mask=nulls)
        make = pa.LargeListArray if is_.is_large_list(kind) else pa.ListArray
        return make.from_arrays(offsets, draw(arrays(kind.value_type, total)), type=kind, mask=nulls)
    return draw(_plain_arrays(kind, length, mask))


@st.composite
def _dictionaries(draw: st.DrawFn, kind: pa.DictionaryType, length: int, mask: Any) -> pa.Array:
    size = draw(st.integers(1, 4))
    values = draw(arrays(kind.value_type, size))
    indices = draw(st.lists(st.integers(0, size - 1), min_size=length, max_size=length))
    return pa.DictionaryArray.from_arrays(pa.array(indices, kind.index_type, mask=mask), values, ordered=kind.ordered)


@st.composite
def _plain_arrays(draw: st.DrawFn, kind: pa.DataType, length: int, mask: Any) -> pa.Array:
    is_ = pa.types
    gone = mask.tolist()

    def values(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(strategy, min_size=length, max_size=length))

    def with_nulls(found: list[Any]) -> list[Any]:
        return [None if null else value for value, null in zip(found, gone, strict=True)]

    if is_.is_boolean(kind):
        return pa.array(with_nulls(values(st.booleans())), kind)
    if is_.is_string(kind) or is_.is_large_string(kind):
        return pa.array(with_nulls(values(st.text(st.characters(codec="utf-8"), max_size=5))), kind)
    if is_.is_binary(kind) or is_.is_large_binary(kind):
        return pa.array(with_nulls(values(st.binary(max_size=5))), kind)
    if is_.is_fixed_size_binary(kind):
        return pa.array(with_nulls(values(st.binary(min_size=kind.byte_width, max_size=kind.byte_width))), kind)
    width = kind.bit_width
    if is_.is_decimal(kind):
        most = 10**kind.precision - 1
        edges = st.sampled_from([0, 1, -1, most, -most])
        drawn = [value % (1 << width) for value in values(st.one_of(edges, st.integers(-most, most)))]
    elif is_.is_floating(kind):
        drawn = values(st.one_of(st.sampled_from(FLOAT_BITS[width]), _integers(width)))
    elif is_.is_date64(kind):  # Arrow knows whole days and times within a day only; the codec refuses others
        day_ms = 86_400_000
        most = (2**63 - 1) // day_ms
        drawn = [day * day_ms % (1 << 64) for day in values(st.integers(-most, most))]
    elif is_.is_time(kind):
        drawn = values(st.integers(0, 86_400 * 1000 ** UNITS.index(kind.unit) - 1))
    else:
        drawn = values(_integers(width))
    data = b"".join(value.to_bytes(width // 8, "little") for value in drawn)
    return pa.Array.from_buffers(kind, length, [_validity(mask), pa.py_buffer(data)])


def _validity(mask: Any) -> pa.Buffer | None:
    return pa.array(~mask).buffers()[1] if mask.any() else None


@st.composite
def batches(draw: st.DrawFn, depth: int = 3) -> pa.RecordBatch:
    """Batches as a device may send them: odd names, every type, metadata, `ts` at any place and of any value."""
    length = draw(st.integers(1, ROWS_MAX))
    named = draw(
        st.lists(
            st.tuples(_names(), types(depth)),
            min_size=1,
            max_size=4,
            unique_by=lambda item: item[0].casefold(),
        ).filter(lambda items: all(name.casefold() not in ("ts", "_row") for name, _ in items))
    )
    metadata = st.one_of(st.none(), st.just({"unit": "m/s²"}))
    fields = [pa.field(name, kind, metadata=draw(metadata)) for name, kind in named]
    columns = [draw(arrays(field.type, length)) for field in fields]
    place = draw(st.integers(0, len(fields)))
    fields.insert(place, pa.field("ts", TS_TYPE))
    columns.insert(place, draw(arrays(TS_TYPE, length, nullable=False)))
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields, metadata=draw(metadata)))


def bits(array: pa.Array) -> list[Any]:
    """The values of an array as Python objects that are equal only where every bit is; None for null."""
    kind = array.type
    is_ = pa.types
    if is_.is_null(kind):
        return [None] * len(array)
    valid = array.is_valid().to_pylist()
    if is_.is_dictionary(kind):
        values = bits(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if is_.is_struct(kind):
        children = [bits(array.field(i)) for i in range(kind.num_fields)]
        return [tuple(child[row] for child in children) if here else None for row, here in enumerate(valid)]
    if is_.is_nested(kind):
        return [_items(array, row) if here else None for row, here in enumerate(valid)]
    if is_.is_boolean(kind):
        return array.to_pylist()
    if is_.is_string(kind) or is_.is_large_string(kind):
        return array.to_pylist()
    if is_.is_binary(kind) or is_.is_large_binary(kind):
        return array.to_pylist()
    width = math.ceil(kind.bit_width / 8)
    data = array.buffers()[1]
    raw = data.to_pybytes() if data is not None else b""
    places = [(array.offset + row) * width for row in range(len(array))]
    return [raw[at : at + width] if here else None for at, here in zip(places, valid, strict=True)]


def _items(array: pa.Array, row: int) -> list[Any]:
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        first = (array.offset + row) * kind.list_size
        return bits(array.values.slice(first, kind.list_size))
    first, last = (array.offsets[row].as_py(), array.offsets[row + 1].as_py())
    if pa.types.is_map(kind):
        keys, items = array.keys.slice(first, last - first), array.items.slice(first, last - first)
        return list(zip(bits(keys), bits(items), strict=True))
    return bits(array.values.slice(first, last - first))


def assert_same_bits(found: pa.RecordBatch, sent: pa.RecordBatch) -> None:
    """Equal in schema (metadata, order and flags included), in which values are null, and in every bit of every
    value."""
    assert found.schema.equals(sent.schema, check_metadata=True), f"{found.schema}\n≠\n{sent.schema}"
    found.validate(full=True)
    for field, left, right in zip(sent.schema, found.columns, sent.columns, strict=True):
        assert bits(left) == bits(right), f"field {field}"
