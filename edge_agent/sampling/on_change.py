"""Report by exception: a row is kept when it differs enough from the last row that was kept. Pure.

A row is reported when it is the first one, or when for any watched field

* null turned to a value or a value to null, against the last reported row;
* NaN turned to a number or a number to NaN (NaN after NaN is no change);
* a number left the band `reference - width .. reference + width`, where the reference is the field's value in the last
  *reported* row (so that slow drift shows) and the width is the deadband, or its percentage of |reference|; from an
  infinite reference every other value is a change; 0.0 and -0.0 are alike;
* anything else (bool, string, binary) is not equal to it;

or when `max_silence_s` passed since the last reported row, by the rows' own `ts`, or `ts` went back (a clock was set:
otherwise silence could last as long as the jump).

A record batch gives the same rows as its readings one by one. Quiet stretches are scanned by Arrow in growing pieces,
busy ones row by row, so that neither a kHz sensor nor a deadband that is too small costs more than it must.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pyarrow as pa

from edge_agent import compute as pc
from edge_agent.sampling.compare import above, below, is_integer, is_numeric, nan_mask
from edge_agent.sampling.settings import OnChange, parse_deadband
from edge_agent.sampling.slices import rows_of
from edge_agent.sensors.port import Reading, Sample, SensorConfigError

_PAGE_ROWS = 64
_PAGE_ROWS_MAX = 65_536
_FLOAT_MAX = sys.float_info.max


class OnChangeMode:
    """Keeps what changed.

    Args:
        settings: deadbands, watched fields, longest silence.
        schema: `ts` and the stream's fields.

    Raises:
        SensorConfigError: a field that the stream does not have, or whose type cannot be compared.
    """

    held_rows = 0

    def __init__(self, settings: OnChange, schema: pa.Schema) -> None:
        names = schema.names[1:] if settings.watch is None else list(settings.watch)
        for name in (*names, *settings.deadband):
            if name not in schema.names[1:]:
                raise SensorConfigError(
                    f"on_change names field {name!r}, which the sensor does not have; "
                    f"its fields are {schema.names[1:][:20]}"
                )
        self._watches = [_watch(schema.field(name), settings) for name in names]
        self._silence_us = round(settings.max_silence_s * 1_000_000)
        self._last_ts_us: int | None = None
        self._page_rows = _PAGE_ROWS

    def feed(self, sample: Sample) -> list[Sample]:
        """The rows of `sample` that are reported, in order; at most one item."""
        if isinstance(sample, Reading):
            return [sample] if self._take_row(sample.ts_us or 0, [sample.values[w.name] for w in self._watches]) else []
        return self._feed_batch(sample)

    def _take_row(self, ts_us: int, values: list[Any]) -> bool:
        """Whether the row is reported; if so, it is the new reference."""
        if self._last_ts_us is not None and not self._silent_too_long(ts_us):
            for watch, value in zip(self._watches, values, strict=True):
                if watch.changed(value):
                    break
            else:
                return False
        self._refer_to(ts_us, values)
        return True

    def _silent_too_long(self, ts_us: int) -> bool:
        last = self._last_ts_us
        return last is not None and self._silence_us > 0 and not last <= ts_us < last + self._silence_us

    def _refer_to(self, ts_us: int, values: list[Any]) -> None:
        self._last_ts_us = ts_us
        for watch, value in zip(self._watches, values, strict=True):
            watch.refer_to(value)

    def _feed_batch(self, batch: pa.RecordBatch) -> list[Sample]:
        times = batch.column(0).view(pa.int64())
        columns = [batch.column(watch.name) for watch in self._watches]
        kept: list[int] = []
        row = 0
        while row < batch.num_rows:
            stop = min(row + self._page_rows, batch.num_rows)
            if self._page_rows == _PAGE_ROWS or self._last_ts_us is None:
                hits = self._scan_rows(times, columns, row, stop)
            else:
                hits = self._scan_page(times, columns, row, stop)
                # What follows a hit has a new reference, so it is looked at again.
                stop = hits[0] + 1 if hits else stop
            kept += hits
            row = stop
            # Kept from block to block: a quiet stream stays quiet.
            self._page_rows = _PAGE_ROWS if hits else min(self._page_rows * 4, _PAGE_ROWS_MAX)
        return _rows(batch, kept)

    def _scan_rows(self, times: pa.Array, columns: list[pa.Array], start: int, stop: int) -> list[int]:
        size = stop - start
        ts_us = times.slice(start, size).to_pylist()
        rows = zip(*(column.slice(start, size).to_pylist() for column in columns), strict=True)
        return [start + i for i, values in enumerate(rows) if self._take_row(ts_us[i], list(values))]

    def _scan_page(self, times: pa.Array, columns: list[pa.Array], start: int, stop: int) -> list[int]:
        """The first row of the page that is reported, if any."""
        size = stop - start
        masks = [
            watch.changed_mask(column.slice(start, size)) for watch, column in zip(self._watches, columns, strict=True)
        ]
        if self._silence_us > 0 and self._last_ts_us is not None:
            page = times.slice(start, size)
            masks += [above(page, self._last_ts_us + self._silence_us - 1), below(page, self._last_ts_us)]
        firsts = [pc.index(mask, True).as_py() for mask in masks]
        first = min((index for index in firsts if index >= 0), default=-1)
        if first < 0:
            return []
        row = start + first
        self._refer_to(times[row].as_py(), [column[row].as_py() for column in columns])
        return [row]


class _Watch:
    """The last reported value of one field, and whether another one differs from it. Plain equality."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._reference: Any = None

    def refer_to(self, value: Any) -> None:
        self._reference = value

    def changed(self, value: Any) -> bool:
        return bool(value != self._reference)

    def changed_mask(self, column: pa.Array) -> pa.BooleanArray:
        if self._reference is None:
            return column.is_valid()
        return pc.not_equal(column, pa.scalar(self._reference, column.type)).fill_null(True)


