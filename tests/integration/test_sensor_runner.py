"""The sampler on a real thread and the real clock: starts, changes, waits and stops.

Mutants tried, each found: the wake flag cleared after looking; a stop that does not wake the sink; a crash of the loop
that ends the thread silently; `reconfigure` without a wake.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from contract.backoff import Backoff
from edge_agent.sampling.loop import SensorLoop
from edge_agent.sampling.queue import RowQueue
from edge_agent.sampling.runner import SensorRunner
from edge_agent.sampling.settings import Interval, Sampling, Stream
from edge_agent.sampling.status import State
from edge_agent.sensors.clock import SystemClock
from edge_agent.sensors.port import Block, Reading, Sample, Sensor, SensorConfigError
from edge_agent.sensors.registry import create_sensor

DEADLINE_S = 30.0


def until(condition: Callable[[], bool], what: str) -> None:
    poll, deadline_s = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S} s: {what}"
        poll.wait(0.005)


class Counting:
    """Counts up by one a reading."""

    schema = pa.schema([("n", pa.int64())])

    def __init__(self) -> None:
        self.reads = 0
        self.is_open = False

    def open(self) -> None:
        self.is_open = True

    def read(self, stop: threading.Event) -> Reading | Block | None:
        self.reads += 1
        return Reading({"n": self.reads})

    def close(self) -> None:
        self.is_open = False


class Waiting(Counting):
    """Has nothing to say, and waits for it."""

    def read(self, stop: threading.Event) -> Reading | Block | None:
        self.reads += 1
        stop.wait(600)
        return None


class Deaf(Counting):
    """Does not hear a stop until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def read(self, stop: threading.Event) -> Reading | Block | None:
        self.reads += 1
        self.let_go.wait(600)
        return None


def runner_of(sensor: Sensor, sampling: Sampling, queue: RowQueue | None = None) -> tuple[SensorRunner, RowQueue]:
    queue = queue or RowQueue(10_000, 10_000_000)
    loop = SensorLoop("s", sensor, sampling, queue, SystemClock(), Backoff(0.01, 0.1, random.Random(1)))
    return SensorRunner(loop, queue), queue


def test_readings_flow_and_a_stop_closes_the_sensor() -> None:
    sensor = Counting()
    runner, queue = runner_of(sensor, Interval(rate_hz=500))
    runner.start()
    until(lambda: queue.rows >= 20, "20 rows")
    assert runner.status().state is State.RUNNING and not runner.ended
    assert runner.stop(DEADLINE_S)
    assert not sensor.is_open and runner.ended and runner.status().state is State.CLOSED
    numbers = [item.sample.values["n"] for item in iter(queue.get, None) if isinstance(item.sample, Reading)]
    assert numbers == list(range(1, len(numbers) + 1)) and runner.status().rows_out == len(numbers)


def test_a_slow_schedule_is_woken_by_a_change_of_rate_and_by_a_stop() -> None:
    runner, queue = runner_of(Counting(), Interval(rate_hz=0.001))
    runner.start()
    until(lambda: queue.rows == 1, "the first row")
    runner.reconfigure(rate_hz=200.0)
    until(lambda: queue.rows >= 5, "rows at the new rate")
    assert runner.status().rate_hz == 200.0
    runner.reconfigure()
    until(lambda: runner.status().rate_hz == 0.001, "the configured rate")
    assert runner.stop(DEADLINE_S)


def test_many_changes_at_once_end_in_the_last_one() -> None:
    runner, queue = runner_of(Counting(), Interval(rate_hz=0.001))
    runner.start()
    for turn in range(300):
        runner.reconfigure(enabled=turn % 2 == 0, rate_hz=1.0 + turn)
    runner.reconfigure(enabled=True, rate_hz=321.0)
    until(lambda: runner.status().rate_hz == 321.0 and queue.rows >= 5, "the last change")
    runner.reconfigure(enabled=False)
    until(lambda: runner.status().state is State.DISABLED, "switched off")
    with pytest.raises(SensorConfigError):
        runner.reconfigure(enabled=True, rate_hz=-1)
    assert runner.stop(DEADLINE_S)


