"""From samples to batches: one stream's rows are collected, closed by size or age, checked and encoded.

Pure: times and clocks are handed in, batches are handed back. What cannot become a batch is refused with its reason and
counted; the stream goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import pyarrow as pa

from contract.batches import TS_TYPE, Clock, check_rows, check_schema
from contract.codec import encode_body
from contract.errors import Reason, Rejected
from contract.limits import DEFAULT_LIMITS, Limits
from contract.names import ROW, TS
from edge_agent.buffer.port import NewBatch
from edge_agent.sensors.port import Reading, Sample

_TOO_LARGE = (Reason.BODY_TOO_LARGE, Reason.PAYLOAD_TOO_LARGE, Reason.TOO_MANY_ROWS)
_VALUE_BYTES = 8
"""What a value of a single reading takes in Arrow, about, beside the length of a text."""
_ENVELOPE_BYTES = 256
"""Left free in a payload for the envelope."""


class BatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When a batch is closed: whichever comes first."""

    max_batch_rows: int = 500
    max_batch_age_s: float = 5.0
    """From its first row on."""
    max_batch_bytes: int = 1024 * 1024
    """Of Arrow data, before compression."""


class Closed(NamedTuple):
    """A batch, ready for the buffer."""

    rows: pa.RecordBatch
    body: bytes
    clock: Clock
    """The device's clocks at the closing."""

    def new(self, stream: str) -> NewBatch:
        """What `BatchBuffer.append_many` takes."""
        return NewBatch(stream, self.body, self.rows.num_rows, self.clock)


class Refused(NamedTuple):
    """Rows that could not become a batch."""

    reason: Reason
    rows: int
    message: str
    """Of the last time, for a person: the field, the value and the remedy."""


