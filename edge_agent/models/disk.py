"""The few acts by which the release store changes a disk; tests cut the power between any two of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from edge_agent.buffer.files import sync_folder


class Disk(Protocol):
    """All raise OSError."""

    def make_folder(self, folder: Path) -> None:
        """Make a folder and its parents, where they are missing."""

    def write(self, path: Path, data: bytes) -> None:
        """Make or replace a file, and wait until the disk has its content. Its name may still be lost."""

    def sync_file(self, path: Path) -> None:
        """Wait until the disk has the content of a file that is there."""

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, replacing what had it."""

    def sync_folder(self, folder: Path) -> None:
        """Wait until the disk has the names in a folder."""

    def unlink(self, path: Path) -> None:
        """Remove a file, if it is there."""


class LocalDisk:
    """The file system of this device."""

    def make_folder(self, folder: Path) -> None:
        """See `Disk.make_folder`."""
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """See `Disk.write`."""
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def sync_file(self, path: Path) -> None:
        """See `Disk.sync_file`."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """See `Disk.rename`."""
        source.replace(target)

    def sync_folder(self, folder: Path) -> None:
        """See `Disk.sync_folder`."""
        sync_folder(folder)

    def unlink(self, path: Path) -> None:
        """See `Disk.unlink`."""
        path.unlink(missing_ok=True)
