"""What `append` returned, power loss cannot take.

The buffer runs over a disk that records every write (`buffer_disk`). For a power cut after every single one of them the
disk's contents are made, with unflushed sectors kept, lost, or mixed, and the buffer is opened on them again, by the
standard library's SQLite.

Mutants tried, each made a test here fail: `synchronous` OFF and NORMAL (kept as tests below); `Ledger.settle` doing
nothing, so that numbers of deleted batches are given again (kept below); the deletion of acknowledged batches and the
new `last_seq` in two transactions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edge_agent.buffer.ledger import Ledger
from edge_agent.buffer.port import LaneInfo, NewBatch, OpenedKind, StreamCaps, WhenFull
from edge_agent.buffer.sqlite import SqliteBuffer
from tests.contract.buffer_suite import Hands, body_of
from tests.integration.buffer_disk import SUFFIXES, Disk, crashed, memory_folder

CAPS = {
    "a": StreamCaps(bytes_max=9_000, age_max_s=1e9),
    "b": StreamCaps(bytes_max=12_000, age_max_s=1e9, when_full=WhenFull.THIN, thin_keep_every=3),
    "c": StreamCaps(bytes_max=4_000, age_max_s=1e9, when_full=WhenFull.DROP_NEWEST),
}
BYTES_MAX = 22_000
Key = tuple[str, str, int]


class Known(NamedTuple):
    """What the buffer promised when an operation had returned."""

    events: int
    held: dict[Key, bytes]
    last_seqs: dict[tuple[str, str], int]
    live: dict[str, str]


class Promises(NamedTuple):
    """A recorded run."""

    disk: Disk
    known: list[Known]
    acknowledged: set[Key]


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def buffer_at(path: Path, now: Hands | None = None, **options: object) -> SqliteBuffer:
    return SqliteBuffer(path, CAPS, BYTES_MAX, now or Hands(), "board", **options)  # type: ignore[arg-type]


def look(buffer: SqliteBuffer, events: int) -> Known:
    held: dict[Key, bytes] = {}
    for info in buffer.lanes():
        after = 0
        while (batch := buffer.peek(info.stream, info.epoch, after)) is not None:
            body = buffer.body(info.stream, info.epoch, batch.seq)
            assert body is not None
            held[info.stream, info.epoch, batch.seq] = body
            after = batch.seq
    lanes = buffer.lanes()
    return Known(
        events,
        held,
        {(info.stream, info.epoch): info.last_seq for info in lanes},
        {info.stream: info.epoch for info in lanes if info.live},
    )


def run(folder: Path, operations: int, seed: int, statements: dict[str, str]) -> Promises:
    """A device's life: batches of all sizes, acknowledgements, new epochs, a full buffer, a clean restart."""
    rng, now = random.Random(seed), Hands()
    path = folder / "recorded.db"
    disk = Disk(path)
    disk.pragmas.update(statements)
    promises = Promises(disk, [Known(0, {}, {}, {})], set())
    buffer = buffer_at(path, now, connect=disk.connect, wal_bytes_max=8 * 1024)

    def append() -> None:
        rows = rng.choice([2, 20, 150])
        buffer.append(rng.choice("aabbc"), body_of(rows, rng.randrange(1000)), rows, now())

    def append_many() -> None:
        bodies = [(stream, body_of(9, rng.randrange(1000))) for stream in "abc"]
        buffer.append_many([NewBatch(stream, body, 9, now()) for stream, body in bodies])

    def acknowledge() -> None:
        info = rng.choice(buffer.lanes())
        acknowledge_up_to(info, rng.choice([info.last_seq, rng.randint(0, info.last_seq)]))

    def acknowledge_everything() -> None:
        for info in buffer.lanes():
            acknowledge_up_to(info, info.last_seq)

    def acknowledge_up_to(info: LaneInfo, seq: int) -> None:
        for known in promises.known[-1].held:
            if known[:2] == (info.stream, info.epoch) and known[2] <= seq:
                promises.acknowledged.add(known)
        buffer.acknowledge(info.stream, info.epoch, seq)

    def open_epoch() -> None:
        info = rng.choice([info for info in buffer.lanes() if info.live])
        buffer.open_epoch(info.stream, move_after_seq=rng.choice([None, info.last_seq - 1]))

    def restart() -> None:
        nonlocal buffer
        buffer.close()
        buffer = buffer_at(path, now, connect=disk.connect, wal_bytes_max=8 * 1024)

    def maintain() -> None:
        now.pass_s(6)
        buffer.maintain()

    choices: list[Callable[[], None]] = [append] * 8 + [append_many, acknowledge, acknowledge, maintain, open_epoch]
    drawn = [rng.choice(choices) for _ in range(operations)]
    script = [append, append_many, *drawn, acknowledge_everything, maintain, restart, append, acknowledge, append]
    for operation in script:
        operation()
        promises.known.append(look(buffer, len(disk.events)))
    buffer.close()
    return promises


