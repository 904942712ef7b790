"""One sensor step by step, on a clock that only moves when told to.

Mutants tried, each found: no close after a failed open; no backoff; backoff not reset by a reading; a refused reading
closes the sensor; refused rows not counted; dropped rows not counted; one deadline per sample instead of one per
reading; schedule kept over a change of rate; missed ticks not counted; schema object new after each reconnection; a
disabled sensor left open; a failed one not revived by switching it on; a foreign exception let through; a driver's
answer of a wrong type taken; a spinning driver not held back.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.backoff import Backoff
from edge_agent.sampling.loop import SensorLoop
from edge_agent.sampling.settings import Burst, Interval, OnChange, Sampling, Stream, Trigger
from edge_agent.sampling.status import State
from edge_agent.sensors.port import (
    Block,
    Reading,
    Sample,
    SensorConfigError,
    SensorError,
    SensorExhausted,
    SensorValueError,
)

WALL_US = 1_700_000_000_000_000
SCHEMA = pa.schema([("x", pa.int64())])


class FakeClock:
    def __init__(self) -> None:
        self.s = 1000.0

    def monotonic_ns(self) -> int:
        return round(self.s * 1e9)

    def wall_us(self) -> int:
        return WALL_US + round(self.s * 1e6)


class ListSink:
    """Takes everything, or as many rows as it has room for; a wait lets the clock go on."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.samples: list[Sample] = []
        self.schemas: list[pa.Schema] = []
        self.room = 1_000_000
        self.waited_s = 0.0

    def put(self, schema: pa.Schema, sample: Sample, wait_s: float, stop: threading.Event) -> bool:
        rows = 1 if isinstance(sample, Reading) else sample.num_rows
        if rows > self.room:
            self.clock.s += wait_s
            self.waited_s += wait_s
            return False
        self.room -= rows
        self.samples.append(sample)
        self.schemas.append(schema)
        return True

    def wake(self) -> None:
        pass

    def values(self) -> list[Any]:
        found: list[Any] = []
        for sample in self.samples:
            found += [sample.values["x"]] if isinstance(sample, Reading) else sample.column("x").to_pylist()
        return found


class ScriptedSensor:
    """Does what it is told, call by call; a number is a reading of x, an exception is raised, a function is called."""

    def __init__(self, reads: list[Any], opens: list[Any] | None = None, schema: Any = SCHEMA) -> None:
        self.reads, self.opens = reads, opens or []
        self._schema = schema
        self.calls: list[str] = []

    @property
    def schema(self) -> Any:
        return self._schema

    def open(self) -> None:
        self.calls.append("open")
        step = self.opens.pop(0) if self.opens else None
        if isinstance(step, Exception):
            raise step

    def read(self, stop: threading.Event) -> Any:
        self.calls.append("read")
        step = self.reads.pop(0) if self.reads else None
        if callable(step):
            step = step()
        if isinstance(step, Exception):
            raise step
        return Reading({"x": step}) if isinstance(step, int) else step

    def close(self) -> None:
        self.calls.append("close")


class Rig:
    """A loop with everything that it is handed."""

    def __init__(self, sensor: ScriptedSensor, sampling: Sampling | None = None, enabled: bool = True) -> None:
        self.clock = FakeClock()
        self.sink = ListSink(self.clock)
        self.sensor = sensor
        self.interrupt, self.stop = threading.Event(), threading.Event()
        self.rng = random.Random(1)
        self.backoff = Backoff(1.0, 8.0, self.rng)
        self.loop = SensorLoop(
            "s", sensor, sampling or Interval(rate_hz=1), self.sink, self.clock, self.backoff, enabled
        )

    def step(self) -> float:
        return self.loop.step(self.interrupt, self.stop)

    def steps(self, count: int) -> list[float]:
        """Steps, with the waits between them waited out; the waits."""
        waits = []
        for _ in range(count):
            wait_s = self.step()
            waits.append(wait_s)
            self.clock.s += wait_s
        return waits


def test_readings_are_stamped_and_taken_at_the_rate() -> None:
    rig = Rig(ScriptedSensor([1, 2, Reading({"x": 3}, ts_us=7), None, 5]), Interval(rate_hz=4))
    assert rig.steps(5) == [0.25] * 5
    assert rig.sink.values() == [1, 2, 3, 5]
    times = [sample.ts_us for sample in rig.sink.samples if isinstance(sample, Reading)]
    assert times == [WALL_US + 1_000_000_000, WALL_US + 1_000_250_000, 7, WALL_US + 1_001_000_000]
    status = rig.loop.status()
    assert (status.state, status.reads, status.rows_read, status.rows_out) == (State.RUNNING, 5, 4, 4)


