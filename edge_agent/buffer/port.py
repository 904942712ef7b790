"""The port of the device's buffer: the one place on the device that owns data.

Reading never deletes; only `acknowledge` and eviction do. Every implementation passes `tests/contract/buffer_suite.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

from contract.batches import Clock
from contract.errors import TemporaryError


class BufferUnavailableError(TemporaryError):
    """The disk is full, read-only or failing: the batch was not stored. Keep it for a bounded while and try again."""


class WhenFull(StrEnum):
    """What gives way when a stream's part of the buffer is full."""

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"
    THIN = "thin"


class StreamCaps(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one stream the buffer holds."""

    bytes_max: int
    age_max_s: float
    when_full: WhenFull = WhenFull.DROP_OLDEST
    thin_keep_every: int = 10
    """With `thin`: keep every k-th row (and the last) of a batch; at least 2."""


class Stored(NamedTuple):
    """A batch in the buffer, without its body."""

    stream: str
    epoch: str
    seq: int
    rows: int
    body_bytes: int
    clock: Clock
    crc32: int


class Eviction(NamedTuple):
    """Batches or rows that were given up: what the agent reports as an event."""

    stream: str
    epoch: str
    first_seq: int
    last_seq: int
    rows: int
    """Rows that are gone."""
    cause: str
    """`bytes_max`, `age_max`, `thinned`, `refused` (drop_newest) or `corrupt`."""


class Appended(NamedTuple):
    """Outcome of an append. `stored` is False only where drop_newest gave the batch a seq and let it go."""

    epoch: str
    seq: int
    stored: bool
    evictions: Sequence[Eviction]


class LaneInfo(NamedTuple):
    """One (stream, epoch) in the buffer."""

    stream: str
    epoch: str
    live: bool
    """Whether new batches go here; otherwise it only drains."""
    last_seq: int
    """Highest seq ever assigned; 0 if none."""
    last_seq_at_open: int
    """The same when this process opened the buffer."""
    floor: int | None
    """Lowest seq held; None when nothing is."""
    batches: int
    rows: int
    body_bytes: int
    oldest_wall_us: int | None


class BatchBuffer(Protocol):
    """Durable FIFOs of batches, one per (stream, epoch). Safe to call from several threads."""

    def append(self, stream: str, body: bytes, rows: int, clock: Clock) -> Appended:
        """Give a batch the next seq of the stream's live epoch and store it durably: power loss cannot take it then.

        Raises:
            BufferUnavailableError: nothing was stored and no seq was used up.
        """
        ...

    def peek(self, stream: str, epoch: str, after_seq: int) -> Stored | None:
        """The held batch with the lowest seq above `after_seq`."""
        ...

    def body(self, stream: str, epoch: str, seq: int) -> bytes | None:
        """The body of a held batch, its checksum verified; None when gone (damaged: evicted as `corrupt`)."""
        ...

    def floor(self, stream: str, epoch: str) -> int | None:
        """Lowest seq held of (stream, epoch)."""
        ...

    def acknowledge(self, stream: str, epoch: str, seq: int) -> int:
        """Delete all held batches up to `seq`; forget a drained epoch that is not live. Returns the batches deleted."""
        ...

    def open_epoch(self, stream: str, *, move_after_seq: int | None = None) -> str:
        """Begin a new live epoch for the stream; the old one drains beside it.

        Args:
            stream: the stream.
            move_after_seq: where given, batches of the old live epoch above this seq move to the new epoch, numbered
                from 1 in their order (a restored buffer: their old seqs are taken in the lake).

        Returns:
            The new epoch.
        """
        ...

    def lanes(self) -> Sequence[LaneInfo]:
        """Every (stream, epoch), live ones first, then the rest from old to new."""
        ...

    def take_evictions(self) -> Sequence[Eviction]:
        """Evictions that were not yet handed over through `append`: by age, thinning in the background, corruption."""
        ...

    def close(self) -> None:
        """Close the files. The buffer cannot be used afterwards."""
        ...
