"""The table of one stream: batches in, exactly once.

Per flush one Delta commit holds the rows, the new watermark of every (device, epoch) in it as application transaction
`device/epoch`, and for every shard in it a counter as application transaction `shard/NN`. The format refuses a commit
if one of its application transactions moved since the handle was refreshed; it does not refuse a lower version, so the
caller compares counters and watermarks after each refresh, before it appends (see `contract`, "What a gateway does").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
from deltalake.transaction import AddAction

from contract.errors import Rejected
from contract.names import TS, is_epoch
from lake import columns
from lake.delta import DeltaHandle, wall_clock_ms
from lake.parquet import encode
from lake.parts import COUNTING, REPEATING, RawBatch, build, sort_key
from lake.plan import BASE_COLUMNS, COLUMNS_MAX, Columns, WireSchema, WireSchemas, columns_of, grow, table_schema
from lake.portions import portions
from lake.schemas import SchemaObjects
from lake.store import Store

__all__ = ["AppendResult", "RawBatch", "RawTable", "lane_app_id", "lane_of", "shard_app_id", "table_path"]

_CONFIGURATION = {
    "delta.checkpointInterval": "100",
    # Not the first 32 columns, which is the default: the lineage stands behind the fields.
    "delta.dataSkippingStatsColumns": f"{TS},{columns.DEVICE},{columns.SEQ},{columns.RECEIVED_AT}",
}


class AppendResult(NamedTuple):
    """What one commit brought into the table."""

    rows: int
    batches: int
    files: int
    bytes: int
    """Size of the Parquet files."""
    skewed_rows: int
    """Rows that stand under the date of their arrival, because their `ts` is too far from it."""
    added_columns: tuple[str, ...]
    """Columns that the table did not have, or that got more fields."""


def table_path(stream: str) -> str:
    """Path of a stream's table in the lake."""
    return f"raw/{stream}"


def lane_app_id(device: str, epoch: str) -> str:
    """Application transaction that holds a watermark."""
    return f"{device}/{epoch}"


def lane_of(app_id: str) -> tuple[str, str]:
    """Device and epoch of a lane's application transaction; an empty epoch where it is not one."""
    device, _, epoch = app_id.rpartition("/")
    return device, epoch if is_epoch(epoch) else ""


def shard_app_id(shard: int) -> str:
    """Application transaction that counts the commits with rows of a shard. No device is named so: `/` is not allowed
    in a device's name, and an epoch has 32 digits."""
    return f"shard/{shard:02d}"


