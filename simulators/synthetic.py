"""A synthetic machine: every value is a function of the seed and the row's time, so anyone can recompute what was sent.

For the driver `callable`::

    [streams.machine]
    driver = "callable"
    sampling = { mode = "interval", rate_hz = 10 }
    [streams.machine.options]
    function = "simulators.synthetic:machine"
    arguments = { seed = 7, rate_hz = 200 }

Each call returns the rows that came due since the one before, so the machine may be much faster than the polling.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from contract.errors import ConfigurationError
from edge_agent.sensors.port import Block

FIELDS = pa.schema(
    [
        ("temperature", pa.float32()),
        ("pressure", pa.float32()),
        ("vibration", pa.float32()),
        ("level", pa.float64()),
        ("parts", pa.int64()),
        ("running", pa.bool_()),
        ("state", pa.string()),
    ]
)
STATES = ("idle", "warming", "running", "cleaning", "fault")
RATE_HZ_MAX = 100_000.0
ROWS_MAX = 20_000
"""Longest block. A machine that was not asked for longer skips what is older, as a sensor's own memory would."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def interval_us(rate_hz: float) -> int:
    """Time between rows, whole microseconds.

    Raises:
        ConfigurationError: when the rate is outside what the machine does.
    """
    if not 0 < rate_hz <= RATE_HZ_MAX:
        raise ConfigurationError(f"rate_hz = {rate_hz} is outside 0..{RATE_HZ_MAX:g}; choose one in that range")
    return max(1, round(1e6 / rate_hz))


def columns(seed: int, numbers: Ints, every_us: int) -> dict[str, pa.Array]:
    """The rows of these numbers; row n has the time `n * every_us` microseconds since 1970-01-01 UTC.

    Args:
        seed: which machine.
        numbers: row numbers, `[rows]`.
        every_us: time between rows, microseconds.

    Returns:
        One array per field of `FIELDS`, `[rows]`: sines with noise and steps, a sum with noise, a burst, a ramp, a
        counter, a flag, a text.
    """
    seconds = numbers * (every_us / 1e6)
    shift = _uniform(seed, 0, np.zeros(1, np.int64))[0]
    # A state lasts half a minute, a set point a minute, whatever the rate.
    state = (_uniform(seed, 1, (seconds / 30).astype(np.int64)) * len(STATES)).astype(np.int64)
    set_point = 20 + 15 * _uniform(seed, 2, (seconds / 60).astype(np.int64))
    running = state == STATES.index("running")
    temperature = set_point + 2 * np.sin(seconds / 9 + 6 * shift) + 0.05 * _gauss(seed, 3, numbers)
    pressure = 1013.25 + 0.8 * np.sin(seconds / 70) + 0.3 * np.sin(seconds / 3.1) + 0.02 * _gauss(seed, 5, numbers)
    vibration = np.where(running, 1.0, 0.05) * np.sin(seconds * 157 + shift) + 0.02 * _gauss(seed, 7, numbers)
    level = np.mod(seconds / 600 + shift, 1.0)
    text = pa.DictionaryArray.from_arrays(pa.array(state, pa.int8()), pa.array(STATES)).cast(pa.string())
    return {
        "temperature": pa.array(_rounded(temperature, 3)),
        "pressure": pa.array(_rounded(pressure, 2)),
        "vibration": pa.array(_rounded(vibration, 5)),
        "level": pa.array(level),
        "parts": pa.array((seconds / 2).astype(np.int64)),
        "running": pa.array(running),
        "state": text,
    }


class Machine:
    """One machine on a clock.

    Args:
        seed: which machine.
        rate_hz: rows per second, above 0.
        wall_us: the clock, microseconds since 1970-01-01 UTC.
    """

    def __init__(self, seed: int, rate_hz: float, wall_us: Callable[[], int]) -> None:
        self._seed = seed
        self._every_us = interval_us(rate_hz)
        self._wall_us = wall_us
        self._next = wall_us() // self._every_us

    def read(self) -> Block | None:
        """The rows that came due since the last call; None when none did."""
        due = self._wall_us() // self._every_us + 1
        first = max(self._next, due - ROWS_MAX)
        if first >= due:
            return None
        self._next = due
        numbers = np.arange(first, due, dtype=np.int64)
        return Block(columns(self._seed, numbers, self._every_us), ts_us=numbers * self._every_us)


def machine(seed: int = 1, rate_hz: float = 50.0) -> Block | None:
    """The rows of one machine that came due since the last call in this process."""
    return _machine(seed, rate_hz).read()


@cache
def _machine(seed: int, rate_hz: float) -> Machine:
    return Machine(seed, rate_hz, lambda: time.time_ns() // 1000)


def _rounded(values: Floats, places: int) -> npt.NDArray[np.float32]:
    return np.round(values, places).astype(np.float32)


def _uniform(seed: int, channel: int, numbers: Ints) -> Floats:
    """Even in [0, 1), a function of (seed, channel, number) alone: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    mix = np.uint64((seed * 1_000_003 + channel * 7919) & 0xFFFF_FFFF_FFFF_FFFF)
    with np.errstate(over="ignore"):
        z = (numbers.astype(np.uint64) ^ (mix * np.uint64(0xD1342543DE82EF95))) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.asarray((z >> np.uint64(11)) * 2.0**-53, np.float64)


def _gauss(seed: int, channel: int, numbers: Ints) -> Floats:
    """Normal, from two even draws (Box and Muller, 1958)."""
    radius = np.sqrt(-2 * np.log1p(-_uniform(seed, channel, numbers)))
    return np.asarray(radius * np.cos(2 * np.pi * _uniform(seed, channel + 1, numbers)), np.float64)
