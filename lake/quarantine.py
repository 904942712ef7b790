"""Where whole payloads stand that cannot become rows: the table `inbox/quarantine`.

A record is written before the commit that steps over its seq, so a gateway that dies between the two leaves it
behind and the next one writes it again: a repeat is harmless, because readers keep one record of each `key`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyarrow as pa

from lake.delta import wall_clock_ms
from lake.errors import CommitConflictError
from lake.store import Store
from lake.tables import ControlTable
from lake.types import STORED_TIMESTAMP

PATH = "inbox/quarantine"
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("received_at", STORED_TIMESTAMP),
        pa.field("topic", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("device", pa.string()),
        pa.field("stream", pa.string()),
        pa.field("epoch", pa.string()),
        pa.field("seq", pa.int64()),
        pa.field("payload", pa.binary()),
    ]
)
_REMEMBERED_MAX = 20_000
_ATTEMPTS_MAX = 5
_FILE_BYTES_MAX = 64 * 1024 * 1024


class QuarantineRecord(NamedTuple):
    """A payload put aside, with the reason. What is not known of it is None."""

    received_at_us: int
    """Gateway wall clock at arrival, microseconds since 1970-01-01 UTC."""
    topic: str
    reason: str
    """`contract.errors.Reason`."""
    message: str
    device: str | None
    stream: str | None
    epoch: str | None
    """Only of a batch whose seq is stepped over; `gaps` does not count it as missing."""
    seq: int | None
    """Like `epoch`."""
    payload: bytes


def key_of(record: QuarantineRecord) -> str:
    """The same for every repeat: the batch's number where it has one (each sending has another envelope), else a
    hash."""
    if record.epoch is not None and record.seq is not None:
        return f"{record.stream}/{record.device}/{record.epoch}/{record.seq}"
    return hashlib.sha256(record.topic.encode(errors="replace") + b"\0" + record.payload).hexdigest()[:32]


class QuarantineTable:
    """The table as one gateway process sees it. Not thread-safe."""

    def __init__(self, store: Store, *, clock_ms: Callable[[], int] = wall_clock_ms) -> None:
        self._table = ControlTable(store, PATH, SCHEMA, clock_ms=clock_ms)
        self._written: OrderedDict[str, None] = OrderedDict()

    def append(self, records: Sequence[QuarantineRecord]) -> None:
        """Commit records. What this process wrote lately is not written again.

        Raises:
            CommitConflictError: the table was being made by too many at once; try again.
            StoreUnavailableError: it is not known whether all were committed; writing them again is harmless.
        """
        life = self._table.life
        self._table.refresh()
        if self._table.life != life:
            self._written.clear()
        fresh = {key_of(record): record for record in records}
        for key in list(fresh):
            if key in self._written:
                self._written.move_to_end(key)
                del fresh[key]
        part: dict[str, QuarantineRecord] = {}
        size = 0
        for key, record in fresh.items():
            if part and size + len(record.payload) > _FILE_BYTES_MAX:
                self._commit(part)
                part, size = {}, 0
            part[key] = record
            size += len(record.payload)
        if part:
            self._commit(part)

    def _commit(self, records: dict[str, QuarantineRecord]) -> None:
        rows = _rows(records)
        for attempt in range(1, _ATTEMPTS_MAX + 1):
            self._table.refresh()
            try:
                self._table.append(rows)
                break
            except CommitConflictError:
                # Somebody made the table, or added columns to it.
                if attempt == _ATTEMPTS_MAX:
                    raise
        for key in records:
            self._written[key] = None
        while len(self._written) > _REMEMBERED_MAX:
            self._written.popitem(last=False)


def _rows(records: dict[str, QuarantineRecord]) -> pa.Table:
    found = list(records.values())
    received = pa.array([record.received_at_us for record in found], pa.int64()).view(STORED_TIMESTAMP)
    columns = {
        "key": list(records),
        "received_at": received,
        "topic": [_text(record.topic) for record in found],
        "reason": [record.reason for record in found],
        "message": [_text(record.message) for record in found],
        "device": [record.device for record in found],
        "stream": [record.stream for record in found],
        "epoch": [record.epoch for record in found],
        "seq": [record.seq for record in found],
        "payload": [record.payload for record in found],
    }
    return pa.table(columns, schema=SCHEMA)


def _text(text: str) -> str:
    """Text that UTF-8 can hold: a topic may come with anything in it."""
    return text.encode(errors="backslashreplace").decode()
