"""Recordings on disk as a stream of (times, rows): CSV and Parquet, read piece by piece in bounded memory.

Times come out as int64 microseconds since 1970-01-01 UTC; values as the file holds them, or as declared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import pyarrow as pa
import pyarrow.csv as pacsv

from edge_agent import compute as pc
from edge_agent.sensors.columns import Columns
from edge_agent.sensors.options import parse_fields, split_fields
from edge_agent.sensors.port import SensorConfigError, SensorError

_CSV_BLOCK_BYTES = 1 << 17
"""A line cannot be longer. Arrow reads about 36 blocks ahead: 5 MB here; 38 MB and no faster with blocks of 1 MB."""
_PARQUET_BUFFER_BYTES = 1 << 16
_BATCH_ROWS = 8192
_NUMBER_FORMATS = {"s": 1_000_000.0, "ms": 1_000.0, "us": 1.0, "ns": 0.001}
_ZONE = r"(Z|z|[+-]\d\d(:?\d\d)?)$"
"""What follows the date of a time that carries a zone."""
CONVERT = "convert the file, for example: iconv -f LATIN1 -t UTF-8 OLD > NEW"
"""The remedy for text that is not UTF-8."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COMPRESSIONS = (".gz", ".zst", ".bz2")


class FileOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is in the file, and where."""

    path: str
    format: str = ""
    """`csv` or `parquet`; empty goes by the name: `.parquet` and `.pq`, all else is CSV, also `.gz`, `.zst`, `.bz2`."""
    time_column: str = "ts"
    """Empty: the file has none, and `rate_hz` gives the distance of rows."""
    time_format: str = ""
    """`iso8601`, `s`, `ms`, `us`, `ns` (since 1970-01-01 UTC), or a strptime pattern such as `%d.%m.%Y %H:%M:%S.%f`.
    Empty means ISO 8601 text or the timestamp type of a Parquet column."""
    timezone: str = "UTC"
    """Zone of times that carry none."""
    rate_hz: float = 0.0
    fields: list[str] | dict[str, str] = []
    """Columns to read: names, or names and types (`""`: as found). Empty reads all but the time column."""
    delimiter: str = ""
    """Empty: a tab for `.tsv`, else a comma."""
    decimal_point: str = "."
    columns: list[str] = []
    """Column names of a CSV file without a header line."""
    skip_rows: int = 0
    """Lines before the header of a CSV file."""
    null_values: tuple[str, ...] = ("", "NA", "N/A", "NULL", "null")
    """Texts of a CSV file that mean null in number columns. In text columns they are texts."""


class Piece(NamedTuple):
    """Some consecutive rows of a recording."""

    times: pa.Array
    """int64 microseconds since 1970-01-01 UTC, without nulls; ordered as in the file, which need not be by time."""
    rows: pa.RecordBatch


class Recording:
    """One file, read once from its beginning.

    Args:
        options: what is in it.

    Attributes:
        schema: the fields without the time.

    Raises:
        SensorConfigError: there is no such file, or it is not as described.
        SensorError: the file cannot be read now.
    """

    def __init__(self, options: FileOptions) -> None:
        self._options = options
        self._file = _check_file(options)
        self._names, self._types = split_fields(options.fields)
        _check_options(options, self._names)
        self._row = 0
        with self._translated():
            self._batches = self._open_csv() if self._format() == "csv" else self._open_parquet()
            first = next(self._batches, None)
        self._first: pa.RecordBatch | None = first
        if first is None:
            raise self._bad("it holds no rows; give another file")
        self.schema = pa.schema([field for field in first.schema if field.name != options.time_column])
        self._check_schema()

    def pieces(self) -> Iterator[Piece]:
        """The rows from the beginning; call it once.

        Raises:
            SensorConfigError: a value that does not fit its column, or a time that cannot be read; naming the row.
            SensorError: the file cannot be read now.
        """
        batch = self._first
        while batch is not None:
            if batch.num_rows:
                yield self._piece(batch)
            with self._translated():
                batch = next(self._batches, None)

    def _check_schema(self) -> None:
        """Refuse columns that could never be sent, and bytes that were taken for binary because they are no text."""
        times = 0 if self._first is None else self._first.schema.names.count(self._options.time_column)
        if times > 1:
            raise self._bad(f"it has {times} columns {self._options.time_column!r}; rename all but the time")
        if not self.schema.names:
            raise self._bad("it has no column beside the time; give a file with at least one measured field")
        try:
            Columns(self.schema)
        except SensorConfigError as error:
            raise self._bad(f"{error} in the file, or choose other columns with fields") from error
        if self._format() == "csv" and self._first is not None:
            for field in self.schema:
                if pa.types.is_binary(field.type) and field.name not in self._types:
                    self._refuse_bytes(field.name, self._first.column(field.name))

    def _refuse_bytes(self, name: str, column: pa.Array) -> None:
        for row, value in enumerate(column.to_pylist(), 1):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise self._bad(f"row {row}, column {name!r}: {value!r:.80} is not UTF-8; {CONVERT}") from error

    def close(self) -> None:
        """Let go of the file."""
        self._first = None
        self._batches = iter(())

    def _piece(self, batch: pa.RecordBatch) -> Piece:
        options = self._options
        if not options.time_column:
            numbers = pa.arange(self._row, self._row + batch.num_rows)
            times = pc.floor(pc.divide(pc.multiply(numbers.cast(pa.float64()), 1e6), options.rate_hz)).cast(pa.int64())
            rows = batch
        else:
            column = batch.column(options.time_column)
            times = self._times(column)
            rows = batch.drop_columns([options.time_column])
        self._row += batch.num_rows
        return Piece(times, rows)

    def _times(self, column: pa.Array) -> pa.Array:
        name, time_format = self._options.time_column, self._options.time_format
        lacking = column.is_null()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            lacking = pc.or_(lacking, pc.equal(pc.utf8_trim_whitespace(column), "").fill_null(True))
        if (index := pc.index(lacking, True).as_py()) >= 0:
            raise self._bad(f"row {self._row + index + 1} has no time in column {name!r}; remove such rows")
        try:
            return parse_times(column, time_format, self._options.timezone)
        except MixedZones as error:
            raise self._bad(f"row {self._row + error.index + 1}, column {name!r}: {error}") from error
        except _UNREADABLE as error:
            index = self._first_unreadable(column)
            value = column[index].as_py()
            raise self._bad(
                f"row {self._row + index + 1}: the time {value!r:.80} in column {name!r} cannot be read with "
                f"time_format {time_format!r}; mend it, or set time_format "
                "(iso8601, s, ms, us, ns or a strptime pattern)"
            ) from error

    def _first_unreadable(self, column: pa.Array) -> int:
        for index in range(len(column)):
            try:
                parse_times(column.slice(index, 1), self._options.time_format, self._options.timezone)
            except _UNREADABLE:
                return index
        return 0

    def _format(self) -> str:
        if self._options.format:
            return self._options.format
        name = self._file.name.lower()
        for suffix in _COMPRESSIONS:
            name = name.removesuffix(suffix)
        return "parquet" if name.endswith((".parquet", ".pq")) else "csv"

    def _open_csv(self) -> Iterator[pa.RecordBatch]:
        options = self._options
        types = {field.name: field.type for field in parse_fields(self._types, "replay")}
        if options.time_column:
            # Read as text or number on purpose: Arrow would guess from the first block, and fail on a later one.
            types[options.time_column] = _csv_time_type(options.time_format)
        wanted = [*self._names, *([options.time_column] if options.time_column else [])] if self._names else None
        delimiter = options.delimiter or ("\t" if ".tsv" in self._file.name.lower() else ",")
        read = pacsv.ReadOptions(
            use_threads=False,
            block_size=_CSV_BLOCK_BYTES,
            skip_rows=options.skip_rows,
            column_names=options.columns or None,
        )
        convert = pacsv.ConvertOptions(
            column_types=types,
            include_columns=wanted,
            null_values=list(options.null_values),
            strings_can_be_null=False,
            decimal_point=options.decimal_point,
        )
        parse = pacsv.ParseOptions(delimiter=delimiter)
        reader = pacsv.open_csv(str(self._file), read_options=read, parse_options=parse, convert_options=convert)
        if options.time_column and options.time_column not in reader.schema.names:
            raise self._bad(
                f"there is no time column {options.time_column!r}; its columns are {reader.schema.names[:20]}: "
                "set time_column, or delimiter if these look wrong"
            )
        return iter(reader)

    def _open_parquet(self) -> Iterator[pa.RecordBatch]:
        # Imported here: it costs memory that a device without Parquet recordings should not pay.
        import pyarrow.parquet as pq

        options = self._options
        file = pq.ParquetFile(str(self._file), pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES)
        present = file.schema_arrow.names
        wanted = list(self._names) or [name for name in present if name != options.time_column]
        for name in [*wanted, *([options.time_column] if options.time_column else [])]:
            if name not in present:
                raise self._bad(f"there is no column {name!r}; its columns are {present[:20]}")
        types = parse_fields(self._types, "replay")
        columns = [*wanted, *([options.time_column] if options.time_column else [])]
        return (_as_declared(batch, columns, types) for batch in file.iter_batches(_BATCH_ROWS, columns=columns))

    def _bad(self, what: str) -> SensorConfigError:
        return SensorConfigError(f"driver 'replay', file {str(self._file)!r}: {what}")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise self._bad(f"{error.strerror or error}; check path and permissions") from error
        except KeyError as error:
            raise self._bad(f"{str(error).strip(chr(34))[:200]}; check fields, columns and delimiter") from error
        except UnicodeDecodeError as error:
            raise self._bad(f"its header is not UTF-8 ({error.object!r:.80}); {CONVERT}") from error
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            said = str(error).splitlines()[0][:300]
            raise self._bad(f"{said}; {_remedy(said)}") from error
        except OSError as error:
            raise SensorError(f"driver 'replay', file {str(self._file)!r} cannot be read now: {error}") from error


class MixedZones(ValueError):
    """Times with a zone and times without one in a file: nobody knows how far they are apart.

    Attributes:
        index: of the first that differs from those before.
    """

    def __init__(self, value: str, index: int, *, zoned: bool) -> None:
        has, others = ("a zone", "none") if zoned else ("no zone", "one")
        super().__init__(
            f"the time {value!r:.80} has {has}, those before have {others}; write all with a zone or all without"
        )
        self.index = index


_UNREADABLE = (pa.ArrowException, ValueError, OverflowError, ZoneInfoNotFoundError)


def parse_times(column: pa.Array, time_format: str, timezone: str) -> pa.Array:
    """A time column as int64 microseconds since 1970-01-01 UTC; finer parts are cut off.

    Args:
        column: text, numbers or timestamps, without nulls.
        time_format: as in `FileOptions.time_format`.
        timezone: the zone of times that carry none.

    Raises:
        ValueError, pyarrow.ArrowException, OverflowError: a time that does not fit the format.
    """
    kind = column.type
    if pa.types.is_timestamp(kind):
        zoned = column if kind.tz is not None else pc.assume_timezone(column, timezone, ambiguous="earliest")
        if kind.unit == "ns":
            return _number_times(zoned.view(pa.int64()), "ns")
        return zoned.cast(pa.timestamp("us", tz="UTC")).view(pa.int64())
    if pa.types.is_date(kind):
        return parse_times(column.cast(pa.timestamp("s")), time_format, timezone)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _number_times(column, time_format)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"a column of type {kind} holds no times")
    if time_format in _NUMBER_FORMATS:
        return _number_times(column.cast(pa.int64() if time_format == "ns" else pa.float64()), time_format)
    if "%" in time_format:
        zone = ZoneInfo(timezone)
        return pa.array([_strptime_us(text, time_format, zone) for text in column.to_pylist()], type=pa.int64())
    return _iso_times(column, timezone)


def _number_times(column: pa.Array, time_format: str) -> pa.Array:
    if time_format not in _NUMBER_FORMATS:
        raise ValueError("numbers need the unit")
    if pa.types.is_integer(column.type):
        whole = column.cast(pa.int64())
        if time_format == "ns":
            # Arrow divides towards zero; before 1970 that would be a microsecond late.
            return pc.divide(pc.if_else(pc.less(whole, 0), pc.subtract(whole, 999), whole), 1000)
        return pc.multiply_checked(whole, int(_NUMBER_FORMATS[time_format]))
    scaled = pc.multiply(column.cast(pa.float64()), _NUMBER_FORMATS[time_format])
    # Rounded to the nearest microsecond: 1700000000.000001 s is not exact in binary.
    return pc.round(scaled).cast(pa.int64())


def _iso_times(column: pa.Array, timezone: str) -> pa.Array:
    trimmed = pc.utf8_trim_whitespace(column)
    zones = pc.match_substring_regex(pc.utf8_slice_codeunits(trimmed, 10), _ZONE)
    zoned = len(zones) > 0 and zones[0].as_py()
    if zones.true_count not in (0, len(zones)):
        index = pc.index(zones, not zoned).as_py()
        raise MixedZones(column[index].as_py(), index, zoned=not zoned)
    if zoned:
        parsed = trimmed.cast(pa.timestamp("ns", tz="UTC"))
    else:
        parsed = pc.assume_timezone(trimmed.cast(pa.timestamp("ns")), timezone, ambiguous="earliest")
    return _number_times(parsed.cast(pa.timestamp("ns", tz="UTC")).view(pa.int64()), "ns")


def _strptime_us(text: str, pattern: str, zone: ZoneInfo) -> int:
    parsed = datetime.strptime(text.strip(), pattern)
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=zone)
    delta = parsed - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _csv_time_type(time_format: str) -> pa.DataType:
    if time_format == "ns":
        return pa.int64()
    return pa.float64() if time_format in _NUMBER_FORMATS else pa.string()


def _remedy(said: str) -> str:
    """What to do about an error of Arrow's CSV or Parquet reader."""
    if "Empty CSV" in said:
        return "give a file with a header line and rows"
    if "Expected" in said and "columns, got" in said:
        return "mend that line, or check delimiter, columns and skip_rows"
    if "UTF8" in said or "utf8" in said.lower():
        return CONVERT
    if "conversion error" in said:
        return "mend that value, or declare the type of that column in fields"
    return "give a file that is whole, and check format and delimiter"


