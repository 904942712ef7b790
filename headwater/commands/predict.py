"""`headwater predict`: what a release says of a stream's history, into the lake."""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import UTC, datetime
from typing import Annotated

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs, output
from headwater.aside import Aside
from headwater.commands.options import Data, Json, Lake


def predict(
    release: Annotated[str, typer.Argument(metavar="MODEL[@VERSION]", help="The release; else the newest approved.")],
    stream: Annotated[
        str, typer.Option("--stream", metavar="NAME", help="Score this stream; else the one it was trained on.")
    ] = "",
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Only windows that end then or later, ISO 8601.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="Only windows that end before, ISO 8601.")
    ] = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Score a stream's history with a release, into the table predictions/MODEL of the lake.

    Every window is written once: run it again when the stream has grown, or after it was interrupted, and it goes on
    where it was. Read the answer with: headwater lake sql 'SELECT * FROM "predictions/MODEL"'.
    """
    logs.configure(quiet=True)
    with extras.imports("gateway", "headwater predict"):
        from headwater.lake_access import opened_store
        from headwater.progress import Bars
        from headwater.release_view import parse_release
        from lake.duck import QuerySettings
        from lake.query import Lake as OpenLake
        from lake.releases import Releases
        from lake.scoring import Scorer
        from trainer import predict as scoring
        from trainer.progress import NOBODY

    model, version = parse_release(release)
    span = scoring.span_of(_moment("--since", since), _moment("--until", until))
    with (
        opened_store(lake, data, os.environ) as store,
        tempfile.TemporaryDirectory(prefix="headwater-predict-") as spill,
    ):
        releases = Releases(store)
        manifest = releases.look().get(model, version).manifest
        scorer = Scorer(releases.artifact(manifest.artifact.sha256), manifest)
        opened = OpenLake(store, QuerySettings(spill_folder=spill))
        bars = Bars() if sys.stderr.isatty() and not json else NOBODY
        try:
            with Aside(opened.interrupt) as aside:
                done = aside.run(
                    lambda: scoring.predict(opened, store, scorer, stream=stream, span=span, progress=bars)
                )
        finally:
            opened.close()
    if json:
        output.say_json(done)
        return
    output.say_pairs(output.fields_of(done))


def _moment(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(
            f"{option} {text!r} is not an ISO 8601 time; write for example 2026-11-21T12:00:00Z"
        ) from error
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
