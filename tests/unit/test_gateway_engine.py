"""When commits begin, what happens after they fail, who is told what, and that memory comes back: without threads.

Mutants tried, each found here: two flushes of one stream at once; no pause after a failure; acknowledging before the
commit; forgetting to give memory back for duplicates, for shed batches, for batches dropped after a commit; rewinds
while shedding; one failing stream eating all memory; isolation that never ends.
"""

from __future__ import annotations

import random

import pytest

from contract.errors import TemporaryError
from gateway.budget import SHEDDING_S, MemoryBudget
from gateway.committer import settle
from gateway.engine import (
    BACKOFF_MAX_S,
    COMMIT_BYTES_MAX,
    FAILING_SHARE,
    ISOLATION_S,
    LANES_FACTOR,
    STREAM_SHARE,
    Engine,
    EngineSettings,
)
from gateway.flush import Done, Job, settle_apart
from gateway.ports import Lane
from gateway.watch import LakeHealth
from lake.errors import CommitConflictError
from lake.memory import MemoryLake, MemoryRawTable
from tests.unit.gateway_parts import (
    EPOCH,
    STREAM,
    Clocks,
    ManualPool,
    MemoryQuarantine,
    Told,
    fresh_metrics,
    pending,
    value,
)

LANE = Lane("pi-1", EPOCH)
SETTINGS = EngineSettings(flush_interval_s=1.0, flush_bytes=10_000, flush_workers=2, streams_max=3, lanes_max=100)


class Bench:
    """An engine over a memory lake; flushes happen when the test says so."""

    def __init__(self, *, bytes_max: int = 100_000, settings: EngineSettings = SETTINGS) -> None:
        self.clock = Clocks()
        self.budget = MemoryBudget(bytes_max)
        self.told = Told()
        self.pool = ManualPool()
        self.metrics = fresh_metrics()
        self.health = LakeHealth(self.clock)
        self.heard: list[str] = []
        self.forgotten: list[str] = []
        self.lake = MemoryLake()
        self.quarantine = MemoryQuarantine()
        self.tables: dict[str, MemoryRawTable] = {}
        self.engine = Engine(
            settings,
            budget=self.budget,
            acks=self.told,
            heard=lambda devices, at_us: self.heard.extend(devices),
            metrics=self.metrics,
            health=self.health,
            forget=self.forgotten.append,
            rng=random.Random(1),
            clock_s=self.clock,
            clock_us=lambda: 5_000_000,
        )
        self.engine._pool = self.pool

    def arrive(self, *seqs: int, stream: str = STREAM, **more) -> None:
        for seq in seqs:
            batch = pending(seq, **more)
            assert self.budget.take(batch.held_bytes)
            self.engine.take((stream, batch))

    def due(self) -> float | None:
        return self.engine.commit_due(self.clock())

    def settle(self, job: Job | None = None) -> None:
        """Do the oldest job for real."""
        job = job or self.pool.jobs.pop(0)
        table = self.tables.setdefault(job.stream, MemoryRawTable(self.lake, job.stream))
        isolated: frozenset[Lane] = frozenset()
        if job.apart:
            outcome, isolated = settle_apart(job, table, self.quarantine)
        else:
            outcome = settle(*(job.stream, table, self.quarantine, job.batches, job.committed, job.counters, job.life))
        self.engine.take(Done(job, outcome, None, 0.1, isolated))

    def fail(self, error: Exception) -> None:
        self.engine.take(Done(self.pool.jobs.pop(0), None, error, 0.1, frozenset()))

    def flush(self) -> None:
        """Let the interval pass, and commit everything that is due."""
        self.clock.pass_s(SETTINGS.flush_interval_s)
        self.due()
        while self.pool.jobs:
            self.settle()
            self.due()

    def stored(self, stream: str = STREAM) -> list[tuple[str, int]]:
        return [(batch.device, batch.seq) for batch in self.lake.batches(stream)]


def test_a_flush_begins_when_the_oldest_batch_has_waited_for_the_interval():
    bench = Bench()
    assert bench.due() is None
    bench.arrive(1)
    bench.clock.pass_s(0.4)
    bench.arrive(2)
    assert bench.due() == pytest.approx(0.6)
    assert bench.pool.jobs == []
    bench.clock.pass_s(0.6)
    assert bench.due() is None
    [job] = bench.pool.jobs
    assert [batch.seq for batch in job.batches] == [1, 2]


def test_a_flush_begins_at_once_when_enough_is_pending():
    bench = Bench()
    bench.arrive(1, held_bytes=SETTINGS.flush_bytes)
    bench.due()
    assert len(bench.pool.jobs) == 1


