"""A lasting connection to the broker over paho-mqtt: connects, subscribes, and after every loss begins anew.

Nothing that matters is kept here: what is on the way when a connection breaks is lost, and sent again by who owns it.
"""

from __future__ import annotations

import random
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from contract.backoff import Backoff
from contract.broker import BrokerAddress
from contract.errors import ConfigurationError
from contract.limits import DEFAULT_LIMITS
from gateway.metrics import GatewayMetrics
from gateway.settings import BrokerSettings
from gateway.watch import WatchedThread

_log = structlog.get_logger()

UNACKED_MAX = 2_000
"""Publishes on the way to the broker without its answer; beyond, `publish` says no."""
INFLIGHT_MAX = 10
"""Publishes of QoS 1 sent without their PUBACK; the others wait inside paho."""
PACKET_BYTES_MAX = 2 * DEFAULT_LIMITS.payload_bytes_max
"""Larger packets stay with the broker. Twice the limit: what is a little too large arrives, and its refusal is told."""
STABLE_S = 10.0
"""A connection that lasted this long was a good one: the next attempt begins without backoff."""
_LOOP_S = 0.5


class MessageHandler(Protocol):
    """Takes messages, in the network thread. Must not raise."""

    def __call__(self, topic: str, payload: bytes) -> None:
        """One message; `topic` with what is no UTF-8 replaced."""


class Link:
    """One role's connection to the broker, in a thread of its own. `publish` and the properties may be used from any.

    Args:
        settings: where the broker is, and how to prove who we are.
        role: part of the client id, of the thread's name and of metric labels, e.g. `ingress`.
        replica: part of the client id.
        filters: topics to subscribe to, QoS 1.
        on_message: takes what arrives.
        on_ready: called in the network thread each time a connection is made and all subscriptions are granted.
        metrics: counters.
        rng: jitter.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        role: str,
        replica: int,
        filters: Sequence[str],
        on_message: MessageHandler,
        on_ready: Callable[[], None],
        metrics: GatewayMetrics,
        rng: random.Random,
    ) -> None:
        self.role = role
        self._settings = settings
        self._address = BrokerAddress.parse(settings.url)
        # A part drawn anew by each process: two of the same replica would throw each other out for ever.
        self._client_id = f"{settings.client_id_prefix}-{replica}-{secrets.token_hex(4)}-{role}"
        self._filters = list(filters)
        self._on_message, self._on_ready = on_message, on_ready
        self._metrics = metrics
        self._backoff = Backoff(settings.reconnect_base_s, settings.reconnect_max_s, rng)
        self._attempt: _Attempt | None = None
        self._stopping = threading.Event()
        self._down_since_s = time.monotonic()
        self._trouble = "not connected yet"
        self._was_ready = False
        self.thread = WatchedThread(f"mqtt-{role}", self._run)

    @property
    def connected(self) -> bool:
        """Whether messages arrive and leave now."""
        attempt = self._attempt
        return attempt is not None and attempt.ready

    @property
    def was_connected(self) -> bool:
        """Whether there ever was a connection."""
        return self._was_ready

    @property
    def trouble(self) -> str:
        """Why there is no connection; empty when there is one."""
        return "" if self.connected else self._trouble

    @property
    def down_s(self) -> float:
        """Seconds without a connection; 0 while there is one."""
        return 0.0 if self.connected else time.monotonic() - self._down_since_s

    @property
    def unacked(self) -> int:
        """Publishes on the way to the broker."""
        attempt = self._attempt
        return 0 if attempt is None else attempt.unacked

    def start(self) -> None:
        """Begin to connect, and go on for ever."""
        self.thread.start()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Hand over a message; False when there is no connection, or no room. Never waits."""
        attempt = self._attempt
        if attempt is not None and attempt.publish(topic, payload, qos, retain):
            return True
        self._metrics.unpublished.labels(self.role).inc()
        return False

    def close(self, timeout_s: float) -> bool:
        """Wait until the broker has what was handed over, say goodbye, and end; False when that took too long."""
        deadline_s = time.monotonic() + timeout_s
        self._stopping.set()
        attempt = self._attempt
        if attempt is not None:
            attempt.close(timeout_s)
        return self.thread.join(max(0.1, deadline_s - time.monotonic()))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._metrics.broker_connects.labels(self.role).inc()
            attempt = self._attempt = _Attempt(self._settings, self._address, self._client_id, self._filters, self)
            began_s = time.monotonic()
            trouble = attempt.run(self._stopping, self.thread.beat)
            if attempt.ready_at_s is not None:
                self._down_since_s = time.monotonic()
            self._attempt = None
            if self._stopping.is_set():
                return
            self._trouble = trouble
            self._metrics.broker_losses.labels(self.role).inc()
            _log.warning("broker_lost", role=self.role, broker=str(self._address), why=trouble)
            stable = attempt.ready_at_s is not None and time.monotonic() - began_s >= STABLE_S
            if stable:
                self._backoff.reset()
            self.thread.rest()
            self._stopping.wait(self._backoff.next_delay_s())
            self.thread.beat()

    def arrived(self, message: MQTTMessage) -> None:
        """For the connection: a message is here."""
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = bytes(message._topic).decode(errors="replace")
        self._on_message(topic, bytes(message.payload))

    def refused(self, reason: ReasonCode, *, first: bool) -> None:
        """For the connection: the broker answered a publish with a refusal."""
        self._metrics.publishes_refused.labels(self.role).inc()
        if first:
            _log.error(
                "publish_refused",
                role=self.role,
                reason=str(reason),
                remedy="allow this gateway to publish hw/v1/ack/+, hw/v1/rewind/+, hw/v1/desired/+, hw/v1/assign/+",
            )

    def stumbled(self, error: Exception) -> None:
        """For the connection: an error of ours or of the library."""
        self._metrics.faults.labels(f"mqtt-{self.role}").inc()
        _log.error("mqtt_fault", role=self.role, exc_info=error)

    def is_ready(self) -> None:
        """For the connection: everything is subscribed."""
        self._was_ready = True
        _log.info("broker_connected", role=self.role, broker=str(self._address), client_id=self._client_id)
        self._on_ready()


