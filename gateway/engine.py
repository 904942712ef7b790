"""The thread that owns every stream's flow: takes batches, decides when to commit, and tells devices how it went.

Batches come from the network thread, results from the flush workers, both through one queue. It needs no bound of
its own: each batch in it holds memory of the budget, and there are as many results as workers.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import structlog

from contract.errors import TemporaryError
from gateway.admission import Verdict
from gateway.budget import SHEDDING_S, MemoryBudget
from gateway.flow import Flow
from gateway.flush import Done, Job
from gateway.ingress import wall_us
from gateway.metrics import GatewayMetrics
from gateway.ports import Lane, Pending
from gateway.watch import LakeHealth, WatchedThread
from lake.errors import CommitConflictError

_log = structlog.get_logger()

ROUND_MAX = 500
"""Batches taken from the queue before commits are looked at."""
BACKOFF_BASE_S, BACKOFF_MAX_S = 0.25, 15.0
"""Ceiling of the pause after a failed flush: doubles from the one to the other; drawn from its upper half."""
CONFLICT_BASE_S, CONFLICT_MAX_S = 0.02, 2.0
"""The same after another gateway committed first: the lake is well, only the turn is lost."""
COMMIT_BYTES_MAX = 64 * 1024 * 1024
"""Memory held by the batches of one commit."""
LANES_FACTOR = 4
"""All streams together remember so many times the lanes of one; an idle stream is forgotten then."""
STREAM_SHARE = 0.75
"""Of the memory, what one stream may hold: some is left for the others."""
FAILING_SHARE = 0.5
"""Of the memory, what all streams together may hold whose commits fail."""
APART_AFTER = 2
"""Unexpected failures in a row, after which a flush is taken apart."""
ISOLATION_S, ISOLATION_MAX_S = 60.0, 3600.0
"""How long batches of a lane that trips over a bug are not taken, at first and at most."""


class Acks(Protocol):
    """Tells devices (see `gateway.acknowledger.Acknowledger`). Never waits."""

    def acknowledge(self, stream: str, watermarks: Mapping[Lane, int] | Iterable[tuple[Lane, int]]) -> None:
        """What the table has."""

    def rewind(self, stream: str, lane: Lane, expected: int) -> None:
        """Send again from `expected`."""


class Pool(Protocol):
    """Does jobs (see `gateway.flush.FlushPool`)."""

    def submit(self, job: Job) -> None:
        """Do a job; its result comes back through `Engine.done`."""


class EngineSettings(NamedTuple):
    """When to commit, and how much to hold."""

    flush_interval_s: float
    flush_bytes: int
    flush_workers: int
    streams_max: int
    lanes_max: int


class StreamView(NamedTuple):
    """One stream, for people."""

    name: str
    pending_batches: int
    pending_bytes: int
    committing: bool
    failures: int
    """Failed flushes in a row."""
    last_error: str
    isolated_lanes: int
    last_commit_us: int | None
    """Gateway wall clock at the last commit of this process."""
    committed_rows: int
    """By this process."""


class _Isolated(NamedTuple):
    until_s: float
    hold_s: float


class _Stream:
    """One stream: its flow, and when to commit it next. `held_bytes` counts pending and committing batches."""

    def __init__(self, name: str, lanes_max: int) -> None:
        self.name = name
        self.flow = Flow(lanes_max)
        self.held_bytes = 0
        self.pending_batches = 0
        self.pending_bytes = 0
        self.since_s = 0.0
        """When the oldest pending batch came."""
        self.job: Job | None = None
        self.job_bytes = 0
        self.failures = 0
        self.faults = 0
        self.conflicts = 0
        self.not_before_s = 0.0
        self.shed_s = float("-inf")
        self.last_error = ""
        self.last_commit_us: int | None = None
        self.committed_rows = 0
        self.isolated: OrderedDict[Lane, _Isolated] = OrderedDict()

    def due_s(self, settings: EngineSettings, hurry: bool) -> float:
        """When to commit."""
        full = hurry or self.pending_bytes >= settings.flush_bytes
        return max(self.not_before_s, self.since_s if full else self.since_s + settings.flush_interval_s)

    def view(self) -> StreamView:
        return StreamView(
            self.name,
            self.pending_batches,
            self.pending_bytes,
            self.job is not None,
            self.failures,
            self.last_error,
            len(self.isolated),
            self.last_commit_us,
            self.committed_rows,
        )


class Engine:
    """Owns the flows. `deliver`, `done`, `drain` and `views` may be called from any thread.

    Args:
        settings: when to commit, how much to hold.
        budget: memory that batches hold.
        acks: tells devices.
        heard: told which devices had batches committed or dropped, and when (wall clock, µs).
        metrics: counters.
        health: told how the lake answers.
        forget: told which streams were let go of.
        rng: jitter.
        clock_s, clock_us: monotonic seconds and wall clock.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        budget: MemoryBudget,
        acks: Acks,
        heard: Callable[[Iterable[str], int], None],
        metrics: GatewayMetrics,
        health: LakeHealth,
        forget: Callable[[str], None],
        rng: random.Random,
        clock_s: Callable[[], float] = time.monotonic,
        clock_us: Callable[[], int] = wall_us,
    ) -> None:
        self._settings, self._budget, self._acks, self._heard = settings, budget, acks, heard
        self._metrics, self._health, self._forget, self._rng = metrics, health, forget, rng
        self._clock_s, self._clock_us = clock_s, clock_us
        self._inbox: queue.SimpleQueue[tuple[str, Pending] | Done | None] = queue.SimpleQueue()
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._waiting: dict[str, _Stream] = {}
        """Streams with something pending and no flush running."""
        self._running = 0
        self._failing_bytes = 0
        self._pool: Pool | None = None
        self._draining = threading.Event()
        self._deadline_s = float("inf")
        self.thread = WatchedThread("engine", self._run, clock_s)
        self._watch()

    def start(self, pool: Pool) -> None:
        """Begin to take batches."""
        self._pool = pool
        self.thread.start()

    def deliver(self, stream: str, pending: Pending) -> None:
        """Take a batch, and the memory it holds."""
        self._inbox.put((stream, pending))

    def done(self, done: Done) -> None:
        """Take the result of a flush."""
        self._inbox.put(done)

    def drain(self, timeout_s: float) -> bool:
        """Commit everything pending without further waiting, then end; False when something was left behind.

        What is left is in the devices' buffers.
        """
        self._deadline_s = self._clock_s() + timeout_s
        self._draining.set()
        self._inbox.put(None)
        self.thread.join(timeout_s + 1.0)
        return not any(stream.held_bytes for stream in list(self._streams.values()))

    def views(self) -> list[StreamView]:
        """All streams in memory, for people."""
        return [stream.view() for stream in list(self._streams.values())]

    # Below here everything runs in the engine's thread.

    def _run(self) -> None:
        while True:
            self.thread.beat()
            now_s = self._clock_s()
            timeout_s = self.commit_due(now_s)
            if self._draining.is_set():
                if (not self._waiting and not self._running and self._inbox.empty()) or now_s >= self._deadline_s:
                    return
                left_s = self._deadline_s - now_s
                timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
            if timeout_s is None:
                self.thread.rest()
            try:
                item = self._inbox.get(timeout=timeout_s)
                for _ in range(ROUND_MAX):
                    self.take(item)
                    item = self._inbox.get_nowait()
                self.take(item)
            except queue.Empty:
                continue

    def take(self, item: tuple[str, Pending] | Done | None) -> None:
        """Act on one item of the queue."""
        if isinstance(item, Done):
            self._finish(item)
        elif item is not None:
            self._offer(*item)

    def commit_due(self, now_s: float) -> float | None:
        """Begin every flush that is due while workers are free.

        Returns:
            Seconds until the next one is due; None where only an item of the queue can change anything.
        """
        hurry = self._draining.is_set()
        while self._waiting and self._running < self._settings.flush_workers:
            due = [(stream.due_s(self._settings, hurry), stream.name) for stream in self._waiting.values()]
            due_s, name = min(due)
            if due_s > now_s:
                return due_s - now_s
            self._begin(self._waiting.pop(name))
        return None

    def _begin(self, stream: _Stream) -> None:
        batches, committed, counters = stream.flow.take(COMMIT_BYTES_MAX)
        stream.job = Job(stream.name, batches, committed, counters, stream.flow.life, stream.faults >= APART_AFTER)
        stream.job_bytes = sum(batch.held_bytes for batch in batches)
        stream.pending_bytes -= stream.job_bytes
        stream.pending_batches -= len(batches)
        self._running += 1
        assert self._pool is not None
        self._pool.submit(stream.job)

    def _offer(self, name: str, pending: Pending) -> None:
        now_s = self._clock_s()
        stream = self._streams.get(name) or self._open(name)
        cause = "streams" if stream is None else self._must_shed(stream, pending, now_s)
        if stream is None or cause:
            if stream is not None:
                stream.shed_s = now_s
            self._metrics.shed.labels(cause).inc()
            self._budget.give_back(pending.held_bytes)
            return
        self._streams.move_to_end(name)
        reply = stream.flow.offer(pending)
        if reply.verdict is Verdict.ADMIT:
            if not stream.pending_batches:
                stream.since_s = now_s
                if stream.job is None:
                    self._waiting[name] = stream
            stream.pending_batches += 1
            stream.pending_bytes += pending.held_bytes
            self._hold(stream, pending.held_bytes)
            return
        self._budget.give_back(pending.held_bytes)
        if reply.verdict is Verdict.DUPLICATE:
            self._metrics.duplicates.labels("arrival").inc()
            if reply.committed:
                self._acks.acknowledge(name, ((pending.lane, reply.committed),))
        else:
            self._rewind(stream, pending.lane, reply.expected, now_s)

    def _open(self, name: str) -> _Stream | None:
        """A stream not in memory; None where there are too many that hold something."""
        if len(self._streams) >= self._settings.streams_max:
            idle = next((each for each in self._streams.values() if not each.held_bytes and not each.isolated), None)
            if idle is None:
                return None
            del self._streams[idle.name]
            self._forget(idle.name)
        stream = self._streams[name] = _Stream(name, self._settings.lanes_max)
        return stream

    def _trim(self) -> None:
        """Forget idle streams, those longest unheard of first, while all together remember too many lanes."""
        total = sum(stream.flow.lanes for stream in self._streams.values())
        while total > LANES_FACTOR * self._settings.lanes_max:
            idle = next((each for each in self._streams.values() if not each.held_bytes and not each.isolated), None)
            if idle is None:
                return
            total -= idle.flow.lanes
            del self._streams[idle.name]
            self._forget(idle.name)

    def _must_shed(self, stream: _Stream, pending: Pending, now_s: float) -> str:
        """Why a batch cannot be taken now; empty where it can."""
        size, limit = pending.held_bytes, self._budget.bytes_max
        isolated = stream.isolated.get(pending.lane)
        if isolated is not None and now_s < isolated.until_s:
            return "isolated"
        if stream.held_bytes + size > limit * STREAM_SHARE:
            return "stream_share"
        if stream.failures and self._failing_bytes + size > limit * FAILING_SHARE:
            return "failing"
        return ""

    def _rewind(self, stream: _Stream, lane: Lane, expected: int, now_s: float) -> None:
        # While batches are shed, what was asked for would be shed too: silence makes devices slow down instead.
        if not self._budget.shedding(now_s) and now_s - stream.shed_s >= SHEDDING_S:
            self._acks.rewind(stream.name, lane, expected)

    def _hold(self, stream: _Stream, size_bytes: int) -> None:
        stream.held_bytes += size_bytes
        if stream.failures:
            self._failing_bytes += size_bytes

    def _finish(self, done: Done) -> None:
        self._running -= 1
        stream = self._streams[done.job.stream]
        stream.job = None
        if done.outcome is not None:
            self._settled(stream, done)
        else:
            assert done.error is not None
            self._failed(stream, done.job, done.error)
        if stream.pending_batches:
            self._waiting[stream.name] = stream

    def _settled(self, stream: _Stream, done: Done) -> None:
        outcome, job = done.outcome, done.job
        assert outcome is not None
        now_s, now_us = self._clock_s(), self._clock_us()
        released = stream.flow.settled(outcome)
        freed = sum(batch.held_bytes for batch in released)
        stream.pending_batches -= len(released) - len(job.batches)
        stream.pending_bytes -= freed - stream.job_bytes
        stream.job_bytes = 0
        self._hold(stream, -freed)
        self._budget.give_back(freed)
        if stream.failures:
            self._failing_bytes -= stream.held_bytes
            _log.info("stream_recovered", stream=stream.name, failures=stream.failures)
        stream.failures = stream.faults = stream.conflicts = 0
        stream.last_error, stream.not_before_s = "", 0.0
        self._isolate(stream, done, now_s)
        self._trim()
        self._health.answered()
        self._acks.acknowledge(stream.name, outcome.committed)
        for lane, expected in outcome.missing.items():
            self._rewind(stream, lane, expected, now_s)
        self._heard({lane.device for lane in outcome.committed}, now_us)
        self._count(stream, done, now_us)

    def _isolate(self, stream: _Stream, done: Done, now_s: float) -> None:
        assert done.outcome is not None
        for lane in stream.isolated.keys() & done.outcome.committed.keys() - done.isolated:
            del stream.isolated[lane]  # it came through after all
        for lane in done.isolated:
            before = stream.isolated.pop(lane, None)
            hold_s = ISOLATION_S if before is None else min(ISOLATION_MAX_S, 2 * before.hold_s)
            stream.isolated[lane] = _Isolated(now_s + hold_s, hold_s)
            if len(stream.isolated) > self._settings.lanes_max:
                stream.isolated.popitem(last=False)

    def _failed(self, stream: _Stream, job: Job, error: Exception) -> None:
        stream.flow.failed()
        stream.pending_batches += len(job.batches)
        stream.pending_bytes += stream.job_bytes
        stream.job_bytes = 0
        stream.last_error = f"{type(error).__name__}: {str(error)[:300]}"
        now_s = self._clock_s()
        if isinstance(error, CommitConflictError):
            self._metrics.conflicts.inc()
            self._health.answered()
            stream.conflicts += 1
            stream.not_before_s = now_s + self._pause_s(CONFLICT_BASE_S, CONFLICT_MAX_S, stream.conflicts)
            return
        if isinstance(error, TemporaryError):
            self._metrics.store_errors.inc()
            self._health.failed(error)
        else:
            stream.faults += 1
        if not stream.failures:
            self._failing_bytes += stream.held_bytes
            _log.warning("flush_failed", stream=stream.name, batches=stream.pending_batches, error=stream.last_error)
        stream.failures += 1
        stream.not_before_s = now_s + self._pause_s(BACKOFF_BASE_S, BACKOFF_MAX_S, stream.failures)

    def _pause_s(self, base_s: float, max_s: float, failures: int) -> float:
        ceiling_s = min(max_s, base_s * 2.0 ** min(failures - 1, 30))
        return ceiling_s * self._rng.uniform(0.5, 1.0)

    def _count(self, stream: _Stream, done: Done, now_us: int) -> None:
        outcome, metrics = done.outcome, self._metrics
        assert outcome is not None
        if outcome.batches or outcome.quarantined:
            metrics.commits.inc()
            metrics.commit_seconds.observe(done.seconds)
            stream.last_commit_us = now_us
        stream.committed_rows += outcome.rows
        metrics.committed_rows.inc(outcome.rows)
        metrics.committed_batches.inc(outcome.batches)
        metrics.parquet_bytes.inc(outcome.parquet_bytes)
        metrics.skewed_rows.inc(outcome.skewed_rows)
        metrics.stepped_over.inc(outcome.quarantined)
        metrics.duplicates.labels("commit").inc(outcome.duplicates)
        # The first look at a shard is no sign of another gateway.
        metrics.foreign_commits.inc(len(outcome.foreign_shards & done.job.counters.keys()))
        for batch in done.job.batches:
            if batch.seq <= outcome.committed.get(batch.lane, 0):
                metrics.arrival_seconds.observe(max(0, now_us - batch.received_at_us) / 1e6)
                if batch.clock.synced and batch.sent_at_us:
                    metrics.sent_seconds.observe(max(0, now_us - batch.sent_at_us) / 1e6)

    def _watch(self) -> None:
        watch, settings, budget = self._metrics.watch, self._settings, self._budget

        def total(figure: Callable[[_Stream], int]) -> Callable[[], float]:
            # Read from another thread: a list of a dict's values is taken in one step under the interpreter's lock.
            return lambda: sum(figure(stream) for stream in list(self._streams.values()))

        watch("pending_bytes", "Memory held by batches on their way", lambda: budget.taken_bytes, budget.bytes_max)
        watch("pending_highest_bytes", "Most memory that batches ever held at once", lambda: budget.highest_bytes)
        watch("queued_items", "Batches and results waiting for the engine", self._inbox.qsize)
        watch("streams", "Streams in memory", lambda: len(self._streams), settings.streams_max)
        watch("flushes", "Flushes running", lambda: self._running, settings.flush_workers)
        watch(
            "failing_bytes",
            "Memory held by streams whose commits fail",
            lambda: self._failing_bytes,
            FAILING_SHARE * budget.bytes_max,
        )
        watch("failing_streams", "Streams whose last flush failed", total(lambda stream: stream.failures > 0))
        watch(
            "isolated_lanes", "Lanes that trip over a bug and are left out", total(lambda stream: len(stream.isolated))
        )
        watch(
            "lanes",
            "Lanes remembered, of all streams",
            total(lambda stream: stream.flow.lanes),
            LANES_FACTOR * settings.lanes_max,
        )
        watch("stream_lanes", "Most lanes remembered of one stream", self._most_lanes, settings.lanes_max)

    def _most_lanes(self) -> float:
        return max((stream.flow.lanes for stream in list(self._streams.values())), default=0)
