"""`headwater agent …`: run an agent on a device, and ask a running one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from headwater import extras, itself, output
from headwater.commands.options import Config, Data, Json
from headwater.exits import Exit

app = typer.Typer(name="agent", help="The agent on a device: run it, ask it.", no_args_is_help=True)

INSTALLED_CONFIG = Path("/etc/headwater/agent.toml")
"""Where a packaged agent's configuration is."""

Socket = Annotated[Path | None, typer.Option("--socket", metavar="PATH", help="The status socket of the agent.")]
MaybeConfig = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The agent.toml that names the status socket.")
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="One device of the stack only.")]


@app.command()
def run(config: Config, json: Json = False) -> None:
    """Run the agent until SIGTERM or Ctrl-C; then it flushes, sends for a while what it holds, and ends.

    Logs go to stderr, with --json as JSON lines.
    """
    extras.require("edge", "headwater agent run")
    # The agent takes this process over: same process id, and nothing of the command line stays in its memory.
    argv = itself.command("headwater.agent_process", "--config", str(config), *(["--json-logs"] if json else []))
    os.execve(argv[0], argv, {**os.environ, **itself.environment(os.environ)})


@app.command()
def status(
    socket: Socket = None, config: MaybeConfig = None, data: Data = None, device: Device = None, json: Json = False
) -> None:
    """How the agent is: connection, streams, what waits. Of a one-machine stack: all its devices.

    Which agent: --socket, else --config, else the stack in the data folder, else /etc/headwater/agent.toml.
    """
    with extras.imports("edge", "headwater agent status"):
        from edge_agent.status import fetch_status

    agents = _agents(socket, config, data, device)
    _ask(lambda agent: fetch_status(agent.socket), agents, _show_status, json=json)


@app.command()
def buffer(
    socket: Socket = None, config: MaybeConfig = None, data: Data = None, device: Device = None, json: Json = False
) -> None:
    """What waits in the agent's buffer, per stream and epoch; read from its file where the agent does not run.

    Which agent: --socket, else --config, else the stack in the data folder, else /etc/headwater/agent.toml.
    """
    with extras.imports("edge", "headwater agent buffer"):
        from edge_agent.offline import fetch_buffer

    def fetch(agent: _Agent) -> Any:
        return {"device": agent.name, "lanes": fetch_buffer(agent.socket, agent.buffer)}

    _ask(fetch, _agents(socket, config, data, device), _show_buffer, json=json)


class _Agent(NamedTuple):
    name: str
    socket: Path
    buffer: Path | None
    stack: Path | None = None
    """The data folder of the stack that it belongs to."""


def _agents(socket: Path | None, config: Path | None, data: str | None, device: str | None) -> list[_Agent]:
    """The agents that are meant."""
    from contract.errors import ConfigurationError
    from edge_agent.settings import load_settings
    from headwater.place import data_folder, read_record

    if socket is not None:
        return [_Agent(device or "", socket, None)]
    if config is None:
        folder = data_folder(data, os.environ)
        record = read_record(folder)
        if record is not None:
            found = [
                _Agent(place.name, Path(place.socket), Path(place.buffer), folder)
                for place in record.devices
                if device in (None, place.name)
            ]
            if not found:
                known = ", ".join(place.name for place in record.devices)
                raise ConfigurationError(f"--device {device!r} is not in the stack of {folder}; there are: {known}")
            return found
        if not INSTALLED_CONFIG.exists():
            raise ConfigurationError(
                f"which agent? Neither --socket nor --config was given, {folder} holds no stack, and there is no "
                f"{INSTALLED_CONFIG}; give one of them"
            )
        config = INSTALLED_CONFIG
    settings = load_settings(config)
    return [_Agent(settings.device, Path(settings.status.socket), Path(settings.buffer.path))]


def _ask(
    fetch: Callable[[_Agent], Any], agents: list[_Agent], show: Callable[[list[Any]], None], *, json: bool
) -> None:
    """Ask every agent; those that do not answer are told, and make the exit status."""
    from contract.errors import TemporaryError
    from headwater.place import is_stopped

    answers: list[Any] = []
    silent: list[str] = []
    for agent in agents:
        try:
            answers.append(fetch(agent))
        except TemporaryError as error:
            silent.append(str(error))
    if json:
        for answer in answers:
            output.say_json(answer)
    elif answers:
        show(answers)
    if silent:
        stack = agents[0].stack
        # More to the point than that none of its devices answers.
        stopped = is_stopped(stack) if stack is not None and not answers else ""
        for text in [stopped] if stopped else silent:
            output.complain(f"error: {text}")
        raise typer.Exit(Exit.UNAVAILABLE)


def _show_status(answers: list[Any]) -> None:
    """One device in full, several by what matters."""
    if len(answers) == 1:
        output.say_pairs(dict(_leaves("", answers[0])))
        return
    columns = ("device", "connected", "stream", "state", "readings", "accepted", "waiting", "evicted", "last error")
    rows = []
    for answer in answers:
        uplink = answer["uplink"]
        for name, stream in answer["streams"].items():
            counts = (stream["readings"], stream["accepted_rows"], stream["waiting_rows"], stream["evicted_rows"])
            trouble = stream["last_error"] or ("" if uplink["connected"] else uplink["last_loss"])
            rows.append((answer["device"], uplink["connected"], name, stream["state"], *counts, trouble))
    output.say_table(columns, rows)
    _show_models(answers)


def _show_models(answers: list[Any]) -> None:
    columns = ("device", "model", "answers", "windows", "errors", "skipped", "order", "state", "reason")
    rows = []
    for answer in answers:
        for name, model in answer.get("models", {}).items():
            answering = f"{model['factory']} (factory)" if model["factory"] else model["active"] or "none"
            order = model["order"] or {"version": "", "state": "", "reason": ""}
            counts = (model["windows"], model["errors"], model["skipped"])
            rows.append((answer["device"], name, answering, *counts, order["version"], order["state"], order["reason"]))
    if rows:
        output.say_table(columns, rows)


def _show_buffer(answers: list[Any]) -> None:
    columns = ("device", "stream", "epoch", "live", "batches", "rows", "bytes", "first_seq", "last_seq")
    rows = [(answer["device"], *(lane[name] for name in columns[1:])) for answer in answers for lane in answer["lanes"]]
    output.say_table(columns, rows)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, item in enumerate(value):
            yield from _leaves(f"{path}[{number}]", item)
    else:
        yield path, value