def test_what_of_the_driver_runs_is_seen_while_it_runs_the_first_time_too() -> None:
    """A driver that never returns can only be seen from outside."""
    seen: list[tuple[str, int | None, float | None]] = []

    def look() -> int:
        status = rig.loop.status()
        seen.append((status.calling, status.calling_since_ns, status.rate_hz))
        return 1

    rig = Rig(ScriptedSensor([look, look]), Interval(rate_hz=2))
    first_ns = rig.clock.monotonic_ns()
    rig.steps(2)
    assert seen == [("read", first_ns, 2.0), ("read", first_ns + 500_000_000, 2.0)]
    assert (rig.loop.status().calling, rig.loop.status().calling_since_ns) == ("", None)


def test_a_slow_reading_costs_ticks_which_are_counted_and_not_caught_up() -> None:
    def slow() -> int:
        rig.clock.s += 3.4
        return 1

    rig = Rig(ScriptedSensor([slow, 2, 3]), Interval(rate_hz=1))
    assert rig.steps(3) == [pytest.approx(0.0), pytest.approx(0.6), pytest.approx(1.0)]
    status = rig.loop.status()
    assert (status.ticks_missed, status.overruns) == (2, 2)


def test_waiting_less_than_asked_does_not_read_early() -> None:
    rig = Rig(ScriptedSensor([1, 2]), Interval(rate_hz=1))
    rig.step()
    rig.clock.s += 0.3
    assert rig.step() == pytest.approx(0.7)
    assert rig.sink.values() == [1]


def test_a_sensor_that_does_not_answer_is_opened_again_with_growing_pauses() -> None:
    trouble = [SensorError("no answer")] * 4
    rig = Rig(ScriptedSensor([1, SensorError("gone"), 2], opens=[*trouble, None, SensorError("still gone")]))
    expected = random.Random(1)
    pauses = [expected.uniform(0, ceiling) for ceiling in (1, 2, 4, 8)]
    assert rig.steps(4) == [pytest.approx(pause) for pause in pauses]
    assert rig.loop.status().state is State.RETRYING
    rig.steps(1)
    assert rig.loop.status().state is State.RUNNING and rig.sink.values() == [1]
    # A reading has come, so the pauses begin at the bottom again.
    assert rig.step() == pytest.approx(expected.uniform(0, 1))
    assert rig.sensor.calls == ["open", "close"] * 4 + ["open", "read", "read", "close"]
    assert "gone" in rig.loop.status().last_error
    rig.steps(3)
    assert rig.loop.status().errors == 6


def test_the_pause_is_waited_out_although_somebody_wakes_the_thread() -> None:
    rig = Rig(ScriptedSensor([1], opens=[SensorError("no answer")]))
    pause = rig.step()
    rig.clock.s += pause / 2
    assert rig.step() == pytest.approx(pause / 2)
    assert rig.sensor.calls == ["open", "close"]


def test_what_a_foreign_driver_raises_is_trouble_of_the_sensor() -> None:
    rig = Rig(ScriptedSensor([ZeroDivisionError("oops")], opens=[OSError("bus")]))
    rig.steps(1)
    assert rig.loop.status().last_error == "open of the driver raised OSError: bus"
    rig.steps(1)
    assert rig.loop.status().last_error == "read of the driver raised ZeroDivisionError: oops"
    assert rig.loop.status().state is State.RETRYING


@pytest.mark.parametrize(
    "sensor",
    [
        ScriptedSensor([1], opens=[SensorConfigError("pin 99 does not exist")]),
        ScriptedSensor([SensorConfigError("pin 99 does not exist")]),
        ScriptedSensor([1], schema=pa.schema([("ts", pa.int64())])),
        ScriptedSensor([1], schema={"x": "int64"}),
        ScriptedSensor([{"x": 1}]),
        ScriptedSensor([Reading({"ts": 1})], schema=None),
    ],
)
def test_what_can_never_work_is_given_up_once_and_closed(sensor: ScriptedSensor) -> None:
    rig = Rig(sensor)
    assert rig.steps(2) == [3600.0, 3600.0]
    status = rig.loop.status()
    assert (status.state, status.errors) == (State.FAILED, 1) and status.last_error
    assert status.rows_read == status.rows_refused
    assert sensor.calls.count("open") == sensor.calls.count("close") == 1


def test_a_mode_that_does_not_suit_the_fields_is_given_up() -> None:
    rig = Rig(ScriptedSensor([1]), OnChange(watch=("y",)))
    rig.steps(1)
    assert rig.loop.status().state is State.FAILED and "'y'" in rig.loop.status().last_error


