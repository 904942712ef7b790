"""What every store and every raw table promises. A test class per implementation inherits a suite and says how to
make one.

Mutants tried in `lake.delta`, `lake.raw` and `lake.memory`, each made a test here or in `test_lake_file.py` fail:
commits without application transactions; without the lanes'; without the shards'; a table that exists taken as ones
own; no check of the version after columns were added; `unfit` judged against the table alone, and remembered beyond
a refresh; batches not sorted; in memory: watermarks of the latest version instead of the refreshed one, columns that
changed ignored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pytest

from contract.batches import TS_TYPE, Clock
from contract.errors import Reason, Rejected
from contract.names import shard_of
from lake.errors import CommitConflictError, ObjectMissingError
from lake.raw import AppendResult, RawBatch
from lake.store import Store

EPOCH = "ab" * 16
NOW_US = 1_795_245_988_618_000
DAY_US = 86_400_000_000
CLOCK = Clock(synced=True, wall_us=NOW_US, monotonic_us=1, boot="cd" * 16)


class Table(Protocol):
    """The port."""

    @property
    def version(self) -> int: ...

    def refresh(self) -> None: ...

    def watermark(self, device: str, epoch: str) -> int: ...

    def watermarks(self, lanes: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], int]: ...

    def shard_counter(self, shard: int) -> int: ...

    def unfit(self, schema: pa.Schema) -> Rejected | None: ...

    def append(
        self,
        batches: Sequence[RawBatch],
        watermarks: Mapping[tuple[str, str], int],
        shard_counters: Mapping[int, int],
    ) -> AppendResult: ...


def rows(count: int = 3, ts_us: int = NOW_US, **fields: pa.Array) -> pa.RecordBatch:
    """A batch of `count` readings one millisecond apart; a field x if none is given."""
    ts = pa.array(ts_us + 1_000 * np.arange(count)).view(TS_TYPE)
    return pa.record_batch({"ts": ts, **(fields or {"x": pa.array(np.arange(count), pa.float32())})})


def raw(device: str, seq: int, batch: pa.RecordBatch | None = None, epoch: str = EPOCH) -> RawBatch:
    content = rows() if batch is None else batch
    return RawBatch(device, epoch, seq, shard_of(device), NOW_US, CLOCK, content)


def commit(table: Table, *batches: RawBatch) -> AppendResult:
    """Append without looking, as a gateway must not: with the watermarks of these batches and the next counters."""
    marks = {(item.device, item.epoch): item.seq for item in batches}
    counters = {item.shard: table.shard_counter(item.shard) + 1 for item in batches}
    return table.append(batches, marks, counters)


A, B = "pump-1", "pump-2"
assert shard_of(A) != shard_of(B)
A_TWIN = next(name for name in (f"twin-{i}" for i in range(1_000)) if shard_of(name) == shard_of(A))
"""Another device of the shard of A."""


class RawTableSuite:
    """Promises of a raw table."""

    def open(self, stream: str = "vibration") -> Table:
        """One more handle on the table of a stream, not refreshed."""
        raise NotImplementedError

    def committed(self, stream: str = "vibration") -> list[tuple[str, int, int]]:
        """What stands in the table: device, seq and number of rows of each batch, sorted."""
        raise NotImplementedError

    def fresh(self, stream: str = "vibration") -> Table:
        table = self.open(stream)
        table.refresh()
        return table

    def test_a_stream_without_a_table_has_no_watermarks(self) -> None:
        table = self.fresh()
        assert table.version == -1
        assert table.watermark(A, EPOCH) == 0
        assert table.watermarks([(A, EPOCH), (B, EPOCH)]) == {(A, EPOCH): 0, (B, EPOCH): 0}
        assert table.shard_counter(shard_of(A)) == 0

    def test_rows_watermarks_and_counters_are_committed_together(self) -> None:
        table = self.fresh()
        result = table.append(
            [raw(A, 1), raw(B, 7), raw(A, 2, rows(5))],
            {(A, EPOCH): 2, (B, EPOCH): 7},
            {shard_of(A): 1, shard_of(B): 1},
        )
        assert (result.rows, result.batches, result.skewed_rows) == (11, 3, 0)
        assert "x" in result.added_columns
        other = self.fresh()
        assert self.committed() == [(A, 1, 3), (A, 2, 5), (B, 7, 3)]
        assert other.watermarks([(A, EPOCH), (B, EPOCH)]) == {(A, EPOCH): 2, (B, EPOCH): 7}
        assert other.watermark(A, "00" * 16) == 0
        assert [other.shard_counter(shard_of(name)) for name in (A, B)] == [1, 1]
        table.refresh()
        assert table.version == other.version
        assert table.watermark(A, EPOCH) == 2

    def test_what_is_known_is_as_of_the_last_refresh(self) -> None:
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 1))
        assert other.watermark(A, EPOCH) == 0
        assert other.shard_counter(shard_of(A)) == 0
        other.refresh()
        assert other.watermark(A, EPOCH) == 1
        table.refresh()
        commit(table, raw(A, 2))
        assert other.watermark(A, EPOCH) == 1
        assert other.shard_counter(shard_of(A)) == 1

    def test_a_stale_handle_cannot_commit_to_a_lane_that_moved(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 2))
        with pytest.raises(CommitConflictError):
            other.append([raw(A, 2)], {(A, EPOCH): 2}, {})
        assert self.committed() == [(A, 1, 3), (A, 2, 3)]

    def test_a_stale_handle_cannot_commit_to_a_shard_that_moved(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 2))
        with pytest.raises(CommitConflictError):
            commit(other, raw(A_TWIN, 1))
        assert self.committed() == [(A, 1, 3), (A, 2, 3)]

    def test_gateways_of_different_shards_do_not_wait_for_each_other(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 2))
        commit(other, raw(B, 1))
        assert self.committed() == [(A, 1, 3), (A, 2, 3), (B, 1, 3)]
        assert self.fresh().watermarks([(A, EPOCH), (B, EPOCH)]) == {(A, EPOCH): 2, (B, EPOCH): 1}

    def test_after_a_conflict_a_refresh_shows_the_truth_and_the_next_commit_goes_through(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 2))
        with pytest.raises(CommitConflictError):
            commit(other, raw(A, 2))
        other.refresh()
        assert other.watermark(A, EPOCH) == 2
        assert other.shard_counter(shard_of(A)) == 2
        commit(other, raw(A, 3))
        assert self.committed() == [(A, 1, 3), (A, 2, 3), (A, 3, 3)]

    def test_a_handle_that_was_not_refreshed_after_its_own_commit_is_stale(self) -> None:
        table = self.fresh()
        commit(table, raw(A, 1))
        with pytest.raises(CommitConflictError):
            commit(table, raw(A, 2))
        assert self.committed() == [(A, 1, 3)]

    def test_a_lower_watermark_is_accepted_without_a_word(self) -> None:
        """The format's trap, kept here so that nobody relies on the opposite: the caller compares before it appends."""
        commit(self.fresh(), raw(A, 5))
        commit(self.fresh(), raw(A, 3))
        assert self.fresh().watermark(A, EPOCH) == 3

    def test_of_two_that_make_the_table_one_comes_first(self) -> None:
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 1))
        with pytest.raises(CommitConflictError):
            commit(other, raw(B, 1, rows(y=pa.array([1, 2, 3]))))
        other.refresh()
        commit(other, raw(B, 1, rows(y=pa.array([1, 2, 3]))))
        assert self.committed() == [(A, 1, 3), (B, 1, 3)]

    def test_a_stale_handle_cannot_commit_after_columns_were_added(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 2, rows(y=pa.array([1, 2, 3]))))
        with pytest.raises(CommitConflictError):
            commit(other, raw(B, 1))
        assert self.committed() == [(A, 1, 3), (A, 2, 3)]

    def test_a_stale_handle_cannot_add_columns(self) -> None:
        """Adding columns is a commit of its own; it must not carry the handle past somebody else's watermark."""
        commit(self.fresh(), raw(A, 1))
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 2))
        with pytest.raises(CommitConflictError):
            commit(other, raw(A, 2, rows(y=pa.array([1, 2, 3]))))
        assert self.committed() == [(A, 1, 3), (A, 2, 3)]
        other.refresh()
        assert other.watermark(A, EPOCH) == 2
        third = self.fresh()
        commit(other, raw(A, 3, rows(y=pa.array([1, 2, 3]))))
        with pytest.raises(CommitConflictError):
            commit(third, raw(B, 1, rows(z=pa.array([1, 2, 3]))))
        assert self.committed() == [(A, 1, 3), (A, 2, 3), (A, 3, 3)]

    def test_a_stale_handle_cannot_add_columns_even_to_lanes_that_did_not_move(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table, other = self.fresh(), self.fresh()
        commit(table, raw(A, 2))
        with pytest.raises(CommitConflictError):
            commit(other, raw(B, 1, rows(y=pa.array([1, 2, 3]))))
        assert self.committed() == [(A, 1, 3), (A, 2, 3)]

    def test_seqs_are_stepped_over_without_rows(self) -> None:
        table = self.fresh()
        result = table.append([], {(A, EPOCH): 4}, {shard_of(A): 1})
        assert (result.rows, result.files) == (0, 0)
        assert self.committed() == []
        table.refresh()
        assert table.watermark(A, EPOCH) == 4
        table.append([raw(A, 5)], {(A, EPOCH): 6, (B, EPOCH): 1}, {shard_of(A): 2, shard_of(B): 1})
        other = self.fresh()
        assert other.watermarks([(A, EPOCH), (B, EPOCH)]) == {(A, EPOCH): 6, (B, EPOCH): 1}
        assert self.committed() == [(A, 5, 3)]

    def test_epochs_of_a_device_have_watermarks_of_their_own(self) -> None:
        table = self.fresh()
        old, new = "00" * 16, "11" * 16
        table.append([raw(A, 900, epoch=old), raw(A, 1, epoch=new)], {(A, old): 900, (A, new): 1}, {shard_of(A): 1})
        assert self.fresh().watermarks([(A, old), (A, new)]) == {(A, old): 900, (A, new): 1}

    def test_a_new_field_adds_a_column(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table = self.fresh()
        wider = rows(x=pa.array([1, 2, 3], pa.float32()), y=pa.array([1, 2, 3], pa.uint8()))
        assert table.unfit(wider.schema) is None
        assert commit(table, raw(A, 2, wider)).added_columns == ("y",)
        table = self.fresh()
        assert commit(table, raw(A, 3, wider)).added_columns == ()
        assert self.committed() == [(A, 1, 3), (A, 2, 3), (A, 3, 3)]

    def test_a_conflicting_type_is_named_with_both_types_and_the_remedy(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table = self.fresh()
        for kind in (pa.float64(), pa.int64(), pa.string(), pa.list_(pa.float32())):
            rejected = table.unfit(rows(x=pa.nulls(3, kind)).schema)
            assert rejected is not None
            assert rejected.reason == Reason.TYPE_CONFLICT
            for said in ("'x'", str(kind), "float", "vibration", "under a new name"):
                assert said in str(rejected)
        for kind in (pa.float32(), pa.float16(), pa.int8(), pa.null()):
            assert table.unfit(rows(x=pa.nulls(3, kind)).schema) is None
        assert self.committed() == [(A, 1, 3)]

    def test_of_two_new_schemas_that_contradict_each_other_the_first_fits(self) -> None:
        table = self.fresh()
        text, number = rows(y=pa.array(["a", "b", "c"])), rows(y=pa.array([1, 2, 3]))
        assert table.unfit(text.schema) is None
        rejected = table.unfit(number.schema)
        assert rejected is not None
        assert rejected.reason == Reason.TYPE_CONFLICT
        with pytest.raises(Rejected):
            commit(table, raw(A, 1, text), raw(B, 1, number))
        assert self.committed() == []
        commit(table, raw(A, 1, text))
        assert self.committed() == [(A, 1, 3)]

    def test_a_schema_that_was_found_fit_and_not_committed_leaves_no_trace(self) -> None:
        commit(self.fresh(), raw(A, 1))
        table = self.fresh()
        assert table.unfit(rows(y=pa.array(["a", "b", "c"])).schema) is None
        assert commit(table, raw(A, 2)).added_columns == ()
        table.refresh()
        assert table.unfit(rows(y=pa.array([1, 2, 3])).schema) is None
        assert commit(table, raw(A, 3, rows(y=pa.array([1, 2, 3])))).added_columns == ("y",)

    def test_names_that_differ_only_by_case_are_refused(self) -> None:
        commit(self.fresh(), raw(A, 1))
        rejected = self.fresh().unfit(rows(X=pa.array([1, 2, 3])).schema)
        assert rejected is not None
        assert rejected.reason == Reason.NAME_CONFLICT
        assert "'X'" in str(rejected)
        assert "'x'" in str(rejected)

    def test_a_table_has_no_more_columns_than_allowed(self) -> None:
        wide = {f"f{i}": pa.array([0, 1, 2], pa.int8()) for i in range(900)}
        table = self.fresh()
        for start in (0, 1, 2, 3):
            some = {f"{name}_{start}": column for name, column in wide.items()}
            assert table.unfit(rows(**some).schema) is None
        rejected = table.unfit(rows(**wide).schema)
        assert rejected is not None
        assert rejected.reason == Reason.TABLE_TOO_WIDE

    @pytest.mark.parametrize("ts_us", [0, -(2**63), 2**63 - 1_000_000, NOW_US + 32 * DAY_US, NOW_US - 32 * DAY_US])
    def test_a_clock_that_is_far_off_is_counted_and_its_rows_are_kept(self, ts_us: int) -> None:
        table = self.fresh()
        off, near = rows(4, ts_us), rows(2, NOW_US - 30 * DAY_US)
        assert commit(table, raw(A, 1, off), raw(B, 1, near)).skewed_rows == 4
        assert self.committed() == [(A, 1, 4), (B, 1, 2)]


class StoreSuite:
    """Promises of a store."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def test_objects_are_read_as_they_were_written(self, store: Store) -> None:
        store.put("a/b.bin", bytes(range(256)) * 1_000)
        store.put("a/empty", b"")
        store.put("a/b.bin2", pa.py_buffer(b"buffer"))
        assert store.get("a/b.bin") == bytes(range(256)) * 1_000
        assert store.get("a/empty") == b""
        assert store.get("a/b.bin2") == b"buffer"
        store.put("a/empty", b"replaced")
        assert store.get("a/empty") == b"replaced"

    def test_objects_are_listed_below_a_folder(self, store: Store) -> None:
        for path in ("raw/a/1", "raw/a/2/3", "raw/b.c/1", "rawer/1", "raw/file"):
            store.put(path, path.encode())
        assert sorted(store.objects("raw/a")) == [("raw/a/1", 7), ("raw/a/2/3", 9)]
        assert sorted(info.path for info in store.objects("raw")) == ["raw/a/1", "raw/a/2/3", "raw/b.c/1", "raw/file"]
        assert store.folders("raw") == ["a", "b.c"]
        assert store.folders("nothing") == []
        assert list(store.objects("nothing")) == []

    def test_deleting_twice_is_harmless(self, store: Store) -> None:
        store.put("x/1", b"1")
        store.delete("x/1")
        store.delete("x/1")
        with pytest.raises(ObjectMissingError, match="x/1"):
            store.get("x/1")

    def test_of_many_that_replace_what_they_saw_one_does(self, store: Store) -> None:
        store.put("models/pointer", b"0")
        seen = store.get_tagged("models/pointer")
        assert seen.data == b"0"
        assert store.replace("models/pointer", b"1", seen.tag)
        assert not store.replace("models/pointer", b"2", seen.tag)
        assert store.get("models/pointer") == b"1"
        counted: list[int] = []

        def count() -> None:
            for _ in range(5):
                while True:
                    now = store.get_tagged("models/pointer")
                    number = int(now.data) + 1
                    if store.replace("models/pointer", str(number).encode(), now.tag):
                        counted.append(number)
                        break

        counters = [threading.Thread(target=count) for _ in range(4)]
        for counter in counters:
            counter.start()
        for counter in counters:
            counter.join(60)
        assert sorted(counted) == list(range(2, 22))
        assert store.get("models/pointer") == b"21"

    def test_parts_of_an_object_are_read_and_its_size_is_known(self, store: Store) -> None:
        store.put("models/big", bytes(range(256)) * 10)
        assert store.size("models/big") == 2_560
        assert store.get_range("models/big", 255, 3) == b"\xff\x00\x01"
        assert store.get_range("models/big", 2_550, 100) == bytes(range(246, 256))
        with pytest.raises(ObjectMissingError):
            store.size("models/none")
        with pytest.raises(ObjectMissingError):
            store.get_tagged("models/none")

    def test_the_first_of_many_writers_wins(self, store: Store) -> None:
        won: list[bytes] = []

        def write(data: bytes) -> None:
            if store.put_if_absent("control/one", data):
                won.append(data)

        writers = [threading.Thread(target=write, args=(bytes([number]) * 1_000,)) for number in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
        assert len(won) == 1
        assert store.get("control/one") == won[0]
        assert store.put_if_absent("control/one", b"late") is False
        assert store.get("control/one") == won[0]

    def test_a_probe_leaves_nothing_behind(self, store: Store) -> None:
        store.probe()
        assert list(store.objects("")) == []
        if store.url.startswith("file:"):  # an object store has no folders; SeaweedFS shows those that it once had
            assert store.folders("control") == []
