"""What a device does with an order, as a pure function: a record and an event in, the next record out.

    ASSIGNED ─▶ PRECHECK ─▶ DOWNLOADING ─▶ VERIFIED ─▶ PROBED ─▶ SHADOW ─▶ TRIAL ─▶ COMMITTED
        └───────────┴────────────┴────────────┴───────────┴─────────┴────────┴─▶ REJECTED, FAILED, TIMED_OUT, SUPERSEDED

`work` says what is to be done in a record's state, so an agent that starts again simply does that: there is no other
way to resume. The active release answers all the while; in TRIAL the candidate does, and the active one stands by.

A candidate is loaded only after `Loading` was made durable. `STARTS_MAX` loads without a commit or an orderly stop, and
its hash is denied: the model crashed the agent, or hung it until the watchdog came.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

from msgspec.structs import replace

from contract.models import FINAL_STATES, Assignment, DeviceState, ReportedOrder
from edge_agent.models.orders import Seen
from edge_agent.models.record import DENIED_MAX, Denied, ModelRecord, Release

STARTS_MAX = 2
ACTIVE_STARTS_MAX = 5
"""Loads of a committed release without having scored for a while; power cuts count, so it is more patient."""
ACTIVE_PROVEN_WINDOWS = 20
REASON_CHARS_MAX = 500

_BEFORE_BEGUN = frozenset({DeviceState.ASSIGNED})
_BEFORE_LOADED = frozenset({DeviceState.PRECHECK, DeviceState.DOWNLOADING, DeviceState.VERIFIED, DeviceState.PROBED})
_LOADED = frozenset({DeviceState.SHADOW, DeviceState.TRIAL})


class Job(StrEnum):
    """Work that takes time and is done beside everything else."""

    VERIFY = "verify"
    """Open the order again with the newest keys, and read the manifest."""
    CHECK = "check"
    DOWNLOAD = "download"
    PROBE = "probe"


class Work(NamedTuple):
    """What a record asks for."""

    job: Job | None
    active: Release | None
    """To be loaded; None for the factory's, where there is one."""
    candidate: Release | None
    """To be loaded beside it."""
    front: bool
    """Whether the candidate answers."""


# Events.


@dataclass(frozen=True)
class Ordered:
    """An order was opened: signature, device and date are right."""

    assignment: Assignment
    seen: Seen
    envelope: dict[str, Any]


@dataclass(frozen=True)
class NotOpened:
    """An order was not opened; what it claims is unproven, and only reported.

    Attributes:
        final: False where it is tried again later.
    """

    claimed: Assignment
    why: str
    final: bool


@dataclass(frozen=True)
class Repeated:
    """The order that was opened last came again."""

    sequence: int


@dataclass(frozen=True)
class Verified:
    """The order is right by the newest keys, and its release's manifest is trusted and in the store.

    Attributes:
        release: None with version 0, which has none.
    """

    sequence: int
    release: Release | None


@dataclass(frozen=True)
class Done:
    """A job ended well."""

    sequence: int
    job: Job


@dataclass(frozen=True)
class Later:
    """A job has to be tried again; why."""

    sequence: int
    why: str


@dataclass(frozen=True)
class Ended:
    """A job, or the candidate in use, ended the order: REJECTED or FAILED.

    Attributes:
        passing: REJECTED for a reason that may pass, so the same order may come again.
    """

    sequence: int
    state: DeviceState
    why: str
    passing: bool = False


@dataclass(frozen=True)
class Loading:
    """The candidate is about to be loaded into this process.

    Attributes:
        beside: another release answers, so there is something to compare with.
    """

    sequence: int
    beside: bool


@dataclass(frozen=True)
class Scored:
    """What the candidate did since it was loaded."""

    sequence: int
    shadow: int
    trial: int
    bad: int
    """Of both: failed, or a score that is NaN though nothing in the window is."""
    compared: int
    disagreements: int
    trial_bad: int = 0
    """Of `bad`, those in trial."""


@dataclass(frozen=True)
class Tick:
    """Time goes by.

    Attributes:
        in_state_s: seconds since the order's state was entered, in this process.
    """

    in_state_s: float
    synced: bool


@dataclass(frozen=True)
class ActiveLoading:
    """The active release is about to be loaded into this process."""


@dataclass(frozen=True)
class ActiveProven:
    """The active release has scored for a while."""


@dataclass(frozen=True)
class ActiveBroken:
    """The active release cannot be loaded."""

    why: str


