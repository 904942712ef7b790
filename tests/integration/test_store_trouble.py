"""The object store refuses, hangs, answers 503, is slow, or lies about what it did; gateways freeze in the middle.

Memory stays bounded, acknowledgements stop, devices keep what they have; and when all is well again, everything is in
the lake once. The short versions run always; the 60 s of the promise are marked slow.

Mutants tried, each found here: acknowledging what failed; not looking at the counters again before a commit; holding
batches without a bound while the store is away (neither by the budget nor by a stream's share of it).
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator

import pytest

from simulators.faults.proxy import Weather
from simulators.faults.store import Answer, StoreFault, StoreFaultProxy, When
from tests.integration.gateway_parts import STREAM, Devices, GatewayProcess, Lake, s3_environ, s3_lake
from tests.integration.servers import PATIENCE_S, StoreServer, wait_until

MEMORY_BYTES_MAX = 4 * 1024 * 1024
RESIDENT_BYTES_MAX = 500 * 1024 * 1024
COMMIT = f"raw/{STREAM}/_delta_log/[0-9]+[.]json"
SMALL = {
    "memory_bytes_max": MEMORY_BYTES_MAX,
    "limits": {"payload_bytes_max": 256 * 1024, "body_bytes_max": 1024 * 1024},
}
_numbers = itertools.count()


class Place:
    """A store behind a proxy of its own, and a lake in it."""

    def __init__(self, store: StoreServer, proxy: StoreFaultProxy) -> None:
        self.store, self.proxy = store, proxy
        self.prefix = f"trouble-{next(_numbers)}"
        self.lake = Lake.s3(store.access, self.prefix)

    def settings(self, *, direct: bool = False) -> dict[str, object]:
        endpoint = None if direct else f"http://{self.proxy.address}"
        return s3_lake(self.store.access, self.prefix, endpoint=endpoint, timeout_s=2.0)

    def names(self, count: int) -> list[str]:
        return [f"{self.prefix}-{number}" for number in range(count)]


@pytest.fixture
def place(object_store) -> Iterator[Place]:
    with StoreFaultProxy(object_store.port) as proxy:
        yield Place(object_store, proxy)


def answers_503(proxy: StoreFaultProxy) -> None:
    proxy.inject([StoreFault(answer=Answer.SLOW_DOWN)])


def answers_503_to_some(proxy: StoreFaultProxy) -> None:
    proxy.inject([StoreFault(answer=Answer.SLOW_DOWN, fraction=0.4)], seed=3)


TROUBLES: dict[str, tuple[Callable[[StoreFaultProxy], None], bool]] = {
    # what happens, and whether nothing at all can be committed meanwhile
    "refuses": (lambda proxy: proxy.refuse(), True),
    "resets": (lambda proxy: proxy.reset(), True),
    "hangs": (lambda proxy: proxy.hang(), True),
    "answers-503": (answers_503, True),
    "answers-503-to-some": (answers_503_to_some, False),
    "is-slow": (lambda proxy: proxy.set(Weather(latency_s=0.3, bytes_per_s_max=60_000)), False),
}


def survives(place: Place, broker: str, folder, trouble: str, seconds: float) -> None:
    """Trouble under load for so long; then everything is well again."""
    begin, total = TROUBLES[trouble]
    gateway = GatewayProcess(
        folder, broker, place.settings(), environ=s3_environ(place.store.access), **SMALL, drain_timeout_s=1.0
    )
    with gateway, Devices(broker, place.names(8), rows=100, rate=8.0) as devices:
        devices.producing.set()
        wait_until(lambda: gateway.metric("commits_total") >= 2, PATIENCE_S, "it works")
        begin(place.proxy)
        pause = threading.Event()
        pause.wait(min(seconds, 1.0))  # what was under way when the trouble began may still come through
        before = gateway.metric("committed_rows_total")
        pause.wait(seconds)
        during = gateway.metrics()
        assert gateway.get("/healthz")[0] == 200
        acknowledged = devices.acknowledged()
        assert acknowledged <= place.lake.batches().keys()
        if total:
            assert during["committed_rows_total"] == before
            status, found = wait_until(
                lambda: (answer := gateway.get("/readyz"))[0] == 503 and answer, PATIENCE_S, "it is not ready"
            )
            assert [reason["code"] for reason in found["reasons"]] == ["lake_unreachable"]
            assert status == 503
            assert devices.waiting > 0
            assert gateway.metric("store_errors_total") > 0
        assert during["pending_bytes"] <= during["pending_bytes_max"] == MEMORY_BYTES_MAX
        assert during["process_resident_memory_bytes"] < RESIDENT_BYTES_MAX
        place.proxy.inject([])
        place.proxy.pass_through()
        devices.producing.clear()
        devices.wait_drained(90.0)
        gateway.wait_ready()
        after = gateway.metrics()
        assert after["pending_highest_bytes"] <= MEMORY_BYTES_MAX
        assert after["pending_bytes"] == after["failing_streams"] == 0
        assert after["process_resident_memory_bytes"] < RESIDENT_BYTES_MAX
        assert not [name for name, count in after.items() if name.startswith("faults_total") and count]
        devices.check(place.lake)
        # What a commit did whose answer was lost is counted when it is found: as there already.
        committed = after["committed_batches_total"]
        assert committed <= len(devices.accepted) <= committed + after['duplicates_total{seen="commit"}']


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_store_in_trouble_costs_time_and_no_row(place, mosquitto, tmp_path, trouble):
    survives(place, mosquitto.url, tmp_path, trouble, 3.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_store_in_trouble_for_a_minute_costs_time_and_no_row(place, mosquitto, tmp_path, trouble):
    survives(place, mosquitto.url, tmp_path, trouble, 60.0)


def test_at_the_limit_of_memory_batches_are_shed_and_devices_keep_them(place, mosquitto, tmp_path):
    gateway = GatewayProcess(tmp_path, mosquitto.url, place.settings(), environ=s3_environ(place.store.access), **SMALL)
    with gateway, Devices(mosquitto.url, place.names(8), rows=2_000) as devices:
        devices.append_all(1)
        devices.wait_drained()
        place.proxy.refuse()
        devices.append_all(40)
        wait_until(
            lambda: sum(count for name, count in gateway.metrics().items() if name.startswith("shed_total")) >= 50,
            PATIENCE_S,
            "batches are shed",
        )
        held = gateway.metrics()
        assert held["pending_highest_bytes"] <= MEMORY_BYTES_MAX
        # Whoever sheds does not ask for more.
        assert held["rewinds_total"] <= 8
        assert devices.waiting == 8 * 40
        place.proxy.pass_through()
        devices.wait_drained(90.0)
        devices.check(place.lake)


@pytest.mark.parametrize("answer", [Answer.SLOW_DOWN, Answer.INTERNAL_ERROR, Answer.RESET])
def test_a_commit_that_took_effect_and_was_said_to_have_failed_doubles_nothing(place, mosquitto, tmp_path, answer):
    gateway = GatewayProcess(tmp_path, mosquitto.url, place.settings(), environ=s3_environ(place.store.access))
    with gateway, Devices(mosquitto.url, place.names(4), rows=10, rate=10.0) as devices:
        devices.producing.set()
        wait_until(lambda: gateway.metric("commits_total") >= 2, PATIENCE_S, "it works")
        fault = StoreFault(name="lie", when=When.AFTER, answer=answer, method="PUT", path=COMMIT, fraction=0.5)
        place.proxy.inject([fault], seed=5)
        wait_until(
            lambda: sum(seen.fault == "lie" and seen.status == "200" for seen in place.proxy.seen()) >= 5,
            PATIENCE_S,
            "commits took effect and were denied",
        )
        place.proxy.inject([])
        devices.producing.clear()
        devices.wait_drained()
        devices.check(place.lake)
        after = gateway.metrics()
        # It looked, and found its own commits.
        assert after['duplicates_total{seen="commit"}'] > 0
        assert after["store_errors_total"] + after["conflicts_total"] > 0
        assert after["pending_bytes"] == 0


@pytest.mark.parametrize("moment", ["as-the-flush-begins", "when-the-rows-are-written", "when-the-commit-was-sent"])
def test_a_gateway_that_freezes_in_mid_flush_and_wakes_as_a_zombie_doubles_nothing(place, mosquitto, tmp_path, moment):
    environ = s3_environ(place.store.access)
    # A frozen gateway hears of nothing for a while; what it held must survive that long in its requests, too.
    zombie = GatewayProcess(
        tmp_path, mosquitto.url, {**place.settings(), "timeout_s": 60.0}, name="zombie", environ=environ
    )
    heir = GatewayProcess(tmp_path, mosquitto.url, place.settings(direct=True), name="heir", environ=environ)
    with zombie, Devices(mosquitto.url, place.names(4), rows=10, rate=10.0) as devices:
        devices.producing.set()
        wait_until(lambda: zombie.metric("commits_total") >= 2, PATIENCE_S, "it works")
        seen = len(place.proxy.seen())
        if moment == "as-the-flush-begins":
            place.proxy.stall()
        else:
            wanted = "parquet" if moment == "when-the-rows-are-written" else COMMIT
            wait_until(
                lambda: [
                    each
                    for each in place.proxy.seen()[seen:]
                    if each.method == "PUT" and STREAM in each.target and re.search(wanted, each.target)
                ],
                PATIENCE_S,
                "the moment has come",
            )
            place.proxy.stall()
        wait_until(lambda: zombie.metric("flushes") == 1, PATIENCE_S, "a flush is under way")
        zombie.freeze()
        held = devices.waiting
        with heir:
            wait_until(lambda: heir.metric("committed_batches_total") > held, PATIENCE_S, "the heir has taken over")
            place.proxy.pass_through()
            zombie.thaw()
            wait_until(lambda: zombie.metric("flushes") == 0, PATIENCE_S, "the zombie's flush has ended")
            devices.producing.clear()
            devices.wait_drained()
            devices.check(place.lake)
            both = (zombie, heir)
            wait_until(lambda: not any(each.metric("pending_bytes") for each in both), PATIENCE_S, "nothing is pending")
            assert sum(each.metric("committed_batches_total") for each in both) <= len(devices.accepted)
            # The zombie lives on, and does its part.
            devices.append_all(3)
            devices.wait_drained()
            devices.check(place.lake)
            assert zombie.get("/healthz")[0] == 200
