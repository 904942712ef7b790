"""One Delta table through one handle: what `lake.raw` and the other tables have in common. Not thread-safe.

A handle stays at the version it was refreshed to, also after its own commit: the format then refuses a commit whose
application transactions moved meanwhile, and that is what exactly-once stands on.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import structlog
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.transaction import AddAction, RemoveAction

from lake.columns import DATE
from lake.errors import CommitConflictError, ObjectMissingError
from lake.log import NAME, TransactionLog
from lake.store import Store

_log = structlog.get_logger()
_LIVES = itertools.count(1)


def wall_clock_ms() -> int:
    """Milliseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1_000_000


class DeltaHandle:
    """A table partitioned by `date`, as of the last refresh."""

    def __init__(self, store: Store, path: str, clock_ms: Callable[[], int] = wall_clock_ms) -> None:
        """Touch nothing yet.

        Args:
            store: where the lake is.
            path: the table's folder in it.
            clock_ms: wall clock for the modification times of files, milliseconds since 1970-01-01 UTC.
        """
        self.path = path
        self._store = store
        self._clock_ms = clock_ms
        self._table: DeltaTable | None = None
        self._log = TransactionLog(store, path)
        self._mark: tuple[int, str] = (-1, "")
        """A version that was seen, and the mark of its commit."""
        self._own: set[str] = set()
        """Names of commits by this handle that no refresh has seen yet."""
        self._life = 0

    @property
    def version(self) -> int:
        """Version as of the last refresh, -1 where there is no table."""
        return -1 if self._table is None else self._table.version()

    @property
    def life(self) -> int:
        """Another number whenever a refresh found a table that may be another one, restored or made again.

        No two handles of a process have the same.
        """
        return self._life

    @property
    def schema(self) -> pa.Schema:
        """Schema as of the last refresh, empty where there is no table."""
        return pa.schema([]) if self._table is None else pa.schema(self._table.schema().to_arrow())

    def refresh(self) -> None:
        """See the latest commit. That there is no table is fine.

        A table that was deleted, or replaced by an older copy, is opened anew: delta-rs goes by version numbers alone,
        and would go on from a version that is not there any more. Where the copy goes as far as this handle has seen,
        nothing shows but that commits of its own, which it has not seen, are gone.

        Raises:
            StoreUnavailableError: the store did not answer. The next refresh opens the table anew.
        """
        table, self._table = self._table, None
        own, self._own = self._own, set()
        if table is not None and not self._stands(table.version()):
            _log.warning("table_opened_anew", table=self.path, lake=self._store.url, version=table.version())
            table = None
        base = None if table is None else table.version()
        if table is None:
            self._life, self._mark = next(_LIVES), (-1, "")
        try:
            with self._store.translated(f"open table {self.path}"):
                if table is None:
                    self._log.forget()
                    table = self._open()
                else:
                    table.update_incremental()
        except ObjectMissingError:
            self._log.forget()
            return
        self._log.advance(table.version())
        self._see(table.version())
        if base is not None and own and not own <= self._log.names(base + 1, table.version()):
            _log.warning("table_lost_commits", table=self.path, lake=self._store.url, version=base)
            self._life = next(_LIVES)
        self._table = table

    def transaction(self, app_id: str) -> int:
        """Version of an application transaction as of the last refresh, 0 where there is none.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        if self._table is None:
            return 0
        version = self._log.get(app_id)
        if version is None:
            with self._store.translated(f"read table {self.path}"):
                version = self._table.transaction_version(app_id) or 0
        return version

    def create(self, schema: pa.Schema, configuration: Mapping[str, str]) -> None:
        """Make the table.

        Raises:
            CommitConflictError: somebody else made it, or committed to it already.
            StoreUnavailableError: it is not known whether it was made.
        """
        with self._store.translated(f"create table {self.path}"):
            table = DeltaTable.create(
                self._store.table_uri(self.path),
                Schema.from_arrow(schema),
                mode="error",
                partition_by=[DATE],
                configuration=configuration,
                storage_options=self._store.storage_options,
            )
        self._moved_alone(table, -1)

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Add columns, or fields to the structs of columns, in a commit of its own.

        Raises:
            CommitConflictError: somebody else committed since the last refresh.
            StoreUnavailableError: it is not known whether they were added.
        """
        table, self._table = self._table, None
        if table is None:
            raise CommitConflictError(f"table {self.path} is not open; refresh and check again")
        base = table.version()
        with self._store.translated(f"add columns to table {self.path}"):
            table.alter.add_columns(list(Schema.from_arrow(pa.schema(fields)).fields))
        self._moved_alone(table, base)

    def put_file(self, date: str, data: pa.Buffer, stats: bytes) -> AddAction:
        """Write a Parquet file under a name that nobody else uses. It counts once it is committed.

        Args:
            date: partition, YYYY-MM-DD.
            data: the file.
            stats: Delta file statistics, JSON.

        Raises:
            StoreUnavailableError: the store did not take it.
        """
        name = f"{DATE}={date}/part-{secrets.token_hex(16)}.zstd.parquet"
        self._store.put(f"{self.path}/{name}", data)
        return AddAction(name, data.size, {DATE: date}, self._clock_ms(), True, stats.decode())

    def commit(self, files: Sequence[AddAction], transactions: Mapping[str, int]) -> None:
        """Commit files and application transactions in one atomic act. The handle stays where it was refreshed to.

        Raises:
            CommitConflictError: one of the transactions moved since the last refresh, or the columns changed.
            StoreUnavailableError: it is not known whether it was committed.
        """
        table = self._table
        if table is None:
            raise CommitConflictError(f"table {self.path} is not open; refresh and check again")
        actions: list[AddAction | RemoveAction] = list(files)
        name = secrets.token_hex(16)
        with self._store.translated(f"commit to table {self.path}"):
            table.create_write_transaction(
                actions,
                mode="append",
                schema=table.schema(),
                partition_by=[DATE],
                commit_properties=CommitProperties(
                    custom_metadata={NAME: name},
                    app_transactions=[Transaction(app_id, version) for app_id, version in transactions.items()],
                ),
            )
        self._own.add(name)
        self._store.sync_commits(self.path, table.version())

    def read(self) -> pa.Table:
        """All rows as of the last refresh.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        if self._table is None:
            return self.schema.empty_table()
        with self._store.translated(f"read table {self.path}"):
            return self._table.to_pyarrow_table()

    def _stands(self, version: int) -> bool:
        """Whether the commit of a version is the one that was seen."""
        return self._mark == (version, self._store.mark(self._commit_path(version))) and self._mark[1] != ""

    def _see(self, version: int) -> None:
        """Know the commit of a version again."""
        if self._mark[0] != version:
            self._mark = version, self._store.mark(self._commit_path(version))

    def _commit_path(self, version: int) -> str:
        return f"{self.path}/_delta_log/{version:020d}.json"

    def _open(self) -> DeltaTable:
        return DeltaTable(self._store.table_uri(self.path), storage_options=self._store.storage_options)

    def _moved_alone(self, table: DeltaTable, base: int) -> None:
        """The caller judged the table at version `base`; a commit that slipped in between may have moved its lanes."""
        self._store.sync_commits(self.path, base)
        if table.version() != base + 1:
            raise CommitConflictError(
                f"table {self.path} went from version {base} to {table.version()} while its columns changed; "
                "refresh and check again"
            )
        self._see(table.version())
        self._table = table
