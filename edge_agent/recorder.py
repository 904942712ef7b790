"""From the samplers' queues through the batchers into the buffer, on one thread: a slow disk never delays sampling.

Order of an ending: the samplers have stopped; `finish` empties the queues, closes every batch, stores them, and ends.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import pyarrow as pa
import structlog

from contract.backoff import Backoff
from contract.batches import Clock
from contract.codec import encode_body
from contract.names import EVENTS_STREAM
from edge_agent.batcher import Batcher, BatchSettings, Closed
from edge_agent.buffer.port import Appended, BatchBuffer, BufferUnavailableError, Eviction, NewBatch
from edge_agent.events import Event, EventLog, Kind, to_batch
from edge_agent.metrics import AgentMetrics
from edge_agent.sampling.queue import RowQueue
from edge_agent.sensors.port import Sample

_log = structlog.get_logger()

ROUND_S = 0.02
"""Shortest time between two rounds: a kHz sensor that puts single readings must not wake the thread for each. And the
longest that what came meanwhile then waits for the next sample."""
IDLE_S = 1.0
"""Longest sleep: the thread shows that it is alive."""
MAINTAIN_S = 5.0
QUEUE_ROWS_MIN = 4_096
QUEUE_BYTES_MAX = 8 * 1024 * 1024
"""Of each stream, between its sampler and this thread."""
SAMPLES_PER_ROUND_MAX = 20_000
"""Of one stream, so that a fast one cannot keep the thread from the others."""
UNSTORED_BATCHES_MAX = 64
UNSTORED_BYTES_MAX = 8 * 1024 * 1024
"""Closed batches kept while the disk refuses; beyond, the oldest are dropped and counted."""
CLOSE_AHEAD = 0.2
"""Part of its age that a batch is closed early, to be stored along with another."""
APPEND_BATCHES_MAX = 64
APPEND_BYTES_MAX = 4 * 1024 * 1024
"""Batches stored in one durable step."""
RETRY_S, RETRY_S_MAX = 0.5, 10.0
FINISH_S = 5.0
"""How long an ending recorder goes on when the disk refuses."""


class RecorderClock(Protocol):
    """What the recorder needs of the device's clocks."""

    def read(self) -> Clock:
        """What a batch that is closed now carries."""

    def monotonic_s(self) -> float:
        """Seconds that never go back."""


