"""Where a sampler puts its rows: the sink port, and a queue bounded in rows and bytes that implements it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import pyarrow as pa

from edge_agent.sensors.port import Reading, Sample

_LAST_WAIT_S = 1.0
_READING_BYTES = 200
"""What a reading takes beside its texts: a dict, its values, a timestamp; CPython 3.11, about."""
_FIELD_BYTES = 40


class Sink(Protocol):
    """Takes rows from sampler threads. Safe to use from several threads."""

    def put(self, schema: pa.Schema, sample: Sample, wait_s: float, stop: threading.Event) -> bool:
        """Take one sample, waiting for room at most `wait_s`; once `stop` is set, at most one second more.

        Args:
            schema: `ts` and the fields; the same object as long as the stream's schema stays the same.
            sample: a stamped reading with all fields in schema order, or a record batch of the schema.
            wait_s: longest wait, seconds.
            stop: the sampler is asked to stop.

        Returns:
            False when there was no room; the sample was not taken.
        """

    def wake(self) -> None:
        """Let waiting `put`s look at `stop` again."""


class Queued(NamedTuple):
    """One item of a `RowQueue`."""

    schema: pa.Schema
    sample: Sample


class RowQueue:
    """A queue between sampler and batcher, bounded in rows and in bytes.

    A single sample beyond a bound is taken when the queue is empty, so the memory held is at most the bound and one
    sample (of at most 65,536 rows: the sampler cuts larger blocks).

    Args:
        rows_max: rows held.
        bytes_max: bytes held, by Arrow's count for blocks and an estimate for single readings.
        on_put: called after each accepted sample, outside the lock; sets an event, for instance.
    """

    def __init__(self, rows_max: int, bytes_max: int, on_put: Callable[[], None] = lambda: None) -> None:
        if rows_max < 1 or bytes_max < 1:
            raise ValueError(f"a queue of {rows_max} rows and {bytes_max} bytes holds nothing; choose 1 or more")
        self._rows_max, self._bytes_max = rows_max, bytes_max
        self._on_put = on_put
        self._items: deque[tuple[Queued, int, int]] = deque()
        self._rows = 0
        self._bytes = 0
        self._changed = threading.Condition()

    @property
    def rows(self) -> int:
        """Rows held now."""
        return self._rows

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def put(self, schema: pa.Schema, sample: Sample, wait_s: float, stop: threading.Event) -> bool:
        """Take one sample; see `Sink.put`."""
        rows, size = row_count(sample), byte_count(sample)
        deadline_s = time.monotonic() + wait_s
        stopping = False
        with self._changed:
            while self._items and (self._rows + rows > self._rows_max or self._bytes + size > self._bytes_max):
                now_s = time.monotonic()
                if stop.is_set() and not stopping:
                    # The consumer is stopped after the samplers, so a short wait saves what is in hand.
                    stopping = True
                    deadline_s = min(deadline_s, now_s + _LAST_WAIT_S)
                if now_s >= deadline_s:
                    return False
                self._changed.wait(deadline_s - now_s)
            self._items.append((Queued(schema, sample), rows, size))
            self._rows += rows
            self._bytes += size
            self._changed.notify_all()
        self._on_put()
        return True

    def wake(self) -> None:
        """Let waiting `put`s and `get`s look again."""
        with self._changed:
            self._changed.notify_all()

    def get(self, wait_s: float = 0.0) -> Queued | None:
        """The oldest sample, waiting for one at most `wait_s`; None when there is none. May return early on `wake`."""
        with self._changed:
            if not self._items and wait_s > 0:
                self._changed.wait(wait_s)
            if not self._items:
                return None
            item, rows, size = self._items.popleft()
            self._rows -= rows
            self._bytes -= size
            self._changed.notify_all()
        return item


def row_count(sample: Sample) -> int:
    """Rows of a sample."""
    return 1 if isinstance(sample, Reading) else int(sample.num_rows)


def byte_count(sample: Sample) -> int:
    """Bytes that a sample takes in memory, about."""
    if not isinstance(sample, Reading):
        return int(sample.nbytes)
    texts = sum(len(value) for value in sample.values.values() if isinstance(value, str | bytes | list))
    return _READING_BYTES + _FIELD_BYTES * len(sample.values) + texts
