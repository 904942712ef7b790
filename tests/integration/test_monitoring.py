"""Releases at work, watched: predictions committed through `lake.raw` into a lake on disk, the gateway over them."""

from __future__ import annotations

import threading

import msgspec
import numpy as np
import pytest
from deltalake import DeltaTable
from structlog.testing import capture_logs

from contract.names import shard_of
from gateway.settings import MonitoringSettings
from lake.catalog import Catalog
from lake.errors import CorruptLakeError, StoreUnavailableError
from lake.monitoring.due import rows_at
from lake.monitoring.triggers import TriggerEvent
from lake.monitoring.watch import ModelWatch
from lake.query import Lake
from lake.releases import Releases
from lake.store import Store
from tests.integration.watching_parts import DEVICES, Clock, alerts, figure, fleet, gateway, triggers
from tests.monitoring_parts import MODEL, NOW_US, World, labelled, reference, release, store_in


@pytest.fixture
def store(tmp_path):
    return store_in(tmp_path / "lake")


@pytest.fixture
def world():
    return World(np.random.default_rng(7))


@pytest.fixture
def clock():
    return Clock()


def test_a_fleet_as_in_training_raises_no_alert(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    for _ in range(6):
        assert watching.look()
        for device in devices.values():
            device.predict(*world.windows(40))
    assert alerts(store) == []
    assert figure(watching, "model_devices", model=MODEL, release="1") == 3
    assert figure(watching, "model_windows_per_second", model=MODEL, release="1") == pytest.approx(3 / 0.64)
    assert figure(watching, "model_psi", model=MODEL, release="1") < 1


def test_drift_of_one_device_opens_alerts_once_and_asks_for_one_training(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    assert watching.look()
    for _ in range(4):
        for name, device in devices.items():
            device.predict(*world.windows(40, shift=4.0 if name == "watch-2" else 0.0))
        assert watching.look()
    found = alerts(store)
    assert {(device, event) for device, _, event in found} == {("watch-2", "opened")}
    assert {kind for _, kind, _ in found} == {"change", "features"}
    assert len(found) == 2
    (trigger,) = triggers(store).look().values()
    assert (trigger.model, trigger.release, trigger.kind, trigger.event) == (MODEL, 1, "drift", TriggerEvent.REQUESTED)
    assert "watch-2" in trigger.why
    with_sql = Lake(store)
    assert with_sql.sql("SELECT count(*) AS n FROM alerts").to_pylist() == [{"n": 2}]
    assert with_sql.sql("SELECT event FROM triggers").to_pylist() == [{"event": "requested"}]
    with_sql.close()


def test_an_alert_closes_when_the_device_is_itself_again(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    for shift in [4.0] * 3 + [0.0] * 6:
        devices["watch-2"].predict(*world.windows(60, shift=shift))
        assert watching.look()
    found = alerts(store)
    assert [event for _, kind, event in found if kind == "features"] == ["opened", "closed"]
    assert [event for _, kind, event in found if kind == "change"] == ["opened", "closed"]


def test_a_newer_release_on_the_device_closes_what_the_old_one_had_open(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    for _ in range(3):
        devices["watch-2"].predict(*world.windows(60, shift=4.0))
        watching.look()
    assert len(alerts(store)) == 2
    release(store, reference(world), created_us=NOW_US + 1)
    devices["watch-2"].version = 2
    devices["watch-2"].predict(*world.windows(60))
    watching.look()
    assert sorted(event for _, _, event in alerts(store)) == ["closed", "closed", "opened", "opened"]


def test_a_gateway_that_starts_after_the_change_still_measures_from_the_first_windows(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    gateway(store, clock).look()
    # Within what training has seen of others, but not as this device was.
    changed = 1.9
    for _ in range(4):
        devices["watch-2"].predict(*world.windows(60, shift=changed))
    fresh = gateway(store, clock, "gateway-b")
    fresh.look()
    devices["watch-2"].predict(*world.windows(60, shift=changed))
    fresh.look()
    assert ("watch-2", "change", "opened") in alerts(store)


def test_several_gateways_that_see_the_same_open_one_alert_and_ask_once(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    gateways = [gateway(store, clock, f"gateway-{number}") for number in range(3)]
    for _ in range(4):
        for watching in gateways:
            watching.look()
        devices["watch-2"].predict(*world.windows(60, shift=4.0))
    threads = [threading.Thread(target=watching.look) for watching in gateways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = alerts(store)
    assert len(found) == len(set(found)) == 2
    assert len(triggers(store).look()) == 1


def test_a_gateway_watches_the_devices_of_its_shards_only(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    mine = shard_of("watch-1")
    assert mine != shard_of("watch-2")
    watching = gateway(store, clock, shards=[mine])
    watching.look()
    for _ in range(3):
        devices["watch-2"].predict(*world.windows(60, shift=4.0))
        watching.look()
    assert alerts(store) == []
    assert figure(watching, "monitored") == sum(shard_of(name) == mine for name in DEVICES)


def test_after_a_training_the_policy_keeps_a_pause(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    for _ in range(3):
        devices["watch-2"].predict(*world.windows(60, shift=4.0))
        watching.look()
    trainer = triggers(store, clock)
    claimed = trainer.claim(MODEL, 60)
    trainer.finish(claimed.name, TriggerEvent.DONE, "not better", {})
    clock.now_us += 59_000_000
    # What is open already had its training. What opens now has not.
    for _ in range(3):
        devices["watch-1"].predict(*world.windows(60, shift=4.0))
        watching.look()
    assert {device for device, _, _ in alerts(store)} == {"watch-1", "watch-2"}
    assert len(trainer.look()) == 1
    clock.now_us += 2_000_000
    watching.look()
    assert len(trainer.look()) == 2


def test_an_alert_that_stays_open_is_no_reason_for_a_second_training(store, world, clock):
    """Mutant tried: only the pause is looked at."""
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    trainer = triggers(store, clock)
    for _ in range(3):
        devices["watch-2"].predict(*world.windows(60, shift=4.0))
        watching.look()
    trainer.finish(trainer.claim(MODEL, 60).name, TriggerEvent.DONE, "not better", {})
    for _ in range(3):
        clock.now_us += 3_600_000_000
        devices["watch-2"].predict(*world.windows(60, shift=4.0))
        watching.look()
    assert [event for _, _, event in alerts(store)] == ["opened", "opened"]
    assert len(trainer.look()) == 1


def test_alerts_of_a_device_that_is_gone_close_and_those_of_others_stay(store, world, clock):
    """Mutants tried: never; all alerts; counted from the opening though windows came since."""
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    for _ in range(3):
        for name in ("watch-1", "watch-2"):
            devices[name].predict(*world.windows(60, shift=4.0))
        watching.look()
    hour_us = 3_600_000_000
    clock.now_us += 12 * hour_us
    devices["watch-1"].predict(*world.windows(60, shift=4.0))
    watching.look()
    clock.now_us += 12 * hour_us - 1
    watching.look()
    assert {event for _, _, event in alerts(store)} == {"opened"}
    clock.now_us += 1
    watching.look()
    closed = [(device, kind) for device, kind, event in alerts(store) if event == "closed"]
    assert sorted(closed) == [("watch-2", "change"), ("watch-2", "features")]
    assert figure(watching, "model_devices", model=MODEL, release="1") == 1
    watching.look()
    assert len(alerts(store)) == 6
    # A gateway that starts now has not heard of anybody, and waits as long.
    fresh = gateway(store, clock, "gateway-b")
    clock.now_us += 23 * hour_us
    fresh.look()
    assert len(alerts(store)) == 6


def test_what_is_wrong_with_one_model_keeps_no_other_from_being_watched(store, world, clock, monkeypatch):
    """Mutants tried: no guard; one that swallows a lake that is away, or logs at each look."""
    release(store, reference(world))
    releases = Releases(store)
    other = msgspec.structs.replace(releases.look().get(MODEL).manifest, model="a-first")
    releases.publish(other, who="test", why="test")
    fleet(store, world)
    read = ModelWatch.read
    failure: Exception = CorruptLakeError("it contradicts itself")

    def broken(self, rows_max):
        if self.model == "a-first":
            raise failure
        return read(self, rows_max)

    monkeypatch.setattr(ModelWatch, "read", broken)
    watching = gateway(store, clock)
    with capture_logs() as logs:
        assert watching.look()
        assert watching.look()
    assert figure(watching, "model_devices", model=MODEL, release="1") == 3
    assert figure(watching, "monitoring_failures") == 2
    told = [(log["model"], log["error"]) for log in logs if log["event"] == "models_not_watched"]
    assert told == [("a-first", "it contradicts itself")]
    failure = ZeroDivisionError("a bug")
    assert watching.look()
    assert figure(watching, "faults_total", where="monitoring") == 1
    failure = StoreUnavailableError("it burns")
    assert not watching.look()


def test_a_damaged_file_is_counted_and_what_is_behind_it_is_read(store, world, clock, tmp_path):
    """Mutant tried: the feed stops at it for ever."""
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    assert watching.look()
    folder = tmp_path / "lake" / "raw" / f"predictions.{MODEL}"
    known = set(folder.rglob("*.parquet"))
    devices["watch-1"].predict(*world.windows(10))
    [damaged] = set(folder.rglob("*.parquet")) - known
    damaged.write_bytes(b"PAR1 torn")
    devices["watch-2"].predict(*world.windows(10))
    assert watching.look()
    assert figure(watching, "monitoring_skipped_files") == 1
    assert figure(watching, "monitoring_rows_total") == 610
    assert watching.look()
    assert figure(watching, "monitoring_skipped_files") == 1


def test_rows_of_a_version_that_the_log_has_no_more_are_not_known(store, tmp_path):
    labelled(store, "watch-1", [(NOW_US, "walk")])
    catalog = Catalog(store)
    version = catalog.state("raw/exercise").version
    assert rows_at(catalog, "exercise", version) == 1
    DeltaTable(catalog.state("raw/exercise").uri).create_checkpoint()
    for entry in (tmp_path / "lake" / "raw" / "exercise" / "_delta_log").glob("*0.json"):
        entry.unlink()
    assert rows_at(Catalog(store), "exercise", 0) is None
    assert rows_at(Catalog(store), "exercise", 99) is None
    assert rows_at(Catalog(store), "unheard-of") is None


def test_a_draft_that_waits_for_a_person_keeps_further_trainings_away(store, world, clock):
    release(store, reference(world), recipe="[policy.retrain]\nevery_s = 60")
    release(store, reference(world), approved=False, created_us=NOW_US + 1)
    gateway(store, clock).look()
    assert triggers(store).look() == {}


def test_time_and_volume_ask_for_a_training_too(store, world, clock):
    release(store, reference(world), recipe="[policy.retrain]\nevery_s = 3601")
    watching = gateway(store, clock)
    watching.look()
    assert triggers(store).look() == {}
    clock.now_us += 1_000_000
    watching.look()
    (trigger,) = triggers(store).look().values()
    assert trigger.kind == "schedule"


def test_labels_that_come_late_give_accuracy_and_its_alert(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    settings = MonitoringSettings(interval_s=3600, accuracy_interval_s=0.1)
    watching = gateway(store, clock, settings=settings)
    watching.look()
    assert figure(watching, "model_accuracy", model=MODEL, release="1") is None
    device = devices["watch-1"]
    begin = device.now_us
    device.predict(*world.windows(50, label="walk"))
    device.predict(*world.windows(50, label="run"))
    # The truth: walking all the time, and for as long as is known.
    labelled(store, "watch-1", [(begin, "walk"), (begin, "walk"), (device.now_us + 1, "run")])
    watching._judged_s = None
    watching.look()
    # The first two windows began before the label did.
    assert figure(watching, "model_accuracy", model=MODEL, release="1") == pytest.approx(49 / 99)
    assert figure(watching, "model_label_coverage", model=MODEL, release="1") == pytest.approx(99 / 700)
    assert alerts(store) == [("watch-1", "accuracy", "opened")]


def test_a_lake_that_does_not_answer_is_told_and_tried_again(store, world, clock, monkeypatch):
    release(store, reference(world))
    fleet(store, world)
    watching = gateway(store, clock)
    with monkeypatch.context() as patch:
        # As an object store that is down: every read fails, whatever was opened before.
        patch.setattr(Store, "get", unavailable)
        patch.setattr(Store, "size", unavailable)
        assert not watching.look()
    assert watching.look()
    assert figure(watching, "model_devices", model=MODEL, release="1") == 3


def unavailable(self, path):
    raise StoreUnavailableError(f"cannot read {path} in {self.url}: connection refused")
