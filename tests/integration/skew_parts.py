"""Recordings of watches as a fleet would have sent them, and the process of a device that scores them live:
`python -m tests.integration.skew_parts FOLDER`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from contract.models import Manifest
from edge_agent.models.inference import Engine, Loaded
from edge_agent.models.predictions import PredictionWriter, stream_of
from edge_agent.sensors.port import Reading, Sample
from simulators.recordings import FIELDS, INTERVAL_US, LABELS_STREAM, STREAM, by_device, load_watch
from tests.integration.trainer_lake import START_US, TIME, bring_in

PAUSE_US = 5_000_000
SET_BACK_US = 1_003_000
"""No multiple of the interval: no two windows of a device have the same times."""
HOLE_ROWS = 30
HOLES = 3
NULL_SHARE = 0.002
BLOCK_ROWS_MAX = 60
"""Completes no more windows at once than the agent keeps waiting, at the stride of the test."""


class Watch(NamedTuple):
    """What one device recorded."""

    device: str
    ts_us: np.ndarray
    """`int64[N]`"""
    columns: dict[str, pa.Array]
    epoch_row: int
    """The agent was set up anew before this row: a new epoch begins, and no pause."""
    changes: list[tuple[int, str]]
    """Time and name of each exercise."""

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Epochs and their rows."""
        yield 1, slice(0, self.epoch_row)
        yield 2, slice(self.epoch_row, len(self.ts_us))

    def batch(self) -> pa.RecordBatch:
        """All rows."""
        return pa.record_batch({"ts": pa.array(self.ts_us).cast(TIME), **self.columns})


def watches(seed: int) -> list[Watch]:
    """Every recording, with pauses between them, holes in them, clocks set back, and values missing.

    Acceleration is float32, angular velocity float64 with all bits of the file: both are cast once, by everybody.
    """
    found = []
    for device, recordings in by_device(load_watch()).items():
        random = np.random.default_rng([seed, *device.encode()])
        now_us, times, values, changes = START_US, [], [], []
        for recording in recordings:
            kept = np.ones(len(recording.values), bool)
            for hole in random.integers(0, len(kept) - HOLE_ROWS, HOLES):
                kept[hole : hole + HOLE_ROWS] = False
            ts_us = now_us + np.arange(len(kept)) * INTERVAL_US
            ts_us[len(kept) // 2 :] -= SET_BACK_US
            times.append(ts_us[kept])
            values.append(recording.values[kept])
            changes.append((int(ts_us[0]), recording.exercise))
            now_us = int(ts_us[-1]) + PAUSE_US
        table = np.concatenate(values)
        missing = random.random(table.shape) < NULL_SHARE
        columns = {
            name: pa.array(
                table[:, at], pa.float32() if name.startswith("a") else pa.float64(), mask=missing[:, at], safe=False
            )
            for at, name in enumerate(FIELDS)
        }
        found.append(Watch(device, np.concatenate(times), columns, len(table) * 3 // 5, changes))
    return found


def bring_in_watches(store, fleet: list[Watch]) -> None:
    """Commit their rows and their labels as a gateway would."""
    for watch in fleet:
        for epoch, rows in watch.parts():
            columns = {name: column[rows] for name, column in watch.columns.items()}
            bring_in(store, STREAM, watch.device, epoch=epoch, batch_rows=2_000, ts=watch.ts_us[rows], **columns)
        ts, names = zip(*watch.changes, strict=True)
        bring_in(store, LABELS_STREAM, watch.device, ts=np.array(ts), exercise=list(names))


class Collected:
    """Where the agent's prediction rows go."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def put(self, schema: pa.Schema, sample: Sample, wait_s: float, stop: threading.Event) -> bool:
        assert isinstance(sample, Reading)
        self.rows.append({**sample.values, "end_us": sample.ts_us})
        return True

    def wake(self) -> None:
        """Nobody waits."""


def pieces(batch: pa.RecordBatch, random: np.random.Generator) -> Iterator[Sample]:
    """The rows as drivers hand them over: in blocks, and every fourth piece one by one."""
    ts_us = batch.column("ts").cast(pa.int64()).to_numpy()
    fields = batch.drop_columns("ts")
    at = number = 0
    while at < batch.num_rows:
        rows = int(random.integers(1, BLOCK_ROWS_MAX))
        if number % 4:
            yield batch.slice(at, rows)
        else:
            values = fields.slice(at, rows).to_pylist()
            for row, now_us in zip(values, ts_us[at : at + rows].tolist(), strict=True):
                yield Reading(row, now_us)
        at, number = at + rows, number + 1


def score_live(folder: Path) -> None:
    """Feed every device's rows to the agent's own engine and write what it predicts: `<model>.predictions.arrow`."""
    loaded = []
    for path in sorted(folder.glob("*.manifest.json")):
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        loaded.append(Loaded((folder / f"{manifest.model}.onnx").read_bytes(), manifest))
    sinks = {stream_of(each.manifest.model): Collected() for each in loaded}
    engine = Engine(PredictionWriter(lambda stream: sinks[stream], features_every=1), time.monotonic)
    random = np.random.default_rng(1)
    for path in sorted(folder.glob("watch-*.arrow")):
        with pa.memory_map(str(path)) as source:
            epochs = pa.ipc.open_file(source)
            for number in range(epochs.num_record_batches):
                batch = epochs.get_batch(number)
                for each in loaded:  # each epoch is an agent that starts
                    engine.configure(each.manifest.model, None, None, front=False)
                    engine.configure(each.manifest.model, each, None, front=False)
                for sample in pieces(batch, random):
                    engine.feed(STREAM, batch.schema, sample)
                    while engine.round():
                        pass
                for sink in sinks.values():
                    for row in sink.rows[::-1]:
                        if "device" in row:
                            break
                        row["device"] = path.stem
    for each in loaded:
        assert (each.counters.skipped, each.counters.errors) == (0, 0)
        rows = sinks[stream_of(each.manifest.model)].rows
        table = pa.Table.from_pylist(rows).select(
            ["device", "window_start", "end_us", "score", "label", "nan_count", "features"]
        )
        with pa.ipc.new_file(folder / f"{each.manifest.model}.predictions.arrow", table.schema) as writer:
            writer.write_table(table)


def write_watches(folder: Path, fleet: list[Watch]) -> None:
    """For `score_live`: a file per device, a batch per epoch."""
    for watch in fleet:
        batch = watch.batch()
        with pa.ipc.new_file(folder / f"{watch.device}.arrow", batch.schema) as writer:
            for _, rows in watch.parts():
                writer.write_batch(batch.slice(rows.start, rows.stop - rows.start))


if __name__ == "__main__":
    score_live(Path(sys.argv[1]))
