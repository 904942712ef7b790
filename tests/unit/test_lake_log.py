"""The shortcut to a table's application transactions says what delta-rs says, or that it cannot tell.

Mutants tried, each made a test here fail: the checkpoint left out; all commits read over the checkpoint; a
checkpoint beyond the asked version taken; a checkpoint in parts overlooked; no way back; nothing forgotten with the
table.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from deltalake import CommitProperties, DeltaTable, Field, Schema, Transaction
from deltalake.schema import PrimitiveType

from lake.log import NAME, TransactionLog
from lake.store import Store, StoreSettings


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(StoreSettings(url=tmp_path.as_uri(), fsync=False))


def create(store: Store, checkpoint_interval: int = 100) -> DeltaTable:
    return DeltaTable.create(
        store.table_uri("t"),
        Schema([Field("x", PrimitiveType("integer")), Field("date", PrimitiveType("date"))]),
        partition_by=["date"],
        configuration={"delta.checkpointInterval": str(checkpoint_interval)},
    )


def commit(table: DeltaTable, **versions: int) -> None:
    transactions = [Transaction(name, version) for name, version in versions.items()]
    table.create_write_transaction(
        [], "append", table.schema(), ["date"], commit_properties=CommitProperties(app_transactions=transactions)
    )
    table.update_incremental()


def test_it_follows_the_log_commit_by_commit(store: Store) -> None:
    table, log = create(store), TransactionLog(store, "t")
    log.advance(0)
    assert log.get("a") == 0
    for number in range(1, 6):
        commit(table, a=number, **{f"b{number}": number})
        log.advance(table.version())
        assert log.get("a") == number == table.transaction_version("a")
    assert log.get("b3") == 3
    assert log.get("b9") == 0


@pytest.mark.parametrize("commits", [9, 10, 11, 25])
def test_a_new_reader_begins_at_the_checkpoint(store: Store, commits: int) -> None:
    table = create(store, checkpoint_interval=10)
    for number in range(1, commits + 1):
        commit(table, a=100 - number, **{f"b{number}": number})
    log = TransactionLog(store, "t")
    log.advance(commits)
    expected = {"a": 100 - commits} | {f"b{number}": number for number in range(1, commits + 1)}
    assert {name: log.get(name) for name in expected} == expected
    assert set(log.app_ids() or ()) == set(expected)
    assert all(table.transaction_version(name) == version for name, version in expected.items())


def test_an_older_version_is_read_from_before_the_newer_checkpoint(store: Store) -> None:
    table = create(store, checkpoint_interval=10)
    for number in range(1, 26):
        commit(table, a=number)
    for version in (0, 3, 10, 15, 24):
        log = TransactionLog(store, "t")
        log.advance(version)
        assert log.get("a") == version


def test_a_log_with_a_hole_is_not_believed(store: Store, tmp_path: Path) -> None:
    table = create(store)
    for number in range(1, 6):
        commit(table, a=number)
    (tmp_path / "t" / "_delta_log" / f"{3:020d}.json").unlink()
    log = TransactionLog(store, "t")
    log.advance(5)
    assert log.get("a") is None
    assert log.app_ids() is None


def test_a_checkpoint_of_another_kind_is_not_believed(store: Store, tmp_path: Path) -> None:
    table = create(store)
    commit(table, a=1)
    (tmp_path / "t" / "_delta_log" / f"{1:020d}.checkpoint.0000000001.0000000002.parquet").write_bytes(b"")
    log = TransactionLog(store, "t")
    log.advance(1)
    assert log.get("a") is None


def test_memory_is_bounded(store: Store) -> None:
    table = create(store)
    commit(table, **{f"d{number}": 1 for number in range(10)})
    log = TransactionLog(store, "t", kept_max=9)
    log.advance(1)
    assert log.get("d1") is None
    commit(table, d1=2)
    log.advance(2)
    assert log.get("d1") is None


def test_a_table_that_was_made_anew_is_read_anew(store: Store, tmp_path: Path) -> None:
    table, log = create(store), TransactionLog(store, "t")
    commit(table, old=7)
    log.advance(1)
    shutil.rmtree(tmp_path / "t")
    table = create(store)
    commit(table, new=1)
    commit(table, new=2)
    log.forget()
    log.advance(2)
    assert (log.get("old"), log.get("new")) == (0, 2)


def test_it_can_go_back(store: Store) -> None:
    table, log = create(store), TransactionLog(store, "t")
    for number in range(1, 6):
        commit(table, a=number)
    log.advance(5)
    log.advance(2)
    assert log.get("a") == 2


def test_a_commit_that_was_named_is_known_again_whether_it_was_just_read_or_not(store: Store) -> None:
    table = create(store)
    for name in ("a", "b"):
        properties = CommitProperties(custom_metadata={NAME: name})
        table.create_write_transaction([], "append", table.schema(), ["date"], commit_properties=properties)
        table.update_incremental()
    commit(table, x=1)
    log = TransactionLog(store, "t")
    for version in (3, 3, 1):
        log.advance(version)
        assert (log.names(0, 3), log.names(2, 3), log.names(3, 9)) == ({"a", "b"}, {"b"}, set()), version
