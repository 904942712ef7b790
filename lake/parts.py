"""From batches to the tables that become Parquet files: storage types, lineage columns, one table per date. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from contract.batches import Clock
from contract.names import TS
from lake import columns
from lake.convert import to_storage
from lake.plan import Columns, WireSchema
from lake.types import STORED_TIMESTAMP

Int64s = npt.NDArray[np.int64]

DAY_US = 86_400_000_000
REPEATING = frozenset((columns.DEVICE, columns.EPOCH, columns.CLOCK, columns.SCHEMA))
COUNTING = frozenset((TS, columns.SEQ, columns.ROW, columns.RECEIVED_AT))

# 0001-01-01 and 9999-12-31T23:59:59.999: what a timestamp in a Delta log may say (four digits for the year).
_STATED_US_MIN = -62_135_596_800_000_000
_STATED_US_MAX = 253_402_300_799_999_000


class RawBatch(NamedTuple):
    """One batch on its way into a table."""

    device: str
    epoch: str
    seq: int
    shard: int
    received_at_us: int
    """Gateway wall clock at arrival, microseconds since 1970-01-01 UTC."""
    clock: Clock
    batch: pa.RecordBatch
    """The rows as the device sent them."""


class Part(NamedTuple):
    """Rows of one date, ready to be written as a file."""

    date: str
    """YYYY-MM-DD."""
    table: pa.Table
    """Storage columns and lineage, each in one chunk, ordered by device, epoch, seq."""
    stats: bytes
    """Delta file statistics, JSON."""


class _Lineage(NamedTuple):
    """Lineage of all rows of a flush, as numbers."""

    devices: list[str]
    device: npt.NDArray[np.int32]
    """Index into `devices`, which is sorted."""
    seq: Int64s
    received_at: Int64s
    arrays: dict[str, pa.Array]


def build(
    batches: Sequence[RawBatch],
    wire_of: Callable[[pa.Schema], WireSchema],
    have: Columns,
    max_clock_skew_us: int,
) -> tuple[list[Part], int]:
    """Build the tables of one flush.

    Args:
        batches: at least one, sorted by (device, epoch, seq).
        wire_of: what is known of a batch's schema.
        have: columns of the table, which has all that the schemas need.
        max_clock_skew_us: a `ts` further than this from the time of arrival does not decide the date.

    Returns:
        One part per date, and the rows whose clock was too far off.
    """
    counts = np.array([item.batch.num_rows for item in batches], np.int64)
    fields = _fields(batches, wire_of, have)
    lineage = _lineage(batches, counts, wire_of)
    ts = fields.column(TS).chunk(0).view(pa.int64()).to_numpy()
    days, skewed = days_of(ts, lineage.received_at, max_clock_skew_us)
    table = fields
    for name in columns.LINEAGE:
        table = table.append_column(name, lineage.arrays[name])
    return list(_split(table, ts, days, lineage)), skewed


def _fields(batches: Sequence[RawBatch], wire_of: Callable[[pa.Schema], WireSchema], have: Columns) -> pa.Table:
    """The fields of all rows in storage types, each column in one chunk, rows in the order of the batches."""
    groups: dict[str, tuple[WireSchema, list[int]]] = {}
    for index, item in enumerate(batches):
        wire = wire_of(item.batch.schema)
        groups.setdefault(wire.fingerprint, (wire, []))[1].append(index)
    tables = [_stored([batches[index].batch for index in members], wire, have) for wire, members in groups.values()]
    if len(tables) == 1:
        return tables[0]
    # Several schemas: put their rows back in order, batch by batch, and NULL where a schema lacks a column.
    pieces: list[pa.Table | None] = [None] * len(batches)
    for table, (_, members) in zip(tables, groups.values(), strict=True):
        start = 0
        for index in members:
            rows = batches[index].batch.num_rows
            pieces[index] = table.slice(start, rows)
            start += rows
    return pa.concat_tables(
        [piece for piece in pieces if piece is not None], promote_options="default"
    ).combine_chunks()


def _stored(batches: list[pa.RecordBatch], wire: WireSchema, have: Columns) -> pa.Table:
    arrays = []
    for slot in wire.slots:
        target = have[slot.field.name].type
        chunks = [batch.column(slot.place) for batch in batches]
        if _has_dictionary(chunks[0].type):
            # Dictionaries differ from batch to batch, so each is expanded before they are joined.
            array = pa.concat_arrays([to_storage(chunk, target) for chunk in chunks])
        else:
            array = to_storage(pa.concat_arrays(chunks), target)
        arrays.append(array)
    return pa.table(arrays, names=[slot.field.name for slot in wire.slots])


def _has_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) or any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))


def _lineage(batches: Sequence[RawBatch], counts: Int64s, wire_of: Callable[[pa.Schema], WireSchema]) -> _Lineage:
    device, devices = _repeated([item.device for item in batches], counts)
    epoch, epochs = _repeated([item.epoch for item in batches], counts)
    schema, schemas = _repeated([wire_of(item.batch.schema).fingerprint for item in batches], counts)
    clock, clocks = _repeated([clock_text(item.clock) for item in batches], counts)
    seq = np.repeat(np.array([item.seq for item in batches], np.int64), counts)
    received_at = np.repeat(np.array([item.received_at_us for item in batches], np.int64), counts)
    arrays = {
        columns.DEVICE: _dictionary(device, devices),
        columns.EPOCH: _dictionary(epoch, epochs),
        columns.SEQ: pa.array(seq),
        columns.ROW: pa.array(_row_numbers(batches, counts, wire_of)),
        columns.RECEIVED_AT: pa.array(received_at).view(STORED_TIMESTAMP),
        columns.CLOCK: _dictionary(clock, clocks),
        columns.SCHEMA: _dictionary(schema, schemas),
    }
    return _Lineage([name or "" for name in devices], device, seq, received_at, arrays)


def clock_text(clock: Clock) -> str | None:
    """What `_clock` says: nothing where the clock was synchronised, else what is needed to place the rows in time
    later."""
    if clock.synced:
        return None
    stated = {"boot": clock.boot, "mono_us": clock.monotonic_us, "wall_us": clock.wall_us}
    return msgspec.json.encode(stated).decode()


def _repeated(values: list[Any], counts: Int64s) -> tuple[npt.NDArray[np.int32], list[Any]]:
    """Index of each row's value among the distinct values, in the order they appear."""
    places: dict[Any, int] = {}
    indices = [places.setdefault(value, len(places)) for value in values]
    return np.repeat(np.array(indices, np.int32), counts), list(places)


