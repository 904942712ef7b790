"""Encoded batches for simulated devices: fresh ones, or a small pool that is sent again and again."""

from __future__ import annotations

import itertools
import math
import random

import pyarrow as pa

from contract.batches import TS_TYPE
from contract.codec import encode_body
from contract.names import TS
from simulators.recordings import FIELDS

POOL_BODIES = 64
"""Different bodies in a pool: few enough for the processor's cache, enough that nothing compresses across them."""


class BodySource:
    """Bodies of `ts` and six float32 fields like those of the watch: slow swings and noise of the sensor's size.

    Args:
        rows: rows of every batch, at least 1.
        rng: draws the values.
        pooled: True encodes `POOL_BODIES` once and hands them out in turn, times and all: costs nothing, for measuring
            everything else. False encodes each batch with its own times, about 0.1 ms at 500 rows.
    """

    def __init__(self, rows: int, rng: random.Random, *, pooled: bool) -> None:
        if rows < 1:
            raise ValueError(f"a batch of {rows} rows; a batch has at least one row")
        self.rows = rows
        self._values = [_values(rows, rng) for _ in range(POOL_BODIES)]
        self._turn = itertools.cycle(range(POOL_BODIES))
        self._pooled = pooled
        self._pool: list[bytes] = []

    def next(self, last_us: int, interval_us: float) -> bytes:
        """One body.

        Args:
            last_us: time of its last row, microseconds since 1970-01-01 UTC; of a pooled body: when it was made.
            interval_us: time between rows, microseconds.
        """
        turn = next(self._turn)
        if not self._pooled:
            return self._encode(turn, last_us, interval_us)
        if turn >= len(self._pool):
            self._pool.append(self._encode(turn, last_us, interval_us))
        return self._pool[turn]

    def _encode(self, turn: int, last_us: int, interval_us: float) -> bytes:
        times = [last_us - int((self.rows - 1 - row) * interval_us) for row in range(self.rows)]
        columns = [pa.array(times, pa.int64()).cast(TS_TYPE), *self._values[turn]]
        return encode_body(pa.record_batch(columns, names=[TS, *FIELDS]))


def _values(rows: int, rng: random.Random) -> list[pa.Array]:
    columns = []
    for _ in FIELDS:
        period, phase, size = rng.uniform(50, 150), rng.uniform(0, math.tau), rng.uniform(0.2, 1.5)
        swing = (size * math.sin(math.tau * row / period + phase) + rng.gauss(0.0, 0.02) for row in range(rows))
        # Six decimals, as the recorded ones have: noise in the last bits would compress like nothing real.
        columns.append(pa.array([round(value, 6) for value in swing], pa.float32()))
    return columns
