"""The books of the buffer: which lanes there are, what each holds, and one transaction's changes to them.

A lane is one (stream, epoch). Its batches have the keys base + 1 … base + last_seq of the table `batches`, in the order
of their seqs. What the buffer says of itself (floor, counts) is kept in memory and read from the table at opening.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from contract.batches import Clock
from contract.codec import checksum
from contract.names import new_epoch
from edge_agent.buffer.connection import PAGE_BYTES, Connection
from edge_agent.buffer.port import LaneInfo, NewBatch, Stored
from edge_agent.buffer.thinning import Thinned

SEQ_BITS = 40
"""A key's lower bits: 10^12 batches before a lane must begin a new epoch. Above them 2^23 lanes have room."""
LEVELS = 17
"""A batch can be thinned at most this often: 2^16 rows, halved each time."""
EXHAUSTED = 99
"""The level of a batch that thinning cannot make smaller."""
COLUMNS = "key, rows, length(body), synced, wall_us, monotonic_us, boot, crc32"

Query = Callable[[str, Sequence[Any]], list[Any]]


@dataclass
class Lane:
    """One (stream, epoch). Treated as a value: a transaction edits copies."""

    lane: int
    base: int
    stream: str
    epoch: str
    live: bool
    last_seq: int = 0
    last_seq_at_open: int = 0
    saved_seq: int = 0
    """`last_seq` as the table `lanes` has it."""
    acked: int = 0
    """Batches up to this seq are not held any more, even where they are not deleted yet."""
    floor: int | None = None
    floor_wall_us: int | None = None
    batches: int = 0
    rows: int = 0
    body_bytes: int = 0
    dead_batches: int = 0
    """Acknowledged, and not deleted yet."""
    dead_bytes: int = 0
    dead_since_us: int = 0
    thin_from: dict[int, int] = field(default_factory=dict)
    """Level → seq: below it no batch of this lane has that level. Spares searching the same rows again."""

    @property
    def shown(self) -> bool:
        """Whether the lane exists for the outside; a drained one only waits for its deletion."""
        return self.live or self.batches > 0

    @property
    def emptied(self) -> bool:
        """Whether nothing is in it and nothing will be."""
        return not self.live and not self.batches and not self.dead_batches

    @property
    def hollow(self) -> bool:
        """Whether it is emptied and its last batches were never acknowledged: see `BatchBuffer.hollow`."""
        return self.emptied and self.acked < self.last_seq

    def key(self, seq: int) -> int:
        """The key of a batch."""
        return self.base + seq

    def stored(self, row: Sequence[Any]) -> Stored:
        """The batch in a row of `COLUMNS`."""
        key, rows, size, synced, wall_us, monotonic_us, boot, crc32 = row
        clock = Clock(synced=bool(synced), wall_us=wall_us, monotonic_us=monotonic_us, boot=boot.hex())
        return Stored(self.stream, self.epoch, key - self.base, rows, size, clock, crc32)

    def info(self) -> LaneInfo:
        """What the outside sees."""
        return LaneInfo(
            self.stream,
            self.epoch,
            self.live,
            self.last_seq,
            self.last_seq_at_open,
            self.floor,
            self.batches,
            self.rows,
            self.body_bytes,
            self.floor_wall_us,
        )


def load(query: Query) -> dict[int, Lane]:
    """Read all lanes, and count what they hold."""
    lanes: dict[int, Lane] = {}
    for number, base, stream, epoch, live, saved_seq, acked in query(
        "SELECT lane, base, stream, epoch, live, last_seq, acked FROM lanes ORDER BY lane", ()
    ):
        lane = Lane(number, base, stream, epoch, bool(live), saved_seq, saved_seq=saved_seq, acked=acked)
        if live:
            # Nothing lies behind a live lane: the next one begins beyond its last possible key.
            end = ((base >> SEQ_BITS) + 1) << SEQ_BITS
            top = query("SELECT max(key) FROM batches WHERE key > ? AND key < ?", (base, end))[0][0]
            lane.last_seq = max(saved_seq, (top or base) - base)
        lane.last_seq_at_open = lane.last_seq
        count(lane, query)
        lane.dead_batches, lane.dead_bytes = query(
            "SELECT count(*), ifnull(sum(length(body)), 0) FROM batches WHERE key > ? AND key <= ?",
            (lane.base, lane.key(lane.acked)),
        )[0]
        lanes[number] = lane
    return lanes


