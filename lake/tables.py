"""Small tables of the lake with columns of their own: `control/…` and `inbox/…`. Appended to, never changed.

State such as "which devices are there" is a fold over such a table. Where what is appended depends on what was read,
the appender names the version of the fold it saw (check-and-set): of two that saw the same, one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import msgspec
import pyarrow as pa

from lake.columns import DATE
from lake.delta import DeltaHandle, wall_clock_ms
from lake.errors import CommitConflictError, CorruptLakeError
from lake.parquet import encode
from lake.store import Store

CHECK_AND_SET = "check-and-set"
"""Application transaction that counts the appends which named what they had seen."""
_CONFIGURATION = {"delta.checkpointInterval": "100"}


class ControlTable:
    """One small table. Not thread-safe; holds one Delta handle."""

    def __init__(
        self, store: Store, path: str, schema: pa.Schema, *, clock_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        """Touch nothing yet.

        Args:
            store: where the lake is.
            path: the table's folder in it, such as `control/devices`.
            schema: its columns, of types that Delta has; the partition column `date` (day of writing) comes on top.
            clock_ms: wall clock, milliseconds since 1970-01-01 UTC.
        """
        self.schema = schema
        self._stored = pa.schema([field.with_nullable(True) for field in schema])
        self._clock_ms = clock_ms
        self._handle = DeltaHandle(store, path, clock_ms)

    @property
    def version(self) -> int:
        """Number of the last check-and-set as of the last refresh, 0 where there was none."""
        return self._handle.transaction(CHECK_AND_SET)

    def refresh(self) -> None:
        """See the latest commit. That there is no table yet is fine.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        self._handle.refresh()

    @property
    def life(self) -> int:
        """Another number whenever a refresh found a table that may be another: what was known of it may not hold."""
        return self._handle.life

    def read(self) -> pa.Table:
        """All rows as of the last refresh, in the order of nothing.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        if self._handle.version < 0:
            return self._stored.empty_table()
        found = self._handle.read()
        columns = [
            found.column(field.name) if field.name in found.column_names else pa.nulls(found.num_rows, field.type)
            for field in self._stored
        ]
        return pa.table(columns, schema=self._stored)

    def append(self, rows: pa.Table, *, expected: int | None = None) -> None:
        """Commit rows; to be followed by `refresh`.

        Args:
            rows: in the table's schema.
            expected: the `version` on which these rows depend; None where they depend on nothing. Without it a repeat
                after `StoreUnavailableError` may add the rows twice.

        Raises:
            CommitConflictError: it is another version by now, or the table was made meanwhile. Nothing was committed:
                refresh, look again, decide again.
            StoreUnavailableError: it is not known whether it was committed. Refresh and look.
        """
        if expected is not None and self.version != expected:
            raise CommitConflictError(
                f"table {self._handle.path} is at {self.version}, not at {expected} as expected; refresh and look again"
            )
        if self._handle.version < 0:
            self._handle.create(self._stored.append(pa.field(DATE, pa.date32())), _CONFIGURATION)
        self._check_columns()
        rows = rows.select(self._stored.names).cast(self._stored).combine_chunks()
        date = datetime.fromtimestamp(self._clock_ms() / 1000, UTC).date().isoformat()
        files = []
        if rows.num_rows:
            stats = msgspec.json.encode({"numRecords": rows.num_rows})
            files.append(self._handle.put_file(date, encode(rows, frozenset(), frozenset()), stats))
        self._handle.commit(files, {} if expected is None else {CHECK_AND_SET: expected + 1})

    def _check_columns(self) -> None:
        """Columns that a newer release knows are added; a column of another type is somebody else's table."""
        have = {field.name: field for field in self._handle.schema}
        lacking = [field for field in self._stored if field.name not in have]
        for field in self._stored:
            if field.name in have and have[field.name].type != field.type:
                raise CorruptLakeError(
                    f"column {field.name} of {self._handle.path} is {have[field.name].type}, not {field.type}; "
                    "move that table away"
                )
        if lacking:
            self._handle.add_columns(lacking)