def test_nothing_is_acknowledged_before_its_commit_and_everything_after():
    bench = Bench()
    bench.arrive(1, 2)
    bench.clock.pass_s(1)
    bench.due()
    assert bench.told.acks == []
    bench.settle()
    assert bench.told.acks == [(STREAM, "pi-1", 2)]
    assert bench.stored() == [("pi-1", 1), ("pi-1", 2)]
    assert bench.heard == ["pi-1"]
    assert bench.budget.taken_bytes == 0
    assert value(bench.metrics, "committed_rows_total") == 2
    assert value(bench.metrics, "arrival_to_commit_seconds_count") == 2


def test_one_stream_has_one_flush_at_a_time_and_others_run_beside_it():
    bench = Bench()
    bench.arrive(1)
    bench.arrive(1, stream="other")
    bench.clock.pass_s(1)
    bench.due()
    assert [job.stream for job in bench.pool.jobs] == ["other", STREAM]
    bench.arrive(2)
    bench.clock.pass_s(5)
    assert bench.due() is None
    assert len(bench.pool.jobs) == 2
    bench.settle(bench.pool.jobs.pop(1))
    bench.due()
    assert [[batch.seq for batch in job.batches] for job in bench.pool.jobs] == [[1], [2]]


def test_more_streams_than_workers_take_turns_the_longest_waiting_first():
    bench = Bench()
    for name in ("c", "a", "b"):
        bench.arrive(1, stream=name)
        bench.clock.pass_s(0.1)
    bench.clock.pass_s(1)
    bench.due()
    assert [job.stream for job in bench.pool.jobs] == ["c", "a"]
    bench.settle()
    bench.due()
    assert [job.stream for job in bench.pool.jobs] == ["a", "b"]


def test_a_repeat_of_a_committed_batch_is_acknowledged_again_and_holds_nothing():
    bench = Bench()
    bench.arrive(1, 2)
    bench.flush()
    bench.told.acks.clear()
    bench.arrive(1)
    assert bench.told.acks == [(STREAM, "pi-1", 2)]
    assert bench.budget.taken_bytes == 0
    assert value(bench.metrics, "duplicates_total", seen="arrival") == 1
    assert bench.stored() == [("pi-1", 1), ("pi-1", 2)]


def test_a_repeat_of_a_pending_batch_is_not_acknowledged_before_it_is_committed():
    bench = Bench()
    bench.arrive(1, 1)
    assert bench.told.acks == []
    assert bench.budget.taken_bytes == 1_000


def test_a_batch_beyond_a_hole_asks_for_what_is_missing():
    bench = Bench()
    bench.arrive(1)
    bench.arrive(3)
    assert bench.told.rewinds == [(STREAM, "pi-1", 2)]
    assert bench.budget.taken_bytes == 1_000


def test_batches_that_turn_out_to_lie_beyond_a_hole_are_dropped_and_asked_for():
    bench = Bench()
    bench.arrive(5, 6)
    bench.flush()
    assert bench.stored() == []
    assert bench.told.rewinds == [(STREAM, "pi-1", 1)]
    assert bench.budget.taken_bytes == 0


def test_what_another_gateway_committed_meanwhile_is_dropped_and_memory_comes_back():
    bench = Bench()
    bench.arrive(1)
    bench.clock.pass_s(1)
    bench.due()
    other = Bench()
    other.lake = bench.lake
    other.arrive(1, 2, 3)
    other.flush()
    bench.arrive(2)
    bench.settle()
    assert bench.told.acks == [(STREAM, "pi-1", 3)]
    assert bench.budget.taken_bytes == 0
    assert bench.stored() == [("pi-1", 1), ("pi-1", 2), ("pi-1", 3)]
    assert bench.engine.views()[0].pending_batches == 0
    assert bench.due() is None


def test_after_a_failure_everything_is_tried_again_with_growing_pauses():
    bench = Bench()
    bench.arrive(1)
    pauses = []
    bench.clock.pass_s(1)
    for _ in range(12):
        assert bench.due() is None
        bench.fail(TemporaryError("the store does not answer"))
        pauses.append(bench.due())
        bench.clock.pass_s(pauses[-1])
    assert pauses[0] <= 0.25
    assert all(BACKOFF_MAX_S / 2 <= pause <= BACKOFF_MAX_S for pause in pauses[-3:])
    assert bench.told.acks == []
    assert bench.budget.taken_bytes == 1_000
    assert value(bench.metrics, "store_errors_total") == 12
    bench.due()
    bench.settle()
    assert bench.stored() == [("pi-1", 1)]
    assert bench.budget.taken_bytes == 0
    assert bench.engine.views()[0].failures == 0


