"""From MQTT to the committed lake: readings per second, acknowledgement latency, and what the gateway costs.

Publisher, broker, store and gateway share this machine. The reference is the lake alone: the same batches appended by
`RawTable` in this process, to the same store, without broker and gateway.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path

from benchmarks.report import Result, result
from benchmarks.servers import GATEWAY, BenchServers
from contract.batches import Clock, Envelope
from contract.codec import checksum, decode_body
from contract.limits import DEFAULT_LIMITS
from contract.names import new_epoch, shard_of
from edge_agent.sender import SenderSettings
from lake.raw import RawBatch, RawTable
from lake.store import Store, StoreSettings
from simulators.batches import BodySource
from simulators.swarm import SwarmReport, SwarmSettings, run_swarm

ROWS = 500
DEVICES = 100
SECONDS = 10.0
RUNS = 3
CALM_READINGS_PER_S = 100_000.0
TARGET_READINGS_PER_S = 1_000_000.0


def measure() -> list[Result]:
    """Full speed, then a calm load for the latencies; three runs each."""
    with tempfile.TemporaryDirectory() as folder, BenchServers(Path(folder)) as servers:
        _swarm(servers, 0, None, 3.0)  # tables, caches and connections exist before anything is measured
        fast, cpu = [], []
        for run in range(RUNS):
            before = servers.usage(GATEWAY)
            report = _swarm(servers, run + 1, None, SECONDS)
            fast.append(report)
            cpu.append((servers.usage(GATEWAY).cpu_s - before.cpu_s) * 1e6 / report.rows_acknowledged)
        rss_mib = servers.usage(GATEWAY).rss_mib
        calm = [_swarm(servers, run + 10, CALM_READINGS_PER_S, SECONDS) for run in range(RUNS)]
        alone = [_lake_alone(servers, run) for run in range(RUNS)]
    ceiling = sorted(alone)[RUNS // 2]
    rates = [report.readings_per_s for report in fast]
    flush = "the flush interval, 1,000 ms"
    return [
        result("readings_per_s", rates, "1/s", "target, 1,000,000/s", TARGET_READINGS_PER_S),
        result("readings_per_s_against_lake_alone", rates, "1/s", f"RawTable.append alone, {ceiling:,.0f}/s", ceiling),
        result("ack_ms_p50", [float(r.ack_ms.p50 or 0) for r in calm], "ms", flush, 1000.0),
        result("ack_ms_p99", [float(r.ack_ms.p99 or 0) for r in calm], "ms", flush, 1000.0),
        result("ack_ms_p50_full_speed", [float(r.ack_ms.p50 or 0) for r in fast], "ms", flush, 1000.0),
        result("ack_ms_p99_full_speed", [float(r.ack_ms.p99 or 0) for r in fast], "ms", flush, 1000.0),
        result("gateway_cpu_us_per_reading", cpu, "µs", "prototype, 0.63 µs", 0.63),
        result("gateway_rss_mib", [rss_mib], "MiB", "its budget for pending batches, 256 MiB", 256.0),
    ]


def _swarm(servers: BenchServers, run: int, readings_per_s: float | None, seconds: float) -> SwarmReport:
    settings = SwarmSettings(
        broker=servers.broker_url,
        devices=DEVICES,
        readings_per_s=readings_per_s,
        seconds=seconds,
        rows_per_batch=ROWS,
        prefix=f"bench-{run}",
        stream="bench",
        pooled=True,
        sender=SenderSettings(window_batches_max=64, ack_timeout_s=30.0),
    )
    report = asyncio.run(run_swarm(settings))
    if report.rows_unacknowledged:
        raise RuntimeError(f"{report.rows_unacknowledged} readings were never acknowledged; the run does not count")
    return report


def _lake_alone(servers: BenchServers, run: int) -> float:
    access = servers.access
    store = Store(
        StoreSettings(
            url=access.url,
            endpoint=access.endpoint,
            region=access.region,
            access_key=access.key,
            secret_key=access.secret,
            allow_http=True,
        )
    )
    table = RawTable(store, f"alone-{run}")
    source = BodySource(ROWS, random.Random(run), pooled=True)
    clock = Clock(synced=True, wall_us=0, monotonic_us=0, boot="0" * 32)
    lanes = [(f"alone-{number}", new_epoch()) for number in range(DEVICES)]
    rows, began, seq = 0, time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS / 2:
        batches = []
        now_us = time.time_ns() // 1000
        first = seq + 1
        for seq in range(first, first + 10):
            for device, epoch in lanes:
                body = source.next(now_us, 20_000)
                envelope = Envelope(device, "alone", epoch, seq, seq, ROWS, now_us, clock, checksum(body))
                content = decode_body(body, envelope, DEFAULT_LIMITS)
                batches.append(RawBatch(device, epoch, seq, shard_of(device), now_us, clock, content))
        table.refresh()
        shards = {batch.shard for batch in batches}
        table.append(batches, dict.fromkeys(lanes, seq), {shard: table.shard_counter(shard) + 1 for shard in shards})
        rows += ROWS * len(batches)
    return rows / (time.perf_counter() - began)
