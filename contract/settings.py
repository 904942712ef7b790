"""How a settings file is read and refused, the same for `agent.toml` and `gateway.toml`.

An operator meets both, and may rely on one behaviour: an unknown key, a wrong type or a value out of range ends the
start with a message that names file, key, value and remedy, and shows nothing that may be a secret.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from contract.errors import ConfigurationError

Table = TypeVar("Table", bound=msgspec.Struct)

_AT = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_SECRET = re.compile(r"pass|secret|token|credential|key", re.IGNORECASE)
_EXAMPLES = {
    "device": 'device = "pump-7"',
    "broker": 'broker.url = "mqtt://127.0.0.1:1883"',
    "broker.url": 'url = "mqtt://127.0.0.1:1883"',
    "lake": 'lake.url = "file:///var/lib/headwater/lake"',
    "lake.url": 'url = "file:///var/lib/headwater/lake"',
    "driver": 'driver = "host"',
    "rate_hz": "rate_hz = 1",
}
"""What a missing key may look like."""
_BY_TYPE = {
    "int": "write a whole number, without quotes",
    "float": "write a number, without quotes",
    "bool": "write true or false, without quotes",
    "str": "write a text, in quotes",
    "array": "write a list: [ … ]",
    "object": "write a table: { … }",
}
_UNITS = {"bytes": "bytes", "rows": "rows", "s": "s", "hz": "Hz"}


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Accept a number within `low` .. `high`, both included.

    Args:
        name: the key; its words tell the unit (`bytes_max`, `keepalive_s`, `rate_hz`).
        value: what was given.
        low: the least allowed.
        high: the greatest allowed.

    Raises:
        ValueError: naming key, value and range.
    """
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(
            f"{name} = {plain(value)} is outside {plain(low)} .. {plain(high)}{_unit(name)}; "
            "choose a value in that range"
        )


def plain(value: float) -> str:
    """A number as one writes it in a file: never with an exponent, whole ones without a fraction."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value):
        return str(int(value))
    return f"{value:.12f}".rstrip("0").rstrip(".") if abs(value) >= 1e-9 else str(value)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: what it should be, for the message: `an agent.toml`.

    Raises:
        ConfigurationError: naming the file and what is wrong with it.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); give the path of {what}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}; mend that line") from error


def convert(raw: Mapping[str, Any], kind: type[Table], source: str) -> Table:
    """Check a parsed table against a struct.

    Args:
        raw: the parsed TOML.
        kind: the struct; unknown keys are refused where it forbids them.
        source: the file's name and perhaps the table's, for messages.

    Raises:
        ConfigurationError: naming the file, the key, its value, and what to write instead.
    """
    try:
        return msgspec.convert(dict(raw), kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{source}{_explained(str(error), raw, kind)}") from error


def absolute(folder: Path, text: str) -> str:
    """A path of a settings file: relative ones count from the folder of the file, empty ones stay empty."""
    return str(folder / Path(text).expanduser()) if text else ""


def _explained(message: str, table: Mapping[str, Any], kind: type[msgspec.Struct]) -> str:
    """msgspec's message turned round: key and value first, then what is wrong, then what there is."""
    at = _AT.search(message)
    text = message[: at.start()] if at else message
    path = [part for part in at[1].split(".") if part] if at else []
    if found := _MISSING.match(text):
        example = _EXAMPLES.get(".".join([*path, found[1]])) or _EXAMPLES.get(found[1])
        return f"{_where(path)}{found[1]} is missing; add it" + (f", for example: {example}" if example else "")
    if found := _UNKNOWN.match(text):
        value = _shown(found[1], _value_at(table, [*path, found[1]]))
        keys = _known_keys(kind, path)
        return f"{_where(path)}{found[1]} = {value} is an unknown key; remove it, or use one of: {keys}"
    if not path:
        return text
    value = _value_at(table, path)
    if isinstance(value, Mapping):  # a rule over the whole table, which names the key itself
        return f"{_where(path)}{text}"
    remedy = _remedy(text, _known_values(kind, path))
    return f"{_where(path[:-1])}{path[-1]} = {_shown(path[-1], value)}: {text}; {remedy}"


def _remedy(text: str, known: list[str]) -> str:
    """What to write instead of a value that msgspec refuses."""
    if known:
        return f"use one of: {', '.join(known)}"
    wanted = re.match(r"Expected `([^`]*)`", text)
    kinds = wanted[1].split(" | ") if wanted else []
    return next((remedy for kind, remedy in _BY_TYPE.items() if kind in kinds), "choose another value")


def _known_values(kind: Any, path: list[str]) -> list[str]:
    """The values there are for the key at `path`, where they can be counted."""
    for part in path[:-1]:
        kind = _kind_of(kind, part)
    for each in get_args(kind) or (kind,):
        if isinstance(each, type) and issubclass(each, msgspec.Struct):
            config = each.__struct_config__
            if config.tag_field == path[-1]:
                return [
                    str(one.__struct_config__.tag)
                    for one in get_args(kind) or (each,)
                    if hasattr(one, "__struct_config__")
                ]
            hint = get_type_hints(each).get(path[-1])
            if get_origin(hint) is Literal:
                return [repr(value) if isinstance(value, str) else str(value) for value in get_args(hint)]
            if isinstance(hint, type) and issubclass(hint, Enum):
                return [repr(str(member.value)) for member in hint]
    return []


def _where(path: list[str]) -> str:
    return f"[{'.'.join(path)}] " if path else ""


def _known_keys(kind: Any, path: list[str]) -> str:
    """Names of the keys of the table at `path`."""
    for part in path:
        kind = _kind_of(kind, part)
    kinds = get_args(kind) or (kind,)
    structs = [each for each in kinds if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    return ", ".join(dict.fromkeys(field.encode_name for each in structs for field in msgspec.structs.fields(each)))


def _kind_of(kind: Any, part: str) -> Any:
    """The type of a member: `stage`, or of one of its elements: `stages[0]`."""
    name, is_element, _ = part.partition("[")
    found = get_type_hints(kind).get(name) if isinstance(kind, type) else None
    return get_args(found)[0] if is_element and get_args(found) else found


def _value_at(table: Any, path: list[str]) -> Any:
    for part in path:
        name, is_element, index = part.partition("[")
        table = table.get(name) if isinstance(table, Mapping) else None
        if is_element:
            place = int(index.rstrip("]")) if index.rstrip("]").isdigit() else -1
            table = table[place] if isinstance(table, Sequence) and 0 <= place < len(table) else None
    return table


def _shown(name: str, value: Any) -> str:
    """A value for a message; what may be a secret under a wrong name stays unshown."""
    if _SECRET.search(name) and not name.endswith("_file") and not isinstance(value, bool | int | float):
        return "(not shown)"
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"


def _unit(name: str) -> str:
    found = [_UNITS[word] for word in name.split("_") if word in _UNITS]
    return f" {found[0]}" if found else ""
