"""A gateway process from start to end: exactly once on the good days, over both brokers and both kinds of lake."""

from __future__ import annotations

from tests.integration.gateway_parts import (
    Devices,
    GatewayProcess,
    Lake,
)


def test_every_batch_is_in_the_lake_once_and_acknowledged(any_broker, tmp_path):
    lake = {"url": f"file://{tmp_path}/lake"}
    names = [f"once-{any_broker.name}-{number}" for number in range(5)]
    with GatewayProcess(tmp_path, any_broker.url, lake) as gateway, Devices(any_broker.url, names) as devices:
        for _ in range(4):
            devices.append_all(5)
            devices.wait_drained()
        devices.check(Lake.local(tmp_path / "lake"))
        metrics = gateway.metrics()
        assert metrics["committed_rows_total"] == len(devices.accepted) * 20
        assert metrics["pending_bytes"] == 0
        assert metrics["arrival_to_commit_seconds_count"] == len(devices.accepted)
        assert metrics["sent_to_commit_seconds_count"] == len(devices.accepted)
