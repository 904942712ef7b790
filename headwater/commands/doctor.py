"""`headwater doctor`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from headwater import extras, logs, output
from headwater.commands.options import Broker, Data, Json, Lake
from headwater.exits import Exit


def doctor(
    broker: Broker = None,
    lake: Lake = None,
    data: Data = None,
    username: Annotated[str | None, typer.Option("--username", metavar="NAME", help="At the broker.")] = None,
    password_file: Annotated[
        str | None, typer.Option("--password-file", metavar="FILE", help="With the password for the broker.")
    ] = None,
    ca_file: Annotated[
        str | None,
        typer.Option("--ca-file", metavar="FILE", help="Who signed the broker's certificate; else the system's list."),
    ] = None,
    json: Json = False,
) -> None:
    """Look at this machine, the broker and the store, and say what to do about what is not well.

    Broker and store are tried with real operations, and cleaned up behind. Without --broker and --lake those of the
    stack in the data folder are looked at, and where it runs its gateway and devices too; where there is none, they are
    skipped. Exit status 1 if a check failed.
    """
    logs.configure()
    extras.require("edge", "headwater doctor")
    from headwater.doctor import examine, verdict_of

    findings = examine(
        broker=broker,
        lake=lake,
        data=data,
        username=username,
        password_file=password_file,
        ca_file=ca_file,
        environment=os.environ,
    )
    worst = verdict_of(findings)
    if json:
        output.say_json({"verdict": worst, "findings": findings})
    else:
        output.say_table(["check", "", "found"], [(one.check, one.verdict, one.detail) for one in findings])
        for one in findings:
            if one.remedy:
                output.say(f"{one.check}: {one.remedy}")
    if worst == "failed":
        raise typer.Exit(Exit.FAILED)