@dataclass(frozen=True)
class Stopping:
    """The process ends in order; what it has loaded did not crash it."""

    active: bool
    candidate: bool


Event: TypeAlias = (
    Ordered
    | NotOpened
    | Repeated
    | Verified
    | Done
    | Later
    | Ended
    | Loading
    | Scored
    | Tick
    | ActiveLoading
    | ActiveProven
    | ActiveBroken
    | Stopping
)


class Change(NamedTuple):
    """A transition, for `headwater.events`."""

    order: ReportedOrder
    was: DeviceState | None


class Step(NamedTuple):
    """What an event led to."""

    record: ModelRecord
    durable: bool
    """Whether the record must be on disk before anything else is done."""
    changes: tuple[Change, ...] = ()


def work(record: ModelRecord) -> Work:
    """What is to be done in a record's state."""
    order = record.order
    state = order.state if order is not None and record.assignment is not None else None
    job = (
        {
            DeviceState.ASSIGNED: Job.VERIFY,
            DeviceState.PRECHECK: Job.CHECK,
            DeviceState.DOWNLOADING: Job.DOWNLOAD,
            DeviceState.VERIFIED: Job.PROBE,
        }.get(state)
        if state is not None
        else None
    )
    wanted = record.candidate if state in _LOADED or state is DeviceState.PROBED else None
    return Work(job, record.active, wanted, state is DeviceState.TRIAL)


def step(record: ModelRecord, event: Event, now_us: int) -> Step:
    """The next record. Events of an order that is no longer followed change nothing.

    Args:
        record: of one model.
        event: what happened.
        now_us: wall clock, microseconds since 1970-01-01 UTC.
    """
    if isinstance(event, Ordered):
        return _ordered(record, event, now_us)
    if isinstance(event, NotOpened):
        return _not_opened(record, event, now_us)
    if isinstance(event, Repeated):
        is_latest = record.seen is not None and record.seen.sequence == event.sequence
        return Step(replace(record, claimed=None) if is_latest else record, False)
    if isinstance(event, ActiveLoading | ActiveProven | ActiveBroken | Stopping):
        return _active(record, event, now_us)
    order, assignment = record.order, record.assignment
    if order is None or assignment is None or order.state in FINAL_STATES:
        return Step(record, False)
    if not isinstance(event, Tick) and event.sequence != assignment.sequence:
        return Step(record, False)
    return _in_progress(record, order, assignment, event, now_us)


def _in_progress(record: ModelRecord, order: ReportedOrder, assignment: Assignment, event: Event, now_us: int) -> Step:
    if isinstance(event, Tick):
        return _tick(record, order, assignment, event, now_us)
    if isinstance(event, Verified) and order.state is DeviceState.ASSIGNED:
        return _verified(record, assignment, event, now_us)
    if isinstance(event, Done):
        return _done(record, order, event, now_us)
    if isinstance(event, Later):
        return Step(replace(record, order=replace(order, reason=_short(event.why))), False)
    if isinstance(event, Ended):
        return _end(record, event.state, event.why, now_us, passing=event.passing)
    if isinstance(event, Loading):
        return _loading(record, order, assignment, event, now_us)
    if isinstance(event, Scored) and order.state in _LOADED:
        return _scored(record, order, assignment, event, now_us)
    return Step(record, False)


# Orders.


def _ordered(record: ModelRecord, event: Ordered, now_us: int) -> Step:
    assignment, seen = event.assignment, record.heard
    if seen is not None and seen.key == event.seen.key and event.seen.sequence <= seen.sequence:
        return Step(record, False)
    changes: tuple[Change, ...] = ()
    old = record.order
    if old is not None and record.assignment is not None and old.state not in FINAL_STATES:
        why = f"order {assignment.sequence} to run version {assignment.version} came first"
        gone = replace(old, state=DeviceState.SUPERSEDED, reason=why, since_us=now_us)
        changes = (Change(gone, old.state),)
    fresh = replace(
        record,
        candidate=None,
        starts=0,
        seen=event.seen,
        envelope=event.envelope,
        assignment=assignment,
        order=_order(assignment, DeviceState.ASSIGNED, "", now_us),
        passing=False,
        claimed=None,
    )
    if _is_so(record.active, assignment):
        final = _enter(fresh, DeviceState.COMMITTED, now_us, "it was so already")
    elif (denial := record.denial(assignment.sha256)) is not None:
        final = _end(
            fresh, DeviceState.REJECTED, f"this device denies the model {assignment.sha256[:12]}: {denial}", now_us
        )
    else:
        assert fresh.order is not None
        return Step(fresh, True, (*changes, Change(fresh.order, None)))
    return Step(final.record, True, (*changes, *(Change(each.order, None) for each in final.changes)))


