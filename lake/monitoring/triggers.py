"""The table `control/triggers`: requests to learn again, who took them, and what came of it.

    requested ─▶ started ─▶ done | failed
                    │ claim runs out
                    └──▶ started (by another)

A gateway asks, `headwater train watch` does. Both commit by check-and-set: of several gateways that find the same, one
asks; of several trainers one claims. A claim holds until it runs out and is renewed while the training goes on, so the
work of a trainer that was killed is taken over, and what a trainer says that has lost its claim is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from contract.errors import HeadwaterError
from lake.ledger import TIMESTAMP, Ledger, Row, Table

PATH = "control/triggers"
SCHEMA = pa.schema(
    [
        pa.field("at", TIMESTAMP),
        pa.field("trigger", pa.string()),
        pa.field("model", pa.string()),
        pa.field("release", pa.int64()),
        pa.field("kind", pa.string()),
        pa.field("event", pa.string()),
        pa.field("why", pa.string()),
        pa.field("who", pa.string()),
        pa.field("until", TIMESTAMP),
        pa.field("detail", pa.string()),
        pa.field("sequence", pa.int64()),
    ]
)
TEXT_MAX = 2_000
"""Characters of `why`."""
ROWS = "rows"
"""In the `detail` of a request: rows of the stream, which its training will see."""


class TriggerKind(StrEnum):
    """Why to learn again. The values are a contract."""

    DRIFT = "drift"
    VOLUME = "volume"
    SCHEDULE = "schedule"
    MANUAL = "manual"


class TriggerEvent(StrEnum):
    """What a row says. The values are a contract."""

    REQUESTED = "requested"
    STARTED = "started"
    RENEWED = "renewed"
    """The claim of who started holds until `until`."""
    RETURNED = "returned"
    """Something did not answer, or the worker was stopped: it is free again, and the attempt counts for nothing."""
    DONE = "done"
    """`detail` says with which outcome."""
    FAILED = "failed"


class ClaimLost(HeadwaterError):
    """Somebody else has taken the trigger over, or it has ended. Stop: what was done counts for nothing."""


class Trigger(msgspec.Struct, frozen=True, kw_only=True):
    """A trigger as of its latest row."""

    name: str
    model: str
    release: int
    """That is to be replaced."""
    kind: str
    why: str
    event: TriggerEvent
    """RENEWED shows as STARTED, RETURNED as REQUESTED."""
    who: str
    """Of the latest row."""
    at_us: int
    until_us: int = 0
    """End of the claim."""
    claims: int = 0
    """How often it was started and not returned."""
    detail: dict[str, Any] = {}

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.event in (TriggerEvent.REQUESTED, TriggerEvent.STARTED)


class Ended(NamedTuple):
    """The last training of a model, whatever came of it."""

    at_us: int
    """When it ended, by the wall clock of its trainer; 0 for never."""
    rows: int | None
    """Of the stream when the last training was asked for that counted them."""


NEVER = Ended(0, None)


def fold(rows: Iterable[Row]) -> dict[str, Trigger]:
    """The triggers by name, in the order of their requests. A row that does not fit what was before changes nothing."""
    found: dict[str, Trigger] = {}
    known = {event.value: event for event in TriggerEvent}
    for row in rows:
        event, before = known.get(row["event"]), found.get(row["trigger"])
        if event is TriggerEvent.REQUESTED and before is None:
            found[row["trigger"]] = Trigger(
                name=row["trigger"],
                model=row["model"],
                release=row["release"] or 0,
                kind=row["kind"],
                why=row["why"] or "",
                event=event,
                who=row["who"] or "",
                at_us=row["at"],
                detail=_detail(row),
            )
        elif before is not None and event is not None and before.is_open:
            found[row["trigger"]] = _after(before, event, row)
    return found


_SHOWN = {TriggerEvent.RENEWED: TriggerEvent.STARTED, TriggerEvent.RETURNED: TriggerEvent.REQUESTED}


def _after(before: Trigger, event: TriggerEvent, row: Row) -> Trigger:
    return msgspec.structs.replace(
        before,
        event=_SHOWN.get(event, event),
        who=row["who"] or "",
        at_us=row["at"],
        until_us=row["until"] or 0,
        claims=before.claims + (event is TriggerEvent.STARTED) - (event is TriggerEvent.RETURNED),
        detail=before.detail | _detail(row),
    )


def _detail(row: Row) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(row["detail"] or "{}")
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


class TriggerTable:
    """The table as one process sees it. Not thread-safe.

    Args:
        open_table: gives the table, anew when credentials changed.
        who: names the process in the rows; no two processes may have the same.
        now_us: wall clock, microseconds since 1970-01-01 UTC. Claims go by it: clocks of trainers should agree to
            much less than a claim is long.
        on_conflict: called each time that somebody else was first.
    """

    def __init__(
        self,
        open_table: Callable[[], Table],
        who: str,
        now_us: Callable[[], int],
        on_conflict: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger = Ledger(open_table, SCHEMA, on_conflict)
        self._who, self._now_us = who, now_us

    def look(self) -> dict[str, Trigger]:
        """All triggers.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return fold(self._ledger.look())

    def ended(self) -> dict[str, Ended]:
        """How the last training of each model ended that had one.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        found: dict[str, Ended] = {}
        for trigger in self.look().values():
            if not trigger.is_open:
                before = found.get(trigger.model, NEVER)
                rows = trigger.detail.get(ROWS)
                found[trigger.model] = Ended(
                    max(before.at_us, trigger.at_us), rows if isinstance(rows, int) else before.rows
                )
        return found

    def request(
        self, model: str, release: int, kind: TriggerKind, why: str, pause_s: float, rows: int | None = None
    ) -> str | None:
        """Ask for a training, unless one is asked for or under way, or ended less than `pause_s` ago.

        Args:
            model: that is to be trained.
            release: that is to be replaced.
            kind: of the reason.
            why: the reason in words.
            pause_s: since the end of the last training.
            rows: of its stream now, which this training will see; None where nobody counted.

        Returns:
            Name of the trigger; None where there is no need for one.

        Raises:
            CommitConflictError: others were first too often.
            StoreUnavailableError: it is not known whether the row is in; asking again is harmless.
        """
        name = f"{model}-{secrets.token_hex(6)}"
        detail = {} if rows is None else {ROWS: rows}

        def decide(rows: list[Row]) -> list[Row]:
            now_us = self._now_us()
            for trigger in fold(rows).values():
                if trigger.model == model and (trigger.is_open or now_us - trigger.at_us < pause_s * 1e6):
                    return []
            return [
                {
                    "at": now_us,
                    "trigger": name,
                    "model": model,
                    "release": release,
                    "kind": kind.value,
                    "event": TriggerEvent.REQUESTED.value,
                    "why": why[:TEXT_MAX],
                    "who": self._who,
                    "detail": msgspec.json.encode(detail).decode(),
                }
            ]

        return name if self._ledger.act(decide) else None

    def claim(self, model: str, lease_s: float) -> Trigger | None:
        """Take the oldest trigger of a model that nobody works on.

        Returns:
            It, or None where there is none.

        Raises:
            CommitConflictError, StoreUnavailableError: as `request`; of an outcome not known, the claim runs out.
        """
        taken: list[str] = []

        def decide(rows: list[Row]) -> list[Row]:
            taken.clear()
            now_us = self._now_us()
            for trigger in fold(rows).values():
                free = trigger.event is TriggerEvent.REQUESTED or (trigger.is_open and now_us >= trigger.until_us)
                if trigger.model == model and free:
                    taken.append(trigger.name)
                    return [self._row(trigger, TriggerEvent.STARTED, "", lease_s, {})]
            return []

        self._ledger.act(decide)
        return self.look()[taken[0]] if taken else None

    def renew(self, name: str, lease_s: float) -> None:
        """Hold a claim for longer.

        Raises:
            ClaimLost: it is not ours any more.
            CommitConflictError, StoreUnavailableError: as `request`.
        """
        self._mine(name, TriggerEvent.RENEWED, "", lease_s, {})

    def give_back(self, name: str, why: str) -> None:
        """Let others have it, as if it had not been claimed.

        Raises:
            ClaimLost: it is not ours any more.
            CommitConflictError, StoreUnavailableError: as `request`.
        """
        self._mine(name, TriggerEvent.RETURNED, why, 0.0, {})

    def finish(self, name: str, event: TriggerEvent, why: str, detail: dict[str, Any]) -> None:
        """Say what came of it: `DONE` or `FAILED`.

        Raises:
            ClaimLost: it is not ours any more.
            CommitConflictError, StoreUnavailableError: as `request`.
        """
        self._mine(name, event, why, 0.0, detail)

    def _mine(self, name: str, event: TriggerEvent, why: str, lease_s: float, detail: dict[str, Any]) -> None:
        def decide(rows: list[Row]) -> list[Row]:
            trigger = fold(rows).get(name)
            if trigger is None or trigger.event is not TriggerEvent.STARTED or trigger.who != self._who:
                whose = "gone" if trigger is None else f"{trigger.event}, last by {trigger.who}"
                raise ClaimLost(f"trigger {name} is not ours any more ({whose}); leave it to who has it")
            return [self._row(trigger, event, why, lease_s, detail)]

        self._ledger.act(decide)

    def _row(self, trigger: Trigger, event: TriggerEvent, why: str, lease_s: float, detail: dict[str, Any]) -> Row:
        now_us = self._now_us()
        return {
            "at": now_us,
            "trigger": trigger.name,
            "model": trigger.model,
            "release": trigger.release,
            "kind": trigger.kind,
            "event": event.value,
            "why": why[:TEXT_MAX],
            "who": self._who,
            "until": now_us + round(lease_s * 1e6) if lease_s else None,
            "detail": msgspec.json.encode(detail).decode(),
        }
