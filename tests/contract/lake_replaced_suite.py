"""What happens under a running gateway when a table is deleted, or an older copy is put in its place.

Nobody should do that (docs/lake.md), but a lake that is restored must cost time, never a row that the copy or a device
still has, and never double one.

Mutants tried, each made a test here fail: a commit that is gone, and one that is another, taken for the one that was
seen; none taken for the one that was not there either; commits of its own not looked for; the columns and the schema
objects of before kept; quarantine believed to be written; the same for who asks (`lake.catalog`).
"""

from __future__ import annotations

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from contract.names import shard_of
from lake.errors import UnknownStreamError
from lake.quarantine import PATH, QuarantineTable
from lake.query import Lake
from lake.raw import RawTable
from lake.rebuild import rebuild_batch
from lake.store import Store
from tests.contract.lake_query_suite import record
from tests.contract.lake_reading import batches_in, table_in
from tests.contract.lake_suite import EPOCH, A, commit, raw, rows

Copy = dict[str, bytes]


def copy_of(store: Store, folder: str) -> Copy:
    return {info.path: store.get(info.path) for info in store.objects(folder)}


def put_in_place(store: Store, folder: str, copy: Copy) -> None:
    for info in list(store.objects(folder)):
        store.delete(info.path)
    for path, data in copy.items():
        store.put(path, data)


def bring_in(table: RawTable, *seqs: int, content: pa.RecordBatch | None = None) -> None:
    for seq in seqs:
        table.refresh()
        commit(table, raw(A, seq, content))


class ReplacedTableSuite:
    """Promises of a handle whose table is replaced."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def test_an_ordinary_life_is_one_life(self, store: Store) -> None:
        table, other = RawTable(store, "s"), RawTable(store, "s")
        bring_in(table, 1)
        table.refresh()
        life = table.life
        bring_in(other, 2, 3)
        bring_in(table, 4)
        bring_in(table, 5, content=rows(y=pa.array([1, 2, 3])))
        table.refresh()
        assert table.life == life
        assert other.life != life

    def test_a_table_that_was_deleted_is_made_again(self, store: Store) -> None:
        table = RawTable(store, "s")
        bring_in(table, 1, 2, 3)
        table.refresh()
        life = table.life
        put_in_place(store, "raw/s", {})
        put_in_place(store, "control/schemas", {})
        table.refresh()
        assert (table.version, table.watermark(A, EPOCH), table.shard_counter(shard_of(A))) == (-1, 0, 0)
        assert table.life != life
        commit(table, raw(A, 4))
        assert batches_in(store, "s") == [(A, 4, 3)]
        assert rebuild_batch(store, "s", A, EPOCH, 4).equals(rows())

    def test_an_older_copy_is_seen(self, store: Store) -> None:
        table = RawTable(store, "s")
        bring_in(table, 1, 2)
        copy = copy_of(store, "raw/s")
        bring_in(table, 3, 4)
        table.refresh()
        life = table.life
        put_in_place(store, "raw/s", copy)
        for attempt in range(2):
            table.refresh()
            assert (table.watermark(A, EPOCH), table.shard_counter(shard_of(A))) == (2, 2), attempt
        assert table.life != life
        bring_in(table, 3)
        assert batches_in(store, "s") == [(A, 1, 3), (A, 2, 3), (A, 3, 3)]

    @pytest.mark.parametrize("commits", [2, 3], ids=["as-far", "further"])
    def test_an_older_copy_that_others_went_on_with_is_seen(self, store: Store, commits: int) -> None:
        """Version and counters have come to what they were, by other commits, and other columns."""
        table, other = RawTable(store, "s"), RawTable(store, "s")
        bring_in(table, 1, 2)
        copy = copy_of(store, "raw/s")
        bring_in(table, 3, content=rows(y=pa.array([1, 2, 3])))
        table.refresh()
        life, version = table.life, table.version
        put_in_place(store, "raw/s", copy)
        bring_in(other, *range(10, 10 + commits))
        other.refresh()
        assert other.version == version + commits - 2
        table.refresh()
        assert table.life != life
        assert (table.watermark(A, EPOCH), table.shard_counter(shard_of(A))) == (9 + commits, 2 + commits)
        assert table.unfit(rows(y=pa.array(["a", "b", "c"])).schema) is None
        bring_in(table, 10 + commits)
        assert batches_in(store, "s") == [(A, seq, 3) for seq in (1, 2, *range(10, 11 + commits))]

    @pytest.mark.parametrize("others", [0, 1, 2])
    def test_a_copy_that_goes_as_far_as_was_seen_lacks_a_commit_that_was_made(self, store: Store, others: int) -> None:
        """An object store goes by content, and on a disk a copy may get the same times and the same inode: what was
        seen looks as it was, and only what this handle committed last, and has not seen, is gone."""
        table, other = RawTable(store, "s"), RawTable(store, "s")
        bring_in(table, 1, 2)
        life, version = table.life, table.version
        store.delete(f"raw/s/_delta_log/{version + 1:020d}.json")
        bring_in(other, *range(2, 2 + others))
        table.refresh()
        assert table.life != life
        assert (table.watermark(A, EPOCH), table.shard_counter(shard_of(A))) == (1 + others, 1 + others)
        life = table.life
        bring_in(table, 2 + others)
        table.refresh()
        assert table.life == life
        assert batches_in(store, "s") == [(A, seq, 3) for seq in range(1, 3 + others)]

    def test_a_table_whose_last_commit_was_cleaned_up_is_not_trusted_for_that(self, store: Store) -> None:
        """Only its checkpoint is left: nothing tells this table from another."""
        table = RawTable(store, "s")
        bring_in(table, 1, 2)
        handle = DeltaTable(store.table_uri("raw/s"), storage_options=store.storage_options)
        handle.create_checkpoint()
        store.delete(f"raw/s/_delta_log/{handle.version():020d}.json")
        for _ in range(2):
            table.refresh()
            assert table.watermark(A, EPOCH) == 2
        put_in_place(store, "raw/s", {})
        table.refresh()
        assert table.version == -1
        bring_in(table, 3)
        assert batches_in(store, "s") == [(A, 3, 3)]

    def test_an_open_lake_answers_from_the_table_that_is_there(self, store: Store) -> None:
        table, lake = RawTable(store, "s"), Lake(store)
        bring_in(table, 1)
        copy = copy_of(store, "raw/s")
        bring_in(table, 2, content=rows(y=pa.array([1, 2, 3])))
        assert lake.sql("FROM s").num_rows == 6
        put_in_place(store, "raw/s", {})
        with pytest.raises(UnknownStreamError):
            lake.sql("FROM s")
        put_in_place(store, "raw/s", copy)
        assert lake.sql("FROM s").num_rows == 3
        bring_in(RawTable(store, "s"), 2, content=rows(z=pa.array([1, 2, 3])))
        assert "z" in lake.sql("FROM s").column_names
        put_in_place(store, "raw/s", copy)
        bring_in(RawTable(store, "s"), 2, content=rows(w=pa.array([1, 2, 3])))
        assert "w" in lake.sql("FROM s").column_names
        lake.close()

    def test_what_is_refused_is_kept_again(self, store: Store) -> None:
        table = QuarantineTable(store)
        table.append([record(epoch=EPOCH, seq=1)])
        put_in_place(store, PATH, {})
        table.append([record(epoch=EPOCH, seq=1)])
        assert table_in(store, PATH).num_rows == 1
