"""Window sets for tests of the trainer: watch recordings, machine temperature, and small ones that are drawn."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from contract.models import Window
from simulators.recordings import FIELDS, RATE_HZ, load_watch
from trainer.recipe import Data, Features, Labels, Recipe, Report, Search, SplitRule
from trainer.windowset import WindowMeta, WindowSet

NAB = Path(__file__).parents[2] / "shared" / "data" / "nab"
MACHINE = "machine_temperature_system_failure.csv"


@cache
def watch_windows(rows: int, stride: int) -> WindowSet:
    """Windows of all recordings, the wearer as their group."""
    windows, labels, groups, devices, starts = [], [], [], [], []
    ahead = 0
    for recording in load_watch():
        values = recording.values.astype(np.float32)
        for start in range(0, len(values) - rows + 1, stride):
            windows.append(values[start : start + rows])
            labels.append(recording.exercise)
            groups.append(f"s{recording.subject:02}")
            devices.append(recording.device)
            starts.append((ahead + start) * (1_000_000 // RATE_HZ))
        ahead += len(values) + RATE_HZ * 60
    begun = np.array(starts, dtype=np.int64)
    return WindowSet(
        np.stack(windows),
        np.array(labels),
        np.array(groups),
        np.array(devices),
        begun,
        begun + (rows - 1) * (1_000_000 // RATE_HZ),
        meta(FIELDS, tuple(sorted(set(labels))), float(RATE_HZ)),
    )


def meta(fields: tuple[str, ...], classes: tuple[str, ...], rate_hz: float | None) -> WindowMeta:
    return WindowMeta(
        fields=fields, dtypes=("float",) * len(fields), classes=classes, sample_rate_hz=rate_hz, streams={"watch": 3}
    )


def watch_recipe(rows: int, stride: int, **changed: object) -> Recipe:
    given: dict = {
        "name": "watch-activity",
        "task": "classification",
        "data": Data(stream="watch", fields=FIELDS),
        "labels": Labels(stream="exercise", field="exercise"),
        "window": Window(rows=rows, stride=stride, gap_s=0.5),
        "split": SplitRule(by="group", group="s.."),
        "search": Search(metric="f1_macro", trials=4),
        "report": Report(html=False, learning_curve=False),
    }
    return Recipe(**{**given, **changed})


def machine_windows(rows: int, stride: int) -> WindowSet:
    """Windows of the machine temperature series, labelled `failure` where the benchmark says so."""
    if not NAB.is_dir():
        pytest.skip(f"the series of the Numenta Anomaly Benchmark are not in {NAB}")
    with (NAB / MACHINE).open() as file:
        readings = [(_us(row["timestamp"]), float(row["value"])) for row in csv.DictReader(file)]
    known = json.loads((NAB / "anomaly_windows.json").read_text())[f"realKnownCause/{MACHINE}"]
    times = np.array([reading[0] for reading in readings])
    values = np.array([reading[1] for reading in readings], dtype=np.float32)
    failing = np.zeros(len(times), dtype=bool)
    for start, end in known:
        failing |= (times >= _us(start)) & (times < _us(end))
    steps = np.diff(times)
    runs = np.split(np.arange(len(times)), np.flatnonzero((steps < 0) | (steps > 1_800_000_000)) + 1)
    starts = [int(run[0]) + offset for run in runs for offset in range(0, len(run) - rows + 1, stride)]
    return WindowSet(
        np.stack([values[start : start + rows, np.newaxis] for start in starts]),
        np.array(["failure" if failing[start : start + rows].mean() >= 0.5 else "normal" for start in starts]),
        np.array(["machine-1"] * len(starts)),
        np.array(["machine-1"] * len(starts)),
        np.array([times[start] for start in starts]),
        np.array([times[start + rows - 1] for start in starts]),
        meta(("value",), ("failure", "normal"), 1 / 300),
    )


def machine_recipe(rows: int, stride: int, **changed: object) -> Recipe:
    given: dict = {
        "name": "machine-temperature",
        "task": "anomaly",
        "data": Data(stream="machine-temperature", fields=("value",)),
        "labels": Labels(table="control/labels", otherwise="normal"),
        "window": Window(rows=rows, stride=stride, gap_s=1_800.0),
        "split": SplitRule(by="time", test=0.25, folds=4),
        "search": Search(metric="average_precision", trials=8),
        "report": Report(html=False, learning_curve=False),
    }
    return Recipe(**{**given, **changed})


def _us(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6)


def drawn_windows(count: int = 240, rows: int = 16, channels: int = 2, seed: int = 0) -> WindowSet:
    """Two classes, `calm` and `wild`, of six devices: told apart by how much they move."""
    random = np.random.default_rng(seed)
    wild = np.arange(count) % 2 == 1
    windows = random.normal(size=(count, rows, channels)) * np.where(wild, 2.0, 1.0)[:, np.newaxis, np.newaxis]
    devices = np.array([f"device-{number // 2 % 6}" for number in range(count)])
    starts = np.arange(count, dtype=np.int64) * rows * 1_000_000
    fields = tuple(f"f{number}" for number in range(channels))
    return WindowSet(
        windows.astype(np.float32),
        np.where(wild, "wild", "calm"),
        devices,
        devices,
        starts,
        starts + (rows - 1) * 1_000_000,
        meta(fields, ("calm", "wild"), 1.0),
    )


def drawn_recipe(rows: int = 16, channels: int = 2, **changed: object) -> Recipe:
    fields = tuple(f"f{number}" for number in range(channels))
    given: dict = {
        "name": "drawn",
        "data": Data(stream="drawn", fields=fields),
        "window": Window(rows=rows, stride=rows, gap_s=2.0),
        "split": SplitRule(folds=3),
        "features": Features(select="none"),
    }
    return watch_recipe(rows, rows, **{**given, **changed})
