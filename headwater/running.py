"""`headwater up` from its first to its last line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from contract.errors import HeadwaterError
from headwater import output
from headwater.answers import quoted
from headwater.place import StackRecord, data_option
from headwater.plan import SYNTHETIC, WATCH, UpOptions, stream_name
from headwater.signals import stopping
from headwater.stack.folder import DataFolder
from headwater.stack.supervisor import Supervisor
from headwater.up import Stack


def run_up(options: UpOptions, environment: Mapping[str, str], *, json: bool) -> None:
    """Start a stack, say where it is, stay, and stop it.

    Raises:
        HeadwaterError: it could not start, or a process gave up.
        KeyboardInterrupt: it was to stop before it was up; what had been started has been stopped.
    """
    say = sayer(json=json)
    cut = output.json_line({"event": "stopped", "cut": True}) if json else ""
    with stopping(cut) as stop, DataFolder(options.data) as folder, Supervisor() as supervisor:
        stack = Stack(options, folder=folder, supervisor=supervisor, environment=environment, say=say)
        try:
            with stop.interrupting():
                record = stack.start()
        except KeyboardInterrupt:
            _stop(stack, json=json)
            raise
        if json:
            output.say_json({"event": "up", "data": str(options.data), "notes": stack.notes, "stack": record})
        else:
            introduce(options, record, stack.notes)
        try:
            stack.run(stop, options.seconds)
        except HeadwaterError:
            stack.stop()
            raise
        _stop(stack, json=json)


def _stop(stack: Stack, *, json: bool) -> None:
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
    data = data_option(options.data)
    example = _example(options)
    query = shlex.quote(f"SELECT _device, count(*) FROM {quoted(example)} GROUP BY ALL")
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
    output.say(f"  headwater lake head {example}{data}")
    output.say(f"  headwater lake sql {query}{data}")
    output.say(f"  headwater agent status --device {names[0]}{data}")
    ending = "Ctrl-C stops" if options.seconds is None else f"It stops after {options.seconds:g} s, or at Ctrl-C"
    output.say(f"{ending}: first the devices, which send what they hold, then the rest.")


def sayer(*, json: bool) -> Callable[[str], None]:
    """What is being done, for people: beside the answer, and only where somebody may be reading."""
    if json and not sys.stderr.isatty():
        return lambda text: None
    return output.complain


def _example(options: UpOptions) -> str:
    """A stream that will have rows."""
    known = {WATCH: "watch", SYNTHETIC: "machine"}
    return known.get(options.recordings) or stream_name(Path(options.recordings))
