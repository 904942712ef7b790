"""Batch scoring: what a release says of a stream's history, into `predictions/<model>`, every window exactly once.

The state is in the table itself (see `lake.predictions`). For every lane (device, epoch) the table holds a number: the
seq up to which the lane is done. A run reads each lane from the first row of the last window up to there, cuts windows
as if it had read the lane from its start, and leaves out what ends at or before that number. Windows that begin in the
rows of an earlier run and end in new ones are so neither lost nor doubled, a late epoch is a lane like any other, and
a run that is killed has committed whole steps.

A run over a span of time (`since`, `until`) moves no such number: windows that it writes are found in the table, one by
one, by later runs.

Memory: rows of one Arrow batch, what is left of a lane, one batch of windows, and the answers of one commit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from contract.errors import ConfigurationError
from lake.columns import DEVICE, EPOCH, ROW, SEQ
from lake.duck import identifier, literal
from lake.predictions import Lane, PredictionTable
from lake.query import Lake, Pins
from lake.raw import table_path
from lake.scoring import Scorer
from lake.store import Store
from trainer.answers import Answers
from trainer.errors import DataError, NoSuchStreamError
from trainer.lanes import Cuts, LaneCutter, LaneRows
from trainer.progress import NOBODY, Progress
from trainer.rows import as_float32

ANSWER_BYTES_MAX = 32 * 1024 * 1024
"""Answers in memory before they are committed."""
COMMIT_ROWS = 2_000_000
"""Rows read before a commit, however few windows they gave."""
LANES_MAX = 500
"""Of one query."""


class Span(NamedTuple):
    """A span of time: windows that end in it, microseconds since 1970-01-01 UTC. None: no bound."""

    since_us: int | None = None
    until_us: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of time."""
        return self.since_us is None and self.until_us is None