class Recorder:
    """Batches what the samplers put, and stores it. `run` is the thread; the rest may be called from any.

    Args:
        streams: when the batches of each stream are closed. `headwater.events` needs no entry.
        buffer: where batches go.
        clock: the device's clocks.
        metrics: counters.
        events: events to store, and where evictions and losses are reported.
        stored: called after each durable step; with True where a (stream, epoch) is new.
        rng: jitter of retries.
        tap: shown every sample on its way, on this thread; must return soon. None: nobody looks.
    """

    def __init__(
        self,
        *,
        streams: Mapping[str, BatchSettings],
        buffer: BatchBuffer,
        clock: RecorderClock,
        metrics: AgentMetrics,
        events: EventLog,
        stored: Callable[[bool], None],
        rng: random.Random,
        tap: Callable[[str, pa.Schema, Sample], None] | None = None,
    ) -> None:
        self._tap = tap
        self._buffer, self._clock, self._metrics = buffer, clock, metrics
        self._events, self._stored = events, stored
        self._work, self._finishing = threading.Event(), threading.Event()
        self.queues: dict[str, RowQueue] = {
            name: RowQueue(max(QUEUE_ROWS_MIN, 2 * settings.max_batch_rows), QUEUE_BYTES_MAX, self._work.set)
            for name, settings in streams.items()
        }
        """The sink of each stream's sampler."""
        self._batchers = {name: Batcher(settings, clock.read) for name, settings in streams.items()}
        self._unstored: deque[NewBatch] = deque()
        self._unstored_bytes = 0
        self._step_batches_max = APPEND_BATCHES_MAX
        self._telling: set[tuple[str, str]] = set()
        """Hollow epochs of which an event was reported in this run."""
        self._told: list[tuple[str, str]] = []
        """Those of them whose event is in a batch on its way into the buffer."""
        self._known = {(lane.stream, lane.epoch) for lane in buffer.lanes()}
        self._backoff = Backoff(RETRY_S, RETRY_S_MAX, rng)
        self._retry_at_s = self._maintain_at_s = 0.0
        self.accepted_rows: Counter[str] = Counter()
        self.evicted_rows: Counter[str] = Counter()
        self.dropped_rows: Counter[str] = Counter()
        self.unavailable = ""
        """Why the disk refuses at present; empty while it does not."""
        self.progress_s = clock.monotonic_s()
        """Monotonic time of the last round of the thread."""

    def open_stream(self, stream: str, settings: BatchSettings) -> RowQueue:
        """Take a stream that no sampler feeds, such as predictions; its queue, the same each time. From one thread."""
        if stream not in self.queues:
            queue = RowQueue(max(QUEUE_ROWS_MIN, 2 * settings.max_batch_rows), QUEUE_BYTES_MAX, self._work.set)
            # New dictionaries, queues first: the recorder's thread goes through the old ones meanwhile.
            self.queues = {**self.queues, stream: queue}
            self._batchers = {**self._batchers, stream: Batcher(settings, self._clock.read)}
        return self.queues[stream]

    def configure(self, stream: str, settings: BatchSettings) -> None:
        """Close the batches of a stream by other settings from the next sample on."""
        self._batchers[stream].settings = settings
        self._work.set()

    @property
    def unstored_batches(self) -> int:
        """Closed batches in memory."""
        return len(self._unstored)

    def finish(self) -> None:
        """Store what is there, and end. Call it when the samplers have stopped."""
        self._finishing.set()
        self._work.set()

    def run(self) -> None:
        """Work until finished."""
        while not self._finishing.is_set():
            self._await_work()
            self._round()
            self._finishing.wait(ROUND_S)
        self._end()

    # One round.

    def _await_work(self) -> None:
        """Return with a sample that was put just now, so that the round is over long before the next one is due.

        Rounds at moments of their own would drift over those of a sampler and hold the interpreter when it wakes. So
        what came during the pause waits for the next sample, though not for long: there may be none.
        """
        if self._work.is_set():
            self._work.clear()
            self._work.wait(ROUND_S)
        else:
            self._work.wait(self._sleep_s())
        self._work.clear()

    def _sleep_s(self) -> float:
        now_s = self._clock.monotonic_s()
        due_s = [now_s + IDLE_S]
        due_s += [at_s for batcher in self._batchers.values() if (at_s := batcher.due_at_s()) is not None]
        if self._unstored:
            due_s.append(self._retry_at_s)
        return max(0.0, min(due_s) - now_s)

    def _round(self) -> None:
        self.progress_s = now_s = self._clock.monotonic_s()
        before = len(self._unstored)
        for name in self._batchers:
            self._fill(name)
        self._close_due(now_s, ahead=0.0)
        if len(self._unstored) > before:
            # The disk is going to be flushed anyway; what would be due soon saves a flush of its own.
            self._close_due(now_s, ahead=CLOSE_AHEAD)
        if now_s >= self._retry_at_s:
            if not self._unstored:
                self._collect_events(all_of_them=False)
            self._store()
        self._shed()
        if now_s >= self._maintain_at_s:
            self._maintain_at_s = now_s + MAINTAIN_S
            self._maintain()

    def _fill(self, name: str) -> bool:
        """Move samples from the queue into the batcher; False when there are no more."""
        queue, batcher, now_s = self.queues[name], self._batchers[name], self._clock.monotonic_s()
        for _ in range(SAMPLES_PER_ROUND_MAX):
            item = queue.get()
            if item is None:
                return False
            if self._tap is not None:
                self._tap(name, item.schema, item.sample)
            self._hold_closed(name, batcher.add(item.schema, item.sample, now_s))
        self._work.set()
        return True

    def _close_due(self, now_s: float, *, ahead: float) -> None:
        for name, batcher in self._batchers.items():
            self._hold_closed(name, batcher.close_due(now_s + ahead * batcher.settings.max_batch_age_s))

    def _hold_closed(self, name: str, closed: Sequence[Closed]) -> None:
        for batch in closed:
            self._hold(batch.new(name))
        for refused in self._batchers[name].take_refused():
            self.dropped_rows[name] += refused.rows
            self._metrics.dropped_rows.labels(name).inc(refused.rows)
            _log.warning("rows_refused", stream=name, rows=refused.rows, reason=refused.message)
            detail = {"cause": refused.reason.value, "message": refused.message}
            self._report(Event(Kind.DROPPED, name, rows=refused.rows, detail=detail))

    def _collect_events(self, *, all_of_them: bool) -> None:
        events = self._events.take(self._clock.monotonic_s(), all_of_them=all_of_them)
        if events:
            body = encode_body(to_batch(events))
            self._hold(NewBatch(EVENTS_STREAM, body, len(events), self._clock.read()))
            self._told += [
                (event.stream, event.epoch)
                for event in events
                if event.kind is Kind.EPOCH_CLOSED and event.stream and event.epoch
            ]

    def _hold(self, batch: NewBatch) -> None:
        self._unstored.append(batch)
        self._unstored_bytes += len(batch.body)

    def _release(self) -> NewBatch:
        batch = self._unstored.popleft()
        self._unstored_bytes -= len(batch.body)
        return batch

    # Storing.

    def _store(self) -> bool:
        """Store what is held, in as few durable steps as possible; False when the disk refuses."""
        while self._unstored:
            step = self._next_step()
            try:
                with self._metrics.append_seconds.time():
                    outcomes = self._buffer.append_many(step)
            except BufferUnavailableError as error:
                if len(step) > 1:
                    # On a full disk the log has room for little at a time, however much the file itself has free.
                    self._step_batches_max = 1
                    continue
                self._refused(error)
                return False
            self._step_batches_max = min(2 * self._step_batches_max, APPEND_BATCHES_MAX)
            for _ in step:
                self._release()
            self._accepted(step, outcomes)
        if self.unavailable:
            _log.info("buffer_available_again")
            self.unavailable = ""
            self._backoff.reset()
        return True

    def _next_step(self) -> list[NewBatch]:
        step: list[NewBatch] = []
        size = 0
        for batch in self._unstored:
            size += len(batch.body)
            if step and (len(step) >= self._step_batches_max or size > APPEND_BYTES_MAX):
                break
            step.append(batch)
        return step

    def _refused(self, error: BufferUnavailableError) -> None:
        self._metrics.buffer_unavailable.inc()
        self._retry_at_s = self._clock.monotonic_s() + self._backoff.next_delay_s()
        if not self.unavailable:
            _log.error("buffer_unavailable", error=str(error))
            self._report(Event(Kind.BUFFER_UNAVAILABLE, detail={"error": str(error)}))
        self.unavailable = str(error)

    def _accepted(self, step: Sequence[NewBatch], outcomes: Sequence[Appended]) -> None:
        new_lane = False
        for batch, outcome in zip(step, outcomes, strict=True):
            self.accepted_rows[batch.stream] += batch.rows
            self._metrics.rows.labels(batch.stream).inc(batch.rows)
            self._metrics.batches.labels(batch.stream).inc()
            self._metrics.body_bytes.labels(batch.stream).inc(len(batch.body))
            self._evicted(outcome.evictions)
            if batch.stream == EVENTS_STREAM and not outcome.stored:
                self._untell()
            if (batch.stream, outcome.epoch) not in self._known:
                self._known.add((batch.stream, outcome.epoch))
                new_lane = True
        if self._told and not any(batch.stream == EVENTS_STREAM for batch in self._unstored):
            self._forget_told()
        self._stored(new_lane)

    def _evicted(self, evictions: Sequence[Eviction]) -> None:
        for gone in evictions:
            self.evicted_rows[gone.stream] += gone.rows
            self._metrics.evicted_rows.labels(gone.stream, gone.cause).inc(gone.rows)
            # What is evicted of the events themselves shows as a gap; a row about it would evict the next.
            if gone.stream != EVENTS_STREAM:
                detail = {"cause": gone.cause}
                self._report(
                    Event(Kind.EVICTED, gone.stream, gone.epoch, gone.first_seq, gone.last_seq, gone.rows, detail)
                )

    def _shed(self) -> None:
        """Give up the oldest of what the disk did not take: memory is bounded, and loss is counted."""
        while len(self._unstored) > UNSTORED_BATCHES_MAX or self._unstored_bytes > UNSTORED_BYTES_MAX:
            self._drop(self._release())
        self._metrics.unstored_batches.set(len(self._unstored))

    def _drop(self, batch: NewBatch) -> None:
        self.dropped_rows[batch.stream] += batch.rows
        self._metrics.dropped_rows.labels(batch.stream).inc(batch.rows)
        self._report(Event(Kind.DROPPED, batch.stream, rows=batch.rows, detail={"cause": "buffer_unavailable"}))
        if batch.stream == EVENTS_STREAM:
            self._untell()

    def _maintain(self) -> None:
        try:
            self._buffer.maintain()
        except BufferUnavailableError as error:
            _log.debug("buffer_maintenance_deferred", error=str(error))
        self._evicted(self._buffer.take_evictions())
        lanes = self._buffer.lanes()
        self._known &= {(lane.stream, lane.epoch) for lane in lanes}
        held_bytes, held_batches = Counter(dict.fromkeys(self.queues, 0)), Counter(dict.fromkeys(self.queues, 0))
        self._tell_hollow()
        for lane in lanes:
            held_bytes[lane.stream] += lane.body_bytes
            held_batches[lane.stream] += lane.batches
        for stream in held_bytes:
            self._metrics.buffer_bytes.labels(stream).set(held_bytes[stream])
            self._metrics.buffer_batches.labels(stream).set(held_batches[stream])
        for name, queue in self.queues.items():
            self._metrics.queued_rows.labels(name).set(queue.rows)

    def _tell_hollow(self) -> None:
        """An epoch that ends in a hole is remembered by the buffer until the event that says so is stored."""
        for epoch in self._buffer.hollow():
            if (epoch.stream, epoch.epoch) not in self._telling:
                self._telling.add((epoch.stream, epoch.epoch))
                self._report(Event(Kind.EPOCH_CLOSED, epoch.stream, epoch.epoch, last_seq=epoch.last_seq))

    def _untell(self) -> None:
        """The batch with the events is gone: they are told again."""
        self._telling.difference_update(self._told)
        self._told = []

    def _forget_told(self) -> None:
        for stream, epoch in self._told:
            try:
                self._buffer.forget(stream, epoch)
            except BufferUnavailableError as error:
                # The next run of the agent tells it again; the lake counts it once.
                _log.debug("buffer_forgetting_deferred", epoch=epoch, error=str(error))
        self._told = []

    # The end.

    def _end(self) -> None:
        for name in self._batchers:
            # The samplers have stopped, so the queues only get shorter.
            while self._fill(name):
                self._store()
        for name, batcher in self._batchers.items():
            self._hold_closed(name, batcher.close())
        deadline_s = self._clock.monotonic_s() + FINISH_S
        pause = threading.Event()
        self._collect_events(all_of_them=True)
        while not self._store() and self._clock.monotonic_s() < deadline_s:
            self._shed()
            self.progress_s = self._clock.monotonic_s()
            pause.wait(max(0.0, min(self._retry_at_s, deadline_s) - self.progress_s))
        lost = sum(batch.rows for batch in self._unstored)
        if lost:
            _log.error("rows_lost_at_stop", rows=lost, reason=self.unavailable)

    def _report(self, event: Event) -> None:
        self._events.report(event, self._clock.read().wall_us, self._clock.monotonic_s())
