"""A sensor whose every value can be computed again: what the lake holds can be checked without a second book."""

from __future__ import annotations

import secrets

import numpy as np

from edge_agent.sensors.port import Block

FIELDS = {"run": "string", "n": "int64", "x": "float64", "y": "float32"}
_run = secrets.token_hex(8)
_next = 0


def expected(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of rows `n`: float64 and float32 with no simple pattern of bits."""
    x = np.sin(n.astype(np.float64)) * 1e3
    return x, (x / 7).astype(np.float32)


def read(rows: int = 25) -> Block:
    """The next rows: `run` names this process, `n` counts from 0 without a hole."""
    global _next
    n = np.arange(_next, _next + rows, dtype=np.int64)
    _next += rows
    x, y = expected(n)
    return Block(columns={"run": [_run] * rows, "n": n, "x": x, "y": y}, interval_ns=1_000_000)
