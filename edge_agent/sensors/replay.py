"""Driver `replay`: a recording plays as if it were measured now, at its own pace, faster, or as fast as it is taken.

Rows are handed over as blocks, in the order of the file. Each is due when its time, counted from the first row's and
divided by `speed`, has passed since the sensor was opened; a row whose time lies before that of an earlier row is due
with that one. With `keep_timestamps` rows keep the recorded time; without, the recording is moved so that its first row
is now, and the distances are divided by `speed` as well. A loop plays again after one more mean distance of rows; with
`keep_timestamps` the recorded times come again as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from edge_agent import compute as pc
from edge_agent.sensors.clock import Clock, SystemClock
from edge_agent.sensors.options import parse_options
from edge_agent.sensors.port import Block, Sensor, SensorConfigError, SensorError, SensorExhausted
from edge_agent.sensors.recording import FileOptions, Piece, Recording

_GROUP_S = 0.1
"""Rows that are closer together than this are handed over together, so that a kHz recording is cheap."""
_WAIT_S_MAX = 1.0
_BLOCK_ROWS_MAX = 65_536


class ReplayOptions(FileOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `replay`: what is in the file, and how it is played."""

    speed: float = 1.0
    """2 plays twice as fast; 0 hands over blocks as fast as they are taken, at the recorded distances."""
    loop: bool = False
    start_s: float = 0.0
    """Seconds of recording, counted from its first row, to leave out at the beginning (of each loop)."""
    keep_timestamps: bool = False
    block_rows: int = 4096
    """Most rows handed over at once."""


def create(options: Mapping[str, Any]) -> Sensor:
    """The factory of driver `replay`."""
    return ReplaySensor(parse_options(ReplayOptions, options, "replay"), SystemClock())


