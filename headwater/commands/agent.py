"""`headwater agent …`: run an agent on a device, and ask a running one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

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

    _ask(fetch_status, _sockets(socket, config, data, device), _show_status, json=json)


@app.command()
def buffer(
    socket: Socket = None, config: MaybeConfig = None, data: Data = None, device: Device = None, json: Json = False
) -> None:
    """What waits in the agent's buffer, per stream and epoch.

    Which agent: --socket, else --config, else the stack in the data folder, else /etc/headwater/agent.toml.
    """
    with extras.imports("edge", "headwater agent buffer"):
        from edge_agent.status import fetch_buffer

    _ask(fetch_buffer, _sockets(socket, config, data, device), _show_buffer, json=json)


def _sockets(socket: Path | None, config: Path | None, data: str | None, device: str | None) -> list[tuple[str, Path]]:
    """Names and sockets of the agents that are meant."""
    from contract.errors import ConfigurationError
    from edge_agent.settings import load_settings
    from headwater.place import data_folder, read_record

    if socket is not None:
        return [(device or "", socket)]
    if config is None:
        folder = data_folder(data, os.environ)
        record = read_record(folder)
        if record is not None:
            found = [(place.name, Path(place.socket)) for place in record.devices if device in (None, place.name)]
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
    return [(settings.device, Path(settings.status.socket))]


def _ask(
    fetch: Callable[[Path], Any],
    agents: list[tuple[str, Path]],
    show: Callable[[list[tuple[str, Any]]], None],
    *,
    json: bool,
) -> None:
    """Ask every agent; those that do not answer are told, and make the exit status."""
    from contract.errors import TemporaryError

    answers: list[tuple[str, Any]] = []
    silent: list[str] = []
    for name, socket in agents:
        try:
            answers.append((name, fetch(socket)))
        except TemporaryError as error:
            silent.append(str(error))
    if json:
        for name, answer in answers:
            output.say_json(answer if isinstance(answer, dict) else {"device": name, "lanes": answer})
    elif answers:
        show(answers)
    if silent:
        for text in silent:
            output.complain(f"error: {text}")
        raise typer.Exit(Exit.UNAVAILABLE)


def _show_status(answers: list[tuple[str, Any]]) -> None:
    output.say_table(["device", "what", "is"], _flat(answers))


def _show_buffer(answers: list[tuple[str, Any]]) -> None:
    output.say_table(["device", "what", "is"], _flat(answers))


def _flat(answers: list[tuple[str, Any]]) -> list[tuple[str, str, Any]]:
    return [(name, path, value) for name, answer in answers for path, value in _leaves("", answer)]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, item in enumerate(value):
            yield from _leaves(f"{path}[{number}]", item)
    else:
        yield path, value
