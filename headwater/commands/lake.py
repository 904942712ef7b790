"""`headwater lake …`: SQL over the lake, its streams, its latest rows."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs, output
from headwater.aside import Aside
from headwater.commands.options import Data, Json, Lake

if TYPE_CHECKING:
    import pyarrow as pa

    from lake.query import Lake as OpenLake

app = typer.Typer(name="lake", help="SQL over the lake, its streams, its latest rows.", no_args_is_help=True)


class Format(StrEnum):
    """How rows are written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    ARROW = "arrow"
    PARQUET = "parquet"


Form = Annotated[
    Format | None,
    typer.Option(
        "--format", metavar="table|json|csv|arrow|parquet", help="How rows are written to stdout; else a table."
    ),
]
At = Annotated[
    str | None,
    typer.Option("--at", metavar="VERSION|TIME", help="The lake as it was: a version number, or an ISO 8601 time."),
]


@app.command()
def sql(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="SQL of DuckDB; every stream is a view.")],
    lake: Lake = None,
    data: Data = None,
    form: Form = None,
    at: At = None,
    json: Json = False,
) -> None:
    """Run one SQL query. Streams with a dot or a dash in their name need quotes: "headwater.events".

    `--format json` is one array, --json one line per row; both at once are refused. Where the data folder's stack is
    stopped, its object store is started for the query.
    """
    moment = parse_at(at)
    with _opened(lake, data, form, json) as asked, _naming_at(at):
        asked.write(asked.lake.read(query, at=moment))


@app.command()
def streams(lake: Lake = None, data: Data = None, form: Form = None, json: Json = False) -> None:
    """The streams of the lake: rows, devices, first and last reading, version, size."""
    with _opened(lake, data, form, json) as asked:
        found = asked.aside.run(asked.lake.streams)
        asked.write_table(found)
        if not found.num_rows:
            output.complain(f"note: {asked.aside.run(asked.lake.why_empty)}")


@app.command()
def head(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Name of the stream.")],
    lake: Lake = None,
    data: Data = None,
    rows: Annotated[int, typer.Option("--rows", "-n", metavar="N", help="How many.")] = 10,
    form: Form = None,
    at: At = None,
    json: Json = False,
) -> None:
    """The latest rows of a stream, or of gaps, quarantine or a control table such as devices."""
    moment = parse_at(at)
    with _opened(lake, data, form, json) as asked, _naming_at(at):
        asked.write_table(asked.aside.run(lambda: asked.lake.head(stream, rows, at=moment)))


def parse_at(text: str | None) -> int | datetime | None:
    """A version number or a time.

    Raises:
        ConfigurationError: it is neither.
    """
    if text is None:
        return None
    if re.fullmatch(r"\d{1,18}", text):
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--at {text!r} is neither a version number nor an ISO 8601 time such as 2026-11-21T12:00:00Z"
        ) from error
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


@contextmanager
def _naming_at(at: str | None) -> Iterator[None]:
    """A version that a table does not have, in words of the option that asked for it."""
    from lake.errors import NoSuchVersionError

    try:
        yield
    except NoSuchVersionError as error:
        raise NoSuchVersionError(f"--at {at}: {error}") from error


class _Asked(NamedTuple):
    """The lake that is meant, where to ask it, and how to write what it answers."""

    lake: OpenLake
    aside: Aside
    form: str

    def write(self, batches: Iterator[pa.RecordBatch]) -> None:
        from headwater.rows import write_rows

        write_rows(self.aside.each(batches), self.form)

    def write_table(self, table: pa.Table) -> None:
        from headwater.rows import pieces, write_rows

        write_rows(pieces(table), self.form)


@contextmanager
def _opened(lake: str | None, data: str | None, form: Format | None, json: bool) -> Iterator[_Asked]:
    """Open the lake that is meant."""
    if json and form is not None:
        raise ConfigurationError(f"--json is one JSON object per line, --format {form} is not; give one of the two")
    # Quiet: an object store that is started for one query has its own warnings, which are nobody's here.
    logs.configure(quiet=True)
    with extras.imports("gateway", "headwater lake"):
        from headwater.lake_access import opened_store
        from lake.query import Lake

    if form in (Format.ARROW, Format.PARQUET) and sys.stdout.isatty():
        raise ConfigurationError(f"--format {form} is bytes, and stdout is a terminal; send it to a file with > FILE")
    with opened_store(lake, data, os.environ) as store, Aside() as aside:
        opened = aside.run(lambda: Lake(store))
        aside.interrupt = opened.interrupt
        try:
            yield _Asked(opened, aside, "jsonl" if json else form or Format.TABLE)
        finally:
            opened.close()