def test_the_end_of_a_recording_is_the_end() -> None:
    rig = Rig(ScriptedSensor([1, SensorExhausted("ended")]))
    assert rig.steps(3) == [1.0, 3600.0, 3600.0]
    assert (rig.loop.status().state, rig.loop.status().errors) == (State.EXHAUSTED, 0)
    assert rig.sensor.calls == ["open", "read", "read", "close"]


def test_a_reading_that_does_not_fit_is_refused_and_the_next_one_taken() -> None:
    bad = [
        Reading({"x": 1.5}),
        Reading({"y": 1}),
        Block({"x": [1, 2], "y": [1, 2]}, interval_ns=1),
        SensorValueError("?"),
    ]
    rig = Rig(ScriptedSensor([1, *bad[:3], 2]))
    rig.steps(5)
    status = rig.loop.status()
    assert rig.sink.values() == [1, 2]
    assert (status.rows_read, status.rows_refused, status.rows_out, status.errors) == (6, 4, 2, 3)
    assert status.state is State.RUNNING and rig.sensor.calls.count("open") == 1
    assert "unknown fields ['y']" in status.last_error


class Odd:
    """A value whose class misbehaves."""

    @property
    def dtype(self) -> None:
        raise RuntimeError("odd")


def test_values_that_cannot_even_be_looked_at_are_refused() -> None:
    rig = Rig(ScriptedSensor([Reading({"x": Odd()}), Block({"x": Odd()}, interval_ns=1), 3]))
    rig.steps(3)
    assert rig.sink.values() == [3] and rig.loop.status().errors == 2


def test_without_a_schema_the_first_good_reading_decides_and_it_stays() -> None:
    readings = [Reading({"x": None}), 1, SensorError("gone"), 2, Reading({"x": 2.5})]
    rig = Rig(ScriptedSensor(readings, schema=None))
    rig.steps(5)
    status = rig.loop.status()
    assert rig.sink.values() == [1, 2]
    assert rig.sink.schemas[0] is rig.sink.schemas[1]
    assert rig.sink.schemas[0].field("x").type == pa.int64()
    assert (status.rows_refused, status.errors) == (2, 3)


def test_the_schema_object_stays_the_same_over_a_reconnection_and_changes_with_the_fields() -> None:
    sensor = ScriptedSensor([1, SensorError("gone"), 2, SensorError("gone"), 3])
    rig = Rig(sensor)
    rig.steps(3)
    sensor._schema = pa.schema([("x", pa.int64()), ("y", pa.int64())])
    rig.steps(2)
    first, second, third = rig.sink.schemas
    assert first is second and third.names == ["ts", "x", "y"]


def test_rows_without_room_are_dropped_after_one_wait_and_counted() -> None:
    trigger = Burst(trigger=(Trigger(field="x", above=8),), pre_rows=5, queue_wait_s=2, rate_hz=1)
    rig = Rig(ScriptedSensor([1, 2, 3, 4, 9, 9]), trigger)
    rig.steps(4)
    rig.sink.room = 3
    rig.steps(1)
    # History and event are five samples; the wait is one.
    assert rig.sink.waited_s == pytest.approx(2)
    assert rig.sink.values() == [1, 2, 3]
    status = rig.loop.status()
    assert (status.rows_dropped, status.rows_out, status.bursts) == (2, 3, 1)
    assert status.overruns == status.ticks_missed + 2


def test_big_blocks_are_cut_to_what_a_batch_can_hold() -> None:
    rig = Rig(ScriptedSensor([Block({"x": np.arange(150_000)}, interval_ns=1)]))
    rig.steps(1)
    sizes = [sample.num_rows for sample in rig.sink.samples if not isinstance(sample, Reading)]
    assert sizes == [65_536, 65_536, 18_928]
    assert rig.sink.values() == list(range(150_000))


def test_in_stream_mode_the_driver_sets_the_pace_but_cannot_spin() -> None:
    rig = Rig(ScriptedSensor([1, 2, None, 3]), Stream())
    assert [rig.step() for _ in range(5)] == [0.0, 0.0, 0.01, 0.0, 0.01]
    assert rig.loop.status().rate_hz is None
    rig.interrupt.set()
    assert rig.step() == 0.0


def test_the_rate_is_changed_without_opening_the_sensor_again() -> None:
    rig = Rig(ScriptedSensor([1, 2, 3, 4]), Interval(rate_hz=1))
    assert rig.steps(1) == [1.0]
    rig.clock.s -= 0.5
    rig.loop.reconfigure(rate_hz=10)
    assert rig.steps(2) == [pytest.approx(0.1)] * 2
    assert rig.loop.status().rate_hz == 10
    rig.loop.reconfigure()
    assert rig.steps(1) == [pytest.approx(1.0)]
    assert rig.loop.status().rate_hz == 1
    assert rig.sensor.calls == ["open", "read", "read", "read", "read"]
    assert rig.loop.status().ticks_missed == 0


