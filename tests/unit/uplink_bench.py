"""An uplink's thread over a broker that only records, and a buffer in memory."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
from prometheus_client import CollectorRegistry

from contract import topics
from contract.batches import Clock
from contract.codec import encode_body, unseal
from contract.messages import Ack, Watermark, encode
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import StreamCaps, WhenFull
from edge_agent.events import Event, Kind
from edge_agent.inbox import Inbox
from edge_agent.metrics import AgentMetrics
from edge_agent.settings import UplinkSettings
from edge_agent.transport import Connection, Ready, Received, Signal, Will
from edge_agent.uplink import Identity, Uplink

CLOCK = Clock(True, 1_700_000_000_000_000, 5, "ab" * 16)
READY = Ready(8 * 1024 * 1024)
DEADLINE_S = 20.0


def wait_until(predicate: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not (found := predicate()):
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S} s: {what}"
        pause.wait(0.005)
    return found


class FakeConnection:
    """Records what is published; the test says what the broker says."""

    def __init__(self, will: Will, names: Sequence[str], inbox: Inbox[tuple[Connection, Signal]]) -> None:
        self.will, self.topics, self._inbox = will, list(names), inbox
        self.published: list[tuple[str, bytes, bool]] = []
        self.room = 1_000_000
        self.unanswered = 0
        self.abandoned = self.closed = False

    @property
    def finished(self) -> bool:
        return self.abandoned or self.closed

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        if self.room == 0 or self.finished:
            return False
        self.room -= 1
        self.published.append((topic, payload, retain))
        return True

    def abandon(self) -> None:
        self.abandoned = True

    def close(self, timeout_s: float) -> None:
        self.closed = True

    def say(self, *signals: Signal) -> None:
        for signal in signals:
            self._inbox.post((self, signal))

    def make_room(self, room: int) -> None:
        self.room = room
        self._inbox.wake()

    def batches(self) -> list[tuple[str, int]]:
        """(stream, seq) of every batch, in the order of sending."""
        sent = [unseal(payload).envelope for topic, payload, _ in list(self.published) if "/up/" in topic]
        return [(envelope.stream, envelope.seq) for envelope in sent]


class FakeTransport:
    """Gives the test each attempt."""

    attempt_timeout_s = 60.0

    def __init__(self) -> None:
        self.attempts: list[FakeConnection] = []

    def connect(self, will: Will, names: Sequence[str], inbox: Inbox[tuple[Connection, Signal]]) -> FakeConnection:
        self.attempts.append(FakeConnection(will, names, inbox))
        return self.attempts[-1]

    def attempt(self, number: int) -> FakeConnection:
        """The attempt of this number, counted from 0, once it is made."""
        found: FakeConnection = wait_until(
            lambda: self.attempts[number] if len(self.attempts) > number else None, f"attempt {number}"
        )
        return found


class SystemClock:
    def wall_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic_s(self) -> float:
        return time.monotonic()


class Bench:
    """An uplink with everything around it."""

    def __init__(self, buffer: MemoryBuffer, **settings: Any) -> None:
        self.buffer = buffer
        self.transport = FakeTransport()
        self.events: list[Event] = []
        self.desired: list[bytes] = []
        self.metrics = AgentMetrics(CollectorRegistry())
        self.uplink = Uplink(
            identity=Identity(device="pi-1", agent="test 1", boot="ab" * 16),
            buffer=buffer,
            settings=UplinkSettings(**{"reconnect_base_s": 0.01, "reconnect_max_s": 0.02, **settings}),
            transport=self.transport,
            clock=SystemClock(),
            metrics=self.metrics,
            report=self.events.append,
            desired=self.desired.append,
            rng=random.Random(1),
        )
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)

    def start(self) -> FakeConnection:
        self.thread.start()
        return self.transport.attempt(0)

    def start_ready(self, *retained: Signal) -> FakeConnection:
        connection = self.start()
        connection.say(*retained, READY)
        wait_until(lambda: self.uplink.state.connected, "connected")
        return connection

    def kinds(self) -> list[Kind]:
        return [event.kind for event in self.events]

    def stop(self) -> None:
        if self.thread.ident is not None:
            self.uplink.drain(0.0)
            self.thread.join(DEADLINE_S)
            assert not self.thread.is_alive()

    def _run(self) -> None:
        try:
            self.uplink.run()
        except BaseException as error:  # noqa: BLE001 - the test reads it
            self.failure = error


def new_buffer(when_full: WhenFull = WhenFull.DROP_OLDEST, bytes_max: int = 1 << 20) -> MemoryBuffer:
    caps = StreamCaps(bytes_max=bytes_max, age_max_s=1e9, when_full=when_full, thin_keep_every=2)
    return MemoryBuffer({"s": caps, "t": caps}, 1 << 30)


def body(rows: int = 3) -> bytes:
    ts = pa.array(range(rows), pa.timestamp("us", "UTC"))
    return encode_body(pa.record_batch([ts, pa.array(range(rows), pa.int64())], ["ts", "x"]))


def fill(buffer: MemoryBuffer, batches: int, stream: str = "s") -> str:
    for _ in range(batches):
        epoch = buffer.append(stream, body(), 3, CLOCK).epoch
    return epoch


def ack(stream: str, epoch: str, seq: int) -> Received:
    return Received(topics.ack("pi-1"), encode(Ack(committed=(Watermark(stream, epoch, seq),))))


def live(buffer: MemoryBuffer, stream: str = "s") -> str:
    return next(lane.epoch for lane in buffer.lanes() if lane.live and lane.stream == stream)
