"""Storage types: what becomes of each wire type, what a column says of it, and what a column takes.

Mutants tried, each made a test here fail: labels not compared; int64 taken into float64; a struct's new field
dropped; case of struct fields not compared; a list<null> deciding the type of a column.
"""

from __future__ import annotations

import pyarrow as pa
import pytest

from contract.errors import Reason, Rejected
from lake.plan import BASE_COLUMNS, WireSchemas, grow
from lake.types import CaseConflictError, TypeConflictError, is_nothing, label, merge, stored_field

UTC = pa.timestamp("us", "UTC")
KEPT = [pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.binary()]
STORED = [
    *((kind, kind, "") for kind in [*KEPT, pa.date32(), UTC, pa.decimal128(38, 0), pa.decimal128(5, 5)]),
    (pa.uint8(), pa.int16(), ""),
    (pa.uint16(), pa.int32(), ""),
    (pa.uint32(), pa.int64(), ""),
    (pa.uint64(), pa.decimal128(20, 0), ""),
    (pa.float16(), pa.float32(), ""),
    (pa.large_string(), pa.string(), ""),
    (pa.large_binary(), pa.binary(), ""),
    (pa.binary(7), pa.binary(), ""),
    (pa.timestamp("us", "Asia/Tokyo"), UTC, ""),
    (pa.timestamp("us"), UTC, "timestamp[us]"),
    (pa.timestamp("ns"), pa.int64(), "timestamp[ns]"),
    (pa.timestamp("ns", "Europe/Berlin"), pa.int64(), "timestamp[ns, UTC]"),
    (pa.timestamp("s"), pa.int64(), "timestamp[s]"),
    (pa.time32("ms"), pa.int32(), "time[ms]"),
    (pa.time64("ns"), pa.int64(), "time[ns]"),
    (pa.duration("us"), pa.int64(), "duration[us]"),
    (pa.date64(), pa.int64(), "date64"),
    (pa.decimal32(5, 2), pa.decimal128(5, 2), ""),
    (pa.decimal256(38, 2), pa.decimal128(38, 2), ""),
    (pa.decimal256(39, 2), pa.string(), "decimal"),
    (pa.decimal128(5, -1), pa.string(), "decimal"),
    (pa.decimal128(5, 6), pa.string(), "decimal"),
    (pa.list_(pa.uint8()), pa.list_(pa.field("element", pa.int16())), ""),
    (pa.large_list(pa.int8()), pa.list_(pa.field("element", pa.int8())), ""),
    (pa.list_(pa.float32(), 3), pa.list_(pa.field("element", pa.float32())), ""),
    (pa.list_(pa.list_(pa.duration("s"))), None, "list<list<duration[s]>>"),
    (pa.struct([("a b", pa.uint8())]), pa.struct([("a%20b", pa.int16())]), ""),
    (
        pa.map_(pa.string(), pa.uint8()),
        pa.list_(pa.field("element", pa.struct([("key", pa.string()), ("value", pa.int16())]))),
        "map",
    ),
    (pa.dictionary(pa.int8(), pa.large_string()), pa.string(), ""),
]


@pytest.mark.parametrize(("wire", "stored", "said"), STORED, ids=lambda value: str(value))
def test_a_wire_type_is_stored_as_the_table_in_the_module_says(
    wire: pa.DataType, stored: pa.DataType | None, said: str
) -> None:
    field = stored_field("x", wire)
    assert field is not None
    assert field.name == "x"
    assert field.nullable
    assert label(field) == said
    if stored is not None:
        assert field.type == stored


def test_fields_within_a_struct_carry_their_own_label() -> None:
    field = stored_field("x", pa.struct([("t", pa.timestamp("ns")), ("u", pa.int8())]))
    assert field is not None
    assert [label(child) for child in field.type] == ["timestamp[ns]", ""]


@pytest.mark.parametrize("wire", [pa.null(), pa.dictionary(pa.int8(), pa.null())], ids=str)
def test_a_type_of_nothing_but_null_needs_no_column(wire: pa.DataType) -> None:
    assert is_nothing(wire)
    assert stored_field("x", wire) is None


@pytest.mark.parametrize(
    "wire",
    [pa.list_(pa.null()), pa.struct([("a", pa.null())]), pa.map_(pa.string(), pa.list_(pa.null())).item_type],
    ids=str,
)
def test_an_empty_first_reading_does_not_decide_what_a_later_one_holds(wire: pa.DataType) -> None:
    wire_of = WireSchemas()
    first = pa.schema([("ts", UTC), ("x", wire)])
    later = pa.schema([("ts", UTC), ("x", pa.list_(pa.float32()))])
    columns = grow(BASE_COLUMNS, wire_of(first), "s")
    assert set(columns) - set(BASE_COLUMNS) == {"x%null"}
    columns = grow(columns, wire_of(later), "s")
    assert set(columns) - set(BASE_COLUMNS) == {"x%null", "x"}
    assert grow(columns, wire_of(first), "s") is columns


