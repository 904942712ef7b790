"""Real servers for tests: each in its own process, on loopback, over a folder of its own, and gone at the end.

A test that only talks to a server takes the session's one (`mosquitto`, `iotcore`, `object_store` in conftest.py); a
test that kills, freezes or fills one takes `servers` and starts its own.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import boto3
import msgspec
import paho.mqtt.client as mqtt
from botocore.config import Config
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from headwater.stack.broker import Broker, Iotcore, IotcoreSettings, Mosquitto, MosquittoSettings
from headwater.stack.objectstore import Seaweed, SeaweedSettings, StoreAccess
from headwater.stack.ports import PortBook
from headwater.stack.supervisor import ChildSpec, ChildStatus, Supervisor

START_TIMEOUT_S = 60.0
PATIENCE_S = 30.0
"""For anything that happens by itself on a busy machine. Never a measure of speed."""


def wait_until(predicate: Callable[[], object], timeout_s: float, what: str) -> Any:
    """Ask again and again until `predicate` returns something true, and return that.

    Raises:
        AssertionError: after `timeout_s`, naming `what` did not happen.
    """
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while True:
        if found := predicate():
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        pause.wait(0.02)


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Server:
    """One supervised server process."""

    def __init__(self, supervisor: Supervisor, spec: ChildSpec) -> None:
        self._supervisor = supervisor
        self.name = spec.name
        self.log = spec.log

    @property
    def status(self) -> ChildStatus:
        return next(status for status in self._supervisor.status() if status.name == self.name)

    @property
    def pid(self) -> int:
        pid = self._supervisor.pid(self.name)
        assert pid is not None, f"{self.name} has no process: {self.status}"
        return pid

    def kill(self) -> None:
        """SIGKILL, and wait until the supervisor has it back and READY."""
        before = self.status.restarts_total
        os.kill(self.pid, signal.SIGKILL)
        self.wait_restarted(before)

    def wait_restarted(self, restarts_before: int) -> None:
        """Wait until it was started again and is READY."""
        wait_until(
            lambda: self.status.restarts_total > restarts_before and self.status.state == "ready",
            START_TIMEOUT_S,
            f"{self.name} is back",
        )

    def stop(self) -> None:
        self._supervisor.stop([self.name])


class BrokerServer(Server):
    """A broker; `url` is for MQTT 5."""

    def __init__(self, supervisor: Supervisor, spec: ChildSpec, broker: Broker) -> None:
        super().__init__(supervisor, spec)
        self.url = broker.url
        self.url_mqtt311 = broker.url_mqtt311
        self.port = urlsplit(broker.url).port or 0


class StoreServer(Server):
    """An object store; its bucket exists."""

    def __init__(self, supervisor: Supervisor, spec: ChildSpec, store: Seaweed) -> None:
        super().__init__(supervisor, spec)
        self.access = store.access
        self.port = urlsplit(store.access.endpoint).port or 0


class Servers:
    """Starts servers over one folder; a context manager that stops them all.

    Args:
        folder: logs, ports and data. The same folder later means the same ports and objects.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.supervisor = Supervisor()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.supervisor.close()

    def iotcore(self, name: str = "iotcore", settings: IotcoreSettings | None = None, **changes: Any) -> BrokerServer:
        """`changes` replace fields of its `ChildSpec`."""
        ports = self._ports(name, Iotcore.PORTS)
        broker = Iotcore(self._part(name), log=self._log(name), ports=ports, settings=settings)
        spec = msgspec.structs.replace(broker.spec(), **changes)
        return BrokerServer(self.supervisor, self._start(spec, name), broker)

    def mosquitto(self, name: str = "mosquitto", settings: MosquittoSettings | None = None) -> BrokerServer:
        """Fails with the remedy when mosquitto is not installed; a skipped test would prove nothing."""
        ports = self._ports(name, Mosquitto.PORTS)
        broker = Mosquitto(self._part(name), log=self._log(name), ports=ports, settings=settings)
        return BrokerServer(self.supervisor, self._start(broker.spec(), name), broker)

    def broker(self, kind: str) -> BrokerServer:
        """`iotcore` or `mosquitto`."""
        return {"iotcore": self.iotcore, "mosquitto": self.mosquitto}[kind]()

    def seaweed(self, name: str = "store", settings: SeaweedSettings | None = None) -> StoreServer:
        ports = self._ports(name, Seaweed.PORTS)
        store = Seaweed(self._part(name), log=self._log(name), ports=ports, settings=settings)
        return StoreServer(self.supervisor, self._start(store.spec(), name), store)

    def _ports(self, name: str, wanted: Mapping[str, int | None]) -> dict[str, int]:
        # No usual ports: tests of several workers, and what else runs on the machine, must not meet.
        book = PortBook(self.folder / "ports.json")
        claimed = book.claim({f"{name}.{port}": None for port in wanted})
        return {port: claimed[f"{name}.{port}"] for port in wanted}

    def _part(self, name: str) -> Path:
        part = self.folder / name
        part.mkdir(parents=True, exist_ok=True)
        return part

    def _log(self, name: str) -> Path:
        return self._part("logs") / f"{name}.log"

    def _start(self, spec: ChildSpec, name: str) -> ChildSpec:
        spec = msgspec.structs.replace(spec, name=name)
        self.supervisor.start([spec], START_TIMEOUT_S)
        return spec


