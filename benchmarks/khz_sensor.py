"""A 1 kHz sensor of six channels for the agent's benchmark; it imports nothing that a driver on a device would not."""

from __future__ import annotations

import array
import random

from edge_agent.sensors.port import Block

FIELDS = ("ax", "ay", "az", "wx", "wy", "wz")
BLOCK_ROWS = 50
_rng = random.Random(1)
_noise = {name: array.array("f", (_rng.gauss(0, 1) for _ in range(100 * BLOCK_ROWS))) for name in FIELDS}
_at = 0


def read() -> Block:
    """The next fifty rows."""
    global _at
    _at = (_at + BLOCK_ROWS) % (100 * BLOCK_ROWS)
    columns = {name: noise[_at : _at + BLOCK_ROWS] for name, noise in _noise.items()}
    return Block(columns=columns, interval_ns=1_000_000)
