"""What to do with one child process, as a pure function of its state, an event and the time.

::

    STOPPED ──Start──> STARTING ──probe ok──> READY
                        ^   │ exited, too late    │ exited, hung, broken
                        │   v                     v
                        └── BACKOFF <─────────────┘        after too many starts that never became READY: FAILED
    any ──Stop──> STOPPING (SIGTERM, deadline, SIGKILL) ──exited──> STOPPED

`step` returns the new state and what the shell (`supervisor`) has to do. Nothing here knows a process, a clock or a
thread, so every path is a table row in a test.
"""

from __future__ import annotations

import signal
from enum import StrEnum
from typing import NamedTuple

import msgspec

from contract.errors import ConfigurationError


class State(StrEnum):
    """Where a child stands."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    FAILED = "failed"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How patient to be with a child."""

    ready_timeout_s: float = 30.0
    """A start that takes longer is ended with SIGKILL and counts as failed."""
    ready_interval_s: float = 0.1
    """Between two readiness probes."""
    alive_interval_s: float | None = None
    """Between two probes of a child that is READY; None asks never."""
    alive_failures_max: int = 3
    """So many failed probes in a row end a READY child with SIGKILL: it hangs."""
    backoff_min_s: float = 0.2
    backoff_max_s: float = 10.0
    """The pause before a restart: doubles with every death in a row, between these, and is then shortened by up to a
    half at random, so that children that fell together do not come back together."""
    stable_after_s: float = 10.0
    """READY for so long, and the next death is the first again."""
    starts_failed_max: int = 8
    """So many starts in a row that never became READY, and the child is FAILED: a person has to look. A child that was
    READY and died is always started again."""
    stop_timeout_s: float = 10.0
    """Between SIGTERM and SIGKILL."""

    def __post_init__(self) -> None:
        """Refuse what could spin or wait for ever."""
        if not 0 < self.backoff_min_s <= self.backoff_max_s:
            raise ConfigurationError(
                f"backoff_min_s = {self.backoff_min_s} and backoff_max_s = {self.backoff_max_s}: "
                "choose 0 < backoff_min_s <= backoff_max_s"
            )
        for name in (
            "ready_timeout_s",
            "ready_interval_s",
            "stop_timeout_s",
            "starts_failed_max",
            "alive_failures_max",
        ):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} = {getattr(self, name)}: choose a number above 0")
        if self.alive_interval_s is not None and not self.alive_interval_s > 0:
            raise ConfigurationError(f"alive_interval_s = {self.alive_interval_s}: choose a number above 0, or none")


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is remembered about one child. Times are the caller's monotonic seconds."""

    state: State = State.STOPPED
    pid: int | None = None
    since_s: float = 0.0
    """When `state` was entered."""
    due_s: float | None = None
    """When the next probe or start is due."""
    deadline_s: float | None = None
    """When patience ends: of a start, or of a stop."""
    probing: bool = False
    again: bool = False
    """A start was asked for while the child was stopping."""
    ended: bool = False
    """SIGKILL is on its way."""
    deaths: int = 0
    """Unexpected ends in a row; what the backoff grows with."""
    starts_failed: int = 0
    alive_failures: int = 0
    restarts_total: int = 0
    last_exit: str = ""
    """How the last process ended: `exit 1`, `SIGKILL`, `could not be started: …`."""
    trouble: str = ""
    """Why the child is not READY, or why it was ended; for people."""

    @property
    def wakes_at_s(self) -> float | None:
        """When `Tick` should come next, or None when only an event can change anything."""
        times = [time for time in (None if self.probing else self.due_s, self.deadline_s) if time is not None]
        return min(times, default=None)


class Start(NamedTuple):
    """Someone wants the child to run."""


class Stop(NamedTuple):
    """Someone wants the child gone."""


class Spawned(NamedTuple):
    """The process exists."""

    pid: int


class SpawnFailed(NamedTuple):
    """The process could not be made."""

    reason: str


