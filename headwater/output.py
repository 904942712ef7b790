"""What a command answers: JSON for programs, text for people; always on stdout, while logs go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec


def json_line(value: Any) -> str:
    """One line of JSON: times as ISO 8601, bytes as base64, decimals as text, NaN and infinities as null."""
    return msgspec.json.encode(value, enc_hook=_as_json).decode()


def say_json(value: Any) -> None:
    """Answer with one JSON object, or one line of several."""
    say(json_line(value))


def say(text: str = "") -> None:
    """Answer with a line of text."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_bytes(data: bytes) -> None:
    """Answer with bytes as they are."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def complain(text: str) -> None:
    """Tell a person beside the answer."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", separators: bool = True
) -> None:
    """Answer with a table for a person: as wide as the terminal, or as needed where there is none.

    Args:
        columns: their names.
        rows: one value per column.
        title: above it.
        separators: whether long numbers are grouped; not where they may be years or keys.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    rows = [list(row) for row in rows]
    for number, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float | Decimal | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*((shown(cell) if separators else _plain(cell)) for cell in row))
    console = Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty(), markup=False, highlight=False)
    if not sys.stdout.isatty():
        console.width = max(80, 40 * len(columns))
    console.print(table)


def say_pairs(pairs: Mapping[str, Any]) -> None:
    """Answer with aligned `name  value` lines."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        say(f"{name:<{width}}  {shown(value)}")


def fields_of(struct: msgspec.Struct) -> dict[str, Any]:
    """The members of a struct, and of structs in it, with dotted names."""
    found: dict[str, Any] = {}
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, msgspec.Struct):
            found |= {f"{name}.{inner}": item for inner, item in fields_of(value).items()}
        else:
            found[name] = value
    return found


def shown(value: Any) -> str:
    """A value as a person reads it."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
        case bytes():
            return value.hex() if len(value) <= 32 else f"{value[:32].hex()}… ({len(value)} bytes)"
        case datetime():
            return value.isoformat(sep=" ")
        case list() | tuple():
            return ", ".join(shown(item) for item in value)
        case dict():
            return json_line(value)
    return str(value)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json_line(value)


def _as_json(value: Any) -> Any:
    """What msgspec does not know: numpy's numbers as numbers, the rest as text."""
    return value.item() if hasattr(value, "item") else str(value)
