"""Acknowledgements and rewinds on their way to devices: coalesced per device, never waiting for the broker.

What cannot be published is not kept for long: a device that hears nothing sends again, and is answered then.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from contract import topics
from contract.messages import Ack, Rewind, Watermark, encode
from gateway.metrics import GatewayMetrics
from gateway.ports import Lane
from gateway.watch import WatchedThread

LANES_MAX = 64
"""Watermarks in one acknowledgement document, the most recent ones."""
DEVICES_MAX = 100_000
"""Devices whose watermarks are remembered; the one heard of longest ago is forgotten."""
WATERMARKS_MAX = 400_000
"""Watermarks remembered of all devices together, about 200 bytes each; forgotten by device, as above."""
REWINDS_MAX = 10_000
REWIND_HOLDOFF_S = 1.0
"""A lane is asked to send again at most this often: each batch behind a hole would ask otherwise."""
COALESCE_S = 0.01
"""Watermarks of a device that come within this time travel in one document."""
BROKER_PAUSE_S = 0.1
_IDLE_S = 1.0


class Publish(Protocol):
    """Hands a message to the broker; False when there is no room or no connection. Never waits."""

    def __call__(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """One message."""


class AckBook:
    """Which watermarks each device is to be told. Pure; times are monotonic seconds.

    Args:
        devices_max: devices remembered.
        lanes_max: watermarks remembered of one device.
        watermarks_max: watermarks remembered of all devices.
        rewinds_max: rewinds waiting, and lanes whose last rewind is remembered.
    """

    def __init__(
        self,
        devices_max: int = DEVICES_MAX,
        lanes_max: int = LANES_MAX,
        watermarks_max: int = WATERMARKS_MAX,
        rewinds_max: int = REWINDS_MAX,
    ) -> None:
        self._devices_max, self._lanes_max = devices_max, lanes_max
        self._watermarks_max, self._rewinds_max = watermarks_max, rewinds_max
        self.watermarks_known = 0
        self._known: OrderedDict[str, OrderedDict[tuple[str, str], int]] = OrderedDict()
        self._dirty: OrderedDict[str, None] = OrderedDict()
        self._rewinds: deque[tuple[str, Rewind]] = deque()
        self._rewound_s: OrderedDict[tuple[str, Lane], float] = OrderedDict()

    def note(self, stream: str, lane: Lane, seq: int) -> None:
        """A watermark as the table has it: tell the device."""
        marks = self._known.get(lane.device)
        if marks is None:
            marks = self._known[lane.device] = OrderedDict()
        self._known.move_to_end(lane.device)
        key = (stream, lane.epoch)
        self.watermarks_known += key not in marks
        marks[key] = seq
        marks.move_to_end(key)
        if len(marks) > self._lanes_max:
            marks.popitem(last=False)
            self.watermarks_known -= 1
        self._dirty[lane.device] = None
        while len(self._known) > self._devices_max or self.watermarks_known > self._watermarks_max:
            forgotten, gone = self._known.popitem(last=False)
            self.watermarks_known -= len(gone)
            self._dirty.pop(forgotten, None)

    def rewind(self, stream: str, lane: Lane, expected: int, now_s: float) -> bool | None:
        """Ask a device to send again; False where it was asked a moment ago, None where the queue is full."""
        key = (stream, lane)
        if now_s - self._rewound_s.get(key, float("-inf")) < REWIND_HOLDOFF_S:
            return False
        if len(self._rewinds) >= self._rewinds_max:
            return None
        self._rewound_s[key] = now_s
        self._rewound_s.move_to_end(key)
        if len(self._rewound_s) > self._rewinds_max:
            self._rewound_s.popitem(last=False)
        self._rewinds.append((lane.device, Rewind(stream=stream, epoch=lane.epoch, expected=expected)))
        return True

    def next_ack(self) -> tuple[str, Ack] | None:
        """Take out the device that waits longest, and what to tell it; `untold` puts it back."""
        if not self._dirty:
            return None
        device, _ = self._dirty.popitem(last=False)
        return device, Ack(committed=self.watermarks(device))

    def untold(self, device: str) -> None:
        """The broker did not take the document: the device waits again, in front."""
        if device in self._known:
            self._dirty[device] = None
            self._dirty.move_to_end(device, last=False)

    def next_rewind(self) -> tuple[str, Rewind] | None:
        """Take a rewind out; it is not asked for twice."""
        return self._rewinds.popleft() if self._rewinds else None

    def watermarks(self, device: str) -> tuple[Watermark, ...]:
        """What is known of a device."""
        marks = self._known.get(device)
        return tuple(Watermark(stream, epoch, seq) for (stream, epoch), seq in marks.items()) if marks else ()

    @property
    def waiting(self) -> int:
        """Devices to be told."""
        return len(self._dirty)

    @property
    def waiting_rewinds(self) -> int:
        """Rewinds to be sent."""
        return len(self._rewinds)


class Acknowledger:
    """A thread around an `AckBook`. All methods may be called from any thread, and none waits for the broker.

    Args:
        publish: the way to the broker.
        metrics: counters.
        clock_s: monotonic seconds.
    """

    def __init__(
        self, publish: Publish, metrics: GatewayMetrics, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._publish, self._metrics, self._clock_s = publish, metrics, clock_s
        self._book = AckBook()
        self._lock = threading.Lock()
        self._bell = threading.Event()
        self._stopping = threading.Event()
        self.thread = WatchedThread("acknowledger", self._run)
        metrics.watch("acks_waiting", "Devices to be told a watermark", lambda: self._book.waiting, DEVICES_MAX)
        metrics.watch("watermarks", "Watermarks remembered", lambda: self._book.watermarks_known, WATERMARKS_MAX)
        metrics.watch("rewinds_waiting", "Rewinds to be sent", lambda: self._book.waiting_rewinds, REWINDS_MAX)

    def start(self) -> None:
        """Begin to publish."""
        self.thread.start()

    def acknowledge(self, stream: str, watermarks: Mapping[Lane, int] | Iterable[tuple[Lane, int]]) -> None:
        """Tell devices what the table has. A watermark of 0 says nothing."""
        items = watermarks.items() if isinstance(watermarks, Mapping) else watermarks
        with self._lock:
            for lane, seq in items:
                if seq > 0:
                    self._book.note(stream, lane, seq)
        self._bell.set()

    def rewind(self, stream: str, lane: Lane, expected: int) -> None:
        """Ask a device to send again from `expected`, unless it was asked a moment ago."""
        with self._lock:
            taken = self._book.rewind(stream, lane, expected, self._clock_s())
        if taken:
            self._metrics.rewinds.inc()
            self._bell.set()
        elif taken is None:
            self._metrics.rewinds_dropped.inc()
        else:
            self._metrics.rewinds_held_back.inc()

    def watermarks(self, device: str) -> tuple[Watermark, ...]:
        """What this gateway knows of a device."""
        with self._lock:
            return self._book.watermarks(device)

    def close(self, timeout_s: float) -> bool:
        """Publish what waits, if the broker takes it, and end; False when that took too long."""
        self._stopping.set()
        self._bell.set()
        return self.thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.thread.beat()
            if self._bell.wait(_IDLE_S):
                self._stopping.wait(COALESCE_S)
                self._bell.clear()
                if not self.publish_waiting():
                    # No room, or no broker: what waits is a set of devices, so it does not grow with time.
                    self._stopping.wait(BROKER_PAUSE_S)
                    self._bell.set()
        self.publish_waiting()

    def publish_waiting(self) -> bool:
        """Publish until nothing waits or the broker takes no more; whether everything is out. Called by the thread."""
        while True:
            with self._lock:
                found = self._book.next_ack()
            if found is None:
                break
            device, document = found
            if not self._publish(topics.ack(device), encode(document), qos=1, retain=True):
                with self._lock:
                    self._book.untold(device)
                return False
            self._metrics.acks.inc()
            self.thread.beat()
        while True:
            with self._lock:
                rewind = self._book.next_rewind()
            if rewind is None:
                return True
            # QoS 0: a rewind that is lost costs the device one timeout.
            if not self._publish(topics.rewind(rewind[0]), encode(rewind[1]), qos=0):
                return True