ALL_TIME = Span()


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did. The names are a contract: `headwater predict --json`."""

    model: str
    version: int
    stream: str
    stream_version: int
    """Delta version of the stream that was read."""
    table: str
    devices: int
    """With rows that were read."""
    rows: int
    """Read; a few of them once more."""
    windows: int
    """Written by this run."""
    commits: int
    seconds: float


class _Work(NamedTuple):
    """A lane that has something to do."""

    lane: Lane
    last: int
    """Its last seq."""
    end: int
    """The last seq with a row that may end a window of the span."""
    done: int
    rows: int
    """Beyond it, about: batches are taken to have the same number of rows."""


def predict(
    lake: Lake,
    store: Store,
    scorer: Scorer,
    *,
    stream: str = "",
    span: Span = ALL_TIME,
    progress: Progress = NOBODY,
) -> Predicted:
    """Score what is not scored yet.

    Args:
        lake: to read with.
        store: the same lake, to write to.
        scorer: the release.
        stream: that is scored; empty for the one that the manifest names.
        span: windows that end in it; by default all.
        progress: told the rows that are done, of those that were not.

    Raises:
        NoSuchStreamError: the stream is not there.
        DataError: it lacks a field of the model.
        ModelError: the model failed, or took too long.
        CommitConflictError: another run scores the same release over the same stream; nothing is lost.
        QueryError, StoreUnavailableError: as `Lake.read`; what was committed stays, run it again.
    """
    began_s = time.monotonic()
    run = _Run(lake, store, scorer, stream or scorer.manifest.stream, span)
    work = run.work()
    with progress.track(f"predict {run.stream}", sum(each.rows for each in work)) as done:
        for begin in range(0, len(work), LANES_MAX):
            run.score(work[begin : begin + LANES_MAX], done)
    return Predicted(
        model=run.manifest.model,
        version=run.manifest.version,
        stream=run.stream,
        stream_version=run.pins[run.path],
        table=run.table.path,
        devices=len({each.lane.device for each in work}),
        rows=run.rows,
        windows=run.windows,
        commits=run.commits,
        seconds=round(time.monotonic() - began_s, 3),
    )


class _Run:
    """One run of `predict`."""

    def __init__(self, lake: Lake, store: Store, scorer: Scorer, stream: str, span: Span) -> None:
        self.lake, self.scorer, self.manifest, self.stream, self.span = lake, scorer, scorer.manifest, stream, span
        self.path = table_path(stream)
        self.pins = self._pins(store)
        self.table = PredictionTable(store, self.manifest.model, self.manifest.version, stream)
        self.table.refresh()
        self.pins_written = {self.table.path: self.table.version}
        self.rows = self.windows = self.commits = 0
        self._answers = Answers(scorer, stream)

    def work(self) -> list[_Work]:
        """The lanes with rows that are not done, by device and epoch."""
        since_us, until_us = self.span
        # Clocks are set back: the last row before a moment may stand anywhere in its lane.
        before = "" if until_us is None else f" FILTER (WHERE epoch_us(ts) < {until_us})"
        found = self.lake.sql(
            f"SELECT {DEVICE}, {EPOCH}, min({SEQ}), max({SEQ}), max({SEQ}){before}, count(*), epoch_us(max(ts)) "
            f"FROM {identifier(self.path)} GROUP BY ALL ORDER BY ALL",
            at=self.pins,
        )
        work = []
        for device, epoch, first, last, end, rows, last_us in zip(
            *(each.to_pylist() for each in found.columns), strict=True
        ):
            lane = Lane(device, epoch)
            done = self.table.progress(lane)
            if end is None or end <= done or (since_us is not None and last_us < since_us):
                continue
            left = -(-rows * (end - max(done, first - 1)) // (last - first + 1))
            work.append(_Work(lane, last, end, done, left))
        return work

    def score(self, work: Sequence[_Work], done: Any) -> None:
        """Score some lanes."""
        by_lane = {each.lane: each for each in work}
        written = _Written(self._written(work))
        finished: dict[Lane, int] = {}
        cutter, lane, uncommitted, untold = LaneCutter(self.manifest.window), None, 0, 0
        for found, rows in self._rows(work):
            if found != lane:
                if lane is not None:
                    finished[lane] = by_lane[lane].last
                    done(untold)
                cutter, lane, untold = LaneCutter(self.manifest.window), found, by_lane[found].rows
            each = by_lane[found]
            cuts = self._chosen(cutter.feed(rows), each)
            fresh = written.lacking(found, cuts)
            self._answers.add(found, cuts.keep(fresh))
            self.rows += len(rows.ts_us)
            uncommitted += len(rows.ts_us)
            told = min(untold, len(rows.ts_us))  # some are read once more
            untold -= told
            done(told)
            if self._answers.bytes >= ANSWER_BYTES_MAX or uncommitted >= COMMIT_ROWS:
                # The last batch of the device may go on in the next piece: done is what came before it.
                self._commit(finished | ({found: before} if (before := int(rows.seq[-1]) - 1) > each.done else {}))
                finished, uncommitted = {}, 0
        if lane is not None:
            finished[lane] = by_lane[lane].last
            done(untold)
        self._commit(finished)

    def _commit(self, progress: dict[Lane, int]) -> None:
        answers = self._answers.take()
        progress = progress if self.span.whole else {}
        if not answers.num_rows and not progress:
            return
        self.table.append(answers, progress)
        self.windows += answers.num_rows
        self.commits += 1

    def _chosen(self, cuts: Cuts, each: _Work) -> Cuts:
        """Those that are not done, and end in the span."""
        ends_us = cuts.rows.ts_us[cuts.ends]
        wanted = cuts.rows.seq[cuts.ends] > each.done
        if self.span.since_us is not None:
            wanted &= ends_us >= self.span.since_us
        if self.span.until_us is not None:
            wanted &= ends_us < self.span.until_us
        return cuts.keep(wanted)

    def _pins(self, store: Store) -> Pins:
        """The version of the stream that this run reads, if it has what the model eats."""
        pins = self.lake.versions(f"SELECT 1 FROM {identifier(self.path)}")
        if self.path not in pins:
            raise NoSuchStreamError(
                f"there is no stream {self.stream!r} in {store.url}; name another with --stream (see: headwater lake "
                "streams)"
            )
        schema = self.lake.sql(f"SELECT * FROM {identifier(self.path)} LIMIT 0", at=pins).schema
        for name in self.manifest.fields:
            kind = schema.field(name).type if name in schema.names else None
            if kind is None or not _is_number(kind):
                raise DataError(
                    f"model {self.manifest.model} eats the field {name!r}, which in stream {self.stream} is "
                    f"{kind or 'missing'}; score the stream it was trained on, {self.manifest.stream}, or one with "
                    "the same fields"
                )
        return pins

    def _rows(self, work: Sequence[_Work]) -> Iterator[tuple[Lane, LaneRows]]:
        """Rows of some lanes, in pieces of one lane each, from where cutting has to begin."""
        begins = self._begins(work)
        lanes = ", ".join(
            f"({literal(w.lane.device)}, {literal(w.lane.epoch)}, {begins.get(w.lane, 0)}, {w.end})" for w in work
        )
        fields = "".join(f", r.{identifier(name)}" for name in self.manifest.fields)
        query = (
            f"SELECT r.{DEVICE}, r.{EPOCH}, epoch_us(r.ts), r.{SEQ}, r.{ROW}{fields} FROM {identifier(self.path)} r "
            f"JOIN (VALUES {lanes}) l(device, epoch, begin_, end_) "
            f"ON r.{DEVICE} = l.device AND r.{EPOCH} = l.epoch AND r.{SEQ} BETWEEN l.begin_ AND l.end_ "
            f"WHERE r.{DEVICE} BETWEEN {literal(work[0].lane.device)} AND {literal(work[-1].lane.device)} "
            f"ORDER BY r.{DEVICE}, r.{EPOCH}, r.{SEQ}, r.{ROW}"
        )
        firsts = self._first_rows
        for batch in self.lake.read(query, at=self.pins):
            for lane, piece in _by_lane(batch):
                rows = _lane_rows(piece)
                if lane in firsts:  # the window that cutting goes on at may begin within its batch
                    rows = rows.part(int(np.searchsorted(rows.row[rows.seq == begins[lane]], firsts[lane])))
                if len(rows.ts_us):
                    firsts.pop(lane, None)
                    yield lane, rows

    def _begins(self, work: Sequence[_Work]) -> dict[Lane, int]:
        """Seq of the first reading of the last window of each lane that is done; also sets its row."""
        self._first_rows: dict[Lane, int] = {}
        begun = [each for each in work if each.done]
        if not begun or self.table.version < 0:
            return {}
        lanes = ", ".join(f"({literal(w.lane.device)}, {literal(w.lane.epoch)}, {w.done})" for w in begun)
        found = self.lake.sql(
            f"SELECT p.device, p.epoch, max_by(p.first_seq, k), max_by(p.first_row, k) FROM (SELECT *, "
            f"seq::HUGEINT * 65536 + row AS k FROM {identifier(self.table.path)} WHERE {self._mine}) p "
            f"JOIN (VALUES {lanes}) l(device, epoch, done) "
            f"ON p.device = l.device AND p.epoch = l.epoch AND p.seq <= l.done GROUP BY ALL",
            at=self.pins_written,
        )
        begins = {}
        for device, epoch, seq, row in zip(*(each.to_pylist() for each in found.columns), strict=True):
            begins[Lane(device, epoch)] = seq
            self._first_rows[Lane(device, epoch)] = row
        return begins

    @property
    def _mine(self) -> str:
        return f"release = {self.manifest.version} AND stream = {literal(self.stream)}"

    def _written(self, work: Sequence[_Work]) -> Iterator[tuple[Lane, int, int]]:
        """Windows of these lanes that are in the table beyond what is done, in order: runs over a span left them."""
        if self.pins_written[self.table.path] < 0:
            return
        lanes = ", ".join(f"({literal(w.lane.device)}, {literal(w.lane.epoch)}, {w.done})" for w in work)
        query = (
            f"SELECT p.device, p.epoch, p.seq, p.row FROM {identifier(self.table.path)} p "
            f"JOIN (VALUES {lanes}) l(device, epoch, done) "
            f"ON p.device = l.device AND p.epoch = l.epoch AND p.seq > l.done "
            f"WHERE {self._mine} ORDER BY ALL"
        )
        for batch in self.lake.read(query, at=self.pins_written):
            for device, epoch, seq, row in zip(*(each.to_pylist() for each in batch.columns), strict=True):
                yield Lane(device, epoch), seq, row


class _Written:
    """Which windows are in the table already; asked in the order in which it is told."""

    def __init__(self, windows: Iterable[tuple[Lane, int, int]]) -> None:
        self._windows = iter(windows)
        self._next = next(self._windows, None)

    def lacking(self, lane: Lane, cuts: Cuts) -> Any:
        """Mask of the windows that are not in the table."""
        fresh = np.ones(len(cuts.ends), np.bool_)
        for number, end in enumerate(cuts.ends):
            if self._next is None:
                break
            key = lane, int(cuts.rows.seq[end]), int(cuts.rows.row[end])
            while self._next is not None and self._next < key:
                self._next = next(self._windows, None)
            fresh[number] = self._next != key
        return fresh


def _by_lane(batch: pa.RecordBatch) -> Iterator[tuple[Lane, pa.RecordBatch]]:
    """A batch, cut where the lane changes."""
    if not batch.num_rows:
        return
    codes = [column.dictionary_encode() for column in batch.columns[:2]]
    numbers = [each.indices.to_numpy() for each in codes]
    changes = np.flatnonzero((np.diff(numbers[0]) != 0) | (np.diff(numbers[1]) != 0)) + 1
    edges = [0, *changes.tolist(), batch.num_rows]
    for begin, end in itertools.pairwise(edges):
        device, epoch = (each.dictionary[int(found[begin])].as_py() for each, found in zip(codes, numbers, strict=True))
        yield Lane(device, epoch), batch.slice(begin, end - begin)


def _lane_rows(piece: pa.RecordBatch) -> LaneRows:
    values = np.empty((piece.num_rows, piece.num_columns - 5), np.float32)
    for number in range(values.shape[1]):
        values[:, number] = as_float32(pa.chunked_array([piece.column(5 + number)]))
    ts, seq, row = (piece.column(number).to_numpy() for number in (2, 3, 4))
    return LaneRows(ts.astype(np.int64), seq.astype(np.int64), row.astype(np.int32), values)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def span_of(since: datetime | None, until: datetime | None) -> Span:
    """A span of time between two moments, each with its zone.

    Raises:
        ConfigurationError: it would end before it begins.
    """
    if since is not None and until is not None and since >= until:
        raise ConfigurationError(f"--since {since.isoformat()} is not before --until {until.isoformat()}; change one")
    bounds = (None if moment is None else round(moment.timestamp() * 1_000_000) for moment in (since, until))
    return Span(*bounds)