class Probed(NamedTuple):
    """A probe answered; `reason` is empty when all is well. `pid` tells whom it asked."""

    pid: int
    reason: str


class Broken(NamedTuple):
    """The child showed that it is beyond repair, though it still runs."""

    pid: int
    reason: str


class Exited(NamedTuple):
    """The process ended. `code` as in `subprocess`: negative for a signal."""

    pid: int
    code: int


class Tick(NamedTuple):
    """Time passed."""


Event = Start | Stop | Spawned | SpawnFailed | Probed | Broken | Exited | Tick


class Spawn(NamedTuple):
    """Make the process, then feed `Spawned` or `SpawnFailed`."""


class Probe(NamedTuple):
    """Ask process `pid` whether it is well, then feed `Probed`."""

    pid: int


class Terminate(NamedTuple):
    """Send SIGTERM to the process."""

    pid: int


class Kill(NamedTuple):
    """Send SIGKILL to the process and all of its group."""

    pid: int


Action = Spawn | Probe | Terminate | Kill
Step = tuple[Life, tuple[Action, ...]]


def backoff_s(deaths: int, policy: Policy, jitter: float) -> float:
    """The pause before the restart after so many deaths in a row; `jitter` in [0, 1) shortens it by up to a half."""
    longest = min(policy.backoff_max_s, policy.backoff_min_s * 2.0 ** min(deaths - 1, 30))
    return longest * (1.0 - 0.5 * jitter)


def exit_text(code: int) -> str:
    """`exit 1` or `SIGKILL`: how a process ended, for people."""
    if code >= 0:
        return f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def step(life: Life, event: Event, now_s: float, policy: Policy, jitter: float) -> Step:
    """One event, one new state, and what has to be done about it.

    Args:
        life: what is known.
        event: what happened.
        now_s: monotonic seconds.
        policy: how patient to be.
        jitter: a random number in [0, 1).
    """
    match event:
        case Start():
            return _start(life, now_s)
        case Stop():
            return _stop(life, now_s, policy)
        case Spawned(pid):
            return msgspec.structs.replace(
                life, pid=pid, due_s=now_s, deadline_s=now_s + policy.ready_timeout_s, ended=False, probing=False
            ), ()
        case SpawnFailed(reason):
            text = f"could not be started: {reason}"
            return _fallen(life, text, text, now_s, policy, jitter), ()
        case Probed(pid, reason) if pid == life.pid:
            return _probed(life, reason, now_s, policy)
        case Broken(pid, reason) if pid == life.pid and life.state in (State.STARTING, State.READY):
            return _end(life, reason)
        case Exited(pid, code) if pid == life.pid:
            return _exited(life, exit_text(code), now_s, policy, jitter)
        case Tick():
            return _tick(life, now_s)
    # What is left speaks of a process that is no longer this child's: an answer that came too late.
    return life, ()


def _start(life: Life, now_s: float) -> Step:
    if life.state in (State.STOPPED, State.FAILED):
        fresh = msgspec.structs.replace(life, deaths=0, starts_failed=0, trouble="")
        return _enter(fresh, State.STARTING, now_s), (Spawn(),)
    if life.state is State.STOPPING:
        return msgspec.structs.replace(life, again=True), ()
    return life, ()


def _stop(life: Life, now_s: float, policy: Policy) -> Step:
    if life.state in (State.STARTING, State.READY) and life.pid is not None:
        stopping = _enter(life, State.STOPPING, now_s)
        return msgspec.structs.replace(stopping, deadline_s=now_s + policy.stop_timeout_s), (Terminate(life.pid),)
    if life.state is State.STOPPING:
        return msgspec.structs.replace(life, again=False), ()
    return _enter(life, State.STOPPED, now_s), ()


