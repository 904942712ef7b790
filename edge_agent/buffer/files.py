"""The files around the database: the lock, the reserve for a full disk, and what was moved aside."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from contract.errors import ConfigurationError
from edge_agent.buffer.port import BufferUnavailableError

SUFFIXES = ("", "-wal", "-shm")
"""The database, its write-ahead log, and the index of the log."""
KEPT_CORRUPT_MAX = 2
"""Files moved aside because they could not be read. Each may be as large as the buffer's cap."""


class Reserve:
    """Blocks of the disk kept back, so that acknowledgements can be written when the disk is full."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._path = path
        self._held = size_of(path) >= bytes_max

    def take(self) -> bool:
        """Hold it; False while there is no room."""
        if self._held:
            return True
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(handle, 0, self.bytes_max)
            finally:
                os.close(handle)
        except OSError:
            self.give_up()
            return False
        self._held = True
        return True

    def give_up(self) -> bool:
        """Free the blocks; False where none were held."""
        held = self._held or size_of(self._path) > 0
        self._held = False
        try:
            self._path.unlink(missing_ok=True)
        except OSError:
            return False
        return held


def locked(path: Path) -> int:
    """Take the lock that keeps a second agent from the same buffer; it ends with the process."""
    try:
        # One folder and no more: a longer path that is not there is a mistake, or a disk that is not mounted.
        path.parent.mkdir(exist_ok=True)
        handle = os.open(beside(path, "-lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise ConfigurationError(
            f"[buffer] path = {str(path)!r}: {path.parent.parent} is no folder that is there ({error.strerror}); mount "
            "the disk, make the folder, or choose another path"
        ) from error
    except OSError as error:
        raise BufferUnavailableError(
            f"buffer {path}: {error}; the agent cannot write there: mount the disk for writing, free space, and let "
            "the agent's user own the folder"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ConfigurationError(
            f"buffer {path} is open in another process; stop that agent, or give this one a path of its own"
        ) from error
    return handle


def move_aside(path: Path) -> Path:
    """Give a database and what belongs to it another name, and delete the oldest that were moved so before.

    The database goes first: its log alone is nothing, but a database without its log would look sound and be too old.
    """
    kept = sorted(
        (int(number), file)
        for file in path.parent.glob(f"{path.name}.corrupt-*")
        if (number := file.name.removeprefix(f"{path.name}.corrupt-")).isdigit()
    )
    target = beside(path, f".corrupt-{kept[-1][0] + 1 if kept else 1}")
    for suffix in SUFFIXES:
        if beside(path, suffix).exists():
            beside(path, suffix).rename(beside(target, suffix))
    for _, old in kept[: max(0, len(kept) + 1 - KEPT_CORRUPT_MAX)]:
        for suffix in SUFFIXES:
            beside(old, suffix).unlink(missing_ok=True)
    sync_folder(path.parent)
    return target


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def beside(path: Path, suffix: str) -> Path:
    """The file that belongs to `path`."""
    return path.with_name(path.name + suffix)


def size_of(path: Path) -> int:
    """Bytes in a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
