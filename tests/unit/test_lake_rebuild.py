"""Rebuilding batches: what is asked for and is not there, or is there twice, is said so.

Mutants tried, each made a test here fail: a batch found in another epoch given back; rows that are there twice given
back; a schema object believed without its fingerprint.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from lake.errors import CorruptLakeError, ObjectMissingError
from lake.raw import RawTable
from lake.rebuild import rebuild_batch
from lake.schemas import SchemaObjects, schema_path
from lake.store import Store, StoreSettings
from tests.contract.lake_suite import EPOCH, A, B, commit, raw, rows
from tests.property.arrow_values import assert_same_bits

OTHER = "cd" * 16


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(StoreSettings(url=tmp_path.as_uri(), fsync=False))


def bring_in(store: Store, *batches: object) -> None:
    table = RawTable(store, "s")
    table.refresh()
    commit(table, *batches)  # type: ignore[arg-type]


def test_each_batch_comes_back_alone(store: Store) -> None:
    sent = {
        (name, epoch, seq): rows(3, seq * 1_000_000, x=pa.array([seq, number, 3], pa.int8()))
        for name in (A, B)
        for number, epoch in enumerate((EPOCH, OTHER))
        for seq in (1, 2)
    }
    bring_in(store, *(raw(name, seq, batch, epoch) for (name, epoch, seq), batch in sent.items()))
    for (name, epoch, seq), batch in sent.items():
        assert_same_bits(rebuild_batch(store, "s", name, epoch, seq), batch)


def test_a_thinned_batch_comes_back_with_its_row_numbers(store: Store) -> None:
    thin = rows(3, x=pa.array([1, 2, 3], pa.int8()), _row=pa.array([0, 4, 9], pa.int32()))
    bring_in(store, raw(A, 1, thin))
    assert_same_bits(rebuild_batch(store, "s", A, EPOCH, 1), thin)


def test_a_batch_over_midnight_comes_back_whole_and_in_order(store: Store) -> None:
    times = [5, 86_400_000_000 * 3, 7, -1, 2**62]
    batch = pa.record_batch(
        {"x": pa.array(range(5), pa.int8()), "ts": pa.array(times, pa.int64()).view(pa.timestamp("us", "UTC"))}
    )
    table = RawTable(store, "s", max_clock_skew_s=1e9)
    table.refresh()
    commit(table, raw(A, 1, batch)._replace(received_at_us=1_000_000))
    assert_same_bits(rebuild_batch(store, "s", A, EPOCH, 1), batch)


def test_a_batch_that_is_not_there_is_missing(store: Store) -> None:
    bring_in(store, raw(A, 1))
    for stream, device, epoch, seq in (("s", A, EPOCH, 2), ("s", B, EPOCH, 1), ("s", A, OTHER, 1), ("t", A, EPOCH, 1)):
        with pytest.raises(ObjectMissingError):
            rebuild_batch(store, stream, device, epoch, seq)


def test_a_batch_that_is_there_twice_is_not_given_back(store: Store) -> None:
    bring_in(store, raw(A, 1))
    bring_in(store, raw(A, 1))  # what the gateway's look at the watermark prevents
    with pytest.raises(CorruptLakeError, match="twice"):
        rebuild_batch(store, "s", A, EPOCH, 1)


def test_a_damaged_schema_object_is_not_believed(store: Store) -> None:
    bring_in(store, raw(A, 1))
    (info,) = store.objects("control/schemas")
    store.put(info.path, rows(y=pa.array([1, 2, 3])).schema.serialize().to_pybytes())
    with pytest.raises(CorruptLakeError, match="damaged"):
        rebuild_batch(store, "s", A, EPOCH, 1)


def test_a_schema_is_written_once_and_never_over_another(store: Store) -> None:
    serialized = rows().schema.serialize().to_pybytes()
    SchemaObjects(store).keep("0123456789abcdef", serialized)
    SchemaObjects(store).keep("0123456789abcdef", serialized)
    with pytest.raises(CorruptLakeError, match="another schema"):
        SchemaObjects(store).keep("0123456789abcdef", b"other")
    assert store.get(schema_path("0123456789abcdef")) == serialized
