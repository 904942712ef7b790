"""Event tables that several processes decide over: look, decide, commit by check-and-set, and look again if refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from lake.errors import CommitConflictError

ATTEMPTS_MAX = 8
TIMESTAMP = pa.timestamp("us", tz="UTC")
Row = Mapping[str, Any]
"""One row by column; times are whole microseconds since 1970-01-01 UTC."""


class Table(Protocol):
    """The table under it (see `lake.tables.ControlTable`). Not thread-safe."""

    @property
    def version(self) -> int:
        """Number of the last check-and-set as of the last refresh."""

    @property
    def life(self) -> int:
        """Another number whenever a refresh found a table that may be another one, restored or made again."""

    def refresh(self) -> None:
        """See the latest commit."""

    def read(self) -> pa.Table:
        """All rows as of the last refresh."""

    def append(self, rows: pa.Table, *, expected: int | None = None) -> None:
        """Commit rows; refused when `expected` is given and is not the version any more."""


class Ledger:
    """One event table. Rows are kept in memory while nobody adds any. Not thread-safe.

    Args:
        open_table: gives the table, anew when credentials changed.
        schema: its columns; `sequence`, an int64, numbers the commits.
        on_conflict: called each time that somebody else was first.
    """

    def __init__(
        self, open_table: Callable[[], Table], schema: pa.Schema, on_conflict: Callable[[], None] = lambda: None
    ) -> None:
        self._open_table, self._schema, self._on_conflict = open_table, schema, on_conflict
        self._life = 0
        self._seen: tuple[int, list[Row]] = (0, [])

    @property
    def version(self) -> int:
        """Number of the last check-and-set as of the last look; inside `act`, of what `decide` is given."""
        return self._seen[0]

    def look(self) -> list[Row]:
        """All rows as of now, in the order of their commits; the same list while they are the same.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return self._look(self._open_table())

    def _look(self, table: Table) -> list[Row]:
        table.refresh()
        if (table.life, table.version) != (self._life, self.version):
            self._seen = table.version, rows_of(table.read())
            self._life = table.life
        return self._seen[1]

    def act(self, decide: Callable[[list[Row]], Sequence[Row]]) -> list[Row]:
        """Look, decide, commit; where somebody else was first, look and decide again.

        Args:
            decide: what to add to the rows as they are, without `sequence`; may refuse by raising.

        Returns:
            What was added.

        Raises:
            CommitConflictError: others were first `ATTEMPTS_MAX` times.
            StoreUnavailableError: the store did not answer; whether the rows are in is not known: look.
        """
        for attempt in range(1, ATTEMPTS_MAX + 1):
            # One handle for looking and committing: it is what makes the check a check.
            table = self._open_table()
            rows = self._look(table)
            version = self.version
            added: list[Row] = [{**row, "sequence": version + 1} for row in decide(rows)]
            if not added:
                return []
            try:
                table.append(table_of(added, self._schema), expected=version)
                return added
            except CommitConflictError:
                self._on_conflict()
                if attempt == ATTEMPTS_MAX:
                    raise
        return []


def table_of(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table; what a row lacks is null."""
    columns = {}
    for field in schema:
        values = [row.get(field.name) for row in rows]
        timed = pa.types.is_timestamp(field.type)
        columns[field.name] = pa.array(values, pa.int64() if timed else field.type)
        if timed:
            columns[field.name] = columns[field.name].view(TIMESTAMP)
    return pa.table(columns, schema=schema)


def rows_of(table: pa.Table) -> list[Row]:
    """A table as rows, in the order of their `sequence`."""
    return sorted(values_of(table), key=lambda row: row["sequence"] or 0)


def values_of(table: pa.Table) -> list[dict[str, Any]]:
    """A table as rows, in its own order; times are whole microseconds."""
    columns = {
        name: (column.combine_chunks().view(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
