"""A small lake of readings and labels, brought in batch by batch as a gateway would, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from contract.batches import Clock
from contract.names import shard_of
from lake.raw import RawBatch, RawTable
from lake.store import Store, StoreSettings

START_US = 1_795_000_000_000_000
STEP_US = 20_000
_CLOCK = Clock(synced=True, wall_us=START_US, monotonic_us=1, boot="cd" * 16)
TIME = pa.timestamp("us", tz="UTC")


def open_lake(folder: Any) -> Store:
    """A lake in a folder."""
    return Store(StoreSettings(url=f"file://{folder}", fsync=False))


def bring_in(
    store: Store,
    stream: str,
    device: str,
    *,
    epoch: int = 1,
    batch_rows: int = 100,
    **columns: Sequence[Any] | pa.Array,
) -> None:
    """Commit one device's rows, in batches; `ts` in microseconds since 1970-01-01 UTC."""
    arrays = {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    arrays["ts"] = arrays["ts"].cast(pa.int64()).cast(TIME)
    rows = pa.record_batch(arrays)
    table = RawTable(store, stream)
    table.refresh()
    lane, shard = (device, f"{epoch:032x}"), shard_of(device)
    first = table.watermark(*lane) + 1
    batches = [
        RawBatch(*lane, first + number, shard, START_US, _CLOCK, rows.slice(start, batch_rows))
        for number, start in enumerate(range(0, rows.num_rows, batch_rows))
    ]
    table.append(batches, {lane: first + len(batches) - 1}, {shard: table.shard_counter(shard) + 1})


def bring_in_walkers(store: Store, count: int = 8, rows: int = 1_200, *, since_us: int = START_US) -> None:
    """Devices `walker-0` and on, 50 readings a second of the stream `motion` (x, y), and of `doing` what they did: a
    third of the time each still (small noise), moving (large), and still again."""
    for number in range(count):
        draw = np.random.default_rng(number)
        third = rows // 3
        size = np.where((np.arange(rows) // third) == 1, 3.0, 0.1)
        values = (draw.normal(size=(2, rows)) * size).astype(np.float32)
        ts = since_us + np.arange(rows) * STEP_US
        bring_in(store, "motion", f"walker-{number}", ts=ts, x=values[0], y=values[1])
        changes = since_us + np.array([0, third, 2 * third]) * STEP_US
        bring_in(store, "doing", f"walker-{number}", ts=changes, what=["still", "moving", "still"])


RECIPE = """
name = "walking"
task = "classification"
[data]
stream = "motion"
fields = ["x", "y"]
[labels]
stream = "doing"
field = "what"
[window]
rows = 50
stride = 25
gap_s = 0.1
[split]
by = "device"
test = 0.25
[search]
metric = "f1_macro"
trials = 3
seconds = 20
"""
"""Of what `bring_in_walkers` brings in."""
