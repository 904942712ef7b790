"""Values, not only numbers of rows: what the lake holds, bit for bit against what was replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from edge_agent.sensors.recording import FileOptions, Recording
from headwater.answers import quoted
from headwater.following import Followed, follow, rows_as_items
from headwater.plan import DevicePlan
from simulators import synthetic

Sql: TypeAlias = Callable[[str], pa.Table]
Items: TypeAlias = npt.NDArray[np.void]


class Values(msgspec.Struct, frozen=True, kw_only=True):
    """How the values in the lake compare."""

    rows_compared: int
    rows_changed: int
    """Readings whose bits are not what was replayed."""
    breaks: int
    """Places where the recording jumps although the agent was not started anew: lost or doubled readings."""
    streams_skipped: tuple[str, ...] = ()
    """Streams that are not compared, because nothing says what was sent, or types that have no fixed size."""


def compare(
    sql: Sql, devices: Sequence[DevicePlan], stretches: Mapping[str, int], since: str, later: Sequence[DevicePlan] = ()
) -> Values:
    """Compare every stream of every device.

    Args:
        sql: asks the lake.
        devices: the devices and their streams.
        stretches: how often each device began anew since `since`.
        since: when the run began, as SQL understands it.
        later: what some of the devices became during the run; they may have sent either.
    """
    compared = changed = breaks = 0
    skipped: dict[str, None] = {}
    for device in devices:
        for stream, settings in device.streams.items():
            if settings["driver"] == "callable":
                rows, wrong = _recomputed(sql, device.name, stream, settings["options"]["arguments"], since)
                compared, changed = compared + rows, changed + wrong
                continue
            other = [plan.streams[stream] for plan in later if plan.name == device.name]
            found = _followed(sql, device.name, stream, [settings, *other], since)
            if found is None:
                skipped[stream] = None
                continue
            compared, changed = compared + found.rows, changed + found.strangers
            # A changed reading also ends a stretch; it is counted once.
            breaks += max(0, found.stretches - found.strangers - max(1, stretches.get(device.name, 1)))
    return Values(rows_compared=compared, rows_changed=changed, breaks=breaks, streams_skipped=tuple(skipped))


def _followed(sql: Sql, device: str, stream: str, settings: Sequence[Mapping[str, Any]], since: str) -> Followed | None:
    loops = [_played(one) for one in settings]
    played = loops[0]
    if not all(comparable(field.type) for field in played.schema):
        return None
    names = ", ".join(quoted(name) for name in played.schema.names)
    lake = sql(
        f"SELECT {names} FROM {quoted(stream)} WHERE _device = '{device}' AND _received_at >= {since} "
        "ORDER BY min(ts) OVER (PARTITION BY _epoch), _seq, _row"
    )
    texts = {name: played[name].combine_chunks().unique() for name in played.schema.names if is_text(played[name].type)}
    return follow([items_of(loop, texts) for loop in loops], items_of(lake.select(played.schema.names), texts))


def _played(settings: Mapping[str, Any]) -> pa.Table:
    options = settings["options"]
    played = read_played(Path(options["path"]), options.get("time_column", "ts"))
    return changes_of(played) if settings["sampling"]["mode"] == "on_change" else played


def read_played(path: Path, time_column: str) -> pa.Table:
    """The rows of a recording as the driver hands them over, without their time."""
    recording = Recording(FileOptions(path=str(path), time_column=time_column))
    try:
        return pa.Table.from_batches([piece.rows for piece in recording.pieces()])
    finally:
        recording.close()


def changes_of(rows: pa.Table) -> pa.Table:
    """The rows that differ from the one before, around the loop, as sampling on change reports them."""
    differs = np.zeros(rows.num_rows, bool)
    for column in rows.columns:
        codes = column.combine_chunks().dictionary_encode().indices.to_numpy()
        differs |= codes != np.roll(codes, 1)
    return rows.filter(pa.array(differs)) if differs.any() else rows.slice(0, 1)


def is_text(kind: pa.DataType) -> bool:
    """Whether values have no fixed size, and are compared by their place among those of the recording."""
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def comparable(kind: pa.DataType) -> bool:
    """Whether `items_of` can hold the bits of a type."""
    return is_text(kind) or bool(pa.types.is_primitive(kind))


def items_of(rows: pa.Table, texts: Mapping[str, pa.Array]) -> Items:
    """Rows as opaque items.

    Args:
        rows: columns of comparable types.
        texts: by name of each text column, the texts that may occur; any other becomes a stranger.
    """
    columns: list[npt.NDArray[Any]] = []
    for name in rows.schema.names:
        column = rows[name].combine_chunks()
        columns.append(column.is_valid().to_numpy(zero_copy_only=False).view(np.uint8))
        if name in texts:
            codes = pc.index_in(column.cast(texts[name].type), value_set=texts[name])
            columns.append(codes.fill_null(-1).to_numpy())
        elif pa.types.is_boolean(column.type):
            columns.append(column.fill_null(False).to_numpy(zero_copy_only=False).view(np.uint8))
        else:
            width = np.dtype(f"u{column.type.bit_width // 8}")
            zero = pa.scalar(0, pa.int64()).cast(column.type) if column.null_count else None
            filled = column.fill_null(zero) if zero is not None else column
            columns.append(np.frombuffer(filled.buffers()[1], width)[filled.offset : filled.offset + len(filled)])
    return rows_as_items(columns)


def _recomputed(sql: Sql, device: str, stream: str, arguments: Mapping[str, Any], since: str) -> tuple[int, int]:
    """Rows, and rows that differ, of a machine whose every value follows from its time."""
    names = ", ".join(quoted(name) for name in synthetic.FIELDS.names)
    lake = sql(
        f"SELECT epoch_us(ts) AS us, {names} FROM {quoted(stream)} "
        f"WHERE _device = '{device}' AND _received_at >= {since}"
    )
    every_us = synthetic.interval_us(float(arguments["rate_hz"]))
    times = lake["us"].to_numpy()
    wanted = synthetic.columns(int(arguments["seed"]), times // every_us, every_us)
    wrong = times % every_us != 0
    for name, array in wanted.items():
        there = lake[name].combine_chunks().cast(array.type)
        wrong |= np.asarray(array.to_numpy(zero_copy_only=False) != there.to_numpy(zero_copy_only=False))
    return len(times), int(wrong.sum())
