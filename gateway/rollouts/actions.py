"""What people may do to a rollout. Pure: each answers the events to commit, or refuses with the remedy.

Every action names who and why: both stand in the row.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from contract.errors import ConfigurationError
from gateway.rollouts.machine import event, shown_stage
from lake.releases import ReleaseBook, ReleaseState
from lake.rollout_spec import ROLLOUT_NAME_MAX, Spec, check_spec
from lake.rollouts import ACTIVE, TEXT_MAX, EventKind, Rollout, RolloutBook, RolloutEvent, RolloutRefused, RolloutState

WHO_MAX = 200
Decide = Callable[[RolloutBook], list[RolloutEvent]]


class Person(NamedTuple):
    """Who acts, why, and when."""

    who: str
    why: str
    at_us: int
    """Wall clock, microseconds since 1970-01-01 UTC."""


class Action(StrEnum):
    """What may be done to a rollout that exists."""

    START = "start"
    """A draft."""
    APPROVE = "approve"
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    ROLLBACK = "rollback"


def check_person(who: str, why: str) -> None:
    """Refuse an action that nobody answers for.

    Raises:
        ConfigurationError: naming what is missing.
    """
    if not who.strip() or len(who) > WHO_MAX:
        raise ConfigurationError(f"who = {who[:80]!r} names nobody; say who does this, in at most {WHO_MAX} characters")
    if not why.strip() or len(why) > TEXT_MAX:
        raise ConfigurationError(
            f"why = {why[:80]!r} is no reason; say why (--why) in 1 to {TEXT_MAX:,} characters: it stands in "
            "control/rollouts"
        )


def name_of(spec: Spec, suffix: str) -> str:
    """A rollout's name: model, version, and what makes it unlike any other."""
    tail = f"-{spec.version}-{suffix}"
    return spec.model[: ROLLOUT_NAME_MAX - len(tail)] + tail


def create(name: str, spec: Spec, person: Person, *, draft: bool = False, supersede: bool = False) -> Decide:
    """Create a rollout, and start it.

    Args:
        name: of the rollout, never used before.
        spec: what it does; its release was looked up and is approved.
        person: who, why, when.
        draft: only create it.
        supersede: whether a rollout of the model that is under way is aborted for it; refused otherwise.

    Raises:
        ConfigurationError: the specification cannot work, or nobody answers for it.
        RolloutRefused: when decided: another rollout of the model is under way.
    """
    check_person(person.who, person.why)
    check_spec(spec)

    def decide(book: RolloutBook) -> list[RolloutEvent]:
        if name in book.rollouts:
            return []  # committed by an attempt whose answer was lost
        detail = msgspec.to_builtins(spec)
        created = RolloutEvent(
            person.at_us,
            name,
            spec.model,
            person.who,
            EventKind.CREATED,
            person.why,
            msgspec.json.encode(detail).decode(),
        )
        if draft:
            return [created]
        ended = _make_room(book, spec.model, name, person, supersede=supersede)
        asks = spec.approval or spec.stages[0].approval
        kind = EventKind.APPROVAL_ASKED if asks else EventKind.STARTED
        began = RolloutEvent(person.at_us, name, spec.model, person.who, kind, person.why, '{"stage":0}')
        return [*ended, created, began]

    return decide