class Batcher:
    """Collects the samples of one stream. Not thread-safe; times are monotonic seconds."""

    def __init__(self, settings: BatchSettings, clock: Callable[[], Clock], limits: Limits = DEFAULT_LIMITS) -> None:
        """Start with nothing collected.

        Args:
            settings: when a batch is closed.
            clock: reads the device's clocks.
            limits: what one batch may be.
        """
        self.settings = settings
        """May be replaced at any time; it holds from the next sample on."""
        self._clock = clock
        self._limits = limits
        self._schema: pa.Schema | None = None
        self._pieces: list[pa.RecordBatch] = []
        self._readings: list[Reading] = []
        self._rows = 0
        self._bytes = 0
        self._first_s = 0.0
        self._refused: dict[Reason, Refused] = {}

    @property
    def pending_rows(self) -> int:
        """Rows collected and not yet in a batch."""
        return self._rows

    def add(self, schema: pa.Schema, sample: Sample, now_s: float) -> Sequence[Closed]:
        """Take one sample.

        Args:
            schema: `ts` and the fields; another one than before closes the batch at hand first.
            sample: a complete, stamped reading, or a record batch of the schema. Record batches are not copied.
            now_s: now.

        Returns:
            The batches that are complete by this, in order.
        """
        closed: list[Closed] = []
        if schema is not self._schema and not (self._schema and schema.equals(self._schema, check_metadata=True)):
            closed += self.close()
        self._schema = schema
        if isinstance(sample, Reading):
            self._take_reading(sample, now_s)
            if self._is_full():
                closed += self.close()
            return closed
        at = 0
        while at < sample.num_rows:
            count = self._room_for(sample, at)
            self._take_piece(sample.slice(at, count), now_s)
            at += count
            if self._is_full():
                closed += self.close()
        return closed

    def due_at_s(self) -> float | None:
        """When the batch at hand is to be closed for its age; None while there is none."""
        return self._first_s + self.settings.max_batch_age_s if self._rows else None

    def close_due(self, now_s: float) -> Sequence[Closed]:
        """Close the batch at hand if its time has come."""
        due_s = self.due_at_s()
        return self.close() if due_s is not None and now_s >= due_s else ()

    def close(self) -> Sequence[Closed]:
        """Close the batch at hand: none where nothing was collected, several where one would exceed the limits."""
        self._gather_readings()
        pieces, self._pieces = self._pieces, []
        self._rows = self._bytes = 0
        if not pieces:
            return ()
        clock = self._clock()
        return [Closed(rows, body, clock) for rows, body in self._encoded(pieces)]

    def take_refused(self) -> Sequence[Refused]:
        """What was refused since the last call, one entry per reason."""
        taken, self._refused = tuple(self._refused.values()), {}
        return taken

    def _room_for(self, sample: pa.RecordBatch, at: int) -> int:
        """How many rows from `at` on go into the batch at hand: at least one, so that even a huge row gets through."""
        row_bytes = max(1, int(sample.nbytes) // int(sample.num_rows))
        by_rows = self.settings.max_batch_rows - self._rows
        by_bytes = (self.settings.max_batch_bytes - self._bytes) // row_bytes
        return max(1, min(int(sample.num_rows) - at, by_rows, by_bytes))

    def _is_full(self) -> bool:
        return self._rows >= self.settings.max_batch_rows or self._bytes >= self.settings.max_batch_bytes

    def _take_piece(self, piece: pa.RecordBatch, now_s: float) -> None:
        self._gather_readings()
        self._pieces.append(piece)
        self._count(piece.num_rows, piece.nbytes, now_s)

    def _take_reading(self, reading: Reading, now_s: float) -> None:
        self._readings.append(reading)
        texts = sum(len(value) for value in reading.values.values() if isinstance(value, str | bytes | list))
        self._count(1, _VALUE_BYTES * (len(reading.values) + 1) + texts, now_s)

    def _count(self, rows: int, size: int, now_s: float) -> None:
        if not self._rows:
            self._first_s = now_s
        self._rows += rows
        self._bytes += size

    def _gather_readings(self) -> None:
        """Make one piece of the single readings at hand."""
        readings, self._readings = self._readings, []
        if not readings or self._schema is None:
            return
        try:
            self._pieces.append(_assembled(self._schema, readings))
        except (pa.ArrowException, KeyError, TypeError, ValueError, OverflowError) as error:
            self._rows -= len(readings)
            self._refuse(
                len(readings), Reason.UNSUPPORTED_TYPE, f"readings do not fit their schema: {str(error)[:200]}"
            )

    def _encoded(self, pieces: Sequence[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, bytes]]:
        """Batches within the limits; what breaks another rule is refused, alone if possible."""
        try:
            rows = pieces[0] if len(pieces) == 1 else pa.concat_batches(pieces)
            yield rows, self._encode(rows)
            return
        except pa.ArrowException as error:
            # Pieces whose dictionaries cannot become one go their own ways.
            refusal = Rejected(Reason.UNSUPPORTED_TYPE, f"the rows cannot be encoded: {str(error)[:200]}")
        except Rejected as error:
            refusal = error
        if len(pieces) > 1:
            for piece in pieces:
                yield from self._encoded([piece])
        elif refusal.reason in _TOO_LARGE and pieces[0].num_rows > 1:
            half = pieces[0].num_rows // 2
            yield from self._encoded([pieces[0].slice(0, half)])
            yield from self._encoded([pieces[0].slice(half)])
        else:
            self._refuse(pieces[0].num_rows, refusal.reason, str(refusal))

    def _encode(self, rows: pa.RecordBatch) -> bytes:
        check_schema(rows.schema, self._limits)
        if ROW in rows.schema.names:
            raise Rejected(
                Reason.BAD_ROW_NUMBERS, f"field {ROW!r} is reserved for what a full buffer thins; rename the field"
            )
        check_rows(rows, self._limits)
        body = encode_body(rows)
        if len(body) + _ENVELOPE_BYTES > self._limits.payload_bytes_max:
            raise Rejected(
                Reason.PAYLOAD_TOO_LARGE,
                f"{rows.num_rows} rows take {len(body)} bytes, more than {self._limits.payload_bytes_max} with their "
                "envelope; send smaller values",
            )
        return body

    def _refuse(self, rows: int, reason: Reason, message: str) -> None:
        before = self._refused.get(reason)
        self._refused[reason] = Refused(reason, rows + (before.rows if before else 0), message)


def _assembled(schema: pa.Schema, readings: Sequence[Reading]) -> pa.RecordBatch:
    columns = [
        pa.array([reading.ts_us for reading in readings], pa.int64()).view(TS_TYPE)
        if field.name == TS
        else pa.array([reading.values[field.name] for reading in readings], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
