"""A release with a reference, and devices that predict with it, in a lake: for tests of monitoring."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from contract.batches import TS_TYPE, Clock
from contract.models import Artifact, Dataset, Manifest, Metric, Window
from contract.names import shard_of
from edge_agent.models.predictions import SCHEMA as PREDICTIONS
from lake.monitoring.reference import Reference, encode_reference, make_reference
from lake.raw import RawBatch, RawTable
from lake.releases import Release, ReleaseEventKind, Releases
from lake.store import Store, StoreSettings

MODEL = "gait"
STREAM = "watch"
FEATURES = tuple(f"f{number}" for number in range(20))
CLASSES = ("run", "walk")
NOW_US = 1_795_245_988_000_000
CLOCK = Clock(synced=True, wall_us=NOW_US, monotonic_us=1, boot="cd" * 16)
RECIPE = """
[labels]
stream = "exercise"
field = "exercise"
[policy.retrain]
checks = 2
pause_s = 60
"""


class World(NamedTuple):
    """What devices see: `run` and `walk` differ, and each device is a little apart from the others."""

    rng: np.random.Generator

    def windows(self, count: int, *, shift: float = 0.0, own: float = 0.0, label: str | None = None):
        """Features `float32[count, F]`, scores `float32[count]` and labels."""
        # Nobody changes what he does at each window.
        labels = np.repeat(self.rng.choice(CLASSES, count // 10 + 1), 10)[:count] if label is None else [label] * count
        labels = np.asarray(labels)
        centre = np.where(labels == "run", 3.0, 0.0)[:, None]
        features = self.rng.normal(size=(count, len(FEATURES))) + centre + own
        features[:, :5] += shift
        scores = np.clip(0.9 + 0.05 * self.rng.normal(size=count), 0, 1)
        return features.astype(np.float32), scores.astype(np.float32), labels


def reference(world: World, windows: int = 2_000) -> Reference:
    features, scores, labels = world.windows(windows)
    return make_reference(features, scores, labels, names=FEATURES)


def release(
    store: Store, measured: Reference, *, approved: bool = True, recipe: str = RECIPE, created_us: int = NOW_US, **other
) -> Release:
    """Put a release into the register, as the trainer does, and approve it without a signature."""
    releases = Releases(store)
    onnx = releases.put_artifact(f"onnx {recipe} {created_us} {other}".encode())
    kept = releases.put_artifact(encode_reference(measured))
    draft = Manifest(
        model=MODEL,
        version=1,
        artifact=onnx,
        task="classification",
        stream=STREAM,
        fields=("x",),
        dtypes=("float",),
        window=Window(rows=64, stride=32, gap_s=1.0),
        sample_rate_hz=50.0,
        classes=CLASSES,
        features=FEATURES,
        family="forest",
        metrics=(Metric(name="accuracy", value=0.95, split="test"),),
        dataset=Dataset(streams={STREAM: 0}, sha256=hashlib.sha256(b"").hexdigest(), windows=2_000),
        recipe=recipe,
        code="1",
        seed=1,
        packages={},
        reference=Artifact(sha256=kept.sha256, size=kept.size),
        created_at_us=created_us,
        **other,
    )
    found = releases.publish(draft, who="test", why="test")
    if approved:
        found = releases.record(ReleaseEventKind.APPROVED, MODEL, found.version, who="test", why="test")
    return found


class Device:
    """A device whose predictions a gateway has committed."""

    def __init__(
        self, store: Store, name: str, version: int = 1, *, start_us: int = NOW_US, model: str = MODEL
    ) -> None:
        self.name, self.version, self.now_us = name, version, start_us
        self._table = RawTable(store, f"predictions.{model}")
        self._seq = 0

    def predict(self, features, scores, labels, *, sampled: int = 1, latency_us: int = 800, nan_count: int = 0) -> None:
        """One batch: a window each 0.64 s, with the features of every `sampled`-th."""
        count = len(scores)
        ends = self.now_us + 640_000 * np.arange(1, count + 1)
        self.now_us = int(ends[-1])
        carried = [row.tolist() if number % sampled == 0 else None for number, row in enumerate(features)]
        columns = {
            "ts": pa.array(ends).view(TS_TYPE),
            "release": pa.array([self.version] * count, pa.int32()),
            "window_start": pa.array(ends - 1_260_000).view(TS_TYPE),
            "score": pa.array(scores, pa.float32()),
            "label": pa.array([str(label) for label in labels]),
            "latency_us": pa.array([latency_us] * count, pa.int32()),
            "nan_count": pa.array([nan_count] * count, pa.int32()),
            "features": pa.array(carried, pa.list_(pa.float32())),
        }
        batch = pa.record_batch(
            [columns.get(field.name, pa.nulls(count, field.type)) for field in PREDICTIONS], schema=PREDICTIONS
        )
        commit(self._table, self.name, self._next(), batch)

    def _next(self) -> int:
        self._seq += 1
        return self._seq


def commit(table: RawTable, device: str, seq: int, batch: pa.RecordBatch) -> None:
    """Commit a batch as the gateway does."""
    table.refresh()
    shard = shard_of(device)
    epoch = hashlib.sha256(f"{device}".encode()).hexdigest()[:32]
    raw = RawBatch(device, epoch, seq, shard, NOW_US, CLOCK, batch)
    table.append([raw], {(device, epoch): seq}, {shard: table.shard_counter(shard) + 1})


def labelled(store: Store, device: str, changes: list[tuple[int, str]]) -> None:
    """Rows of the label stream: a label holds from its moment on."""
    batch = pa.record_batch(
        {
            "ts": pa.array([moment for moment, _ in changes], pa.int64()).view(TS_TYPE),
            "exercise": pa.array([label for _, label in changes]),
        }
    )
    commit(RawTable(store, "exercise"), device, 1, batch)


def store_in(folder) -> Store:
    folder.mkdir(exist_ok=True)
    return Store(StoreSettings(url=f"file://{folder}", fsync=False))
