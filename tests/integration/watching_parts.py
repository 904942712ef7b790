"""Gateways that watch releases in a lake on disk, and what they wrote there."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from contract.limits import SHARDS
from gateway.access import LakeAccess
from gateway.metrics import GatewayMetrics
from gateway.monitoring import Monitoring
from gateway.settings import MonitoringSettings
from gateway.watch import LakeHealth
from lake.monitoring.alerts import PATH as ALERTS
from lake.monitoring.alerts import SCHEMA as ALERTS_SCHEMA
from lake.monitoring.triggers import PATH, SCHEMA, TriggerTable
from lake.tables import ControlTable
from tests.monitoring_parts import NOW_US, Device

SETTINGS = MonitoringSettings(interval_s=3600, windows_max=100, baseline_windows=40)
DEVICES = ("watch-1", "watch-2", "watch-3")
HOUR_US = 3_600_000_000


class Clock:
    """Wall clock of all gateways."""

    def __init__(self) -> None:
        self.now_us = NOW_US + HOUR_US

    def __call__(self) -> int:
        return self.now_us


def gateway(store, clock, name="gateway-a", shards=range(SHARDS), settings=SETTINGS) -> Monitoring:
    access = LakeAccess(store.settings, "", 86_400)
    return Monitoring(
        settings,
        shards=shards,
        gateway=name,
        access=access,
        metrics=GatewayMetrics(CollectorRegistry()),
        health=LakeHealth(),
        clock_us=clock,
    )


def figure(monitoring: Monitoring, name: str, **labels) -> float | None:
    return monitoring._metrics.registry.get_sample_value(f"headwater_gateway_{name}", labels)


def alerts(store) -> list[tuple[str, str, str]]:
    rows = ControlTable(store, ALERTS, ALERTS_SCHEMA)
    rows.refresh()
    found = rows.read().sort_by([("sequence", "ascending")]).to_pylist()
    return [(row["device"], row["kind"], row["event"]) for row in found]


def triggers(store, clock=lambda: 0):
    return TriggerTable(lambda: ControlTable(store, PATH, SCHEMA), "test", clock)


def fleet(store, world, count=200) -> dict[str, Device]:
    devices = {name: Device(store, name) for name in DEVICES}
    for number, device in enumerate(devices.values()):
        device.predict(*world.windows(count, own=0.1 * number))
    return devices
