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
    """The disk is full, read-only or failing: nothing was changed. Keep the batch for a bounded while and try again."""


class WhenFull(StrEnum):
    """What gives way when a stream's part of the buffer is full."""

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"
    THIN = "thin"


class StreamCaps(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one stream the buffer holds."""

    bytes_max: int
    """Bodies held, in bytes."""
    age_max_s: float
    """A batch older than this is given up, whatever `when_full` says."""
    when_full: WhenFull = WhenFull.DROP_OLDEST
    thin_keep_every: int = 10
    """With `thin`: keep every k-th row (and the last) of a batch; at least 2."""

    def __post_init__(self) -> None:
        """Refuse caps that hold nothing or thin nothing."""
        if self.bytes_max < 1 or not self.age_max_s > 0:
            raise ValueError(
                f"bytes_max = {self.bytes_max} and age_max_s = {self.age_max_s} must be above 0; a stream that shall "
                "not be kept is better disabled"
            )
        if self.thin_keep_every < 2:
            raise ValueError(f"thin_keep_every = {self.thin_keep_every} keeps every row; choose 2 or more")


class NewBatch(NamedTuple):
    """A closed batch on its way into the buffer."""

    stream: str
    body: bytes
    rows: int
    clock: Clock


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
    """Outcome of an append.

    `stored` is False where the batch got a seq and was let go at once: drop_newest refused it, or it alone is larger
    than its stream's part or the whole buffer. Its eviction is among `evictions`.
    """

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
    """Device clock at the closing of the batch at `floor`, microseconds since 1970-01-01 UTC."""


class Hollow(NamedTuple):
    """A closed epoch whose last batches were given up: no later batch will show in the lake that they are missing."""

    stream: str
    epoch: str
    last_seq: int
    """Highest seq ever assigned in it."""


class OpenedKind(StrEnum):
    """What was found where the buffer was opened."""

    NEW = "new"
    RESUMED = "resumed"
    CLONED = "cloned"
    """The files were made on another board: every stream begins a new epoch, the old ones drain."""
    CORRUPT_REPLACED = "corrupt_replaced"
    """The files could not be read: they were moved aside, and every stream begins a new epoch."""


class Opened(NamedTuple):
    """How the buffer came to life: worth an event unless it is `resumed`."""

    kind: OpenedKind
    detail: str
    """For a person: what was found, and where it went."""


class BatchBuffer(Protocol):
    """Durable FIFOs of batches, one per (stream, epoch). Safe to call from several threads.

    Every method may raise `BufferUnavailableError`; then it has changed nothing.
    """

    def append(self, stream: str, body: bytes, rows: int, clock: Clock) -> Appended:
        """Give a batch the next seq of the stream's live epoch and store it durably: power loss cannot take it then.

        Raises:
            BufferUnavailableError: nothing was stored and no seq was used up.
        """
        ...

    def append_many(self, batches: Sequence[NewBatch]) -> Sequence[Appended]:
        """Append several batches, of one or more streams, as one durable step: all are stored, or none is.

        One step costs the disk one flush, so batches that close together should go together.

        Returns:
            One outcome per batch, in the same order.

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

    def fetch(self, stream: str, epoch: str, seq: int) -> tuple[Stored, bytes] | None:
        """A held batch and its body as they are at this moment: what an envelope should be made from.

        Between `peek` and `body` a batch may be thinned; then rows and checksum of the former do not fit the latter.
        """
        ...

    def floor(self, stream: str, epoch: str) -> int | None:
        """Lowest seq held of (stream, epoch)."""
        ...

    def acknowledge(self, stream: str, epoch: str, seq: int) -> int:
        """Delete all held batches up to `seq`; forget an epoch that is not live when its last seq is acknowledged.

        Returns the batches deleted.

        The deletion may reach the disk later than this returns. A batch that comes back after a power loss is sent
        again, and dropped by the gateway.
        """
        ...

    def open_epoch(self, stream: str, *, move_after_seq: int | None = None) -> str:
        """Begin a new live epoch for the stream; the old one drains beside it.

        Args:
            stream: the stream.
            move_after_seq: where given, batches of the old live epoch above this seq move to the new epoch and are
                numbered anew: seq - move_after_seq, so that what was evicted among them stays a hole (a restored
                buffer: their old seqs are taken in the lake).

        Returns:
            The new epoch.
        """
        ...

    def lanes(self) -> Sequence[LaneInfo]:
        """Every (stream, epoch), live ones first, then the rest from old to new."""
        ...

    def maintain(self) -> None:
        """Give up what is too old, write deletions that are due. Call it every few seconds, whatever else happens."""
        ...

    def take_evictions(self) -> Sequence[Eviction]:
        """Evictions that were not yet handed over through `append`: by age, or corruption."""
        ...

    def hollow(self) -> Sequence[Hollow]:
        """Closed epochs that end in a hole. They are remembered, over restarts too, until `forget`."""
        ...

    def forget(self, stream: str, epoch: str) -> None:
        """Forget a hollow epoch: it is durably told elsewhere how far it went. No effect on any other."""
        ...

    def close(self) -> None:
        """Write what is due and close the files. The buffer cannot be used afterwards."""
        ...
