"""Refused payloads on their way to inbox/quarantine: those whose seq is not stepped over, so nobody waits for them.

A device that makes the same mistake again and again fills neither the queue nor the table: what was just written is not
written again.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

import structlog

from contract.codec import SKIPPABLE_MAGIC
from contract.errors import TemporaryError
from gateway.metrics import GatewayMetrics
from gateway.ports import QuarantineTable
from gateway.watch import LakeHealth, WatchedThread
from lake.quarantine import QuarantineRecord

_log = structlog.get_logger()

WRITE_INTERVAL_S = 1.0
RECORDS_MAX = 10_000
RECORD_OVERHEAD_BYTES = 512
COMMIT_BYTES_MAX = 16 * 1024 * 1024
"""Payloads written in one commit; one always may be."""
REMEMBERED_MAX = 20_000
"""Payloads remembered as written."""
RETRY_MAX_S = 15.0
_MAGIC = SKIPPABLE_MAGIC.to_bytes(4, "little")
_FAULTS_MAX = 3
"""So often a group of records may trip over a bug of ours; then it is dropped and counted, to let others through."""


def fingerprint(record: QuarantineRecord) -> bytes:
    """Same topic, reason, message and body: the same mistake. The envelope differs, it is made at each sending."""
    payload, start = record.payload, 0
    if payload[:4] == _MAGIC:
        start = 8 + int.from_bytes(payload[4:8], "little")
    digest = hashlib.blake2b(memoryview(payload)[start if start < len(payload) else 0 :], digest_size=16)
    digest.update("\0".join((record.topic, record.reason, record.message)).encode(errors="replace"))
    return digest.digest()


class QuarantineQueue:
    """What waits to be written, bounded in records and bytes, and what was written lately. Safe between threads.

    Args:
        bytes_max: payloads waiting.
        records_max: records waiting.
        remembered_max: fingerprints remembered.
    """

    def __init__(self, bytes_max: int, records_max: int = RECORDS_MAX, remembered_max: int = REMEMBERED_MAX) -> None:
        self.bytes_max, self.records_max, self._remembered_max = bytes_max, records_max, remembered_max
        self._waiting: deque[QuarantineRecord] = deque()
        self._bytes = 0
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def waiting_bytes(self) -> int:
        """Bytes waiting."""
        return self._bytes

    @property
    def waiting(self) -> int:
        """Records waiting."""
        return len(self._waiting)

    def put(self, record: QuarantineRecord) -> bool | None:
        """Add a record; False where the same mistake was added already, None where there is no room."""
        key = fingerprint(record)
        size = _size(record)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return False
            if len(self._waiting) >= self.records_max or self._bytes + size > self.bytes_max:
                return None
            self._seen[key] = None
            if len(self._seen) > self._remembered_max:
                self._seen.popitem(last=False)
            self._waiting.append(record)
            self._bytes += size
            return True

    def front(self) -> list[QuarantineRecord]:
        """The oldest records that fit one commit; they stay until `remove`."""
        with self._lock:
            taken: list[QuarantineRecord] = []
            size = 0
            for record in self._waiting:
                size += _size(record)
                if taken and size > COMMIT_BYTES_MAX:
                    break
                taken.append(record)
            return taken

    def remove(self, count: int) -> None:
        """The oldest `count` records are written, or given up."""
        with self._lock:
            for _ in range(count):
                self._bytes -= _size(self._waiting.popleft())


class QuarantineWriter:
    """Writes the queue to the table in a thread of its own.

    Args:
        queue: what waits.
        open_table: gives the table to write to; may raise what the lake raises.
        metrics: counters.
        health: told how the lake answers.
        clock_s: monotonic seconds.
    """

    def __init__(
        self,
        queue: QuarantineQueue,
        open_table: Callable[[], QuarantineTable],
        metrics: GatewayMetrics,
        health: LakeHealth,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._open_table = queue, open_table
        self._metrics, self._health, self._clock_s = metrics, health, clock_s
        self._stopping = threading.Event()
        self._bell = threading.Event()
        self._failures = 0
        self._faults = 0
        self.thread = WatchedThread("quarantine", self._run)
        metrics.watch(
            "quarantine_waiting_bytes", "Refused payloads to be written", lambda: queue.waiting_bytes, queue.bytes_max
        )
        metrics.watch("quarantine_waiting", "Refused payloads to be written", lambda: queue.waiting, queue.records_max)

    def start(self) -> None:
        """Begin to write."""
        self.thread.start()

    def put(self, record: QuarantineRecord) -> None:
        """Take a refused payload. Never waits; what does not fit is dropped and counted."""
        added = self._queue.put(record)
        if added:
            self._bell.set()
        elif added is None:
            self._metrics.quarantine_dropped.inc()
        else:
            self._metrics.quarantine_repeated.inc()

    def close(self, timeout_s: float) -> bool:
        """Write what waits and end; False when that took too long."""
        self._stopping.set()
        self._bell.set()
        return self.thread.join(timeout_s)

    def write(self) -> bool:
        """Write one commit's worth; False where it has to be tried again."""
        records = self._queue.front()
        if not records:
            return True
        try:
            self._open_table().append(records)
        except TemporaryError as error:
            self._failures += 1
            self._metrics.store_errors.inc()
            self._health.failed(error)
            return False
        except Exception as error:  # noqa: BLE001 - a bug must not end the gateway; it is counted and told
            self._failures += 1
            self._faults += 1
            self._metrics.faults.labels("quarantine").inc()
            _log.error("quarantine_fault", records=len(records), attempt=self._faults, exc_info=error)
            if self._faults < _FAULTS_MAX:
                return False
            self._metrics.quarantine_dropped.inc(len(records))
        else:
            self._health.answered()
            for record in records:
                self._metrics.quarantined.labels(record.reason).inc()
        self._failures = self._faults = 0
        self._queue.remove(len(records))
        return True

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.thread.rest()
            self._bell.wait()
            self.thread.beat()
            self._stopping.wait(WRITE_INTERVAL_S)
            self._bell.clear()
            while self._queue.waiting and not self._stopping.is_set():
                self.thread.beat()
                if not self.write():
                    self._stopping.wait(min(RETRY_MAX_S, 0.25 * 2.0**self._failures))
        # One attempt for each commit that is left; who is stopping does not wait for a lake that is down.
        while self._queue.waiting and self.write():
            self.thread.beat()


def _size(record: QuarantineRecord) -> int:
    return len(record.payload) + len(record.topic) + len(record.message) + RECORD_OVERHEAD_BYTES