class ReplaySensor:
    """Plays one file. Closing and opening it begins again at the start of the file."""

    def __init__(self, options: ReplayOptions, clock: Clock) -> None:
        if not (0 <= options.speed < float("inf")):
            raise SensorConfigError(
                f"driver 'replay': speed = {options.speed}; give a number above 0, or 0 for no pauses"
            )
        if not 1 <= options.block_rows <= _BLOCK_ROWS_MAX:
            raise SensorConfigError(
                f"driver 'replay': block_rows = {options.block_rows} is outside 1..{_BLOCK_ROWS_MAX}"
            )
        if not 0 <= options.start_s < float("inf"):
            raise SensorConfigError(f"driver 'replay': start_s = {options.start_s}; give seconds, 0 or more")
        self._options, self._clock = options, clock
        self._recording: Recording | None = None
        self._pieces: Iterator[Piece] = iter(())
        self._schema: pa.Schema | None = None
        self._pass = _Pass()
        self._piece: Piece | None = None
        self._due_us: pa.Array = pa.array([], pa.int64())
        self._row = 0
        self._start_ns = 0
        self._start_us = 0
        self._group_ns = 0

    @property
    def schema(self) -> pa.Schema | None:
        """The fields as the file has them or as declared; None before the first open."""
        return self._schema

    def open(self) -> None:
        """Open the file, and start the clock of the replay."""
        self._rewind()
        self._pass = _Pass()
        self._start_ns, self._start_us = self._clock.monotonic_ns(), self._clock.wall_us()
        self._group_ns = 0

    def read(self, stop: threading.Event) -> Block | None:
        """The rows that are due, waiting for the next ones; None when `stop` ends the wait."""
        if self._recording is None:
            raise SensorError("driver 'replay' was read before it was opened")
        if self._piece is None:
            self._piece = self._next_piece()
        if self._options.speed == 0:
            return self._hand_over(min(self._options.block_rows, self._rows_left()))
        while not stop.is_set():
            passed_ns = self._clock.monotonic_ns() - self._start_ns
            rows = self._rows_due(passed_ns)
            full = rows == min(self._options.block_rows, self._rows_left())
            if rows and (full or passed_ns >= self._group_ns):
                self._group_ns = passed_ns + round(_GROUP_S * 1e9)
                return self._hand_over(rows)
            next_ns = max(self._group_ns, 0 if rows else self._next_due_ns())
            stop.wait(min((next_ns - passed_ns) / 1e9 + 1e-4, _WAIT_S_MAX))
        return None

    def close(self) -> None:
        """Let go of the file."""
        if self._recording is not None:
            self._recording.close()
        self._recording, self._piece, self._pieces = None, None, iter(())

    def _rewind(self) -> None:
        self.close()
        self._recording = Recording(self._options)
        self._pieces = self._recording.pieces()
        self._schema = self._recording.schema

    def _next_piece(self) -> Piece:
        """The next rows that are to be played.

        Raises:
            SensorExhausted: the recording has ended, and is not a loop.
        """
        while True:
            piece = next(self._pieces, None)
            if piece is None:
                self._next_pass()
                continue
            piece = self._pass.played(piece, self._options.start_s)
            if len(piece.times):
                self._row = 0
                # Times of the replay, in which a row never comes before one that stands in front of it in the file.
                self._due_us = self._pass.rising(piece.times)
                return piece

    def _next_pass(self) -> None:
        done = self._pass
        if done.rows == 0:
            raise SensorConfigError(
                f"driver 'replay': {self._options.path!r} has no row from start_s = {self._options.start_s} on; "
                "choose another file, or a lower start_s"
            )
        if not self._options.loop:
            raise SensorExhausted(f"{self._options.path} has ended after {done.rows} rows")
        self._rewind()
        self._pass = _Pass(base_us=done.end_us())

    def _rows_left(self) -> int:
        return len(self._due_us) - self._row

    def _rows_due(self, passed_ns: int) -> int:
        horizon_us = int(passed_ns / 1000 * self._options.speed)
        left = self._due_us.slice(self._row, self._options.block_rows)
        return int(pc.less_equal(left, horizon_us).true_count)

    def _next_due_ns(self) -> int:
        return int(self._due_us[self._row].as_py() * 1000 / self._options.speed)

    def _hand_over(self, rows: int) -> Block:
        if self._piece is None:
            raise AssertionError("rows are only counted in a piece")
        piece, start = self._piece, self._row
        self._row += rows
        if self._row == len(self._due_us):
            self._piece = None
        batch = piece.rows.slice(start, rows)
        times = piece.times.slice(start, rows)
        if not self._options.keep_timestamps:
            times = self._moved(pc.add_checked(times, self._pass.shift_us))
        return Block(dict(zip(batch.schema.names, batch.columns, strict=True)), ts_us=times)

    def _moved(self, offsets_us: pa.Array) -> pa.Array:
        """Time since the beginning of the replay, as recorded, to time of the device."""
        if self._options.speed not in (0, 1):
            offsets_us = pc.round(pc.divide(offsets_us.cast(pa.float64()), self._options.speed)).cast(pa.int64())
        return pc.add_checked(offsets_us, self._start_us)


class _Pass:
    """One way through the file: which rows are played, and when. Pure.

    Args:
        base_us: time of the replay, as recorded, at which the pass begins.
    """

    def __init__(self, base_us: int = 0) -> None:
        self._base_us = base_us
        self._first_us: int | None = None
        self._origin_us = 0
        self._last_us = 0
        self.rows = 0
        self.shift_us = 0

    def played(self, piece: Piece, start_s: float) -> Piece:
        """The rows of a piece from `start_s` of the recording on."""
        if self._first_us is None:
            self._first_us = piece.times[0].as_py()
            self._origin_us = self._first_us + round(start_s * 1e6)
            self._last_us = self._origin_us
            self.shift_us = self._base_us - self._origin_us
        if start_s > 0:
            wanted = pc.greater_equal(piece.times, self._origin_us)
            if wanted.false_count:
                piece = Piece(piece.times.filter(wanted), piece.rows.filter(wanted))
        self.rows += len(piece.times)
        return piece

    def rising(self, times: pa.Array) -> pa.Array:
        """When the rows are due, microseconds of recording since the replay began; never before an earlier row."""
        risen = pc.cumulative_max(times, start=self._last_us)
        self._last_us = risen[-1].as_py()
        return pc.add_checked(risen, self.shift_us)

    def end_us(self) -> int:
        """When the next pass begins: one mean distance of rows after the last row; a second for a single moment."""
        span_us = self._last_us - self._origin_us
        distance_us = span_us // (self.rows - 1) if self.rows > 1 else 0
        return int(self._base_us + span_us + (distance_us or 1_000_000))