def _as_declared(batch: pa.RecordBatch, columns: list[str], types: pa.Schema) -> pa.RecordBatch:
    arrays = {name: batch.column(name) for name in columns}
    for field in types:
        arrays[field.name] = arrays[field.name].cast(field.type)
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def _check_file(options: FileOptions) -> Path:
    path = Path(options.path).expanduser()
    if not path.exists():
        raise SensorConfigError(f"driver 'replay': option 'path' = {options.path!r} does not exist; give a file")
    if path.is_dir():
        raise SensorConfigError(f"driver 'replay': option 'path' = {options.path!r} is a folder; give a file")
    if options.format not in ("", "csv", "parquet"):
        raise SensorConfigError(f"driver 'replay': option 'format' = {options.format!r}; give csv or parquet")
    return path


def _check_options(options: FileOptions, names: tuple[str, ...]) -> None:
    problems: Mapping[str, Any] = {
        "time_column is empty and rate_hz is not above 0; give one of them": not options.time_column
        and not options.rate_hz > 0,
        f"time column {options.time_column!r} is also in fields; take it out there": options.time_column in names,
        f"delimiter {options.delimiter!r} is not one character": len(options.delimiter) > 1,
        f"decimal_point {options.decimal_point!r} is not one character": len(options.decimal_point) != 1,
        f"skip_rows = {options.skip_rows} is negative": options.skip_rows < 0,
        f"time_format {options.time_format!r} is not known; give iso8601, s, ms, us, ns or a strptime pattern with %": (
            options.time_format not in ("", "iso8601", *_NUMBER_FORMATS) and "%" not in options.time_format
        ),
    }
    for problem, present in problems.items():
        if present:
            raise SensorConfigError(f"driver 'replay': {problem}")
    try:
        ZoneInfo(options.timezone)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise SensorConfigError(
            f"driver 'replay': timezone {options.timezone!r} is not known; give a name such as UTC or Europe/Berlin"
        ) from error
