"""The device's buffer on disk: batches in one SQLite file, in WAL mode, flushed at every append.

One lock for everything that writes, one connection of its own for what the uplink reads. The rules of eviction are in
`eviction.py`, the books in `ledger.py`, the file in `database.py`, the reasons in docs/adr/0005-buffer.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from contract.batches import Clock
from contract.codec import checksum
from contract.limits import DEFAULT_LIMITS, Limits
from edge_agent.buffer.connection import Connect, Connection, CorruptFileError, connect
from edge_agent.buffer.database import Database
from edge_agent.buffer.eviction import DEFAULT_CAPS, EvictionLog, Rules
from edge_agent.buffer.ledger import COLUMNS, Lane, Ledger, acknowledged, load
from edge_agent.buffer.port import (
    Appended,
    BufferUnavailableError,
    Eviction,
    Hollow,
    LaneInfo,
    NewBatch,
    Opened,
    OpenedKind,
    Stored,
    StreamCaps,
)
from edge_agent.buffer.salvage import LaneRow, salvage

T = TypeVar("T")

WAL_BYTES_MAX = 1024 * 1024
"""The log is folded into the file when it has grown to this. A batch acknowledged before is never written twice."""
UNDELETED_BATCHES_MAX = 64
UNDELETED_BYTES_MAX = 1024 * 1024
UNDELETED_AGE_S_MAX = 5.0
"""What was acknowledged is deleted along with the lane's next append, or when this much of it has come together."""
DELETED_BATCHES_MAX = 1_024
"""Of one lane in one transaction, so that no append waits long."""

_log = structlog.get_logger(__name__)


