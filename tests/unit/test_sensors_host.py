"""Driver `host`: a fixed schema, whatever the machine has."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import psutil
import pytest

from edge_agent.sensors.columns import Columns
from edge_agent.sensors.host import SCHEMA, HostOptions, HostSensor
from edge_agent.sensors.port import SensorConfigError, SensorError

STOP = threading.Event()


def test_readings_have_all_fields_and_fit_the_schema() -> None:
    sensor = HostSensor(HostOptions())
    sensor.open()
    first, second = sensor.read(STOP), sensor.read(STOP)
    columns = Columns(sensor.schema)
    assert list(columns.reading(first, 0).values) == SCHEMA.names
    # The first percentage would cover no time at all.
    assert first.values["cpu_percent"] is None
    assert 0 <= second.values["cpu_percent"] <= 100
    assert first.values["memory_used_bytes"] > 0 and first.values["memory_available_bytes"] > 0
    assert first.values["disk_free_bytes"] <= psutil.disk_usage("/").total
    assert second.values["uptime_s"] >= first.values["uptime_s"] > 0
    sensor.close()


def test_what_the_machine_lacks_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_swap() -> None:
        raise RuntimeError("no /proc/vmstat")

    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    monkeypatch.setattr(psutil, "swap_memory", no_swap)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: {"lo": SimpleNamespace(bytes_recv=1, bytes_sent=1)})
    sensor = HostSensor(HostOptions())
    sensor.open()
    values = sensor.read(STOP).values
    missing = {name for name in SCHEMA.names if values[name] is None}
    assert missing == {
        "cpu_percent",
        "swap_used_bytes",
        "disk_read_bytes",
        "disk_written_bytes",
        "net_received_bytes",
        "net_sent_bytes",
        "temperature_c",
    }


def test_network_counts_without_loopback_and_the_hottest_core_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    nics = {
        name: SimpleNamespace(bytes_recv=n, bytes_sent=10 * n) for name, n in (("lo", 1), ("eth0", 2), ("wlan0", 3))
    }
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: nics)
    cores = [SimpleNamespace(current=51.5), SimpleNamespace(current=61.25)]
    chips = {"nvme": [SimpleNamespace(current=90.0)], "coretemp": cores}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: chips, raising=False)

    def values(options: HostOptions) -> dict[str, float]:
        sensor = HostSensor(options)
        sensor.open()
        return dict(sensor.read(STOP).values)

    assert (values(HostOptions())["net_received_bytes"], values(HostOptions())["net_sent_bytes"]) == (5, 50)
    assert values(HostOptions())["temperature_c"] == 61.25
    assert values(HostOptions(temperature_chip="nvme"))["temperature_c"] == 90.0
    assert values(HostOptions(temperature_chip="absent"))["temperature_c"] is None


def test_a_wrong_disk_is_a_mistake_and_trouble_with_proc_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SensorConfigError, match="'disk' = '/no/such/place'"):
        HostSensor(HostOptions(disk="/no/such/place")).open()
    sensor = HostSensor(HostOptions())
    sensor.open()

    def broken() -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    with pytest.raises(SensorError, match="Input/output error"):
        sensor.read(STOP)
