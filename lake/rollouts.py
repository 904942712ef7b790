"""The table `control/rollouts`: every step of every rollout as a row, and what they add up to.

A rollout *is* its rows: `fold` gives the state, and nothing else is kept anywhere. Rows are appended with check-and-set
(`lake.tables.ControlTable`), so whoever decided on an older state is refused and must look again. The number of that
check-and-set, `sequence`, rises with every commit; the orders that follow from a row carry it to the devices, which
follow only what is higher than all they have seen.

    DRAFT ─▶ APPROVAL ⇄ RUNNING ⇄ PAUSED          DRAFT, APPROVAL, RUNNING, PAUSED ─▶ ABORTED ─▶ ROLLED_BACK
      └──────────────────▲ └─▶ SUCCEEDED ─▶ ROLLED_BACK
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from contract.errors import HeadwaterError
from lake.errors import UnknownNameError
from lake.ledger import TIMESTAMP, Ledger, Row, Table
from lake.rollout_spec import POINTS, Spec, Stage

PATH = "control/rollouts"
SCHEMA = pa.schema(
    [
        pa.field("at", TIMESTAMP),
        pa.field("rollout", pa.string()),
        pa.field("model", pa.string()),
        pa.field("sequence", pa.int64()),
        pa.field("place", pa.int32()),
        pa.field("who", pa.string()),
        pa.field("event", pa.string()),
        pa.field("why", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
TEXT_MAX = 2_000
"""Characters of `why`."""


class RolloutState(StrEnum):
    """Where a rollout is. The values are a contract: they stand in answers and metrics."""

    DRAFT = "draft"
    APPROVAL = "approval"
    """Waits for a person."""
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    ABORTED = "aborted"
    """Hands out no more orders; devices that have one keep it."""
    ROLLED_BACK = "rolled_back"


ACTIVE = frozenset({RolloutState.APPROVAL, RolloutState.RUNNING, RolloutState.PAUSED})
ENDED = frozenset({RolloutState.SUCCEEDED, RolloutState.ABORTED, RolloutState.ROLLED_BACK})


class EventKind(StrEnum):
    """What a row says. The values are a contract: they stand in the table."""

    CREATED = "created"
    """`detail` is the `Spec`."""
    APPROVAL_ASKED = "approval_asked"
    APPROVED = "approved"
    STARTED = "started"
    STAGE_STARTED = "stage_started"
    """Its `sequence` is that of the orders to the devices that join. With a percentage `detail` has `below`: the
    devices whose point (`gateway.rollouts.selection`) is below it join."""
    BAKING = "baking"
    """Enough devices of the stage have committed."""
    STAGE_PASSED = "stage_passed"
    PAUSED = "paused"
    RESUMED = "resumed"
    SUCCEEDED = "succeeded"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"
    """Aborted, because a newer rollout of the model was started over it."""
    ROLLED_BACK = "rolled_back"
    """Its `sequence` is that of the orders back."""


_FROM: dict[EventKind, frozenset[RolloutState]] = {
    EventKind.APPROVAL_ASKED: frozenset({RolloutState.DRAFT, RolloutState.RUNNING}),
    EventKind.APPROVED: frozenset({RolloutState.APPROVAL}),
    EventKind.STARTED: frozenset({RolloutState.DRAFT}),
    EventKind.STAGE_STARTED: frozenset({RolloutState.RUNNING}),
    EventKind.BAKING: frozenset({RolloutState.RUNNING}),
    EventKind.STAGE_PASSED: frozenset({RolloutState.RUNNING}),
    EventKind.PAUSED: frozenset({RolloutState.RUNNING}),
    EventKind.RESUMED: frozenset({RolloutState.PAUSED}),
    EventKind.SUCCEEDED: frozenset({RolloutState.RUNNING}),
    EventKind.ABORTED: frozenset({RolloutState.DRAFT}) | ACTIVE,
    EventKind.SUPERSEDED: ACTIVE,
    EventKind.ROLLED_BACK: frozenset({RolloutState.SUCCEEDED, RolloutState.ABORTED}),
}
_TO: dict[EventKind, RolloutState] = {
    EventKind.APPROVAL_ASKED: RolloutState.APPROVAL,
    EventKind.APPROVED: RolloutState.RUNNING,
    EventKind.STARTED: RolloutState.RUNNING,
    EventKind.PAUSED: RolloutState.PAUSED,
    EventKind.RESUMED: RolloutState.RUNNING,
    EventKind.SUCCEEDED: RolloutState.SUCCEEDED,
    EventKind.ABORTED: RolloutState.ABORTED,
    EventKind.SUPERSEDED: RolloutState.ABORTED,
    EventKind.ROLLED_BACK: RolloutState.ROLLED_BACK,
}


class RolloutRefused(HeadwaterError):
    """What was asked for does not fit the rollout as it is; the message says why, and what to do.

    Attributes:
        code: the machine-readable reason.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class UnknownRolloutError(RolloutRefused, UnknownNameError):
    """There is no rollout of that name."""


