"""`headwater up` and `headwater demo`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from headwater import extras, logs, output
from headwater.commands.options import Data, Json, Verbose, check_above_zero
from headwater.exits import Exit

Devices = Annotated[int, typer.Option("--devices", metavar="N", help="How many devices, each a process of its own.")]
Recordings = Annotated[
    str,
    typer.Option(
        "--recordings",
        metavar="watch|synthetic|FILE",
        help="What the devices measure: the real watch recordings, synthetic machines, or a CSV or Parquet file.",
    ),
]
BrokerKind = Annotated[
    str,
    typer.Option("--broker", metavar="embedded|mosquitto|URL", help="The broker: one to start, or the URL of yours."),
]
LakeKind = Annotated[
    str,
    typer.Option(
        "--lake", metavar="embedded|URL", help="The lake: a store to start, or file:///folder, or s3://bucket/prefix."
    ),
]
Port = Annotated[
    int | None,
    typer.Option(
        "--port",
        metavar="N",
        help="The gateway's HTTP port: this one or none; 0 takes a free one. Else 8080, or a free one if it is taken.",
    ),
]
NoModels = Annotated[
    bool, typer.Option("--no-models", help="Without the way of models: no release keys, no signed orders.")
]
SPEED_HELP = "How fast recordings are replayed: 1 is as recorded."


def up(
    data: Data = None,
    devices: Devices = 8,
    recordings: Recordings = "watch",
    speed: Annotated[float, typer.Option("--speed", metavar="X", help=SPEED_HELP)] = 1.0,
    broker: BrokerKind = "embedded",
    lake: LakeKind = "embedded",
    port: Port = None,
    no_models: NoModels = False,
    seconds: Annotated[
        float | None, typer.Option("--for", metavar="SECONDS", help="Stop after so long; else at Ctrl-C.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Start everything on this machine: broker, object store, gateway and devices.

    Ctrl-C or SIGTERM stops cleanly, sources first. A start over the same data folder goes on where the last one was.
    """
    logs.configure(verbose=verbose)
    with extras.imports("simulators", "headwater up"):
        from headwater.place import data_folder
        from headwater.plan import UpOptions
        from headwater.running import run_up

    check_above_zero("--for", seconds)
    options = UpOptions(
        data=data_folder(data, os.environ),
        devices=devices,
        recordings=recordings,
        speed=speed,
        broker=broker,
        lake=lake,
        port=port,
        seconds=seconds,
        models=not no_models,
    )
    run_up(options, os.environ, json=json)


def demo(
    data: Data = None,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help="How long the devices send.")] = 60.0,
    devices: Devices = 8,
    recordings: Recordings = "watch",
    speed: Annotated[float, typer.Option("--speed", metavar="X", help=SPEED_HELP)] = 20.0,
    broker: BrokerKind = "embedded",
    lake: LakeKind = "embedded",
    port: Port = None,
    no_models: NoModels = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run `up` on real recordings, teach the devices what they see, then count: is every reading there exactly once?

    At 20 times the recorded speed every device plays its seven exercises within a quarter of a minute. From these a
    model is trained, signed, and rolled out in stages; then one device is worn turned, which is noticed, and learned.
    Ends with exit status 1 if a reading is lost, doubled or changed, or if the models do not get there. With --json
    the last line is the whole result.
    """
    logs.configure(verbose=verbose)
    with extras.imports("simulators", "headwater demo"):
        from headwater.demo import run_demo
        from headwater.place import data_folder
        from headwater.plan import UpOptions

    check_above_zero("--seconds", seconds)
    options = UpOptions(
        data=data_folder(data, os.environ),
        devices=devices,
        recordings=recordings,
        speed=speed,
        broker=broker,
        lake=lake,
        port=port,
        seconds=seconds,
        models=not no_models,
    )
    complaints = run_demo(options, os.environ, json=json).complaints
    for complaint in complaints:
        output.complain(f"error: {complaint}")
    if complaints:
        raise typer.Exit(Exit.FAILED)
