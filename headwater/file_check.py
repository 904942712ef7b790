"""Whether a recording can be replayed, found out before anything starts, and said in words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from contract.errors import ConfigurationError
from edge_agent.sensors.port import SensorConfigError
from edge_agent.sensors.recording import CONVERT, FileOptions, Recording
from edge_agent.sensors.registry import create_sensor
from headwater import output

_OF_THE_FILE = ("path", "time_column", "fields", "delimiter", "decimal_point", "time_format")
_LOOKED_AT_ROWS = 100
_COMMA_NUMBER = re.compile(r"\s*[-+]?(\d+,\d+|\d+)([eE][-+]?\d+)?\s*", re.ASCII)
_TYPES = "or declare the type of that column in fields"
_TYPED = re.compile(r"'[^']*'|\b(time_column|time_format|keep_timestamps|fields|delimiter|decimal_point|speed|loop)\b")
_ELSEWHERE = re.compile(r"\b(skip_rows|rate_hz|start_s)\b")


class FileRefused(ConfigurationError):
    """The file is not as described."""


def schema_of(path: Path) -> pa.Schema:
    """The columns of a file, told apart as the driver `replay` does.

    Raises:
        FileRefused: it cannot be read.
    """
    name = path.name.lower()
    try:
        if name.endswith((".parquet", ".pq")):
            import pyarrow.parquet as pq

            return pq.read_schema(path)
        parse = pacsv.ParseOptions(delimiter="\t" if ".tsv" in name else ",")
        with pacsv.open_csv(path, parse_options=parse) as reader:
            schema = reader.schema
        _ = schema.names  # decoded only when asked for
    except UnicodeDecodeError as error:
        raise FileRefused(f"the header of {path} is not UTF-8 ({error.object!r:.80}); {CONVERT}") from error
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(
            f"{path} is neither CSV with a header line nor Parquet ({str(error)[:200]}); for other forms use: "
            "headwater simulate replay"
        ) from error
    return schema


def check_file(driver: Mapping[str, Any]) -> None:
    """Refuse, before an agent is started, what the driver would refuse at its first rows.

    Args:
        driver: options of the driver `replay`.

    Raises:
        FileRefused: in words of the command.
    """
    file = {name: driver[name] for name in _OF_THE_FILE if name in driver}
    try:
        create_sensor("replay", driver)
        recording = Recording(FileOptions(**file))
        try:
            piece = next(recording.pieces(), None)
            if piece is None:
                raise FileRefused(f"file {driver['path']!r}: it holds no rows; give another file")
            if found := comma_numbers(piece.rows):
                output.complain(
                    f"note: {', '.join(found)} will be text, and look like numbers with a comma; for numbers: "
                    "--decimal-point ,"
                )
        finally:
            recording.close()
    except SensorConfigError as error:
        raise FileRefused(in_words_of_the_command(str(error))) from error


def comma_numbers(rows: pa.RecordBatch) -> list[str]:
    """Text columns whose first values all look like numbers with a decimal comma."""
    found = []
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        if pa.types.is_string(column.type):
            values = [value for value in column.slice(0, _LOOKED_AT_ROWS).to_pylist() if value]
            if values and all(_COMMA_NUMBER.fullmatch(value) for value in values):
                found.append(name)
    return found


def in_words_of_the_command(message: str) -> str:
    """A message of the driver `replay` with the options of `headwater simulate replay`; what is quoted stays."""
    text = re.sub(r"^driver 'replay'[:,] ", "", message).replace("option 'path' = ", "FILE ")
    text = text.replace(_TYPES, "or leave that column out with fields")
    text = _TYPED.sub(lambda found: f"--{found[1].replace('_', '-')}" if found[1] else found[0], text)
    return f"{text} (an agent.toml with driver replay has more options)" if _ELSEWHERE.search(text) else text