class RolloutEvent(NamedTuple):
    """One row. `sequence` and `place` are given at the commit."""

    at_us: int
    """Wall clock of who wrote it, microseconds since 1970-01-01 UTC."""
    rollout: str
    model: str
    who: str
    event: EventKind
    why: str
    detail: str = "{}"
    """JSON object."""
    sequence: int = 0
    place: int = 0
    """Among the rows of its commit, from 0."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout as of its latest row."""

    name: str
    spec: Spec
    state: RolloutState
    who: str
    """Who created it."""
    why: str
    created_us: int
    changed_us: int
    """When the state was entered, by whom and why: the next two."""
    changed_by: str
    reason: str
    stages: tuple[int, ...] = ()
    """`sequence` of each stage that was reached, in their order."""
    lines: tuple[int, ...] = ()
    """Of each of them, the point below which devices are in it; 0 where it is no percentage."""
    stage_us: int = 0
    """When the latest stage began; time spent paused is added."""
    baking_us: int | None = None
    """When enough devices of the latest stage had committed; likewise."""
    passed: int = 0
    """Stages that were passed."""
    approved: int = -1
    """Number, from 0, of the latest stage that was approved."""
    rollback: int | None = None
    """`sequence` of the orders back."""
    events: int = 1

    @property
    def stage(self) -> int:
        """Number of the latest stage that was reached, from 0; -1 before the first."""
        return len(self.stages) - 1

    @property
    def began(self) -> int:
        """`sequence` of its first orders, 0 before: of two rollouts of a model, the one with the higher is newer."""
        return self.stages[0] if self.stages else 0

    @property
    def latest(self) -> int:
        """`sequence` of its latest orders, 0 before there are any."""
        return self.rollback or max(self.stages, default=0)

    @property
    def awaiting(self) -> int:
        """Number of the stage that waits for approval, where one does."""
        return len(self.stages)

    def needs_approval(self, stage: int) -> bool:
        """Whether a person has yet to approve that this stage begins."""
        asked = self.spec.stages[stage].approval or (stage == 0 and self.spec.approval)
        return asked and self.approved < stage


class RolloutBook(msgspec.Struct, frozen=True):
    """All rollouts as of one `version` of the table."""

    version: int = 0
    rollouts: dict[str, Rollout] = {}
    """By name, in the order of their creation."""

    def get(self, name: str) -> Rollout:
        """A rollout.

        Raises:
            UnknownRolloutError: there is none of that name.
        """
        found = self.rollouts.get(name)
        if found is None:
            raise UnknownRolloutError(
                "unknown_rollout", f"there is no rollout {name[:80]!r}; `headwater rollout status` lists them"
            )
        return found

    def of_model(self, model: str) -> list[Rollout]:
        """The rollouts of a model, the newest first."""
        return [rollout for rollout in reversed(self.rollouts.values()) if rollout.spec.model == model]

    def active(self, model: str) -> Rollout | None:
        """The rollout of a model that is under way, if one is."""
        return next((rollout for rollout in self.of_model(model) if rollout.state in ACTIVE), None)


def fold(events: Iterable[RolloutEvent], version: int = 0) -> RolloutBook:
    """What rows, in any order, add up to. A row that does not fit the state before it changes nothing."""
    rollouts: dict[str, Rollout] = {}
    for event in sorted(events, key=lambda event: (event.sequence, event.place)):
        after = _apply(rollouts.get(event.rollout), event)
        if after is not None:
            rollouts[event.rollout] = after
    return RolloutBook(version, rollouts)


def _apply(before: Rollout | None, event: RolloutEvent) -> Rollout | None:
    if before is None:
        return _created(event) if event.event is EventKind.CREATED else None
    if event.event is EventKind.CREATED or before.state not in _FROM[event.event]:
        return before
    changes: dict[str, Any] = {"events": before.events + 1}
    if event.event in _TO:
        changes |= {
            "state": _TO[event.event],
            "changed_us": event.at_us,
            "changed_by": event.who,
            "reason": event.why,
        }
    match event.event:
        case EventKind.STAGE_STARTED:
            if len(before.stages) >= len(before.spec.stages):
                return before
            changes |= {
                "stages": (*before.stages, event.sequence),
                "lines": (*before.lines, _line(before.spec.stages[len(before.stages)], event.detail)),
                "stage_us": event.at_us,
                "baking_us": None,
            }
        case EventKind.BAKING:
            changes["baking_us"] = event.at_us if before.baking_us is None else before.baking_us
        case EventKind.STAGE_PASSED | EventKind.SUCCEEDED:
            changes["passed"] = len(before.stages)
        case EventKind.APPROVED:
            changes["approved"] = before.awaiting
        case EventKind.RESUMED:
            paused_us = _paused_us(before, event.at_us)
            changes["stage_us"] = before.stage_us + paused_us
            changes["baking_us"] = None if before.baking_us is None else before.baking_us + paused_us
        case EventKind.ROLLED_BACK:
            changes["rollback"] = event.sequence
    return msgspec.structs.replace(before, **changes)


