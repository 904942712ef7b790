"""A light swarm against real brokers: it keeps the protocol, so whatever it accepted arrives once and in order."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from contract import messages, topics
from contract.codec import decode_body, unseal
from contract.errors import ConfigurationError, TemporaryError
from contract.limits import DEFAULT_LIMITS
from contract.messages import Ack, Presence, Rewind, Watermark
from edge_agent.sender import SenderSettings
from simulators.light_client import LightConnection, connect
from simulators.swarm import SwarmReport, SwarmSettings, new_swarm, run_swarm
from tests.integration.servers import BrokerServer, MqttClient, Servers, free_port

ROOT = Path(__file__).parents[2]
PATIENT = SenderSettings(ack_timeout_s=2.0, rewind_holdoff_s=0.1)


class MiniGateway:
    """Admits in order, acknowledges a little later; drops every `drop_every`-th batch once, and asks for a rewind.

    Attributes:
        rows: rows of every batch that was admitted, by device and seq.
    """

    def __init__(self, stream: str, *, drop_every: int = 0, silent: bool = False) -> None:
        self.rows: dict[str, dict[int, int]] = defaultdict(dict)
        self.duplicates = 0
        self._stream = stream
        self._drop_every, self._silent = drop_every, silent
        self._received = 0
        self._marks: dict[tuple[str, str], int] = defaultdict(int)
        self._dirty: set[tuple[str, str]] = set()
        self._connection: LightConnection | None = None

    async def connect(self, broker: BrokerServer) -> None:
        self._connection = await connect(
            "127.0.0.1", broker.port, f"mini-{self._stream}", self, [f"hw/v1/up/+/+/{self._stream}"]
        )

    async def serve(self, broker: BrokerServer) -> None:
        while True:
            if self._connection is None:
                try:
                    await self.connect(broker)
                except TemporaryError:
                    await asyncio.sleep(0.1)
                    continue
            await asyncio.sleep(0.03)
            dirty, self._dirty = self._dirty, set()
            for device, epoch in dirty:
                mark = Watermark(self._stream, epoch, self._marks[device, epoch])
                self._say(topics.ack(device), messages.encode(Ack(committed=(mark,))), retain=True)

    def received(self, topic: str, payload: bytes) -> None:
        envelope, body = unseal(payload)
        self._received += 1
        if self._silent:
            return
        key = (envelope.device, envelope.epoch)
        expected = self._marks[key] + 1
        if self._drop_every and self._received % self._drop_every == 0:
            return  # lost on the way
        if envelope.seq > expected and envelope.seq != envelope.floor:
            rewind = Rewind(stream=self._stream, epoch=envelope.epoch, expected=expected)
            self._say(topics.rewind(envelope.device), messages.encode(rewind))
        elif envelope.seq < expected:
            self.duplicates += 1
            self._dirty.add(key)
        else:
            batch = decode_body(body, envelope, DEFAULT_LIMITS)
            assert envelope.seq not in self.rows[envelope.device]
            self.rows[envelope.device][envelope.seq] = batch.num_rows
            self._marks[key] = envelope.seq
            self._dirty.add(key)

    def has_room(self) -> None:
        """Nothing waits here."""

    def lost(self, reason: str) -> None:
        self._connection = None

    def _say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self._connection is not None and self._connection.room:
            self._connection.publish(topic, payload, retain=retain)
            self._connection.flush()

    def total(self) -> int:
        return sum(sum(batches.values()) for batches in self.rows.values())


async def together(broker: BrokerServer, gateway: MiniGateway, settings: SwarmSettings) -> SwarmReport:
    await gateway.connect(broker)
    serving = asyncio.create_task(gateway.serve(broker))
    try:
        return await run_swarm(settings)
    finally:
        serving.cancel()


def settings(broker: BrokerServer, name: str, **changes: object) -> SwarmSettings:
    values = {
        "broker": broker.url,
        "devices": 20,
        "readings_per_s": 20_000.0,
        "seconds": 2.0,
        "rows_per_batch": 50,
        "stream": name,
        "prefix": name,
        "sender": PATIENT,
    }
    return SwarmSettings(**{**values, **changes})  # type: ignore[arg-type]


async def test_every_accepted_reading_arrives_once_and_in_order(any_broker: BrokerServer) -> None:
    gateway = MiniGateway("whole")
    report = await together(any_broker, gateway, settings(any_broker, "whole"))
    assert report.rows_accepted == report.rows_acknowledged == gateway.total() >= 20_000
    assert (report.rows_unacknowledged, report.connections_lost, report.publishes_refused) == (0, 0, 0)
    assert len(gateway.rows) == 20
    for batches in gateway.rows.values():
        assert list(batches) == list(range(1, len(batches) + 1))
    # In turn: no device has more than one batch more than another.
    assert max(map(len, gateway.rows.values())) - min(map(len, gateway.rows.values())) <= 1
    assert report.ack_ms.p50 is not None and report.ack_ms.p99 is not None
    assert report.ack_ms.p50 <= report.ack_ms.p99


async def test_batches_lost_on_the_way_are_sent_again(mosquitto: BrokerServer) -> None:
    """Mutants tried: rewinds ignored (only the ack timeout helps: ack_timeouts > 0, rewinds_followed == 0)."""
    gateway = MiniGateway("lossy", drop_every=20)
    report = await together(mosquitto, gateway, settings(mosquitto, "lossy", pooled=True, readings_per_s=5_000.0))
    assert report.rows_accepted == report.rows_acknowledged == gateway.total()
    assert report.rewinds_followed > 0
    assert report.batches_resent > 0


async def test_a_swarm_outlives_its_broker(servers: Servers) -> None:
    """Mutants tried: one attempt to reconnect only (devices whose first attempt fails stay away)."""
    broker = servers.mosquitto()
    gateway = MiniGateway("outlive")

    async def kill() -> None:
        await asyncio.sleep(1.0)
        await asyncio.to_thread(broker.kill)

    killing = asyncio.create_task(kill())
    report = await together(broker, gateway, settings(broker, "outlive", seconds=3.0))
    await killing
    assert report.connections_lost >= 20
    assert report.rows_accepted == report.rows_acknowledged == gateway.total()


async def test_without_acknowledgements_a_swarm_is_bounded_and_says_so(mosquitto: BrokerServer) -> None:
    gateway = MiniGateway("silent", silent=True)
    asked = settings(mosquitto, "silent", waiting_batches_max=5, drain_timeout_s=0.2, seconds=1.0)
    report = await together(mosquitto, gateway, asked)
    assert report.rows_accepted == report.rows_unacknowledged == 20 * 5 * 50
    assert report.rows_held_back > 0
    assert report.ack_ms.p50 is None


async def test_as_fast_as_acknowledged_is_faster_than_a_trickle(mosquitto: BrokerServer) -> None:
    gateway = MiniGateway("fast")
    report = await together(mosquitto, gateway, settings(mosquitto, "fast", readings_per_s=None, pooled=True))
    assert report.rows_accepted == report.rows_acknowledged == gateway.total()
    assert report.rows_accepted > 20 * 64 * 50


async def test_stop_ends_a_swarm_early_and_whole(mosquitto: BrokerServer) -> None:
    gateway = MiniGateway("early")
    await gateway.connect(mosquitto)
    serving = asyncio.create_task(gateway.serve(mosquitto))
    swarm = new_swarm(settings(mosquitto, "early", seconds=600.0))
    asyncio.get_running_loop().call_later(1.0, swarm.stop)
    report = await swarm.run()
    serving.cancel()
    assert report.rows_accepted == report.rows_acknowledged == gateway.total() > 0


async def test_devices_say_that_they_come_and_go(mosquitto: BrokerServer) -> None:
    gateway = MiniGateway("presence")
    with MqttClient(mosquitto.url, "presence-reader") as reader:
        reader.subscribe("hw/v1/status/presence-00001")
        await together(mosquitto, gateway, settings(mosquitto, "presence", devices=1, seconds=0.5))
        said = [messages.decode(bytes(reader.receive().payload), Presence) for _ in range(2)]
    assert [(presence.online, presence.reason) for presence in said] == [(True, "started"), (False, "stopped")]


async def test_a_broker_that_is_not_there_is_said_at_once() -> None:
    port = free_port()
    asked = SwarmSettings(broker=f"mqtt://127.0.0.1:{port}", devices=3, readings_per_s=10.0, seconds=1.0)
    with pytest.raises(TemporaryError, match=rf"3 of 3 devices cannot connect.*127\.0\.0\.1:{port}.*is it running"):
        await run_swarm(asked)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices": 0}, "--devices 0"),
        ({"readings_per_s": 0.0}, "--rate 0"),
        ({"readings_per_s": 1e7 + 1}, "--rate 1e[+]07.*10000000"),
        ({"readings_per_s": 1e6, "rows_per_batch": 10}, "100,000 batches a second.*50,000.*--rows"),
        ({"seconds": 0.0}, "--seconds 0"),
        ({"seconds": float("inf")}, "--seconds inf"),
        ({"drain_timeout_s": float("nan")}, "--patience nan"),
        ({"drain_timeout_s": -1.0}, "--patience -1"),
        ({"rows_per_batch": 70_000}, "--rows 70000"),
        ({"stream": "Not Allowed"}, "Not Allowed"),
        ({"broker": "tcp://x"}, "tcp://x"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_connects(changes: dict[str, object], words: str) -> None:
    values: dict[str, object] = {"broker": "mqtt://x", "devices": 1, "readings_per_s": 1.0, "seconds": 1.0}
    with pytest.raises(ConfigurationError, match=words):
        await run_swarm(SwarmSettings(**{**values, **changes}))  # type: ignore[arg-type]


async def test_more_devices_than_connections_are_allowed_is_said_before_anything_connects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    asked = SwarmSettings(broker="mqtt://127.0.0.1:1", devices=1000, readings_per_s=1.0, seconds=1.0)
    with pytest.raises(ConfigurationError, match=r"--devices 1000.*may open 1024 files.*ulimit -n 1064"):
        await run_swarm(asked)


def test_the_command_reports_as_json_and_fails_when_nobody_acknowledges(mosquitto: BrokerServer) -> None:
    options = "--devices 2 --rate 1000 --rows 10 --seconds 0.5 --patience 0.5 --prefix nobody --stream nobody --json"
    command = [sys.executable, "-m", "headwater", "simulate", "swarm", *options.split(), "--broker", mosquitto.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == 3
    assert report["devices"] == 2
    assert report["rows_unacknowledged"] == report["rows_accepted"] > 0
    assert report["ack_ms"] == {"p50": None, "p99": None}
