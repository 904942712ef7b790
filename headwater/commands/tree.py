"""All commands, and how one is run. Names, options and exit statuses are a contract: docs/cli.md, written by
`headwater.reference`.

Every command takes `--json`. Answers go to stdout, logs and complaints to stderr. An error of Headwater's own is one
line that names the thing, the value and the remedy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from contract.errors import HeadwaterError
from headwater import output
from headwater.commands import (
    agent,
    doctor,
    gateway,
    keys,
    label,
    lake,
    monitor,
    predict,
    release,
    rollout,
    simulate,
    stack,
    train,
)
from headwater.exits import Exit, exit_of

EPILOG = (
    "Exit status: 0 well; 1 a check failed, or rows are lost; 2 the command line, a setting or a query is wrong, or "
    "names what does not exist; "
    "3 something outside did not answer, try again later; 130 interrupted."
)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            number = version("headwater")
        except PackageNotFoundError:
            number = "(a checkout that is not installed)"
        output.say(f"headwater {number}")
        raise typer.Exit


def build() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="headwater",
        help="From a sensor on a small Linux device to a row in an open lake, exactly once.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def headwater(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version, and end.")
        ] = False,
    ) -> None:
        """From a sensor on a small Linux device to a row in an open lake, exactly once."""

    app.command()(stack.up)
    app.command()(stack.demo)
    for module in (agent, gateway, lake, simulate, train, keys, release, rollout, label):
        app.add_typer(module.app)
    app.command()(predict.predict)
    app.command()(monitor.monitor)
    app.command()(doctor.doctor)
    return app


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command and end the process with its exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C; `headwater.cli` gives it its exit status.
    """
    try:
        build()(args=None if arguments is None else list(arguments), prog_name="headwater")
    except HeadwaterError as error:
        output.complain(f"error: {error}")
        sys.exit(exit_of(error))
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        # Who read the answer has seen enough, as `head` does. Click takes that for a failure; and the interpreter must
        # not try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.OK)
