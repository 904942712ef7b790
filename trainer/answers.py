"""Windows on their way to the model in batches, and what it said, until it is committed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from contract.inference import label_names
from contract.models import Manifest
from lake.predictions import SCHEMA, Lane
from lake.scoring import Float32s, Scorer, Scores
from lake.types import STORED_TIMESTAMP
from trainer.lanes import Cuts

BATCH_BYTES = 8 * 1024 * 1024
"""Windows scored at once."""
BATCH_MAX = 1_024
DEADLINE_S = 120.0
"""For one batch of windows."""


class Answers:
    """Windows that wait for the model, and what it said of earlier ones.

    Args:
        scorer: the release.
        stream: that is scored.
    """

    def __init__(self, scorer: Scorer, stream: str) -> None:
        self._scorer, self._stream = scorer, stream
        manifest = scorer.manifest
        window_bytes = 4 * manifest.window.rows * len(manifest.fields)
        self._batch = max(1, min(BATCH_MAX, BATCH_BYTES // window_bytes))
        self._windows: list[Float32s] = []
        self._columns: list[dict[str, Any]] = []
        self._waiting = 0
        self._tables: list[pa.Table] = []
        self.bytes = 0
        """Of the answers."""

    def add(self, lane: Lane, cuts: Cuts) -> None:
        """Score windows, as soon as there are enough of them.

        Raises:
            ModelError: the model failed, or took too long.
        """
        for begin in range(0, len(cuts.ends), self._batch):
            end = min(begin + self._batch, len(cuts.ends))
            if self._waiting + end - begin > self._batch:
                self._score()
            self._windows.append(cuts.windows(begin, end))
            self._columns.append(_described(lane, cuts, begin, end))
            self._waiting += end - begin

    def take(self) -> pa.Table:
        """All answers, in `lake.predictions.SCHEMA`; forget them.

        Raises:
            ModelError: the model failed, or took too long.
        """
        self._score()
        tables, self._tables, self.bytes = self._tables, [], 0
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    def _score(self) -> None:
        if not self._windows:
            return
        windows = np.concatenate(self._windows)
        scores = self._scorer.score(windows, DEADLINE_S)
        columns = {name: np.concatenate([each[name] for each in self._columns]) for name in self._columns[0]}
        table = _table(self._scorer.manifest, self._stream, columns, scores)
        self._tables.append(table)
        self.bytes += table.nbytes
        self._windows, self._columns, self._waiting = [], [], 0


def _described(lane: Lane, cuts: Cuts, begin: int, end: int) -> dict[str, Any]:
    rows, starts, ends = cuts.rows, cuts.starts[begin:end], cuts.ends[begin:end]
    return {
        "device": np.full(end - begin, lane.device, object),
        "epoch": np.full(end - begin, lane.epoch, object),
        "window_start": rows.ts_us[starts],
        "window_end": rows.ts_us[ends],
        "seq": rows.seq[ends],
        "row": rows.row[ends],
        "first_seq": rows.seq[starts],
        "first_row": rows.row[starts],
    }


def _table(manifest: Manifest, stream: str, columns: dict[str, Any], scores: Scores) -> pa.Table:
    count = len(scores.nan_count)
    labels = [""] * count if scores.label is None else label_names(manifest, scores.label.tolist())
    arrays = {name: pa.array(values) for name, values in columns.items()}
    for name in ("window_start", "window_end"):
        arrays[name] = arrays[name].view(STORED_TIMESTAMP)
    arrays |= {
        "stream": pa.array([stream] * count, pa.string()),
        "release": pa.array(np.full(count, manifest.version, np.int32)),
        "score": pa.array(scores.chosen),
        "label": pa.array(labels, pa.string()),
        "nan_count": pa.array(scores.nan_count.astype(np.int32)),
        "features": _lists(scores.features, count),
    }
    return pa.table([arrays[name] for name in SCHEMA.names], schema=SCHEMA)


def _lists(features: Float32s | None, count: int) -> pa.Array:
    if features is None:
        return pa.nulls(count, pa.list_(pa.float32()))
    offsets = np.arange(count + 1, dtype=np.int32) * features.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(features).ravel()))