def test_batches_that_arrive_during_a_failing_flush_keep_their_order_behind_it():
    bench = Bench()
    bench.arrive(1, 2)
    bench.clock.pass_s(1)
    bench.due()
    bench.arrive(3)
    bench.fail(TemporaryError("no answer"))
    bench.arrive(4)
    assert bench.engine.views()[0].pending_batches == 4
    bench.flush()
    assert bench.stored() == [("pi-1", seq) for seq in (1, 2, 3, 4)]
    assert bench.budget.taken_bytes == 0


def test_a_lost_race_is_no_sign_of_a_sick_lake():
    bench = Bench()
    bench.arrive(1)
    bench.clock.pass_s(1)
    bench.due()
    bench.fail(CommitConflictError("another gateway was first"))
    assert bench.health.trouble(10, 30) is None
    assert bench.engine.views()[0].failures == 0
    assert bench.due() < 0.05
    assert value(bench.metrics, "conflicts_total") == 1
    assert value(bench.metrics, "store_errors_total") == 0


def test_readiness_is_lost_after_errors_for_long_enough_and_comes_back():
    bench = Bench()
    bench.health.answered()
    bench.arrive(1)
    bench.clock.pass_s(1)
    bench.due()
    bench.fail(TemporaryError("refused"))
    assert bench.health.trouble(10, 100) is None
    bench.clock.pass_s(10)
    assert "refused" in bench.health.trouble(10, 100).message
    bench.due()
    bench.settle()
    assert bench.health.trouble(10, 100) is None


def test_while_batches_are_shed_nothing_is_asked_for():
    bench = Bench()
    bench.arrive(1)
    bench.budget.shed(bench.clock())
    bench.arrive(3)
    assert bench.told.rewinds == []
    bench.clock.pass_s(SHEDDING_S)
    bench.arrive(3)
    assert bench.told.rewinds == [(STREAM, "pi-1", 2)]


def test_one_stream_never_holds_all_memory():
    bench = Bench(bytes_max=100_000)
    for seq in range(1, 100):
        bench.arrive(seq)
    assert bench.budget.taken_bytes == STREAM_SHARE * 100_000
    assert value(bench.metrics, "shed_total", cause="stream_share") == 24
    bench.arrive(1, stream="other")
    assert bench.budget.taken_bytes == STREAM_SHARE * 100_000 + 1_000


def test_streams_that_cannot_commit_hold_half_of_the_memory_together_and_others_go_on():
    bench = Bench(bytes_max=100_000)
    for name in ("sick-a", "sick-b"):
        bench.arrive(1, stream=name)
    bench.clock.pass_s(1)
    bench.due()
    for _ in range(2):
        bench.fail(RuntimeError("poison"))
    for seq in range(2, 60):
        for name in ("sick-a", "sick-b"):
            bench.arrive(seq, stream=name)
    assert bench.budget.taken_bytes == FAILING_SHARE * 100_000
    assert value(bench.metrics, "failing_bytes") == FAILING_SHARE * 100_000
    bench.arrive(1, 2, 3)
    bench.clock.pass_s(1)
    bench.due()
    while bench.pool.jobs[0].stream != STREAM:
        bench.fail(RuntimeError("poison"))
        bench.due()
    bench.settle()
    assert len(bench.stored()) == 3
    assert value(bench.metrics, "failing_streams") == 2


def test_a_stream_beyond_the_limit_takes_the_place_of_an_idle_one_and_of_no_other():
    bench = Bench()
    for name in ("a", "b", "c"):
        bench.arrive(1, stream=name)
    bench.arrive(1, stream="d")
    assert value(bench.metrics, "shed_total", cause="streams") == 1
    assert bench.budget.taken_bytes == 3_000
    bench.flush()
    bench.arrive(2, stream="a")
    bench.arrive(1, stream="d")
    assert bench.forgotten == ["b"]
    assert [view.name for view in bench.engine.views()] == ["c", "a", "d"]
    assert value(bench.metrics, "streams") == value(bench.metrics, "streams_max") == 3


class Tripping(MemoryRawTable):
    """Trips over every batch of one device, as a bug would."""

    def append(self, batches, watermarks, shard_counters):
        if any(batch.device == "poison" for batch in batches):
            raise ZeroDivisionError("a bug")
        return super().append(batches, watermarks, shard_counters)


