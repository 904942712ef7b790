"""The main thread's work, over parts that only remember what was asked of them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from contract.batches import Clock
from contract.messages import Reported, decode
from edge_agent.batcher import BatchSettings
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import Opened, OpenedKind
from edge_agent.events import Event, EventLog, Kind
from edge_agent.metrics import AgentMetrics
from edge_agent.remote_config import RemoteConfigFile, RemoteConfigUnavailableError
from edge_agent.sampling.settings import Interval
from edge_agent.sampling.status import SamplingStatus, State
from edge_agent.settings import AgentSettings, BrokerSettings, StreamSettings
from edge_agent.supervisor import SAVE_AGAIN_S, SENSOR_STALL_S, STALL_S, Supervisor, Worker
from edge_agent.uplink import Identity, UplinkState

BOOT = "ab" * 16


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.wall_s = 50.0
        self.synced = False

    def read(self) -> Clock:
        return Clock(self.synced, round(self.wall_s * 1e6), round(self.now_s * 1e6), BOOT)

    def monotonic_s(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        self.wall_s += seconds


class FakeRunner:
    def __init__(self) -> None:
        self.alive = True
        self.asked: list[dict[str, Any]] = []
        self.condition = SamplingStatus(state=State.RUNNING, rate_hz=10.0)

    def reconfigure(self, **asked: Any) -> None:
        self.asked.append(asked)

    def status(self) -> SamplingStatus:
        return self.condition


class FakeRecorder:
    def __init__(self) -> None:
        self.accepted_rows, self.evicted_rows, self.dropped_rows = Counter[str](), Counter[str](), Counter[str]()
        self.unavailable, self.unstored_batches = "", 0
        self.asked: list[tuple[str, BatchSettings]] = []

    def configure(self, stream: str, settings: BatchSettings) -> None:
        self.asked.append((stream, settings))


class FakeUplink:
    def __init__(self) -> None:
        self.state = UplinkState(True, 5, "", 0, 0)
        self.documents: list[Reported] = []

    def publish_reported(self, document: bytes) -> None:
        self.documents.append(decode(document, Reported))


class Bench:
    def __init__(self, folder: Path) -> None:
        self.clock, self.events = FakeClock(), EventLog()
        self.recorder, self.uplink = FakeRecorder(), FakeUplink()
        self.runners = {"s": FakeRunner(), "t": FakeRunner()}
        self.buffer = MemoryBuffer({}, 1 << 20)
        self.file = RemoteConfigFile(folder / "desired.json")
        self.rung = 0
        self.supervisor = self.build()

    def build(self) -> Supervisor:
        parts: Any = SimpleNamespace(recorder=self.recorder, uplink=self.uplink, runners=self.runners)
        stream = StreamSettings(driver="host", sampling=Interval(rate_hz=10.0))
        return Supervisor(
            identity=Identity(device="pi-1", agent="test/1", boot=BOOT),
            settings=AgentSettings(
                device="pi-1", broker=BrokerSettings(url="mqtt://b"), streams={"s": stream, "t": stream}
            ),
            buffer=self.buffer,
            clock=self.clock,
            events=self.events,
            metrics=AgentMetrics(CollectorRegistry()),
            recorder=parts.recorder,
            uplink=parts.uplink,
            runners=parts.runners,
            remote_config=self.file,
            wake=self.ring,
        )

    def ring(self) -> None:
        self.rung += 1

    def told(self) -> list[Event]:
        return list(self.events.take(self.clock.now_s))

    def desire(self, revision: int, **streams: Any) -> None:
        self.supervisor.desired(json.dumps({"v": 1, "revision": revision, "streams": streams}).encode())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    one = Bench(tmp_path)
    one.supervisor.begin()
    one.told()
    return one


def test_the_start_is_told_with_the_clocks_and_how_the_buffer_was_found(tmp_path: Path) -> None:
    one = Bench(tmp_path)
    one.supervisor.begin()
    started, opened = one.told()
    assert started.kind is Kind.AGENT_STARTED
    assert started.detail == {
        "agent": "test/1",
        "buffer": "new",
        "synced": False,
        "boot": BOOT,
        "monotonic_us": 1_000_000_000,
        "wall_us": 50_000_000,
    }
    assert (opened.kind, opened.detail["cause"]) == (Kind.BUFFER_OPENED, "new")
    again = Bench(tmp_path)
    again.buffer.opened = Opened(OpenedKind.RESUMED, "")
    again.supervisor = again.build()
    again.supervisor.begin()
    assert [event.kind for event in again.told()] == [Kind.AGENT_STARTED]


def test_a_buffer_found_damaged_in_use_is_told(bench: Bench) -> None:
    bench.supervisor.tick()
    assert bench.told() == []
    bench.buffer.opened = Opened(OpenedKind.CORRUPT_REPLACED, "moved aside")
    bench.supervisor.tick()
    bench.supervisor.tick()
    assert [(event.kind, event.detail["detail"]) for event in bench.told()] == [(Kind.BUFFER_OPENED, "moved aside")]


def test_the_clock_becoming_right_is_told_with_what_places_earlier_rows(bench: Bench) -> None:
    bench.supervisor.tick()
    bench.clock.pass_s(1)
    bench.clock.wall_s, bench.clock.synced = 1_700_000_000.0, True
    bench.supervisor.tick()
    synced, jumped = bench.told()
    assert (synced.kind, jumped.kind) == (Kind.CLOCK_SYNCED, Kind.CLOCK_JUMPED)
    assert synced.detail["wall_us"] == 1_700_000_000_000_000
    assert (synced.detail["boot"], synced.detail["monotonic_us"]) == (BOOT, 1_001_000_000)
    assert jumped.detail["jump_us"] == 1_699_999_949_000_000


def test_overruns_and_sensors_that_cannot_work_are_told_once_each(bench: Bench) -> None:
    bench.runners["s"].condition = SamplingStatus(state=State.RUNNING, ticks_missed=3, rows_dropped=4)
    bench.runners["t"].condition = SamplingStatus(state=State.FAILED, last_error="no such chip")
    for _ in range(3):
        bench.supervisor.tick()
    overrun, failed = sorted(bench.told(), key=lambda event: event.kind)
    assert (overrun.kind, overrun.stream, overrun.rows) == (Kind.OVERRUN, "s", 7)
    assert (failed.kind, failed.stream, failed.detail["error"]) == (Kind.SENSOR_FAILED, "t", "no such chip")


def test_a_desired_document_reaches_the_streams_it_changes_and_no_others(bench: Bench) -> None:
    """Asking a sampler also revives one that came to the end of its recording.

    Mutants tried: every sampler asked.
    """
    bench.desire(4, s={"rate_hz": 2.0, "max_batch_rows": 9}, t={"max_batch_age_s": 1.0})
    assert bench.rung == 1
    bench.supervisor.tick()
    assert bench.runners["s"].asked == [{"enabled": None, "rate_hz": 2.0}]
    assert bench.runners["t"].asked == []
    assert bench.recorder.asked == [
        ("s", BatchSettings(max_batch_rows=9, max_batch_age_s=5.0)),
        ("t", BatchSettings(max_batch_rows=500, max_batch_age_s=1.0)),
    ]
    last = bench.uplink.documents[-1]
    assert (last.revision, last.streams["s"].rate_hz, last.streams["t"].max_batch_age_s) == (4, 2.0, 1.0)
    bench.desire(5)
    bench.supervisor.tick()
    assert bench.runners["s"].asked[1:] == [{"enabled": None, "rate_hz": None}]
    assert bench.uplink.documents[-1].streams["s"].rate_hz == 10.0
    assert [event.detail["revision"] for event in bench.told()] == [4]
    again = bench.build()
    again.begin()
    assert bench.file.load() is not None


def test_only_the_newest_of_many_documents_is_looked_at(bench: Bench) -> None:
    for revision in range(1, 100):
        bench.desire(revision, s={"max_batch_rows": revision})
    bench.supervisor.tick()
    assert bench.recorder.asked == [("s", BatchSettings(max_batch_rows=99, max_batch_age_s=5.0))]


def test_what_cannot_be_kept_is_not_put_in_force(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the next restart the device would contradict what it had reported. Mutants tried: saved afterwards."""

    def refuse(_: object) -> None:
        raise RemoteConfigUnavailableError("the disk refuses")

    monkeypatch.setattr(bench.file, "save", refuse)
    bench.desire(4, s={"rate_hz": 2.0})
    bench.supervisor.tick()
    assert bench.runners["s"].asked == []
    last = bench.uplink.documents[-1]
    assert last.revision == 0
    assert last.refused is not None
    assert (last.refused.revision, last.refused.reason) == (4, "the disk refuses")


