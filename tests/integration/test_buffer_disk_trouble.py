"""A full, read-only or failing disk: the buffer says so, stores nothing by halves, and works again when the disk does.

The real disks are a tmpfs and an ext4 image of a few megabytes; mounting them needs root. Without it those tests are
skipped, and say so; the injected faults cover the same ground.

Mutants tried, each made a test here fail: no reserve; the reserve given up for an append that makes the file grow; a
file that grows without a reserve; no second attempt at opening; in-memory counts
changed before the commit.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from contract.errors import ConfigurationError, TemporaryError
from edge_agent.buffer.port import BufferUnavailableError, OpenedKind
from edge_agent.buffer.sqlite import SqliteBuffer
from tests.contract.buffer_suite import PLENTY, ROOMY, Hands, held
from tests.integration.buffer_disk import Disk, memory_folder
from tests.integration.small_disks import mounted, or_skip, unmounted

MIB = 1024 * 1024
EXT4_IOC_SHUTDOWN = 0x8004587D  # from the next moment on the file system answers EIO
CODES = [apsw.SQLITE_FULL, apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_READONLY, apsw.SQLITE_CANTOPEN]


def buffer_at(path: Path, **options: object) -> SqliteBuffer:
    return SqliteBuffer(path, {"a": ROOMY}, PLENTY, Hands(), "board", **options)  # type: ignore[arg-type]


# Injected faults


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def body(seq: int) -> bytes:
    return seq.to_bytes(2, "big") * 700


def life(buffer: SqliteBuffer, disk: Disk) -> tuple[int, int]:
    """Appends and acknowledgements; at the first refusal the disk heals. Returns seqs appended and acknowledged."""
    appended = acknowledged = 0
    clock = Hands()
    while appended < 14:
        try:
            outcome = buffer.append("a", body(appended + 1), 1, clock())
            assert outcome.stored
            appended += 1
            assert outcome.seq == appended, "a refused append must not use up a number, nor store anything"
        except BufferUnavailableError as error:
            assert disk.fail_from is not None, error
            disk.heal()
            assert held(buffer, "a", buffer.lanes()[0].epoch if appended else "") == list(
                range(acknowledged + 1, appended + 1)
            )
            continue
        if appended % 5 == 0:
            buffer.acknowledge("a", outcome.epoch, appended - 2)
            acknowledged = appended - 2
            clock.pass_s(6)
        if appended % 4 == 0:
            try:
                buffer.maintain()
            except BufferUnavailableError:
                disk.heal()
    return appended, acknowledged


@pytest.mark.parametrize(
    "error", CODES, ids=lambda code: apsw.mapping_result_codes.get(code) or apsw.mapping_extended_result_codes[code]
)
def test_a_disk_that_fails_at_any_operation_loses_nothing_and_serves_again(folder: Path, error: int) -> None:
    (folder / "whole").mkdir()
    disk = Disk(folder / "whole" / "buffer.db")
    buffer = buffer_at(disk.path, connect=disk.connect, wal_bytes_max=6_000)
    opened_after = disk.operations
    life(buffer, disk)
    buffer.close()
    operations = disk.operations
    assert operations > 200
    for first in range(opened_after, operations, 3):
        (folder / str(first)).mkdir()
        disk = Disk(folder / str(first) / "buffer.db")
        buffer = buffer_at(disk.path, connect=disk.connect, wal_bytes_max=6_000)
        disk.error, disk.fail_from = error, first
        appended, acknowledged = life(buffer, disk)
        epoch = buffer.lanes()[0].epoch
        assert held(buffer, "a", epoch) == list(range(acknowledged + 1, appended + 1))
        disk.heal()
        buffer.close()
        again = buffer_at(disk.path)
        assert again.opened.kind is OpenedKind.RESUMED
        assert held(again, "a", epoch) == list(range(acknowledged + 1, appended + 1))
        assert [again.body("a", epoch, seq) for seq in held(again, "a", epoch)] == [
            body(seq) for seq in range(acknowledged + 1, appended + 1)
        ]
        again.close()


def test_a_refusal_says_what_to_do(folder: Path) -> None:
    disk = Disk(folder / "buffer.db")
    buffer = buffer_at(disk.path, connect=disk.connect)
    for error, remedy in (
        (apsw.SQLITE_FULL, "free space on this disk"),
        (apsw.SQLITE_READONLY, "mount the disk for writing"),
        (apsw.SQLITE_IOERR_WRITE, "kernel's log"),
    ):
        disk.fail(error)
        with pytest.raises(BufferUnavailableError, match=remedy) as caught:
            buffer.append("a", b"body", 1, Hands()())
        assert isinstance(caught.value, TemporaryError)
        assert str(disk.path) in str(caught.value)
        disk.heal()
    assert buffer.append("a", b"body", 1, Hands()()).seq == 1
    buffer.close()
    with pytest.raises(BufferUnavailableError, match="closed"):
        buffer.append("a", b"body", 1, Hands()())


def test_of_batches_that_go_in_together_a_failing_disk_takes_all_or_none(folder: Path) -> None:
    from edge_agent.buffer.port import NewBatch

    disk = Disk(folder / "buffer.db")
    buffer = buffer_at(disk.path, connect=disk.connect)
    new = [NewBatch(stream, body(1), 1, Hands()()) for stream in "abc"]
    buffer.append_many(new)
    start = disk.operations
    buffer.append_many(new)
    for operation in range(start, disk.operations):
        disk.error, disk.fail_from = apsw.SQLITE_IOERR_FSYNC, disk.operations + operation - start
        before = [info.last_seq for info in buffer.lanes()]
        try:
            buffer.append_many(new)
            expected = [seq + 1 for seq in before]
        except BufferUnavailableError:
            expected = before
        disk.heal()
        assert [info.last_seq for info in buffer.lanes()] == expected
    buffer.close()


# Real disks


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    where = tmp_path / "small"
    mounted(["-t", "tmpfs", "-o", "size=8m", "tmpfs"], where)
    try:
        yield where
    finally:
        unmounted(where)


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of 24 MiB."""
    image, where = tmp_path / "image", tmp_path / "card"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    or_skip(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)])
    mounted(["-o", "loop", str(image)], where)
    try:
        yield where
    finally:
        unmounted(where)