class _NumberWatch(_Watch):
    """A field with a band around its last reported value."""

    def __init__(self, name: str, width: tuple[float, float], integer: bool) -> None:
        super().__init__(name)
        self._absolute, self._relative = width
        self._integer = integer
        self._low: float = 0
        self._high: float = 0

    def refer_to(self, value: Any) -> None:
        self._reference = value
        if value is None or value != value or math.isinf(value):
            self._low = self._high = math.nan if value is None else value
            return
        width = self._absolute or self._relative * abs(value)
        if self._integer:
            # Whole numbers within the width; exact, where a float64 would not be.
            self._low, self._high = value - math.floor(width), value + math.floor(width)
        else:
            # Never infinite, so that an infinite value is outside even of a band that overflows.
            self._low, self._high = max(value - width, -_FLOAT_MAX), min(value + width, _FLOAT_MAX)

    def changed(self, value: Any) -> bool:
        reference = self._reference
        if value is None or reference is None:
            return value is not reference
        if value != value or reference != reference:
            return bool((value != value) != (reference != reference))
        return bool(value < self._low or value > self._high)

    def changed_mask(self, column: pa.Array) -> pa.BooleanArray:
        if self._reference is None:
            return column.is_valid()
        if self._reference != self._reference:
            return pc.invert(nan_mask(column))
        mask = pc.or_(below(column, self._low), above(column, self._high))
        if column.null_count:
            mask = pc.or_(mask, column.is_null())
        return mask if self._integer else pc.or_(mask, nan_mask(column))


def _watch(field: pa.Field, settings: OnChange) -> _Watch:
    kind, types = field.type, pa.types
    if is_numeric(kind):
        return _NumberWatch(
            field.name, parse_deadband(field.name, settings.deadband.get(field.name, 0.0)), is_integer(kind)
        )
    if field.name in settings.deadband:
        raise SensorConfigError(
            f"deadband names field {field.name!r} of type {kind}, which is not a number; "
            "remove it, any change is reported"
        )
    if types.is_boolean(kind) or kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return _Watch(field.name)
    raise SensorConfigError(
        f"on_change cannot compare field {field.name!r} of type {kind}; name the fields that matter in watch = […]"
    )


def _rows(batch: pa.RecordBatch, kept: list[int]) -> list[Sample]:
    if not kept:
        return []
    if kept[-1] - kept[0] + 1 == len(kept):
        return [rows_of(batch, kept[0], len(kept))]
    return [batch.take(pa.array(kept, type=pa.int64()))]
