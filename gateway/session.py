"""One connection of the gateway over paho-mqtt, for all that it says, and what it hears beside batches."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from contract.broker import BrokerAddress
from contract.errors import ConfigurationError
from gateway.mqtt import (
    BROKE,
    NOT_ACCEPTED,
    NOT_ANSWERED,
    PACKET_BYTES_MAX,
    UNACKED_MAX,
    Owner,
    not_accepted,
    not_granted,
    why,
)
from gateway.settings import BrokerSettings

INFLIGHT_MAX = 10
"""Publishes of QoS 1 sent without their PUBACK; the others wait inside paho."""
_LOOP_S = 0.5


class Session:
    """One paho client, one socket (`gateway.mqtt.Attempt`)."""

    def __init__(
        self, settings: BrokerSettings, address: BrokerAddress, client_id: str, filters: Sequence[str], owner: Owner
    ) -> None:
        self._settings, self._address, self._filters, self._owner = settings, address, filters, owner
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
        client.on_message = self._on_message
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
                    return NOT_ANSWERED
        except (ConfigurationError, OSError, ValueError) as error:
            return why(error)
        except Exception as error:  # noqa: BLE001 - a packet that paho chokes on costs the connection, not the process
            self._owner.stumbled(error)
            return f"unexpected {type(error).__name__}: {error}"
        finally:
            self._end()
        return self._refusal or (BROKE if self._connacked else NOT_ACCEPTED)

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
            self._refusal = not_accepted(str(reason))
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
            self._refusal = not_granted(refused[0])
            client.disconnect()
        else:
            self._become_ready()

    def _become_ready(self) -> None:
        with self._lock:
            self.ready, self.ready_at_s = True, time.monotonic()
        self._owner.is_ready()

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = bytes(message._topic).decode(errors="replace")
        self._owner.arrived(topic, bytes(message.payload))

    def _on_publish(
        self, client: Client, userdata: object, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        # paho holds a lock here that `publish` needs: nothing in this callback may wait.
        self._settle_one()
        if reason.is_failure:
            self._owner.refused(str(reason), first=not self._told_refusal)
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
