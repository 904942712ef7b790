"""Files in the work folder: drafts that become whole in one act, or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contract.errors import ConfigurationError, TemporaryError
from trainer.errors import DiskFullError


def draft_folder(path: Path) -> None:
    """An empty folder, in the place of what a killed process may have left.

    Raises:
        OSError: the disk refused.
    """
    remove(path)
    path.mkdir(parents=True)


def publish(draft: Path, place: Path) -> None:
    """Put a folder in its place; what stood there is gone. Afterwards the disk has it.

    Raises:
        OSError: the disk refused.
    """
    for path in sorted(draft.rglob("*")):
        _fsync(path)
    _fsync(draft)
    remove(place)
    draft.rename(place)
    _fsync(place.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder; one that is not there is no error.

    Raises:
        OSError: the disk refused.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file, or leave the old one; afterwards the disk has it.

    Raises:
        OSError: the disk refused.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    draft.replace(path)
    _fsync(path.parent)


def hashed_files(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and size in bytes of every file below a folder, by relative path.

    Raises:
        OSError: one cannot be read.
    """
    return {
        path.relative_to(folder).as_posix(): (_sha256(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that works in a folder, which is made where it is not there. Ends with the process.

    Raises:
        TemporaryError: another one does.
        ConfigurationError: its file system has no locks.
        DiskFullError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DiskFullError(f"{folder} cannot be made ({error}); choose another --work") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TemporaryError(
                f"another training works in {folder}; wait until it ends, or choose another --work"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"{folder} cannot be locked ({error}), so two trainings could meet there; choose a --work on a file "
                "system with locks"
            ) from error
        yield
    finally:
        os.close(handle)
