"""Batch scoring in a process of its own, killed where it is told: `python -m tests.integration.predict_parts`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from contract.batches import Clock
from contract.models import Manifest
from lake import predictions
from lake.predictions import Lane
from lake.query import Lake
from lake.raw import RawBatch, RawTable
from lake.releases import Releases
from lake.scoring import Scorer
from lake.store import Store, StoreSettings
from trainer import predict as module
from trainer.predict import ALL_TIME, Predicted, Span, predict
from trainer.progress import NOBODY, Progress

BASE_US = 1_700_000_000_000_000
STREAM = "vibration"
CLOCK = Clock(synced=True, wall_us=0, monotonic_us=0, boot="ab" * 16)


def open_store(folder: Path) -> Store:
    """The lake in a folder."""
    return Store(StoreSettings(url=f"file://{folder}/lake", fsync=False))


class Fleet:
    """Devices whose rows arrive: each lane a walk of its own, one row a second, with pauses and clocks set back."""

    def __init__(self, store: Store, stream: str = STREAM) -> None:
        self.store, self.stream = store, stream
        self.sent: dict[tuple[str, str], list[pa.RecordBatch]] = {}
        self._now_us: dict[tuple[str, str], int] = {}

    def send(self, device: str, epoch: int, sizes: list[int], *, late_s: float = 0.0) -> None:
        """Commit batches of so many rows to the end of a lane."""
        lane = device, f"{epoch:032x}"
        table = RawTable(self.store, self.stream)
        table.refresh()
        sent = self.sent.setdefault(lane, [])
        for size in sizes:
            seq = len(sent) + 1
            batch = self._rows(lane, seq, size, late_s)
            sent.append(batch)
            table.append([RawBatch(*lane, seq, 0, BASE_US, CLOCK, batch)], {lane: seq}, {0: table.shard_counter(0) + 1})
            table.refresh()

    def _rows(self, lane: tuple[str, str], seq: int, size: int, late_s: float) -> pa.RecordBatch:
        rng = np.random.default_rng([seq, *lane[0].encode(), int(lane[1], 16)])
        steps_s = np.where(rng.random(size) < 0.06, rng.choice([60, -3], size), 1)
        ts = self._now_us.get(lane, BASE_US + int(late_s * 1e6)) + np.cumsum(steps_s) * 1_000_000
        self._now_us[lane] = int(ts[-1])
        x = rng.normal(size=size)
        y = pa.array(rng.normal(size=size).astype(np.float32), mask=rng.random(size) < 0.05)
        return pa.record_batch({"ts": pa.array(ts, pa.timestamp("us", tz="UTC")), "x": pa.array(x), "y": y})


def newest(store: Store, model: str) -> tuple[Manifest, bytes]:
    """The newest approved release."""
    releases = Releases(store)
    manifest = releases.look().get(model).manifest
    return manifest, releases.artifact(manifest.artifact.sha256)


_lakes: dict[str, Lake] = {}


def open_lake(store: Store) -> Lake:
    """Opened once for each lake: DuckDB takes longer to open than to answer."""
    if store.url not in _lakes:
        for opened in _lakes.values():
            opened.close()
        _lakes.clear()
        _lakes[store.url] = Lake(store)
    return _lakes[store.url]


def run(
    store: Store, model: str = "shaker", span: Span = ALL_TIME, stream: str = STREAM, progress: Progress = NOBODY
) -> Predicted:
    """One run."""
    manifest, data = newest(store, model)
    return predict(open_lake(store), store, Scorer(data, manifest), stream=stream, span=span, progress=progress)


def in_pieces(size: int) -> Callable[[pa.RecordBatch], Iterator[tuple[Lane, pa.RecordBatch]]]:
    """A stand-in for `trainer.predict._by_lane` that ends pieces in the middle of batches, as large answers do."""
    by_lane = module._by_lane

    def cut(batch: pa.RecordBatch) -> Iterator[tuple[Lane, pa.RecordBatch]]:
        for lane, piece in by_lane(batch):
            for begin in range(0, piece.num_rows, size):
                yield lane, piece.slice(begin, size)

    return cut


def main(folder: str, number: int, when: str) -> None:
    """Score, and die by SIGKILL at the `number`th commit, `before` it or `after` it. Small steps."""
    module.COMMIT_ROWS, module.LANES_MAX = 18, 2
    setattr(module, "_by_lane", in_pieces(6))  # noqa: B010 - mypy refuses the plain assignment
    append = predictions.PredictionTable.append
    count = 0

    def dying(self: predictions.PredictionTable, *arguments: object) -> None:
        nonlocal count
        count += 1
        if count == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, *arguments)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(predictions.PredictionTable, "append", dying)  # noqa: B010
    run(open_store(Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