def act(
    action: Action,
    name: str,
    person: Person,
    *,
    rollback: bool = False,
    supersede: bool = False,
    releases: ReleaseBook | None = None,
) -> Decide:
    """Do something to a rollout.

    Args:
        action: what.
        name: the rollout.
        person: who, why, when.
        rollback: with `ABORT`: also take the devices back.
        supersede: with `START`: as in `create`.
        releases: the registry as of now, where it is at hand: what devices would refuse is refused here.

    Raises:
        ConfigurationError: nobody answers for it.
        RolloutRefused: when decided: the rollout is not in a state for it, and the message says which it is in; or a
            release that devices would be ordered to run is not approved.
    """
    check_person(person.who, person.why)

    def decide(book: RolloutBook) -> list[RolloutEvent]:
        rollout = book.get(name)

        def one(kind: EventKind, detail: dict[str, Any] | None = None) -> RolloutEvent:
            return event(rollout, kind, person.at_us, person.who, person.why, detail)

        match action:
            case Action.START:
                _require(rollout, action, RolloutState.DRAFT)
                _require_approved(rollout, rollout.spec.version, releases)
                _require_approved(rollout, rollout.spec.previous, releases)
                ended = _make_room(book, rollout.spec.model, name, person, supersede=supersede)
                asks = rollout.needs_approval(0)
                return [*ended, one(EventKind.APPROVAL_ASKED if asks else EventKind.STARTED, {"stage": 0})]
            case Action.APPROVE:
                _require(rollout, action, RolloutState.APPROVAL)
                return [one(EventKind.APPROVED, {"stage": rollout.awaiting})]
            case Action.PAUSE:
                _require(rollout, action, RolloutState.RUNNING)
                return [one(EventKind.PAUSED)]
            case Action.RESUME:
                _require(rollout, action, RolloutState.PAUSED)
                return [one(EventKind.RESUMED)]
            case Action.ABORT:
                _require(rollout, action, RolloutState.DRAFT, *ACTIVE)
                back = [one(EventKind.ROLLED_BACK)] if rollback and rollout.stages else []
                if back:
                    _require_approved(rollout, rollout.spec.previous, releases)
                return [one(EventKind.ABORTED), *back]
            case Action.ROLLBACK:
                _require_approved(rollout, rollout.spec.previous, releases)
                return _rollback(book, rollout, one)

    return decide


def _rollback(book: RolloutBook, rollout: Rollout, one: Callable[[EventKind], RolloutEvent]) -> list[RolloutEvent]:
    _require(rollout, Action.ROLLBACK, RolloutState.SUCCEEDED, RolloutState.ABORTED, *ACTIVE)
    if not rollout.stages:
        raise RolloutRefused("nothing_reached", f"rollout {rollout.name!r} has reached no device; abort it instead")
    for newer in book.of_model(rollout.spec.model):
        if newer.began > rollout.began and newer.state is not RolloutState.ROLLED_BACK:
            raise RolloutRefused(
                "not_latest",
                f"rollout {rollout.name!r} is not the latest of {rollout.spec.model}: {newer.name!r} is "
                f"({newer.state}, by {newer.who}); roll that one back first, or start a rollout of another version",
            )
    aborted = [one(EventKind.ABORTED)] if rollout.state in ACTIVE else []
    return [*aborted, one(EventKind.ROLLED_BACK)]


def _make_room(book: RolloutBook, model: str, name: str, person: Person, *, supersede: bool) -> list[RolloutEvent]:
    """One rollout of a model at a time."""
    other = book.active(model)
    if other is None or other.name == name:
        return []
    if not supersede:
        where = "" if other.stage < 0 else f", stage {other.stage + 1} ({shown_stage(other.spec.stages[other.stage])})"
        raise RolloutRefused(
            "under_way",
            f"rollout {other.name!r} of {model} version {other.spec.version} is {other.state}{where}, started by "
            f"{other.who} ({other.why}); wait for it, abort it, or supersede it with --supersede",
        )
    return [event(other, EventKind.SUPERSEDED, person.at_us, person.who, person.why, {"by": name})]


def _require_approved(rollout: Rollout, version: int | None, releases: ReleaseBook | None) -> None:
    """Devices refuse what is not approved, so it is no use to order it."""
    if releases is None or not version:
        return
    release = releases.releases.get((rollout.spec.model, version))
    if release is None or release.state is not ReleaseState.APPROVED:
        state = "not there" if release is None else release.state
        raise RolloutRefused(
            "not_approved",
            f"rollout {rollout.name!r} names release {rollout.spec.model}@{version}, which is {state}, and devices "
            "refuse what is not approved; start a rollout of one that is, with --supersede where this one is under way",
        )


def _require(rollout: Rollout, action: Action, *states: RolloutState) -> None:
    if rollout.state not in states:
        wanted = ", ".join(sorted(set(states)))
        raise RolloutRefused(
            "wrong_state",
            f"rollout {rollout.name!r} is {rollout.state} since {rollout.changed_by}: {rollout.reason[:200]}; "
            f"{action} needs it to be {wanted}",
        )