class RawTable:
    """One stream's table as one gateway process sees it. Not thread-safe; holds one Delta handle."""

    def __init__(
        self,
        store: Store,
        stream: str,
        *,
        max_clock_skew_s: float = 31 * 86_400,
        part_bytes_max: int = 128 * 1024 * 1024,
        columns_max: int = COLUMNS_MAX,
        schemas: SchemaObjects | None = None,
        clock_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        """Touch nothing yet.

        Args:
            store: where the lake is.
            stream: the stream's name.
            max_clock_skew_s: a `ts` further than this from its arrival does not decide the row's date.
            part_bytes_max: rows of one Parquet file, as bytes in memory (see `lake.portions`).
            columns_max: most columns the table may have.
            schemas: the schema objects of the lake, to share their cache between streams.
            clock_ms: wall clock for the modification times of files, milliseconds since 1970-01-01 UTC.
        """
        self.stream = stream
        self._handle = DeltaHandle(store, table_path(stream), clock_ms)
        self._max_clock_skew_us = int(max_clock_skew_s * 1_000_000)
        self._part_bytes_max = part_bytes_max
        self._columns_max = columns_max
        self._schemas = schemas if schemas is not None else SchemaObjects(store)
        self._seen_version = -1
        self._columns: Columns = {}
        self._planned: Columns = BASE_COLUMNS
        self._verdicts: dict[str, Rejected | None] = {}
        self._wire_schema = WireSchemas()

    @property
    def version(self) -> int:
        """Version of the table as of the last refresh, -1 where there is none."""
        return self._handle.version

    @property
    def life(self) -> int:
        """Another number whenever a refresh found a table that may be another: what was known of it may not hold."""
        return self._handle.life

    def refresh(self) -> None:
        """See the latest commit. That there is no table yet is fine.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        life = self.life
        self._handle.refresh()
        if self.life != life:
            # With the table its schema objects may be gone.
            self._schemas.forget()
        if self.life != life or self.version != self._seen_version:
            self._columns = columns_of(self._handle.schema)
            self._seen_version = self.version
        planned = self._columns or BASE_COLUMNS
        if self._planned is not planned:
            self._planned, self._verdicts = planned, {}

    def watermark(self, device: str, epoch: str) -> int:
        """Highest committed seq of a lane, 0 where there is none, as of the last refresh.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return self._handle.transaction(lane_app_id(device, epoch))

    def watermarks(self, lanes: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Watermarks of many lanes.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return {lane: self.watermark(*lane) for lane in lanes}

    def shard_counter(self, shard: int) -> int:
        """How many commits brought rows or watermarks of this shard, as of the last refresh.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return self._handle.transaction(shard_app_id(shard))

    def unfit(self, schema: pa.Schema) -> Rejected | None:
        """Why batches of this wire schema cannot stand in the table; None where they can, perhaps with new columns.

        Judged against the table as of the last refresh and the schemas found fit since: of two schemas that contradict
        each other, the one that was asked for first fits.
        """
        wire = self._wire_schema(schema)
        if wire.fingerprint not in self._verdicts:
            try:
                self._planned = grow(self._planned, wire, self.stream, self._columns_max)
                self._verdicts[wire.fingerprint] = None
            except Rejected as rejected:
                self._verdicts[wire.fingerprint] = rejected
        return self._verdicts[wire.fingerprint]

    def append(
        self,
        batches: Sequence[RawBatch],
        watermarks: Mapping[tuple[str, str], int],
        shard_counters: Mapping[int, int],
    ) -> AppendResult:
        """Commit rows, watermarks and counters in one atomic act, on the handle as of the last refresh.

        Args:
            batches: rows to add, each of a schema that is not `unfit`. May be empty where seqs are only stepped over.
            watermarks: new watermark of every lane that moves.
            shard_counters: new counter of every shard of those lanes.

        Returns:
            What was committed.

        Raises:
            CommitConflictError: somebody else moved one of these lanes or shards or changed the columns since the last
                refresh. Nothing was committed: refresh, check again, try again.
            StoreUnavailableError: it is not known whether it was committed. The same path shows it.
            Rejected: a batch's schema is unfit. Nothing was committed.
        """
        for batch in batches:
            unfit = self.unfit(batch.batch.schema)
            if unfit is not None:
                raise unfit
        wires = {wire.fingerprint: wire for wire in (self._wire_schema(batch.batch.schema) for batch in batches)}
        for wire in wires.values():
            self._schemas.keep(wire.fingerprint, wire.serialized)
        added = self._ensure_columns(wires.values())
        files: list[AddAction] = []
        rows = skewed = 0
        ordered = sorted(batches, key=sort_key)
        for part in portions(ordered, self._wire_schema, self._columns, self._part_bytes_max):
            part_files, part_skewed = self._write(part)
            files += part_files
            skewed += part_skewed
            rows += sum(batch.batch.num_rows for batch in part)
        transactions = {lane_app_id(*lane): seq for lane, seq in watermarks.items()}
        transactions |= {shard_app_id(shard): count for shard, count in shard_counters.items()}
        self._handle.commit(files, transactions)
        return AppendResult(rows, len(batches), len(files), sum(file.size for file in files), skewed, added)

    def _write(self, batches: Sequence[RawBatch]) -> tuple[list[AddAction], int]:
        """Write batches as Parquet files, one per date; also count the rows whose clock was too far off."""
        parts, skewed = build(batches, self._wire_schema, self._columns, self._max_clock_skew_us)
        files = [
            self._handle.put_file(part.date, encode(part.table, REPEATING, COUNTING), part.stats) for part in parts
        ]
        return files, skewed

    def _ensure_columns(self, wires: Iterable[WireSchema]) -> tuple[str, ...]:
        """Make the table, or add the columns that it lacks, so that the handle's version is the next one and no
        other."""
        needed = dict(self._columns or BASE_COLUMNS)
        for wire in wires:
            for slot in wire.slots:
                needed[slot.field.name] = self._planned[slot.field.name]
        have = self._columns
        changed = [
            field
            for name, field in needed.items()
            if name not in have or not field.equals(have[name], check_metadata=True)
        ]
        if self.version < 0:
            self._handle.create(table_schema(needed), _CONFIGURATION)
        elif changed:
            self._handle.add_columns(changed)
        self._columns, self._seen_version = needed, self.version
        return tuple(field.name for field in changed)
