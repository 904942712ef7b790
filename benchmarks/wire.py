"""Bytes on the wire per reading of the watch recordings, MQTT packet and all, at 10, 50 and 500 rows a batch."""

from __future__ import annotations

import json

import pyarrow as pa

from benchmarks.report import Result, result
from contract import topics
from contract.batches import Clock, Envelope
from contract.codec import checksum, encode_body, seal
from contract.names import new_epoch
from simulators.recordings import load_watch, watch_table

TARGETS = {10: 80.0, 50: 37.0, 500: 27.0}
ROWS_SAMPLED = 100_000
_MQTT_FIXED_BYTES = 1 + 3 + 2 + 2 + 1
"""PUBLISH of MQTT 5: type, remaining length, topic length, packet id, empty properties (OASIS MQTT 5.0, 3.3)."""


def measure() -> list[Result]:
    """One deterministic measurement per batch size, beside the same rows as JSON."""
    table = watch_table(load_watch()).slice(0, ROWS_SAMPLED)
    results = []
    for rows, target in TARGETS.items():
        per_reading = _bytes_per_reading(table, rows)
        as_json = _json_bytes_per_reading(table.slice(0, 5_000))
        results += [
            result(f"wire_bytes_per_reading_{rows}_rows", [per_reading], "B", f"target, at most {target:g} B", target),
            result(f"wire_bytes_against_json_{rows}_rows", [per_reading], "B", f"JSON rows, {as_json:.0f} B", as_json),
        ]
    return results


def _bytes_per_reading(table: pa.Table, rows: int) -> float:
    device, stream, epoch = "watch-s01-l", "watch", new_epoch()
    topic = topics.up(device, stream)
    clock = Clock(synced=True, wall_us=1_790_000_000_000_000, monotonic_us=86_400_000_000, boot=epoch)
    size = batches = 0
    for seq, batch in enumerate(table.combine_chunks().to_batches(max_chunksize=rows), start=1):
        if batch.num_rows < rows:
            break
        body = encode_body(batch)
        envelope = Envelope(device, stream, epoch, seq, max(1, seq - 3), rows, clock.wall_us, clock, checksum(body))
        size += len(seal(envelope, body)) + len(topic) + _MQTT_FIXED_BYTES
        batches += 1
    return size / (batches * rows)


def _json_bytes_per_reading(table: pa.Table) -> float:
    lines = [json.dumps(row, default=lambda ts: ts.isoformat(), separators=(",", ":")) for row in table.to_pylist()]
    return sum(len(line) + 1 for line in lines) / len(lines)