class _Attempt:
    """One paho client, one socket; never used again after it ended."""

    def __init__(
        self, settings: BrokerSettings, address: BrokerAddress, client_id: str, filters: Sequence[str], link: Link
    ) -> None:
        self._settings, self._address, self._filters, self._link = settings, address, filters, link
        self._lock = threading.Condition()
        self.ready = False
        self.ready_at_s: float | None = None
        self.unacked = 0
        self._closing = False
        self._connacked = False
        self._refusal = ""
        self._told_refusal = False
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = lambda _client, _userdata, message: link.arrived(message)
        client.on_publish = self._on_publish
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = _no_delay
        # With this callback set, `publish` only queues and rings the network thread; otherwise paho would write to the
        # socket from the calling thread.
        client.on_socket_register_write = _leave_it_to_the_loop
        client.max_queued_messages_set(2 * UNACKED_MAX)
        self._client = client

    def run(self, stopping: threading.Event, beat: Callable[[], None]) -> str:
        """Connect and serve until the connection ends; returns why."""
        client = self._client
        try:
            self._connect()
            began_s = time.monotonic()
            while client.loop(_LOOP_S) == MQTTErrorCode.MQTT_ERR_SUCCESS:
                beat()
                if stopping.is_set() and not self._closing:
                    client.disconnect()
                if not self.ready and time.monotonic() - began_s > self._settings.connect_timeout_s:
                    return "the broker took the connection and did not answer; is this an MQTT 5 broker?"
        except ConfigurationError as error:
            return str(error)
        except ssl.SSLError as error:
            return f"TLS: {error}; check ca_file, and that the name in url is the server's"
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - a packet that paho chokes on costs the connection, not the process
            self._link.stumbled(error)
            return f"unexpected {type(error).__name__}: {error}"
        finally:
            self._end()
        return self._refusal or (
            "the connection broke"
            if self._connacked
            else "the broker ended the connection before it accepted it; check username, password_file and port"
        )

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool) -> bool:
        """Hand over a message; False when there is no room now or the connection is over."""
        with self._lock:
            if not self.ready or self.unacked >= UNACKED_MAX:
                return False
            self.unacked += 1
        if self._client.publish(topic, payload, qos=qos, retain=retain).rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
            return True
        self._settle_one()
        return False

    def close(self, timeout_s: float) -> None:
        """Wait until the broker has everything, then say goodbye."""
        with self._lock:
            self._closing = True
            self._lock.wait_for(lambda: self.unacked == 0 or not self.ready, timeout_s)
        self._client.disconnect()

    def _connect(self) -> None:
        settings, client = self._settings, self._client
        if settings.username:
            client.username_pw_set(settings.username, settings.read_password())
        if self._address.tls:
            client.tls_set_context(settings.tls_context())
        client.connect_timeout = settings.connect_timeout_s
        # paho cannot change this once connected, when the broker has said how many it takes: no broker takes fewer.
        client.max_inflight_messages_set(INFLIGHT_MAX)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = PACKET_BYTES_MAX
        client.connect(
            self._address.host, self._address.port, settings.keepalive_s, clean_start=True, properties=properties
        )

    def _on_connect(
        self, client: Client, userdata: object, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._refusal = f"the broker says: {reason}; check username, password_file and the broker's access rules"
            client.disconnect()
            return
        self._connacked = True
        if self._filters:
            client.subscribe([(topic, 1) for topic in self._filters])
        else:
            self._become_ready()

    def _on_subscribe(
        self, client: Client, userdata: object, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        refused = [topic for topic, reason in zip(self._filters, reasons, strict=True) if reason.is_failure]
        if refused:
            self._refusal = f"the broker refuses the subscription of {refused[0]}; allow this gateway to read it"
            client.disconnect()
        else:
            self._become_ready()

    def _become_ready(self) -> None:
        with self._lock:
            self.ready, self.ready_at_s = True, time.monotonic()
        self._link.is_ready()

    def _on_publish(
        self, client: Client, userdata: object, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        # paho holds a lock here that `publish` needs: nothing in this callback may wait.
        self._settle_one()
        if reason.is_failure:
            self._link.refused(reason, first=not self._told_refusal)
            self._told_refusal = True

    def _on_disconnect(
        self,
        client: Client,
        userdata: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if flags.is_disconnect_packet_from_server and not self._refusal:
            self._refusal = f"the broker says: {reason}"
        self._end()

    def _settle_one(self) -> None:
        with self._lock:
            self.unacked -= 1
            if self.unacked == 0:
                self._lock.notify_all()

    def _end(self) -> None:
        with self._lock:
            self.ready = False
            self._lock.notify_all()
        sock = self._client.socket()
        if sock is not None:
            sock.close()


def _no_delay(client: Client, userdata: object, sock: object) -> None:
    """Small packets leave at once (TCP_NODELAY): an acknowledgement that waits for company delays the next batch."""
    assert isinstance(sock, socket.socket)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_it_to_the_loop(client: Client, userdata: object, sock: object) -> None:
    """Nothing to do: the network thread sees by itself that there is something to write."""
