"""From the buffer to the broker: one thread around the pure `Sender`, the broker's `Transport`, and the clock.

Stopping: `drain` goes on sending until the buffer is empty, the deadline has come, or there is no connection; then the
farewell is published, and the thread ends. Whatever is left is in the buffer.
"""

from __future__ import annotations

import math
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import structlog

from contract import topics
from contract.backoff import Backoff
from contract.batches import Envelope
from contract.codec import seal
from contract.errors import Rejected, TemporaryError
from contract.messages import Ack, Presence, Rewind, decode, encode
from edge_agent.buffer.port import BatchBuffer, BufferUnavailableError, Stored
from edge_agent.events import Event, Kind, Scalar
from edge_agent.inbox import Inbox
from edge_agent.metrics import AgentMetrics
from edge_agent.sender import AckOutcome, Sender
from edge_agent.settings import UplinkSettings
from edge_agent.transport import (
    Connection,
    LossCause,
    Lost,
    Ready,
    Received,
    Signal,
    Transport,
    Will,
)

_log = structlog.get_logger()

INBOX_MAX = 64
"""Signals waiting; beyond, the network thread waits, and the rest stays in the broker."""
IDLE_S = 1.0
"""Longest sleep: the thread shows that it is alive."""
STABLE_S = 10.0
"""A connection that lasted this long was a good one: the next attempt begins without backoff."""
TAKEN_OVER_S = 30.0
"""Two devices of one name would throw each other out as fast as they can connect; this is their pace instead."""
SHORT_CONNECTIONS_MAX = 4
"""Connections in a row that the broker accepted and that broke within `STABLE_S`, without it being away in between. Two
devices of one name do that to each other; some brokers (iotcore) give no other sign. A poor network breaks slower."""
OWN_PRESENCES_MAX = 256
SPLIT_S = 5.0
"""How often backlogs are looked at, whether fresh data should overtake."""
FAREWELL_S = 3.0
TROUBLE_S = 1.0
"""Pause after the buffer's disk refused."""
UNREADABLE_S = 10.0
"""Pause of an epoch whose next batch could not be read."""
SKIPS_MAX = 1_000
"""Batches that vanish between choosing and fetching, in one go; more are left to the next round."""


class Clock(Protocol):
    """What the uplink needs of the device's clocks."""

    def wall_us(self) -> int:
        """Microseconds since 1970-01-01 UTC."""

    def monotonic_s(self) -> float:
        """Seconds that never go back."""


