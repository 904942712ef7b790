"""Conditions that start a burst, with hysteresis. Pure; the same for one value as for a column.

A condition becomes active when its limit is crossed, and ends when the value is back by the hysteresis:

============  ==================================  =====================================================
condition     active from                         ends at
============  ==================================  =====================================================
above         value > above                       value <= above - hysteresis
below         value < below                       value >= below + hysteresis
outside       value < low or value > high         low + hysteresis <= value <= high - hysteresis
rate_above    |change| per second > rate_above    |change| per second <= rate_above - hysteresis
============  ==================================  =====================================================

Null and NaN neither start nor end it. The change is taken against the last value that was neither, in float64; without
a positive time between the two it says nothing.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import pyarrow as pa

from edge_agent import compute as pc
from edge_agent.sampling.compare import above, below, is_integer, is_numeric, nan_mask
from edge_agent.sampling.settings import Trigger
from edge_agent.sensors.port import SensorConfigError


class Condition(Protocol):
    """One trigger of one field, with its state."""

    field: str

    def update(self, value: Any, ts_us: int) -> bool:
        """Whether it is active at this value."""

    def update_all(self, column: pa.Array, times: pa.Array) -> pa.BooleanArray:
        """Whether it is active at each value of a column; `times` is int64."""


def condition(trigger: Trigger, schema: pa.Schema) -> Condition:
    """The condition of one trigger.

    Raises:
        SensorConfigError: the stream has no such field, or it is not a number.
    """
    if trigger.field not in schema.names[1:]:
        raise SensorConfigError(
            f"a trigger names field {trigger.field!r}, which the sensor does not have; "
            f"its fields are {schema.names[1:][:20]}"
        )
    kind = schema.field(trigger.field).type
    if not is_numeric(kind):
        raise SensorConfigError(
            f"a trigger names field {trigger.field!r} of type {kind}, which is not a number; choose a number field"
        )
    if trigger.rate_above is not None:
        return RateCondition(trigger.field, trigger.rate_above, trigger.rate_above - trigger.hysteresis)
    low, high = -math.inf, math.inf
    if trigger.outside is not None:
        low, high = trigger.outside
    elif trigger.above is not None:
        high = trigger.above
    elif trigger.below is not None:
        low = trigger.below
    return RangeCondition(trigger.field, low, high, trigger.hysteresis, is_integer(kind))


class RangeCondition:
    """Active outside `low .. high`, until back within the range narrowed by the hysteresis on both sides."""

    def __init__(self, field: str, low: float, high: float, hysteresis: float, integer: bool) -> None:
        self.field = field
        self._low, self._high = low, high
        self._back_low, self._back_high = low + hysteresis, high - hysteresis
        self._integer = integer
        self._active = False

    def update(self, value: Any, ts_us: int) -> bool:
        """Whether it is active at this value."""
        if value is not None and value == value:
            if value < self._low or value > self._high:
                self._active = True
            elif self._back_low <= value <= self._back_high:
                self._active = False
        return self._active

    def update_all(self, column: pa.Array, times: pa.Array) -> pa.BooleanArray:
        """Whether it is active at each value."""
        starts = pc.or_(below(column, self._low), above(column, self._high))
        speaks = column.is_valid() if self._integer else pc.and_(column.is_valid(), pc.invert(nan_mask(column)))
        away = pc.or_(below(column, self._back_low), above(column, self._back_high))
        ends = pc.and_not(speaks, away)
        active = _latched(starts, ends, self._active)
        if len(active):
            self._active = active[-1].as_py()
        return active


class RateCondition:
    """Active while the value changes faster than a limit per second."""

    def __init__(self, field: str, rate: float, back_rate: float) -> None:
        self.field = field
        self._rate, self._back_rate = rate, back_rate
        self._active = False
        self._before: tuple[float, int] | None = None

    def update(self, value: Any, ts_us: int) -> bool:
        """Whether it is active at this value."""
        if value is None or value != value:
            return self._active
        number, before = float(value), self._before
        self._before = (number, ts_us)
        if before is not None and ts_us > before[1]:
            change, seconds = abs(number - before[0]), (ts_us - before[1]) / 1e6
            if change > self._rate * seconds:
                self._active = True
            elif change <= self._back_rate * seconds:
                self._active = False
        return self._active

    def update_all(self, column: pa.Array, times: pa.Array) -> pa.BooleanArray:
        """Whether it is active at each value."""
        numbers = column.cast(pa.float64(), safe=False)
        if len(column) < 2 or numbers.null_count or pc.any(numbers.is_nan()).as_py() or _far_apart(times):
            pairs = zip(column.to_pylist(), times.to_pylist(), strict=True)
            return pa.array([self.update(value, ts_us) for value, ts_us in pairs], type=pa.bool_())
        first = pa.array([self.update(column[0].as_py(), times[0].as_py())], type=pa.bool_())
        elapsed_us = pc.subtract(times.slice(1), times.slice(0, len(times) - 1))
        change = pc.abs(pc.subtract(numbers.slice(1), numbers.slice(0, len(numbers) - 1)))
        seconds = pc.divide(elapsed_us.cast(pa.float64()), 1e6)
        forward = pc.greater(elapsed_us, 0)
        starts = pc.and_(forward, pc.greater(change, pc.multiply(seconds, self._rate)))
        ends = pc.and_(forward, pc.less_equal(change, pc.multiply(seconds, self._back_rate)))
        rest = _latched(starts, ends, self._active)
        self._active = rest[-1].as_py()
        self._before = (numbers[-1].as_py(), times[-1].as_py())
        return pa.concat_arrays([first, rest])


def _latched(starts: pa.BooleanArray, ends: pa.BooleanArray, active: bool) -> pa.BooleanArray:
    """A latch over time: True from a start, False from an end, in between as before; `active` is the state at first."""
    said = pc.if_else(starts, True, pc.if_else(ends, False, pa.scalar(None, pa.bool_())))
    return pc.fill_null_forward(said).fill_null(active)


def _far_apart(times: pa.Array) -> bool:
    """Whether differences of these times could overflow int64 or lose microseconds in float64."""
    bounds = pc.min_max(times).as_py()
    return int(bounds["max"]) - int(bounds["min"]) >= 2**53