def column(wire: pa.DataType) -> pa.Field:
    field = stored_field("x", wire)
    assert field is not None
    return field


@pytest.mark.parametrize(
    ("have", "need"),
    [
        (pa.int32(), pa.int64()),
        (pa.float32(), pa.float64()),
        (pa.float64(), pa.int64()),
        (pa.float32(), pa.int32()),
        (pa.int64(), pa.uint64()),
        (pa.int64(), pa.float32()),
        (pa.string(), pa.int64()),
        (pa.int64(), pa.string()),
        (pa.string(), pa.binary()),
        (pa.int64(), pa.bool_()),
        (pa.int64(), pa.timestamp("ns")),
        (pa.timestamp("ns"), pa.int64()),
        (pa.timestamp("ns"), pa.timestamp("us")),
        (pa.timestamp("ms"), pa.timestamp("ns")),
        (pa.timestamp("ns"), pa.timestamp("ns", "UTC")),
        (pa.timestamp("us"), UTC),
        (pa.duration("s"), pa.duration("ms")),
        (pa.date32(), pa.date64()),
        (pa.decimal128(10, 2), pa.decimal128(10, 3)),
        (pa.decimal128(10, 2), pa.decimal128(11, 2)),
        (pa.decimal256(40, 2), pa.string()),
        (pa.list_(pa.int32()), pa.list_(pa.int64())),
        (pa.list_(pa.int32()), pa.int32()),
        (pa.struct([("a", pa.int8())]), pa.struct([("a", pa.string())])),
        (pa.map_(pa.string(), pa.int8()), pa.list_(pa.struct([("key", pa.string()), ("value", pa.int8())]))),
    ],
    ids=str,
)
def test_what_could_change_a_value_or_its_meaning_is_refused(have: pa.DataType, need: pa.DataType) -> None:
    with pytest.raises(TypeConflictError):
        merge(column(have), column(need))


def test_a_struct_takes_new_fields_and_keeps_the_old_ones() -> None:
    have = column(pa.struct([("a", pa.int32()), ("b", pa.list_(pa.struct([("c", pa.int8())])))]))
    need = column(pa.struct([("b", pa.list_(pa.struct([("d", pa.timestamp("ns"))]))), ("a", pa.int8())]))
    grown = merge(have, need)
    inner = pa.struct([("c", pa.int8()), ("d", pa.int64())])
    assert grown.type == pa.struct([("a", pa.int32()), ("b", pa.list_(pa.field("element", inner)))])
    assert label(grown.type.field("b").type.value_type.field("d")) == "timestamp[ns]"
    assert merge(grown, have).equals(grown, check_metadata=True)


def test_struct_fields_that_differ_only_by_case_are_refused() -> None:
    with pytest.raises(CaseConflictError):
        merge(column(pa.struct([("a", pa.int8())])), column(pa.struct([("A", pa.int8())])))


def test_a_conflict_within_a_struct_says_where() -> None:
    wire_of = WireSchemas()
    first = pa.schema([("ts", UTC), ("x", pa.struct([("a", pa.list_(pa.int8()))]))])
    second = pa.schema([("ts", UTC), ("x", pa.struct([("a", pa.list_(pa.string()))]))])
    columns = grow(BASE_COLUMNS, wire_of(first), "s")
    with pytest.raises(Rejected, match=r"at x\.a\[\]") as rejected:
        grow(columns, wire_of(second), "s")
    assert rejected.value.reason == Reason.TYPE_CONFLICT


def test_metadata_makes_another_schema_and_the_same_columns() -> None:
    wire_of = WireSchemas(kept_max=2)
    plain = wire_of(pa.schema([("ts", UTC), ("x", pa.int8())]))
    noted = wire_of(pa.schema([("ts", UTC), pa.field("x", pa.int8(), metadata={"unit": "m"})]))
    assert plain.fingerprint != noted.fingerprint
    assert plain.slots == noted.slots
    assert wire_of(pa.schema([("ts", UTC), ("x", pa.int8())])) is plain
    for number in range(4):
        wire_of(pa.schema([("ts", UTC), (f"x{number}", pa.int8())]))
    assert wire_of(pa.schema([("ts", UTC), ("x", pa.int8())])).fingerprint == plain.fingerprint