def count(lane: Lane, query: Query) -> None:
    """Set what a lane holds above `acked` from the table."""
    lane.batches, lane.rows, lane.body_bytes = query(
        "SELECT count(*), ifnull(sum(rows), 0), ifnull(sum(length(body)), 0) FROM batches WHERE key > ? AND key <= ?",
        (lane.key(lane.acked), lane.key(lane.last_seq)),
    )[0]
    lane.floor = lane.acked
    find_floor(lane, query)


def find_floor(lane: Lane, query: Query) -> None:
    """Set `floor` to the lowest held seq from the present one on."""
    rows = query(
        "SELECT key, wall_us FROM batches WHERE key >= ? AND key <= ? ORDER BY key LIMIT 1",
        (lane.key(max(lane.floor or 0, lane.acked + 1)), lane.key(lane.last_seq)),
    )
    lane.floor, lane.floor_wall_us = (rows[0][0] - lane.base, rows[0][1]) if rows else (None, None)


def acknowledged(lane: Lane, seq: int, now: Clock, query: Query) -> tuple[Lane, int]:
    """The lane without its batches up to `seq`, and how many those are. They stay in the table for now."""
    seq = min(seq, lane.last_seq)
    if lane.floor is None or seq < lane.floor:
        return lane, 0
    after = replace(lane, acked=seq, dead_since_us=lane.dead_since_us if lane.dead_batches else now.monotonic_us)
    if seq == lane.last_seq:
        after.batches, after.rows, after.body_bytes, after.floor, after.floor_wall_us = 0, 0, 0, None, None
    else:
        batches, rows, size = query(
            "SELECT count(*), ifnull(sum(rows), 0), ifnull(sum(length(body)), 0) FROM batches "
            "WHERE key >= ? AND key <= ?",
            (lane.key(lane.floor), lane.key(seq)),
        )[0]
        after.batches, after.rows, after.body_bytes = (
            lane.batches - batches,
            lane.rows - rows,
            lane.body_bytes - size,
        )
        find_floor(after, query)
    after.dead_batches += lane.batches - after.batches
    after.dead_bytes += lane.body_bytes - after.body_bytes
    return after, lane.batches - after.batches