def test_a_waiting_driver_is_woken_by_a_change_and_by_a_stop() -> None:
    sensor = Waiting()
    runner, _ = runner_of(sensor, Stream())
    runner.start()
    until(lambda: sensor.reads == 1, "the driver waits")
    runner.reconfigure(enabled=False)
    until(lambda: runner.status().state is State.DISABLED and not sensor.is_open, "switched off")
    runner.reconfigure(enabled=True)
    until(lambda: sensor.reads >= 2, "the driver waits again")
    assert runner.stop(DEADLINE_S)


def test_a_full_queue_does_not_hold_up_a_stop() -> None:
    runner, queue = runner_of(Counting(), Interval(rate_hz=500, queue_wait_s=60), RowQueue(3, 1_000_000))
    runner.start()
    until(lambda: queue.rows == 3 and runner.status().reads >= 3, "the queue is full")
    assert runner.stop(DEADLINE_S)
    status = runner.status()
    assert status.rows_read == status.rows_out + status.rows_dropped and status.rows_out == 3


class Hesitant(RowQueue):
    """Takes nothing, and thinks about it until it is woken."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.entered, self.woken = threading.Event(), threading.Event()

    def put(self, schema: pa.Schema, sample: Sample, wait_s: float, stop: threading.Event) -> bool:
        self.entered.set()
        return not self.woken.wait(600)

    def wake(self) -> None:
        self.woken.set()


def test_a_stop_wakes_a_sink_that_waits() -> None:
    queue = Hesitant()
    runner, _ = runner_of(Counting(), Interval(rate_hz=1), queue)
    runner.start()
    assert queue.entered.wait(DEADLINE_S)
    assert runner.stop(DEADLINE_S)
    assert runner.status().rows_dropped == 1


class StopComesFirst(threading.Event):
    """A flag that is raised by a stop in the very moment in which the thread takes it down."""

    def __init__(self, stop: Callable[[], None]) -> None:
        super().__init__()
        self._stop = stop

    def clear(self) -> None:
        self._stop()
        super().clear()


def test_a_stop_in_the_moment_of_looking_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = runner_of(Counting(), Interval(rate_hz=0.001))
    monkeypatch.setattr(runner, "_wake", StopComesFirst(runner.request_stop))
    runner.start()
    until(lambda: runner.ended, "the thread ends")
    assert runner.status().state is State.CLOSED


def test_a_driver_that_does_not_hear_a_stop_does_not_hold_up_the_agent() -> None:
    sensor = Deaf()
    runner, _ = runner_of(sensor, Stream())
    runner.start()
    until(lambda: sensor.reads == 1, "the driver waits")
    assert not runner.stop(0.05)
    sensor.let_go.set()
    assert runner.stop(DEADLINE_S)


def test_a_runner_that_was_never_started_stops() -> None:
    runner, _ = runner_of(Counting(), Interval())
    assert runner.stop(1.0)


class BrokenQueue(RowQueue):
    """A mistake in the agent itself."""

    def put(self, schema: pa.Schema, sample: Sample, wait_s: float, stop: threading.Event) -> bool:
        raise RuntimeError("a bug")


def test_a_mistake_of_the_agent_shows_as_failed_and_closes_the_sensor() -> None:
    sensor = Counting()
    runner, _ = runner_of(sensor, Interval(), BrokenQueue(10, 1000))
    runner.start()
    until(lambda: runner.ended, "the thread ends")
    assert runner.status().state is State.FAILED and runner.status().last_error == "RuntimeError: a bug"
    assert not sensor.is_open


def test_a_recording_is_replayed_to_its_end_and_again_when_switched_on(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ts,n\n" + "".join(f"{at * 10},{at}\n" for at in range(100)))
    sensor = create_sensor("replay", {"path": str(path), "time_format": "ms", "speed": 10.0, "keep_timestamps": True})
    runner, queue = runner_of(sensor, Stream())
    runner.start()
    until(lambda: runner.ended, "the end of the recording")
    assert runner.status().state is State.EXHAUSTED and queue.rows == 100
    runner.reconfigure(enabled=True)
    until(lambda: queue.rows == 200, "the second time")
    assert runner.stop(DEADLINE_S)
    numbers: list[int] = []
    for item in iter(queue.get, None):
        assert not isinstance(item.sample, Reading)
        numbers += item.sample.column("n").to_pylist()
    assert numbers == list(range(100)) * 2
