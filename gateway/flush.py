"""One flush of one stream, in a worker thread: open the table, settle, and say how it went.

A bug that a batch trips over must cost neither rows nor other devices: when a flush fails unexpectedly twice, it is cut
in halves until what fails stands alone. The lanes of such batches are left out: their devices keep them, the rest goes
on. Nothing is ever stepped over because of a fault of ours.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import structlog

from contract.errors import TemporaryError
from gateway.committer import Outcome, settle
from gateway.metrics import GatewayMetrics
from gateway.ports import Lane, Pending, QuarantineTable, StreamTable
from gateway.watch import WatchedThread
from lake.quarantine import QuarantineRecord

_log = structlog.get_logger()

FAULTS_MAX = 64
"""So many parts of one flush may fail unexpectedly before it is given up as a whole: it is not the batches, then."""


class Lake(Protocol):
    """Where tables come from. Safe to use from several threads; the tables are not."""

    @property
    def generation(self) -> int:
        """Changes when tables have to be opened anew: credentials were changed."""

    def open_table(self, stream: str) -> StreamTable:
        """A handle of a stream's table; touches nothing yet."""

    def open_quarantine(self) -> QuarantineTable:
        """A handle of the quarantine table; touches nothing yet."""


class Job(NamedTuple):
    """What to commit, as `gateway.flow.Flow.take` gives it."""

    stream: str
    batches: Sequence[Pending]
    committed: Mapping[Lane, int]
    counters: Mapping[int, int]
    life: int
    apart: bool
    """Whether to look for the batches that trip over a bug."""


class Done(NamedTuple):
    """How it went: an outcome or an error."""

    job: Job
    outcome: Outcome | None
    error: Exception | None
    seconds: float
    isolated: frozenset[Lane]
    """Lanes with a batch that trips over a bug: nothing from it on was committed; the outcome says where they stand."""


