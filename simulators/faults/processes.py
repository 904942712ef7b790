"""Killing and freezing processes by a schedule that a seed replays."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from contract.errors import ConfigurationError, TemporaryError

PID_WAIT_S = 30.0
POLL_S = 0.05


class Kill(msgspec.Struct, frozen=True, kw_only=True):
    """SIGKILL for one or two processes at the same moment."""

    at_s: float
    """Since the start of the schedule."""
    targets: tuple[str, ...]


class Killed(msgspec.Struct, frozen=True, kw_only=True):
    """One process that was killed."""

    at_s: float
    """Since the start of the schedule, as it really was."""
    target: str
    pid: int


def kill_schedule(
    seed: int, targets: Sequence[str], count: int, duration_s: float, *, pairs_min: int = 2
) -> tuple[Kill, ...]:
    """When to kill whom: pure, and the same for the same arguments.

    Args:
        seed: draws times and targets.
        targets: names; one that is listed twice is killed about twice as often. Every name listed is killed at least
            `count // len(targets)` times.
        count: processes killed in all.
        duration_s: the moments are spread over this time: one in each of as many equal slots as there are moments.
        pairs_min: at so many moments, at least, two different processes are killed at once.

    Returns:
        The moments in order of time.

    Raises:
        ConfigurationError: when the numbers contradict each other.
    """
    if count < 1 or not targets or not duration_s > 0:
        raise ConfigurationError(f"count = {count}, targets = {list(targets)}, duration_s = {duration_s}: all above 0")
    if 2 * pairs_min > count or (pairs_min and len(set(targets)) < 2):
        raise ConfigurationError(
            f"{pairs_min} pairs need {2 * pairs_min} kills and two different targets; "
            f"there are {count} and {sorted(set(targets))}"
        )
    rng = random.Random(f"kill-schedule/{seed}")
    order = _even_order(rng, targets, count)
    groups: list[tuple[str, ...]] = []
    while len(groups) < pairs_min:
        first = order.pop()
        other = next((index for index in range(len(order) - 1, -1, -1) if order[index] != first), None)
        if other is None:
            raise ConfigurationError(f"cannot draw {pairs_min} pairs of different targets out of {list(targets)}")
        groups.append((first, order.pop(other)))
    groups += [(name,) for name in order]
    rng.shuffle(groups)
    slot_s = duration_s / len(groups)
    return tuple(Kill(at_s=(index + rng.random()) * slot_s, targets=names) for index, names in enumerate(groups))


def _even_order(rng: random.Random, targets: Sequence[str], count: int) -> list[str]:
    """`count` names, each round of them shuffled: nobody is spared for long."""
    order: list[str] = []
    while len(order) < count:
        order += rng.sample(list(targets), len(targets))
    return order[:count]


class ProcessFaults:
    """Signals to processes that have names.

    Args:
        pid_of: the process id behind a name at this moment, or None while it has none.
        clock: monotonic seconds.
    """

    def __init__(self, pid_of: Callable[[str], int | None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pid_of = pid_of
        self._clock = clock

    def kill(self, *targets: str, stop: threading.Event | None = None) -> dict[str, int]:
        """SIGKILL to all of them, as close together as it goes; returns the process ids of those that were still there.

        Raises:
            TemporaryError: when one has no process within PID_WAIT_S; none is killed then.
        """
        # All ids first: waiting for the second must not give the first time to come back.
        pids = {target: self._wait(target, stop) for target in targets}
        return {target: pid for target, pid in pids.items() if _send(pid, signal.SIGKILL)}

    @contextmanager
    def frozen(self, target: str) -> Iterator[int]:
        """SIGSTOP to the process, SIGCONT at the end, however it ends; gives the process id."""
        pid = self._wait(target, None)
        _send(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            _send(pid, signal.SIGCONT)

    def run(self, schedule: Sequence[Kill], stop: threading.Event) -> list[Killed]:
        """Carry out a schedule; returns whom it killed. Ends early when `stop` is set.

        Raises:
            TemporaryError: when a target has no process within PID_WAIT_S of its moment.
        """
        began = self._clock()
        killed: list[Killed] = []
        for moment in schedule:
            if stop.wait(max(0.0, began + moment.at_s - self._clock())):
                break
            pids = self.kill(*moment.targets, stop=stop)
            at_s = self._clock() - began
            killed += [Killed(at_s=at_s, target=target, pid=pid) for target, pid in pids.items()]
        return killed

    def _wait(self, target: str, stop: threading.Event | None) -> int:
        stop = stop or threading.Event()
        deadline = self._clock() + PID_WAIT_S
        while (pid := self._pid_of(target)) is None:
            if self._clock() >= deadline or stop.wait(POLL_S):
                raise TemporaryError(f"{target!r} has no process to send a signal to; is it being restarted?")
        return pid


def _send(pid: int, number: signal.Signals) -> bool:
    """Whether there was somebody to receive it."""
    # 0 and negative numbers mean whole groups, 1 is the mother of all.
    if pid <= 1 or pid == os.getpid():
        raise ConfigurationError(f"{number.name} to process {pid} is not what anybody wants")
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        # It ended by itself a moment ago.
        return False
    return True
