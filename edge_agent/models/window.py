"""Windows over a live stream, by the rule of `contract.models.Window`: readings in, complete windows out.

One pass, no search: a reading costs one row written, a block one slice. The ring holds at most two windows and what one
block adds in a step. Single readings are only put aside until a window may be complete: what is done to many of them in
a row costs a third, and it is time in which a sampler may have to wait for the interpreter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from contract.models import Window
from contract.names import TS
from edge_agent import compute as pc
from edge_agent.sensors.port import Reading, Sample

READINGS_ASIDE_MAX = 32
"""Single readings that wait for each other; what they take in memory as objects is bounded by it."""
SLACK_ROWS_MIN = 1_024
"""Rows beyond a window that the ring holds before it moves the last ones to its beginning."""
_EXACT_INT = 1 << 53
"""Beyond, an integer turned into float64 and then float32 may be rounded twice."""

Floats = npt.NDArray[np.float32]


class Cut(NamedTuple):
    """A complete window."""

    values: Floats
    """`[1, W, C]`, its own memory."""
    start_us: int
    """`ts` of its first reading."""
    end_us: int
    """`ts` of its last reading."""


class WindowRing:
    """The windows of one stream, for one set of fields. Not thread-safe.

    Args:
        window: rows, stride, and the gap that ends a run.
        fields: names of the channels, in their order.
    """

    def __init__(self, window: Window, fields: Sequence[str]) -> None:
        self._rows, self._stride = window.rows, window.stride
        self._gap_us = window.gap_us
        self._fields = tuple(fields)
        capacity = window.rows + max(window.rows, SLACK_ROWS_MIN)
        self._values: Floats = np.empty((capacity, len(self._fields)), np.float32)
        self._ts = np.empty(capacity, np.int64)
        self._end = 0
        """Rows in the ring; those before the last `rows` are of no use any more."""
        self._in_run = 0
        self._due = window.rows
        """Readings of this run after which the next window is complete."""
        self._last_us: int | None = None
        self._aside: deque[Reading] = deque()
        """Single readings that are not in the ring yet."""

    def feed(self, sample: Sample) -> Iterator[Cut]:
        """Take a stamped reading or a record batch; the windows that it completes.

        The iterator has to be used up: what is taken is taken as it is asked for. What it raises of a reading that does
        not fit may be of an earlier one, put aside; those after it are still there.
        """
        if isinstance(sample, Reading):
            self._aside.append(sample)
            # `rows` is what a new run takes, if one of them begins it: with long strides, sooner than this one would.
            if len(self._aside) < min(self._due - self._in_run, self._rows, READINGS_ASIDE_MAX):
                return iter(())
            return self._feed_readings()
        return chain(self._feed_readings(), self._feed_block(sample))

    def reset(self) -> None:
        """Begin a new run with the reading after the one that did not fit."""
        self._last_us = None

    def _feed_readings(self) -> Iterator[Cut]:
        while self._aside:
            self._take_reading(self._aside.popleft())
            if self._in_run == self._due:
                yield self._cut()

    def _take_reading(self, reading: Reading) -> None:
        ts_us = reading.ts_us
        assert ts_us is not None
        last_us = self._last_us
        if last_us is None or not 0 <= ts_us - last_us <= self._gap_us:
            self._begin_run()
        if self._end == len(self._ts):
            self._compact()
        values = reading.values
        row = self._values[self._end]
        for channel, name in enumerate(self._fields):
            value = values.get(name)
            if value is None:
                row[channel] = np.nan
            elif type(value) is int and not -_EXACT_INT <= value <= _EXACT_INT:
                row[channel] = pa.scalar(value).cast(pa.float32(), safe=False).as_py()
            else:
                row[channel] = value
        self._ts[self._end] = ts_us
        self._last_us = ts_us
        self._end += 1
        self._in_run += 1

    def _feed_block(self, block: pa.RecordBatch) -> Iterator[Cut]:
        if not block.num_rows:
            return
        ts = block.column(TS).view(pa.int64()).to_numpy(zero_copy_only=False)
        columns = [_as_float32(block, name) for name in self._fields]
        steps = np.diff(ts)
        breaks = np.flatnonzero((steps < 0) | (steps > self._gap_us)) + 1
        last_us = self._last_us
        first_us = int(ts[0])
        if last_us is None or not 0 <= first_us - last_us <= self._gap_us:
            self._begin_run()
        at = 0
        for end in (*breaks.tolist(), len(ts)):
            while at < end:
                if self._end == len(self._ts):
                    self._compact()
                count = min(end - at, self._due - self._in_run, len(self._ts) - self._end)
                to = slice(self._end, self._end + count)
                self._ts[to] = ts[at : at + count]
                for channel, column in enumerate(columns):
                    self._values[to, channel] = column[at : at + count]
                self._end += count
                self._in_run += count
                at += count
                if self._in_run == self._due:
                    yield self._cut()
            if end < len(ts):
                self._begin_run()
        self._last_us = int(ts[-1])

    def _begin_run(self) -> None:
        self._end = self._in_run = 0
        self._due = self._rows

    def _compact(self) -> None:
        """Move what the next window may need to the beginning: each row is moved at most once per window it is in."""
        keep = self._rows - 1
        self._values[:keep] = self._values[self._end - keep : self._end].copy()
        self._ts[:keep] = self._ts[self._end - keep : self._end].copy()
        self._end = keep

    def _cut(self) -> Cut:
        self._due += self._stride
        start = self._end - self._rows
        values = self._values[start : self._end].copy()[np.newaxis]
        return Cut(values, int(self._ts[start]), int(self._ts[self._end - 1]))


def _as_float32(block: pa.RecordBatch, name: str) -> Floats:
    """A column as float32; null, and a column that is not there, as NaN."""
    at = block.schema.get_field_index(name)
    if at < 0 or pa.types.is_null(block.schema.field(at).type):
        return np.full(block.num_rows, np.nan, np.float32)
    column = block.column(at)
    if not pa.types.is_float32(column.type):
        column = pc.cast(column, pa.float32(), safe=False)
    if column.null_count:
        column = pc.fill_null(column, float("nan"))
    values: Floats = column.to_numpy(zero_copy_only=False)
    return values