def test_a_batch_that_trips_over_a_bug_stops_only_its_own_lane(monkeypatch):
    bench = Bench()
    for number in range(5):
        bench.arrive(1, 2, device=f"pi-{number}")
    bench.arrive(1, 2, device="poison")
    bench.clock.pass_s(1)
    for _ in range(2):
        bench.due()
        assert not bench.pool.jobs[0].apart
        bench.fail(ZeroDivisionError("a bug"))
        bench.clock.pass_s(BACKOFF_MAX_S)
    bench.due()
    job = bench.pool.jobs.pop(0)
    assert job.apart
    outcome, isolated = settle_apart(job, Tripping(bench.lake, STREAM), bench.quarantine)
    bench.engine.take(Done(job, outcome, None, 0.1, isolated))
    assert isolated == {Lane("poison", EPOCH)}
    assert sorted(bench.stored()) == [(f"pi-{number}", seq) for number in range(5) for seq in (1, 2)]
    assert ("vibration", "poison", 2) not in bench.told.acks
    assert bench.quarantine.records == []
    assert bench.budget.taken_bytes == 0
    # For a while its batches are not taken; then they are tried again, and go through once the bug is mended.
    bench.arrive(1, device="poison")
    assert value(bench.metrics, "shed_total", cause="isolated") == 1
    assert value(bench.metrics, "isolated_lanes") == 1
    bench.clock.pass_s(ISOLATION_S)
    bench.arrive(1, device="poison")
    bench.flush()
    assert ("poison", 1) in bench.stored()
    assert value(bench.metrics, "isolated_lanes") == 0


def test_taking_a_flush_apart_believes_nothing_of_a_shard_in_which_another_gateway_committed():
    """Mutant tried: keeping the beliefs about the other lanes of the shard; the second lane was stored twice."""
    bench = Bench()
    first, second, poison = (pending(1, device=device)._replace(shard=7) for device in ("pi-1", "pi-2", "poison"))
    other = MemoryRawTable(bench.lake, STREAM)
    settle(STREAM, other, bench.quarantine, [second], {}, {}, other.life)
    beliefs = {batch.lane: 0 for batch in (first, second, poison)}
    table = Tripping(bench.lake, STREAM)
    job = Job(STREAM, [first, second, poison], beliefs, {7: 0}, table.life, apart=True)
    outcome, isolated = settle_apart(job, table, bench.quarantine)
    assert sorted(bench.stored()) == [("pi-1", 1), ("pi-2", 1)]
    assert (outcome.duplicates, isolated) == (1, {poison.lane})


def test_lanes_of_all_streams_together_are_bounded_by_forgetting_idle_streams():
    bench = Bench(settings=SETTINGS._replace(streams_max=10, lanes_max=20))
    for name in "abcdefg":
        for number in range(30):
            bench.arrive(1, stream=name, device=f"pi-{number}", held_bytes=10)
        bench.flush()
    assert value(bench.metrics, "lanes") == value(bench.metrics, "lanes_max") == LANES_FACTOR * 20
    assert value(bench.metrics, "stream_lanes") == value(bench.metrics, "stream_lanes_max") == 20
    assert bench.forgotten == ["a", "b", "c"]
    assert len(bench.stored("a")) == 30


def test_every_figure_that_has_a_bound_shows_both():
    bench = Bench()
    bench.arrive(1)
    for name in ("pending_bytes", "streams", "flushes", "failing_bytes", "stream_lanes"):
        assert value(bench.metrics, f"{name}_max") > 0
    assert value(bench.metrics, "pending_bytes") == 1_000
    assert value(bench.metrics, "stream_lanes") == 1


def test_one_commit_takes_no_more_than_its_share_and_the_rest_goes_right_after():
    """Memory and waiting time of a commit are bounded, however much has come together."""
    bench = Bench(bytes_max=4 * COMMIT_BYTES_MAX)
    half = COMMIT_BYTES_MAX // 2
    bench.arrive(1, 2, 3, held_bytes=half)
    bench.due()
    [job] = bench.pool.jobs
    assert [batch.seq for batch in job.batches] == [1, 2]
    assert bench.engine.views()[0].pending_bytes == half
    bench.settle(bench.pool.jobs.pop(0))
    bench.due()
    [job] = bench.pool.jobs
    assert [batch.seq for batch in job.batches] == [3]
    bench.settle(bench.pool.jobs.pop(0))
    assert (bench.engine.views()[0].pending_bytes, bench.budget.taken_bytes) == (0, 0)
    assert bench.stored() == [("pi-1", 1), ("pi-1", 2), ("pi-1", 3)]
