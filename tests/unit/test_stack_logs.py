"""Logs keep the newest output within their bounds, and a broken disk stops nobody."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from hypothesis import given
from hypothesis import strategies as st

from headwater.stack.logs import TAIL_BYTES_MAX, RotatingLog


def kept(path: Path) -> bytes:
    """Everything kept, oldest first."""
    files = sorted(path.parent.glob(f"{path.name}.*"), key=lambda file: -int(file.suffix[1:]))
    return b"".join(file.read_bytes() for file in (*files, path) if file.exists())


@given(writes=st.lists(st.binary(max_size=50), max_size=60), files_max=st.integers(1, 4))
def test_the_newest_output_is_kept_within_the_bound(
    tmp_path_factory: object, writes: list[bytes], files_max: int
) -> None:
    """Mutants tried: rotation after the write instead of before; `files_max` counted without the newest file."""
    path = tmp_path_factory.mktemp("log") / "child.log"  # type: ignore[attr-defined]
    log = RotatingLog(path, file_bytes_max=32, files_max=files_max)
    for data in writes:
        log.write(data)
    log.close()
    everything = b"".join(writes)
    content = kept(path)
    assert everything.endswith(content)
    assert len(content) <= 32 * files_max
    assert len(list(path.parent.iterdir())) <= files_max
    if len(everything) <= 32:
        assert content == everything


def test_output_is_appended_over_restarts(tmp_path: Path) -> None:
    for word in (b"one\n", b"two\n"):
        log = RotatingLog(tmp_path / "child.log")
        log.write(word)
        log.close()
    assert (tmp_path / "child.log").read_bytes() == b"one\ntwo\n"


def test_the_tail_is_what_a_person_reads_first(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "child.log")
    assert "cannot be read" in log.tail()
    log.write(b"x" * 10_000 + b"\nlast words \xff\n")
    assert log.tail().endswith("\nlast words �")
    assert len(log.tail()) <= TAIL_BYTES_MAX


class FullDisk(io.RawIOBase):
    """Refuses to write while `full`."""

    full = True

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: object) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        self.written += bytes(data)  # type: ignore[call-overload]
        return len(bytes(data))  # type: ignore[call-overload]


def test_what_a_full_disk_refused_is_counted_and_said(tmp_path: Path) -> None:
    disk = FullDisk()
    (tmp_path / "child.log").write_bytes(b"")

    def opened(path: Path) -> BinaryIO:
        return disk  # type: ignore[return-value]

    log = RotatingLog(tmp_path / "child.log", opened=opened)
    log.write(b"lost")
    disk.full = False
    log.write(b"kept\n")
    assert disk.written == b"[4 bytes of output could not be written here]\nkept\n"
    assert log.bytes_lost_total == 4
