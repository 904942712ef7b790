"""A light MQTT 5 client: the sans-I/O codec `mqtt5` inside an asyncio protocol, a few microseconds a message.

It speaks what a simulated device needs and no more: QoS 1 out within the broker's receive maximum, subscriptions, a
last will, keepalive. One connection is one attempt; who wants another makes another.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import mqtt5

from contract.errors import TemporaryError
from contract.limits import CONTROL_BYTES_MAX

PACKET_BYTES_MAX = 2 * CONTROL_BYTES_MAX
"""Largest packet that is taken from the broker: it is told so, and a longer one ends the connection."""
UNACKED_MAX = 256
"""Publishes on the way to the broker without its PUBACK."""
KEEPALIVE_S = 60


class ConnectionFailed(TemporaryError):
    """The broker could not be reached, or refused. Try again later."""


class LightWill(NamedTuple):
    """What the broker publishes, retained, when the connection breaks."""

    topic: str
    payload: bytes


class Listener(Protocol):
    """Whom a connection tells what happens. Called in the event loop; must not wait."""

    def received(self, topic: str, payload: bytes) -> None:
        """A message on a subscribed topic."""

    def has_room(self) -> None:
        """`publish` may succeed again."""

    def lost(self, reason: str) -> None:
        """The connection is over, unasked."""


class LightConnection(asyncio.Protocol):
    """One connection. Make it with `connect`."""

    def __init__(self, listener: Listener, connect: mqtt5.ConnectPacket) -> None:
        self._listener = listener
        self._connect = connect
        self._transport: asyncio.Transport | None = None
        self._left = b""
        self._paused = False
        self._starved = False
        self._closing = False
        self._over = False
        self._free_ids: list[int] = []
        self._ids_max = 0
        self._outgoing: list[bytes] = []
        self._silent_ticks = 0
        loop = asyncio.get_running_loop()
        self._connacked: asyncio.Future[mqtt5.ConnAckPacket] = loop.create_future()
        self._granted: asyncio.Future[mqtt5.SubAckPacket] | None = None
        self.refusals = 0
        """Publishes that the broker answered with a refusal."""

    async def connacked(self) -> None:
        """Wait until the broker has accepted the connection.

        Raises:
            ConnectionFailed: it refused, with its reason, or went away.
        """
        answer = await self._connacked
        if answer.reason_code != mqtt5.ConnAckReasonCode.SUCCESS:
            reason = answer.reason_str or answer.reason_code.name.lower()
            raise ConnectionFailed(f"the broker refuses client {self._connect.client_id!r}: {reason}")
        self._ids_max = min(answer.receive_max, UNACKED_MAX)
        self._free_ids = list(range(self._ids_max, 0, -1))

    async def subscribe(self, topics: Sequence[str]) -> None:
        """Subscribe with QoS 1 and wait for the grant.

        Raises:
            ConnectionFailed: the broker refused one of them, or went away.
        """
        self._granted = asyncio.get_running_loop().create_future()
        filters = [mqtt5.TopicFilter(topic, max_qos=mqtt5.QoS.AT_LEAST_ONCE) for topic in topics]
        # An id of its own beyond those of the publishes.
        self._write(mqtt5.SubscribePacket(UNACKED_MAX + 1, filters).write())
        answer = await self._granted
        for topic, code in zip(topics, answer.reason_codes, strict=True):
            if int(code) >= 0x80:
                raise ConnectionFailed(f"the broker refuses the subscription of {topic}: {code.name.lower()}")

    @property
    def room(self) -> bool:
        """Whether `publish` would take a message now."""
        ready = bool(self._free_ids) and not self._paused and not self._over
        if not ready:
            self._starved = True
        return ready

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand over a message, QoS 1; it leaves with the next `flush`. Only while there is `room`."""
        packet = mqtt5.PublishPacket(
            topic, payload, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=retain, packet_id=self._free_ids.pop()
        )
        self._outgoing.append(packet.write())

    def flush(self) -> None:
        """Write what was handed over, in one go."""
        if self._outgoing:
            data, self._outgoing = b"".join(self._outgoing), []
            self._write(data)

    def tick(self) -> None:
        """Call it every quarter of KEEPALIVE_S: pings, and gives up a broker that is silent."""
        self._silent_ticks += 1
        if self._silent_ticks > 6:
            self._fail("the broker is silent")
        else:
            self._write(mqtt5.PingReqPacket().write())

    def close(self) -> None:
        """Say goodbye and end; what was handed over leaves first."""
        self.flush()
        self._closing = True
        if self._transport is not None and not self._over:
            self._transport.write(mqtt5.DisconnectPacket().write())
            self._transport.close()
        self._over = True

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open: introduce ourselves."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=1024 * 1024)
        self._write(self._connect.write())

    def data_received(self, data: bytes) -> None:
        """Take packets off the front; keep what is incomplete."""
        self._silent_ticks = 0
        if self._left:
            data = self._left + data
        view, at = memoryview(data), 0
        freed = False
        try:
            while at < len(data) and not self._over:
                packet, size = mqtt5.read(view[at:])
                at += size
                freed = self._handle(packet) or freed
        except IndexError:
            pass  # the rest of this packet is on its way
        except ValueError as error:
            self._fail(f"the broker sent what is not MQTT 5: {error}")
        self._left = data[at:]
        if len(self._left) > PACKET_BYTES_MAX:
            self._fail(f"the broker sends a packet of more than {PACKET_BYTES_MAX} bytes")
        if freed and self._starved and not self._over:
            self._starved = False
            self._listener.has_room()

    def connection_lost(self, error: Exception | None) -> None:
        """The socket is gone."""
        self._end(str(error) if error else "the broker ended the connection")

    def pause_writing(self) -> None:
        """The socket is full."""
        self._paused = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._paused = False
        if self._starved and not self._over:
            self._starved = False
            self._listener.has_room()

    def _handle(self, packet: mqtt5.Packet) -> bool:
        """Act on one packet; True where it made room for a publish."""
        if isinstance(packet, mqtt5.PubAckPacket):
            self.refusals += int(packet.reason_code) >= 0x80
            self._free_ids.append(packet.packet_id)
            return True
        if isinstance(packet, mqtt5.PublishPacket):
            if packet.packet_id is not None:
                self._write(mqtt5.PubAckPacket(packet.packet_id).write())
            self._listener.received(packet.topic, packet.payload)
        elif isinstance(packet, mqtt5.ConnAckPacket) and not self._connacked.done():
            self._connacked.set_result(packet)
        elif isinstance(packet, mqtt5.SubAckPacket) and self._granted is not None and not self._granted.done():
            self._granted.set_result(packet)
        elif isinstance(packet, mqtt5.DisconnectPacket):
            self._fail(f"the broker disconnects: {packet.reason_str or packet.reason_code.name.lower()}")
        return False

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._over:
            self._transport.write(data)

    def _fail(self, reason: str) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._end(reason)

    def _end(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        for waiting in (self._connacked, self._granted):
            if waiting is not None and not waiting.done():
                waiting.set_exception(ConnectionFailed(reason))
                waiting.exception()  # marked as seen: who waits no more, for its deadline has passed, is not asked
        self._listener.lost(reason)


async def connect(
    host: str,
    port: int,
    client_id: str,
    listener: Listener,
    topics: Sequence[str],
    *,
    tls: ssl.SSLContext | None = None,
    will: LightWill | None = None,
    timeout_s: float = 10.0,
) -> LightConnection:
    """Connect, be accepted, and subscribe.

    Raises:
        ConnectionFailed: naming the broker and the reason.
    """
    last_words = (
        mqtt5.Will(will.topic, payload=will.payload, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True) if will else None
    )
    hello = mqtt5.ConnectPacket(
        client_id, clean_start=True, keep_alive=KEEPALIVE_S, will=last_words, max_packet_size=PACKET_BYTES_MAX
    )
    connection: LightConnection | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: LightConnection(listener, hello), host, port, ssl=tls
            )
            await connection.connacked()
            await connection.subscribe(topics)
    except (OSError, TimeoutError, ConnectionFailed) as error:
        if connection is not None:
            connection.close()
        why = str(error) or f"no answer within {timeout_s:g} s"
        raise ConnectionFailed(f"broker {host}:{port}: {why}; is it running, and does it speak MQTT 5?") from error
    return connection
