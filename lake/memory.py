"""The same port as `lake.raw.RawTable`, in memory: for models and tests of what stands on it.

It keeps the rules of the table format that matter for exactly-once, the dangerous ones included: a stale handle is
refused
if one of its application transactions moved or the columns changed, any other stale handle is not, and a lower
version of an application transaction is accepted without a word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from contract.errors import Rejected
from contract.names import TS
from lake.errors import CommitConflictError, StoreUnavailableError
from lake.parts import RawBatch, days_of
from lake.plan import BASE_COLUMNS, COLUMNS_MAX, Columns, WireSchemas, grow
from lake.raw import AppendResult, lane_app_id, shard_app_id

_LIVES = itertools.count(1)


class MemoryCommit(NamedTuple):
    """One version of a table."""

    batches: tuple[RawBatch, ...]
    transactions: Mapping[str, int]
    columns: Columns
    columns_changed: bool


class MemoryLake:
    """Tables by stream, shared between the handles of several gateways. Everything committed can be looked at."""

    def __init__(self) -> None:
        self.commits: dict[str, list[MemoryCommit]] = {}
        self.restored: dict[str, int] = {}
        """How often each table was restored."""

    def batches(self, stream: str) -> list[RawBatch]:
        """All committed batches of a stream, in the order of their commits."""
        return [batch for commit in self.commits.get(stream, ()) for batch in commit.batches]

    def restore(self, stream: str, version: int) -> None:
        """Put an older copy of a table, as of a version, in its place; -1: nothing."""
        del self.commits[stream][version + 1 :]
        self.restored[stream] = self.restored.get(stream, 0) + 1

    def transaction(self, stream: str, app_id: str, version: int | None = None) -> int:
        """Version of an application transaction as of a table version (default: the latest), 0 where there is none."""
        commits = self.commits.get(stream, [])
        seen = commits[: None if version is None else version + 1]
        return next((commit.transactions[app_id] for commit in reversed(seen) if app_id in commit.transactions), 0)


class MemoryRawTable:
    """One stream's table as one gateway sees it (see `lake.raw.RawTable`)."""

    def __init__(
        self,
        lake: MemoryLake,
        stream: str,
        *,
        max_clock_skew_s: float = 31 * 86_400,
        columns_max: int = COLUMNS_MAX,
    ) -> None:
        self.stream = stream
        self._lake = lake
        self._columns_max = columns_max
        self._max_clock_skew_us = int(max_clock_skew_s * 1_000_000)
        self._version = -1
        self.life = next(_LIVES)
        self._restored = lake.restored.get(stream, 0)
        self._columns: Columns = BASE_COLUMNS
        self._planned: Columns = BASE_COLUMNS
        self._wire_schema = WireSchemas()

    @property
    def version(self) -> int:
        """Version of the table as of the last refresh, -1 where there is none."""
        return self._version

    def refresh(self) -> None:
        """See the latest commit."""
        restored = self._lake.restored.get(self.stream, 0)
        if self._restored != restored:
            self._restored, self.life = restored, next(_LIVES)
        commits = self._lake.commits.get(self.stream, [])
        self._version = len(commits) - 1
        self._columns = self._planned = commits[-1].columns if commits else BASE_COLUMNS

    def watermark(self, device: str, epoch: str) -> int:
        """Highest committed seq of a lane, 0 where there is none, as of the last refresh."""
        return self._lake.transaction(self.stream, lane_app_id(device, epoch), self._version)

    def watermarks(self, lanes: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Watermarks of many lanes."""
        return {lane: self.watermark(*lane) for lane in lanes}

    def shard_counter(self, shard: int) -> int:
        """How many commits brought rows or watermarks of this shard, as of the last refresh."""
        return self._lake.transaction(self.stream, shard_app_id(shard), self._version)

    def unfit(self, schema: pa.Schema) -> Rejected | None:
        """Why batches of this wire schema cannot stand in the table; None where they can."""
        try:
            self._planned = grow(self._planned, self._wire_schema(schema), self.stream, self._columns_max)
        except Rejected as rejected:
            return rejected
        return None

    def append(
        self,
        batches: Sequence[RawBatch],
        watermarks: Mapping[tuple[str, str], int],
        shard_counters: Mapping[int, int],
    ) -> AppendResult:
        """Commit rows, watermarks and counters in one atomic act, on the handle as of the last refresh.

        Raises:
            CommitConflictError: as `lake.raw.RawTable` does.
            StoreUnavailableError: the table was restored since the last refresh.
            Rejected: a batch's schema is unfit.
        """
        if self._restored != self._lake.restored.get(self.stream, 0):
            raise StoreUnavailableError(f"table {self.stream} is another one by now; refresh and check again")
        needed = dict(self._columns)
        for batch in batches:
            unfit = self.unfit(batch.batch.schema)
            if unfit is not None:
                raise unfit
            for slot in self._wire_schema(batch.batch.schema).slots:
                needed[slot.field.name] = self._planned[slot.field.name]
        changed = tuple(name for name, field in needed.items() if self._columns.get(name) is not field)
        transactions = {lane_app_id(*lane): seq for lane, seq in watermarks.items()}
        transactions |= {shard_app_id(shard): count for shard, count in shard_counters.items()}
        commits = self._lake.commits.setdefault(self.stream, [])
        since = commits[self._version + 1 :]
        if since and (changed or self._version < 0):
            raise CommitConflictError(f"table {self.stream} moved while its columns changed; refresh and check again")
        for commit in since:
            if commit.columns_changed or not transactions.keys().isdisjoint(commit.transactions):
                raise CommitConflictError(f"table {self.stream} moved; refresh and check again")
        columns: Columns = needed if changed or not commits else commits[-1].columns
        commits.append(MemoryCommit(tuple(batches), transactions, columns, bool(changed) or self._version < 0))
        rows = sum(batch.batch.num_rows for batch in batches)
        return AppendResult(
            rows=rows,
            batches=len(batches),
            files=0,
            bytes=0,
            skewed_rows=sum(self._skewed(batch) for batch in batches),
            added_columns=changed,
        )

    def _skewed(self, batch: RawBatch) -> int:
        ts = batch.batch.column(TS).view(pa.int64()).to_numpy()
        received = np.full(len(ts), batch.received_at_us, np.int64)
        return days_of(ts, received, self._max_clock_skew_us)[1]
