"""Driver `host`: how the device itself is doing, read through psutil.

The schema is fixed, whatever the machine has: what it lacks is null. Counters (disk and network bytes) count since
boot, as the kernel gives them; rates are a matter of SQL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import psutil
import pyarrow as pa

from edge_agent.sensors.options import parse_options
from edge_agent.sensors.port import Reading, Sensor, SensorConfigError, SensorError

_FLOAT = pa.float32()
_COUNT = pa.int64()

SCHEMA = pa.schema(
    [
        ("cpu_percent", _FLOAT),  # busy time of all cores since the last reading, 0..100; null in the first
        ("load1", _FLOAT),  # run queue, averaged over 1, 5 and 15 minutes
        ("load5", _FLOAT),
        ("load15", _FLOAT),
        ("memory_used_bytes", _COUNT),
        ("memory_available_bytes", _COUNT),
        ("swap_used_bytes", _COUNT),
        ("disk_used_bytes", _COUNT),  # of the file system that holds `disk`
        ("disk_free_bytes", _COUNT),
        ("disk_read_bytes", _COUNT),  # all block devices, since boot
        ("disk_written_bytes", _COUNT),
        ("net_received_bytes", _COUNT),  # all interfaces but loopback, since boot
        ("net_sent_bytes", _COUNT),
        ("temperature_c", _FLOAT),  # hottest sensor of the chosen chip
        ("uptime_s", pa.float64()),
    ]
)
"""Fields of the `host` driver, in order."""

_CHIPS = ("cpu_thermal", "coretemp", "k10temp", "zenpower", "soc_thermal", "cpu-thermal", "acpitz")
"""hwmon chips that stand for the processor, likeliest first (Raspberry Pi: cpu_thermal)."""


class HostOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `host`."""

    disk: str = "/"
    """A path on the file system whose use is reported."""
    temperature_chip: str = ""
    """Name of the hwmon chip for `temperature_c`; empty picks the processor's."""


def create(options: Mapping[str, Any]) -> Sensor:
    """The factory of driver `host`."""
    return HostSensor(parse_options(HostOptions, options, "host"))


class HostSensor:
    """CPU, memory, disk, network, temperature and uptime of this machine."""

    def __init__(self, options: HostOptions) -> None:
        self._options = options
        self._primed = False

    @property
    def schema(self) -> pa.Schema:
        """`SCHEMA`."""
        return SCHEMA

    def open(self) -> None:
        """Take the first look at the CPU counters, against which the first reading's percentage is taken."""
        try:
            psutil.disk_usage(self._options.disk)
        except FileNotFoundError as error:
            raise SensorConfigError(
                f"driver 'host': option 'disk' = {self._options.disk!r} does not exist; "
                "give a path on the disk to watch"
            ) from error
        except OSError as error:
            raise SensorError(f"driver 'host': disk {self._options.disk!r} cannot be read: {error}") from error
        psutil.cpu_percent(interval=None)
        self._primed = False

    def read(self, stop: threading.Event) -> Reading:
        """One reading; takes well under a millisecond and never waits."""
        try:
            return Reading(self._values())
        except (OSError, psutil.Error) as error:
            raise SensorError(f"driver 'host' could not read the machine's counters: {error}") from error

    def close(self) -> None:
        """Nothing is held."""

    def _values(self) -> dict[str, Any]:
        cpu_percent: float | None = psutil.cpu_percent(interval=None)
        if not self._primed:
            # psutil's first answer covers the instant since `open`, which says nothing about the machine.
            self._primed, cpu_percent = True, None
        load1, load5, load15 = psutil.getloadavg()
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(self._options.disk)
        disk_read, disk_written = _disk_bytes()
        net_received, net_sent = _net_bytes()
        return {
            "cpu_percent": cpu_percent,
            "load1": load1,
            "load5": load5,
            "load15": load15,
            "memory_used_bytes": memory.used,
            "memory_available_bytes": memory.available,
            "swap_used_bytes": _swap_used(),
            "disk_used_bytes": disk.used,
            "disk_free_bytes": disk.free,
            "disk_read_bytes": disk_read,
            "disk_written_bytes": disk_written,
            "net_received_bytes": net_received,
            "net_sent_bytes": net_sent,
            "temperature_c": self._temperature(),
            "uptime_s": time.clock_gettime(time.CLOCK_BOOTTIME),
        }

    def _temperature(self) -> float | None:
        chips = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
        wanted = (self._options.temperature_chip,) if self._options.temperature_chip else _CHIPS
        for chip in wanted:
            if chips.get(chip):
                return max(float(entry.current) for entry in chips[chip])
        return None


def _swap_used() -> int | None:
    try:
        return psutil.swap_memory().used
    except (OSError, RuntimeError, ValueError):
        # Without /proc/vmstat (some containers) psutil cannot tell; the field is then null.
        return None


def _disk_bytes() -> tuple[int | None, int | None]:
    try:
        counters = psutil.disk_io_counters()
    except (OSError, RuntimeError, NotImplementedError):
        return None, None
    return (counters.read_bytes, counters.write_bytes) if counters is not None else (None, None)


def _net_bytes() -> tuple[int | None, int | None]:
    counters = {name: each for name, each in psutil.net_io_counters(pernic=True).items() if name != "lo"}
    if not counters:
        return None, None
    return sum(each.bytes_recv for each in counters.values()), sum(each.bytes_sent for each in counters.values())
