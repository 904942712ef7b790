"""A buffer in memory: for simulators, and for tests that need a buffer but no disk. A killed process loses it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from contract.batches import Clock
from contract.codec import checksum
from contract.limits import DEFAULT_LIMITS, Limits
from contract.names import new_epoch
from edge_agent.buffer.eviction import DEFAULT_CAPS, EvictionLog, Rules
from edge_agent.buffer.port import (
    Appended,
    Eviction,
    Hollow,
    LaneInfo,
    NewBatch,
    Opened,
    OpenedKind,
    Stored,
    StreamCaps,
)
from edge_agent.buffer.thinning import Thinned

_EXHAUSTED = 99


def _timeless() -> Clock:
    return Clock(synced=False, wall_us=0, monotonic_us=0, boot="0" * 32)


@dataclass
class _Held:
    stored: Stored
    body: bytes
    level: int = 0
    """How often it was thinned; `_EXHAUSTED` when thinning gains nothing any more."""


@dataclass
class _Lane:
    stream: str
    epoch: str
    live: bool = True
    last_seq: int = 0
    last_seq_at_open: int = 0
    acked: int = 0
    held: dict[int, _Held] = field(default_factory=dict)
    """By seq, rising."""
    acknowledged: dict[int, _Held] = field(default_factory=dict)
    """The last few that were acknowledged: a real disk may bring them back. By seq, rising."""


class MemoryBuffer:
    """`BatchBuffer` over dictionaries. `reopen` stands for a restart of the process over the same disk."""

    def __init__(
        self,
        caps: Mapping[str, StreamCaps],
        bytes_max: int,
        now: Callable[[], Clock] = _timeless,
        *,
        default_caps: StreamCaps = DEFAULT_CAPS,
        limits: Limits = DEFAULT_LIMITS,
        remembered_acks_max: int = 0,
    ) -> None:
        """Start empty.

        Args:
            caps: caps by stream.
            bytes_max: cap of the whole buffer, bytes of bodies.
            now: the device's clocks; by default time stands still.
            default_caps: caps of streams without their own.
            limits: what one batch may be.
            remembered_acks_max: acknowledged batches of each epoch that `reopen` may bring back.
        """
        self._rules = Rules(caps, bytes_max, default_caps, limits)
        self._now = now
        self._opened_at = now()
        self._remembered_acks_max = remembered_acks_max
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._shelf = _Shelf(self._lanes)
        self._evictions = EvictionLog()
        self._lock = threading.RLock()
        self.opened = Opened(OpenedKind.NEW, "in memory")

    def reopen(self, *, bring_back: int = 0, cloned: bool = False) -> None:
        """What a restart of the process does to a buffer on disk.

        Args:
            bring_back: acknowledged batches of each epoch, the last ones, whose deletion had not reached the disk.
            cloned: whether it is another board that starts with this disk.
        """
        with self._lock:
            for lane in self._lanes.values():
                back = dict(list(lane.acknowledged.items())[-bring_back:]) if bring_back else {}
                lane.held = {**back, **lane.held}
                lane.acknowledged.clear()
                self._shelf.count(lane.stream, sum(held.stored.body_bytes for held in back.values()))
                lane.last_seq_at_open = lane.last_seq
                lane.live = lane.live and not cloned
            self._forget_drained()
            self._opened_at = self._now()
            self._evictions.take()
            self.opened = Opened(OpenedKind.CLONED if cloned else OpenedKind.RESUMED, "in memory")

    def append(self, stream: str, body: bytes, rows: int, clock: Clock) -> Appended:
        """See `BatchBuffer.append`; it is never unavailable."""
        return self.append_many([NewBatch(stream, body, rows, clock)])[0]

    def append_many(self, batches: Sequence[NewBatch]) -> Sequence[Appended]:
        """See `BatchBuffer.append_many`; it is never unavailable."""
        with self._lock:
            return [self._append(batch) for batch in batches]

    def peek(self, stream: str, epoch: str, after_seq: int) -> Stored | None:
        """See `BatchBuffer.peek`."""
        with self._lock:
            held = self._held(stream, epoch)
            if after_seq + 1 in held:
                return held[after_seq + 1].stored
            return next((held[seq].stored for seq in held if seq > after_seq), None)

    def body(self, stream: str, epoch: str, seq: int) -> bytes | None:
        """See `BatchBuffer.body`; memory is believed to be sound."""
        fetched = self.fetch(stream, epoch, seq)
        return fetched[1] if fetched else None

    def fetch(self, stream: str, epoch: str, seq: int) -> tuple[Stored, bytes] | None:
        """See `BatchBuffer.fetch`."""
        with self._lock:
            held = self._held(stream, epoch).get(seq)
            return (held.stored, held.body) if held else None

    def floor(self, stream: str, epoch: str) -> int | None:
        """See `BatchBuffer.floor`."""
        with self._lock:
            return next(iter(self._held(stream, epoch)), None)

    def acknowledge(self, stream: str, epoch: str, seq: int) -> int:
        """See `BatchBuffer.acknowledge`."""
        with self._lock:
            lane = self._lanes.get((stream, epoch))
            if lane is None:
                return 0
            done = [held for number, held in lane.held.items() if number <= seq]
            if done:
                lane.acked = min(seq, lane.last_seq)
            for held in done:
                self._shelf.drop(held.stored)
                if self._remembered_acks_max:
                    lane.acknowledged[held.stored.seq] = held
            while len(lane.acknowledged) > self._remembered_acks_max:
                del lane.acknowledged[next(iter(lane.acknowledged))]
            self._forget_drained()
            return len(done)

    def open_epoch(self, stream: str, *, move_after_seq: int | None = None) -> str:
        """See `BatchBuffer.open_epoch`."""
        with self._lock:
            old = self._live(stream)
            new = _Lane(stream, new_epoch())
            if old is not None:
                old.live = False
                if move_after_seq is not None:
                    self._move(old, new, move_after_seq)
            self._lanes[stream, new.epoch] = new
            self._forget_drained()
            return new.epoch

    def lanes(self) -> Sequence[LaneInfo]:
        """See `BatchBuffer.lanes`."""
        with self._lock:
            shown = [_info(lane) for lane in self._lanes.values() if lane.live or lane.held]
        return sorted(shown, key=lambda info: not info.live)

    def maintain(self) -> None:
        """See `BatchBuffer.maintain`."""
        with self._lock:
            streams = sorted(self._shelf.held_bytes())
            self._rules.expire(self._shelf, streams, self._now(), self._opened_at, self._evictions)
            self._forget_drained()

    def take_evictions(self) -> Sequence[Eviction]:
        """See `BatchBuffer.take_evictions`."""
        with self._lock:
            return self._evictions.take()

    def hollow(self) -> Sequence[Hollow]:
        """See `BatchBuffer.hollow`."""
        with self._lock:
            return [
                Hollow(lane.stream, lane.epoch, lane.last_seq)
                for lane in self._lanes.values()
                if not lane.live and not lane.held
            ]

    def forget(self, stream: str, epoch: str) -> None:
        """See `BatchBuffer.forget`."""
        with self._lock:
            lane = self._lanes.get((stream, epoch))
            if lane is not None and not lane.live and not lane.held:
                del self._lanes[stream, epoch]

    def close(self) -> None:
        """Nothing to close."""

    def _append(self, new: NewBatch) -> Appended:
        log = EvictionLog()
        size = len(new.body)
        self._rules.expire(self._shelf, [new.stream], self._now(), self._opened_at, log)
        room = self._rules.make_room(self._shelf, new.stream, size, log)
        lane = self._live(new.stream)
        if lane is None:
            lane = _Lane(new.stream, new_epoch())
            self._lanes[lane.stream, lane.epoch] = lane
        lane.last_seq += 1
        seq = lane.last_seq
        if room:
            stored = Stored(lane.stream, lane.epoch, seq, new.rows, size, new.clock, checksum(new.body))
            lane.held[seq] = _Held(stored, new.body)
            self._shelf.count(lane.stream, size)
        else:
            cause = self._rules.refusal(new.stream, size)
            log.note(Eviction(lane.stream, lane.epoch, seq, seq, new.rows, cause))
        self._forget_drained()
        return Appended(lane.epoch, seq, room, log.take())

    def _held(self, stream: str, epoch: str) -> dict[int, _Held]:
        lane = self._lanes.get((stream, epoch))
        return lane.held if lane else {}

    def _live(self, stream: str) -> _Lane | None:
        return next((lane for lane in self._lanes.values() if lane.live and lane.stream == stream), None)

    def _move(self, old: _Lane, new: _Lane, after_seq: int) -> None:
        for seq in [seq for seq in old.held if seq > after_seq]:
            held = old.held.pop(seq)
            number = seq - after_seq
            held.stored = held.stored._replace(epoch=new.epoch, seq=number)
            new.held[number] = held
        new.last_seq = max(0, old.last_seq - after_seq)
        old.last_seq = min(old.last_seq, after_seq)
        old.acknowledged = {seq: held for seq, held in old.acknowledged.items() if seq <= after_seq}

    def _forget_drained(self) -> None:
        for key, lane in list(self._lanes.items()):
            if not lane.live and not lane.held and lane.acked >= lane.last_seq:
                del self._lanes[key]


class _Shelf:
    """The lanes as the rules see them, and the bytes by stream, counted once instead of at every append."""

    def __init__(self, lanes: dict[tuple[str, str], _Lane]) -> None:
        self._lanes = lanes
        self._bytes: Counter[str] = Counter()

    def count(self, stream: str, size: int) -> None:
        self._bytes[stream] += size

    def held_bytes(self) -> Mapping[str, int]:
        return self._bytes

    def oldest(self, stream: str) -> Stored | None:
        return next((held.stored for held in self._of(stream)), None)

    def newest(self, stream: str) -> Stored | None:
        lanes = [lane for lane in self._lanes.values() if lane.stream == stream and lane.held]
        return lanes[-1].held[next(reversed(lanes[-1].held))].stored if lanes else None

    def thinnable(self, stream: str) -> Stored | None:
        candidates = [held for held in self._of(stream) if held.level < _EXHAUSTED]
        return min(candidates, key=lambda held: held.level).stored if candidates else None

    def body_of(self, batch: Stored) -> bytes:
        return self._lanes[batch.stream, batch.epoch].held[batch.seq].body

    def replace(self, batch: Stored, thinned: Thinned | None) -> None:
        held = self._lanes[batch.stream, batch.epoch].held[batch.seq]
        if thinned is None:
            held.level = _EXHAUSTED
            return
        held.level += 1
        held.body = thinned.body
        held.stored = batch._replace(rows=thinned.rows, body_bytes=len(thinned.body), crc32=checksum(thinned.body))
        self._bytes[batch.stream] += len(thinned.body) - batch.body_bytes

    def drop(self, batch: Stored) -> None:
        del self._lanes[batch.stream, batch.epoch].held[batch.seq]
        self._bytes[batch.stream] -= batch.body_bytes

    def _of(self, stream: str) -> Iterator[_Held]:
        return (held for lane in self._lanes.values() if lane.stream == stream for held in lane.held.values())


def _info(lane: _Lane) -> LaneInfo:
    held = [item.stored for item in lane.held.values()]
    return LaneInfo(
        lane.stream,
        lane.epoch,
        lane.live,
        lane.last_seq,
        lane.last_seq_at_open,
        held[0].seq if held else None,
        len(held),
        sum(stored.rows for stored in held),
        sum(stored.body_bytes for stored in held),
        held[0].clock.wall_us if held else None,
    )
