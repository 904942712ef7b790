"""Condition and counters of a sampler.

Every row that a driver hands over ends in exactly one place, and each place has a counter:

    rows_read = rows_refused + rows_suppressed + rows_held + rows_out + rows_dropped

Refused: did not fit the declared fields. Suppressed: the mode did not want it. Held: history of a burst to come. Out:
taken by the sink. Dropped: the sink had no room in time.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class State(StrEnum):
    """What a sampler is doing."""

    CLOSED = "closed"
    """Not opened yet, or stopped."""
    RUNNING = "running"
    RETRYING = "retrying"
    """The sensor did not answer; it is tried again."""
    DISABLED = "disabled"
    """Switched off by configuration."""
    EXHAUSTED = "exhausted"
    """The recording has ended."""
    FAILED = "failed"
    """Cannot work as configured; the error says why."""


class SamplingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One sampler's condition. Counters run since it was made."""

    state: State = State.CLOSED
    enabled: bool = True
    rate_hz: float | None = None
    """Polling rate in force; None where the driver sets the pace."""
    last_error: str = ""
    reads: int = 0
    """Calls of the driver's `read` that returned."""
    rows_read: int = 0
    rows_refused: int = 0
    rows_suppressed: int = 0
    rows_held: int = 0
    rows_out: int = 0
    rows_dropped: int = 0
    ticks_missed: int = 0
    """Readings that were due while the sampler was busy, and were not taken."""
    errors: int = 0
    """Failed opens, failed reads and refused readings."""
    bursts: int = 0
    bursts_cut: int = 0
    last_read_ns: int | None = None
    """Monotonic clock when a read last returned."""
    calling: str = ""
    """What of the driver runs at this moment: `open`, `read`, …; empty between calls."""
    calling_since_ns: int | None = None
    """Monotonic clock when it was called."""

    @property
    def overruns(self) -> int:
        """Readings lost to lack of time or room: missed ticks and dropped rows."""
        return self.ticks_missed + self.rows_dropped
