"""Options that several commands have: spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Answer with JSON on stdout: one object, or one line per row.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also log the lifecycle, on stderr.")]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DIR", help="Data folder; else $HEADWATER_DATA, else ./headwater-data."),
]
Lake = Annotated[
    str | None,
    typer.Option(
        "--lake",
        metavar="URL",
        help="file:///folder or s3://bucket/prefix (keys: AWS_… variables); else $HEADWATER_LAKE, else the lake of "
        "the stack in the data folder.",
    ),
]
Broker = Annotated[
    str | None,
    typer.Option(
        "--broker",
        metavar="URL",
        help="mqtt://host:1883 or mqtts://host:8883; else $HEADWATER_BROKER, else the broker of the stack in the data "
        "folder.",
    ),
]
Config = Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration file.")]
