"""One stream's flow through the gateway: what is believed of each lane, what is pending, what is being committed.

Pure state, owned by one thread. Beliefs only save work: `gateway.committer.settle` checks them against the table before
each commit, so a wrong belief costs a resend, never a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.admission import Offer, Verdict, judge
from gateway.committer import Outcome
from gateway.ports import Lane, Pending


class Reply(NamedTuple):
    """What becomes of an arriving batch, and what to tell its device."""

    verdict: Verdict
    committed: int | None
    """With DUPLICATE: the watermark to acknowledge again, where it is known."""
    expected: int
    """With REWIND: where to send from."""


class _LaneState:
    __slots__ = ("committed", "shard", "top")

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.committed: int | None = None
        """Watermark in the lake; None until the table was asked."""
        self.top: int | None = None
        """Highest seq admitted and not settled; None where nothing is pending."""


class Flow:
    """Beliefs and pending batches of one stream."""

    def __init__(self, lanes_max: int = 100_000) -> None:
        """Know nothing. The least recently used lane is forgotten beyond `lanes_max`: it is looked up again."""
        self._lanes: OrderedDict[Lane, _LaneState] = OrderedDict()
        self._lanes_max = lanes_max
        self._counters: dict[int, int] = {}
        self._pending: list[Pending] = []
        self._committing: list[Pending] = []
        self.life = 0
        """Which opening of the table all beliefs are about (see `gateway.ports.StreamTable`)."""

    @property
    def pending_bytes(self) -> int:
        """Memory that admitted batches take which are not being committed yet."""
        return sum(batch.size_bytes for batch in self._pending)

    @property
    def lanes(self) -> int:
        """Lanes remembered."""
        return len(self._lanes)

    @property
    def has_pending(self) -> bool:
        """Whether there is something to commit."""
        return bool(self._pending)

    def offer(self, batch: Pending) -> Reply:
        """Judge an arriving batch and keep it if it is admitted."""
        state = self._state(batch)
        if state.top is not None:
            expected = state.top + 1
        elif state.committed is not None:
            expected = state.committed + 1
        else:
            # Nothing is known of this lane: believe its first batch for now, the table is asked before the commit.
            expected = batch.seq
        verdict = judge(expected, Offer(batch.seq, batch.floor))
        if verdict is Verdict.ADMIT:
            state.top = batch.seq
            self._pending.append(batch)
        return Reply(verdict, state.committed, expected)

    def take(self, bytes_max: int) -> tuple[Sequence[Pending], Mapping[Lane, int], Mapping[int, int]]:
        """Begin to commit what is pending, oldest first.

        Args:
            bytes_max: memory that the batches of one commit hold together; one batch always may. Writing them takes as
                much again, and devices wait for the whole commit.

        Returns:
            The batches, the watermarks and the counters to hand to `settle`.
        """
        count = held = 0
        for batch in self._pending:
            held += batch.held_bytes
            if count and held > bytes_max:
                break
            count += 1
        self._committing, self._pending = self._pending[:count], self._pending[count:]
        lanes = {batch.lane for batch in self._committing}
        committed = {lane: mark for lane in lanes if (mark := self._lanes[lane].committed) is not None}
        return self._committing, committed, dict(self._counters)

    def failed(self) -> None:
        """The attempt failed: what was being committed is pending again, in front."""
        self._pending = self._committing + self._pending
        self._committing = []

    def settled(self, outcome: Outcome) -> Sequence[Pending]:
        """Believe what the table said.

        Returns:
            The batches that need no memory any more: committed, or dropped.
        """
        done = self._committing
        self._committing = []
        renewed, self.life = outcome.life != self.life, outcome.life
        if renewed:
            self._counters.clear()
        self._counters.update(outcome.counters)
        if outcome.foreign_shards or renewed:
            # Another gateway committed in these shards, so what is believed of their other lanes may be too low. And of
            # a table that may be another one, restored or made again, nothing is known.
            for lane, state in self._lanes.items():
                if (renewed or state.shard in outcome.foreign_shards) and lane not in outcome.committed:
                    state.committed = None
        for lane, mark in outcome.committed.items():
            state = self._lanes[lane]
            state.committed, state.top = mark, None
        still: list[Pending] = []
        dropped: list[Pending] = []
        for batch in self._pending:
            state = self._lanes[batch.lane]
            if batch.lane in outcome.committed and self._stale(state, batch):
                dropped.append(batch)
            else:
                state.top = batch.seq
                still.append(batch)
        self._pending = still
        self._forget()
        return [*done, *dropped]

    @staticmethod
    def _stale(state: _LaneState, batch: Pending) -> bool:
        top = state.top if state.top is not None else state.committed
        return top is not None and judge(top + 1, Offer(batch.seq, batch.floor)) is not Verdict.ADMIT

    def _state(self, batch: Pending) -> _LaneState:
        state = self._lanes.get(batch.lane)
        if state is None:
            state = self._lanes[batch.lane] = _LaneState(batch.shard)
        self._lanes.move_to_end(batch.lane)
        return state

    def _forget(self) -> None:
        if len(self._lanes) <= self._lanes_max:
            return
        idle = [lane for lane, state in self._lanes.items() if state.top is None]
        for lane in idle[: len(self._lanes) - self._lanes_max]:
            del self._lanes[lane]
