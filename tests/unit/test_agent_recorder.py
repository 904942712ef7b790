"""The recorder's thread over a buffer in memory whose disk the test controls."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from prometheus_client import CollectorRegistry

from contract.batches import TS_TYPE, Clock
from contract.names import EVENTS_STREAM
from edge_agent import recorder as recorder_module
from edge_agent.batcher import BatchSettings
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import Appended, BufferUnavailableError, Hollow, NewBatch, StreamCaps
from edge_agent.events import Event, EventLog, Kind
from edge_agent.metrics import AgentMetrics
from edge_agent.recorder import UNSTORED_BATCHES_MAX, Recorder
from edge_agent.sensors.port import Reading

DEADLINE_S = 20.0
SCHEMA = pa.schema([("ts", TS_TYPE), ("x", pa.int64())])
NEVER = threading.Event()


def wait_until(predicate: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not (found := predicate()):
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S} s: {what}"
        pause.wait(0.005)
    return found


class SystemClock:
    def read(self) -> Clock:
        return Clock(True, time.time_ns() // 1000, time.monotonic_ns() // 1000, "ab" * 16)

    def monotonic_s(self) -> float:
        return time.monotonic()


class Disk(MemoryBuffer):
    """A buffer whose disk refuses, or hangs, as long as the test wants."""

    def __init__(self, bytes_max: int = 1 << 30) -> None:
        super().__init__({"s": StreamCaps(bytes_max=bytes_max, age_max_s=1e9)}, 1 << 30)
        self.refuses = False
        self.lets_events_go = False
        self.step_batches_max = 1_000
        self.steps: list[list[str]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()

    def append_many(self, batches: Sequence[NewBatch]) -> Sequence[Appended]:
        self.goes_on.wait(DEADLINE_S)
        if self.refuses or len(batches) > self.step_batches_max:
            raise BufferUnavailableError("the disk is full; free space")
        self.steps.append([batch.stream for batch in batches])
        if self.lets_events_go and batches[0].stream == EVENTS_STREAM:
            return [Appended("00" * 16, 1, False, ()) for _ in batches]
        return super().append_many(batches)


class Bench:
    def __init__(self, disk: Disk, streams: Sequence[str] = ("s",), **settings: Any) -> None:
        self.disk, self.events = disk, EventLog()
        self.rounds: list[float] = []
        """Of each sample, in which round it was taken: when that began."""
        self.metrics = AgentMetrics(CollectorRegistry())
        self.new_lanes: list[bool] = []
        chosen = BatchSettings(**{"max_batch_rows": 10, "max_batch_age_s": 0.05, **settings})
        self.recorder = Recorder(
            streams=dict.fromkeys(streams, chosen),
            buffer=disk,
            clock=SystemClock(),
            metrics=self.metrics,
            events=self.events,
            stored=self.new_lanes.append,
            rng=random.Random(1),
            tap=lambda stream, schema, sample: self.rounds.append(self.recorder.progress_s),
        )
        self.thread = threading.Thread(target=self.recorder.run)
        self.thread.start()

    def put(self, count: int, first: int = 0, stream: str = "s") -> None:
        for number in range(first, first + count):
            assert self.recorder.queues[stream].put(SCHEMA, Reading({"x": number}, number), DEADLINE_S, NEVER)

    def finish(self) -> None:
        self.disk.goes_on.set()
        self.recorder.finish()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()

    def stored(self, stream: str = "s") -> list[int]:
        """The numbers that the buffer holds."""
        return [row["x"] for rows in batches(self.disk, stream) for row in rows]

    def told(self) -> list[dict[str, Any]]:
        """The events that the buffer holds."""
        return [row for rows in batches(self.disk, EVENTS_STREAM) for row in rows]


def batches(buffer: MemoryBuffer, stream: str) -> list[list[dict[str, Any]]]:
    found = []
    for lane in buffer.lanes():
        seq = 0
        while lane.stream == stream and (batch := buffer.peek(stream, lane.epoch, seq)) is not None:
            seq = batch.seq
            body = buffer.body(stream, lane.epoch, seq)
            assert body is not None
            with pa.ipc.open_stream(zstandard.decompress(body)) as reader:
                found.append(reader.read_all().to_pylist())
    return found


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    monkeypatch.setattr(recorder_module, "RETRY_S", 0.01)
    monkeypatch.setattr(recorder_module, "RETRY_S_MAX", 0.02)
    monkeypatch.setattr(recorder_module, "MAINTAIN_S", 0.05)
    made: list[Bench] = []

    def make(*arguments: Any, **options: Any) -> Bench:
        made.append(Bench(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.finish()


def test_an_epoch_that_ends_in_a_hole_is_told_durably_before_it_is_forgotten(bench: Callable[..., Bench]) -> None:
    """Mutant tried: forgotten when the event is reported."""
    disk = Disk(bytes_max=20)
    clock = SystemClock().read()
    old = disk.append("s", b"one", 1, clock).epoch
    assert not disk.append("s", b"more than this stream may have", 1, clock).stored
    disk.open_epoch("s")
    disk.acknowledge("s", old, 1)
    assert disk.hollow() == [Hollow("s", old, 2)]
    disk.refuses = True
    one = bench(disk)
    wait_until(lambda: one.recorder.unavailable, "the disk refuses the event")
    assert disk.hollow() == [Hollow("s", old, 2)]
    disk.refuses = False
    wait_until(lambda: not disk.hollow(), "forgotten")
    told = [event for event in one.told() if event["kind"] == "epoch_closed"]
    assert [(event["stream"], event["epoch"], event["last_seq"]) for event in told] == [("s", old, 2)]


def test_an_epoch_that_ends_in_a_hole_is_told_again_where_the_buffer_had_no_room_for_the_event(
    bench: Callable[..., Bench],
) -> None:
    """Mutant tried: forgotten although the event was let go."""
    disk = Disk(bytes_max=20)
    clock = SystemClock().read()
    old = disk.append("s", b"one", 1, clock).epoch
    disk.append("s", b"more than this stream may have", 1, clock)
    disk.open_epoch("s")
    disk.acknowledge("s", old, 1)
    disk.lets_events_go = True
    one = bench(disk)
    wait_until(lambda: [EVENTS_STREAM] in disk.steps, "the event is let go")
    wait_until(lambda: one.events._windows and all(w.waiting for w in one.events._windows.values()), "reported again")
    assert disk.hollow() == [Hollow("s", old, 2)]
    disk.lets_events_go = False
    one.finish()
    assert not disk.hollow()
    assert [event["epoch"] for event in one.told() if event["kind"] == "epoch_closed"] == [old]


def test_batches_are_closed_by_rows_and_by_age_and_stored_in_order(bench: Callable[..., Bench]) -> None:
    one = bench(Disk())
    one.put(25)
    wait_until(lambda: one.recorder.accepted_rows["s"] == 25, "all stored")
    assert [len(rows) for rows in batches(one.disk, "s")] == [10, 10, 5]
    assert one.stored() == list(range(25))
    assert one.new_lanes[0] is True
    assert not any(one.new_lanes[1:])


def test_batches_that_close_together_are_stored_in_one_durable_step(bench: Callable[..., Bench]) -> None:
    """Each step costs the SD card a flush. Mutants tried: one step for each batch."""
    disk = Disk()
    disk.goes_on.clear()
    one = bench(disk, streams=("s", "t"))
    one.put(1)
    wait_until(lambda: one.recorder.queues["s"].rows == 0, "the first round")
    one.put(20, stream="s")
    one.put(10, stream="t")
    disk.goes_on.set()
    wait_until(lambda: one.recorder.accepted_rows["s"] + one.recorder.accepted_rows["t"] == 31, "all stored")
    assert sum(len(step) for step in disk.steps) >= 4
    assert max(len(step) for step in disk.steps) >= 3


def test_a_batch_that_is_nearly_due_is_stored_along_with_another(bench: Callable[..., Bench]) -> None:
    """Streams that close one after the other would each cost the card a flush. Mutants tried: nothing closed early."""
    disk = Disk()
    one = bench(disk, streams=("s", "t"), max_batch_age_s=1.0)
    one.put(1, stream="s")
    pause = threading.Event()
    pause.wait(0.1)  # the distance that is tested, not a synchronisation
    one.put(1, stream="t")
    wait_until(lambda: one.recorder.accepted_rows["t"] == 1, "both stored")
    assert disk.steps == [["s", "t"]]


def test_a_disk_that_hangs_does_not_hold_up_the_samplers(bench: Callable[..., Bench]) -> None:
    disk = Disk()
    one = bench(disk)
    one.put(10)
    wait_until(lambda: disk.steps, "a step")
    disk.goes_on.clear()
    one.put(10, first=10)
    before_s = one.recorder.progress_s
    one.put(2_000, first=20)
    disk.goes_on.set()
    wait_until(lambda: one.recorder.accepted_rows["s"] == 2_020, "all stored")
    assert one.recorder.progress_s > before_s
    assert one.stored() == list(range(2_020))


def test_a_disk_that_refuses_for_a_while_loses_nothing_and_is_told(bench: Callable[..., Bench]) -> None:
    disk = Disk()
    disk.refuses = True
    one = bench(disk)
    one.put(100)
    wait_until(lambda: one.recorder.unavailable, "noticed")
    assert one.recorder.accepted_rows["s"] == 0
    disk.refuses = False
    wait_until(lambda: one.recorder.accepted_rows["s"] == 100, "all stored")
    wait_until(lambda: not one.recorder.unavailable, "over")
    assert one.stored() == list(range(100))
    wait_until(lambda: [event["kind"] for event in one.told()] == ["buffer_unavailable"], "told")


def test_a_disk_that_has_room_for_little_at_a_time_gets_little_at_a_time(bench: Callable[..., Bench]) -> None:
    """When a full disk was drained, the log still has room for a few batches only; all that had piled up in memory in
    one step was refused for ever.

    Before: the same step was tried again and again.
    """
    disk = Disk()
    disk.refuses = True
    one = bench(disk)
    one.put(160)
    wait_until(lambda: one.recorder.unstored_batches >= 16, "what was read is in memory")
    disk.step_batches_max, disk.refuses = 1, False
    wait_until(lambda: one.stored() == list(range(160)), "all of it is stored")
    assert {len(step) for step in disk.steps} == {1}
    assert one.recorder.dropped_rows["s"] == 0
    disk.refuses = True
    one.put(320, first=160)
    wait_until(lambda: one.recorder.unstored_batches >= 32, "what was read is in memory")
    disk.step_batches_max, disk.refuses = 1_000, False
    wait_until(lambda: one.stored() == list(range(480)), "all of it is stored")
    assert max(len(step) for step in disk.steps) > 4


def test_a_disk_that_refuses_for_long_costs_the_oldest_rows_which_are_counted_and_told(
    bench: Callable[..., Bench],
) -> None:
    """Mutants tried: batches kept without a bound; dropped rows not counted."""
    disk = Disk()
    disk.refuses = True
    one = bench(disk)
    extra = 50
    one.put(10 * (UNSTORED_BATCHES_MAX + extra))
    wait_until(lambda: one.recorder.dropped_rows["s"] == 10 * extra, "the oldest are dropped")
    assert one.recorder.unstored_batches == UNSTORED_BATCHES_MAX
    disk.refuses = False
    wait_until(lambda: one.recorder.accepted_rows["s"] == 10 * UNSTORED_BATCHES_MAX, "the rest is stored")
    one.finish()
    assert one.stored() == list(range(10 * extra, 10 * (UNSTORED_BATCHES_MAX + extra)))
    dropped = [event for event in one.told() if event["kind"] == "dropped"]
    assert sum(event["rows"] for event in dropped) == 10 * extra
    assert {event["stream"] for event in dropped} == {"s"}


def test_evictions_are_counted_and_told_once_and_those_of_events_are_only_counted(bench: Callable[..., Bench]) -> None:
    disk = Disk(bytes_max=2_000)
    one = bench(disk)
    one.put(300)
    wait_until(lambda: one.recorder.accepted_rows["s"] == 300, "all accepted")
    one.finish()
    left = one.stored()
    assert left == list(range(300 - len(left), 300))
    evicted = [event for event in one.told() if event["kind"] == "evicted"]
    assert sum(event["rows"] for event in evicted) == one.recorder.evicted_rows["s"] == 300 - len(left) > 0
    assert evicted[0]["first_seq"] == 1
    assert evicted[-1]["last_seq"] == 30 - len(left) // 10
    assert all(event["epoch"] for event in evicted)


def test_finishing_stores_what_is_in_queues_batchers_and_the_event_log(bench: Callable[..., Bench]) -> None:
    """Mutants tried: batches in hand left when finishing; events that wait to be summed up left."""
    one = bench(Disk(), max_batch_rows=10_000, max_batch_age_s=3600.0)
    one.put(1_234)
    for _ in range(2):
        one.events.report(Event(Kind.OVERRUN, "s", rows=1), 1, time.monotonic())
    one.finish()
    assert one.stored() == list(range(1_234))
    assert sum(event["rows"] for event in one.told()) == 2


def test_finishing_on_a_disk_that_refuses_ends_in_bounded_time_and_says_what_is_lost(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recorder_module, "FINISH_S", 0.1)
    disk = Disk()
    disk.refuses = True
    one = bench(disk)
    one.put(15)
    one.finish()
    assert one.stored() == []
    assert "rows_lost_at_stop" in capsys.readouterr().out


def test_other_batch_settings_hold_from_the_next_sample_on(bench: Callable[..., Bench]) -> None:
    one = bench(Disk(), max_batch_rows=1_000, max_batch_age_s=3600.0)
    one.recorder.configure("s", BatchSettings(max_batch_rows=3, max_batch_age_s=3600.0))
    one.put(9)
    wait_until(lambda: one.recorder.accepted_rows["s"] == 9, "stored in batches of 3")
    assert [len(rows) for rows in batches(one.disk, "s")] == [3, 3, 3]


def test_rows_that_break_the_contract_are_counted_and_told_and_the_stream_goes_on(bench: Callable[..., Bench]) -> None:
    one = bench(Disk())
    lonely = pa.schema([("ts", TS_TYPE)])
    assert one.recorder.queues["s"].put(lonely, Reading({}, 1), DEADLINE_S, NEVER)
    one.put(10)
    wait_until(lambda: one.recorder.accepted_rows["s"] == 10, "the good ones are stored")
    assert one.recorder.dropped_rows["s"] == 1
    wait_until(one.told, "told")
    assert (one.told()[0]["kind"], one.told()[0]["rows"]) == ("dropped", 1)
    assert "empty_batch" in one.told()[0]["detail"]


def test_what_comes_between_rounds_waits_for_the_next_sample_so_that_a_round_is_over_long_before_one_is_due(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants tried: a round as soon as the pause is over; one that waits for a next sample for as long as it takes."""
    monkeypatch.setattr(recorder_module, "ROUND_S", 1.0)
    monkeypatch.setattr(recorder_module, "IDLE_S", 60.0)
    made = bench(Disk(), max_batch_rows=100, max_batch_age_s=60.0)
    made.put(1)
    wait_until(lambda: len(made.rounds) == 1, "a sample that comes to an idle recorder is taken at once")
    made.put(1, first=1)
    time.sleep(1.5)  # the pause is over, and half of the time that the second sample waits for another
    made.put(1, first=2)
    wait_until(lambda: len(made.rounds) == 3, "the third sample begins a round")
    assert made.rounds[0] < made.rounds[1] == made.rounds[2]
    made.put(1, first=3)
    wait_until(lambda: len(made.rounds) == 4, "a sample that none comes after is taken all the same")
    assert 1.5 < made.rounds[3] - made.rounds[2] < 10