class UplinkState(NamedTuple):
    """How the uplink is, for the status socket."""

    connected: bool
    since_us: int
    """Device clock at the last change of `connected`."""
    last_loss: str
    """Why the last connection ended; empty if none did."""
    window_batches: int
    window_bytes: int


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who speaks."""

    device: str
    agent: str
    """Name and version of the software."""
    boot: str


class Uplink:
    """Sends what the buffer holds. All methods but `run` may be called from any thread.

    Args:
        identity: who speaks.
        buffer: what is sent.
        settings: windows, timeouts, backoff.
        transport: the way to the broker.
        clock: the device's clocks.
        metrics: counters.
        report: takes events.
        desired: takes desired documents as they arrive; must return soon.
        rng: jitter.
        assigned: takes the orders for models as they arrive; must return soon. None: no model runs here.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        buffer: BatchBuffer,
        settings: UplinkSettings,
        transport: Transport,
        clock: Clock,
        metrics: AgentMetrics,
        report: Callable[[Event], None],
        desired: Callable[[bytes], None],
        rng: random.Random,
        assigned: Callable[[bytes], None] | None = None,
    ) -> None:
        self._identity, self._buffer, self._settings = identity, buffer, settings
        self._transport, self._clock, self._metrics = transport, clock, metrics
        self._report, self._desired, self._assigned, self._rng = report, desired, assigned, rng
        self._sender = Sender(buffer, settings, rng)
        self._inherited = {(i.stream, i.epoch): i.last_seq_at_open for i in buffer.lanes() if i.live}
        self._inbox: Inbox[tuple[Connection, Signal]] = Inbox(INBOX_MAX)
        self._backoff = Backoff(settings.reconnect_base_s, settings.reconnect_max_s, rng)
        self._connection: Connection | None = None
        self._leaving: Connection | None = None
        self._ready: Ready | None = None
        self._attempt_ends_s = self._ready_at_s = self._split_at_s = 0.0
        self._trouble_until_s = self._leave_at_s = 0.0
        self._retry_at_s = clock.monotonic_s()
        self._known_acks: dict[tuple[str, str], int] = {}
        self._first_sent: dict[tuple[str, str], OrderedDict[int, float]] = {}
        self._new_lanes = threading.Event()
        self._reported: bytes | None = None
        self._reported_sent: bytes | None = None
        """The one that this connection has taken."""
        self._presence = b""
        self._presence_due = self._was_ready = self._contested = False
        self._short_connections = 0
        self._own_presences: deque[bytes] = deque(maxlen=OWN_PRESENCES_MAX)
        self._last_ready_presences: frozenset[bytes] = frozenset()
        self._counted_timeouts = self._counted_rewinds = self._handed = 0
        self._drain_until_s: float | None = None
        self.state = UplinkState(False, clock.wall_us(), "", 0, 0)
        self.progress_s = clock.monotonic_s()
        """Monotonic time of the last round of the thread."""

    # From other threads.

    def stored(self, *, new_lane: bool) -> None:
        """There is something new in the buffer; `new_lane`: in a (stream, epoch) of which nothing was stored before."""
        if new_lane:
            self._new_lanes.set()
        self._inbox.wake()

    def publish_reported(self, document: bytes) -> None:
        """Publish this reported state now, and again at each new connection."""
        self._reported = document
        self._inbox.wake()

    def drain(self, timeout_s: float) -> None:
        """Send what is left, for at most `timeout_s`, then say goodbye and end."""
        self._drain_until_s = self._clock.monotonic_s() + timeout_s
        self._inbox.wake()

    # The thread.

    def run(self) -> None:
        """Work until drained."""
        try:
            while not self._done():
                self.progress_s = self._clock.monotonic_s()
                try:
                    self._round()
                except TemporaryError as error:
                    self._in_trouble(error)
            self._farewell()
        finally:
            if self._connection is not None:
                self._connection.abandon()
            self._inbox.close()

    def _round(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._connection is None and now_s >= self._retry_at_s:
            self._connect(now_s)
        if self._ready is None and self._connection is not None and now_s >= self._attempt_ends_s:
            self._lose(Lost(LossCause.TIMEOUT, "the broker did not complete the connection in time"))
        if self._ready is not None and now_s >= self._trouble_until_s:
            self._pump()
        signal = self._inbox.take(self._sleep_s())
        # What has piled up goes first: an ack makes room in the window, and costs nothing to take.
        for _ in range(INBOX_MAX):
            if signal is None:
                break
            self._handle(*signal)
            signal = self._inbox.take(0.0)

    def _sleep_s(self) -> float:
        now_s = self._clock.monotonic_s()
        wakes = [now_s + IDLE_S]
        if self._connection is None:
            wakes.append(self._retry_at_s)
        elif now_s < self._trouble_until_s:
            wakes.append(self._trouble_until_s)
        elif self._ready is not None:
            wakes += [at_s for at_s in (self._sender.wake_at_s(), self._split_at_s) if at_s is not None]
        if self._drain_until_s is not None:
            wakes.append(self._drain_until_s)
        return max(0.0, min(wakes) - now_s)

    def _in_trouble(self, error: TemporaryError) -> None:
        """Send nothing for a while. What the broker says is still heard: a loss that was missed would never be told."""
        now_s = self._clock.monotonic_s()
        if now_s >= self._trouble_until_s:
            _log.warning("uplink_trouble", error=str(error))
        self._trouble_until_s = now_s + TROUBLE_S

    # Connecting.

    def _connect(self, now_s: float) -> None:
        if self._leaving is not None and not self._leaving.finished:
            # One attempt at a time, also where a name look-up hangs: threads must not pile up.
            self._retry_at_s = now_s + IDLE_S
            return
        device = self._identity.device
        self._metrics.connects.inc()
        wanted = [topics.ack(device), topics.rewind(device), topics.desired(device)]
        if self._assigned is not None:
            wanted.append(topics.assign(device))
        self._connection = self._transport.connect(
            Will(topics.status(device), self._own_presence(online=False, reason="lost")),
            wanted,
            self._inbox,
        )
        self._attempt_ends_s = now_s + self._transport.attempt_timeout_s

    def _handle(self, connection: Connection, signal: Signal) -> None:
        if connection is not self._connection:
            return  # the last words of a connection that was given up
        if isinstance(signal, Received):
            self._receive(signal)
        elif isinstance(signal, Ready):
            self._begin(signal)
        elif isinstance(signal, Lost):
            self._lose(signal)
        else:
            _log.warning("publish_refused", messages=signal.messages, reason=signal.reason)
            self._report(Event(Kind.PUBLISH_REFUSED, detail={"cause": signal.reason, "messages": signal.messages}))

    def _begin(self, ready: Ready) -> None:
        self._sender.connected()
        self._ready, self._ready_at_s = ready, self._clock.monotonic_s()
        self._presence = self._own_presence(online=True, reason="started")
        self._presence_due = self._was_ready = True
        self._reported_sent = None
        self._handed = 0
        self._last_ready_presences = frozenset(list(self._own_presences)[-2:])
        self._metrics.connected.set(1)
        _log.info("connected", payload_bytes_max=ready.payload_bytes_max)
        self._update_state()

    def _lose(self, lost: Lost) -> None:
        assert self._connection is not None
        self._connection.abandon()
        self._leaving, self._connection = self._connection, None
        now_s = self._clock.monotonic_s()
        stable = self._ready is not None and now_s - self._ready_at_s >= STABLE_S
        if stable:
            self._backoff.reset()
        broke_early = self._ready is not None and not stable and lost.cause is LossCause.LOST
        self._short_connections = self._short_connections + 1 if broke_early else 0
        self._ready = None
        delay_s = self._backoff.next_delay_s()
        if lost.cause is LossCause.TAKEN_OVER:
            self._taken_over({"by": "the broker's word"})
        elif self._short_connections == SHORT_CONNECTIONS_MAX:
            self._short_connections = 0
            self._taken_over({"by": "suspicion", "short_connections": SHORT_CONNECTIONS_MAX})
        if self._contested:
            delay_s = TAKEN_OVER_S * self._rng.uniform(0.5, 1.5)
            self._contested = False
        self._retry_at_s = now_s + delay_s
        self._metrics.connected.set(0)
        self._metrics.losses.labels(lost.cause.value).inc()
        self._update_state(f"{lost.cause.value}: {lost.detail}")
        _log.warning("disconnected", cause=lost.cause.value, detail=lost.detail, retry_in_s=round(delay_s, 1))

    def _leave_unproven_epochs(self, now_s: float) -> None:
        """Before the first batch of each: let go of inherited live epochs that might go on elsewhere.

        Where a restored buffer holds nothing of an epoch any more, its first batch would get a seq that the lake may
        have given to another one, and the ack of that one would look like its own. The retained ack settles it; where
        the broker has lost that too, a new epoch costs nothing but its name. While the disk refuses one, nothing of
        the old is sent; all that is proven goes on.
        """
        lanes = {(lane.stream, lane.epoch): lane for lane in self._buffer.lanes()}
        for key, last_seq in list(self._inherited.items()):
            lane = lanes.get(key)
            if lane is not None and lane.live:
                holds_old = lane.floor is not None and lane.floor <= last_seq
                proven = 0 < last_seq <= self._known_acks.get(key, 0)
                if not holds_old and not proven:
                    try:
                        epoch = self._buffer.open_epoch(lane.stream, move_after_seq=last_seq)
                    except BufferUnavailableError as error:
                        _log.warning("epoch_not_opened", stream=lane.stream, error=str(error))
                        self._leave_at_s = now_s + TROUBLE_S
                        continue
                    _log.info("epoch_opened", stream=lane.stream, cause="unproven")
                    self._report(_epoch_opened(lane.stream, epoch, "unproven", previous=lane.epoch))
            del self._inherited[key]
            self._known_acks.pop(key, None)
        self._sender.refresh_lanes()

    # Receiving.

    def _receive(self, message: Received) -> None:
        kind = message.topic.split("/")[2]
        try:
            if kind == "ack":
                self._take_acks(decode(message.payload, Ack))
            elif kind == "rewind":
                self._sender.rewind(decode(message.payload, Rewind), self._clock.monotonic_s())
            elif kind == "desired":
                self._desired(message.payload)
            elif kind == "assign" and self._assigned is not None:
                self._assigned(message.payload)
            elif kind == "status" and self._was_ready and not self._is_own(message.payload):
                other = decode(message.payload, Presence)
                self._taken_over({"agent": other.agent, "boot": other.boot, "at_us": other.at_us})
        except Rejected as refusal:
            self._metrics.control_refused.labels(kind).inc()
            _log.warning("control_refused", kind=kind, error=str(refusal))

    def _take_acks(self, ack: Ack) -> None:
        now_s = self._clock.monotonic_s()
        for mark in ack.committed:
            key = (mark.stream, mark.epoch)
            if key in self._inherited:
                self._known_acks[key] = max(mark.seq, self._known_acks.get(key, 0))
            outcome = self._sender.acknowledged(mark, now_s)
            if outcome is AckOutcome.PROGRESS:
                waiting = self._first_sent.get(key, OrderedDict())
                while waiting and next(iter(waiting)) <= mark.seq:
                    _, sent_s = waiting.popitem(last=False)
                    self._metrics.ack_seconds.observe(now_s - sent_s)
                    self._metrics.acked_batches.inc()
            elif outcome is AckOutcome.BUFFER_RESTORED:
                _log.warning("buffer_restored", stream=mark.stream, epoch=mark.epoch, committed=mark.seq)
                self._report(Event(Kind.BUFFER_RESTORED, mark.stream, mark.epoch, last_seq=mark.seq))

    def _is_own(self, presence: bytes) -> bool:
        # Days without a network are thousands of attempts, each with a will of its own: they must not push out the ones
        # of the last good connection, which the broker will show on the way back.
        return presence in self._last_ready_presences or presence in self._own_presences

    def _taken_over(self, detail: dict[str, Scalar]) -> None:
        """Another client has used, or seems to use, this device's name since this process was first connected."""
        self._contested = True
        _log.error("taken_over", remedy="give each device its own name; was an SD card copied?", **detail)
        self._report(Event(Kind.TAKEN_OVER, detail=detail))

    # Sending.

    def _pump(self) -> None:
        connection, now_s, device = self._connection, self._clock.monotonic_s(), self._identity.device
        assert connection is not None
        if self._new_lanes.is_set():
            self._new_lanes.clear()
            self._sender.refresh_lanes()
        if self._presence_due:
            self._presence_due = not self._publish(connection, topics.status(device), self._presence, retain=True)
        self._tell_reported(connection)
        if self._inherited and now_s >= self._leave_at_s:
            self._leave_unproven_epochs(now_s)
        if now_s >= self._split_at_s:
            self._split_at_s = now_s + SPLIT_S
            self._split_backlog()
        for _ in range(SKIPS_MAX):
            batch = self._sender.next_batch(now_s, self._inherited.keys(), self._handed - connection.unanswered)
            if batch is None or not self._send(batch, now_s):
                break
        self._update_state()

    def _tell_reported(self, connection: Connection) -> None:
        # Compared, not flagged: the main thread may bring a newer one at any moment.
        document = self._reported
        if document is None or document is self._reported_sent:
            return
        if self._publish(connection, topics.reported(self._identity.device), document, retain=True):
            self._reported_sent = document

    def _send(self, batch: Stored, now_s: float) -> bool:
        """Hand one batch to the broker; False when there is no room for it now."""
        assert self._connection is not None
        assert self._ready is not None
        # What was chosen may be evicted or thinned by now; the envelope has to fit what is really sent.
        try:
            fetched = self._buffer.fetch(batch.stream, batch.epoch, batch.seq)
        except BufferUnavailableError as error:
            # A bad block stays bad: other epochs must not wait for it.
            _log.warning("batch_unreadable", stream=batch.stream, seq=batch.seq, error=str(error))
            self._sender.postpone(batch, now_s + UNREADABLE_S)
            return True
        floor = self._buffer.floor(batch.stream, batch.epoch)
        if fetched is None or floor is None or floor > batch.seq:
            return True
        stored, body = fetched
        envelope = Envelope(
            self._identity.device,
            stored.stream,
            stored.epoch,
            stored.seq,
            floor,
            stored.rows,
            self._clock.wall_us(),
            stored.clock,
            stored.crc32,
        )
        payload = seal(envelope, body)
        if len(payload) > self._ready.payload_bytes_max:
            self._too_large(stored, len(payload))
            stored = stored._replace(body_bytes=0)  # it is not on the way, and takes no room from what is
        elif not self._publish(self._connection, topics.up(self._identity.device, stored.stream), payload):
            return False
        else:
            self._metrics.sent_batches.inc()
            self._metrics.wire_bytes.inc(len(payload))
            first_sent = self._first_sent.setdefault((stored.stream, stored.epoch), OrderedDict())
            if stored.seq in first_sent:
                self._metrics.resent_batches.inc()
            else:
                first_sent[stored.seq] = now_s
        self._sender.sent(stored, now_s, self._handed)
        return True

    def _publish(self, connection: Connection, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        handed = connection.publish(topic, payload, retain=retain)
        self._handed += handed
        return handed

    def _too_large(self, stored: Stored, size: int) -> None:
        """The broker would end the connection. It is left to the ack timeout, so that other streams go on."""
        limit = self._ready.payload_bytes_max if self._ready else 0
        _log.error("payload_too_large", stream=stored.stream, bytes=size, broker_bytes_max=limit)
        self._report(
            Event(
                Kind.PAYLOAD_TOO_LARGE,
                stored.stream,
                stored.epoch,
                stored.seq,
                stored.seq,
                stored.rows,
                {"bytes": size, "broker_bytes_max": limit, "remedy": "raise the broker's maximum packet size"},
            )
        )

    def _split_backlog(self) -> None:
        for stream in self._sender.split_backlog():
            _log.info("backlog_split", stream=stream)
            self._report(_epoch_opened(stream, None, "backlog"))
        floors = {(lane.stream, lane.epoch): lane.floor for lane in self._buffer.lanes()}
        for key in self._first_sent.keys() - floors.keys():
            del self._first_sent[key]
        for key, waiting in self._first_sent.items():
            # What was evicted before it was acknowledged: without a gateway for days that would add up.
            while waiting and next(iter(waiting)) < (floors[key] or math.inf):
                waiting.popitem(last=False)

    # Stopping, and the state.

    def _done(self) -> bool:
        if self._drain_until_s is None:
            return False
        if self._connection is None or self._clock.monotonic_s() >= self._drain_until_s:
            return True
        return self._ready is not None and not any(lane.batches for lane in self._buffer.lanes())

    def _farewell(self) -> None:
        if self._connection is not None and self._ready is not None:
            presence = self._own_presence(online=False, reason="stopped")
            self._connection.publish(topics.status(self._identity.device), presence, retain=True)
            self._connection.close(FAREWELL_S)
            self._connection, self._ready = None, None
        left = sum(lane.batches for lane in self._buffer.lanes())
        _log.info("uplink_stopped", batches_left=left)

    def _own_presence(self, *, online: bool, reason: str) -> bytes:
        identity = self._identity
        at_us = self._clock.wall_us()
        own = encode(Presence(online=online, reason=reason, at_us=at_us, agent=identity.agent, boot=identity.boot))
        self._own_presences.append(own)
        return own

    def _update_state(self, loss: str | None = None) -> None:
        sender, old, connected = self._sender, self.state, self._ready is not None
        batches, size = sender.in_flight_batches, sender.in_flight_bytes
        since_us = old.since_us if connected is old.connected else self._clock.wall_us()
        self.state = UplinkState(connected, since_us, old.last_loss if loss is None else loss, batches, size)
        self._metrics.window_batches.set(batches)
        self._metrics.window_bytes.set(size)
        self._metrics.ack_timeouts.inc(sender.resent_timeouts - self._counted_timeouts)
        self._metrics.rewinds.inc(sender.rewinds_followed - self._counted_rewinds)
        self._counted_timeouts, self._counted_rewinds = sender.resent_timeouts, sender.rewinds_followed


def _epoch_opened(stream: str, epoch: str | None, cause: str, **detail: str) -> Event:
    return Event(Kind.EPOCH_OPENED, stream, epoch, detail={"cause": cause, **detail})
