"""What the modes keep of large blocks is what they hold in memory."""

from __future__ import annotations

import pyarrow as pa
import pytest

from contract.batches import TS_TYPE
from edge_agent.sampling.modes import Mode, build_mode
from edge_agent.sampling.settings import Burst, OnChange, Sampling, Trigger

ROWS = 4096
SCHEMA = pa.schema([pa.field("ts", TS_TYPE), pa.field("shock", pa.float64()), pa.field("rest", pa.float64())])
SHOCKS = (Trigger(field="shock", above=50.0),)


def block(number: int) -> pa.RecordBatch:
    """One shock in many quiet rows."""
    times = pa.array(range(number * ROWS, (number + 1) * ROWS), pa.int64()).view(TS_TYPE)
    shock = [0.0] * ROWS
    shock[100] = 100.0 + number
    return pa.RecordBatch.from_arrays([times, pa.array(shock), pa.array([0.5] * ROWS)], schema=SCHEMA)


@pytest.mark.parametrize(
    "settings",
    [
        OnChange(watch=("shock",), deadband={"shock": 50.0}),
        Burst(trigger=SHOCKS),
        Burst(trigger=SHOCKS, pre_rows=5, post_rows=5),
    ],
    ids=["on_change", "burst", "burst with history"],
)
def test_few_rows_kept_of_a_block_do_not_keep_the_block(settings: Sampling) -> None:
    """They may wait for an hour until their batch is full.

    Before: slices, in each of the modes.
    """
    mode: Mode = build_mode(settings, SCHEMA)
    kept = [sample for number in range(50) for sample in mode.feed(block(number))]
    batches = [sample for sample in kept if isinstance(sample, pa.RecordBatch)]
    assert len(batches) == len(kept) >= 50
    assert sum(batch.num_rows for batch in batches) <= 50 * 11
    held = sum(batch.get_total_buffer_size() for batch in batches)
    assert held <= 2 * sum(batch.nbytes for batch in batches) + 64 * len(batches)
