"""`headwater label …`: what was true, told to the lake afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs, output
from headwater.commands.options import Data, Json, Lake

app = typer.Typer(name="label", help="What was true, told to the lake afterwards.", no_args_is_help=True)


@app.callback()
def label() -> None:
    """What was true, told to the lake afterwards."""


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".csv, .parquet, .json (an array) or .jsonl.")],
    stream: Annotated[str, typer.Option("--stream", metavar="STREAM", help="The stream that is labelled.")],
    columns: Annotated[
        str,
        typer.Option(
            "--columns", metavar="LIST", help="Where the file names them otherwise: device=d,start=a,end=b,label=l."
        ),
    ] = "",
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="The device of all rows; the file needs no column for it.")
    ] = "",
    unit: Annotated[
        str, typer.Option("--unit", metavar="s|ms|us", help="Of times that are numbers since 1970-01-01 UTC.")
    ] = "us",
    source: Annotated[
        str | None, typer.Option("--source", metavar="TEXT", help="Where the labels come from; else the file's name.")
    ] = None,
    allow_unknown: Annotated[
        bool,
        typer.Option(
            "--allow-unknown", help="Take labels of a stream or device, too, that the lake has nothing of yet."
        ),
    ] = False,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Add labels to control/labels: on this device, from start until end, this was so.

    What is there already is not added again, so a file may be imported twice, or once more when it has grown.
    """
    logs.configure(quiet=True)
    with extras.imports("gateway", "headwater label"):
        from headwater.lake_access import opened_store
        from lake.label_targets import check_targets
        from lake.labels import UNITS_US, Columns, import_labels, read_file

    if unit not in UNITS_US:
        raise ConfigurationError(f"--unit {unit!r} is none of {', '.join(UNITS_US)}")
    rows = read_file(file, stream, Columns(**_columns(columns, Columns._fields)), unit, device)
    with opened_store(lake, data, os.environ) as store:
        if not allow_unknown:
            check_targets(store, stream, {row["device"] for row in rows})
        done = import_labels(store, rows, source or file.name)
    if json:
        output.say_json(done)
        return
    output.say(f"{done.rows} rows in {file}: {done.added} added, {done.known} there already")


def _columns(text: str, known: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, column = part.partition("=")
        if not equals or name not in known or not column:
            raise ConfigurationError(f"--columns {part!r} is not NAME=COLUMN with a name of {', '.join(known)}")
        found[name] = column
    return found
