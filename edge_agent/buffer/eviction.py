"""What gives way when the buffer is full, or a batch is too old: the rules, apart from how batches are stored.

1. A batch that alone is larger than its stream's part, or than the whole buffer, is let go at once; nothing else is.
2. A stream over its `bytes_max` gives way by its own policy until the new batch fits.
3. When the whole buffer is over its `bytes_max`, the stream gives way, by its own policy, whose bytes are the largest
   fraction of its own `bytes_max` (the new batch counted in); then the next, until the new batch fits. The parts may
   add up to more than the whole: then they are shares.
4. Policies. `drop_oldest`: the batch stored first goes. `drop_newest`: the batch stored last goes, which is usually
   the one that is just coming in. `thin`: of the batches thinned least often the oldest is thinned; when none can be
   thinned any more, the oldest goes. The one coming in is never thinned.
5. A batch older than its stream's `age_max_s` goes, whatever the policy.

Every number once given stays used, so what gave way is a hole in the lake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from contract.batches import Clock
from contract.limits import Limits
from edge_agent.buffer.port import Eviction, Stored, StreamCaps, WhenFull
from edge_agent.buffer.thinning import Thinned, thin_body

DEFAULT_CAPS = StreamCaps(bytes_max=64 * 1024 * 1024, age_max_s=30 * 86_400.0)
"""For streams that have no caps of their own."""
EXPIRED_BATCHES_MAX = 1_000
"""Batches given up by age in one step, so that one step stays short."""


class Shelf(Protocol):
    """The held batches as the rules see them, streams with all their epochs, the oldest epoch first."""

    def held_bytes(self) -> Mapping[str, int]:
        """Bytes of held bodies by stream."""

    def oldest(self, stream: str) -> Stored | None:
        """The batch that was stored first."""

    def newest(self, stream: str) -> Stored | None:
        """The batch that was stored last."""

    def thinnable(self, stream: str) -> Stored | None:
        """Among the batches thinned least often, and not known to be exhausted, the oldest."""

    def body_of(self, batch: Stored) -> bytes:
        """Its body."""

    def replace(self, batch: Stored, thinned: Thinned | None) -> None:
        """Put the thinned body in its place; None marks it as exhausted."""

    def drop(self, batch: Stored) -> None:
        """Delete it; its seq stays used."""


class Rules:
    """The rules with their numbers."""

    def __init__(
        self, caps: Mapping[str, StreamCaps], bytes_max: int, default_caps: StreamCaps, limits: Limits
    ) -> None:
        """Args: caps by stream, the cap of the whole buffer in bytes of bodies, caps of streams without their own."""
        self._caps = dict(caps)
        self._bytes_max = bytes_max
        self._default_caps = default_caps
        self._limits = limits

    def make_room(self, shelf: Shelf, stream: str, size: int, evictions: EvictionLog) -> bool:
        """Make room for a batch of `size` bytes that is coming in; False where it is itself what gives way.

        Of a batch that gives way itself nothing is noted in `evictions`: it has no number yet.
        """
        caps = self._caps_of(stream)
        if size > min(caps.bytes_max, self._bytes_max):
            return False
        while shelf.held_bytes().get(stream, 0) + size > caps.bytes_max:
            if not self._give_way(shelf, stream, evictions, coming_in=True):
                return False
        while sum(shelf.held_bytes().values()) + size > self._bytes_max:
            victim = self._most_over_its_share(shelf, stream, size)
            if not self._give_way(shelf, victim, evictions, coming_in=victim == stream):
                return False
        return True

    def refusal(self, stream: str, size: int) -> str:
        """The cause to report of a batch that gave way when it came in."""
        caps = self._caps_of(stream)
        too_large = size > min(caps.bytes_max, self._bytes_max)
        return "refused" if caps.when_full is WhenFull.DROP_NEWEST and not too_large else "bytes_max"

    def expire(self, shelf: Shelf, streams: Sequence[str], now: Clock, opened: Clock, evictions: EvictionLog) -> None:
        """Give up batches that are too old, at most `EXPIRED_BATCHES_MAX`."""
        left = EXPIRED_BATCHES_MAX
        for stream in streams:
            age_max_us = self._caps_of(stream).age_max_s * 1e6
            while left and (batch := shelf.oldest(stream)) and age_us(batch.clock, now, opened) > age_max_us:
                shelf.drop(batch)
                evictions.note(_gone(batch, "age_max"))
                left -= 1

    def _caps_of(self, stream: str) -> StreamCaps:
        return self._caps.get(stream, self._default_caps)

    def _most_over_its_share(self, shelf: Shelf, stream: str, size: int) -> str:
        held = dict(shelf.held_bytes())
        held[stream] = held.get(stream, 0) + size
        return max(held, key=lambda name: (held[name] / self._caps_of(name).bytes_max, held[name], name))

    def _give_way(self, shelf: Shelf, stream: str, evictions: EvictionLog, *, coming_in: bool) -> bool:
        """One step of the stream's policy; False where the batch that is coming in is the one to go."""
        caps = self._caps_of(stream)
        if caps.when_full is WhenFull.DROP_NEWEST:
            if coming_in:
                return False
            return _drop(shelf, shelf.newest(stream), evictions)
        if caps.when_full is WhenFull.THIN:
            batch = shelf.thinnable(stream)
            if batch is not None:
                thinned = thin_body(shelf.body_of(batch), batch.rows, caps.thin_keep_every, self._limits)
                shelf.replace(batch, thinned)
                if thinned is not None:
                    evictions.note(_gone(batch, "thinned", batch.rows - thinned.rows))
                return True
        return _drop(shelf, shelf.oldest(stream), evictions)


