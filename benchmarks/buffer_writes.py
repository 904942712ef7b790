"""What the device's buffer writes to a card, and how long an append takes.

`python -m benchmarks.buffer_writes [--dir DIR]` prints one JSON object per figure. The folder has to be on a real disk.
Bytes are those that the kernel counts for this process (`write_bytes` of /proc/self/io: whole pages of 4096 bytes,
without the file system's own journal). Bodies are encoded rows of six float32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import structlog

from benchmarks.report import Result, result
from contract.batches import TS_TYPE, Clock
from contract.codec import encode_body
from edge_agent.buffer.port import NewBatch, StreamCaps
from edge_agent.buffer.sqlite import SqliteBuffer

ROOT = Path(__file__).parents[1]
ROWS = (10, 50, 500)
STREAMS = 4
RUNS = 3
PAYLOAD_BYTES = 4_000_000
"""Measured per run, after as much again to warm up."""
STEPS_MAX = 1_500
TARGET = 3.0
BOOT = "ab" * 16

Step = Callable[[SqliteBuffer, Sequence[bytes], int], None]


def measure(folder: Path = ROOT) -> list[Result]:
    """Bytes written per byte of payload in every situation of a device, and the time an append takes."""
    results = []
    for rows in ROWS:
        bodies = _bodies(rows)
        for situation, (step, streams) in _SITUATIONS.items():
            runs = [_run(folder, bodies, step, streams) for _ in range(RUNS)]
            ratios, latencies_ms = [ratio for ratio, _ in runs], [latency for _, latency in runs]
            name = f"card_bytes_per_payload_byte_{situation}_{rows}_rows"
            results.append(result(name, ratios, "B/B", f"target, at most {TARGET:g}", TARGET))
            if situation in ("online", "offline"):
                flush_ms = _flush_ms(folder)
                for percent in (50, 99):
                    name = f"append_ms_p{percent}_{situation}_{rows}_rows"
                    against = f"median write and flush of 4096 B, {flush_ms:.2f} ms"
                    results.append(result(name, _quantile(latencies_ms, percent / 100), "ms", against, flush_ms))
        ratios = [_drain(folder, bodies) for _ in range(RUNS)]
        name = f"card_bytes_per_payload_byte_draining_{rows}_rows"
        results.append(result(name, ratios, "B/B", f"target, at most {TARGET:g}", TARGET))
    return results


def _online(buffer: SqliteBuffer, bodies: Sequence[bytes], step: int) -> None:
    """A batch is appended; its acknowledgement comes before the next one."""
    appended = buffer.append("s0", bodies[step % len(bodies)], 1, _clock())
    buffer.acknowledge("s0", appended.epoch, appended.seq)


def _together(buffer: SqliteBuffer, bodies: Sequence[bytes], step: int) -> None:
    """Four streams close a batch at the same moment."""
    new = [NewBatch(f"s{i}", bodies[(step + i) % len(bodies)], 1, _clock()) for i in range(STREAMS)]
    for batch, appended in zip(new, buffer.append_many(new), strict=True):
        buffer.acknowledge(batch.stream, appended.epoch, appended.seq)


def _offline(buffer: SqliteBuffer, bodies: Sequence[bytes], step: int) -> None:
    """Nothing is acknowledged."""
    buffer.append("s0", bodies[step % len(bodies)], 1, _clock())


def _full(buffer: SqliteBuffer, bodies: Sequence[bytes], step: int) -> None:
    """Nothing is acknowledged, and the oldest gives way."""
    buffer.append("small", bodies[step % len(bodies)], 1, _clock())


_SITUATIONS: dict[str, tuple[Step, int]] = {
    "online": (_online, 1),
    "online_4_streams": (_together, STREAMS),
    "offline": (_offline, 1),
    "full": (_full, 1),
}


def _run(folder: Path, bodies: Sequence[bytes], step: Step, streams: int) -> tuple[float, list[float]]:
    steps = min(STEPS_MAX, PAYLOAD_BYTES // (streams * len(bodies[0])))
    with _buffer(folder) as buffer:
        for number in range(steps):
            step(buffer, bodies, number)
        latencies_ms = []
        before = _written_bytes()
        for number in range(steps):
            begin = time.perf_counter()
            step(buffer, bodies, number)
            latencies_ms.append(1e3 * (time.perf_counter() - begin))
        written = _written_bytes() - before
    return written / (steps * streams * statistics.mean(map(len, bodies))), latencies_ms


def _drain(folder: Path, bodies: Sequence[bytes]) -> float:
    """A backlog is read and acknowledged, as many batches at a time as one commit of a gateway covers."""
    steps = min(STEPS_MAX, PAYLOAD_BYTES // len(bodies[0]))
    with _buffer(folder) as buffer:
        for number in range(steps):
            _offline(buffer, bodies, number)
        (lane,) = buffer.lanes()
        before = _written_bytes()
        for seq in range(1, steps + 1):
            buffer.body("s0", lane.epoch, seq)
            if seq % 32 == 0:
                buffer.acknowledge("s0", lane.epoch, seq)
        written = _written_bytes() - before
    return written / (steps * statistics.mean(map(len, bodies)))


@contextmanager
def _buffer(folder: Path) -> Iterator[SqliteBuffer]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="buffer-writes-") as name:
        roomy = StreamCaps(bytes_max=1 << 30, age_max_s=1e9)
        caps = {f"s{i}": roomy for i in range(STREAMS)}
        caps["small"] = StreamCaps(bytes_max=500_000, age_max_s=1e9)
        buffer = SqliteBuffer(Path(name) / "buffer.db", caps, 1 << 30, _clock, "board")
        try:
            yield buffer
        finally:
            buffer.close()


def _bodies(rows: int, count: int = 64) -> list[bytes]:
    """Bodies of a six-axis sensor at 50 Hz: smooth movement, and the noise of the last bits."""
    rng = np.random.default_rng(7)
    bodies = []
    for number in range(count):
        at = np.arange(number * rows, (number + 1) * rows)
        ts = pa.array(1_790_000_000_000_000 + at * 20_000, pa.int64()).view(TS_TYPE)
        columns = [
            pa.array((np.sin(at / (9 + axis)) + rng.normal(0, 0.02, rows)).astype(np.float32)) for axis in range(6)
        ]
        bodies.append(encode_body(pa.record_batch([ts, *columns], ["ts", *(f"axis{axis}" for axis in range(6))])))
    return bodies


def _quantile(runs: Sequence[Sequence[float]], quantile: float) -> list[float]:
    return [sorted(run)[int(quantile * (len(run) - 1))] for run in runs]


def _flush_ms(folder: Path) -> float:
    """The least that durability costs on this disk: 4096 bytes appended to a file, and flushed."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        times = []
        for _ in range(200):
            begin = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def _clock() -> Clock:
    return Clock(synced=True, wall_us=time.time_ns() // 1000, monotonic_us=time.monotonic_ns() // 1000, boot=BOOT)


def _written_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])


def main() -> int:
    """Print one JSON object per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=ROOT, help="a folder on the disk to measure")
    folder = parser.parse_args().dir
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    for one in measure(folder):
        print(msgspec.json.encode(one).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
