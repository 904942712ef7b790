"""A sensor of six channels for the inference benchmark; it notes when it was read, and imports what a driver would."""

from __future__ import annotations

import array
import random
import struct
import time
from pathlib import Path
from typing import BinaryIO

FIELDS = ("ax", "ay", "az", "gx", "gy", "gz")
_rng = random.Random(1)
_noise = array.array("f", (_rng.gauss(0, 1) for _ in range(6_000)))
_files: dict[str, BinaryIO] = {}
_at = 0


def read(times: str) -> dict[str, float]:
    """One reading; the monotonic clock, int64 nanoseconds, goes to the file `times`."""
    global _at
    if times not in _files:
        _files[times] = Path(times).open("ab", buffering=0)  # noqa: SIM115 - as long as the process
    _files[times].write(struct.pack("<q", time.monotonic_ns()))
    _at = (_at + 6) % len(_noise)
    return dict(zip(FIELDS, _noise[_at : _at + 6], strict=True))
