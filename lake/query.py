"""SQL over a lake: every stream a view, plus `gaps`, `quarantine` and the control tables, now or as they were.

Names, in this order: `gaps`, `quarantine`, tables of `control/` (such as `devices`), streams; and every table by its
path, such as "raw/vibration". A name with a dot or a dash needs double quotes.

Time travel: a time applies to every table of the query, each as of its last commit until then; a table that was made
later is empty. A version number is one of one table, so such a query may read one table only; a version for each table
(`Lake.versions` tells them) makes every later answer to the same question the same.

A question is one SELECT (or DESCRIBE, SUMMARIZE, SHOW TABLES, EXPLAIN): nothing that is asked can change the lake,
or read anything but the lake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from contract.names import EVENTS_STREAM
from lake import columns
from lake.catalog import At, Catalog, TableState, table_of
from lake.duck import QuerySettings, connect, identifier, interruptible
from lake.errors import QueryError, StoreUnavailableError, UnknownStreamError
from lake.gaps import NAME as GAPS
from lake.gaps import gaps_query, tells_closings
from lake.quarantine import PATH as QUARANTINE_PATH
from lake.quarantine import SCHEMA as QUARANTINE_SCHEMA
from lake.question import Question, one_line, read_question
from lake.raw import table_path
from lake.store import Store
from lake.views import empty_query, scan, view_query

BATCH_ROWS = 10_000
HEAD_ROWS_MAX = 1_000_000
"""They are sorted, and answered as one table."""
_LISTED_MAX = 20
Pins = Mapping[str, int]
"""A version of each table that a question reads, by path."""
_MISSING = re.compile(r"(?:Table|View) with name (.+?) does not exist")
STREAMS_SCHEMA = pa.schema(
    [
        ("stream", pa.string()),
        ("rows", pa.int64()),
        ("devices", pa.int64()),
        ("first_ts", pa.timestamp("us", "UTC")),
        ("last_ts", pa.timestamp("us", "UTC")),
        ("files", pa.int64()),
        ("bytes", pa.int64()),
        ("version", pa.int64()),
    ]
)


class Lake:
    """A lake to ask questions of. Safe to share between threads; each question sees one state of each table."""

    def __init__(self, store: Store, settings: QuerySettings | None = None) -> None:
        """Open DuckDB; the lake itself is read when it is asked.

        Raises:
            ConfigurationError: DuckDB or its extensions cannot be loaded.
        """
        self._store = store
        self._catalog = Catalog(store)
        self._connection = connect(store, settings or QuerySettings())
        self._cursors: set[duckdb.DuckDBPyConnection] = set()

    def close(self) -> None:
        """Free the memory. Readers that are still open fail."""
        self._connection.close()

    def interrupt(self) -> None:
        """End the questions that are being answered by other threads now: they raise QueryError.

        One that DuckDB has not begun with is missed: repeat it until the thread is back.
        """
        for cursor in tuple(self._cursors):
            cursor.interrupt()

    def sql(self, query: str, at: At | Pins = None) -> pa.Table:
        """Answer a question.

        Args:
            query: one SELECT.
            at: the lake as it was (see the module's text), or a version of each table; None: as it is.

        Raises:
            QueryError: it cannot be answered as it was asked; one sentence says why.
            UnknownStreamError: it names a table that is not there.
            StoreUnavailableError: the store did not answer.
        """
        with self._answering(query, at) as cursor, self._translated():
            return cursor.execute(query).to_arrow_table()

    def read(self, query: str, at: At | Pins = None) -> Iterator[pa.RecordBatch]:
        """Answer a question piece by piece, for answers that do not fit the memory. At least one batch comes, for the
        schema's sake.

        Raises:
            QueryError, UnknownStreamError, StoreUnavailableError: as `sql`, at the first batch or at a later one.
        """
        with self._answering(query, at) as cursor, self._translated():
            reader = cursor.execute(query).to_arrow_reader(BATCH_ROWS)
            empty = True
            for batch in reader:
                empty = False
                yield batch
            if empty:
                yield pa.RecordBatch.from_pylist([], schema=reader.schema)

    def versions(self, query: str) -> dict[str, int]:
        """The tables that a question reads, by path, each with its latest version: as `at` of `sql` or `read` they make
        the answer repeatable.

        Raises:
            QueryError: it cannot be read, or asks for `gaps`, which is of all tables.
            UnknownStreamError: it names a table that is not there.
            StoreUnavailableError: the store did not answer.
        """
        with self._cursor() as cursor:
            with self._translated():
                question = read_question(cursor, query)
            paths = self._paths(question)
        if GAPS in paths:
            raise QueryError("a question about gaps reads all tables, and has no versions; leave gaps out")
        states = {path: self._catalog.state(path) for path in paths.values()}
        return {path: state.version for path, state in sorted(states.items()) if state is not None}

    def head(self, stream: str, rows: int = 10, at: At = None) -> pa.Table:
        """The latest rows of a stream, latest first.

        Also of `gaps`, `quarantine` and the control tables, by their first column that is a time, where they have one.

        Raises:
            UnknownStreamError: there is no such stream.
            QueryError: it had no such version, or `rows` is not in 1..HEAD_ROWS_MAX.
            StoreUnavailableError: the store did not answer.
        """
        if not 1 <= rows <= HEAD_ROWS_MAX:
            raise QueryError(f"cannot show {rows} rows; ask for 1 to {HEAD_ROWS_MAX}, for more with SQL")
        if stream not in self._catalog.streams():
            return self._head_of_view(stream, rows, at)
        path = table_path(stream)
        since = "" if at is not None else self._since(path, rows)
        return self.sql(
            f"SELECT * FROM {identifier(path)}{since} ORDER BY ts DESC, _seq DESC, _row DESC LIMIT {rows}", at
        )

    def _head_of_view(self, name: str, rows: int, at: At) -> pa.Table:
        if name != GAPS and name not in self._catalog.paths():
            raise self._unknown(name)
        view = f"FROM {identifier(name)}"
        times = [field.name for field in self.sql(f"{view} LIMIT 0", at).schema if pa.types.is_timestamp(field.type)]
        order = f"{identifier(times[0])} DESC" if times else "ALL"
        return self.sql(f"{view} ORDER BY {order} LIMIT {rows}", at)

    def streams(self) -> pa.Table:
        """One row per stream: rows, devices, first and last `ts` (to the millisecond), files, bytes, version.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        found = []
        for name in self._catalog.streams():
            state = self._catalog.state(table_path(name))
            if state is not None:
                found.append(self._describe(name, state))
        return pa.Table.from_pylist(found, schema=STREAMS_SCHEMA)

    def why_empty(self) -> str:
        """Why `streams` lists nothing, and what to do; for people.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        if any(self._store.folders(folder) for folder in ("raw", "control", "inbox")):
            return f"no reading was committed to {self._store.url} yet; see whether devices and gateway run"
        return (
            f"{self._store.url} holds no Headwater lake (no folder raw, control or inbox): no gateway has written "
            "there; name the lake of your gateway with --lake"
        )

    def _describe(self, name: str, state: TableState) -> dict[str, Any]:
        files = self._catalog.files(state)
        row: dict[str, Any] = {"stream": name, "version": state.version, "files": files.num_rows}
        row["rows"] = pc.sum(files.column("num_records")).as_py() or 0
        row["bytes"] = pc.sum(files.column("size_bytes")).as_py() or 0
        row |= self._span(state, files)
        return row

    def _span(self, state: TableState, files: pa.Table) -> dict[str, Any]:
        """Number of devices, first and last `ts`; from the log where it says so, else from the rows."""
        low, high = (files.column(f"{end}.ts") if f"{end}.ts" in files.column_names else None for end in ("min", "max"))
        devices = self._catalog.devices(state)
        if devices is not None and low is not None and high is not None and not low.null_count:
            return {"devices": devices, "first_ts": pc.min(low).as_py(), "last_ts": pc.max(high).as_py()}
        question = f"SELECT count(DISTINCT {columns.DEVICE}), min(ts), max(ts) FROM {scan(state.uri, state.version)}"
        with self._cursor() as cursor, self._translated():
            answer = cursor.execute(question).to_arrow_table()
        return dict(zip(("devices", "first_ts", "last_ts"), (column[0] for column in answer.columns), strict=True))

    def _since(self, path: str, rows: int) -> str:
        """The dates that surely hold the latest rows, so that not the whole table is sorted."""
        state = self._catalog.state(path)
        if state is None:
            return ""
        files = self._catalog.files(state)
        if not files.num_rows:
            return ""
        dates = (
            files.group_by("partition.date")
            .aggregate([("num_records", "sum")])
            .sort_by([("partition.date", "descending")])
        )
        held = 0
        for date, count in zip(dates.column(0).to_pylist(), dates.column(1).to_pylist(), strict=True):
            held += count
            if held >= rows:
                return f" WHERE {columns.DATE} >= DATE '{date}'"
        return ""

    @contextmanager
    def _cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of its own for one question, which `interrupt` knows."""
        with interruptible(), self._connection.cursor() as cursor:
            self._cursors.add(cursor)
            try:
                yield cursor
            finally:
                self._cursors.discard(cursor)

    @contextmanager
    def _answering(self, query: str, at: At | Pins) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that has a view for every table the query names, all of one moment."""
        if isinstance(at, datetime) and at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        with self._cursor() as cursor:
            with self._translated():
                question = read_question(cursor, query)
            for name, text in self._views(question, at).items():
                with self._translated():
                    cursor.execute(f"CREATE TEMP VIEW {identifier(name)} AS {text}")
            yield cursor

    def _paths(self, question: Question) -> dict[str, str]:
        """The table behind each name that the lake knows; other names may be what the query itself defines."""
        if not (question.tables or question.qualified or question.all_tables):
            return {}
        known = self._catalog.paths()
        if question.all_tables:
            known |= {path: path for path in self._catalog.predictions()}
        for name in question.qualified & known.keys():
            raise UnknownStreamError(f'the name {name} has a dot in it: write "{name}" in double quotes')
        names = question.tables | (known.keys() | {GAPS} if question.all_tables else set())
        found = {name: path for name in names if (path := known.get(name) or table_of(name)) is not None}
        return found | ({GAPS: GAPS} if GAPS in names else {})

    def _views(self, question: Question, at: At | Pins) -> dict[str, str]:
        """The SELECT behind each of these names."""
        paths = self._paths(question)
        if isinstance(at, int) and (len(set(paths.values())) > 1 or GAPS in paths):
            raise QueryError(
                f"version {at} is one of one table, and the query reads {_listed(sorted(paths))}; give a time instead"
            )
        if not isinstance(at, Mapping):
            views = {name: text for name, path in paths.items() if name != GAPS and (text := self._view(path, at))}
            return views | ({GAPS: self._gaps(at)} if GAPS in paths else {})
        if lacking := sorted(name for name, path in paths.items() if path not in at):
            raise QueryError(
                f"no version is known of {_listed(lacking)}; write something there first (labels come with: headwater "
                "label import), or give a version for each table of the query"
            )
        return {name: text for name, path in paths.items() if (text := self._view(path, at[path]))}

    def _view(self, path: str, at: At) -> str | None:
        state = self._catalog.state(path, at)
        if path == QUARANTINE_PATH:
            if state is None:
                return empty_query(QUARANTINE_SCHEMA)
            # A repeat is harmless: one record of each key.
            once = "QUALIFY row_number() OVER (PARTITION BY key ORDER BY received_at) = 1"
            return f"{view_query(state.uri, state.version, state.schema)} {once}"
        if state is not None:
            return view_query(state.uri, state.version, state.schema)
        latest = None if at is None else self._catalog.state(path)
        return None if latest is None else view_query(latest.uri, latest.version, latest.schema) + " WHERE false"

    def _gaps(self, at: At) -> str:
        states = {name: self._catalog.state(table_path(name), at) for name in self._catalog.streams()}
        sources = {name: scan(state.uri, state.version) for name, state in states.items() if state is not None}
        quarantine = self._catalog.state(QUARANTINE_PATH, at)
        events = states.get(EVENTS_STREAM)
        return gaps_query(
            sources,
            None if quarantine is None else scan(quarantine.uri, quarantine.version),
            sources[EVENTS_STREAM] if events is not None and tells_closings(events.schema) else None,
        )

    def _unknown(self, name: str) -> UnknownStreamError:
        known = self._catalog.streams()
        what = f"it has {_listed(known)}" if known else "it has none yet"
        return UnknownStreamError(f"there is no stream or table {name!r} in {self._store.url}; {what}")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what DuckDB raises into one clear sentence."""
        try:
            yield
        except duckdb.CatalogException as error:
            missing = _MISSING.search(str(error))
            if missing is not None:
                raise self._unknown(missing[1].strip('"')) from error
            raise QueryError(f"the query cannot be answered: {one_line(str(error))}") from error
        except (duckdb.HTTPException, duckdb.IOException) as error:
            raise StoreUnavailableError(f"cannot read {self._store.url} ({one_line(str(error))[:300]})") from error
        except (duckdb.Error, pa.ArrowException) as error:
            raise QueryError(f"the query cannot be answered: {one_line(str(error))[:1000]}") from error


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED_MAX])
    return shown if len(names) <= _LISTED_MAX else f"{shown} and {len(names) - _LISTED_MAX} more"
