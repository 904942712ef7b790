"""Which batch to send next: the device's half of the uplink protocol, as pure state over a buffer and a clock.

No sockets, threads or sleeping here: the uplink calls these methods from one thread, and the model test calls them
with a simulated clock, network and lake. The rules are those of "What a device does" in `contract`.
"""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from contract.messages import Rewind, Watermark
from edge_agent.buffer.port import BatchBuffer, LaneInfo, Stored

DRAINING_EPOCHS_MAX = 8
"""Of one stream, each a backlog of its own."""


class SenderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How eagerly a device sends."""

    window_batches_max: int = 64
    window_bytes_max: int = 4 * 1024 * 1024
    """Unacknowledged batches on the way, over all streams; one batch always may be."""
    backlog_share: float = 0.5
    """Part of the window that draining epochs may fill while live data shares the line."""
    ack_timeout_s: float = 10.0
    ack_timeout_max_s: float = 120.0
    rewind_holdoff_s: float = 1.0
    """A second rewind to the same seq within this time is the echo of one loss, not another loss."""
    backlog_bytes_max: int = 8 * 1024 * 1024
    """A live epoch with more waiting than this drains as backlog while fresh data goes ahead in a new epoch."""


class AckOutcome(Enum):
    """What an acknowledgement meant."""

    UNKNOWN_EPOCH = "unknown_epoch"
    NOTHING_NEW = "nothing_new"
    PROGRESS = "progress"
    BUFFER_RESTORED = "buffer_restored"
    """The lake has batches of this epoch that this buffer never sent: the buffer went back in time."""


@dataclass
class _Lane:
    """Sending state of one (stream, epoch)."""

    stream: str
    epoch: str
    live: bool
    last_seq_at_open: int
    timeout_s: float
    cursor: int = 0
    """Sending goes on with the lowest held seq above this."""
    sent_top: int = 0
    """Highest seq sent since this process started."""
    acked: int = 0
    confirmed: bool = False
    """Whether an ack came since this process started. Until then one batch tests whether the buffer is up to date."""
    in_flight: OrderedDict[int, tuple[int, int]] = field(default_factory=OrderedDict)
    """seq → bytes and number among all that was handed to this connection, in rising seq."""
    in_flight_bytes: int = 0
    """Their sum, kept along: it is asked for with every batch."""
    deadline_s: float | None = None
    not_before_s: float = float("-inf")
    """Nothing is sent before this time."""
    rewound_to: int = 0
    rewound_at_s: float = float("-inf")

    def put_in_flight(self, seq: int, size: int, number: int) -> None:
        """Note that a batch is on the way."""
        self.in_flight_bytes += size - self.in_flight.get(seq, (0, 0))[0]
        self.in_flight[seq] = (size, number)

    def land(self, up_to_seq: int) -> None:
        """What is acknowledged is not on the way any more."""
        while self.in_flight and next(iter(self.in_flight)) <= up_to_seq:
            self.in_flight_bytes -= self.in_flight.popitem(last=False)[1][0]

    def go_back(self, before_seq: int) -> None:
        """Forget what was sent from `before_seq` on, so that it is sent again."""
        self.cursor = min(self.cursor, before_seq - 1)
        while self.in_flight and next(reversed(self.in_flight)) >= before_seq:
            self.in_flight_bytes -= self.in_flight.popitem()[1][0]
        if not self.in_flight:
            self.deadline_s = None


class Sender:
    """Decides what is sent, resent and deleted. Not thread-safe; times are monotonic seconds."""

    def __init__(self, buffer: BatchBuffer, settings: SenderSettings, rng: random.Random) -> None:
        """Start with everything the buffer holds unsent."""
        self._buffer = buffer
        self._settings = settings
        self._rng = rng
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self.resent_timeouts = 0
        self.rewinds_followed = 0
        self._waiting_for_room: dict[bool, Stored] = {}
        """Live or not → the batch that the window had no room for."""
        self._inherited = {(info.stream, info.epoch) for info in buffer.lanes()}
        self.refresh_lanes()

    def refresh_lanes(self) -> None:
        """Learn of new epochs and forget those that the buffer has drained."""
        held = {(info.stream, info.epoch): info for info in self._buffer.lanes()}
        for key in self._lanes.keys() - held.keys():
            del self._lanes[key]
        for key, info in held.items():
            lane = self._lanes.get(key)
            if lane is None:
                self._lanes[key] = self._new_lane(info)
            else:
                lane.live = info.live

    def stored(self, stream: str, epoch: str) -> None:
        """Note that the buffer holds something new, perhaps of an epoch not seen yet."""
        if (stream, epoch) not in self._lanes:
            self.refresh_lanes()

    def connected(self) -> None:
        """A new connection: whatever was on the way is unknown, so everything unacknowledged is sent again."""
        for lane in self._lanes.values():
            lane.go_back(1)
            lane.timeout_s = self._settings.ack_timeout_s

    def next_batch(
        self, now_s: float, withheld: Collection[tuple[str, str]] = (), answered: float = math.inf
    ) -> Stored | None:
        """The batch to send now, live epochs before draining ones; None while the windows are full or nothing waits.

        The caller sends it and then calls `sent`.

        Args:
            now_s: now.
            withheld: (stream, epoch)s of which nothing may be sent yet.
            answered: how many of the messages handed to this connection have reached the broker. What has not cannot be
                overdue: on a slow line it would be sent again and again, each time behind itself.
        """
        self._expire(now_s, answered)
        lanes = [lane for key, lane in self._lanes.items() if lane.not_before_s <= now_s and key not in withheld]
        for live in (True, False):
            batch = self._choose([lane for lane in lanes if lane.live is live], live=live)
            if batch is not None or self._needs_the_line(live=live):
                return batch
        return None

    def sent(self, batch: Stored, now_s: float, number: int = 0) -> None:
        """Note that a batch went out, as the `number`th message of this connection."""
        lane = self._lanes[batch.stream, batch.epoch]
        lane.cursor = batch.seq
        lane.sent_top = max(lane.sent_top, batch.seq)
        lane.put_in_flight(batch.seq, batch.body_bytes, number)
        if lane.deadline_s is None:
            lane.deadline_s = now_s + self._jittered(lane.timeout_s)

    def postpone(self, batch: Stored, until_s: float) -> None:
        """Send nothing of the batch's epoch before `until_s`: it cannot be read now."""
        self._lanes[batch.stream, batch.epoch].not_before_s = until_s

    def acknowledged(self, mark: Watermark, now_s: float) -> AckOutcome:
        """Delete what the lake has; see whether the buffer is older than the lake."""
        lane = self._lanes.get((mark.stream, mark.epoch))
        if lane is None:
            return AckOutcome.UNKNOWN_EPOCH
        if mark.seq > max(lane.sent_top, lane.last_seq_at_open):
            return self._restored(lane, mark)
        if mark.seq < 1:
            return AckOutcome.NOTHING_NEW
        lane.confirmed = True
        if mark.seq <= lane.acked:
            return AckOutcome.NOTHING_NEW
        # First of all: when the disk refuses, nothing has changed, and the timeout asks for the ack again.
        self._buffer.acknowledge(mark.stream, mark.epoch, mark.seq)
        lane.acked = mark.seq
        lane.cursor = max(lane.cursor, mark.seq)
        lane.land(mark.seq)
        lane.timeout_s = self._settings.ack_timeout_s
        lane.deadline_s = now_s + self._jittered(lane.timeout_s) if lane.in_flight else None
        if not lane.live:
            self.refresh_lanes()
        return AckOutcome.PROGRESS

    def rewind(self, rewind: Rewind, now_s: float) -> bool:
        """Go back to `expected`; False where the request is stale or an echo."""
        lane = self._lanes.get((rewind.stream, rewind.epoch))
        if lane is None or rewind.expected > lane.cursor:
            return False
        echo = rewind.expected == lane.rewound_to and now_s - lane.rewound_at_s < self._settings.rewind_holdoff_s
        if echo:
            return False
        lane.rewound_to = rewind.expected
        lane.rewound_at_s = now_s
        lane.go_back(rewind.expected)
        self.rewinds_followed += 1
        return True

    def split_backlog(self) -> list[str]:
        """Let fresh data overtake: open a new epoch where a live one has too much waiting.

        Only up to `DRAINING_EPOCHS_MAX`, so a stream has few epochs at a time, also where the line breaks again before
        the last backlog is through; and only after an ack: a restored buffer can move fresh batches out of a live
        epoch, not out of one that drains.

        Returns:
            The streams that got a new epoch.
        """
        infos = self._buffer.lanes()
        draining = Counter(info.stream for info in infos if not info.live)
        split = [
            info.stream
            for info in infos
            if info.live
            and draining[info.stream] < DRAINING_EPOCHS_MAX
            and info.body_bytes > self._settings.backlog_bytes_max
            and (lane := self._lanes.get((info.stream, info.epoch))) is not None
            and lane.confirmed
        ]
        for stream in split:
            self._buffer.open_epoch(stream)
        if split:
            self.refresh_lanes()
        return split

    def wake_at_s(self) -> float | None:
        """When the next ack timeout is due; None while nothing is on the way."""
        deadlines = [lane.deadline_s for lane in self._lanes.values() if lane.deadline_s is not None]
        return min(deadlines, default=None)

    @property
    def in_flight_batches(self) -> int:
        """Unacknowledged batches on the way."""
        return sum(len(lane.in_flight) for lane in self._lanes.values())

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of bodies on the way, unacknowledged."""
        return sum(lane.in_flight_bytes for lane in self._lanes.values())

    def _choose(self, lanes: list[_Lane], *, live: bool) -> Stored | None:
        """A batch of one of the lanes, any of them first, that the window has room for.

        Where room for a batch is lacking, no smaller one of its kind goes before it: else, with many streams, the
        window would never be empty enough for it, and its stream would stand still for ever.
        """
        batches, size = self._on_the_way(live=live)
        share = 1.0 if live else self._settings.backlog_share
        if batches and batches >= max(1, int(self._settings.window_batches_max * share)):
            return None
        for lane in self._in_any_order(lanes, self._waiting_for_room.get(live)):
            batch = self._candidate(lane)
            if batch is not None:
                if batches and size + batch.body_bytes > self._settings.window_bytes_max * share:
                    self._waiting_for_room[live] = batch
                    return None
                self._waiting_for_room.pop(live, None)
                return batch
        return None

    def _in_any_order(self, lanes: list[_Lane], first: Stored | None) -> Iterator[_Lane]:
        """The lanes shuffled, that of `first` in front; drawn one by one, because most often the first is taken."""
        at = (
            next((i for i, lane in enumerate(lanes) if (lane.stream, lane.epoch) == first[:2]), None) if first else None
        )
        while lanes:
            at = self._rng.randrange(len(lanes)) if at is None else at
            lanes[at], lanes[-1] = lanes[-1], lanes[at]
            yield lanes.pop()
            at = None

    def _needs_the_line(self, *, live: bool) -> bool:
        """Whether fresh data waits that does not fit beside what draining epochs may have on the way."""
        waiting = self._waiting_for_room.get(True) if live else None
        return waiting is not None and waiting.body_bytes > self._settings.window_bytes_max * (
            1 - self._settings.backlog_share
        )

    def _on_the_way(self, *, live: bool) -> tuple[int, int]:
        """Batches and bytes that share a window: everything for live epochs, only each other for draining ones."""
        lanes = [lane for lane in self._lanes.values() if live or not lane.live]
        return sum(len(lane.in_flight) for lane in lanes), sum(lane.in_flight_bytes for lane in lanes)

    def _candidate(self, lane: _Lane) -> Stored | None:
        if lane.in_flight and not lane.confirmed:
            return None
        batch = self._buffer.peek(lane.stream, lane.epoch, lane.cursor)
        if batch is None or batch.seq == lane.cursor + 1:
            return batch
        # A hole lies before it. The gateway steps over a hole only from the floor on, so what is below must go first.
        return batch if batch.seq == self._buffer.floor(lane.stream, lane.epoch) else None

    def _expire(self, now_s: float, answered: float) -> None:
        for lane in self._lanes.values():
            if lane.deadline_s is not None and now_s >= lane.deadline_s:
                oldest = next(iter(lane.in_flight.values()), (0, 0))
                if oldest[1] > answered:
                    lane.deadline_s = now_s + self._jittered(lane.timeout_s)
                    continue
                lane.go_back(1)
                lane.timeout_s = min(lane.timeout_s * 2, self._settings.ack_timeout_max_s)
                self.resent_timeouts += 1

    def _restored(self, lane: _Lane, mark: Watermark) -> AckOutcome:
        if lane.live:
            self._buffer.open_epoch(lane.stream, move_after_seq=lane.last_seq_at_open)
        self._buffer.acknowledge(mark.stream, mark.epoch, mark.seq)
        self._lanes.pop((lane.stream, lane.epoch))
        self.refresh_lanes()
        return AckOutcome.BUFFER_RESTORED

    def _new_lane(self, info: LaneInfo) -> _Lane:
        return _Lane(
            stream=info.stream,
            epoch=info.epoch,
            live=info.live,
            last_seq_at_open=info.last_seq_at_open,
            timeout_s=self._settings.ack_timeout_s,
            # An epoch of this very process cannot be in the lake further than it knows. An inherited one can, even when
            # it is empty: the buffer may have been restored to the moment when the epoch was made.
            confirmed=(info.stream, info.epoch) not in self._inherited,
        )

    def _jittered(self, timeout_s: float) -> float:
        return timeout_s * self._rng.uniform(0.75, 1.25)
