"""The device's clocks: wall, since boot, the boot's id; whether the wall clock is synchronised, and its jumps.

Boards without a battery-backed clock start in 1970 or in the past, until NTP reaches them. Readings are stamped with
what the clock says; each batch carries a `Clock`, so that its rows can be placed in time afterwards.
"""

from __future__ import annotations

import ctypes
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from contract.batches import Clock
from contract.errors import ConfigurationError

BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")
TIMESYNC_PATH = Path("/run/systemd/timesync/synchronized")
"""systemd-timesyncd touches it when it has set the clock."""
JUMP_US_MIN = 500_000
"""A smaller step of the wall clock against time since boot is slewing or scheduling, not a jump."""

_STA_UNSYNC = 0x0040  # linux/timex.h
_TIME_ERROR = 5


class _Timex(ctypes.Structure):
    """The beginning of `struct timex` (adjtimex(2)), with room for the rest, whatever its length."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def kernel_says_synced() -> bool:
    """Whether the kernel holds its clock to be synchronised: adjtimex(2), read only.

    False also where the kernel cannot be asked (another libc, a forbidden system call): unknown is not synchronised.
    """
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return False
    answer = _Timex()
    state = adjtimex(ctypes.byref(answer))
    return 0 <= state < _TIME_ERROR and not answer.status & _STA_UNSYNC


def clock_is_synced() -> bool:
    """Whether kernel or systemd-timesyncd say that the wall clock is right."""
    return kernel_says_synced() or TIMESYNC_PATH.exists()


def read_boot_id(path: Path = BOOT_ID_PATH) -> str:
    """The id of this boot, 32 hexadecimal digits.

    Raises:
        ConfigurationError: the kernel does not give one.
    """
    try:
        return uuid.UUID(path.read_text().strip()).hex
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} does not give the id of this boot ({error}); the agent needs Linux with /proc mounted"
        ) from error


class DeviceClock:
    """The clocks of this machine. Safe to use from several threads.

    Args:
        boot: id of this boot, 32 hexadecimal digits.
        synced: asks whether the wall clock is synchronised; called at most once in `synced_for_s`.
        wall_ns, boottime_ns, monotonic_ns: the clocks themselves, nanoseconds.
    """

    synced_for_s = 1.0

    def __init__(
        self,
        boot: str,
        synced: Callable[[], bool] = clock_is_synced,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        boottime_ns: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.boot = boot
        self._ask, self._wall_ns, self._boottime_ns, self._monotonic_ns = synced, wall_ns, boottime_ns, monotonic_ns
        self._synced = synced()
        self._asked_ns = monotonic_ns()

    def wall_us(self) -> int:
        """Device clock, microseconds since 1970-01-01 UTC; may jump."""
        return self._wall_ns() // 1000

    def monotonic_ns(self) -> int:
        """A clock that never goes back, for intervals and deadlines, nanoseconds since an arbitrary moment."""
        return self._monotonic_ns()

    def monotonic_s(self) -> float:
        """`monotonic_ns` in seconds."""
        return self._monotonic_ns() / 1e9

    def synced(self) -> bool:
        """Whether the wall clock is synchronised; the answer is at most a second old."""
        now_ns = self._monotonic_ns()
        if now_ns - self._asked_ns >= self.synced_for_s * 1e9:
            self._synced, self._asked_ns = self._ask(), now_ns
        return self._synced

    def read(self) -> Clock:
        """What a batch that is closed now carries. Its monotonic reading also counts time asleep (CLOCK_BOOTTIME)."""
        return Clock(self.synced(), self.wall_us(), self._boottime_ns() // 1000, self.boot)


class ClockChange(NamedTuple):
    """Something happened to the wall clock."""

    kind: str
    """`clock_synced`, `clock_lost_sync` or `clock_jumped`."""
    clock: Clock
    """The clocks right after it."""
    jump_us: int
    """How far the wall clock moved against time since boot, since the last look; signed."""


class ClockWatch:
    """Notices by comparing readings when the clock becomes right and when it jumps. Pure."""

    def __init__(self, first: Clock) -> None:
        self._last = first

    def look(self, now: Clock) -> list[ClockChange]:
        """What changed since the last look; call it about once a second."""
        last, self._last = self._last, now
        jump_us = (now.wall_us - last.wall_us) - (now.monotonic_us - last.monotonic_us)
        changes = []
        if now.synced != last.synced:
            changes.append(ClockChange("clock_synced" if now.synced else "clock_lost_sync", now, jump_us))
        if abs(jump_us) >= JUMP_US_MIN:
            changes.append(ClockChange("clock_jumped", now, jump_us))
        return changes
