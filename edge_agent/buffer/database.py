"""One SQLite file as a durable store: opening, transactions, errors, room on a full disk, files that cannot be read.

What is stored in it is `sqlite.py`'s matter. The choices below, and the measurements behind them, are in
docs/adr/0005-buffer.md.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog

from contract.errors import ConfigurationError, HeadwaterError
from edge_agent.buffer.connection import PAGE_BYTES, Connect, Connection, DiskFullError, translated
from edge_agent.buffer.files import SUFFIXES, Reserve, beside, locked, move_aside, size_of, sync_folder
from edge_agent.buffer.port import BufferUnavailableError

T = TypeVar("T")
Row = tuple[Any, ...]

APPLICATION_ID = 0x48574246  # "HWBF": tells this file from any other program's database
SCHEMA_VERSION = 1
MEMORY_CACHE_KIB = 512
RESERVE_MARGIN_BYTES = 256 * 1024
_STRETCHED = 8
"""The log may grow to this many times its usual size, for large batches and readers in the way; then appends wait."""

_SCHEMA = (
    # key = base of the lane + seq: a lane's batches lie side by side in the order of their seqs, and a lane can be cut
    # in two without moving a batch.
    "CREATE TABLE batches (key INTEGER PRIMARY KEY, rows INTEGER NOT NULL, wall_us INTEGER NOT NULL, "
    "monotonic_us INTEGER NOT NULL, synced INTEGER NOT NULL, boot BLOB NOT NULL, crc32 INTEGER NOT NULL, "
    "level INTEGER NOT NULL, body BLOB NOT NULL)",
    # last_seq lags behind while the batch with the highest seq is stored; it is written before that batch goes. acked
    # is written only where there is more to delete than one transaction should.
    "CREATE TABLE lanes (lane INTEGER PRIMARY KEY, base INTEGER NOT NULL, stream TEXT NOT NULL, epoch TEXT NOT NULL, "
    "live INTEGER NOT NULL, last_seq INTEGER NOT NULL, acked INTEGER NOT NULL DEFAULT 0)",
    "CREATE TABLE owner (fingerprint TEXT NOT NULL)",
)

_log = structlog.get_logger(__name__)


class Database:
    """The file, its one writing and its one reading connection. Not thread-safe but for `read`."""

    def __init__(self, path: Path, connect: Connect, wal_bytes_max: int) -> None:
        """Args: the file, what opens it, and how far its write-ahead log grows before it is folded into the file.

        Beside the file stand `-wal`, `-shm`, `-lock` and `-reserve`.
        """
        self.path = path
        self.created = False
        self._connect = connect
        self._wal_bytes_max = wal_bytes_max
        self._writer: Connection | None = None
        self._reader: Connection | None = None
        self._read_lock = threading.Lock()
        self._reserve = Reserve(beside(path, "-reserve"), wal_bytes_max + RESERVE_MARGIN_BYTES)
        self._lock: int | None = None
        self._logged_bytes = 0

    def open(self) -> None:
        """Open the file, and create it where there is none.

        Raises:
            BufferUnavailableError: the disk is full, read-only or failing.
            ConfigurationError: another process has the buffer, or the file is another program's.
            CorruptFileError: `replace` is the way on.
        """
        if self._lock is None:
            self._lock = locked(self.path)
        self._guarded(self._finish_replacement)
        self._reserve.take()
        try:
            self._guarded(self._open)
        except BufferUnavailableError:
            # On a full disk even opening needs a few blocks, for the log and its index.
            if not self._reserve.give_up():
                raise
            self._guarded(self._open)
        self._logged_bytes = self.log_bytes()

    def transaction(self, work: Callable[[Connection], T]) -> T:
        """Do `work` as one durable step: once this returns, power loss cannot take it; if it raises, nothing happened.

        On a full disk, work that does not make the file grow is done all the same: in the log's own blocks, or in those
        of the reserve. So acknowledgements always get through, and what they free can be filled again.

        Args:
            work: called within the transaction, perhaps several times, and rolled back all times but the last.

        Raises:
            BufferUnavailableError: the disk is full, read-only or failing.
            CorruptFileError: the file turned out to be damaged.
        """
        if self.log_bytes() > _STRETCHED * self._wal_bytes_max:
            # Folding it into the file has failed for a while. Without this it would grow without bound.
            self._checkpoint("RESTART")
        try:
            return self._once(work, may_grow=self._reserve.take())
        except DiskFullError:
            if self._grows(work):
                raise
        for make_do in (self._empty_log, self._use_reserve):
            if make_do():
                try:
                    return self._once(work, may_grow=False)
                except DiskFullError:
                    continue
        raise DiskFullError(f"buffer {self.path}: the disk is full to the last block; free space on this disk")

    def fold(self, written_bytes: int) -> None:
        """Note what was written, about, and fold the log into the file when it is time.

        Done here and not by SQLite in the middle of a commit, so that its failure is seen, and is not the commit's.
        """
        self._logged_bytes += written_bytes
        if self._logged_bytes >= self._wal_bytes_max:
            self._logged_bytes = 0 if self._empty_log("PASSIVE") else self._wal_bytes_max // 2

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Rows as the writing connection sees them, between transactions."""
        return self._guarded(lambda: self._writing().execute(sql, parameters).fetchall())

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> Row | None:
        """The first row, on a connection of its own: it neither waits for a transaction nor holds one up."""
        with self._read_lock:
            try:
                row: Row | None = self._guarded(lambda: self._reading().execute(sql, parameters).fetchone())
            except HeadwaterError:
                _close(self._reader, self.path)
                self._reader = None
                raise
            return row

    def upkeep(self) -> None:
        """Shrink a log that one large batch has stretched."""
        if self.log_bytes() > 2 * self._wal_bytes_max:
            self._empty_log()

    def log_bytes(self) -> int:
        """Size of the write-ahead log."""
        return size_of(beside(self.path, "-wal"))

    def file_bytes(self) -> int:
        """Everything on disk: the file, its log, the reserve."""
        return sum(size_of(beside(self.path, suffix)) for suffix in (*SUFFIXES, "-reserve"))

    def replace(self, salvage: Callable[[Connection, Connection], None]) -> Path:
        """Begin a new file in place of one that cannot be read; the old one is moved aside.

        Nothing is deleted but what was moved aside before, beyond the last `KEPT_CORRUPT_MAX`.

        Args:
            salvage: called with the old and the new file, to copy what can still be read.

        Returns:
            Where the old file is now.
        """
        fresh = beside(self.path, "-new")
        with self._read_lock:
            self.close_connections()

            def build() -> Path:
                for suffix in SUFFIXES:
                    beside(fresh, suffix).unlink(missing_ok=True)
                old, new = self._connect(self.path), self._configured(fresh)
                try:
                    self._create(new)
                    salvage(old, new)
                    new.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                finally:
                    _close(old, self.path)
                    new.close()
                aside = move_aside(self.path)
                self._finish_replacement()
                return aside

            aside = self._guarded(build)
        self.open()
        return aside

    def close(self) -> None:
        """Close the files; the log is folded into the file where possible."""
        with self._read_lock:
            self.close_connections()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def close_connections(self) -> None:
        """Close both connections; the next use opens them anew."""
        for connection in (self._reader, self._writer):
            _close(connection, self.path)
        self._reader = self._writer = None

    # Opening

    def _finish_replacement(self) -> None:
        """Put the new file in its place. A power loss may have come between moving the old one away and this."""
        fresh = beside(self.path, "-new")
        if not self.path.exists() and fresh.exists():
            # The log of the old file would be taken for the new one's.
            for suffix in ("-wal", "-shm"):
                beside(self.path, suffix).unlink(missing_ok=True)
            fresh.rename(self.path)
            sync_folder(self.path.parent)

    def _open(self) -> None:
        writer = self._writing()
        identity = (writer.execute("PRAGMA application_id").fetchone()[0], _user_version(writer))
        empty = writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if identity == (0, 0) and empty:
            self._create(writer)
            self.created = True
        elif identity[0] != APPLICATION_ID:
            raise ConfigurationError(f"{self.path} is another program's database; give the buffer a path of its own")
        elif identity[1] != SCHEMA_VERSION:
            raise ConfigurationError(
                f"buffer {self.path} has layout {identity[1]}, this agent knows {SCHEMA_VERSION}; let the version that "
                "wrote it drain it, or move it away"
            )
        # The names of the file and of its log must be as durable as what stands in them.
        sync_folder(self.path.parent)

    def _create(self, writer: Connection) -> None:
        writer.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            writer.execute(statement)
        writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        writer.execute("COMMIT")

    def _writing(self) -> Connection:
        if self._lock is None:
            raise BufferUnavailableError(f"buffer {self.path} is closed")
        if self._writer is None:
            self._writer = self._configured(self.path)
        return self._writer

    def _configured(self, path: Path) -> Connection:
        connection = self._connect(path)
        try:
            for pragma in (
                f"page_size = {PAGE_BYTES}",
                "synchronous = FULL",
                # Debian's SQLite overwrites what is deleted with zeros, which would double what a card has to bear.
                "secure_delete = OFF",
                "wal_autocheckpoint = 0",
                f"journal_size_limit = {2 * self._wal_bytes_max}",
                f"cache_size = -{MEMORY_CACHE_KIB}",
                "temp_store = MEMORY",
                "mmap_size = 0",
            ):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise ConfigurationError(
                    f"buffer {path}: this file system cannot hold a write-ahead log (journal mode stays {mode}); "
                    "put the buffer on a local disk with ext4, f2fs, xfs or btrfs"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _reading(self) -> Connection:
        if self._lock is None:
            raise BufferUnavailableError(f"buffer {self.path} is closed")
        if self._reader is None:
            connection = self._connect(self.path)
            connection.execute(f"PRAGMA cache_size = -{MEMORY_CACHE_KIB}").fetchall()
            connection.execute("PRAGMA query_only = ON").fetchall()
            self._reader = connection
        return self._reader

    # Transactions

    def _once(self, work: Callable[[Connection], T], *, may_grow: bool) -> T:
        def step() -> T:
            writer = self._writing()
            try:
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
                writer.execute("BEGIN IMMEDIATE")
                before = 0 if may_grow else _page_count(writer)
                result = work(writer)
                if not may_grow and _page_count(writer) > before:
                    raise DiskFullError(
                        f"buffer {self.path}: the disk is full, and so are the pages of the file; free space on this "
                        "disk, or lower the buffer's bytes_max"
                    )
                writer.execute("COMMIT")
                return result
            except BaseException:
                self._roll_back(writer)
                raise

        return self._guarded(step)

    def _roll_back(self, writer: Connection) -> None:
        """Undo. The connection stays, come what may: only it knows that a commit has failed.

        A new one would read the log again, in which the commit that failed may stand complete; its batches, appended
        once more by a caller who was told that they are not stored, would be stored twice.
        """
        try:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
        except sqlite3.Error as error:
            _log.warning("buffer_rollback_failed", path=str(self.path), error=str(error))

    def _guarded(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except sqlite3.Error as error:
            meaning = translated(error, self.path)
            if meaning is None:
                raise
            raise meaning from error
        except OSError as error:
            raise BufferUnavailableError(
                f"buffer {self.path}: {error}; look after the disk and the folder's rights"
            ) from error

    # Room

    def _empty_log(self, mode: str = "RESTART") -> bool:
        try:
            return self._checkpoint(mode)
        except BufferUnavailableError as error:
            _log.warning("buffer_checkpoint_failed", path=str(self.path), error=str(error))
            return False

    def _use_reserve(self) -> bool:
        if not self._reserve.give_up():
            return False
        _log.warning("buffer_reserve_used", path=str(self.path), reserve_bytes=self._reserve.bytes_max)
        self._empty_log()
        return True

    def _grows(self, work: Callable[[Connection], object]) -> bool:
        """Whether the work needs more pages than the file has; it is done for this, and undone."""

        def try_out(writer: Connection) -> None:
            before = _page_count(writer)
            work(writer)
            raise _TriedOut(_page_count(writer) > before)

        try:
            self._once(try_out, may_grow=True)
        except _TriedOut as outcome:
            return outcome.grows
        except DiskFullError:
            return True
        return False

    def _checkpoint(self, mode: str) -> bool:
        """Fold the log into the file, so that it begins anew at its start; False while a reader still needs it."""
        busy, logged, folded = self.query(f"PRAGMA wal_checkpoint({mode})")[0]
        return not busy and logged == folded


class _TriedOut(Exception):
    def __init__(self, grows: bool) -> None:
        super().__init__(grows)
        self.grows = grows


def _close(connection: Connection | None, path: Path) -> None:
    if connection is not None:
        try:
            connection.close()
        except sqlite3.Error as error:
            _log.warning("buffer_close_failed", path=str(path), error=str(error))


def _page_count(connection: Connection) -> int:
    return int(connection.execute("PRAGMA page_count").fetchone()[0])


def _user_version(connection: Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
