"""Reconciliation: what the buffers accepted against what the lake holds, per device and stream. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from edge_agent.buffer.port import LaneInfo
from headwater.ledger import Key, LaneKey


class Batch(NamedTuple):
    """One batch as the lake holds it."""

    seq: int
    rows: int
    distinct: int
    """Different row numbers among them."""


class StreamBalance(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of one device, since the run began."""

    device: str
    stream: str
    rows_accepted: int
    """Readings that the buffer accepted."""
    exact: bool
    """Whether the count of accepted readings is proved complete by the buffer's own numbering. Where an agent was
    killed it is not; then readings in the lake of batches that nobody counted are taken as accepted."""
    rows_in_lake: int
    distinct: int
    waiting: int
    """Readings still in the buffer."""
    lost: int
    duplicated: int
    """Readings that are in the lake more often than once, or that no buffer ever accepted."""
    gaps: int
    """Batches that are missing between others."""
    batches: int


class Balance(msgspec.Struct, frozen=True, kw_only=True):
    """All streams of all devices together."""

    streams: tuple[StreamBalance, ...]

    def total(self, name: str) -> int:
        """The sum of one column."""
        return sum(getattr(stream, name) for stream in self.streams)

    @property
    def exact(self) -> bool:
        """Whether every count is."""
        return all(stream.exact for stream in self.streams)


def balance(
    before: Mapping[LaneKey, LaneInfo],
    after: Mapping[LaneKey, LaneInfo],
    counted_rows: Mapping[Key, int],
    counted_batches: Mapping[Key, int],
    lake: Mapping[LaneKey, Sequence[Batch]],
) -> Balance:
    """Balance the books.

    Args:
        before: the buffers before the devices were started.
        after: the buffers after the devices had ended.
        counted_rows: rows that the agents counted as accepted, by device and stream.
        counted_batches: the same of batches.
        lake: the batches in the lake; those of earlier runs may be among them.
    """
    # What arrived in the lake belongs to this run, unless the buffer had given out its number before.
    arrived = {
        lane: [batch for batch in batches if batch.seq > _last_seq(before, lane)] for lane, batches in lake.items()
    }
    # Left over by earlier runs: accepted then, so this run owes it to the lake as well, but did not count it.
    lanes = sorted({*after, *(lane for lane, batches in arrived.items() if batches)})
    keys = sorted({Key(lane.device, lane.stream) for lane in lanes} | set(counted_rows))
    return Balance(
        streams=tuple(
            _stream(
                key,
                [lane for lane in lanes if lane[:2] == key],
                before,
                after,
                arrived,
                counted_rows.get(key, 0),
                counted_batches.get(key, 0),
            )
            for key in keys
        )
    )


def _stream(
    key: Key,
    lanes: Sequence[LaneKey],
    before: Mapping[LaneKey, LaneInfo],
    after: Mapping[LaneKey, LaneInfo],
    arrived: Mapping[LaneKey, Sequence[Batch]],
    counted_rows: int,
    counted_batches: int,
) -> StreamBalance:
    rows = distinct = given = lost_batches = gaps = waiting_batches = waiting_rows = 0
    for lane in lanes:
        batches = arrived.get(lane, ())
        there = {batch.seq for batch in batches}
        rows += sum(batch.rows for batch in batches)
        distinct += sum(batch.distinct for batch in batches)
        first = _last_seq(before, lane) + 1
        # A lane that the buffer has forgotten was drained, so its last number is the last in the lake.
        last = after[lane].last_seq if lane in after else max(there, default=first - 1)
        given += last - first + 1
        missing = [seq for seq in range(first, last + 1) if seq not in there]
        held = [seq for seq in missing if lane in after and (floor := after[lane].floor) is not None and seq >= floor]
        waiting_batches += len(held)
        waiting_rows += after[lane].rows if held else 0
        lost_batches += len(missing) - len(held)
        gaps += sum(seq < max(there, default=0) for seq in missing)
    exact = counted_batches == given
    accepted = counted_rows if exact else max(counted_rows, distinct + lost_batches + waiting_rows)
    waiting = min(waiting_rows, max(0, accepted - distinct)) if waiting_batches else 0
    return StreamBalance(
        device=key.device,
        stream=key.stream,
        rows_accepted=accepted,
        exact=exact,
        rows_in_lake=rows,
        distinct=distinct,
        waiting=waiting,
        # A batch has at least one row, so lost batches are lost rows even where nobody counted them.
        lost=max(accepted - distinct - waiting, lost_batches),
        duplicated=rows - distinct + max(0, distinct - accepted),
        gaps=gaps,
        batches=given,
    )


def _last_seq(lanes: Mapping[LaneKey, LaneInfo], lane: LaneKey) -> int:
    return lanes[lane].last_seq if lane in lanes else 0