class SqliteBuffer:
    """`BatchBuffer` on disk.

    Attributes:
        opened: what was found at opening; after damage found later, that.
    """

    def __init__(
        self,
        path: Path,
        caps: Mapping[str, StreamCaps],
        bytes_max: int,
        now: Callable[[], Clock],
        fingerprint: str,
        *,
        default_caps: StreamCaps = DEFAULT_CAPS,
        limits: Limits = DEFAULT_LIMITS,
        connect: Connect = connect,
        wal_bytes_max: int = WAL_BYTES_MAX,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the buffer, and create it where there is none.

        Args:
            path: the database file; its folder is created.
            caps: caps by stream.
            bytes_max: cap of the whole buffer, bytes of bodies. The file stays within 1.25 times this for batches of
                500 bytes or more, plus twice the log and the reserve.
            now: the device's clocks.
            fingerprint: of this board's hardware (`edge_agent.identity`).
            default_caps: caps of streams without their own.
            limits: what one batch may be.
            connect: opens a connection to a database file.
            wal_bytes_max: size at which the log is folded into the file.
            progress: called often while a damaged file is being replaced, at opening or in use; must return at once.

        Raises:
            BufferUnavailableError: the disk is full, read-only or failing; try again later.
            ConfigurationError: another process has the buffer, or the file is another program's.
        """
        self._rules = Rules(caps, bytes_max, default_caps, limits)
        self._now = now
        self._opened_at = now()
        self._fingerprint = fingerprint
        self._progress = progress
        self._db = Database(path, connect, wal_bytes_max)
        self._lock = threading.RLock()
        self._closed = False
        self._damages = 0
        self._evictions = EvictionLog()
        self._lanes: Mapping[int, Lane] = {}
        self._by_epoch: Mapping[tuple[str, str], Lane] = {}
        try:
            self.opened = self._open()
        except BaseException:
            self._db.close()
            raise
        _log.info("buffer_opened", path=str(path), kind=str(self.opened.kind), detail=self.opened.detail)

    # The port

    def append(self, stream: str, body: bytes, rows: int, clock: Clock) -> Appended:
        """See `BatchBuffer.append`."""
        return self.append_many([NewBatch(stream, body, rows, clock)])[0]

    def append_many(self, batches: Sequence[NewBatch]) -> Sequence[Appended]:
        """See `BatchBuffer.append_many`."""
        now = self._now()

        def work(ledger: Ledger) -> Sequence[Appended]:
            appended = [self._append(ledger, new, now) for new in batches]
            self._delete_due(ledger, now)
            return appended

        return self._write(work) if batches else ()

    def peek(self, stream: str, epoch: str, after_seq: int) -> Stored | None:
        """See `BatchBuffer.peek`."""
        lane = self._by_epoch.get((stream, epoch))
        if lane is None or not lane.batches or after_seq >= lane.last_seq:
            return None
        row = self._read(
            f"SELECT {COLUMNS} FROM batches WHERE key > ? AND key <= ? ORDER BY key LIMIT 1",
            (lane.key(max(after_seq, lane.acked)), lane.key(lane.last_seq)),
        )
        return lane.stored(row) if row else None

    def body(self, stream: str, epoch: str, seq: int) -> bytes | None:
        """See `BatchBuffer.body`."""
        fetched = self.fetch(stream, epoch, seq)
        return fetched[1] if fetched else None

    def fetch(self, stream: str, epoch: str, seq: int) -> tuple[Stored, bytes] | None:
        """See `BatchBuffer.fetch`."""
        lane = self._by_epoch.get((stream, epoch))
        if lane is None or not lane.acked < seq <= lane.last_seq:
            return None
        row = self._read(f"SELECT {COLUMNS}, body FROM batches WHERE key = ?", (lane.key(seq),))
        if row is None:
            return None
        batch, body = lane.stored(row[:-1]), row[-1]
        if checksum(body) != batch.crc32:
            self._evict_corrupt(lane.lane, seq)
            return None
        return batch, body

    def floor(self, stream: str, epoch: str) -> int | None:
        """See `BatchBuffer.floor`."""
        lane = self._by_epoch.get((stream, epoch))
        return lane.floor if lane else None

    def acknowledge(self, stream: str, epoch: str, seq: int) -> int:
        """See `BatchBuffer.acknowledge`."""
        with self._lock:
            damages = self._damages
            try:
                return self._acknowledge(stream, epoch, seq)
            except CorruptFileError as error:
                # Whoever brought it believes it is done: it holds for what was saved, too.
                self._heal(error, damages)
                return self._acknowledge(stream, epoch, seq)

    def _acknowledge(self, stream: str, epoch: str, seq: int) -> int:
        lane = self._by_epoch.get((stream, epoch))
        if lane is None:
            return 0
        now = self._now()
        after, deleted = acknowledged(lane, seq, now, self._db.query)
        self._publish({**self._lanes, lane.lane: after})
        if self._is_due(after, now):
            self._delete(lambda ledger: self._delete_due(ledger, now))
        return deleted

    def open_epoch(self, stream: str, *, move_after_seq: int | None = None) -> str:
        """See `BatchBuffer.open_epoch`."""

        def work(ledger: Ledger) -> str:
            lane = ledger.find_live(stream)
            new = ledger.retire(lane, move_after_seq) if lane else None
            return (new or ledger.live(stream)).epoch

        return self._write(work)

    def lanes(self) -> Sequence[LaneInfo]:
        """See `BatchBuffer.lanes`."""
        return sorted((lane.info() for lane in self._lanes.values() if lane.shown), key=lambda info: not info.live)

    def maintain(self) -> None:
        """See `BatchBuffer.maintain`."""
        now = self._now()

        def work(ledger: Ledger) -> EvictionLog:
            log = EvictionLog()
            self._rules.expire(ledger, sorted(ledger.held_bytes()), now, self._opened_at, log)
            self._delete_due(ledger, now)
            return log

        with self._lock:
            self._evictions.extend(self._write(work).take())
            self._db.upkeep()

    def take_evictions(self) -> Sequence[Eviction]:
        """See `BatchBuffer.take_evictions`."""
        with self._lock:
            return self._evictions.take()

    def hollow(self) -> Sequence[Hollow]:
        """See `BatchBuffer.hollow`."""
        return [Hollow(lane.stream, lane.epoch, lane.last_seq) for lane in self._lanes.values() if lane.hollow]

    def forget(self, stream: str, epoch: str) -> None:
        """See `BatchBuffer.forget`."""

        def work(ledger: Ledger) -> None:
            for lane in list(ledger.lanes.values()):
                if (lane.stream, lane.epoch) == (stream, epoch) and lane.hollow:
                    ledger.forget(lane)

        self._write(work)

    def close(self) -> None:
        """See `BatchBuffer.close`."""
        with self._lock:
            if self._closed:
                return
            self._delete(self._delete_at_close)
            self._closed = True
            self._db.close()

    def file_bytes(self) -> int:
        """Everything the buffer takes on disk."""
        return self._db.file_bytes()

    # Writing

    def _append(self, ledger: Ledger, new: NewBatch, now: Clock) -> Appended:
        log = EvictionLog()
        lane = ledger.live(new.stream)
        # The pages of what was acknowledged become those of the new batch: in steady state the file neither grows nor
        # is more than a few pages of it ever written.
        ledger.delete_acknowledged(lane, DELETED_BATCHES_MAX)
        self._rules.expire(ledger, [new.stream], now, self._opened_at, log)
        size = len(new.body)
        room = self._rules.make_room(ledger, new.stream, size, log)
        lane.last_seq += 1
        if room:
            ledger.add(lane, new)
        else:
            cause = self._rules.refusal(new.stream, size)
            log.note(Eviction(lane.stream, lane.epoch, lane.last_seq, lane.last_seq, new.rows, cause))
        return Appended(lane.epoch, lane.last_seq, room, log.take())

    def _delete(self, work: Callable[[Ledger], None]) -> None:
        """Write down deletions that count as done already; if the disk does not take them, it is for another time."""
        try:
            self._write(work)
        except BufferUnavailableError as error:
            _log.warning("buffer_deletion_deferred", path=str(self._db.path), error=str(error))

    def _delete_due(self, ledger: Ledger, now: Clock) -> None:
        for lane in list(ledger.lanes.values()):
            if self._is_due(lane, now):
                ledger.delete_acknowledged(lane, DELETED_BATCHES_MAX)

    def _delete_at_close(self, ledger: Ledger) -> None:
        for lane in list(ledger.lanes.values()):
            ledger.delete_acknowledged(lane, DELETED_BATCHES_MAX)
        # Where the file is found damaged at the next start, what is lost of it can be told then.
        ledger.save_last_seqs()

    def _is_due(self, lane: Lane, now: Clock) -> bool:
        return lane.dead_batches > 0 and (
            lane.dead_batches >= UNDELETED_BATCHES_MAX
            or lane.dead_bytes >= UNDELETED_BYTES_MAX
            or now.monotonic_us - lane.dead_since_us >= UNDELETED_AGE_S_MAX * 1e6
        )

    def _evict_corrupt(self, number: int, seq: int) -> None:
        """Give up a batch whose body is damaged; unless it was replaced since it was read."""

        def work(ledger: Ledger) -> Stored | None:
            lane = ledger.lanes.get(number)
            found = ledger.find(lane, seq) if lane else None
            if found is None or checksum(found[1]) == found[0].crc32:
                return None
            ledger.drop(found[0])
            return found[0]

        with self._lock:
            gone = self._write(work)
            if gone is not None:
                _log.warning("buffer_batch_corrupt", stream=gone.stream, epoch=gone.epoch, seq=gone.seq)
                self._evictions.note(Eviction(gone.stream, gone.epoch, seq, seq, gone.rows, "corrupt"))

    def _write(self, work: Callable[[Ledger], T]) -> T:
        """Do `work` durably, on a new file if the old one turns out to be damaged."""
        with self._lock:
            damages = self._damages
            try:
                return self._attempt(work)
            except CorruptFileError as error:
                self._heal(error, damages)
                return self._attempt(work)

    def _attempt(self, work: Callable[[Ledger], T]) -> T:
        if self._closed:
            raise BufferUnavailableError(f"buffer {self._db.path} is closed")

        def step(connection: Connection) -> tuple[T, Ledger]:
            ledger = Ledger(connection, self._lanes)
            result = work(ledger)
            ledger.settle()
            return result, ledger

        result, ledger = self._db.transaction(step)
        self._publish(ledger.lanes)
        self._db.fold(ledger.written_bytes)
        return result

    def _publish(self, lanes: Mapping[int, Lane]) -> None:
        """Show the lanes as they are now. Readers take whichever they find: no lock is held while a disk flushes."""
        self._lanes = lanes
        self._by_epoch = {(lane.stream, lane.epoch): lane for lane in lanes.values() if lane.shown}

    def _read(self, sql: str, parameters: Sequence[int]) -> tuple[Any, ...] | None:
        damages = self._damages
        if self._closed:
            raise BufferUnavailableError(f"buffer {self._db.path} is closed")
        try:
            return self._db.read(sql, parameters)
        except CorruptFileError as error:
            self._heal(error, damages)
            return None

    # Opening, and beginning anew

    def _open(self) -> Opened:
        try:
            self._db.open()
            self._publish(load(self._db.query))
            return self._claim()
        except CorruptFileError as error:
            return Opened(OpenedKind.CORRUPT_REPLACED, self._replace(error))

    def _claim(self) -> Opened:
        """Begin new epochs where the file was last used by another board."""
        owners = self._db.query("SELECT fingerprint FROM owner")
        held = f"{sum(lane.batches for lane in self._lanes.values())} batches held"
        if owners and owners[0][0] == self._fingerprint:
            return Opened(OpenedKind.RESUMED, held)
        self._attempt(self._take_over)
        if not owners:
            return Opened(OpenedKind.NEW, "there was none")
        return Opened(OpenedKind.CLONED, f"the files were made on other hardware; {held}, to be drained")

    def _take_over(self, ledger: Ledger) -> None:
        for lane in list(ledger.lanes.values()):
            if lane.live and (known := ledger.find_live(lane.stream)):
                ledger.retire(known)
        ledger.own(self._fingerprint)

    def _heal(self, error: CorruptFileError, damages: int) -> None:
        """Replace a file found damaged while in use, unless another thread just did."""
        with self._lock:
            if self._damages == damages and not self._closed:
                self.opened = Opened(OpenedKind.CORRUPT_REPLACED, self._replace(error))
                _log.warning("buffer_replaced", path=str(self._db.path), detail=self.opened.detail)

    def _replace(self, error: CorruptFileError) -> str:
        self._damages += 1
        before = [lane for lane in self._lanes.values() if lane.shown]
        known = [LaneRow(lane.base, lane.stream, lane.epoch, True, lane.last_seq, lane.acked) for lane in before]
        copied = 0

        def rescue(old: Connection, new: Connection) -> None:
            nonlocal copied
            copied = salvage(old, new, known, self._progress)

        aside = self._db.replace(rescue)
        self._publish(load(self._db.query))
        self._attempt(self._take_over)
        self._note_losses(before)
        return f"{error}; moved to {aside.name}; {copied} batches of it were saved and will be sent"

    def _note_losses(self, before: Sequence[Lane]) -> None:
        for lane in before:
            now = self._by_epoch.get((lane.stream, lane.epoch), replace(lane, rows=0, batches=0))
            if lane.floor is not None and now.batches < lane.batches:
                rows = lane.rows - now.rows
                self._evictions.note(Eviction(lane.stream, lane.epoch, lane.floor, lane.last_seq, rows, "corrupt"))
