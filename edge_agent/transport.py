"""The uplink's port to a broker, and its implementation over paho-mqtt.

One connection is one attempt: it becomes ready, or is lost, and is never used again. Everything that the network says
arrives as a `Signal` in the uplink's inbox; nothing else runs in the network thread.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeAlias

import structlog
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from contract.broker import BrokerAddress
from contract.errors import ConfigurationError
from contract.limits import CONTROL_BYTES_MAX, DEFAULT_LIMITS, ENVELOPE_BYTES_MAX
from edge_agent.inbox import Inbox
from edge_agent.settings import BrokerSettings, Secret

_log = structlog.get_logger()

PACKET_OVERHEAD_BYTES_MAX = 1024
"""More than the header, topic and properties of a PUBLISH of ours can take."""
PACKET_BYTES_MAX = DEFAULT_LIMITS.payload_bytes_max + ENVELOPE_BYTES_MAX + PACKET_OVERHEAD_BYTES_MAX
PUBLISHES_MAX = 256
"""Publishes on the way to the broker without its PUBACK; beyond it the uplink waits."""
PUBLISHES_BYTES_MAX = 512 * 1024
"""Their payloads; one always may be. Enough for 5 MB/s over a line of 100 ms. On a slow one more would only be memory,
stand in the way of fresh data, and keep the answer to a ping behind it until the keepalive has run out."""
_LOOP_S = 1.0


class LossCause(StrEnum):
    """Why a connection ended or never began; the values stand in metrics and events."""

    UNREACHABLE = "unreachable"
    TLS = "tls"
    CREDENTIALS = "credentials"
    NOT_AUTHORISED = "not_authorised"
    REFUSED = "refused"
    TAKEN_OVER = "taken_over"
    """Another client connected with this device's id."""
    TIMEOUT = "timeout"
    LOST = "lost"
    FAULT = "fault"
    """An error of our own, or of a library's, ended the network thread."""


class Ready(NamedTuple):
    """Connected, and subscribed to everything; what the broker had retained was received before."""

    payload_bytes_max: int
    """Largest payload that the broker takes."""


class Lost(NamedTuple):
    """The connection is over."""

    cause: LossCause
    detail: str


class Received(NamedTuple):
    """A message on one of the subscribed topics."""

    topic: str
    payload: bytes


class PublishRefused(NamedTuple):
    """The broker answered messages with a refusal: an access rule or a quota."""

    messages: int
    reason: str


Signal: TypeAlias = Ready | Lost | Received | PublishRefused


class Will(NamedTuple):
    """What the broker publishes, retained, when the connection breaks."""

    topic: str
    payload: bytes


class Connection(Protocol):
    """One attempt to be connected."""

    @property
    def finished(self) -> bool:
        """Whether its thread has ended."""

    @property
    def unanswered(self) -> int:
        """Messages handed over that the broker has not answered yet; it answers in the order of handing over."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over a message, QoS 1; False when there is no room now or the connection is over. Never waits."""

    def abandon(self) -> None:
        """End it at once, without a farewell: the broker sends the last will. Never waits."""

    def close(self, timeout_s: float) -> None:
        """Wait until everything handed over is with the broker, say goodbye, and end; after `timeout_s` in any case."""


SignalBox: TypeAlias = "Inbox[tuple[Connection, Signal]]"


class Transport(Protocol):
    """A way to reach the broker."""

    @property
    def attempt_timeout_s(self) -> float:
        """An attempt that is not ready after this time will not become so."""

    def connect(self, will: Will, topics: Sequence[str], inbox: SignalBox) -> Connection:
        """Begin an attempt; it says in `inbox` how it went."""


class PahoTransport:
    """Connections through paho-mqtt.

    Args:
        settings: where the broker is, and how to prove who we are.
        device: the MQTT client id.
        secret: the password, asked for again at each attempt, so that a changed file is noticed.
    """

    def __init__(self, settings: BrokerSettings, device: str, secret: Secret) -> None:
        self._settings, self._device, self._secret = settings, device, secret
        self._address = BrokerAddress.parse(settings.url)

    @property
    def attempt_timeout_s(self) -> float:
        """Three times the timeout of one step: TCP, TLS, and the broker's answers."""
        return 3 * self._settings.connect_timeout_s

    def connect(self, will: Will, topics: Sequence[str], inbox: SignalBox) -> Connection:
        """Begin an attempt in a thread of its own: name look-up, TCP and TLS may each take seconds."""
        connection = PahoConnection(self._settings, self._address, self._device, self._secret, will, topics, inbox)
        connection.start()
        return connection


