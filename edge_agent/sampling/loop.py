"""One sensor, step by step: open with retry, read when due, check, apply the mode, hand on. No thread, no sleeping."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar, cast

import msgspec
import pyarrow as pa
import structlog

from contract.backoff import Backoff
from contract.errors import ConfigurationError, HeadwaterError
from contract.limits import DEFAULT_LIMITS
from edge_agent.sampling.burst import BurstMode
from edge_agent.sampling.modes import Mode, build_mode
from edge_agent.sampling.queue import Sink, row_count
from edge_agent.sampling.settings import Sampling, Stream, with_rate
from edge_agent.sampling.status import SamplingStatus, State
from edge_agent.schedule import Schedule
from edge_agent.sensors.clock import Clock
from edge_agent.sensors.columns import Columns, infer_fields
from edge_agent.sensors.port import (
    Block,
    Reading,
    Sample,
    Sensor,
    SensorConfigError,
    SensorError,
    SensorExhausted,
    SensorValueError,
)

IDLE_S = 3600.0
"""The wait when nothing is due: until somebody wakes the thread."""
_NOTHING_NEW_S = 0.01
_NOTICE_INTERVAL_NS = 60 * 1_000_000_000
_BLOCK_ROWS_MAX = DEFAULT_LIMITS.rows_max

Result = TypeVar("Result")


class SensorLoop:
    """Runs one sensor. `step` belongs to one thread; `reconfigure` and `status` may come from any.

    Args:
        stream: the stream's name, for logs and messages.
        sensor: closed; opened, closed and opened again here.
        sampling: mode and rate.
        sink: takes the rows.
        clock: wall clock for rows without a time, monotonic clock for the schedule.
        backoff: pauses between attempts to open.
        enabled: whether to begin at once.
    """

    def __init__(
        self,
        stream: str,
        sensor: Sensor,
        sampling: Sampling,
        sink: Sink,
        clock: Clock,
        backoff: Backoff,
        enabled: bool = True,
    ) -> None:
        self.stream = stream
        self._sensor, self._sink, self._clock, self._backoff = sensor, sink, clock, backoff
        self._configured, self._configured_enabled = sampling, enabled
        self._sampling, self._enabled = sampling, enabled
        self._pending: tuple[bool, Sampling] | None = None
        self._lock = threading.Lock()
        self._log = structlog.get_logger().bind(stream=stream)
        self._notices: dict[str, tuple[int, int]] = {}

        self._state = State.CLOSED if enabled else State.DISABLED
        self._is_open = False
        self._retry_ns = 0
        self._schedule: Schedule | None = None
        self._due_ns = 0
        self._columns: Columns | None = None
        self._mode: Mode | None = None
        self._status = SamplingStatus(enabled=enabled, rate_hz=_rate(sampling))
        self._counts = dict.fromkeys(
            ("reads", "rows_read", "rows_refused", "rows_out", "rows_dropped", "ticks_missed", "errors"), 0
        )
        self._mode_counts = {"bursts": 0, "bursts_cut": 0}
        self._last_error = ""
        self._last_read_ns: int | None = None
        self._call: tuple[str, int] | None = None

    # From any thread.

    def reconfigure(self, *, enabled: bool | None = None, rate_hz: float | None = None) -> None:
        """Take over a configuration at the next step. None stands for what the device's own file says.

        Switching on again also revives a sampler that failed or came to its end. The caller wakes the thread.

        Raises:
            SensorConfigError: the rate is out of range, or the driver sets the pace. Nothing was changed.
        """
        sampling = with_rate(self._configured, rate_hz)
        with self._lock:
            self._pending = (self._configured_enabled if enabled is None else enabled, sampling)

    def status(self) -> SamplingStatus:
        """Condition and counters as of the last step, and what of the driver runs now."""
        with self._lock:
            status, call = self._status, self._call
        if call is None:
            return status
        return msgspec.structs.replace(status, calling=call[0], calling_since_ns=call[1])

    # From the sampler's thread.

    def step(self, interrupt: threading.Event, stop: threading.Event) -> float:
        """Do what is due, and say how long nothing will be, seconds (0: go on at once).

        Args:
            interrupt: ends a driver's waiting: set when there is something to look at, such as a new configuration.
            stop: set when the sampler is asked to end; handed to the sink.
        """
        self._take_over()
        try:
            wait_s = self._step(interrupt, stop)
        finally:
            self._publish()
        return wait_s

    def close(self) -> None:
        """Close the sensor; the end."""
        self._close()
        if self._state in (State.RUNNING, State.RETRYING):
            self._state = State.CLOSED
        self._publish()

    def fail(self, error: Exception) -> None:
        """Record an error outside the sensor that ended the thread."""
        self._state, self._last_error = State.FAILED, f"{type(error).__name__}: {error}"
        self._counts["errors"] += 1
        self._close()
        self._publish()

    def _step(self, interrupt: threading.Event, stop: threading.Event) -> float:
        if not self._enabled or self._state in (State.EXHAUSTED, State.FAILED):
            return IDLE_S
        try:
            if not self._is_open:
                now_ns = self._clock.monotonic_ns()
                if now_ns < self._retry_ns:
                    return (self._retry_ns - now_ns) / 1e9
                self._open()
            wait_ns = self._due_ns - self._clock.monotonic_ns()
            if wait_ns > 0:
                return wait_ns / 1e9
            return self._read(interrupt, stop)
        except SensorExhausted as end:
            self._close()
            self._state = State.EXHAUSTED
            self._log.info("sensor_exhausted", reason=str(end), rows_read=self._counts["rows_read"])
            return IDLE_S
        except ConfigurationError as error:
            self._close()
            self._state, self._last_error = State.FAILED, str(error)
            self._counts["errors"] += 1
            self._log.error("sensor_failed", error=str(error))
            return IDLE_S
        except HeadwaterError as error:
            return self._retry_later(error)

    def _open(self) -> None:
        # Closed on failure too: a driver may have opened half of what it needs.
        self._is_open = True
        self._calling("open", self._sensor.open)
        fields = self._calling("schema", lambda: self._sensor.schema)
        if fields is not None:
            self._bind(fields)
        self._new_schedule()
        if self._state is not State.RETRYING:
            self._log.info("sensor_opened", mode=type(self._sampling).__name__, rate_hz=_rate(self._sampling))

    def _read(self, interrupt: threading.Event, stop: threading.Event) -> float:
        handed = self._calling("read", self._sensor.read, interrupt)
        self._last_read_ns = self._clock.monotonic_ns()
        self._counts["reads"] += 1
        if self._state is State.RETRYING:
            self._notice("sensor_answers_again", errors=self._counts["errors"])
        self._state = State.RUNNING
        self._backoff.reset()
        if handed is not None:
            self._take(handed, stop)
        if self._schedule is not None:
            missed = self._schedule.overruns
            self._due_ns = self._schedule.next_due(self._clock.monotonic_ns())
            self._counts["ticks_missed"] += self._schedule.overruns - missed
            return max(0.0, (self._due_ns - self._clock.monotonic_ns()) / 1e9)
        # A driver that sets the pace waits inside read; this pause is for one that does not, so that it cannot spin.
        return _NOTHING_NEW_S if handed is None and not interrupt.is_set() else 0.0

    def _take(self, handed: Reading | Block, stop: threading.Event) -> None:
        rows = _rows_handed(handed)
        self._counts["rows_read"] += rows
        try:
            schema, samples = self._sampled(handed)
        except SensorValueError as error:
            self._counts["rows_refused"] += rows
            self._counts["errors"] += 1
            self._last_error = str(error)
            self._notice("sensor_reading_refused", error=str(error), rows=rows)
            return
        except HeadwaterError:
            self._counts["rows_refused"] += rows
            raise
        self._hand_on(schema, samples, stop)

    def _sampled(self, handed: Reading | Block) -> tuple[pa.Schema, list[Sample]]:
        """The rows that the mode keeps, checked and stamped."""
        now_us = self._clock.wall_us()
        try:
            if self._columns is None or self._mode is None:
                self._bind(infer_fields(handed))
            columns, mode = cast(Columns, self._columns), cast(Mode, self._mode)
            sample: Sample = (
                columns.reading(handed, now_us) if isinstance(handed, Reading) else columns.block(handed, now_us)
            )
        except HeadwaterError:
            raise
        except Exception as error:  # values of a third party's own classes may raise anything
            raise SensorValueError(f"a reading cannot be read: {type(error).__name__}: {error}") from error
        return columns.schema, mode.feed(sample)

    def _hand_on(self, schema: pa.Schema, samples: list[Sample], stop: threading.Event) -> None:
        # One deadline for all of them: a burst with its history may be many samples.
        deadline_ns = self._clock.monotonic_ns() + round(self._sampling.queue_wait_s * 1e9)
        for sample in samples:
            for piece in _pieces(sample):
                rows = row_count(piece)
                wait_s = max(0.0, (deadline_ns - self._clock.monotonic_ns()) / 1e9)
                if self._sink.put(schema, piece, wait_s, stop):
                    self._counts["rows_out"] += rows
                else:
                    self._counts["rows_dropped"] += rows
                    self._notice("sampling_queue_full", rows=rows, dropped=self._counts["rows_dropped"])

    def _bind(self, fields: pa.Schema) -> None:
        """Take over the fields; state of the mode and the schema object survive when they are the same as before."""
        columns = Columns(fields)
        if self._columns is not None and self._columns.schema.equals(columns.schema) and self._mode is not None:
            return
        self._drop_mode()
        self._mode = build_mode(self._sampling, columns.schema)
        self._columns = columns

    def _drop_mode(self) -> None:
        """Forget a mode; what its ring held is suppressed for good."""
        if isinstance(self._mode, BurstMode):
            self._mode_counts["bursts"] += self._mode.bursts
            self._mode_counts["bursts_cut"] += self._mode.truncated
        self._mode = None

    def _retry_later(self, error: HeadwaterError) -> float:
        self._close()
        delay_s = self._backoff.next_delay_s()
        self._retry_ns = self._clock.monotonic_ns() + round(delay_s * 1e9)
        self._state, self._last_error = State.RETRYING, str(error)
        self._counts["errors"] += 1
        self._notice("sensor_retry", error=str(error), delay_s=round(delay_s, 3))
        return delay_s

    def _close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._calling("close", self._sensor.close)
        except HeadwaterError as error:
            self._counts["errors"] += 1
            self._log.warning("sensor_close_failed", error=str(error))

    def _calling(self, what: str, call: Callable[..., Result], *arguments: object) -> Result:
        """Call the driver; whatever a third party's code raises becomes a SensorError."""
        self._call = (what, self._clock.monotonic_ns())
        try:
            return call(*arguments)
        except HeadwaterError:
            raise
        except Exception as error:
            raise SensorError(f"{what} of the driver raised {type(error).__name__}: {error}") from error
        finally:
            self._call = None

    def _take_over(self) -> None:
        """Apply what `reconfigure` left."""
        with self._lock:
            pending, self._pending = self._pending, None
        if pending is None:
            return
        was_enabled, before = self._enabled, self._sampling
        self._enabled, self._sampling = pending
        if not self._enabled:
            self._close()
            self._state = State.DISABLED
        elif not was_enabled or self._state in (State.FAILED, State.EXHAUSTED):
            self._state, self._retry_ns, self._last_error = State.CLOSED, 0, ""
            self._backoff.reset()
            # A stream that was off starts afresh: its first reading is reported again.
            self._drop_mode()
            self._columns = None
        elif self._sampling != before and self._is_open:
            self._new_schedule()
        if (was_enabled, before) != pending:
            self._log.info("sampling_reconfigured", enabled=self._enabled, rate_hz=_rate(self._sampling))

    def _new_schedule(self) -> None:
        rate_hz = _rate(self._sampling)
        now_ns = self._clock.monotonic_ns()
        self._schedule = None if rate_hz is None else Schedule(rate_hz, now_ns)
        self._due_ns = now_ns if self._schedule is None else self._schedule.next_due(now_ns)

    def _notice(self, event: str, **details: object) -> None:
        """Log the first of a kind, then one a minute with the number left out: a bad sensor must not fill a disk."""
        now_ns = self._clock.monotonic_ns()
        next_ns, left_out = self._notices.get(event, (now_ns, 0))
        if now_ns < next_ns:
            self._notices[event] = (next_ns, left_out + 1)
            return
        self._notices[event] = (now_ns + _NOTICE_INTERVAL_NS, 0)
        self._log.warning(event, left_out=left_out, **details)

    def _publish(self) -> None:
        counts, mode = self._counts, self._mode
        held = mode.held_rows if mode is not None else 0
        bursts, cut = self._mode_counts["bursts"], self._mode_counts["bursts_cut"]
        if isinstance(mode, BurstMode):
            bursts, cut = bursts + mode.bursts, cut + mode.truncated
        suppressed = counts["rows_read"] - counts["rows_refused"] - counts["rows_out"] - counts["rows_dropped"] - held
        status = SamplingStatus(
            state=self._state,
            enabled=self._enabled,
            rate_hz=_rate(self._sampling),
            last_error=self._last_error,
            rows_suppressed=suppressed,
            rows_held=held,
            bursts=bursts,
            bursts_cut=cut,
            last_read_ns=self._last_read_ns,
            calling="",
            **counts,
        )
        with self._lock:
            self._status = status


def default_backoff(rng: random.Random) -> Backoff:
    """Pauses between attempts to open a sensor: up to half a second at first, up to a minute at last."""
    return Backoff(0.5, 60.0, rng)


def _rate(sampling: Sampling) -> float | None:
    return None if isinstance(sampling, Stream) else sampling.rate_hz or None


def _rows_handed(handed: Reading | Block) -> int:
    if isinstance(handed, Reading):
        return 1
    if not isinstance(handed, Block):
        raise SensorConfigError(
            f"the driver's read returned a {type(handed).__name__}; it has to return a Reading, a Block or None"
        )
    return max((len(column) for column in handed.columns.values() if hasattr(column, "__len__")), default=0)


def _pieces(sample: Sample) -> list[Sample]:
    if isinstance(sample, Reading) or sample.num_rows <= _BLOCK_ROWS_MAX:
        return [sample] if row_count(sample) else []
    return [sample.slice(start, _BLOCK_ROWS_MAX) for start in range(0, sample.num_rows, _BLOCK_ROWS_MAX)]
