"""Predictions as they arrive: the rows of `predictions.<model>` that commits since the last look brought.

What is new is told by the table's log, not by `ts`: rows of a device that was away for a day are new today. Each look
reads the log entries and Parquet files of new commits and nothing else, so its cost does not grow with the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from contract.names import PREDICTIONS_PREFIX
from lake.catalog import Catalog
from lake.errors import CorruptLakeError, ObjectMissingError
from lake.raw import table_path
from lake.store import Store

COLUMNS = ("_device", "release", "window_start", "ts", "score", "label", "latency_us", "nan_count", "features")
BACKLOG_COMMITS_MAX = 500
"""Commits that the first look goes back."""


class Predictions(NamedTuple):
    """Rows, in the order in which they were committed."""

    device: list[str]
    release: npt.NDArray[np.int64]
    start_us: npt.NDArray[np.int64]
    end_us: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]
    """NaN where the model gave none."""
    label: list[str]
    latency_us: npt.NDArray[np.int64]
    nan_count: npt.NDArray[np.int64]
    features: list[npt.NDArray[np.float64] | None]

    def __len__(self) -> int:
        """How many rows (not columns)."""
        return len(self.device)


class _File(msgspec.Struct, rename="camel"):
    path: str
    stats: str | None = None
    data_change: bool = True


class _Added(NamedTuple):
    path: str
    rows: int


class _Action(msgspec.Struct):
    add: _File | None = None


class _Stats(msgspec.Struct, rename="camel"):
    num_records: int = 0


_decode = msgspec.json.Decoder(_Action).decode
_decode_stats = msgspec.json.Decoder(_Stats).decode


class PredictionFeed:
    """The new rows of one model. Not thread-safe.

    Args:
        store: where the lake is.
        model: whose predictions.
    """

    def __init__(self, store: Store, model: str) -> None:
        self._store = store
        self._path = table_path(PREDICTIONS_PREFIX + model)
        self._version = -1
        self.skipped_commits = 0
        """Not read, because more had come than one look may read."""
        self.skipped_files = 0
        """Files, or entries of the log, that are not what a gateway writes; what is behind them is read."""

    def take(self, rows_max: int) -> Iterator[Predictions]:
        """The rows that came since the last call, commit by commit; at the first, the latest that are there.

        Where one fails, what it did not give comes at the next call, and nothing comes twice.

        Args:
            rows_max: where more have come, the newest commits with about so many rows are read, older ones skipped
                and counted.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        latest = self._latest()
        first = max(self._version + 1, latest - BACKLOG_COMMITS_MAX + 1)
        commits: list[tuple[int, list[str] | None]] = []
        rows, version = 0, latest
        while version >= first and rows < rows_max:
            files = self._files(version)
            commits.append((version, None if files is None else [file.path for file in files]))
            rows += sum(file.rows for file in files or ())
            version -= 1
        if self._version >= 0:
            self.skipped_commits += max(0, version - self._version)
        self._version = max(self._version, version)
        for number, paths in reversed(commits):
            tables = [self._read(path) for path in paths or ()]
            # All of the commit is here: from now on it is given, or counted as what nobody can read.
            self._version = number
            self.skipped_files += tables.count(None) + (paths is None)
            found = [table for table in tables if table is not None]
            if found:
                yield parse(pa.concat_tables(found))

    def _latest(self) -> int:
        """Follow the log one version at a time; it is listed only at the first look, or where the table is another:
        restored, or begun anew. Then what is there is read once more, rather than nothing until it has grown as long.
        """
        version = self._version
        if version >= 0:
            while self._has(version + 1):
                version += 1
            if version > self._version or self._has(version):
                return version
            self._version = -1
        state = Catalog(self._store).state(self._path)
        return -1 if state is None else state.version

    def _has(self, version: int) -> bool:
        try:
            self._store.size(self._entry(version))
        except ObjectMissingError:
            return False
        return True

    def _entry(self, version: int) -> str:
        return f"{self._path}/_delta_log/{version:020d}.json"

    def _files(self, version: int) -> list[_Added] | None:
        """What a commit added; None where its entry cannot be read."""
        try:
            lines = self._store.get(self._entry(version)).splitlines()
        except ObjectMissingError:
            return []  # cleaned up behind a checkpoint: too old to matter
        try:
            found = [_decode(line).add for line in lines if b'"add"' in line[:64]]
            new = [file for file in found if file is not None and file.data_change]
            return [_Added(file.path, _decode_stats(file.stats).num_records if file.stats else 1) for file in new]
        except msgspec.MsgspecError:
            return None

    def _read(self, path: str) -> pa.Table | None:
        """The rows of a file; None where it cannot be read."""
        try:
            data = self._store.get(f"{self._path}/{unquote(path)}")
            with pq.ParquetFile(pa.BufferReader(data)) as file:
                here = [name for name in COLUMNS if name in file.schema_arrow.names]
                return with_all_columns(file.read(columns=here))
        except ObjectMissingError:
            return empty()  # compacted and vacuumed meanwhile
        except (CorruptLakeError, pa.ArrowException, OSError):  # Arrow calls a torn file an OSError
            return None


_SCHEMA = pa.schema(
    [
        ("_device", pa.string()),
        ("release", pa.int64()),
        ("window_start", pa.int64()),
        ("ts", pa.int64()),
        ("score", pa.float64()),
        ("label", pa.string()),
        ("latency_us", pa.int64()),
        ("nan_count", pa.int64()),
        ("features", pa.list_(pa.float64())),
    ]
)


def empty() -> pa.Table:
    """No rows, with all columns."""
    return _SCHEMA.empty_table()


def with_all_columns(table: pa.Table) -> pa.Table:
    """The columns of `COLUMNS` in plain types: times as microseconds, what is not there null."""
    columns = []
    for field in _SCHEMA:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False)
        columns.append(column.cast(field.type))
    return pa.table(columns, schema=_SCHEMA)


def parse(table: pa.Table) -> Predictions:
    """Rows of a table with all columns."""

    def ints(name: str) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = table.column(name).fill_null(0).to_numpy().astype(np.int64)
        return found

    features: list[npt.NDArray[np.float64] | None] = []
    for chunk in table.column("features").chunks:
        values = chunk.values.fill_null(float("nan")).to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy()
        present = chunk.is_valid().to_numpy(zero_copy_only=False)
        features += [
            values[start:end] if there else None
            for start, end, there in zip(offsets[:-1], offsets[1:], present, strict=True)
        ]
    return Predictions(
        [device or "" for device in table.column("_device").to_pylist()],
        ints("release"),
        ints("window_start"),
        ints("ts"),
        table.column("score").fill_null(float("nan")).to_numpy().astype(np.float64),
        [label or "" for label in table.column("label").to_pylist()],
        ints("latency_us"),
        ints("nan_count"),
        features,
    )