class PahoConnection:
    """One paho client, one socket, one thread."""

    def __init__(
        self,
        settings: BrokerSettings,
        address: BrokerAddress,
        device: str,
        secret: Secret,
        will: Will,
        topics: Sequence[str],
        inbox: SignalBox,
    ) -> None:
        self._settings, self._address, self._device, self._secret = settings, address, device, secret
        # Its own status too: what is retained there tells whether another client has used this name meanwhile. Most
        # brokers do not say so when they end a connection for it. Not last: it has to be here before `Ready`.
        self._will, self._topics, self._inbox = will, [topics[0], will.topic, *topics[1:]], inbox
        self._v5 = settings.mqtt5
        self._client = self._make_client()
        self._pending: deque[int] = deque()
        """Bytes of each message that the broker has not answered, the oldest first."""
        self._pending_bytes = 0
        self._starved = False
        self._settled = threading.Condition()
        self._refused = PublishRefused(0, "")
        self._over = False
        self._lost: Lost | None = None
        self._said_lost = False
        self._connacked = False
        self._granted = False
        self._publishes_max = PUBLISHES_MAX
        self._payload_bytes_max = DEFAULT_LIMITS.payload_bytes_max
        self._thread = threading.Thread(target=self._run, name="uplink-network", daemon=True)

    def start(self) -> None:
        """Begin the attempt."""
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether its thread has ended."""
        return not self._thread.is_alive()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over a message, QoS 1; False when there is no room now or the connection is over."""
        with self._settled:
            if self._over or not self._granted:
                return False
            too_much = self._pending and self._pending_bytes + len(payload) > PUBLISHES_BYTES_MAX
            if too_much or len(self._pending) >= self._publishes_max:
                self._starved = True
                return False
            self._pending.append(len(payload))
            self._pending_bytes += len(payload)
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
            return True
        self._unpend()
        return False

    @property
    def unanswered(self) -> int:
        """Messages that the broker has not answered."""
        return len(self._pending)

    def abandon(self) -> None:
        """End it at once, without a farewell."""
        self._end()
        sock = self._client.socket()
        if sock is not None:
            try:
                # Only shut down, not closed: the network thread may be waiting on it, and shall find it readable.
                sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
            except OSError:
                pass  # it was down already

    def close(self, timeout_s: float) -> None:
        """Wait until everything handed over is with the broker, say goodbye, and end; after `timeout_s` in any case."""
        deadline_s = time.monotonic() + timeout_s
        with self._settled:
            self._settled.wait_for(lambda: not self._pending or self._over, timeout_s)
        self._client.disconnect()
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        self.abandon()

    # Below here everything runs in the network thread.

    def _run(self) -> None:
        try:
            self._connect()
            while not self._over and self._client.loop(_LOOP_S) == MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._report_refusals()
        except ConfigurationError as error:
            self._say_lost(LossCause.CREDENTIALS, str(error))
        except ssl.SSLError as error:
            self._say_lost(LossCause.TLS, f"{_named(error)}; check ca_file, and that the name in url is the server's")
        except OSError as error:
            self._say_lost(LossCause.UNREACHABLE, _named(error))
        except Exception as error:  # noqa: BLE001 - the thread must not die unseen, whatever a library raises
            _log.exception("uplink_network_fault")
            self._say_lost(LossCause.FAULT, _named(error))
        self._end()
        self._say_lost(*self._verdict())
        self._let_go()

    def _let_go(self) -> None:
        """Break the circle between client and callbacks: its sockets shall close with it, not whenever gc comes by."""
        client = self._client
        client.on_connect = client.on_subscribe = client.on_message = None
        client.on_publish = client.on_disconnect = None

    def _connect(self) -> None:
        settings, client = self._settings, self._client
        if settings.username:
            client.username_pw_set(settings.username, self._secret())
        if self._address.tls:
            client.tls_set_context(settings.tls_context())
        client.connect_timeout = settings.connect_timeout_s
        if self._v5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            # Documents above their limit stay in the broker instead of this device's memory.
            properties.MaximumPacketSize = 2 * CONTROL_BYTES_MAX
            host, port = self._address.host, self._address.port
            client.connect(host, port, settings.keepalive_s, clean_start=True, properties=properties)
        else:
            client.connect(self._address.host, self._address.port, settings.keepalive_s)

    def _make_client(self) -> Client:
        protocol = MQTTProtocolVersion.MQTTv5 if self._v5 else MQTTProtocolVersion.MQTTv311
        client = Client(
            CallbackAPIVersion.VERSION2, client_id=self._device, protocol=protocol, reconnect_on_failure=False
        )
        client.will_set(self._will.topic, self._will.payload, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = _no_delay
        # With this callback set, `publish` only queues and rings the network thread; otherwise paho would write to the
        # socket from the calling thread, in between the packets of the other.
        client.on_socket_register_write = _leave_it_to_the_loop
        client.max_inflight_messages_set(0)  # bounded here, by what the broker says when it accepts the connection
        return client

    def _on_connect(
        self, client: Client, userdata: object, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._connacked = True
        if reason.is_failure:
            self._lost = _refused(reason)
            return
        # MQTT 5, 3.2.2.3: what the broker allows; absent means the protocol's own maximum.
        self._publishes_max = min(getattr(properties, "ReceiveMaximum", 65_535), PUBLISHES_MAX)
        packet_bytes_max = getattr(properties, "MaximumPacketSize", PACKET_BYTES_MAX)
        self._payload_bytes_max = min(packet_bytes_max, PACKET_BYTES_MAX) - PACKET_OVERHEAD_BYTES_MAX
        self._subscribe_next()

    def _subscribe_next(self) -> None:
        # One filter after the other, the acknowledgements first: a broker answers in order, so that all it had retained
        # for one filter is here before the next is granted.
        self._client.subscribe(self._topics[0], qos=1)

    def _on_subscribe(
        self, client: Client, userdata: object, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        topic = self._topics.pop(0)
        if any(reason.is_failure for reason in reasons) and topic != self._will.topic:
            self._lost = Lost(
                LossCause.NOT_AUTHORISED,
                f"the broker refuses the subscription to {topic} ({reasons[0]}); allow this device to read it",
            )
            client.disconnect()
        elif self._topics:
            self._subscribe_next()
        else:
            self._granted = True
            self._say(Ready(self._payload_bytes_max))

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        self._say(Received(message.topic, bytes(message.payload)))

    def _on_publish(
        self, client: Client, userdata: object, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        # paho holds a lock here that `publish` needs: nothing in this callback may wait.
        self._unpend()
        if reason.is_failure:
            self._refused = PublishRefused(self._refused.messages + 1, str(reason))

    def _on_disconnect(
        self,
        client: Client,
        userdata: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if self._lost is None and self._connacked:
            self._lost = _disconnected(reason, by_broker=flags.is_disconnect_packet_from_server)

    def _report_refusals(self) -> None:
        if self._refused.messages:
            refused, self._refused = self._refused, PublishRefused(0, "")
            self._say(refused)

    def _verdict(self) -> Lost:
        if self._lost is not None:
            return self._lost
        # Some brokers answer wrong credentials with silence.
        return Lost(
            LossCause.REFUSED,
            f"{self._address} ended the connection before it accepted it; "
            "check username, password, protocol version and port; or is a captive portal in its place?",
        )

    def _unpend(self) -> None:
        with self._settled:
            if self._pending:
                self._pending_bytes -= self._pending.popleft()
            starved, self._starved = self._starved, False
            if not self._pending:
                self._settled.notify_all()
        if starved:
            self._inbox.wake()

    def _say(self, signal: Signal) -> None:
        if not self._over:
            self._inbox.post((self, signal))

    def _say_lost(self, cause: LossCause, detail: str) -> None:
        """Say it once, as the last thing."""
        if not self._said_lost:
            self._said_lost = True
            self._inbox.post((self, Lost(cause, detail)))

    def _end(self) -> None:
        with self._settled:
            self._over = True
            self._settled.notify_all()


def _no_delay(client: Client, userdata: object, sock: object) -> None:
    """Small packets leave at once (TCP_NODELAY): an acknowledgement that waits for company delays the next batch."""
    assert isinstance(sock, socket.socket)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_it_to_the_loop(client: Client, userdata: object, sock: object) -> None:
    """Nothing to do: the network thread sees by itself that there is something to write."""


def _refused(reason: ReasonCode) -> Lost:
    """What a refusing CONNACK means (MQTT 5, 3.2.2.2; the codes of 3.1.1 are translated by paho)."""
    if reason.value == 0x86:
        return Lost(LossCause.CREDENTIALS, f"the broker says: {reason}; check username and password_file")
    if reason.value == 0x87:
        return Lost(LossCause.NOT_AUTHORISED, f"the broker says: {reason}; allow this device id to connect")
    if reason.value == 0x84:
        return Lost(LossCause.REFUSED, f"the broker says: {reason}; try the other value of protocol")
    return Lost(LossCause.REFUSED, f"the broker says: {reason}")


def _disconnected(reason: ReasonCode, *, by_broker: bool) -> Lost:
    """What the end of an established connection means (MQTT 5, 3.14.2.1)."""
    if not by_broker:
        cause = LossCause.TIMEOUT if reason.value == 0x8D else LossCause.LOST
        return Lost(cause, "the connection broke" if cause is LossCause.LOST else "the broker stopped answering")
    if reason.value == 0x8E:
        return Lost(
            LossCause.TAKEN_OVER,
            "another client connected with this device's id; give each device its own (a copied SD card?)",
        )
    if reason.value == 0x87:
        return Lost(LossCause.NOT_AUTHORISED, f"the broker says: {reason}; allow this device id its topics")
    return Lost(LossCause.LOST, f"the broker says: {reason}")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