class Ledger:
    """The lanes within one transaction. It edits copies; whoever commits takes `lanes` over.

    It is also the shelf that the rules of eviction work on.
    """

    def __init__(self, connection: Connection, lanes: Mapping[int, Lane]) -> None:
        """Begin with the lanes as they are."""
        self.lanes = dict(lanes)
        self._connection = connection
        self.written_bytes = 0
        """What the changes so far take in the log, about."""
        self._edited: set[int] = set()
        self._bytes: Counter[str] = Counter()
        for lane in lanes.values():
            self._bytes[lane.stream] += lane.body_bytes

    # What the buffer does

    def live(self, stream: str) -> Lane:
        """The stream's live lane, to be edited; a new one where there is none, or its numbers are used up."""
        lane = self.find_live(stream)
        if lane is not None and (lane.key(lane.last_seq + 1) & ((1 << SEQ_BITS) - 1)) == 0:
            self.retire(lane)
            lane = None
        if lane is None:
            groups = [known.base >> SEQ_BITS for known in self.lanes.values()]
            lane = self.begin(stream, (max(groups, default=-1) + 1) << SEQ_BITS, last_seq=0)
        return lane

    def find_live(self, stream: str) -> Lane | None:
        """The stream's live lane, to be edited, if it has one."""
        return next((self._edit(n) for n, lane in self.lanes.items() if lane.live and lane.stream == stream), None)

    def begin(self, stream: str, base: int, last_seq: int) -> Lane:
        """A new live lane over the keys above `base`."""
        number = max(self.lanes, default=0) + 1
        lane = Lane(number, base, stream, new_epoch(), live=True, last_seq=last_seq, saved_seq=last_seq)
        self.lanes[number] = lane
        self._edited.add(number)
        self._execute(
            "INSERT INTO lanes (lane, base, stream, epoch, live, last_seq) VALUES (?, ?, ?, ?, 1, ?)",
            (number, base, stream, lane.epoch, last_seq),
        )
        count(lane, self._query)
        return lane

    def retire(self, lane: Lane, move_after_seq: int | None = None) -> Lane | None:
        """Let a live lane drain; give what lies above `move_after_seq` to a new live lane, if any was ever there."""
        self.delete_acknowledged(lane, None)
        moves = move_after_seq is not None and move_after_seq < lane.last_seq
        last_seq = lane.last_seq
        if moves and move_after_seq is not None:
            lane.last_seq = max(0, move_after_seq)
        lane.live, lane.saved_seq = False, lane.last_seq
        self._execute(
            "UPDATE lanes SET live = 0, last_seq = ?, acked = ? WHERE lane = ?", (lane.last_seq, lane.acked, lane.lane)
        )
        count(lane, self._query)
        new = self.begin(lane.stream, lane.key(lane.last_seq), last_seq - lane.last_seq) if moves else None
        self._sweep(lane)
        return new

    def add(self, lane: Lane, new: NewBatch) -> None:
        """Store a batch under the lane's last seq."""
        clock = new.clock
        self._execute(
            "INSERT INTO batches (key, rows, wall_us, monotonic_us, synced, boot, crc32, level, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?)",
            (
                lane.key(lane.last_seq),
                new.rows,
                clock.wall_us,
                clock.monotonic_us,
                int(clock.synced),
                bytes.fromhex(clock.boot),
                checksum(new.body),
                new.body,
            ),
        )
        if lane.floor is None:
            lane.floor, lane.floor_wall_us = lane.last_seq, clock.wall_us
        self._count(lane, 1, new.rows, len(new.body))

    def delete_acknowledged(self, lane: Lane, batches_max: int | None) -> None:
        """Delete what was acknowledged, at most so many batches."""
        lane = self._edit(lane.lane)
        if lane.dead_batches:
            deleted = self._execute(
                "DELETE FROM batches WHERE key IN "
                "(SELECT key FROM batches WHERE key > ? AND key <= ? ORDER BY key LIMIT ?)",
                (lane.base, lane.key(lane.acked), -1 if batches_max is None else batches_max),
            )
            if batches_max is None or deleted < batches_max:
                lane.dead_batches = lane.dead_bytes = 0
            else:
                lane.dead_batches = max(1, lane.dead_batches - deleted)
                # The rest may take a while; a restart in between shall not bring it back.
                self._execute("UPDATE lanes SET acked = ? WHERE lane = ?", (lane.acked, lane.lane))
        self._sweep(lane)

    def forget(self, lane: Lane) -> None:
        """Forget a lane, whatever was lost of it."""
        self._execute("DELETE FROM lanes WHERE lane = ?", (lane.lane,))
        self.lanes.pop(lane.lane, None)

    def own(self, fingerprint: str) -> None:
        """Write down whose board the file belongs to."""
        self._execute("DELETE FROM owner", ())
        self._execute("INSERT INTO owner (fingerprint) VALUES (?)", (fingerprint,))

    def settle(self) -> None:
        """Before the commit: no lane may forget a number that it has given, although the batch is gone."""
        for number in self._edited & self.lanes.keys():
            lane = self.lanes[number]
            if lane.last_seq > lane.saved_seq and not self._query(
                "SELECT 1 FROM batches WHERE key = ?", (lane.key(lane.last_seq),)
            ):
                self._save_last_seq(lane)

    def save_last_seqs(self) -> None:
        """Write down the last number of every lane."""
        for number in list(self.lanes):
            if self.lanes[number].last_seq > self.lanes[number].saved_seq:
                self._save_last_seq(self._edit(number))

    # The shelf of the rules

    def held_bytes(self) -> Mapping[str, int]:
        """Bytes of held bodies by stream."""
        return self._bytes

    def oldest(self, stream: str) -> Stored | None:
        """The batch of the stream that was stored first."""
        for lane in self._of(stream):
            return self._find(lane, "key = ?", (lane.key(lane.floor or 0),))
        return None

    def newest(self, stream: str) -> Stored | None:
        """The batch of the stream that was stored last."""
        for lane in reversed(self._of(stream)):
            return self._find(
                lane,
                "key >= ? AND key <= ? ORDER BY key DESC LIMIT 1",
                (lane.key(lane.floor or 0), lane.key(lane.last_seq)),
            )
        return None

    def thinnable(self, stream: str) -> Stored | None:
        """Among the batches thinned least often the oldest; None where all are exhausted."""
        for level in range(LEVELS):
            for known in self._of(stream):
                start = max(known.thin_from.get(level, 0), known.floor or 0)
                if start > known.last_seq:
                    continue
                lane = self._edit(known.lane)
                batch = self._find(
                    lane,
                    "key >= ? AND key <= ? AND level = ? ORDER BY key LIMIT 1",
                    (lane.key(start), lane.key(lane.last_seq), level),
                )
                lane.thin_from[level] = batch.seq if batch else lane.last_seq + 1
                if batch:
                    return batch
        return None

    def body_of(self, batch: Stored) -> bytes:
        """The body of a batch."""
        key = self._lane_of(batch).key(batch.seq)
        body: bytes = self._query("SELECT body FROM batches WHERE key = ?", (key,))[0][0]
        return body

    def replace(self, batch: Stored, thinned: Thinned | None) -> None:
        """Put a thinned body in a batch's place; None marks the batch as exhausted."""
        lane = self._lane_of(batch)
        key = lane.key(batch.seq)
        if thinned is None:
            self._execute("UPDATE batches SET level = ? WHERE key = ?", (EXHAUSTED, key))
            return
        self._execute(
            "UPDATE batches SET rows = ?, crc32 = ?, level = level + 1, body = ? WHERE key = ?",
            (thinned.rows, checksum(thinned.body), thinned.body, key),
        )
        level = self._query("SELECT level FROM batches WHERE key = ?", (key,))[0][0]
        # Unknown means from the beginning: after a restart there may be older ones of this level.
        lane.thin_from[level] = min(lane.thin_from.get(level, 0), batch.seq)
        self._count(lane, 0, thinned.rows - batch.rows, len(thinned.body) - batch.body_bytes)

    def drop(self, batch: Stored) -> None:
        """Delete a batch; its seq stays used."""
        lane = self._lane_of(batch)
        self._execute("DELETE FROM batches WHERE key = ?", (lane.key(batch.seq),))
        self._count(lane, -1, -batch.rows, -batch.body_bytes)
        if lane.floor == batch.seq:
            find_floor(lane, self._query)
        self._sweep(lane)

    def find(self, lane: Lane, seq: int) -> tuple[Stored, bytes] | None:
        """A batch and its body, if it is there."""
        rows = self._query(f"SELECT {COLUMNS}, body FROM batches WHERE key = ?", (lane.key(seq),))
        return (lane.stored(rows[0][:-1]), rows[0][-1]) if rows and lane.acked < seq <= lane.last_seq else None

    # Inside

    def _of(self, stream: str) -> list[Lane]:
        """The stream's lanes that hold something, the oldest first."""
        return [lane for lane in self.lanes.values() if lane.stream == stream and lane.batches]

    def _lane_of(self, batch: Stored) -> Lane:
        return next(
            self._edit(number)
            for number, lane in self.lanes.items()
            if lane.epoch == batch.epoch and lane.stream == batch.stream
        )

    def _edit(self, number: int) -> Lane:
        if number not in self._edited:
            known = self.lanes[number]
            self.lanes[number] = replace(known, thin_from=dict(known.thin_from))
            self._edited.add(number)
        return self.lanes[number]

    def _find(self, lane: Lane, where: str, parameters: Sequence[Any]) -> Stored | None:
        rows = self._query(f"SELECT {COLUMNS} FROM batches WHERE {where}", parameters)
        return lane.stored(rows[0]) if rows else None

    def _count(self, lane: Lane, batches: int, rows: int, body_bytes: int) -> None:
        lane.batches += batches
        lane.rows += rows
        lane.body_bytes += body_bytes
        self._bytes[lane.stream] += body_bytes

    def _save_last_seq(self, lane: Lane) -> None:
        self._execute("UPDATE lanes SET last_seq = ? WHERE lane = ?", (lane.last_seq, lane.lane))
        lane.saved_seq = lane.last_seq

    def _sweep(self, lane: Lane) -> None:
        """Forget a lane that takes no new batches, has none left, and whose end is in the lake."""
        if lane.emptied and not lane.hollow:
            self.forget(lane)

    def _query(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        return self._connection.execute(sql, parameters).fetchall()

    def _execute(self, sql: str, parameters: Sequence[Any]) -> int:
        changed = self._connection.execute(sql, parameters).rowcount
        bodies = sum(len(value) for value in parameters if isinstance(value, bytes))
        self.written_bytes += bodies + bodies // 16 + PAGE_BYTES * (2 + 2 * changed)
        return changed