class Flusher:
    """Runs jobs; one per stream at a time, any number of streams.

    Args:
        lake: gives tables.
        metrics: counters.
        clock_s: monotonic seconds.
    """

    def __init__(self, lake: Lake, metrics: GatewayMetrics, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._lake, self._metrics, self._clock_s = lake, metrics, clock_s
        self._tables: dict[str, tuple[int, StreamTable, QuarantineTable]] = {}
        self._lock = threading.Lock()

    def forget(self, stream: str) -> None:
        """Let go of a stream's handles."""
        with self._lock:
            self._tables.pop(stream, None)

    def run(self, job: Job) -> Done:
        """Do it. Raises nothing that a later attempt could mend."""
        began_s = self._clock_s()
        try:
            table, quarantine = self._open(job.stream)
            counting = _Counting(quarantine, self._metrics)
            if job.apart:
                outcome, isolated = settle_apart(job, table, counting)
            else:
                outcome = settle(job.stream, table, counting, job.batches, job.committed, job.counters, job.life)
                isolated = frozenset[Lane]()
        except TemporaryError as error:
            return Done(job, None, error, self._clock_s() - began_s, frozenset())
        except Exception as error:  # noqa: BLE001 - a bug must not stop other streams: counted, told, tried again
            self.forget(job.stream)
            self._metrics.faults.labels("flush").inc()
            _log.error("flush_fault", stream=job.stream, batches=len(job.batches), exc_info=error)
            return Done(job, None, error, self._clock_s() - began_s, frozenset())
        return Done(job, outcome, None, self._clock_s() - began_s, isolated)

    def _open(self, stream: str) -> tuple[StreamTable, QuarantineTable]:
        generation = self._lake.generation
        with self._lock:
            found = self._tables.get(stream)
        if found is None or found[0] != generation:
            found = generation, self._lake.open_table(stream), self._lake.open_quarantine()
            with self._lock:
                self._tables[stream] = found
        return found[1], found[2]


class _Counting:
    """A quarantine table that counts what was written."""

    def __init__(self, table: QuarantineTable, metrics: GatewayMetrics) -> None:
        self._table, self._metrics = table, metrics

    def append(self, records: Sequence[QuarantineRecord]) -> None:
        self._table.append(records)
        for record in records:
            self._metrics.quarantined.labels(record.reason).inc()


def settle_apart(job: Job, table: StreamTable, quarantine: QuarantineTable) -> tuple[Outcome, frozenset[Lane]]:
    """As `gateway.committer.settle`, in parts where the whole fails unexpectedly.

    Returns:
        The outcome of all parts together, and the lanes that are left out.

    Raises:
        TemporaryError: the lake does not answer; try again. What was committed by then is found out then.
        Exception: too many parts fail: the fault does not lie with some batches.
    """
    committed, counters, life = dict(job.committed), dict(job.counters), job.life
    shards = {batch.lane: batch.shard for batch in job.batches}
    outcomes: list[Outcome] = []
    isolated: set[Lane] = set()
    faults = 0
    parts: list[Sequence[Pending]] = [sorted(job.batches, key=lambda batch: batch.lane)]
    while parts:
        part = [batch for batch in parts.pop() if batch.lane not in isolated]
        if not part:
            continue
        try:
            outcome = settle(job.stream, table, quarantine, part, committed, counters, life)
        except TemporaryError:
            raise
        except Exception as error:
            faults += 1
            if faults > FAULTS_MAX:
                raise
            if len(part) == 1:
                batch = part[0]
                isolated.add(batch.lane)
                _log.error(
                    "lane_isolated",
                    stream=job.stream,
                    device=batch.lane.device,
                    epoch=batch.lane.epoch,
                    seq=batch.seq,
                    exc_info=error,
                )
            else:
                # The first half is done first: the seqs of a lane must not be judged out of order.
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
        else:
            outcomes.append(outcome)
            # As in `Flow.settled`: where another gateway committed, only what was just looked up is still believed.
            committed = {
                lane: mark
                for lane, mark in committed.items()
                if outcome.life == life and shards[lane] not in outcome.foreign_shards
            }
            committed |= outcome.committed
            counters |= outcome.counters
            life = outcome.life
    table.refresh()
    marks = {Lane(*lane): mark for lane, mark in table.watermarks(isolated).items()}
    missing: dict[Lane, int] = {}
    for outcome in outcomes:
        for lane in outcome.committed:
            missing.pop(lane, None)
        missing |= outcome.missing
    return (
        Outcome(
            committed={lane: committed[lane] for outcome in outcomes for lane in outcome.committed} | marks,
            missing=missing,
            counters=counters,
            foreign_shards=frozenset(shard for outcome in outcomes for shard in outcome.foreign_shards),
            life=table.life,
            batches=sum(outcome.batches for outcome in outcomes),
            rows=sum(outcome.rows for outcome in outcomes),
            duplicates=sum(outcome.duplicates for outcome in outcomes),
            quarantined=sum(outcome.quarantined for outcome in outcomes),
            skewed_rows=sum(outcome.skewed_rows for outcome in outcomes),
            parquet_bytes=sum(outcome.parquet_bytes for outcome in outcomes),
        ),
        frozenset(isolated),
    )


class FlushPool:
    """Worker threads for jobs. A worker that hangs does not keep the process from ending.

    Args:
        workers: how many.
        run: does a job.
        done: takes what came of it, in the worker's thread. Must not wait.
    """

    def __init__(self, workers: int, run: Callable[[Job], Done], done: Callable[[Done], None]) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._run, self._done = run, done
        self.threads = [
            WatchedThread(f"flush-{number}", functools.partial(self._work, number)) for number in range(workers)
        ]

    def start(self) -> None:
        """Begin to wait for jobs."""
        for thread in self.threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Do a job as soon as a worker is free. The caller submits no more than there are workers."""
        self._jobs.put(job)

    def close(self, timeout_s: float) -> bool:
        """End the workers; False when one is still busy."""
        for _ in self.threads:
            self._jobs.put(None)
        deadline_s = time.monotonic() + timeout_s
        ended = [thread.join(deadline_s - time.monotonic()) for thread in self.threads]
        return all(ended)

    def _work(self, number: int) -> None:
        thread = self.threads[number]
        while True:
            thread.rest()
            job = self._jobs.get()
            if job is None:
                return
            thread.beat()
            self._done(self._run(job))
