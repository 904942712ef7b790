"""A flush says how it went and never throws; one that trips over a bug commits all that the bug does not touch.

Mutants tried, each found here: judging the halves of a lane out of order; acknowledging what was left out; bisecting
for ever when everything fails; keeping a table's handle after credentials changed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from contract.errors import TemporaryError
from gateway.committer import settle
from gateway.flush import FAULTS_MAX, Flusher, FlushPool, Job, settle_apart
from gateway.ports import Lane
from lake.memory import MemoryLake, MemoryRawTable
from lake.raw import RawTable, table_path
from lake.store import Store, StoreSettings
from tests.unit.gateway_parts import EPOCH, STREAM, MemoryQuarantine, fresh_metrics, pending, value


@pytest.fixture(autouse=True)
def logs():
    """What was logged; with the default settings each traceback would be drawn with all its variables, for seconds."""
    with capture_logs() as found:
        yield found


class Tripping(MemoryRawTable):
    """Trips over chosen batches, as a bug would."""

    trips: Callable[[str, int], bool] = staticmethod(lambda device, seq: False)
    error: Exception = ZeroDivisionError("a bug")

    def append(self, batches, watermarks, shard_counters):
        if any(self.trips(batch.device, batch.seq) for batch in batches):
            raise self.error
        return super().append(batches, watermarks, shard_counters)


def job(batches, *, apart=True) -> Job:
    return Job(STREAM, batches, {}, {}, 0, apart)


def stored(lake: MemoryLake) -> list[tuple[str, int]]:
    return [(batch.device, batch.seq) for batch in lake.batches(STREAM)]


def run(batches, trips):
    lake = MemoryLake()
    table = Tripping(lake, STREAM)
    table.trips = trips
    outcome, isolated = settle_apart(job(batches), table, MemoryQuarantine())
    return lake, outcome, isolated


def test_the_lane_that_trips_is_committed_up_to_the_batch_that_trips():
    batches = [pending(seq, device=device) for seq in range(1, 9) for device in ("pi-1", "pi-2", "pi-3")]
    lake, outcome, isolated = run(batches, lambda device, seq: device == "pi-2" and seq == 5)
    assert isolated == {Lane("pi-2", EPOCH)}
    assert outcome.committed == {Lane("pi-1", EPOCH): 8, Lane("pi-2", EPOCH): 4, Lane("pi-3", EPOCH): 8}
    assert outcome.missing == {}
    assert outcome.rows == outcome.batches == 20
    assert len(stored(lake)) == len(set(stored(lake))) == 20


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), max_size=3, unique=True),
)
def test_whatever_trips_everything_else_of_other_lanes_is_committed_once(poison):
    batches = [pending(seq, device=f"pi-{number}") for seq in range(1, 7) for number in range(5)]
    lake, outcome, isolated = run(batches, lambda device, seq: (int(device[3:]), seq) in poison)
    first = {number: min(seq for each, seq in poison if each == number) for number, _ in poison}
    expected = {f"pi-{number}": first.get(number, 7) - 1 for number in range(5)}
    assert {lane.device: mark for lane, mark in outcome.committed.items()} == expected
    assert isolated == {Lane(f"pi-{number}", EPOCH) for number in first}
    assert sorted(stored(lake)) == sorted((name, seq) for name, mark in expected.items() for seq in range(1, mark + 1))


def test_when_everything_trips_it_is_not_the_batches_and_the_flush_fails():
    calls = []

    def trips(device: str, seq: int) -> bool:
        calls.append(device)
        return True

    batches = [pending(1, device=f"pi-{number}") for number in range(200)]
    with pytest.raises(ZeroDivisionError):
        run(batches, trips)
    assert len(calls) <= FAULTS_MAX + 1


def test_a_lake_that_does_not_answer_is_no_bug():
    lake = MemoryLake()
    table = Tripping(lake, STREAM)
    table.trips, table.error = (lambda device, seq: True), TemporaryError("no answer")
    with pytest.raises(TemporaryError):
        settle_apart(job([pending(1)]), table, MemoryQuarantine())


class OneLake:
    """Opens memory tables and counts."""

    def __init__(self) -> None:
        self.lake = MemoryLake()
        self.generation = 0
        self.opened = 0
        self.trouble: Exception | None = None

    def open_table(self, stream: str) -> MemoryRawTable:
        self.opened += 1
        if self.trouble is not None:
            raise self.trouble
        return MemoryRawTable(self.lake, stream)

    def open_quarantine(self) -> MemoryQuarantine:
        return MemoryQuarantine()


def test_handles_are_kept_and_opened_anew_when_credentials_change_or_a_bug_struck():
    lake, metrics = OneLake(), fresh_metrics()
    flusher = Flusher(lake, metrics)
    assert flusher.run(job([pending(1)], apart=False)).outcome.rows == 1
    assert flusher.run(job([pending(2)], apart=False)).outcome.rows == 1
    assert lake.opened == 1
    lake.generation += 1
    assert flusher.run(job([pending(3)], apart=False)).outcome.rows == 1
    assert lake.opened == 2
    flusher.forget(STREAM)
    assert flusher.run(job([pending(4)], apart=False)).outcome.rows == 1
    assert lake.opened == 3


def test_a_flush_never_throws():
    lake, metrics = OneLake(), fresh_metrics()
    flusher = Flusher(lake, metrics)
    for error, faults in ((TemporaryError("no answer"), 0), (ZeroDivisionError("a bug"), 1)):
        lake.trouble = error
        done = flusher.run(job([pending(1)], apart=False))
        assert done.outcome is None
        assert done.error is error
        assert value(metrics, "faults_total", where="flush") == faults


def test_a_copy_that_lacks_only_this_gateways_last_commit_doubles_nothing_of_what_another_went_on_with(tmp_path):
    """The restored table looks as this gateway saw it, and its counters come to what this gateway made them.

    Mutant tried: a handle that does not look for its own commits; batch 4 was stored twice.
    """
    store = Store(StoreSettings(url=f"file://{tmp_path}", fsync=False))
    one, other = RawTable(store, STREAM), RawTable(store, STREAM)
    quarantine = MemoryQuarantine()
    one.refresh()
    believed = settle(STREAM, one, quarantine, [pending(1)], {}, {}, one.life)
    for seq in (2, 3):
        beliefs = believed.committed, believed.counters, believed.life
        believed = settle(STREAM, one, quarantine, [pending(seq)], *beliefs)
    store.delete(f"{table_path(STREAM)}/_delta_log/{one.version + 1:020d}.json")
    fresh = pending(4, floor=4)
    settle(STREAM, other, quarantine, [fresh], {}, {}, other.life)
    outcome = settle(STREAM, one, quarantine, [fresh], believed.committed, believed.counters, believed.life)
    assert (outcome.duplicates, outcome.batches) == (1, 0)
    assert one.watermark(*fresh.lane) == 4


def test_the_pool_does_every_job_and_ends():
    lake, done = OneLake(), []
    pool = FlushPool(2, Flusher(lake, fresh_metrics()).run, done.append)
    pool.start()
    for number in range(5):
        pool.submit(Job(f"s{number}", [pending(1)], {}, {}, 0, False))
    assert pool.close(10)
    assert sorted(each.job.stream for each in done) == [f"s{number}" for number in range(5)]
    assert not any(thread.alive for thread in pool.threads)
