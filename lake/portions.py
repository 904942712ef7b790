"""How a flush is cut into files, so that writing one never takes more memory than it may. Pure.

Rows of one file are one table in memory, and every row of it takes room in every column: what a batch's schema lacks is
NULL there, and a column may be wider than what was sent. A batch of 65,536 rows and one field beside a batch of one row
and 1,000 fields would be half a gigabyte of NULLs. So what a flush takes is worked out first, and batches of different
schemas stand in files of their own where they would take much more together than apart. A small flush stays one file:
many small ones cost every reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import NamedTuple

import pyarrow as pa

from contract.batches import expanded_bytes
from lake.parts import RawBatch
from lake.plan import Columns, WireSchema

LINEAGE_BYTES = 48
"""What the lineage of one row takes, roughly."""
TOGETHER_FACTOR = 2
"""Batches of different schemas stand in one file while they take no more than so many times what they would apart …"""
TOGETHER_SHARE = 8
"""… or no more than this part of what a file may take."""


class _Shape(NamedTuple):
    """What batches of one schema take."""

    columns: frozenset[str]
    row_bytes: int
    varies: bool
    """Whether a row may take more, because it holds texts or lists."""


class _Sized(NamedTuple):
    batch: RawBatch
    size_bytes: int
    """Of its rows, in the types of the table."""


def portions(
    batches: Sequence[RawBatch], wire_of: Callable[[pa.Schema], WireSchema], have: Columns, bytes_max: int
) -> Iterator[list[RawBatch]]:
    """Cut a flush.

    Args:
        batches: in the order in which they shall stand in files.
        wire_of: what is known of a batch's schema.
        have: columns of the table, which has all that the schemas need.
        bytes_max: what the rows of one file may take in memory. One batch always may.

    Returns:
        The batches of each file, in order.
    """
    groups: dict[str, tuple[_Shape, list[_Sized]]] = {}
    sized: list[_Sized] = []
    for batch in batches:
        wire = wire_of(batch.batch.schema)
        if wire.fingerprint not in groups:
            groups[wire.fingerprint] = _shape(wire, have), []
        shape, members = groups[wire.fingerprint]
        size = batch.batch.num_rows * shape.row_bytes
        if shape.varies:
            size = max(size, expanded_bytes(batch.batch))
        sized.append(_Sized(batch, size))
        members.append(sized[-1])
    if len(groups) == 1:
        yield from _cut(sized, 0, bytes_max)
        return
    union = _row_bytes(set().union(*(shape.columns for shape, _ in groups.values())), have)
    apart = sum(one.size_bytes for one in sized)
    together = sum(max(one.size_bytes, one.batch.batch.num_rows * union) for one in sized)
    if together <= max(TOGETHER_FACTOR * apart, bytes_max // TOGETHER_SHARE):
        yield from _cut(sized, union, bytes_max)
    else:
        for _, members in groups.values():
            yield from _cut(members, 0, bytes_max)


def _shape(wire: WireSchema, have: Columns) -> _Shape:
    names = frozenset(slot.field.name for slot in wire.slots)
    varies = any(_varies(wire.schema.field(slot.place).type) for slot in wire.slots)
    return _Shape(names, _row_bytes(names, have), varies)


def _cut(sized: Sequence[_Sized], row_bytes: int, bytes_max: int) -> Iterator[list[RawBatch]]:
    part: list[RawBatch] = []
    total = 0
    for one in sized:
        size = max(one.size_bytes, one.batch.batch.num_rows * row_bytes)
        if part and total + size > bytes_max:
            yield part
            part, total = [], 0
        part.append(one.batch)
        total += size
    if part:
        yield part


def _row_bytes(names: Set[str], have: Columns) -> int:
    """What one row takes in these columns, beside what texts and lists hold."""
    return LINEAGE_BYTES + sum(_width(have[name].type) for name in names)


def _varies(kind: pa.DataType) -> bool:
    try:
        return pa.types.is_nested(kind) or pa.types.is_dictionary(kind) or not kind.bit_width
    except ValueError:  # Arrow's word for: of no fixed width
        return True


def _width(kind: pa.DataType) -> int:
    types = pa.types
    if types.is_struct(kind):
        return sum(_width(child.type) for child in kind)
    if types.is_boolean(kind):
        return 1
    if types.is_list(kind) or types.is_string(kind) or types.is_binary(kind):
        return 4
    return int(kind.bit_width) // 8
