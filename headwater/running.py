"""`headwater up` from its first to its last line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from headwater import output
from headwater.place import StackRecord
from headwater.plan import UpOptions
from headwater.signals import stopping
from headwater.stack.folder import DataFolder
from headwater.stack.supervisor import Supervisor
from headwater.up import Stack


def run_up(options: UpOptions, environment: Mapping[str, str], *, json: bool) -> None:
    """Start a stack, say where it is, stay, and stop it.

    Raises:
        HeadwaterError: it could not start, or a process gave up.
    """
    say = sayer(json=json)
    cut = output.json_line({"event": "stopped", "cut": True}) if json else ""
    with stopping(cut) as stop, DataFolder(options.data) as folder, Supervisor() as supervisor:
        stack = Stack(options, folder=folder, supervisor=supervisor, environment=environment, say=say)
        record = stack.start()
        if json:
            output.say_json({"event": "up", "data": str(options.data), "notes": stack.notes, "stack": record})
        else:
            introduce(options, record, stack.notes)
        try:
            stack.run(stop, options.seconds)
        finally:
            stack.stop()
        if json:
            output.say_json({"event": "stopped", "restarts": stack.restarts})
        else:
            output.say("stopped; the next start over the same folder goes on from here")


def introduce(options: UpOptions, record: StackRecord, notes: list[str]) -> None:
    """Say where everything is, and what to try."""
    lake = record.lake.url + (f" at {record.lake.endpoint}" if record.lake.endpoint else "")
    names = [device.name for device in record.devices]
    listed = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} … {names[-1]}"
    data = "" if str(options.data).endswith("headwater-data") else f" --data {options.data}"
    output.say(f"Headwater is up, over {options.data}")
    output.say_pairs(
        {
            "  broker": f"{record.broker} ({record.broker_kind})",
            "  lake": lake,
            "  gateway": f"{record.http}  (/healthz /readyz /metrics /v1/devices)",
            "  devices": f"{len(names)}: {listed}",
            "  logs": record.logs,
        }
    )
    for note in notes:
        output.say(f"  note: {note}")
    output.say("Ask, in another terminal:")
    output.say(f"  headwater lake streams{data}")
    output.say(f"  headwater lake head {_example(options)}{data}")
    output.say(f'  headwater lake sql "SELECT _device, count(*) FROM {_example(options)} GROUP BY ALL"{data}')
    output.say(f"  headwater agent status --device {names[0]}{data}")
    ending = "Ctrl-C stops" if options.seconds is None else f"It stops after {options.seconds:g} s, or at Ctrl-C"
    output.say(f"{ending}: first the devices, which send what they hold, then the rest.")


def sayer(*, json: bool) -> Callable[[str], None]:
    """What is being done, for people: beside the answer, and only where somebody may be reading."""
    if json and not sys.stderr.isatty():
        return lambda text: None
    return output.complain


def _example(options: UpOptions) -> str:
    from headwater.plan import SYNTHETIC, WATCH, stream_name

    known = {WATCH: "watch", SYNTHETIC: "machine"}
    if options.recordings in known:
        return known[options.recordings]
    from pathlib import Path

    return f'"{stream_name(Path(options.recordings))}"'
