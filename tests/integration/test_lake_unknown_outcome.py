"""When the store took a write and the answer was lost, nothing is committed twice and nothing is lost.

Mutant tried, made a test here fail: commits without application transactions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from contract.errors import TemporaryError
from contract.names import shard_of
from lake.errors import StoreUnavailableError
from lake.raw import RawBatch, RawTable
from lake.store import Store
from tests.contract.lake_reading import batches_in
from tests.contract.lake_suite import EPOCH, A, raw, rows
from tests.integration.lake_proxy import Spoil, SpoilingProxy
from tests.integration.servers import StoreServer
from tests.integration.test_lake_s3 import s3_settings

TIMEOUT_S = 1.0
ATTEMPTS_MAX = 10
ANSWERED = (Spoil.REFUSE, Spoil.UNAVAILABLE_AFTER, Spoil.DROP_AFTER)
VERSIONS = ["create", "first-rows", "rows", "add-columns"]
CASES = [
    pytest.param(version, how, id=f"{name}-{how.name.lower()}")
    for version, name in enumerate(VERSIONS)
    for how in Spoil
    # Waiting for an answer takes a second each; what follows is the same as after a dropped connection.
    if how in ANSWERED or name in ("rows", "add-columns")
]


@pytest.fixture
def proxy(object_store: StoreServer) -> Iterator[SpoilingProxy]:
    with SpoilingProxy(object_store.access.endpoint) as proxy:
        yield proxy


@pytest.fixture
def stores(object_store: StoreServer, proxy: SpoilingProxy) -> tuple[Store, Store]:
    """The same lake through the proxy, and past it."""
    direct = s3_settings(object_store)
    spoiled = s3_settings(object_store, url=direct.url, endpoint=proxy.endpoint, timeout_s=TIMEOUT_S)
    return Store(spoiled), Store(direct)


def bring_in(table: RawTable, batch: RawBatch) -> int:
    """The gateway's loop: look, append if it is not there, look again whatever happened. Returns the errors it met."""
    for errors in range(ATTEMPTS_MAX):
        try:
            table.refresh()
            if table.watermark(batch.device, batch.epoch) >= batch.seq:
                return errors
            counter = table.shard_counter(batch.shard)
            table.append([batch], {(batch.device, batch.epoch): batch.seq}, {batch.shard: counter + 1})
            return errors
        except TemporaryError:
            continue
    raise AssertionError("not committed")


@pytest.mark.parametrize(("version", "how"), CASES)
def test_a_commit_with_a_lost_answer_counts_once(
    stores: tuple[Store, Store], proxy: SpoilingProxy, version: int, how: Spoil
) -> None:
    through, direct = stores
    table = RawTable(through, "s")
    proxy.spoil_once("PUT", f"_delta_log/{version:020d}.json", how)
    bring_in(table, raw(A, 1))
    bring_in(table, raw(A, 2))
    bring_in(table, raw(A, 3, rows(y=pa.array([1, 2, 3]))))
    assert len(proxy.spoiled) == 1
    assert batches_in(direct, "s") == [(A, 1, 3), (A, 2, 3), (A, 3, 3)]
    other = RawTable(direct, "s")
    other.refresh()
    assert other.watermark(A, EPOCH) == 3
    assert other.shard_counter(shard_of(A)) == 3


@pytest.mark.parametrize("how", [Spoil.UNAVAILABLE_AFTER, Spoil.HANG_AFTER], ids=lambda how: how.name.lower())
@pytest.mark.parametrize("part", [".parquet", "control/schemas/"])
def test_an_object_with_a_lost_answer_holds_nothing_up(
    stores: tuple[Store, Store], proxy: SpoilingProxy, how: Spoil, part: str
) -> None:
    through, direct = stores
    proxy.spoil_once("PUT", part, how)
    bring_in(RawTable(through, "s"), raw(A, 1))
    assert len(proxy.spoiled) == 1
    assert batches_in(direct, "s") == [(A, 1, 3)]


@pytest.mark.parametrize("how", [Spoil.REFUSE, Spoil.IGNORE], ids=lambda how: how.name.lower())
def test_a_store_that_does_not_answer_gives_an_error_in_time(
    stores: tuple[Store, Store], proxy: SpoilingProxy, how: Spoil
) -> None:
    """Bounded by the settings' timeout; the margin is for a busy machine."""
    through, direct = stores
    table = RawTable(through, "s")
    bring_in(table, raw(A, 1))
    table.refresh()
    proxy.rule = lambda _method, _path: how
    for act in (
        lambda: table.append([raw(A, 2)], {(A, EPOCH): 2}, {shard_of(A): 2}),
        table.refresh,
        RawTable(through, "s").refresh,
        through.probe,
        lambda: list(through.objects("raw")),
        lambda: through.folders("raw"),
        lambda: through.put_if_absent("control/x", b""),
    ):
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            act()
        assert time.monotonic() - began < TIMEOUT_S + 5
    proxy.rule = lambda _method, _path: None
    bring_in(table, raw(A, 2))
    assert batches_in(direct, "s") == [(A, 1, 3), (A, 2, 3)]
