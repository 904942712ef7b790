"""A lasting connection to the broker: connects, subscribes, and after every loss begins anew.

Each connection is an `Attempt`: over paho-mqtt (`gateway.session`), or, where the price of a message counts, over a
bare socket (`gateway.intake`).

Nothing that matters is kept here: what is on the way when a connection breaks is lost, and sent again by who owns it.
"""

from __future__ import annotations

import random
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

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
PACKET_BYTES_MAX = 2 * DEFAULT_LIMITS.payload_bytes_max
"""Larger packets stay with the broker. Twice the limit: what is a little too large arrives, and its refusal is told."""
STABLE_S = 10.0
"""A connection that lasted this long was a good one: the next attempt begins without backoff."""
NOT_ACCEPTED = "the broker ended the connection before it accepted it; check username, password_file and port"
NOT_ANSWERED = "the broker took the connection and did not answer; is this an MQTT 5 broker?"
BROKE = "the connection broke"


class MessageHandler(Protocol):
    """Takes messages, in the network thread. Must not raise."""

    def __call__(self, topic: str, payload: bytes) -> None:
        """One message; `topic` with what is no UTF-8 replaced."""


class Attempt(Protocol):
    """One connection, never used again after it ended."""

    ready: bool
    """Whether everything is subscribed, and messages arrive and leave."""
    ready_at_s: float | None
    """Monotonic time at which it became so."""
    unacked: int
    """Publishes on the way to the broker."""

    def run(self, stopping: threading.Event, beat: Callable[[], None]) -> str:
        """Connect and serve until the connection ends; returns why. Calls `beat` at least once a second."""

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool) -> bool:
        """Hand over a message; False when there is no room now or the connection is over. Never waits."""

    def close(self, timeout_s: float) -> None:
        """Wait until the broker has everything; `stopping` is set."""


class Owner(Protocol):
    """Whom a connection tells what happens, in the network thread."""

    def arrived(self, topic: str, payload: bytes) -> None:
        """A message is here; what is no UTF-8 in its topic is replaced. Raises what its handler raises."""

    def is_ready(self) -> None:
        """Everything is subscribed."""

    def refused(self, reason: str, *, first: bool) -> None:
        """The broker answered a publish with a refusal."""

    def stumbled(self, error: BaseException) -> None:
        """An error of ours or of the library ended the connection."""


class Connect(Protocol):
    """Makes an attempt; nothing is connected yet."""

    def __call__(
        self, settings: BrokerSettings, address: BrokerAddress, client_id: str, filters: Sequence[str], owner: Owner
    ) -> Attempt:
        """An attempt that will subscribe to `filters` with QoS 1."""


class Link:
    """One role's connection to the broker, in a thread of its own. `publish` and the properties may be used from any.

    Args:
        connect: makes each attempt.
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
        connect: Connect,
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
        self._connect, self._settings = connect, settings
        self._address = BrokerAddress.parse(settings.url)
        # A part drawn anew by each process: two of the same replica would throw each other out for ever.
        self._client_id = f"{settings.client_id_prefix}-{replica}-{secrets.token_hex(4)}-{role}"
        self._filters = list(filters)
        self._on_message, self._on_ready = on_message, on_ready
        self._metrics = metrics
        self._backoff = Backoff(settings.reconnect_base_s, settings.reconnect_max_s, rng)
        self._attempt: Attempt | None = None
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
            attempt = self._connect(self._settings, self._address, self._client_id, self._filters, self)
            self._attempt = attempt
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

    def arrived(self, topic: str, payload: bytes) -> None:
        """For the connection: a message is here."""
        self._on_message(topic, payload)

    def refused(self, reason: str, *, first: bool) -> None:
        """For the connection: the broker answered a publish with a refusal."""
        self._metrics.publishes_refused.labels(self.role).inc()
        if first:
            _log.error(
                "publish_refused",
                role=self.role,
                reason=reason,
                remedy="allow this gateway to publish hw/v1/ack/+, hw/v1/rewind/+, hw/v1/desired/+, hw/v1/assign/+",
            )

    def stumbled(self, error: BaseException) -> None:
        """For the connection: an error of ours or of the library."""
        self._metrics.faults.labels(f"mqtt-{self.role}").inc()
        _log.error("mqtt_fault", role=self.role, exc_info=error)

    def is_ready(self) -> None:
        """For the connection: everything is subscribed."""
        self._was_ready = True
        _log.info("broker_connected", role=self.role, broker=str(self._address), client_id=self._client_id)
        self._on_ready()


def why(error: OSError | ValueError | ConfigurationError) -> str:
    """What kept a connection from being made, and what to do."""
    if isinstance(error, ConfigurationError):
        return str(error)
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error}; check ca_file, and that the name in url is the server's"
    return f"{type(error).__name__}: {error}"


def not_accepted(reason: str) -> str:
    """What a broker said instead of accepting a connection."""
    return f"the broker says: {reason}; check username, password_file and the broker's access rules"


def not_granted(topic: str) -> str:
    """A subscription that was refused."""
    return f"the broker refuses the subscription of {topic}; allow this gateway to read it"
