"""What an agent costs the device: CPU per reading, memory, bytes written to its card."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.khz_sensor import BLOCK_ROWS, FIELDS
from benchmarks.report import Result, result
from benchmarks.servers import BenchServers
from edge_agent.status import fetch_status

RATE_HZ = 20.0
WARM_UP_S = 8.0
SECONDS = 20.0
TARGET_RSS_MIB = 100e6 / 2**20


def measure() -> list[Result]:
    """One agent with a 1 kHz sensor of six channels, acknowledged by a real gateway."""
    with tempfile.TemporaryDirectory() as folder, BenchServers(Path(folder)) as servers:
        home = Path(folder) / "agent"
        home.mkdir()
        fields = ", ".join(f'{name} = "float32"' for name in FIELDS)
        (home / "agent.toml").write_text(
            f"""
            device = "bench-agent"
            [broker]
            url = "{servers.broker_url}"
            [streams.bench-agent]
            driver = "callable"
            options = {{ function = "benchmarks.khz_sensor:read", fields = {{ {fields} }} }}
            sampling = {{ mode = "interval", rate_hz = {RATE_HZ} }}
            """
        )
        servers.start("agent", (sys.executable, "-m", "edge_agent", "--config", str(home / "agent.toml")))
        time.sleep(WARM_UP_S)
        before, readings_before = servers.usage("agent"), _readings(home)
        time.sleep(SECONDS)
        after, readings = servers.usage("agent"), _readings(home) - readings_before
    cpu_us = (after.cpu_s - before.cpu_s) * 1e6 / readings
    asked = RATE_HZ * BLOCK_ROWS * SECONDS
    return [
        result("agent_cpu_us_per_reading", [cpu_us], "µs", "one core at 1,000 readings/s, 1,000 µs", 1000.0),
        result("agent_rss_mib", [after.rss_mib], "MiB", f"target, 100 MB = {TARGET_RSS_MIB:.1f} MiB", TARGET_RSS_MIB),
        result("agent_readings_taken", [float(readings)], "", f"asked of the sensor, {asked:,.0f}", asked),
    ]


def _readings(home: Path) -> int:
    streams = fetch_status(home / "agent.sock")["streams"]
    return int(streams["bench-agent"]["readings"])
