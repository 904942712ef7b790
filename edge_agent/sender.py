"""Which batch to send next: the device's half of the uplink protocol, as pure state over a buffer and a clock.

No sockets, threads or sleeping here: the uplink calls these methods from one thread, and the model test calls them
with a simulated clock, network and lake. The rules are those of "What a device does" in `contract`.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from contract.messages import Rewind, Watermark
from edge_agent.buffer.port import BatchBuffer, LaneInfo, Stored


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
    in_flight: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """seq → bytes, in rising seq."""
    deadline_s: float | None = None
    rewound_to: int = 0
    rewound_at_s: float = float("-inf")

    def go_back(self, before_seq: int) -> None:
        """Forget what was sent from `before_seq` on, so that it is sent again."""
        self.cursor = min(self.cursor, before_seq - 1)
        while self.in_flight and next(reversed(self.in_flight)) >= before_seq:
            self.in_flight.popitem()
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

    def next_batch(self, now_s: float) -> Stored | None:
        """The batch to send now, live epochs before draining ones; None while the windows are full or nothing waits.

        The caller sends it and then calls `sent`.
        """
        self._expire(now_s)
        lanes = list(self._lanes.values())
        for live in (True, False):
            candidates = [lane for lane in lanes if lane.live is live]
            self._rng.shuffle(candidates)
            for lane in candidates:
                batch = self._candidate(lane)
                if batch is not None and self._fits(batch.body_bytes, live=live):
                    return batch
        return None

    def sent(self, batch: Stored, now_s: float) -> None:
        """Note that a batch went out."""
        lane = self._lanes[batch.stream, batch.epoch]
        lane.cursor = batch.seq
        lane.sent_top = max(lane.sent_top, batch.seq)
        lane.in_flight[batch.seq] = batch.body_bytes
        if lane.deadline_s is None:
            lane.deadline_s = now_s + self._jittered(lane.timeout_s)

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
        while lane.in_flight and next(iter(lane.in_flight)) <= mark.seq:
            lane.in_flight.popitem(last=False)
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

        Only where no older epoch of the stream still drains, so a stream has few epochs at a time; and only after an
        ack: a restored buffer can move fresh batches out of a live epoch, not out of one that drains.

        Returns:
            The streams that got a new epoch.
        """
        infos = self._buffer.lanes()
        draining = {info.stream for info in infos if not info.live}
        split = [
            info.stream
            for info in infos
            if info.live
            and info.stream not in draining
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
        return sum(sum(lane.in_flight.values()) for lane in self._lanes.values())

    def _candidate(self, lane: _Lane) -> Stored | None:
        if lane.in_flight and not lane.confirmed:
            return None
        batch = self._buffer.peek(lane.stream, lane.epoch, lane.cursor)
        if batch is None or batch.seq == lane.cursor + 1:
            return batch
        # A hole lies before it. The gateway steps over a hole only from the floor on, so what is below must go first.
        return batch if batch.seq == self._buffer.floor(lane.stream, lane.epoch) else None

    def _fits(self, body_bytes: int, *, live: bool) -> bool:
        if self.in_flight_batches == 0:
            return True
        share = 1.0 if live else self._settings.backlog_share
        batches, size = self.in_flight_batches, self.in_flight_bytes
        if not live:
            backlog = [lane for lane in self._lanes.values() if not lane.live]
            batches = sum(len(lane.in_flight) for lane in backlog)
            size = sum(sum(lane.in_flight.values()) for lane in backlog)
            if batches == 0:
                return True
        return (
            batches < max(1, int(self._settings.window_batches_max * share))
            and size + body_bytes <= self._settings.window_bytes_max * share
        )

    def _expire(self, now_s: float) -> None:
        for lane in self._lanes.values():
            if lane.deadline_s is not None and now_s >= lane.deadline_s:
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
