"""A disk that remembers every write, loses what was not flushed, and fails when told to.

SQLite's files go through a VFS that records (write, truncate, flush) per file, so that the disk's contents can be made
for a power cut after any of them. What was flushed is there. Of what was not, each sector of 512 bytes is there or not,
independently: writes may be lost, torn and reordered. Names of files count as flushed with the folder.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import apsw

SECTOR = 512


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: where faults are simulated, thousands of real flushes prove nothing."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        yield Path(name)


SUFFIXES = ("", "-wal", "-journal")


class Event(NamedTuple):
    """One thing that happened to a file."""

    kind: str
    """`write`, `truncate`, `sync`, `create`, `delete`."""
    file: str
    """The suffix of its name: nothing, `-wal` or `-journal`."""
    offset: int = 0
    data: bytes = b""


class Disk:
    """The recorder, and the switch that makes operations fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = []
        self.operations = 0
        self.fail_from: int | None = None
        """From this operation on every one fails with `error`."""
        self.error = apsw.SQLITE_FULL
        """SQLite's code for it."""
        self.on_sync: Callable[[], None] = lambda: None
        """Called before each flush: a slow card."""
        self.pragmas: dict[str, str] = {}
        """Replacements of statements: how a mutant is made."""
        self._lock = threading.Lock()
        self._vfs = _Vfs(f"disk-{id(self)}", self)

    def connect(self, path: Path) -> Any:
        """A connection as `edge_agent.buffer.connection.Connection` wants it, through this disk."""
        return _Connection(path, self._vfs.vfs_name, self.pragmas)

    def record(self, event: Event) -> None:
        """Note what is about to happen, or refuse it."""
        with self._lock:
            self.operations += 1
            if self.fail_from is not None and self.operations > self.fail_from:
                raise apsw.exception_for(self.error)
            self.events.append(event)

    def fail(self, error: int) -> None:
        """Let every operation fail from now on."""
        self.error, self.fail_from = error, self.operations

    def heal(self) -> None:
        """Let nothing fail any more."""
        self.fail_from = None

    def suffix(self, name: str) -> str:
        """The suffix of a file of the database."""
        return name.removeprefix(str(self.path))


def crashed(events: Sequence[Event], rng: random.Random | None, *, keep_unflushed: bool = False) -> dict[str, bytes]:
    """The files after a power cut behind these events.

    Args:
        events: everything up to the cut.
        rng: decides for every sector that was written and not flushed; without it all of them have one fate.
        keep_unflushed: that fate.
    """
    flushed: dict[str, bytearray] = {}
    unflushed: dict[str, list[Event]] = {}
    for event in events:
        if event.kind == "create":
            flushed.setdefault(event.file, bytearray())
        elif event.kind == "delete":
            flushed.pop(event.file, None)
            unflushed.pop(event.file, None)
        elif event.kind == "sync":
            for write in unflushed.pop(event.file, []):
                _apply(flushed[event.file], write)
        else:
            unflushed.setdefault(event.file, []).append(event)
    for file, writes in unflushed.items():
        for write in writes:
            for piece in _pieces(write):
                if keep_unflushed if rng is None else rng.random() < 0.5:
                    _apply(flushed[file], piece)
    return {file: bytes(content) for file, content in flushed.items()}


def _pieces(event: Event) -> Iterator[Event]:
    """The part of a write in each sector."""
    if event.kind != "write":
        yield event
        return
    at, end = event.offset, event.offset + len(event.data)
    while at < end:
        stop = min(end, (at // SECTOR + 1) * SECTOR)
        yield Event("write", event.file, at, event.data[at - event.offset : stop - event.offset])
        at = stop


def _apply(content: bytearray, event: Event) -> None:
    if event.kind == "truncate":
        del content[event.offset :]
        content.extend(bytes(event.offset - len(content)))
    else:
        content.extend(bytes(max(0, event.offset + len(event.data) - len(content))))
        content[event.offset : event.offset + len(event.data)] = event.data


class _Vfs(apsw.VFS):
    def __init__(self, name: str, disk: Disk) -> None:
        self.vfs_name, self._disk = name, disk
        super().__init__(name, base="")

    def excepthook(self, kind: Any, error: Any, trace: Any) -> bool:
        """A refusal that SQLite keeps to itself is no news."""
        return True

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        filename = name.filename() if isinstance(name, apsw.URIFilename) else name
        file = self._disk.suffix(filename)
        if file in SUFFIXES and not Path(filename).exists():
            self._disk.record(Event("create", file))
        return _File(name, flags, self._disk, file)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        file = self._disk.suffix(filename)
        if file in SUFFIXES:
            self._disk.record(Event("delete", file))
        super().xDelete(filename, syncdir)


class _File(apsw.VFSFile):
    def __init__(self, name: Any, flags: list[int], disk: Disk, file: str) -> None:
        self._disk, self._file = disk, file
        super().__init__("", name, flags)

    def excepthook(self, kind: Any, error: Any, trace: Any) -> bool:
        """A refusal that SQLite keeps to itself is no news."""
        return True

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._disk.record(Event("write", self._file, offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self._disk.record(Event("truncate", self._file, size))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._disk.record(Event("sync", self._file))
        self._disk.on_sync()
        super().xSync(flags)


class _Rows:
    def __init__(self, rows: list[Any], changes: int) -> None:
        self._rows, self.rowcount = rows, changes

    def fetchone(self) -> Any:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[Any]:
        return self._rows


class _Connection:
    """An apsw connection in the clothes of the standard library's."""

    def __init__(self, path: Path, vfs: str, pragmas: dict[str, str]) -> None:
        self._pragmas = pragmas
        self._connection = _translated(lambda: apsw.Connection(str(path), vfs=vfs))
        self._connection.set_busy_timeout(5_000)

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.in_transaction)

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> _Rows:
        sql = self._pragmas.get(sql, sql)
        rows = _translated(lambda: list(self._connection.execute(sql, tuple(parameters))))
        return _Rows(rows, self._connection.changes())

    def close(self) -> None:
        _translated(self._connection.close)


def _translated(action: Any) -> Any:
    try:
        return action()
    except apsw.Error as error:
        foreign = sqlite3.OperationalError(str(error))
        # Absent where it was raised by apsw itself.
        foreign.sqlite_errorcode = int(getattr(error, "extendedresult", apsw.SQLITE_ERROR))
        foreign.sqlite_errorname = type(error).__name__
        raise foreign from error
