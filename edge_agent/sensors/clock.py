"""The two clocks that sampling needs, as a port, so that tests and the simulated world hand in their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Time as sampling sees it."""

    def wall_us(self) -> int:
        """Device clock, microseconds since 1970-01-01 UTC; may jump."""

    def monotonic_ns(self) -> int:
        """A clock that never goes back, nanoseconds since an arbitrary moment."""


class SystemClock:
    """The clocks of this machine."""

    def wall_us(self) -> int:
        """Device clock, microseconds since 1970-01-01 UTC."""
        return time.time_ns() // 1000

    def monotonic_ns(self) -> int:
        """Linux CLOCK_MONOTONIC, nanoseconds."""
        return time.monotonic_ns()
