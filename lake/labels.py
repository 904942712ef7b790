"""The table `control/labels`: what was true of a stream on a device from when to when, told afterwards by people.

Rows are only added, by `import_labels`. The same row is never added twice, so importing a file again, or importing a
longer version of it, is harmless. Where intervals of a device overlap, the one that began last counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from contract.errors import ConfigurationError
from contract.names import is_name
from lake.delta import wall_clock_ms
from lake.ledger import TIMESTAMP, Ledger, Row
from lake.store import Store
from lake.tables import ControlTable

PATH = "control/labels"
SCHEMA = pa.schema(
    [
        pa.field("stream", pa.string()),
        pa.field("device", pa.string()),
        pa.field("start", TIMESTAMP),
        pa.field("end", TIMESTAMP),
        pa.field("label", pa.string()),
        pa.field("source", pa.string()),
        pa.field("at", TIMESTAMP),
        pa.field("sequence", pa.int64()),
    ]
)
FILE_BYTES_MAX = 512 * 1024 * 1024
ROWS_MAX = 1_000_000
"""Of one file."""
LABEL_CHARACTERS_MAX = 200
FAULTS_SHOWN = 5
UNITS_US = {"s": 1_000_000, "ms": 1_000, "us": 1}


class Columns(NamedTuple):
    """Which column of the file holds what."""

    device: str = "device"
    start: str = "start"
    end: str = "end"
    label: str = "label"


class Imported(msgspec.Struct, frozen=True):
    """What an import did."""

    rows: int
    """Of the file."""
    added: int
    known: int
    """Rows that were there already, or stand in the file more than once."""


class _Bad(Exception):
    """Why a row cannot be."""


def read_file(path: Path, stream: str, columns: Columns, unit: str = "us", device: str = "") -> list[Row]:
    """Read labels from a file: `.csv`, `.parquet`, `.json` (an array of objects) or `.jsonl`.

    Args:
        path: the file.
        stream: that is labelled.
        columns: which column holds what. Times are ISO 8601 (UTC where they name no zone), times of Parquet, or
            numbers since 1970-01-01 UTC.
        unit: of numbers: `s`, `ms` or `us`.
        device: of all rows, where the file has no column for it.

    Returns:
        Rows of `SCHEMA` without `at`, `source` and `sequence`.

    Raises:
        ConfigurationError: the file cannot be read, or rows in it cannot be: named with their line numbers.
    """
    if not is_name(stream):
        raise ConfigurationError(f"stream {stream[:80]!r} is not a name; use 1 to 63 of a-z 0-9 . _ -")
    table = _read(path)
    wanted = [name for name in columns if not (device and name == columns.device)]
    if lacking := [name for name in wanted if name not in table.column_names]:
        raise ConfigurationError(
            f"{path} has no column {', '.join(lacking)}; it has {', '.join(table.column_names)}: say which is which "
            "with --columns device=…,start=…,end=…,label=…"
        )
    if doubled := [name for name in wanted if table.column_names.count(name) > 1]:
        raise ConfigurationError(f"{path} has more than one column {', '.join(doubled)}; rename the others")
    if table.num_rows > ROWS_MAX:
        raise ConfigurationError(f"{path} has {table.num_rows} rows, more than {ROWS_MAX}; import it in parts")
    # In a CSV the first line is the header.
    first = 2 if path.suffix.lower() == ".csv" else 1
    rows: list[Row] = []
    faults: list[str] = []
    said: dict[tuple[str, int], tuple[str, int]] = {}
    for line, values in enumerate(_rows_of(table.select(wanted), path), first):
        try:
            row = _row(values, stream, columns, UNITS_US[unit], device)
            key = row["device"], row["start"]
            other = said.setdefault(key, (row["label"], line))
            if other[0] != row["label"]:
                raise _Bad(f"says {row['label']!r} from the moment for which line {other[1]} says {other[0]!r}")
            rows.append(row)
        except _Bad as bad:
            faults.append(f"line {line} {bad}")
    if faults:
        more = f" and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise ConfigurationError(
            f"{path}: {'; '.join(faults[:FAULTS_SHOWN])}{more}; nothing was imported, mend the file and import it again"
        )
    return rows


def import_labels(store: Store, rows: list[Row], source: str) -> Imported:
    """Add those rows that are not there yet.

    Args:
        store: where the lake is.
        rows: as `read_file` gives them.
        source: where they come from, such as the file's name.

    Raises:
        CommitConflictError: others were first too often; import again.
        StoreUnavailableError: it is not known whether the rows are in; importing again is harmless.
    """
    table = ControlTable(store, PATH, SCHEMA)
    now_us = wall_clock_ms() * 1000

    def decide(known: list[Row]) -> list[Row]:
        seen = {_key(row) for row in known}
        fresh: list[Row] = []
        for row in rows:
            if (key := _key(row)) not in seen:
                seen.add(key)
                fresh.append({**row, "source": source[:1000], "at": now_us})
        return fresh

    added = len(Ledger(lambda: table, SCHEMA).act(decide))
    return Imported(len(rows), added, len(rows) - added)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("stream", "device", "start", "end", "label"))


def _read(path: Path) -> pa.Table:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigurationError(f"{path} is larger than {FILE_BYTES_MAX} bytes; import it in parts")
        match path.suffix.lower():
            case ".csv":
                # As text: what a number or a time means is decided here, the same for every format.
                options = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
                with pyarrow.csv.open_csv(path) as reader:
                    names = reader.schema.names
                options.column_types = dict.fromkeys(names, pa.string())
                return pyarrow.csv.read_csv(path, convert_options=options)
            case ".parquet":
                return pyarrow.parquet.read_table(path)
            case ".json":
                return pa.Table.from_pylist(msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]]))
            case ".jsonl" | ".ndjson":
                lines = path.read_bytes().splitlines()
                return pa.Table.from_pylist([msgspec.json.decode(line, type=dict[str, Any]) for line in lines if line])
    except (OSError, ValueError, pa.ArrowException, msgspec.MsgspecError) as error:
        raise ConfigurationError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    raise ConfigurationError(f"{path} is of no known kind; give .csv, .parquet, .json or .jsonl")


def _rows_of(table: pa.Table, path: Path) -> list[dict[str, Any]]:
    """Times finer than a microsecond, which Python's have not, are cut off."""
    for number, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            column = table.column(number).cast(pa.timestamp("us", field.type.tz), safe=False)
            table = table.set_column(number, field.name, column)
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except (OverflowError, ValueError) as error:
        raise ConfigurationError(f"{path} has a time beyond the years 1 to 9999 ({error}); correct it") from error
    return rows


