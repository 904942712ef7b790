"""`headwater gateway run`."""

from __future__ import annotations

import typer

from headwater import extras
from headwater.commands.options import Config, Json

app = typer.Typer(name="gateway", help="The gateway between broker and lake.", no_args_is_help=True)


@app.callback()
def gateway() -> None:
    """The gateway between broker and lake."""


@app.command()
def run(config: Config, json: Json = False) -> None:
    """Run a gateway until SIGTERM or Ctrl-C; then it commits what it holds, and ends.

    Any number may run: `replica = "i/N"` in the file shares the work, and two over the same shards are safe. Logs go to
    stderr, with --json as JSON lines.
    """
    with extras.imports("gateway", "headwater gateway run"):
        from headwater.gateway_process import run_gateway_process

    raise typer.Exit(run_gateway_process(config, json_logs=json))
