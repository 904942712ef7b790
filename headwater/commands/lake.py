"""`headwater lake …`: SQL over the lake, its streams, its latest rows."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs
from headwater.commands.options import Data, Json, Lake

if TYPE_CHECKING:
    import pyarrow as pa

    from lake.query import Lake as OpenLake

    Write = Callable[[Iterable[pa.RecordBatch]], None]

app = typer.Typer(name="lake", help="SQL over the lake, its streams, its latest rows.", no_args_is_help=True)


class Format(StrEnum):
    """How rows are written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    ARROW = "arrow"
    PARQUET = "parquet"


Form = Annotated[
    Format, typer.Option("--format", metavar="table|json|csv|arrow|parquet", help="How rows are written to stdout.")
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
    form: Form = Format.TABLE,
    at: At = None,
    json: Json = False,
) -> None:
    """Run one SQL query. Streams with a dot or a dash in their name need quotes: "headwater.events".

    `--format json` is one array, --json one line per row. Where the data folder's stack is stopped, its object store is
    started for the query.
    """
    with _opened(lake, data, form, json) as (opened, write):
        write(opened.read(query, at=parse_at(at)))


@app.command()
def streams(lake: Lake = None, data: Data = None, form: Form = Format.TABLE, json: Json = False) -> None:
    """The streams of the lake: rows, devices, first and last reading, version, size."""
    with _opened(lake, data, form, json) as (opened, write):
        from headwater.rows import pieces

        write(pieces(opened.streams()))


@app.command()
def head(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Name of the stream.")],
    lake: Lake = None,
    data: Data = None,
    rows: Annotated[int, typer.Option("--rows", "-n", metavar="N", help="How many.")] = 10,
    form: Form = Format.TABLE,
    at: At = None,
    json: Json = False,
) -> None:
    """The latest rows of a stream."""
    with _opened(lake, data, form, json) as (opened, write):
        from headwater.rows import pieces

        write(pieces(opened.head(stream, rows, at=parse_at(at))))


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
def _opened(lake: str | None, data: str | None, form: Format, json: bool) -> Iterator[tuple[OpenLake, Write]]:
    """The lake that is meant, open, and how to write what it answers."""
    # Quiet: an object store that is started for one query has its own warnings, which are nobody's here.
    logs.configure(quiet=True)
    with extras.imports("gateway", "headwater lake"):
        from headwater.lake_access import find_store, opened_store
        from headwater.rows import write_rows
        from lake.query import Lake

    if not json and form in (Format.ARROW, Format.PARQUET) and sys.stdout.isatty():
        raise ConfigurationError(f"--format {form} is bytes, and stdout is a terminal; send it to a file with > FILE")
    with opened_store(find_store(lake, data, os.environ)) as store:
        opened = Lake(store)
        try:
            yield opened, lambda batches: write_rows(batches, "jsonl" if json else form)
        finally:
            opened.close()
