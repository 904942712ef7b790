"""When the next reading is due: a monotonic schedule that neither drifts nor catches up in bursts."""

from __future__ import annotations

import math
from fractions import Fraction

_NS_PER_S = 1_000_000_000


class Schedule:
    """Ticks at `start_ns + k / rate_hz`, k = 0, 1, 2, …, computed exactly, so that no error adds up.

    Pure: the caller brings the time and does the waiting.

    Args:
        rate_hz: ticks per second, above 0.
        start_ns: monotonic time of the first tick, nanoseconds.

    Attributes:
        overruns: ticks that were skipped, because one or more whole periods had passed when the next one was asked for.
    """

    def __init__(self, rate_hz: float, start_ns: int) -> None:
        if not (math.isfinite(rate_hz) and rate_hz > 0):
            raise ValueError(f"rate_hz = {rate_hz} is not a positive number; choose one above 0")
        self._period_ns = _NS_PER_S / Fraction(rate_hz)
        self._start_ns = start_ns
        self._tick = -1
        self.overruns = 0

    def next_due(self, now_ns: int) -> int:
        """Go on to the next tick and return its time; call it once at the start, and once after each reading.

        A tick less than one period late is due at once. Are one or more whole periods gone, the newest tick that has
        passed is taken, and those before it are skipped and counted: a stalled device reads once, not in a burst.

        Args:
            now_ns: monotonic time, nanoseconds.
        """
        following = self._tick + 1
        newest_passed = math.floor((now_ns - self._start_ns) / self._period_ns)
        self._tick = max(following, newest_passed)
        self.overruns += self._tick - following
        return self._start_ns + math.floor(self._tick * self._period_ns)