def fill(folder: Path) -> Path:
    """Another program takes every free block."""
    path = folder / "somebody-elses.log"
    with path.open("ab", buffering=0) as file:
        for size in (MIB, 4096, 512):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return path


def append_until_refused(buffer: SqliteBuffer, size: int = 13_000) -> int:
    count = 0
    with pytest.raises(BufferUnavailableError, match="free space on this disk"):
        while count < 10_000:
            buffer.append("a", os.urandom(size), 1, Hands()())
            count += 1
    return count


@pytest.mark.parametrize("disk", ["small", "card"])
def test_on_a_full_disk_acknowledging_works_and_makes_room(disk: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(disk)
    path = folder / "buffer" / "buffer.db"
    buffer = buffer_at(path)
    append_until_refused(buffer)
    fill(folder)
    (info,) = buffer.lanes()
    assert held(buffer, "a", info.epoch) == list(range(1, info.last_seq + 1))
    assert append_until_refused(buffer) == 0
    assert path.with_name("buffer.db-reserve").exists(), "what makes the file grow must not eat the reserve"
    # What is acknowledged is deleted for good, although not one block is free.
    for seq in range(1, info.last_seq - 9):
        buffer.acknowledge("a", info.epoch, seq)
    buffer.maintain()
    later = [buffer.append("a", os.urandom(13_000), 1, Hands()()).seq for _ in range(50)]
    assert later == list(range(info.last_seq + 1, info.last_seq + 51)), "the freed pages should have taken these"
    buffer.close()
    again = buffer_at(path)
    assert again.opened.kind is OpenedKind.RESUMED
    assert held(again, "a", info.epoch) == list(range(info.last_seq - 9, info.last_seq + 51))
    again.acknowledge("a", info.epoch, info.last_seq + 50)
    assert again.append("a", b"next", 1, Hands()()).seq == info.last_seq + 51
    again.close()


def test_a_device_that_is_online_works_on_while_another_program_fills_the_disk(small: Path) -> None:
    def online(count: int) -> int:
        for _ in range(count):
            outcome = buffer.append("a", os.urandom(13_000), 1, Hands()())
            buffer.acknowledge("a", outcome.epoch, outcome.seq)
        return outcome.seq

    buffer = buffer_at(small / "buffer.db")
    online(100)
    buffer.close()
    buffer = buffer_at(small / "buffer.db")
    online(20)
    fill(small)
    assert online(300) == 420
    assert (small / "buffer.db-reserve").exists(), "the log's own blocks are enough for this"
    buffer.close()


def test_when_space_returns_the_buffer_grows_again_and_takes_its_reserve_back(small: Path) -> None:
    path = small / "buffer.db"
    reserve = small / "buffer.db-reserve"
    buffer = buffer_at(path)
    reserved = reserve.stat().st_size
    foreign = fill(small)
    refused_after = append_until_refused(buffer)
    (info,) = buffer.lanes() or (None,)
    if info is not None:
        buffer.acknowledge("a", info.epoch, info.last_seq)
        buffer.maintain()
    foreign.unlink()
    for _ in range(100):
        buffer.append("a", os.urandom(13_000), 1, Hands()())
    assert reserve.stat().st_size == reserved
    assert buffer.lanes()[0].last_seq == refused_after + 100
    buffer.close()


def test_a_full_buffer_can_be_opened_and_drained_on_a_full_disk(small: Path) -> None:
    path = small / "buffer.db"
    buffer = buffer_at(path)
    count = append_until_refused(buffer)
    buffer.close()
    fill(small)
    again = buffer_at(path)
    (info,) = again.lanes()
    assert held(again, "a", info.epoch) == list(range(1, count + 1))
    for seq in range(1, count + 1):
        assert again.body("a", info.epoch, seq) is not None
        again.acknowledge("a", info.epoch, seq)
    again.maintain()
    assert again.append("a", os.urandom(13_000), 1, Hands()()).seq == count + 1
    again.close()
    once_more = buffer_at(path)
    assert held(once_more, "a", info.epoch) == [count + 1]
    once_more.close()


def test_a_disk_that_filled_up_meanwhile_can_be_opened_and_its_last_blocks_serve_acknowledgements(small: Path) -> None:
    path = small / "buffer.db"
    buffer = buffer_at(path)
    for _ in range(100):
        buffer.append("a", os.urandom(13_000), 1, Hands()())
    buffer.close()
    assert not path.with_name("buffer.db-wal").exists()
    fill(small)
    again = buffer_at(path)
    assert not path.with_name("buffer.db-reserve").exists(), "opening took it: there was no block left"
    assert append_until_refused(again) == 0, "the last blocks are for acknowledgements"
    (info,) = again.lanes()
    again.acknowledge("a", info.epoch, 90)
    for seq in range(101, 180):
        assert again.append("a", os.urandom(13_000), 1, Hands()()).seq == seq
    assert append_until_refused(again) < 30
    again.close()
    once_more = buffer_at(path)
    assert held(once_more, "a", info.epoch)[0] == 91
    once_more.close()


def test_a_read_only_disk_is_refused_at_opening_and_served_when_it_is_writable_again(small: Path) -> None:
    path = small / "buffer.db"
    buffer = buffer_at(path)
    epoch = buffer.append("a", b"before", 1, Hands()()).epoch
    buffer.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True, capture_output=True)
    with pytest.raises(BufferUnavailableError, match="mount the disk for writing"):
        buffer_at(path)
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True, capture_output=True)
    buffer = buffer_at(path)
    assert buffer.opened.kind is OpenedKind.RESUMED
    assert buffer.body("a", epoch, 1) == b"before"
    assert buffer.append("a", b"after", 1, Hands()())[:2] == (epoch, 2)
    buffer.close()


def test_a_disk_that_dies_in_use_is_reported_and_keeps_what_it_had(tmp_path: Path, card: Path) -> None:
    path = card / "buffer.db"
    buffer = buffer_at(path)
    epoch = [buffer.append("a", body(n), 1, Hands()()).epoch for n in range(1, 6)].pop()
    handle = os.open(card, os.O_RDONLY)
    fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", 1))
    os.close(handle)
    for _ in range(3):
        with pytest.raises(BufferUnavailableError):
            buffer.append("a", b"lost to nobody", 1, Hands()())
    buffer.close()
    unmounted(card)
    mounted(["-o", "loop", str(tmp_path / "image")], card)
    again = buffer_at(path)
    assert [again.body("a", epoch, seq) for seq in range(1, 6)] == [body(seq) for seq in range(1, 6)]
    assert again.append("a", b"after", 1, Hands()()).seq == 6
    again.close()


def test_a_second_process_cannot_open_the_same_buffer(tmp_path: Path) -> None:
    first = buffer_at(tmp_path / "buffer.db")
    with pytest.raises(ConfigurationError, match="open in another process"):
        buffer_at(tmp_path / "buffer.db")
    first.close()
    buffer_at(tmp_path / "buffer.db").close()
