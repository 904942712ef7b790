"""What models said of the windows of a stream's history: the tables `predictions/<model>`, each window once.

One commit holds scored windows and, for every lane (stream, device, epoch) in it, how far the lane is done, as an
application transaction: rows and progress move in one act. A counter per release and stream moves with every commit, so
of two that score the same release at once, one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from lake.columns import DATE
from lake.delta import DeltaHandle, wall_clock_ms
from lake.errors import CommitConflictError, CorruptLakeError
from lake.parquet import encode
from lake.store import Store
from lake.types import STORED_TIMESTAMP

FOLDER = "predictions"
SCHEMA = pa.schema(
    [
        pa.field("stream", pa.string()),
        pa.field("device", pa.string()),
        pa.field("release", pa.int32()),
        pa.field("window_start", STORED_TIMESTAMP),
        pa.field("window_end", STORED_TIMESTAMP),
        pa.field("score", pa.float32()),
        pa.field("label", pa.string()),
        pa.field("nan_count", pa.int32()),
        pa.field("features", pa.list_(pa.float32())),
        pa.field("epoch", pa.string()),
        pa.field("seq", pa.int64()),
        pa.field("row", pa.int32()),
        pa.field("first_seq", pa.int64()),
        pa.field("first_row", pa.int32()),
    ]
)
"""`epoch`, `seq`, `row` are those of the window's last reading, `first_seq` and `first_row` of its first; `score` is
that of the label, or of the anomaly; `label` is "" where the model gives none."""
_CONFIGURATION = {"delta.checkpointInterval": "100"}
_REPEATING = frozenset(("stream", "device", "label", "epoch"))
_COUNTING = frozenset(("window_start", "window_end", "seq", "first_seq"))
_STATED = ("stream", "device", "release", "seq")


class Lane(NamedTuple):
    """One (device, epoch) of a stream: its rows only ever grow at the end."""

    device: str
    epoch: str


def predictions_path(model: str) -> str:
    """Where the predictions of a model stand, which is also their name in SQL: `SELECT * FROM "predictions/shaker"`."""
    return f"{FOLDER}/{model}"


class PredictionTable:
    """The predictions of one release over one stream. Not thread-safe; holds one Delta handle.

    Args:
        store: where the lake is.
        model: whose table it is.
        release: its version.
        stream: that is scored.
        clock_ms: wall clock, milliseconds since 1970-01-01 UTC.
    """

    def __init__(
        self, store: Store, model: str, release: int, stream: str, *, clock_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        self.path = predictions_path(model)
        self._prefix = f"{release}/{stream}"
        self._clock_ms = clock_ms
        self._handle = DeltaHandle(store, self.path, clock_ms)
        self._seen: int | None = None

    @property
    def version(self) -> int:
        """Of the table as of the last refresh, -1 where there is none."""
        return self._handle.version

    def refresh(self) -> None:
        """See the latest commit.

        Raises:
            CommitConflictError: somebody else scored the same release over the same stream since the last refresh.
            CorruptLakeError: the table is somebody else's.
            StoreUnavailableError: the store did not answer.
        """
        self._handle.refresh()
        count = self._handle.transaction(self._prefix)
        if self._seen not in (None, count):
            raise self._raced()
        self._seen = count
        for field in self._handle.schema:
            known = SCHEMA.field(field.name).type if field.name in SCHEMA.names else field.type
            if field.type != known:
                raise CorruptLakeError(
                    f"column {field.name} of {self.path} is {field.type}, not {known}; move that table away"
                )

    def progress(self, lane: Lane) -> int:
        """Seq up to which a lane is done: every window that ends there or before is in the table. 0 for none.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return self._handle.transaction(self._app_id(lane))

    def append(self, rows: pa.Table, progress: Mapping[Lane, int]) -> None:
        """Commit windows and progress in one act, then see the commit.

        Args:
            rows: in `SCHEMA`; may be empty.
            progress: of the lanes that move.

        Raises:
            CommitConflictError: somebody else scored the same release over the same stream. Nothing was committed.
            StoreUnavailableError: it is not known whether it was committed. Begin anew: the table knows.
        """
        if self._handle.version < 0:
            stored = pa.schema([field.with_nullable(True) for field in SCHEMA])
            self._handle.create(stored.append(pa.field(DATE, pa.date32())), _CONFIGURATION)
        seen = self._seen or 0
        files = []
        if rows.num_rows:
            rows = rows.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
            date = datetime.fromtimestamp(self._clock_ms() / 1000, UTC).date().isoformat()
            files.append(self._handle.put_file(date, encode(rows, _REPEATING, _COUNTING), _stats(rows)))
        transactions = {self._app_id(lane): seq for lane, seq in progress.items()}
        try:
            self._handle.commit(files, transactions | {self._prefix: seen + 1})
        except CommitConflictError as error:
            raise self._raced() from error
        self._seen = seen + 1
        self.refresh()

    def _app_id(self, lane: Lane) -> str:
        return f"{self._prefix}/{lane.device}/{lane.epoch}"

    def _raced(self) -> CommitConflictError:
        release, _, stream = self._prefix.partition("/")
        return CommitConflictError(
            f"somebody else writes predictions of release {release} over stream {stream} to {self.path}; let that run "
            "end, then start this one again: nothing is written twice"
        )


def _stats(rows: pa.Table) -> bytes:
    """What lets readers skip a file."""
    low, high = {}, {}
    for name in _STATED:
        bounds = pc.min_max(rows.column(name)).as_py()
        low[name], high[name] = bounds["min"], bounds["max"]
    nulls = dict.fromkeys(_STATED, 0)
    return msgspec.json.encode({"numRecords": rows.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls})
