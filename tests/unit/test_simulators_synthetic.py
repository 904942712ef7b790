"""Synthetic sensors: what they say is a function of seed and time, so it can be recomputed from the lake."""

from __future__ import annotations

import random
import threading

import numpy as np
import pyarrow as pa
import pytest

from contract.batches import Clock, Envelope
from contract.codec import checksum, decode_body
from contract.errors import ConfigurationError
from contract.limits import DEFAULT_LIMITS
from edge_agent.sensors.port import Block
from edge_agent.sensors.registry import create_sensor
from simulators.batches import POOL_BODIES, BodySource
from simulators.reservoir import Reservoir
from simulators.synthetic import FIELDS, ROWS_MAX, STATES, Machine, columns, interval_us, machine


class Wall:
    def __init__(self) -> None:
        self.us = 1_790_000_000_000_000

    def __call__(self) -> int:
        return self.us


def test_values_are_a_function_of_seed_and_time_not_of_how_they_were_asked_for() -> None:
    numbers = np.arange(5_000_000_000, 5_000_000_900, dtype=np.int64)
    whole = columns(7, numbers, 5_000)
    for start in range(0, 900, 90):
        part = columns(7, numbers[start : start + 90], 5_000)
        assert {name: array.slice(start, 90) for name, array in whole.items()} == part
    assert columns(8, numbers, 5_000)["temperature"] != whole["temperature"]


def test_values_have_the_declared_types_and_plausible_sizes() -> None:
    made = columns(1, np.arange(0, 2_000_000, 97, dtype=np.int64), 5_000)
    assert pa.schema([(name, array.type) for name, array in made.items()]) == FIELDS
    assert all(array.null_count == 0 for array in made.values())
    temperature = made["temperature"].to_numpy()
    assert 10 < temperature.min() < 25 < temperature.max() < 45
    assert set(made["state"].to_pylist()) == set(STATES)
    parts = made["parts"].to_numpy()
    assert (np.diff(parts) >= 0).all()


def test_noise_is_normal_and_uncorrelated() -> None:
    from simulators.synthetic import _gauss

    noise = _gauss(3, 3, np.arange(200_000, dtype=np.int64))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(noise, _gauss(4, 3, np.arange(200_000, dtype=np.int64)))[0, 1]) < 0.01


def test_a_machine_gives_each_row_once_however_often_it_is_asked() -> None:
    wall = Wall()
    sensor = Machine(1, 1000.0, wall)
    steps = random.Random(1)
    times: list[int] = []
    for _ in range(200):
        wall.us += steps.randrange(0, 5_000)
        block = sensor.read()
        if block is not None:
            times.extend(block.ts_us.tolist())
    assert times == list(range(times[0], times[0] + 1000 * len(times), 1000))
    assert 0 <= wall.us - times[-1] < 1000


def test_a_machine_that_was_not_asked_for_long_gives_a_bounded_block() -> None:
    wall = Wall()
    sensor = Machine(1, 1000.0, wall)
    wall.us += 3_600_000_000
    block = sensor.read()
    assert block is not None
    assert len(block.ts_us) == ROWS_MAX
    assert block.ts_us[-1] == wall.us


def test_the_machine_is_a_function_for_the_driver_callable() -> None:
    options = {"function": "simulators.synthetic:machine", "arguments": {"seed": 3, "rate_hz": 50_000.0}}
    sensor = create_sensor("callable", options)
    sensor.open()
    stop = threading.Event()
    block = None
    for _ in range(10_000):
        block = sensor.read(stop)
        if block is not None:
            break
    assert isinstance(block, Block)
    assert set(block.columns) == set(FIELDS.names)
    with pytest.raises(ConfigurationError, match="rate_hz = 0"):
        machine(1, 0.0)
    assert interval_us(50.0) == 20_000


@pytest.mark.parametrize("pooled", [True, False])
def test_batches_of_a_swarm_are_what_the_contract_asks_for(*, pooled: bool) -> None:
    source = BodySource(50, random.Random(1), pooled=pooled)
    bodies = [source.next(1_790_000_000_000_000 + n, 20_000.0) for n in range(POOL_BODIES + 1)]
    for body in bodies:
        clock = Clock(True, 0, 0, "0" * 32)
        envelope = Envelope("d", "s", "0" * 32, 1, 1, 50, 0, clock, checksum(body))
        batch = decode_body(body, envelope, DEFAULT_LIMITS)
        times = batch.column("ts").cast(pa.int64()).to_numpy()
        assert set(np.diff(times)) == {20_000}
    assert len(set(bodies[:POOL_BODIES])) == POOL_BODIES
    assert (bodies[0] == bodies[POOL_BODIES]) is pooled


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        BodySource(0, random.Random(1), pooled=True)


def test_quantiles_are_exact_while_everything_fits_and_close_afterwards() -> None:
    exact = Reservoir(100, random.Random(1))
    assert exact.quantile(0.5) is None
    for value in range(100, 0, -1):
        exact.add(float(value))
    assert [exact.quantile(q) for q in (0.0, 0.01, 0.5, 0.99, 1.0)] == [1.0, 1.0, 50.0, 99.0, 100.0]
    sampled = Reservoir(2_000, random.Random(1))
    for value in range(100_000):
        sampled.add(float(value))
    assert sampled.count == 100_000
    middle, high = sampled.quantile(0.5), sampled.quantile(0.99)
    assert middle is not None and abs(middle - 50_000) < 5_000
    assert high is not None and abs(high - 99_000) < 1_000
    with pytest.raises(ValueError, match="size_max = 0"):
        Reservoir(0, random.Random(1))