def _dictionary(indices: npt.NDArray[np.int32], values: list[str | None]) -> pa.Array:
    if values == [None]:
        return pa.nulls(len(indices), pa.string())
    mask = indices == values.index(None) if None in values else None
    known = pa.array([value or "" for value in values], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(indices, mask=mask), known)


def _row_numbers(
    batches: Sequence[RawBatch], counts: Int64s, wire_of: Callable[[pa.Schema], WireSchema]
) -> npt.NDArray[np.int32]:
    starts = np.cumsum(counts) - counts
    rows = (np.arange(counts.sum()) - np.repeat(starts, counts)).astype(np.int32)
    for item, start in zip(batches, starts.tolist(), strict=True):
        index = wire_of(item.batch.schema).row_index
        if index >= 0:
            rows[start : start + item.batch.num_rows] = item.batch.column(index).to_numpy()
    return rows


def days_of(ts: Int64s, received_at: Int64s, max_clock_skew_us: int) -> tuple[Int64s, int]:
    """Day since 1970-01-01 that decides where each row stands, and how many rows stand by their time of arrival."""
    # Compared so that no ts of 64 bits overflows.
    off = (ts > received_at + max_clock_skew_us) | (ts < received_at - max_clock_skew_us)
    skewed = int(np.count_nonzero(off))
    return np.where(off, received_at, ts) // DAY_US, skewed


def _split(table: pa.Table, ts: Int64s, days: Int64s, lineage: _Lineage) -> Iterator[Part]:
    first, last = int(days.min()), int(days.max())
    if first == last:
        yield Part(_date(first), table, _stats(ts, lineage))
        return
    for day in np.unique(days).tolist():
        chosen = np.flatnonzero(days == day)
        rows = pa.array(chosen)
        part = lineage._replace(
            device=lineage.device[chosen], seq=lineage.seq[chosen], received_at=lineage.received_at[chosen]
        )
        yield Part(_date(day), table.take(rows).combine_chunks(), _stats(ts[chosen], part))


def _date(day: int) -> str:
    return str(np.datetime64(day, "D"))


def _stats(ts: Int64s, lineage: _Lineage) -> bytes:
    """What lets readers skip a file. A timestamp is stated in milliseconds, so the bounds are rounded outwards."""
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    low[columns.DEVICE] = lineage.devices[int(lineage.device.min())]
    high[columns.DEVICE] = lineage.devices[int(lineage.device.max())]
    low[columns.SEQ], high[columns.SEQ] = int(lineage.seq.min()), int(lineage.seq.max())
    for name, times in ((TS, ts), (columns.RECEIVED_AT, lineage.received_at)):
        first, last = int(times.min()), int(times.max())
        if first >= _STATED_US_MIN and last <= _STATED_US_MAX:
            low[name], high[name] = _stated_time(first // 1000), _stated_time(-(-last // 1000))
    nulls = dict.fromkeys((TS, columns.DEVICE, columns.SEQ, columns.RECEIVED_AT), 0)
    return msgspec.json.encode({"numRecords": len(ts), "minValues": low, "maxValues": high, "nullCount": nulls})


def _stated_time(ms: int) -> str:
    return f"{np.datetime64(ms, 'ms')}Z"


def sort_key(item: RawBatch) -> tuple[str, str, int]:
    """Order of batches within a file."""
    return item.device, item.epoch, item.seq
