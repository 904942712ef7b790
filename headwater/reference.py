"""The command-line reference, made from the commands themselves: `python -m headwater.reference > docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from headwater.commands.tree import build

INTRODUCTION = """\
# Command line

<!-- Made by `python -m headwater.reference > docs/cli.md`; a test says when it is stale. -->

Every command takes `--json`: one JSON object, or one line of JSON per row, on stdout. Logs and complaints go to stderr.
`headwater` is `.venv/bin/headwater` in a checkout; `python -m headwater` is the same.

Ctrl-C ends a command that has no result yet with 130. `up` takes the first as "stop cleanly" and ends with 0, or with
130 where it was not up yet; a second as "end now", with 130: its processes are ended by the kernel, no acknowledged
reading is lost, and the next start over the same folder goes on from there. With `--json` the last line is
`{"event":"stopped",…}` either way, after a second Ctrl-C with `"cut":true`.

| exit status | meaning |
|---|---|
| 0 | well |
| 1 | a check failed, rows are lost or doubled, or something failed that neither waiting nor another setting mends |
| 2 | the command line, a setting or a query is wrong, or something is not installed |
| 3 | something outside did not answer: try again later |
| 130 | interrupted before there was a result |

In every command 2 is also the answer to a name that does not exist: a stream, a model, a release, a rollout, a device,
a file. A list that is narrowed to nothing is an empty list, and 0.

| variable | meaning |
|---|---|
| `HEADWATER_DATA` | the data folder where `--data` is not given; else `./headwater-data` |
| `HEADWATER_LAKE` | the lake where `--lake` is not given; else that of the stack in the data folder |
| `HEADWATER_BROKER` | the broker where `--broker` is not given; else that of the stack in the data folder |
| `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`, `AWS_REGION` | where an `s3://` lake is that is not the stack's own |
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` | the keys to it |
"""


def reference() -> str:
    """The whole page, Markdown."""
    command = typer.main.get_command(build())
    return INTRODUCTION + "".join(_sections(command, "headwater"))


def _sections(command: Any, path: str) -> Iterator[str]:
    inner = getattr(command, "commands", None)
    if inner:
        for name, child in inner.items():
            yield from _sections(child, f"{path} {name}")
        return
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option" and param.name != "help"]
    yield f"\n## {path}\n\n"
    yield f"    {' '.join([path, *map(_argument, arguments), '[options]'])}\n\n"
    yield f"{_help(command.help or '')}\n\n"
    yield "| | |\n|---|---|\n"
    for argument in arguments:
        yield f"| `{argument.metavar or argument.name}` | {_cell(argument.help or '')} |\n"
    for option in options:
        names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
        yield f"| {names}{_form(option)} | {_cell(option.help or '')}{_default(option)} |\n"


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name
    return name if argument.required else f"[{name}]"


def _form(option: Any) -> str:
    return "" if option.is_flag else f" {_cell(option.metavar)}"


def _default(option: Any) -> str:
    if option.required:
        return " Required."
    if option.is_flag or option.default in (None, ""):
        return ""
    default = getattr(option.default, "value", option.default)
    return f" Default: `{f'{default:g}' if isinstance(default, float) else default}`."


def _help(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
