"""Copying what can still be read of a damaged buffer into a new one.

A card that is wearing out loses single pages long before it loses itself. Every batch carries a checksum, so what reads
back right is right. Batches keep their epochs and numbers, to be drained; nothing new is added to those epochs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import structlog

from contract.codec import checksum
from contract.names import is_epoch, is_name
from edge_agent.buffer.connection import Connection
from edge_agent.buffer.ledger import SEQ_BITS

UNREADABLE_IN_A_ROW_MAX = 10_000
"""Numbers tried behind an unreadable place before the rest of the epoch is given up."""
_BATCHES_PER_COMMIT = 256
_BATCH = "key, rows, wall_us, monotonic_us, synced, boot, crc32, level, body"

_log = structlog.get_logger(__name__)


class LaneRow(NamedTuple):
    """What must be known of a lane to find its batches."""

    base: int
    stream: str
    epoch: str
    complete: bool
    """Whether `last_seq` is the last there is. What a running process did not store, although it may stand in the
    file, was refused to whoever brought it, and is brought again."""
    last_seq: int
    acked: int
    """Up to this nothing is needed any more."""


def salvage(
    old: Connection, new: Connection, known: Sequence[LaneRow], progress: Callable[[], None] = lambda: None
) -> int:
    """Copy batches whose checksums are right.

    Args:
        old: the damaged file.
        new: a fresh one.
        known: the lanes, where the process still knows them; else they are read from the file.
        progress: called again and again: a gigabyte on a card takes minutes.

    Returns:
        The number of batches copied. On a full disk it stops early: the rest stays in the old file.
    """
    copied = 0
    try:
        # Without this a file that was cut short is refused whole.
        old.execute("PRAGMA writable_schema = ON").fetchall()
        for number, lane in enumerate(known or _read_lanes(old), 1):
            copied += _copy_lane(old, new, lane, number, progress)
    except sqlite3.Error as error:
        # What is committed is worth having; the old file keeps the rest.
        if new.in_transaction:
            new.execute("ROLLBACK")
        _log.warning("buffer_salvage_stopped", batches=copied, error=str(error))
    return copied


def _read_lanes(old: Connection) -> list[LaneRow]:
    try:
        rows = old.execute("SELECT base, stream, epoch, NOT live, last_seq, acked FROM lanes ORDER BY lane").fetchall()
    except sqlite3.Error as error:
        _log.warning("buffer_salvage_impossible", error=str(error))
        return []
    lanes = [LaneRow(*row) for row in rows]
    return [lane for lane in lanes if is_name(str(lane.stream)) and is_epoch(str(lane.epoch))]


def _copy_lane(old: Connection, new: Connection, lane: LaneRow, number: int, progress: Callable[[], None]) -> int:
    base, copied, top = number << SEQ_BITS, 0, 0
    end = lane.base + lane.last_seq + 1 if lane.complete else ((lane.base >> SEQ_BITS) + 1) << SEQ_BITS
    key, failures = lane.base + lane.acked, 0
    while failures < UNREADABLE_IN_A_ROW_MAX:
        progress()
        try:
            row = old.execute(
                f"SELECT {_BATCH} FROM batches WHERE key > ? AND key < ? ORDER BY key LIMIT 1", (key, end)
            ).fetchone()
        except sqlite3.Error:
            key, failures = key + 1, failures + 1
            continue
        if row is None:
            break
        if row[0] <= key:
            # A damaged page can claim any order; going on from it could go on for ever.
            key, failures = key + 1, failures + 1
            continue
        key, failures = row[0], 0
        if _is_whole(row):
            if not new.in_transaction:
                new.execute("BEGIN IMMEDIATE")
            top = max(top, key - lane.base)
            new.execute(
                f"INSERT INTO batches ({_BATCH}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (base + key - lane.base, *row[1:])
            )
            copied += 1
            if copied % _BATCHES_PER_COMMIT == 0:
                _put_lane(new, lane, number, base, top)
                new.execute("COMMIT")
    if new.in_transaction or max(top, lane.last_seq) > lane.acked:
        if not new.in_transaction:
            new.execute("BEGIN IMMEDIATE")
        _put_lane(new, lane, number, base, top)
        new.execute("COMMIT")
    return copied


def _put_lane(new: Connection, lane: LaneRow, number: int, base: int, top: int) -> None:
    """Keep a lane with how far it is known to have gone, also where that is lost: the end of it is told as a hole."""
    new.execute(
        "INSERT OR REPLACE INTO lanes (lane, base, stream, epoch, live, last_seq, acked) VALUES (?, ?, ?, ?, 0, ?, ?)",
        (number, base, lane.stream, lane.epoch, max(top, lane.last_seq), lane.acked),
    )


def _is_whole(row: Sequence[Any]) -> bool:
    *numbers, boot, crc32, level, body = row
    return (
        all(isinstance(number, int) for number in (*numbers, crc32, level))
        and isinstance(boot, bytes)
        and isinstance(body, bytes)
        and checksum(body) == crc32
    )