def _row(values: Mapping[str, Any], stream: str, columns: Columns, unit_us: int, device: str) -> dict[str, Any]:
    named = device or values[columns.device]
    if not isinstance(named, str) or not is_name(named):
        raise _Bad(f"has the device {named!r}, which is no name of 1 to 63 of a-z 0-9 . _ -")
    label = values[columns.label]
    if label is None or not (text := str(label).strip()) or (isinstance(label, float) and label != label):
        raise _Bad("has no label")
    if len(text) > LABEL_CHARACTERS_MAX:
        raise _Bad(f"has a label of {len(text)} characters, more than {LABEL_CHARACTERS_MAX}")
    start, end = (_moment(values[name], name, unit_us) for name in (columns.start, columns.end))
    if end <= start:
        raise _Bad(f"ends ({values[columns.end]}) not after it starts ({values[columns.start]})")
    return {"stream": stream, "device": named, "start": start, "end": end, "label": text}


def _moment(value: Any, name: str, unit_us: int) -> int:
    """Microseconds since 1970-01-01 UTC."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = float(text) if "." in text else int(text)
        except ValueError:
            try:
                value = datetime.fromisoformat(text)
            except ValueError:
                raise _Bad(f"has {name} = {text[:60]!r}, which is neither ISO 8601 nor a number") from None
    if isinstance(value, datetime):
        moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
        return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 2**62 / unit_us:
        raise _Bad(f"has {name} = {value!r}, which is no time")
    return round(value * unit_us)