def violation(promises: Promises, folder: Path, cut: int, files: dict[str, bytes]) -> str | None:
    """What is wrong with the disk's contents, if anything."""
    path = folder / "crashed.db"
    for leftover in folder.glob("crashed.db*"):
        leftover.unlink()
    for file, content in files.items():
        path.with_name(path.name + file).write_bytes(content)
    done = max(number for number, known in enumerate(promises.known) if known.events <= cut)
    before = promises.known[done]
    after = promises.known[min(done + 1, len(promises.known) - 1)]
    buffer = buffer_at(path)
    try:
        if buffer.opened.kind is OpenedKind.CORRUPT_REPLACED:
            return f"the file was found damaged: {buffer.opened.detail}"
        found = look(buffer, 0)
        for key, body in before.held.items():
            if key in after.held and found.held.get(key) not in (body, after.held[key]):
                return f"{key} had been accepted, and is gone or changed"
        for key, body in found.held.items():
            versions = [known.held[key] for known in promises.known[: done + 2] if key in known.held]
            if body not in versions:
                return f"{key} holds what was never stored"
            if key not in before.held and key not in after.held and key not in promises.acknowledged:
                return f"{key} had been given up, and is back"
        for stream in CAPS:
            epoch, seq, _, _ = buffer.append(stream, b"later", 1, Hands()())
            if epoch in (before.live.get(stream), after.live.get(stream)):
                if seq <= before.last_seqs.get((stream, epoch), 0):
                    return f"{stream} {epoch}: number {seq} is given a second time"
            elif before.live.get(stream) == after.live.get(stream) and stream in before.live:
                return f"{stream}: epoch {before.live[stream]} is forgotten"
    finally:
        buffer.close()
    return None


def first_violation(promises: Promises, folder: Path, step: int, seed: int) -> str | None:
    """Cut after every `step`-th event, in three ways."""
    rng = random.Random(seed)
    events = promises.disk.events
    for cut in range(0, len(events) + 1, step):
        fates = [crashed(events[:cut], None, keep_unflushed=True), crashed(events[:cut], rng)]
        if cut < len(events) and events[cut].kind == "sync":
            fates.append(crashed(events[:cut], None))
        for files in fates:
            found = violation(promises, folder, cut, files)
            if found:
                return f"cut after {cut} of {len(events)} ({events[cut - 1][:3]}): {found}"
    return None


def test_accepted_batches_survive_a_power_cut_after_every_write(folder: Path, seed: int) -> None:
    promises = run(folder, operations=60, seed=seed, statements={})
    kinds = [(event.kind, event.file) for event in promises.disk.events]
    assert kinds.count(("sync", "")) >= 5, "the log should have been folded into the file many times"
    assert any(len(known.live) == len(CAPS) for known in promises.known)
    assert first_violation(promises, folder, step=1, seed=seed) is None


@pytest.mark.slow
@pytest.mark.parametrize("life", range(10))
def test_accepted_batches_survive_a_power_cut_in_long_lives(folder: Path, seed: int, life: int) -> None:
    promises = run(folder, operations=120, seed=1_000 * seed + life, statements={})
    assert first_violation(promises, folder, step=3, seed=seed) is None


@pytest.mark.parametrize("level", ["OFF", "NORMAL"])
def test_without_a_flush_at_every_commit_a_power_cut_is_seen_to_lose_batches(
    folder: Path, seed: int, level: str
) -> None:
    mutant = {"PRAGMA synchronous = FULL": f"PRAGMA synchronous = {level}"}
    promises = run(folder, operations=60, seed=seed, statements=mutant)
    found = first_violation(promises, folder, step=7, seed=seed)
    assert found is not None
    assert "gone" in found or "second time" in found or "damaged" in found or "forgotten" in found


def test_without_the_last_number_written_down_it_is_seen_to_be_given_again(
    folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "settle", lambda ledger: None)
    for life in range(10):
        (folder / str(life)).mkdir()
        promises = run(folder / str(life), operations=60, seed=seed + life, statements={})
        found = first_violation(promises, folder, step=5, seed=seed)
        if found:
            break
    assert found is not None
    assert "second time" in found


def test_a_log_cut_at_any_byte_holds_every_batch_before_the_cut(folder: Path) -> None:
    path = folder / "buffer.db"
    wal = path.with_name("buffer.db-wal")
    buffer = buffer_at(path)
    ends, epoch = [wal.stat().st_size], ""
    for n in range(8):
        epoch = buffer.append("a", bytes([n]) * (300 * n + 10), 1, Hands()()).epoch
        ends.append(wal.stat().st_size)
    log, main = wal.read_bytes(), path.read_bytes()
    buffer.close()
    boundaries = {end + delta for end in ends for delta in (-1, 0, 1)}
    for cut in sorted(boundaries | set(range(ends[0], len(log), 211))):
        if not ends[0] <= cut <= len(log):
            continue
        copy = folder / "cut.db"
        for leftover in folder.glob("cut.db*"):
            leftover.unlink()
        copy.write_bytes(main)
        copy.with_name("cut.db-wal").write_bytes(log[:cut])
        whole = sum(end <= cut for end in ends) - 1
        again = buffer_at(copy)
        assert again.opened.kind is OpenedKind.RESUMED
        assert [again.body("a", epoch, seq) for seq in range(1, 9)] == [
            bytes([n]) * (300 * n + 10) if n < whole else None for n in range(8)
        ]
        appended = again.append("a", b"next", 1, Hands()())
        assert appended.seq == whole + 1
        again.close()


def test_a_recorded_disk_is_what_the_real_one_holds(folder: Path, seed: int) -> None:
    """The tests above are worth what the recorder is worth."""
    promises = run(folder, operations=12, seed=seed, statements={})
    recorded = crashed(promises.disk.events, None, keep_unflushed=True)
    real = {
        suffix: path.read_bytes()
        for suffix in SUFFIXES
        if (path := promises.disk.path.with_name(promises.disk.path.name + suffix)).exists()
    }
    assert recorded == real
