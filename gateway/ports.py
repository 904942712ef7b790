"""What the committer needs of the lake, and what flows through the gateway. `lake` implements the ports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import pyarrow as pa

from contract.batches import Clock
from contract.errors import Rejected
from lake.quarantine import QuarantineRecord
from lake.raw import AppendResult, RawBatch


class Lane(NamedTuple):
    """One (device, epoch) of a stream: what a watermark belongs to."""

    device: str
    epoch: str


class Pending(NamedTuple):
    """A batch on its way to the lake."""

    lane: Lane
    seq: int
    floor: int
    shard: int
    received_at_us: int
    """Gateway wall clock at arrival, microseconds since 1970-01-01 UTC."""
    clock: Clock
    content: pa.RecordBatch | Rejected
    """The rows; or why there are none: the device made the batch wrong, so its seq is stepped over."""
    topic: str
    payload: bytes
    """Kept for quarantine until the commit."""
    sent_at_us: int = 0
    """Device wall clock at sending, microseconds since 1970-01-01 UTC."""
    held_bytes: int = 0
    """Taken of the gateway's memory budget for this batch (see `gateway.budget`)."""

    @property
    def size_bytes(self) -> int:
        """What this batch takes of the gateway's memory budget."""
        rows = self.content.nbytes if isinstance(self.content, pa.RecordBatch) else 0
        return len(self.payload) + rows + 512


class StreamTable(Protocol):
    """One stream's table in the lake, as of the last `refresh` (see `lake.raw.RawTable`)."""

    @property
    def life(self) -> int:
        """Another number whenever a refresh found a table that may be another: beliefs of before may be about that."""

    def refresh(self) -> None:
        """See the latest commit."""

    def watermarks(self, lanes: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
        """Watermark of each (device, epoch), 0 where there is none."""

    def shard_counter(self, shard: int) -> int:
        """How often rows of this shard were committed."""

    def unfit(self, schema: pa.Schema) -> Rejected | None:
        """Why batches of this schema cannot stand in the table; None where they can.

        A schema that fits extends what the next is judged against, until the next `refresh`.
        """

    def append(
        self,
        batches: Sequence[RawBatch],
        watermarks: Mapping[tuple[str, str], int],
        shard_counters: Mapping[int, int],
    ) -> AppendResult:
        """Commit rows, watermarks and counters in one atomic act, on the refreshed handle."""


class QuarantineTable(Protocol):
    """Where whole payloads stand that cannot become rows (see `lake.quarantine.QuarantineTable`)."""

    def append(self, records: Sequence[QuarantineRecord]) -> None:
        """Commit records; a repeated key is harmless."""