def _paused_us(before: Rollout, until_us: int) -> int:
    """How long a pause was, though people's clocks may be wrong: it began after what the rollout did last.

    Where both ends are earlier than that, one slow clock wrote both, and their difference is right.
    """
    known_us = max(before.stage_us, before.baking_us or 0)
    began_us = max(before.changed_us, known_us) if until_us >= known_us else before.changed_us
    return max(0, until_us - began_us)


class _Begun(msgspec.Struct, frozen=True):
    below: int | None = None


def _line(stage: Stage, detail: str) -> int:
    """Where a stage's devices end, as its row says; rows of old do not, and mean the share of all points."""
    if stage.percent is None:
        return 0
    try:
        below = msgspec.json.decode(detail, type=_Begun).below
    except msgspec.MsgspecError:
        below = None
    return math.ceil(stage.percent * (POINTS / 100)) if below is None else below


def _created(event: RolloutEvent) -> Rollout | None:
    try:
        spec = msgspec.json.decode(event.detail, type=Spec)
    except msgspec.MsgspecError:
        return None  # of a newer release, which alone knows what to do with it
    return Rollout(
        name=event.rollout,
        spec=spec,
        state=RolloutState.DRAFT,
        who=event.who,
        why=event.why,
        created_us=event.at_us,
        changed_us=event.at_us,
        changed_by=event.who,
        reason=event.why,
    )


class RolloutTable:
    """Looks at the rollouts, and adds to them. Not thread-safe.

    Args:
        open_table: gives the table, anew when credentials changed.
        on_conflict: called each time that somebody else was first.
    """

    def __init__(self, open_table: Callable[[], Table], on_conflict: Callable[[], None] = lambda: None) -> None:
        self._ledger = Ledger(open_table, SCHEMA, on_conflict)
        self._rows: list[Row] = []
        self._book = RolloutBook()

    def look(self) -> RolloutBook:
        """The rollouts as of now.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return self._folded(self._ledger.look())

    def history(self) -> list[RolloutEvent]:
        """Every row, the oldest first.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return sorted(events_of(self._ledger.look()), key=lambda event: (event.sequence, event.place))

    def act(self, decide: Callable[[RolloutBook], Sequence[RolloutEvent]]) -> RolloutBook:
        """Look, decide, commit; where somebody else was first, look and decide again.

        Args:
            decide: what to add to the rollouts as they are; may refuse by raising. Called once per attempt.

        Returns:
            The rollouts with what was added.

        Raises:
            CommitConflictError: others were first `lake.ledger.ATTEMPTS_MAX` times.
            StoreUnavailableError: the store did not answer; whether the rows are in is not known: look.
        """
        added = self._ledger.act(lambda rows: rows_of(decide(self._folded(rows))))
        return self.look() if added else self._book

    def _folded(self, rows: list[Row]) -> RolloutBook:
        if rows is not self._rows:
            self._rows, self._book = rows, fold(events_of(rows), self._ledger.version)
        return self._book


def rows_of(events: Iterable[RolloutEvent]) -> list[Row]:
    """Events of one commit as rows of the table, without `sequence`."""
    return [
        {
            "at": event.at_us,
            "rollout": event.rollout,
            "model": event.model,
            "place": place,
            "who": event.who,
            "event": str(event.event),
            "why": event.why,
            "detail": event.detail,
        }
        for place, event in enumerate(events)
    ]


def events_of(rows: Iterable[Row]) -> list[RolloutEvent]:
    """Rows of the table; those that a newer release wrote and this one does not know are left out."""
    known = {kind.value: kind for kind in EventKind}
    return [
        RolloutEvent(
            at_us=row["at"] or 0,
            rollout=row["rollout"],
            model=row["model"] or "",
            who=row["who"] or "",
            event=known[row["event"]],
            why=row["why"] or "",
            detail=row["detail"] or "{}",
            sequence=row["sequence"],
            place=row["place"] or 0,
        )
        for row in rows
        if row["event"] in known and row["rollout"] and row["sequence"]
    ]