def _not_opened(record: ModelRecord, event: NotOpened, now_us: int) -> Step:
    """Shown where nothing better is to be shown; what is remembered of the order that was opened last stays."""
    claimed, old = event.claimed, record.shown
    busy = record.order is not None and record.assignment is not None and record.order.state not in FINAL_STATES
    if busy or (record.seen is not None and claimed.sequence <= record.seen.sequence):
        return Step(record, False)
    state = DeviceState.REJECTED if event.final else DeviceState.ASSIGNED
    order = _order(claimed, state, event.why, now_us)
    if old is not None and (old.sequence, old.state, old.reason) == (order.sequence, order.state, order.reason):
        return Step(record, False)
    was = old.state if old is not None and old.sequence == order.sequence else None
    changes = () if was is state else (Change(order, was),)
    return Step(replace(record, claimed=order), False, changes)


# Jobs.


def _verified(record: ModelRecord, assignment: Assignment, event: Verified, now_us: int) -> Step:
    if (event.release is None) != (assignment.version == 0):
        return Step(record, False)
    made = replace(record, candidate=event.release, starts=0)
    return _commit(made, now_us) if event.release is None else _enter(made, DeviceState.PRECHECK, now_us)


_AFTER = {
    (Job.CHECK, DeviceState.PRECHECK): DeviceState.DOWNLOADING,
    (Job.DOWNLOAD, DeviceState.DOWNLOADING): DeviceState.VERIFIED,
    (Job.PROBE, DeviceState.VERIFIED): DeviceState.PROBED,
}


def _done(record: ModelRecord, order: ReportedOrder, event: Done, now_us: int) -> Step:
    after = _AFTER.get((event.job, order.state))
    return Step(record, False) if after is None else _enter(record, after, now_us)


def _loading(record: ModelRecord, order: ReportedOrder, assignment: Assignment, event: Loading, now_us: int) -> Step:
    if order.state is not DeviceState.PROBED and order.state not in _LOADED:
        return Step(record, False)
    candidate = record.candidate
    assert candidate is not None
    if record.starts >= STARTS_MAX:
        why = (
            f"the agent ended {record.starts} times with this model loaded, before it was committed; "
            "release a mended version"
        )
        return _end(_denied(record, candidate.sha256, why), DeviceState.FAILED, why, now_us)
    counted = replace(record, starts=record.starts + 1)
    if order.state in _LOADED:
        return Step(replace(counted, order=replace(order, windows=0, compared=0, disagreements=0)), True)
    has_shadow = assignment.trial.shadow_windows > 0 and event.beside
    return _enter(counted, DeviceState.SHADOW if has_shadow else DeviceState.TRIAL, now_us)


# Shadow and trial.


def _scored(record: ModelRecord, order: ReportedOrder, assignment: Assignment, event: Scored, now_us: int) -> Step:
    trial = assignment.trial
    windows = event.shadow + event.trial
    order = replace(order, windows=windows, compared=event.compared, disagreements=event.disagreements)
    record = replace(record, order=order)
    in_shadow = order.state is DeviceState.SHADOW
    if (event.shadow < trial.shadow_windows) if in_shadow else (event.trial < trial.trial_windows):
        return Step(record, False)
    # The trial's windows also by themselves: many good ones in the shadow would outweigh any number of bad ones.
    judged = ((event.bad, windows), (event.trial_bad, event.trial))
    too_bad = next(((bad, of) for bad, of in judged if bad > trial.nan_share_max * of), None)
    if too_bad is not None:
        why = (
            f"{too_bad[0]} of {too_bad[1]} windows failed or scored NaN, more than a share of {trial.nan_share_max:g}; "
            "look at the model's probe and at this device's readings"
        )
        return _end(record, DeviceState.FAILED, why, now_us)
    if not in_shadow:
        return _commit(record, now_us)
    if event.disagreements > trial.disagreement_share_max * event.compared:
        why = (
            f"its label was another one than the active model's in {event.disagreements} of {event.compared} windows, "
            f"more than a share of {trial.disagreement_share_max:g}; look at both on this device's readings"
        )
        return _end(record, DeviceState.FAILED, why, now_us)
    # Silence would look like agreement: releases of other windows or fields are never compared.
    incomparable = not event.compared and trial.disagreement_share_max < 1
    why = "no window was compared with the active model's: it failed, or takes other windows or fields"
    return _enter(record, DeviceState.TRIAL, now_us, why if incomparable else "")


