"""Options of drivers: tables of the configuration, checked strictly against a frozen struct."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import pyarrow as pa

from edge_agent.sensors.port import SensorConfigError

Options = TypeVar("Options", bound=msgspec.Struct)

_ALIASES = (
    "bool, int8, int16, int32, int64, uint8, uint16, uint32, uint64, float16, float32, float64, string, binary, "
    "date32, timestamp[s|ms|us|ns], timestamp[s|ms|us|ns, tz=UTC]"
)
_ZONED = re.compile(r"timestamp\[(s|ms|us|ns), *tz=([^\]]+)\]")
_ALLOWED = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|string|binary|date32|timestamp\[(s|ms|us|ns)\]")


def parse_options(kind: type[Options], options: Mapping[str, Any], driver: str) -> Options:
    """The options of one driver as its frozen struct.

    Raises:
        SensorConfigError: naming the driver, the option, what is wrong with it, and the options there are.
    """
    known = ", ".join(field.encode_name for field in msgspec.structs.fields(kind)) or "none"
    unknown = [name for name in options if name not in {field.encode_name for field in msgspec.structs.fields(kind)}]
    if unknown:
        raise SensorConfigError(
            f"driver {driver!r} has no option {unknown[0]!r} (= {options[unknown[0]]!r:.80}); its options are: {known}"
        )
    try:
        return msgspec.convert(dict(options), kind, strict=True)
    except msgspec.ValidationError as error:
        raise SensorConfigError(
            f"driver {driver!r}: {_located(str(error), options)}; its options are: {known}"
        ) from error


def parse_type(name: str, driver: str, field: str) -> pa.DataType:
    """The Arrow type of a configured type name such as `float32` or `timestamp[us, tz=UTC]`.

    Raises:
        SensorConfigError: naming the field, the text and the names there are.
    """
    zoned = _ZONED.fullmatch(name)
    if zoned:
        return pa.timestamp(zoned[1], tz=zoned[2])
    if _ALLOWED.fullmatch(name):
        return pa.type_for_alias(name)
    raise SensorConfigError(f"driver {driver!r}: field {field!r} has the unknown type {name!r}; use one of {_ALIASES}")


def parse_fields(fields: Mapping[str, str], driver: str) -> pa.Schema:
    """The schema of a table `{temperature = "float32", ok = "bool"}`.

    Raises:
        SensorConfigError: an unknown type name.
    """
    return pa.schema([pa.field(name, parse_type(kind, driver, name)) for name, kind in fields.items()])


def split_fields(fields: Sequence[str] | Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names and declared types of a `fields` option: `["a", "b"]` or `{a = "float32", b = ""}` (empty: as found)."""
    if isinstance(fields, Mapping):
        return tuple(fields), {name: kind for name, kind in fields.items() if kind}
    return tuple(fields), {}


def _located(message: str, options: Mapping[str, Any]) -> str:
    """Turn msgspec's "… - at `$.path`" round, so that the option comes first, with its value."""
    text, _, place = message.partition(" - at `$.")
    name = re.split(r"[.\[`]", place)[0]
    if not name:
        return message
    return f"option {name!r} = {options.get(name)!r:.80}: {text}"
