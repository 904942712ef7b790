"""The data folder of a stack: who lives where in it, and the lock that keeps a second stack out."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from contract.errors import ConfigurationError
from headwater.stack.errors import FolderInUse


class DataFolder:
    """Everything that a stack keeps, under one path; locked while open.

    The lock belongs to the open file, so the kernel releases it however the process ends; a stale one cannot exist.

    Args:
        path: made if it does not exist.

    Raises:
        FolderInUse: when another stack holds the folder.
        ConfigurationError: when the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"data folder {self.path} cannot be used: {error}; choose another with --data"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._lock)
            raise FolderInUse(
                f"data folder {self.path} is in use by process {holder}; stop it, or choose another with --data"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode("ascii"), 0)

    @property
    def ports(self) -> Path:
        """The port book."""
        return self.path / "ports.json"

    def part(self, name: str) -> Path:
        """The folder of one part of the stack, such as `broker`; made if it does not exist.

        Raises:
            ConfigurationError: it cannot be made, or nothing may be written there.
        """
        folder = self.path / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"folder {folder} cannot be made: {error}; mend that, or choose another with --data"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            # As after a start by another user, root for one.
            raise ConfigurationError(
                f"folder {folder} cannot be written; give it to this user, or choose another with --data"
            )
        return folder

    def log(self, name: str) -> Path:
        """The log file of one child."""
        return self.part("logs") / f"{name}.log"

    def close(self) -> None:
        """Let the next stack in. Closing twice is allowed."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def is_held(path: Path) -> bool:
    """Whether a stack holds the folder now. Looks only; who wants the folder opens it."""
    try:
        with (path / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