def _commit(record: ModelRecord, now_us: int) -> Step:
    made = replace(
        record,
        active=record.candidate,
        previous=record.active,
        candidate=None,
        starts=0,
        active_starts=0,
    )
    return _enter(made, DeviceState.COMMITTED, now_us)


def _tick(record: ModelRecord, order: ReportedOrder, assignment: Assignment, event: Tick, now_us: int) -> Step:
    expired = event.synced and now_us > assignment.not_after_us
    waited = f"; last trouble: {order.reason}" if order.reason else ""
    if expired and order.state in _BEFORE_BEGUN:
        why = f"it could not be begun before {assignment.not_after_us} us{waited}; start the rollout again"
        return _end(record, DeviceState.REJECTED, why, now_us, passing=True)
    if expired and order.state in _BEFORE_LOADED:
        why = f"it was in {order.state.value} at {assignment.not_after_us} us, its end{waited}; start the rollout again"
        return _end(record, DeviceState.TIMED_OUT, why, now_us)
    if order.state in _LOADED and event.in_state_s > assignment.trial.timeout_s:
        why = (
            f"{order.windows} windows within {assignment.trial.timeout_s:g} s of {order.state.value} are too few; "
            "does the stream deliver? Else allow more time"
        )
        return _end(record, DeviceState.TIMED_OUT, why, now_us)
    return Step(record, False)


# The active release, and the process.


def _active(record: ModelRecord, event: ActiveLoading | ActiveProven | ActiveBroken | Stopping, now_us: int) -> Step:
    if isinstance(event, Stopping):
        made = replace(
            record,
            starts=max(0, record.starts - 1) if event.candidate else record.starts,
            active_starts=0 if event.active else record.active_starts,
        )
        return Step(made, made != record)
    if record.active is None:
        return Step(record, False)
    if isinstance(event, ActiveProven):
        return Step(replace(record, active_starts=0), record.active_starts > 0)
    if isinstance(event, ActiveLoading):
        if record.active_starts < ACTIVE_STARTS_MAX:
            return Step(replace(record, active_starts=record.active_starts + 1), True)
        why = (
            f"the agent ended {record.active_starts} times soon after it had loaded this model; "
            "release a mended version"
        )
        return _rolled_back(_denied(record, record.active.sha256, why), record.active, why, now_us)
    return _rolled_back(record, record.active, event.why, now_us)


def _rolled_back(record: ModelRecord, broken: Release, why: str, now_us: int) -> Step:
    made = replace(record, active=record.previous, previous=None, active_starts=0)
    order = record.order
    if order is None or order.state is not DeviceState.COMMITTED or not _is(broken, order):
        return Step(made, True)
    return _enter(made, DeviceState.ROLLED_BACK, now_us, why)


# Parts of these.


def _enter(record: ModelRecord, state: DeviceState, now_us: int, reason: str = "") -> Step:
    assert record.order is not None
    order = replace(record.order, state=state, reason=_short(reason), since_us=now_us)
    return Step(replace(record, order=order, claimed=None), True, (Change(order, record.order.state),))


def _end(record: ModelRecord, state: DeviceState, why: str, now_us: int, *, passing: bool = False) -> Step:
    made = replace(record, candidate=None, starts=0, passing=passing and state is DeviceState.REJECTED)
    return _enter(made, state, now_us, why)


def _denied(record: ModelRecord, sha256: str, why: str) -> ModelRecord:
    others = [each for each in record.denied if each.sha256 != sha256]
    return replace(record, denied=(*others, Denied(sha256=sha256, reason=_short(why)))[-DENIED_MAX:])


def _order(assignment: Assignment, state: DeviceState, reason: str, now_us: int) -> ReportedOrder:
    return ReportedOrder(
        version=assignment.version,
        sha256=assignment.sha256,
        sequence=assignment.sequence,
        rollout=assignment.rollout,
        state=state,
        reason=_short(reason),
        since_us=now_us,
    )


def _is_so(active: Release | None, assignment: Assignment) -> bool:
    """Whether what an order asks for is so; version 0 asks that none runs that was ordered."""
    return not assignment.version if active is None else _is(active, assignment)


def _is(release: Release, named: Assignment | ReportedOrder) -> bool:
    return (release.version, release.sha256) == (named.version, named.sha256)


def _short(text: str) -> str:
    return text if len(text) <= REASON_CHARS_MAX else text[: REASON_CHARS_MAX - 1] + "…"
