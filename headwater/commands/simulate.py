"""`headwater simulate …`: a file as a device, and swarms of light devices."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer

from headwater import extras, logs, output
from headwater.commands.options import Broker, Data, Json, Verbose
from headwater.exits import Exit

app = typer.Typer(
    name="simulate", help="Devices without hardware: replayed files, swarms of light devices.", no_args_is_help=True
)


@app.command()
def replay(
    file: Annotated[str, typer.Argument(metavar="FILE", help="CSV or Parquet, also compressed.")],
    device: Annotated[str, typer.Option("--device", metavar="ID", help="Name of the device that sends it.")],
    stream: Annotated[str, typer.Option("--stream", metavar="NAME", help="Name of the stream.")],
    time_column: Annotated[str, typer.Option("--time-column", metavar="C", help="The column that tells the time.")],
    fields: Annotated[
        str | None, typer.Option("--fields", metavar="A,B", help="Columns to send; else all but the time column.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", metavar="CHAR", help="Of a CSV file, \\t for a tab; else comma.")
    ] = (None),
    decimal_point: Annotated[
        str | None, typer.Option("--decimal-point", metavar="CHAR", help="Of a CSV file's numbers; else a dot.")
    ] = None,
    time_format: Annotated[
        str | None,
        typer.Option(
            "--time-format",
            metavar="F",
            help="iso8601, s, ms, us, ns (since 1970), or a strptime pattern; else ISO 8601.",
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option("--speed", metavar="X", help="1 is as recorded, 2 twice as fast, 0 without pauses.")
    ] = 1.0,
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end, until Ctrl-C.")] = False,
    keep_timestamps: Annotated[
        bool, typer.Option("--keep-timestamps", help="Send the recorded times; else the recording is moved to now.")
    ] = False,
    broker: Broker = None,
    data: Data = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Send a file as one device would: with a real agent, its buffer in the data folder.

    Ends when the file has ended and the lake has acknowledged every row; with --loop at Ctrl-C. What was not
    acknowledged is kept, and sent first by the next replay of the same device.
    """
    logs.configure(verbose=verbose)
    with extras.imports("edge", "headwater simulate replay"):
        from headwater.place import data_folder
        from headwater.replay import ReplayOptions, run_replay

    options = ReplayOptions(
        path=file,
        device=device,
        stream=stream,
        time_column=time_column,
        fields=tuple(name.strip() for name in fields.split(",") if name.strip()) if fields else (),
        delimiter=delimiter or "",
        decimal_point=decimal_point or ".",
        time_format=time_format or "",
        speed=speed,
        loop=loop,
        keep_timestamps=keep_timestamps,
        broker=_broker(broker, data),
        folder=data_folder(data, os.environ) / "simulate" / device,
    )
    result = run_replay(options)
    if json:
        output.say_json(result)
    else:
        dropped = f", {result.rows_dropped:,} dropped" if result.rows_dropped else ""
        output.say(f"{result.rows_accepted:,} rows accepted{dropped}; {result.rows_waiting:,} wait for the lake")
    if result.rows_waiting:
        raise typer.Exit(Exit.UNAVAILABLE)


@app.command()
def swarm(
    devices: Annotated[int, typer.Option("--devices", metavar="N", help="How many, all in this process.")],
    rate: Annotated[float, typer.Option("--rate", metavar="READINGS_PER_S", help="Of all devices together.")],
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help="How long readings are made.")] = 60.0,
    broker: Broker = None,
    data: Data = None,
    rows: Annotated[
        int | None, typer.Option("--rows", metavar="N", help="Per batch; else what a device reads in a second, ≤ 500.")
    ] = None,
    stream: Annotated[str, typer.Option("--stream", metavar="NAME", help="Name of the stream.")] = "swarm",
    prefix: Annotated[str, typer.Option("--prefix", metavar="NAME", help="Devices are NAME-00001 and on.")] = "swarm",
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Send few ready batches again and again, times and all: less CPU.")
    ] = False,
    patience: Annotated[
        float, typer.Option("--patience", metavar="S", help="How long to wait for the last acknowledgements.")
    ] = 30.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the values, and of every jitter.")] = 1,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Load broker and gateway like a fleet: light devices with a connection each, all keeping the protocol.

    They keep their batches in memory: kill one, and what was not acknowledged is lost. Exit status 3 if readings were
    not acknowledged within --patience of the end.
    """
    logs.configure(verbose=verbose)
    with extras.imports("simulators", "headwater simulate swarm"):
        from headwater.signals import stopping_loop
        from simulators.swarm import SwarmReport, SwarmSettings, new_swarm

    settings = SwarmSettings(
        broker=_broker(broker, data),
        devices=devices,
        readings_per_s=rate,
        seconds=seconds,
        rows_per_batch=rows,
        stream=stream,
        prefix=prefix,
        pooled=pooled,
        drain_timeout_s=patience,
        seed=seed,
    )

    async def run() -> SwarmReport:
        swarm = new_swarm(settings)
        with stopping_loop(swarm.stop):
            return await swarm.run()

    report = asyncio.run(run())
    if json:
        output.say_json(report)
    else:
        output.say_pairs(output.fields_of(report))
    if report.rows_unacknowledged:
        raise typer.Exit(Exit.UNAVAILABLE)


def _broker(option: str | None, data: str | None) -> str:
    """The broker that is meant; where that is one of a stack that is stopped, with a note."""
    from headwater.place import BROKER_VARIABLE, data_folder, find_broker, is_stopped, read_record

    url = find_broker(option, data, os.environ)
    if not (option or os.environ.get(BROKER_VARIABLE)):
        folder = data_folder(data, os.environ)
        record = read_record(folder)
        if record is not None and record.broker_kind != "external" and (stopped := is_stopped(folder)):
            output.complain(f"note: {stopped}")
    return url
