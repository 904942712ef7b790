"""Rows from memory into a Delta table: 200 batches of 500 rows of 6 float32, 100 devices, as a gateway's flush does it.

`python -m benchmarks.lake_append [file|s3]` prints one JSON object per kind of store.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.report import Result, result
from contract.batches import TS_TYPE, Clock, Envelope
from contract.codec import checksum, decode_body, encode_body
from contract.limits import DEFAULT_LIMITS
from contract.names import shard_of
from headwater.stack.objectstore import Seaweed
from headwater.stack.ports import PortBook
from headwater.stack.supervisor import Supervisor
from lake.raw import RawBatch, RawTable
from lake.store import Store, StoreSettings

BATCHES = 200
ROWS = 500
DEVICES = 100
FLUSHES = 12
WARM_UP = 2
START_TIMEOUT_S = 60.0
EPOCH = "ab" * 16
BEGIN_US = 1_790_000_000_000_000


def measure() -> list[Result]:
    """Rows a second and CPU time a row, on a folder and on the embedded object store."""
    results = []
    for kind in ("file", "s3"):
        with store_of(kind) as store:
            found = run(store)
        per_s, cpu = [100_000 / wall for wall, _ in found], [1e6 * cpu / (BATCHES * ROWS) for _, cpu in found]
        results += [
            result(f"lake_append_rows_per_s_{kind}", per_s, "rows/s", "target of the whole road, 1,000,000/s", 1e6),
            result(f"lake_append_cpu_us_per_row_{kind}", cpu, "µs", "prototype of the whole road, 0.63 µs", 0.63),
        ]
    return results


@contextmanager
def store_of(kind: str) -> Iterator[Store]:
    """A new lake: `file` or `s3`."""
    with tempfile.TemporaryDirectory() as folder:
        if kind == "file":
            yield Store(StoreSettings(url=(Path(folder) / "lake").as_uri()))
        else:
            with _seaweed(Path(folder)) as settings:
                yield Store(settings)


@contextmanager
def _seaweed(folder: Path) -> Iterator[StoreSettings]:
    ports = PortBook(folder / "ports.json").claim(dict.fromkeys(Seaweed.PORTS))
    store = Seaweed(folder / "store", log=folder / "store.log", ports=ports)
    supervisor = Supervisor()
    try:
        supervisor.start([store.spec()], START_TIMEOUT_S)
        access = store.access
        yield StoreSettings(
            url=access.url,
            endpoint=access.endpoint,
            access_key=access.key,
            secret_key=access.secret,
            region=access.region,
            allow_http=True,
        )
    finally:
        supervisor.close()


def flush(number: int) -> list[RawBatch]:
    """Decoded batches in the order in which devices sent them, two of each device."""
    random = np.random.default_rng(number)
    clock = Clock(synced=True, wall_us=BEGIN_US, monotonic_us=1, boot="cd" * 16)
    batches = []
    per_device = BATCHES // DEVICES
    for index in range(BATCHES):
        device = f"device-{index % DEVICES:03d}"
        seq = number * per_device + index // DEVICES + 1
        ts = BEGIN_US + 10_000 * ((seq - 1) * ROWS + np.arange(ROWS))
        fields = {f"axis_{i}": pa.array(random.normal(size=ROWS).astype(np.float32)) for i in range(6)}
        body = encode_body(pa.record_batch({"ts": pa.array(ts).view(TS_TYPE), **fields}))
        envelope = Envelope(device, "bench", EPOCH, seq, seq, ROWS, 0, clock, checksum(body))
        batch = decode_body(body, envelope, DEFAULT_LIMITS)
        batches.append(RawBatch(device, EPOCH, seq, shard_of(device), BEGIN_US, clock, batch))
    return batches


def run(store: Store) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each measured flush: refresh, look-ups, conversion, Parquet, put, commit."""
    table = RawTable(store, "bench")
    found = []
    for number in range(FLUSHES + WARM_UP):
        batches = flush(number)
        wall, cpu = time.perf_counter(), time.process_time()
        table.refresh()
        table.watermarks({(item.device, item.epoch) for item in batches})
        counters = {shard: table.shard_counter(shard) + 1 for shard in {item.shard for item in batches}}
        for item in batches:
            assert table.unfit(item.batch.schema) is None
        marks = {(item.device, item.epoch): item.seq for item in batches}
        table.append(batches, marks, counters)
        if number >= WARM_UP:
            found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def main(kinds: list[str]) -> int:
    """Print one JSON object per kind of store."""
    for kind in kinds or ["file", "s3"]:
        with store_of(kind) as store:
            found = run(store)
        wall, cpu = statistics.median(w for w, _ in found), statistics.median(c for _, c in found)
        rows = BATCHES * ROWS
        answer = {"store": kind, "rows_per_s": round(rows / wall), "cpu_us_per_row": round(1e6 * cpu / rows, 3)}
        print(json.dumps(answer | {"flush_ms": round(1e3 * wall, 1), "flushes": len(found), "rows_per_flush": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
