"""What happened to the agent, as rows of the reserved stream `headwater.events`: bounded, and summed up in storms.

Kinds and the members of `detail` (JSON) are listed in `docs/agent.md`; queries in the lake rely on them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias

import msgspec
import pyarrow as pa

from contract.batches import TS_TYPE
from contract.names import TS

SCHEMA = pa.schema(
    [
        pa.field(TS, TS_TYPE, nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("stream", pa.string()),
        pa.field("epoch", pa.string()),
        pa.field("first_seq", pa.int64()),
        pa.field("last_seq", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
"""`ts`: device clock when it happened first. `detail`: a JSON object."""

HOLD_S = 60.0
"""Events of one kind, stream, epoch and cause: the first at once, those of the next minute summed up in one."""
OPEN_KEYS_MAX = 256
"""Different kinds, streams and so on that are told apart at a time; beyond, only the kind is."""
DETAIL_CHARS_MAX = 2_000

Scalar: TypeAlias = str | int | float | bool | None


class Kind(StrEnum):
    """What can happen. The values are a contract: they stand in the lake."""

    AGENT_STARTED = "agent_started"
    AGENT_STOPPED = "agent_stopped"
    BUFFER_OPENED = "buffer_opened"
    """A new, cloned or replaced buffer."""
    BUFFER_RESTORED = "buffer_restored"
    """The lake knew more of an epoch than the buffer: fresh batches moved to a new epoch."""
    EPOCH_OPENED = "epoch_opened"
    EPOCH_CLOSED = "epoch_closed"
    """A closed epoch is over, and its last batches, up to `last_seq`, were given up. The lake's `gaps` reads it."""
    EVICTED = "evicted"
    DROPPED = "dropped"
    """Rows lost before the buffer accepted them."""
    BUFFER_UNAVAILABLE = "buffer_unavailable"
    OVERRUN = "overrun"
    SENSOR_FAILED = "sensor_failed"
    CLOCK_SYNCED = "clock_synced"
    CLOCK_LOST_SYNC = "clock_lost_sync"
    CLOCK_JUMPED = "clock_jumped"
    TAKEN_OVER = "taken_over"
    PUBLISH_REFUSED = "publish_refused"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    CONFIG_APPLIED = "config_applied"
    CONFIG_REFUSED = "config_refused"
    MODEL_STATE = "model_state"
    """A device's state with a release, or what befell its store; `detail.cause` tells each from the others."""


@dataclass(frozen=True)
class Event:
    """One thing that happened, or several alike summed up."""

    kind: Kind
    stream: str | None = None
    epoch: str | None = None
    first_seq: int | None = None
    last_seq: int | None = None
    rows: int | None = None
    detail: Mapping[str, Scalar] = field(default_factory=dict)
    at_us: int = 0
    """Device clock; filled in by `EventLog.report`."""
    count: int = 1


_Key: TypeAlias = tuple[Kind, str | None, str | None, Scalar]


@dataclass
class _Window:
    until_s: float
    waiting: Event | None = None


class EventLog:
    """Collects events from any thread; `take` gives those that are due. Holds at most two per open key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: list[Event] = []
        self._windows: dict[_Key, _Window] = {}

    def report(self, event: Event, at_us: int, now_s: float) -> None:
        """Note an event.

        Args:
            event: what happened.
            at_us: device clock, microseconds since 1970-01-01 UTC.
            now_s: monotonic seconds.
        """
        event = replace(event, at_us=at_us)
        with self._lock:
            key = self._key(event)
            window = self._windows.get(key)
            if window is None:
                self._windows[key] = _Window(now_s + HOLD_S)
                self._due.append(event)
            else:
                window.waiting = event if window.waiting is None else _summed(window.waiting, event)

    def take(self, now_s: float, *, all_of_them: bool = False) -> Sequence[Event]:
        """Events that are due now, oldest first; each is given once.

        Args:
            now_s: monotonic seconds.
            all_of_them: also those that wait to be summed up, because the agent stops.
        """
        with self._lock:
            due, self._due = self._due, []
            for key, window in list(self._windows.items()):
                if now_s < window.until_s and not all_of_them:
                    continue
                if window.waiting is None:
                    del self._windows[key]
                else:
                    due.append(window.waiting)
                    window.waiting, window.until_s = None, now_s + HOLD_S
        return due

    def _key(self, event: Event) -> _Key:
        key = (event.kind, event.stream, event.epoch, event.detail.get("cause"))
        if key in self._windows or len(self._windows) < OPEN_KEYS_MAX:
            return key
        return (event.kind, None, None, None)


def to_batch(events: Sequence[Event]) -> pa.RecordBatch:
    """Events as rows of `SCHEMA`."""
    columns = [
        pa.array([event.at_us for event in events], pa.int64()).view(TS_TYPE),
        pa.array([event.kind.value for event in events], pa.string()),
        pa.array([event.stream for event in events], pa.string()),
        pa.array([event.epoch for event in events], pa.string()),
        pa.array([event.first_seq for event in events], pa.int64()),
        pa.array([event.last_seq for event in events], pa.int64()),
        pa.array([event.rows for event in events], pa.int64()),
        pa.array([_detail(event) for event in events], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _summed(first: Event, later: Event) -> Event:
    """Two events alike as one: the range of both, the sum of their rows, the later one's detail."""
    same_epoch = first.epoch == later.epoch and first.stream == later.stream
    return Event(
        later.kind,
        later.stream if first.stream == later.stream else None,
        later.epoch if same_epoch else None,
        _least(first.first_seq, later.first_seq) if same_epoch else None,
        _greatest(first.last_seq, later.last_seq) if same_epoch else None,
        (first.rows or 0) + (later.rows or 0) if (first.rows, later.rows) != (None, None) else None,
        later.detail,
        first.at_us,
        first.count + later.count,
    )


def _detail(event: Event) -> str:
    detail = dict(event.detail)
    if event.count > 1:
        detail["events"] = event.count
    text = msgspec.json.encode(detail).decode()
    if len(text) > DETAIL_CHARS_MAX:
        short = {name: value[:200] if isinstance(value, str) else value for name, value in list(detail.items())[:20]}
        text = msgspec.json.encode(short).decode()
    return text


def _least(a: int | None, b: int | None) -> int | None:
    return min((value for value in (a, b) if value is not None), default=None)


def _greatest(a: int | None, b: int | None) -> int | None:
    return max((value for value in (a, b) if value is not None), default=None)
