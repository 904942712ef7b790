"""Labels are about a stream and devices that the lake knows, or were meant to be about others.

Mistakes that a test here is for: streams that only a release eats unknown; devices of another stream known;
shard counters taken for devices.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from contract.batches import TS_TYPE
from contract.errors import ConfigurationError
from lake.label_targets import check_targets
from lake.raw import RawTable
from tests.monitoring_parts import MODEL, NOW_US, STREAM, Device, World, commit, reference, release, store_in

WORLD = World(np.random.default_rng(1))


@pytest.fixture
def store(tmp_path):
    return store_in(tmp_path / "lake")


def bring_in(store, device: str, stream: str) -> None:
    batch = pa.record_batch({"ts": pa.array([NOW_US]).view(TS_TYPE), "x": pa.array([1.0])})
    commit(RawTable(store, stream), device, 1, batch)


def refusal(store, stream: str, *devices: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_targets(store, stream, devices)
    return str(caught.value)


def test_a_stream_that_the_lake_does_not_have_is_named_with_what_is_like_it(store):
    assert f"{store.url} has no stream 'watch'; correct --stream, or where its rows" in refusal(store, "watch")
    bring_in(store, "pi-1", "watch")
    assert "has no stream 'wacht' (is it 'watch'?); correct --stream" in refusal(store, "wacht", "pi-1")


def test_devices_that_sent_no_row_of_the_stream_are_named_and_those_that_did_are_known(store):
    bring_in(store, "kitchen-1", "watch")
    bring_in(store, "garage", "other")
    check_targets(store, "watch", ["kitchen-1", "kitchen-1"])
    said = refusal(store, "watch", "kitchen-l", "garage", "kitchen-1", "shard")
    assert "of the device 'garage', 'kitchen-l' (is it 'kitchen-1'?), 'shard'; nothing was imported" in said
    assert "and 4 more; nothing" in refusal(store, "watch", *(f"w-{number}" for number in range(9)))


def test_what_only_predictions_came_of_is_known(store):
    release(store, reference(WORLD))
    assert "has no stream" in refusal(store, STREAM, "pi-1")
    Device(store, "pi-1").predict(*WORLD.windows(5))
    check_targets(store, STREAM, ["pi-1"])
    bring_in(store, "pi-2", STREAM)
    check_targets(store, STREAM, ["pi-1", "pi-2"])
    assert "'pi-3'" in refusal(store, STREAM, "pi-3")
    assert "has no stream" in refusal(store, MODEL, "pi-1")


def test_a_log_that_does_not_say_who_committed_is_no_reason_to_refuse(store):
    bring_in(store, "pi-1", "watch")
    table = DeltaTable(store.table_uri("raw/watch"))
    table.create_checkpoint()
    log = f"raw/watch/_delta_log/{table.version():020d}.checkpoint"
    store.put(f"{log}.0000000001.0000000001.parquet", store.get(f"{log}.parquet"))
    check_targets(store, "watch", ["anybody"])