def test_what_could_not_be_kept_is_put_in_force_when_the_disk_takes_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker brings it once a connection."""

    def refuse(_: object) -> None:
        raise RemoteConfigUnavailableError("the disk refuses")

    with monkeypatch.context() as patch:
        patch.setattr(bench.file, "save", refuse)
        bench.desire(4, s={"rate_hz": 2.0})
        for _ in range(3):
            bench.supervisor.tick()
            bench.clock.pass_s(SAVE_AGAIN_S)
    assert [event.kind for event in bench.told()] == [Kind.CONFIG_REFUSED]
    bench.supervisor.tick()
    assert bench.runners["s"].asked == [{"enabled": None, "rate_hz": 2.0}]
    assert (bench.uplink.documents[-1].revision, bench.uplink.documents[-1].refused) == (4, None)
    with monkeypatch.context() as patch:
        patch.setattr(bench.file, "save", refuse)
        bench.desire(5, s={"rate_hz": 3.0})
        bench.supervisor.tick()
    bench.desire(6, s={"rate_hz": 4.0})
    bench.supervisor.tick()
    bench.clock.pass_s(SAVE_AGAIN_S)
    bench.supervisor.tick()
    assert bench.runners["s"].asked[1:] == [{"enabled": None, "rate_hz": 4.0}]


def test_the_same_refusal_is_told_once_however_often_the_document_comes(bench: Bench) -> None:
    for _ in range(3):
        bench.desire(4, nothing={})
        bench.supervisor.tick()
    assert [event.kind for event in bench.told()] == [Kind.CONFIG_REFUSED]


def test_the_condition_is_reported_when_something_changed_and_at_a_slow_interval(bench: Bench) -> None:
    bench.supervisor.tick()
    assert len(bench.uplink.documents) == 1
    for _ in range(59):
        bench.clock.pass_s(1)
        bench.recorder.accepted_rows["s"] += 10
        bench.runners["s"].condition = SamplingStatus(state=State.RUNNING, rows_read=5)
        bench.supervisor.tick()
    assert len(bench.uplink.documents) == 1
    bench.clock.pass_s(1)
    bench.supervisor.tick()
    assert [document.streams["s"].readings for document in bench.uplink.documents] == [0, 5]
    bench.clock.synced = True
    bench.supervisor.tick()
    assert [document.clock_synced for document in bench.uplink.documents] == [False, False, True]


def test_threads_that_died_or_hang_are_named(bench: Bench) -> None:
    """Mutants tried: samplers not looked at; a sensor that paces itself taken for one that hangs."""
    release = threading.Event()
    thread = threading.Thread(target=release.wait, args=(20,), name="recorder")
    thread.start()
    progress_s = bench.clock.now_s
    workers = [Worker(thread, lambda: progress_s)]
    assert (bench.supervisor.death(workers), bench.supervisor.stalled(workers)) == (None, None)
    bench.clock.pass_s(STALL_S + 1)
    assert bench.supervisor.stalled(workers) == "recorder"
    progress_s = bench.clock.now_s

    now_ns = round(bench.clock.now_s * 1e9)
    calls = {"calling": "read", "calling_since_ns": now_ns}
    bench.runners["s"].condition = SamplingStatus(state=State.RUNNING, rate_hz=None, **calls)
    bench.runners["t"].condition = SamplingStatus(state=State.RUNNING, rate_hz=0.0001)
    bench.clock.pass_s(SENSOR_STALL_S + 1)
    progress_s = bench.clock.now_s
    assert bench.supervisor.stalled(workers) is None
    bench.runners["s"].condition = SamplingStatus(state=State.RUNNING, rate_hz=0.0001, **calls)
    assert bench.supervisor.stalled(workers) == "sensor-s"
    # Also the first time, and also where the driver sets the pace.
    opening = {"calling": "open", "calling_since_ns": now_ns}
    bench.runners["s"].condition = SamplingStatus(state=State.CLOSED, rate_hz=None, **opening)
    assert bench.supervisor.stalled(workers) == "sensor-s"

    bench.runners["t"].alive = False
    assert bench.supervisor.death(workers) == "sensor-t"
    release.set()
    thread.join()
    assert bench.supervisor.death(workers) == "recorder"
