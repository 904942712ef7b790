"""Log files that cannot fill a disk: a fixed number of files of a fixed size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TAIL_BYTES_MAX = 4096


class RotatingLog:
    """Appends bytes to `path`; when it is full, `path` becomes `path.1`, `path.1` becomes `path.2`, and so on.

    At most `file_bytes_max * files_max` bytes are kept. A full or broken disk never stops the process whose output this
    is: what cannot be written is counted, and the count is written as soon as writing works again.

    Args:
        path: the newest file; its folder must exist.
        file_bytes_max: size of one file.
        files_max: how many, at least 1.
        opened: how a file is opened for appending; tests hand in one that fails.
    """

    def __init__(
        self,
        path: Path,
        *,
        file_bytes_max: int = 4 * 1024 * 1024,
        files_max: int = 3,
        opened: Callable[[Path], BinaryIO] = lambda path: path.open("ab", buffering=0),
    ) -> None:
        self.path = path
        self.bytes_lost_total = 0
        self._file_bytes_max = file_bytes_max
        self._files_max = files_max
        self._opened = opened
        self._file: BinaryIO | None = None
        self._size = 0
        self._bytes_lost = 0

    def write(self, data: bytes) -> None:
        """Append `data`, in as many files as it takes."""
        for start in range(0, len(data), self._file_bytes_max):
            self._write(data[start : start + self._file_bytes_max])

    def tail(self) -> str:
        """The last lines of the newest file, at most TAIL_BYTES_MAX, for a person to read."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - TAIL_BYTES_MAX))
                return file.read(TAIL_BYTES_MAX).decode("utf-8", "replace").strip()
        except OSError as error:
            return f"(log {self.path} cannot be read: {error})"

    def close(self) -> None:
        """Close the file. A later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, data: bytes) -> None:
        try:
            file = self._room_for(len(data))
            if self._bytes_lost:
                note = f"[{self._bytes_lost} bytes of output could not be written here]\n".encode("ascii")
                self._size += file.write(note)
                self._bytes_lost = 0
            written = file.write(data)
            self._size += written
            lost = len(data) - written
        except OSError:
            self.close()
            lost = len(data)
        self._bytes_lost += lost
        self.bytes_lost_total += lost

    def _room_for(self, size: int) -> BinaryIO:
        if self._file is None:
            self._file = self._opened(self.path)
            self._size = self.path.stat().st_size
        if self._size and self._size + size > self._file_bytes_max:
            self.close()
            for number in range(self._files_max - 1, 0, -1):
                older = self._numbered(number)
                if (newer := self._numbered(number - 1)).exists():
                    newer.replace(older)
            if self._files_max == 1:
                self.path.unlink()
            self._file = self._opened(self.path)
            self._size = 0
        return self._file

    def _numbered(self, number: int) -> Path:
        return self.path if number == 0 else self.path.with_name(f"{self.path.name}.{number}")
