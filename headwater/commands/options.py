"""Options that several commands have: spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contract.errors import ConfigurationError

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
Keys = Annotated[
    str | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        help="Folder of keys; else $HEADWATER_KEYS, else `keys` in the data folder, else ~/.config/headwater/keys.",
    ),
]
By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who does it, for the record; else your login.")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="Why, for the record; must be given.")]
Config = Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration file.")]


def check_above_zero(option: str, value: float | None) -> None:
    """Refuse a number that is not above 0; None is an option that was not given.

    Raises:
        ConfigurationError: naming the option as it is typed.
    """
    if value is not None and not value > 0:
        raise ConfigurationError(f"{option} {value:g}; choose a number above 0")