def s3_client(access: StoreAccess, *, endpoint: str | None = None, secret: str | None = None, attempts: int = 1) -> Any:
    """A boto3 client; one attempt by default, so that a test sees every error."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint or access.endpoint,
        aws_access_key_id=access.key,
        aws_secret_access_key=secret or access.secret,
        region_name=access.region,
        config=Config(
            retries={"total_max_attempts": attempts},
            connect_timeout=5,
            read_timeout=15,
            proxies={},
            s3={"addressing_style": "path"},
        ),
    )


class MqttClient:
    """A paho client with its answers in queues; a context manager.

    Args:
        url: `mqtt://host:port`.
        name: the client id.
        mqtt5: else 3.1.1.
        options: further arguments of `connect`: `keepalive`, `clean_start`, `properties` (of CONNECT).
        will: arguments of `will_set`.
    """

    def __init__(
        self, url: str, name: str, *, mqtt5: bool = True, will: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.messages: queue.SimpleQueue[mqtt.MQTTMessage] = queue.SimpleQueue()
        self.disconnected = threading.Event()
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            protocol=mqtt.MQTTv5 if mqtt5 else mqtt.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=options.pop("manual_ack", False),
        )
        if will is not None:
            self.client.will_set(**will)
        self._connected = threading.Event()
        self._subscribed: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self.session_present = False
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = lambda *_: self.disconnected.set()
        self.client.on_subscribe = lambda _c, _u, _m, codes, _p: self._subscribed.put(codes)
        self.client.on_message = lambda _c, _u, message: self.messages.put(message)
        parts = urlsplit(url)
        self.client.connect(parts.hostname or "", parts.port or 1883, **{"keepalive": 30, **options})
        self.client.loop_start()
        assert self._connected.wait(PATIENCE_S), f"{name}: no CONNACK from {url}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def subscribe(self, topic: str, qos: int = 1) -> None:
        self.client.subscribe(topic, qos=qos)
        codes = self._subscribed.get(timeout=PATIENCE_S)
        assert not any(code.is_failure for code in codes), codes

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, properties: Properties | None = None
    ) -> None:
        """Publish and wait for the broker's PUBACK."""
        info = self.client.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        info.wait_for_publish(PATIENCE_S)
        assert info.is_published(), f"no PUBACK for {topic}"

    def receive(self, timeout_s: float = PATIENCE_S) -> mqtt.MQTTMessage:
        try:
            return self.messages.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no message within {timeout_s:g} s") from None

    def receive_until(self, last: bytes) -> list[mqtt.MQTTMessage]:
        """All messages up to and with the one whose payload is `last`; that is how a test knows that no more come."""
        found = [self.receive()]
        while found[-1].payload != last:
            found.append(self.receive())
        return found

    def vanish(self) -> None:
        """Reset the connection without a DISCONNECT, as a device does that loses power behind a router."""
        connection = self.client.socket()
        assert connection is not None
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        assert self.disconnected.wait(PATIENCE_S)
        self.client.loop_stop()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _on_connect(self, _c: mqtt.Client, _u: object, flags: Any, code: Any, _p: object) -> None:
        assert not code.is_failure, code
        self.session_present = flags.session_present
        self._connected.set()


def connect_properties(**values: int) -> Properties:
    """Properties of a CONNECT, such as `SessionExpiryInterval=60`."""
    properties = Properties(PacketTypes.CONNECT)
    for name, value in values.items():
        setattr(properties, name, value)
    return properties