def test_an_impossible_change_is_refused_and_changes_nothing() -> None:
    rig = Rig(ScriptedSensor([1, 2]), Interval(rate_hz=1))
    with pytest.raises(SensorConfigError, match="rate_hz"):
        rig.loop.reconfigure(enabled=False, rate_hz=-1)
    assert rig.steps(1) == [1.0] and rig.loop.status().enabled


def test_switching_off_closes_and_switching_on_opens_afresh() -> None:
    rig = Rig(ScriptedSensor([1, 1, 1, 2]), OnChange(rate_hz=1, max_silence_s=0))
    rig.steps(2)
    rig.loop.reconfigure(enabled=False)
    assert rig.steps(2) == [3600.0] * 2
    assert (rig.loop.status().state, rig.loop.status().enabled) == (State.DISABLED, False)
    assert rig.sensor.calls == ["open", "read", "read", "close"]
    rig.loop.reconfigure(enabled=True)
    rig.steps(2)
    # The unchanged value is reported again, because nobody knows what happened meanwhile.
    assert rig.sink.values() == [1, 1, 2]
    assert rig.sensor.calls[4:] == ["open", "read", "read"]


def test_a_stream_that_begins_switched_off_is_not_opened() -> None:
    rig = Rig(ScriptedSensor([1]), enabled=False)
    rig.steps(2)
    assert rig.sensor.calls == [] and rig.loop.status().state is State.DISABLED
    rig.loop.reconfigure(enabled=True)
    rig.steps(1)
    assert rig.sink.values() == [1]
    rig.loop.reconfigure()
    rig.steps(1)
    assert rig.loop.status().state is State.DISABLED


@pytest.mark.parametrize("end", [SensorExhausted("ended"), SensorConfigError("wrong")])
def test_switching_on_revives_what_failed_or_ended(end: Exception) -> None:
    rig = Rig(ScriptedSensor([1, end, 2]))
    rig.steps(2)
    rig.loop.reconfigure(enabled=True)
    rig.steps(1)
    assert rig.sink.values() == [1, 2]
    assert (rig.loop.status().state, rig.loop.status().last_error) == (State.RUNNING, "")


def test_a_close_that_fails_is_counted_and_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    sensor = ScriptedSensor([SensorError("gone"), 1])

    def broken() -> None:
        raise OSError("already gone")

    monkeypatch.setattr(sensor, "close", broken)
    rig = Rig(sensor)
    rig.steps(2)
    assert rig.sink.values() == [1] and rig.loop.status().errors == 2
    rig.loop.close()
    assert rig.loop.status().state is State.CLOSED


STEPS: list[Callable[[], Any]] = [
    lambda: 1,
    lambda: 9,
    lambda: None,
    lambda: Reading({"x": 1.5}),
    lambda: Reading({}),
    lambda: Block({"x": [1, 9, 9]}, interval_ns=1),
    lambda: Block({"x": np.arange(5)}, interval_ns=1),
    lambda: Block({"x": [0.5, 1.5]}, interval_ns=1),
    lambda: Block({"x": []}),
    lambda: SensorError("gone"),
]
MODES: list[Sampling] = [
    Interval(),
    OnChange(deadband={"x": 2}),
    Burst(trigger=(Trigger(field="x", above=8),), pre_rows=2, post_rows=1, rows_max=4),
]


@settings(max_examples=200)
@given(
    steps=st.lists(st.sampled_from(range(len(STEPS))), max_size=30),
    mode=st.sampled_from(MODES),
    room=st.integers(0, 30),
    flips=st.sets(st.integers(0, 30)),
)
def test_every_row_ends_in_exactly_one_counter(steps: list[int], mode: Sampling, room: int, flips: set[int]) -> None:
    rig = Rig(ScriptedSensor([STEPS[step]() for step in steps]), mode)
    rig.sink.room = room
    enabled = True
    for number in range(40):
        if number in flips:
            enabled = not enabled
            rig.loop.reconfigure(enabled=enabled)
        rig.steps(1)
        status = rig.loop.status()
        assert status.rows_read == (
            status.rows_refused + status.rows_suppressed + status.rows_held + status.rows_out + status.rows_dropped
        )
        assert min(status.rows_suppressed, status.rows_held, status.rows_dropped, status.rows_refused) >= 0
        assert status.rows_out == len(rig.sink.values())
    if isinstance(mode, Interval):
        assert rig.loop.status().rows_suppressed == 0