def age_us(batch: Clock, now: Clock, opened: Clock) -> int:
    """How old a batch is at least, microseconds, judged only by clocks that can be trusted for it.

    A wall clock that was not synchronised says 1970 or last week; an age taken from it would delete everything at the
    moment the clock becomes right. So: within a boot the monotonic clock decides. Across boots the wall clock does, if
    it was synchronised both times, and in any case the batch is as old as the buffer has been open.

    Args:
        batch: the clocks when the batch was closed.
        now: the clocks now.
        opened: the clocks when this process opened the buffer.
    """
    if batch.boot == now.boot:
        return now.monotonic_us - batch.monotonic_us
    at_least = now.monotonic_us - opened.monotonic_us if opened.boot == now.boot else 0
    if batch.synced and now.synced:
        at_least = max(at_least, now.wall_us - batch.wall_us)
    return at_least


class EvictionLog:
    """Evictions in the order they happened, runs of neighbours as one, at most `entries_max` entries."""

    def __init__(self, entries_max: int = 1_000) -> None:
        """Start empty."""
        self._entries: list[Eviction] = []
        self._entries_max = entries_max

    def note(self, eviction: Eviction) -> None:
        """Add one. Beyond the limit entries of one epoch and cause become one, from its first to its last seq."""
        if self._entries and _adjoin(self._entries[-1], eviction):
            self._entries[-1] = _united(self._entries[-1], eviction)
            return
        self._entries.append(eviction)
        if len(self._entries) > self._entries_max:
            merged: dict[tuple[str, str, str], Eviction] = {}
            for entry in self._entries:
                key = (entry.stream, entry.epoch, entry.cause)
                merged[key] = _united(merged[key], entry) if key in merged else entry
            self._entries = list(merged.values())

    def extend(self, evictions: Sequence[Eviction]) -> None:
        """Add several."""
        for eviction in evictions:
            self.note(eviction)

    def take(self) -> Sequence[Eviction]:
        """All of them; the log is empty afterwards."""
        taken, self._entries = self._entries, []
        return tuple(taken)


def _drop(shelf: Shelf, batch: Stored | None, evictions: EvictionLog) -> bool:
    if batch is None:
        return False
    shelf.drop(batch)
    evictions.note(_gone(batch, "bytes_max"))
    return True


def _gone(batch: Stored, cause: str, rows: int | None = None) -> Eviction:
    return Eviction(batch.stream, batch.epoch, batch.seq, batch.seq, batch.rows if rows is None else rows, cause)


def _adjoin(a: Eviction, b: Eviction) -> bool:
    same = (a.stream, a.epoch, a.cause) == (b.stream, b.epoch, b.cause)
    return same and (b.first_seq == a.last_seq + 1 or b.last_seq == a.first_seq - 1)


def _united(a: Eviction, b: Eviction) -> Eviction:
    return a._replace(
        first_seq=min(a.first_seq, b.first_seq), last_seq=max(a.last_seq, b.last_seq), rows=a.rows + b.rows
    )
