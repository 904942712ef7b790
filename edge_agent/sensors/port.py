"""The sensor port: what a driver is, what it hands over, and the errors by which it says what to do next.

A driver is anything with the five members of `Sensor`. It may be opened again after it was closed; it is used by one
thread at a time, and never has to handle two calls at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import msgspec
import pyarrow as pa

from contract.errors import ConfigurationError, HeadwaterError, TemporaryError


class SensorError(TemporaryError):
    """The sensor did not answer. The sampler closes it, and opens it again after a growing, jittered pause."""


class SensorValueError(SensorError):
    """One reading or block does not fit the declared fields. It is refused and counted; the next one may be good."""


class SensorExhausted(HeadwaterError):
    """There will be no more readings: a recording has ended. The sampler closes the sensor and rests."""


class SensorConfigError(ConfigurationError):
    """A driver, an option or a field cannot work as configured. The sampler gives up; the message names the remedy."""


class Reading(msgspec.Struct, frozen=True):
    """One row as a driver hands it over.

    Attributes:
        values: field name to a Python scalar (numpy scalars are taken too) or None for null. A declared field that is
            absent is null.
        ts_us: device clock, microseconds since 1970-01-01 UTC; None lets the sampler stamp the moment `read` returned.
    """

    values: Mapping[str, Any]
    ts_us: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Many rows as a driver hands them over: one array per field, so that a kHz sensor costs no Python loop per row.

    An array is a `pyarrow.Array`, a one-dimensional numpy array, an object with a typed buffer (`array.array`, a cast
    `memoryview`), or a list of Python values (checked one by one, so slow). Its element type is the field's type
    exactly; nothing is cast. Numpy arrays and buffers are copied, so a driver may fill the same buffer again.

    The time of the rows is given in one of three ways:

    * `ts_us`: int64 array, microseconds since 1970-01-01 UTC, one per row;
    * `start_us` and `interval_ns`: row i has `start_us + i * interval_ns // 1000`;
    * `interval_ns` alone: the last row is stamped with the moment `read` returned. Jitter of `read` shows in it.

    Attributes:
        columns: field name to array, all of equal length. A declared field that is absent is null in every row.
    """

    columns: Mapping[str, Any]
    ts_us: Any = None
    start_us: int | None = None
    interval_ns: int | None = None


Sample: TypeAlias = Reading | pa.RecordBatch
"""What leaves the check of `columns.Columns`: a complete, stamped reading, or a record batch with `ts` in front."""


@runtime_checkable
class Sensor(Protocol):
    """One source of readings."""

    @property
    def schema(self) -> pa.Schema | None:
        """The fields without `ts`, valid once opened; None where the first reading decides."""

    def open(self) -> None:
        """Get ready to read.

        Raises:
            SensorError: the sensor is not there now; it is tried again later.
            SensorConfigError: it can never work as configured.
        """

    def read(self, stop: threading.Event) -> Reading | Block | None:
        """The newest reading, or everything since the last call, or None when there is nothing new.

        A driver that paces itself waits here for data, but returns soon after `stop` is set (wait on `stop` itself,
        or in slices of at most a second).

        Raises:
            SensorError: the sensor did not answer.
            SensorExhausted: there will be no more readings.
        """

    def close(self) -> None:
        """Let go of everything; harmless when closed already."""


SensorFactory: TypeAlias = Callable[[Mapping[str, Any]], Sensor]
"""Makes a closed sensor out of the options table of the configuration, or raises `SensorConfigError`."""
