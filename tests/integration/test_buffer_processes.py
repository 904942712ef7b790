"""The buffer in a process that is killed, and between threads that do not wait for each other."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

from edge_agent.buffer.port import OpenedKind
from edge_agent.buffer.sqlite import SqliteBuffer
from tests.contract.buffer_suite import PLENTY, ROOMY, Hands, held
from tests.integration.buffer_disk import Disk

WRITER = """
import sys
from pathlib import Path
import structlog
from contract.batches import Clock
from edge_agent.buffer.port import StreamCaps
from edge_agent.buffer.sqlite import SqliteBuffer

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
clock = Clock(synced=True, wall_us=1, monotonic_us=1, boot="ab" * 16)
caps = StreamCaps(bytes_max=1 << 30, age_max_s=1e9)
buffer = SqliteBuffer(Path(sys.argv[1]), {"a": caps, "b": caps}, 1 << 30, lambda: clock, "board", wal_bytes_max=20_000)
print("opened", flush=True)
number = int(sys.argv[2])
while True:
    number += 1
    stream = "ab"[number % 2]
    outcome = buffer.append(stream, number.to_bytes(4, "big") * (1 + number % 900), 1, clock)
    print(stream, outcome.epoch, outcome.seq, number, flush=True)
    if number % 7 == 0:
        buffer.acknowledge(stream, outcome.epoch, outcome.seq - 20)
        print("ack", stream, outcome.epoch, outcome.seq - 20, flush=True)
"""


def test_what_append_returned_survives_sigkill_again_and_again(tmp_path: Path, seed: int) -> None:
    """Mutants tried, each made this fail: the batch reported before its commit; a restart that begins at seq 1."""
    path = tmp_path / "buffer.db"
    rng = random.Random(seed)
    accepted: dict[tuple[str, str, int], bytes] = {}
    acknowledged: dict[tuple[str, str], int] = {}
    number = 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(number)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(rng.randint(5, 120))]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
        for line in lines:
            number = max(number, _note(line, accepted, acknowledged))
        process.wait(30)
        buffer = SqliteBuffer(path, {"a": ROOMY, "b": ROOMY}, PLENTY, Hands(), "board")
        for (stream, epoch, seq), body in accepted.items():
            if seq > acknowledged.get((stream, epoch), 0):
                assert buffer.body(stream, epoch, seq) == body
        for info in buffer.lanes():
            numbers = [seq for stream, epoch, seq in accepted if (stream, epoch) == (info.stream, info.epoch)]
            assert max(numbers) <= info.last_seq <= max(numbers) + 1, "one append may have been on its way"
            for seq in set(held(buffer, info.stream, info.epoch)) - set(numbers):
                unheard = buffer.body(info.stream, info.epoch, seq)
                assert unheard is not None
                number = max(number, int.from_bytes(unheard[:4], "big"))
                accepted[info.stream, info.epoch, seq] = unheard
        buffer.close()
    assert len(accepted) > 100
    assert len({epoch for _, epoch, _ in accepted}) == 2


def _note(line: str, accepted: dict[tuple[str, str, int], bytes], acknowledged: dict[tuple[str, str], int]) -> int:
    match line.split():
        case ["ack", stream, epoch, seq]:
            acknowledged[stream, epoch] = int(seq)
        case [stream, epoch, seq, count]:
            number = int(count)
            key = (stream, epoch, int(seq))
            assert key not in accepted, "a number was given twice"
            accepted[key] = number.to_bytes(4, "big") * (1 + number % 900)
            return number
    return 0


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    path = tmp_path / "buffer.db"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "opened\n"
    process.kill()
    process.stdout.read()
    process.wait(30)
    buffer = SqliteBuffer(path, {}, PLENTY, Hands(), "board")
    assert buffer.opened.kind is OpenedKind.RESUMED
    buffer.close()


def test_the_uplink_reads_while_a_slow_card_flushes_an_append(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "buffer.db")
    buffer = SqliteBuffer(disk.path, {}, PLENTY, Hands(), "board", connect=disk.connect)
    epoch = buffer.append("a", b"one", 1, Hands()()).epoch
    flushing, released = threading.Event(), threading.Event()

    def stall() -> None:
        flushing.set()
        assert released.wait(60)

    disk.on_sync = stall
    thread = threading.Thread(target=buffer.append, args=("a", b"two", 1, Hands()()))
    thread.start()
    assert flushing.wait(60)
    seen = (buffer.floor("a", epoch), buffer.body("a", epoch, 1), buffer.peek("a", epoch, 1), len(buffer.lanes()))
    disk.on_sync = lambda: None
    released.set()
    thread.join(60)
    assert seen == (1, b"one", None, 1)
    assert buffer.body("a", epoch, 2) == b"two"
    buffer.close()


def test_an_append_goes_on_while_the_uplink_reads(tmp_path: Path) -> None:
    """And the log does not grow without bound while it does."""
    buffer = SqliteBuffer(tmp_path / "buffer.db", {}, PLENTY, Hands(), "board", wal_bytes_max=50_000)
    epoch = buffer.append("a", b"x" * 5_000, 1, Hands()()).epoch
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for batch in range(1, 20):
                buffer.body("a", epoch, batch)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    log_bytes = []
    for _ in range(100):
        outcome = buffer.append("a", b"x" * 5_000, 1, Hands()())
        buffer.acknowledge("a", epoch, outcome.seq - 20)
        log_bytes.append((tmp_path / "buffer.db-wal").stat().st_size)
    stop.set()
    for reader in readers:
        reader.join(60)
    assert max(log_bytes) < 8 * 50_000 + 20_000
    assert outcome.seq == 101
    buffer.close()
