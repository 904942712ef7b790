"""One connection of the gateway that only listens: batches, at a seventh of what paho takes for a message.

paho reads each packet in five system calls and rings a bell to itself for every PUBACK; under load each of them hands
the interpreter to another thread. Here one read brings as many packets as have arrived, and one write answers them.
Packets other than PUBLISH are read and written by the codec `mqtt5`; PUBLISH is taken apart by hand (MQTT 5.0, section
3.3), because the codec panics at a topic that is no UTF-8.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mqtt5

from contract.broker import BrokerAddress
from contract.errors import ConfigurationError
from gateway.mqtt import (
    BROKE,
    NOT_ACCEPTED,
    NOT_ANSWERED,
    PACKET_BYTES_MAX,
    Owner,
    not_accepted,
    not_granted,
    why,
)
from gateway.settings import BrokerSettings

READ_BYTES = 256 * 1024
"""What one read may bring; the buffer grows while a larger packet arrives, and shrinks again after it."""
_LOOP_S = 0.25
_PUBLISH = 0x30
_SUBSCRIBE_ID = 1
_PING = mqtt5.PingReqPacket().write()


class Published(NamedTuple):
    """A PUBLISH packet, taken apart."""

    topic: bytes
    payload: bytes
    packet_id: int | None
    """None with QoS 0, which nobody acknowledges."""


class Malformed(ValueError):
    """The broker sent what is no MQTT 5 packet."""


class Intake:
    """One socket that listens (`gateway.mqtt.Attempt`)."""

    def __init__(
        self, settings: BrokerSettings, address: BrokerAddress, client_id: str, filters: Sequence[str], owner: Owner
    ) -> None:
        self._settings, self._address, self._client_id = settings, address, client_id
        self._filters, self._owner = filters, owner
        self.ready = False
        self.ready_at_s: float | None = None
        self.unacked = 0
        self._connacked = False
        self._refusal = ""
        self._answers: list[bytes] = []
        self._sent_s = 0.0

    def run(self, stopping: threading.Event, beat: Callable[[], None]) -> str:
        """See `Attempt.run`."""
        try:
            sock = self._open()
        except (ConfigurationError, OSError, ValueError) as error:
            return why(error)
        try:
            with sock:
                self._serve(sock, stopping, beat)
        except (OSError, Malformed) as error:
            return self._refusal or why(error)
        except Exception as error:  # noqa: BLE001 - a handler's fault costs the connection, not the process
            self._owner.stumbled(error)
            return f"unexpected {type(error).__name__}: {error}"
        finally:
            self.ready = False
        return self._refusal or (BROKE if self._connacked else NOT_ACCEPTED)

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool) -> bool:
        """Nothing leaves here but acknowledgements: always False."""
        return False

    def close(self, timeout_s: float) -> None:
        """Nothing to wait for: `run` ends by itself soon."""

    def _open(self) -> socket.socket:
        settings, address = self._settings, self._address
        password = settings.read_password() if settings.username else None
        hello = mqtt5.ConnectPacket(
            self._client_id,
            username=settings.username or None,
            password=None if password is None else password.encode(),
            clean_start=True,
            keep_alive=settings.keepalive_s,
            max_packet_size=PACKET_BYTES_MAX,
        )
        context = settings.tls_context() if address.tls else None
        sock = socket.create_connection((address.host, address.port), settings.connect_timeout_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                sock = context.wrap_socket(sock, server_hostname=address.host)
            sock.settimeout(_LOOP_S)
            self._send(sock, hello.write())
        except BaseException:
            sock.close()
            raise
        return sock

    def _serve(self, sock: socket.socket, stopping: threading.Event, beat: Callable[[], None]) -> None:
        buffer, end = bytearray(READ_BYTES), 0
        began_s = heard_s = time.monotonic()
        while not self._refusal:
            beat()
            now_s = time.monotonic()
            if stopping.is_set():
                self._send(sock, mqtt5.DisconnectPacket().write())
                return
            if not self.ready and now_s - began_s > self._settings.connect_timeout_s:
                self._refusal = NOT_ANSWERED
                return
            self._keep_alive(sock, now_s, heard_s)
            try:
                size = sock.recv_into(memoryview(buffer)[end:])
            except TimeoutError:
                continue
            if size == 0:
                return
            heard_s, end = now_s, end + size
            used = self._take(memoryview(buffer)[:end])
            if self._answers:
                answers, self._answers = b"".join(self._answers), []
                self._send(sock, answers)
            buffer, end = _moved(buffer, used, end)

    def _keep_alive(self, sock: socket.socket, now_s: float, heard_s: float) -> None:
        keepalive_s = self._settings.keepalive_s
        if now_s - heard_s > 1.5 * keepalive_s:
            raise TimeoutError(f"nothing came from the broker for {now_s - heard_s:.0f} s")
        if self._connacked and now_s - self._sent_s > keepalive_s / 2:
            self._send(sock, _PING)

    def _send(self, sock: socket.socket, data: bytes) -> None:
        sock.sendall(data)  # a broker that takes nothing for _LOOP_S though its buffers hold megabytes is left
        self._sent_s = time.monotonic()

    def _take(self, view: memoryview) -> int:
        """Act on the packets in front; how many bytes they took."""
        at, end = 0, len(view)
        while at < end and not self._refusal:
            head = packet_size(view[at:])
            if head is None or at + head[1] > end:
                break
            start, size = head
            packet = view[at : at + size]
            at += size
            if packet[0] & 0xF0 == _PUBLISH:
                message = published(packet, start)
                self._owner.arrived(message.topic.decode(errors="replace"), message.payload)
                if message.packet_id is not None:
                    self._answers.append(mqtt5.PubAckPacket(message.packet_id).write())
            else:
                self._handle(_read(packet))
        return at

    def _handle(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.ConnAckPacket):
            if packet.reason_code != mqtt5.ConnAckReasonCode.SUCCESS:
                self._refusal = not_accepted(_said(packet.reason_code.name, packet.reason_str))
                return
            self._connacked = True
            filters = [mqtt5.TopicFilter(topic, max_qos=mqtt5.QoS.AT_LEAST_ONCE) for topic in self._filters]
            self._answers.append(mqtt5.SubscribePacket(_SUBSCRIBE_ID, filters).write())
        elif isinstance(packet, mqtt5.SubAckPacket):
            granted = zip(self._filters, packet.reason_codes, strict=True)
            if refused := [topic for topic, code in granted if int(code) >= 0x80]:
                self._refusal = not_granted(refused[0])
                return
            self.ready, self.ready_at_s = True, time.monotonic()
            self._owner.is_ready()
        elif isinstance(packet, mqtt5.DisconnectPacket):
            self._refusal = f"the broker says: {_said(packet.reason_code.name, packet.reason_str)}"


def packet_size(view: memoryview) -> tuple[int, int] | None:
    """Where a packet's variable header begins and how long the whole packet is; None where that has not arrived yet.

    Raises:
        Malformed: its length is none, or beyond what the broker was told that we take.
    """
    length = shift = 0
    for at in range(1, min(len(view), 5)):
        length |= (view[at] & 0x7F) << shift
        shift += 7
        if view[at] < 0x80:
            if length > PACKET_BYTES_MAX:
                raise Malformed(f"a packet of {length} bytes from the broker, which was told {PACKET_BYTES_MAX}")
            return at + 1, at + 1 + length
    if len(view) >= 5:
        raise Malformed("a packet from the broker has a length of more than four bytes; is this an MQTT 5 broker?")
    return None


def published(packet: memoryview, start: int) -> Published:
    """Take a whole PUBLISH packet apart (MQTT 5.0, section 3.3); its properties say nothing that a batch needs.

    Args:
        packet: all of it.
        start: where its variable header begins.

    Raises:
        Malformed: its parts do not fit into it.
    """
    try:
        qos = packet[0] >> 1 & 3
        topic_ends = start + 2 + int.from_bytes(packet[start : start + 2], "big")
        properties = topic_ends + (2 if qos else 0)
        length = shift = 0
        for at in range(properties, properties + 4):
            length |= (packet[at] & 0x7F) << shift
            shift += 7
            if packet[at] < 0x80:
                break
        else:
            raise Malformed("a PUBLISH packet whose properties have no length")
        begin = at + 1 + length
        if qos == 3 or begin > len(packet):
            raise Malformed(f"a PUBLISH packet of {len(packet)} bytes with QoS {qos} and {length} bytes of properties")
    except IndexError as error:
        raise Malformed(f"a PUBLISH packet of {len(packet)} bytes ends before its payload begins") from error
    packet_id = int.from_bytes(packet[topic_ends:properties], "big") if qos else None
    return Published(bytes(packet[start + 2 : topic_ends]), bytes(packet[begin:]), packet_id)


def _read(packet: memoryview) -> mqtt5.Packet:
    try:
        return mqtt5.read(packet)[0]
    except (ValueError, IndexError) as error:
        raise Malformed(f"the broker sent what is not MQTT 5: {error}") from error


def _moved(buffer: bytearray, used: int, end: int) -> tuple[bytearray, int]:
    """The buffer with what is left of it in front, and room behind: twice as large where a packet fills it."""
    left = end - used
    if left == len(buffer):
        # Not extend: it fails while somebody, such as the frames of an exception, still has a view of the buffer.
        return buffer + bytes(len(buffer)), left
    if len(buffer) > READ_BYTES and left < READ_BYTES:
        return bytearray(buffer[used:end]).ljust(READ_BYTES, b"\0"), left
    if used:
        buffer[:left] = buffer[used:end]
    return buffer, left


def _said(name: str, text: str | None) -> str:
    plain = name.replace("_", " ").capitalize()
    return f"{plain}: {text}" if text else plain