def _probed(life: Life, reason: str, now_s: float, policy: Policy) -> Step:
    life = msgspec.structs.replace(life, probing=False)
    if life.ended:
        return life, ()
    if life.state is State.STARTING:
        if reason:
            return msgspec.structs.replace(life, trouble=reason, due_s=now_s + policy.ready_interval_s), ()
        ready = _enter(life, State.READY, now_s)
        return msgspec.structs.replace(ready, trouble="", starts_failed=0, due_s=_next(now_s, policy)), ()
    if life.state is State.READY:
        life = msgspec.structs.replace(life, due_s=_next(now_s, policy))
        if not reason:
            return msgspec.structs.replace(life, trouble="", alive_failures=0), ()
        life = msgspec.structs.replace(life, trouble=reason, alive_failures=life.alive_failures + 1)
        if life.alive_failures >= policy.alive_failures_max:
            return _end(life, f"did not answer {life.alive_failures} times: {reason}")
    return life, ()


def _exited(life: Life, text: str, now_s: float, policy: Policy, jitter: float) -> Step:
    if life.state is State.STOPPING:
        stopped = msgspec.structs.replace(_enter(life, State.STOPPED, now_s), last_exit=text, trouble="")
        return _start(stopped, now_s) if life.again else (stopped, ())
    # Why it was ended tells more than the SIGKILL that ended it.
    trouble = life.trouble if life.ended else f"ended by itself: {text}"
    return _fallen(life, text, trouble, now_s, policy, jitter), ()


def _fallen(life: Life, last_exit: str, trouble: str, now_s: float, policy: Policy, jitter: float) -> Life:
    """After an unexpected end: wait and start again, or give up."""
    stable = life.state is State.READY and now_s - life.since_s >= policy.stable_after_s
    deaths = 1 if stable else life.deaths + 1
    starts_failed = life.starts_failed + (life.state is State.STARTING)
    state = State.FAILED if starts_failed >= policy.starts_failed_max else State.BACKOFF
    fallen = msgspec.structs.replace(
        _enter(life, state, now_s), deaths=deaths, starts_failed=starts_failed, last_exit=last_exit, trouble=trouble
    )
    if state is State.FAILED:
        return fallen
    return msgspec.structs.replace(fallen, due_s=now_s + backoff_s(deaths, policy, jitter))


def _tick(life: Life, now_s: float) -> Step:
    due = life.due_s is not None and now_s >= life.due_s
    late = life.deadline_s is not None and now_s >= life.deadline_s
    if life.state is State.BACKOFF and due:
        starting = _enter(life, State.STARTING, now_s)
        return msgspec.structs.replace(starting, restarts_total=life.restarts_total + 1), (Spawn(),)
    if life.state is State.STARTING and late:
        return _end(life, f"not ready in time: {life.trouble or 'no answer'}")
    if life.state is State.STOPPING and late:
        return _end(life, "did not stop in time")
    if life.state in (State.STARTING, State.READY) and due and not life.probing and life.pid is not None:
        return msgspec.structs.replace(life, probing=True), (Probe(life.pid),)
    return life, ()


def _end(life: Life, reason: str) -> Step:
    """Send SIGKILL, once; what follows is decided when the process is gone."""
    if life.ended or life.pid is None:
        return life, ()
    ended = msgspec.structs.replace(life, ended=True, due_s=None, deadline_s=None, trouble=reason)
    return ended, (Kill(life.pid),)


def _enter(life: Life, state: State, now_s: float) -> Life:
    """A new state, with the timers and counters of the old one gone."""
    gone = state in (State.STOPPED, State.BACKOFF, State.FAILED)
    return msgspec.structs.replace(
        life,
        state=state,
        since_s=now_s,
        pid=None if gone else life.pid,
        due_s=None,
        deadline_s=None,
        probing=False,
        again=False,
        ended=False if gone else life.ended,
        alive_failures=0,
    )


def _next(now_s: float, policy: Policy) -> float | None:
    return None if policy.alive_interval_s is None else now_s + policy.alive_interval_s
