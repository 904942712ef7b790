"""What the buffer needs of SQLite, and what SQLite's errors mean for it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from contract.errors import HeadwaterError
from edge_agent.buffer.port import BufferUnavailableError

BUSY_TIMEOUT_S = 5.0
PAGE_BYTES = 512
"""The smallest. A commit writes whole pages, and small ones make a small batch cost a card few bytes."""


class Cursor(Protocol):
    """What is used of `sqlite3.Cursor`."""

    @property
    def rowcount(self) -> int:
        """Rows changed by the statement."""

    def fetchone(self) -> Any:
        """The next row, a tuple, or None."""

    def fetchall(self) -> list[Any]:
        """All rows."""


class Connection(Protocol):
    """What is used of `sqlite3.Connection`; tests hand in one whose disk they control."""

    @property
    def in_transaction(self) -> bool:
        """Whether BEGIN was executed and neither COMMIT nor ROLLBACK."""

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """Run one statement."""

    def close(self) -> None:
        """Close the file."""


Connect = Callable[[Path], Connection]


def connect(path: Path) -> Connection:
    """Open or create the file with the standard library; transactions are begun and ended by hand."""
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


class CorruptFileError(HeadwaterError):
    """The file is damaged or no database. Call `Database.replace`: it moves the file aside and begins a new one."""


class DiskFullError(BufferUnavailableError):
    """The disk is full."""


def translated(error: sqlite3.Error, path: Path) -> HeadwaterError | None:
    """What an SQLite error means here; None where it is a mistake in the program."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return None
    name, primary = getattr(error, "sqlite_errorname", code), code & 0xFF
    what = f"buffer {path}: {error} ({name})"
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return CorruptFileError(f"{what}; the file is damaged, begin a new one")
    if primary == sqlite3.SQLITE_FULL:
        return DiskFullError(f"{what}; free space on this disk, or lower the buffer's bytes_max")
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_AUTH):
        return BufferUnavailableError(
            f"{what}; the agent cannot write there: mount the disk for writing (a card that turned read-only is "
            "usually worn out), and let the agent's user own the folder"
        )
    if primary in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL):
        return BufferUnavailableError(f"{what}; the disk or its connection fails: look into the kernel's log")
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return BufferUnavailableError(f"{what}; another program has the file open: leave it to the agent")
    return None
