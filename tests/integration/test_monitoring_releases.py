"""Releases that come and go under a gateway that watches: figures, accuracy and trainings keep to what is at work.

Mistakes that a test here is for: gauges that are only ever set; accuracy of the release that a training would
replace; schedule and volume counted from the release alone; alerts closed by any gateway; labels joined with the
latest windows of all devices; NaN taken for a label; a connection kept; a bound for each model.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from contract.batches import TS_TYPE
from gateway.settings import MonitoringSettings
from lake.monitoring.triggers import TriggerEvent
from lake.query import Lake
from lake.raw import RawTable
from lake.releases import ReleaseEventKind, Releases
from tests.integration.watching_parts import HOUR_US, Clock, alerts, figure, fleet, gateway, triggers
from tests.monitoring_parts import MODEL, NOW_US, STREAM, Device, World, commit, labelled, reference, release, store_in

ACCURATE = MonitoringSettings(interval_s=3600, accuracy_interval_s=0.1)


@pytest.fixture
def store(tmp_path):
    return store_in(tmp_path / "lake")


@pytest.fixture
def world():
    return World(np.random.default_rng(7))


@pytest.fixture
def clock():
    return Clock()


def retire(store, version: int) -> None:
    Releases(store).record(ReleaseEventKind.RETIRED, MODEL, version, who="test", why="test")


def rows_of_stream(store, count: int, seq: int) -> None:
    """Readings of the stream that the model eats."""
    ts = pa.array(NOW_US + np.arange(count)).view(TS_TYPE)
    commit(RawTable(store, STREAM), "watch-1", seq, pa.record_batch({"ts": ts, "x": pa.array(np.zeros(count))}))


def labelled_run(store, device: Device, count: int) -> tuple[int, int]:
    """A device says `walk` in half of the windows in which it ran; begin and end of that."""
    begin = device.now_us
    world = World(np.random.default_rng(1))
    device.predict(*world.windows(count // 2, label="walk"))
    device.predict(*world.windows(count // 2, label="run"))
    return begin, device.now_us + 1


def test_a_release_that_no_device_runs_any_more_has_no_figures(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    assert figure(watching, "model_devices", model=MODEL, release="1") == 3
    release(store, reference(world), created_us=NOW_US + 1)
    for device in devices.values():
        device.version = 2
        device.predict(*world.windows(60))
    watching.look()
    assert figure(watching, "model_devices", model=MODEL, release="2") == 3
    for name in ("devices", "windows_per_second", "latency_p99_seconds", "nan_share", "psi", "ks", "change"):
        assert figure(watching, f"model_{name}", model=MODEL, release="1") is None, name


def test_a_device_that_is_gone_counts_no_more(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    assert figure(watching, "model_windows_per_second", model=MODEL, release="1") == pytest.approx(3 / 0.64)
    clock.now_us += 12 * HOUR_US
    devices["watch-1"].predict(*world.windows(10))
    watching.look()
    clock.now_us += 12 * HOUR_US
    watching.look()
    assert figure(watching, "model_devices", model=MODEL, release="1") == 1
    assert figure(watching, "model_windows_per_second", model=MODEL, release="1") == pytest.approx(1 / 0.64)
    assert figure(watching, "monitored") == 1


def test_a_device_that_comes_back_is_measured_from_its_baseline_at_once(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    clock.now_us += 24 * HOUR_US
    watching.look()
    assert figure(watching, "monitored") == 0
    devices["watch-2"].predict(*world.windows(30, shift=4.0))
    watching.look()
    assert figure(watching, "model_change", model=MODEL, release="1") > 50


def test_alerts_of_a_model_whose_releases_are_all_retired_close_with_its_figures(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    watching = gateway(store, clock)
    watching.look()
    for _ in range(3):
        devices["watch-2"].predict(*world.windows(60, shift=4.0))
        watching.look()
    assert figure(watching, "alerts_open", model=MODEL, kind="change") == 1
    retire(store, 1)
    others = gateway(store, clock, "gateway-b", shards=[])
    others.look()
    assert [event for _, _, event in alerts(store)] == ["opened", "opened"], "not a device of that gateway"
    watching.look()
    assert sorted(event for _, _, event in alerts(store)) == ["closed", "closed", "opened", "opened"]
    assert figure(watching, "alerts_open", model=MODEL, kind="change") is None
    assert figure(watching, "model_devices", model=MODEL, release="1") is None


def test_accuracy_is_told_while_a_draft_waits_for_a_person(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    release(store, reference(world), approved=False, created_us=NOW_US + 1)
    begin, end = labelled_run(store, devices["watch-1"], 100)
    labelled(store, "watch-1", [(begin - 5_000_000, "run"), (end, "run")])
    watching = gateway(store, clock, settings=ACCURATE)
    watching.look()
    assert figure(watching, "model_accuracy", model=MODEL, release="1") == pytest.approx(0.5, abs=0.05)
    assert alerts(store) == [("watch-1", "accuracy", "opened")]


def test_labels_of_one_device_find_their_windows_among_later_ones_of_all(store, world, clock):
    release(store, reference(world))
    devices = fleet(store, world)
    begin, end = labelled_run(store, devices["watch-1"], 100)
    labelled(store, "watch-1", [(begin, "run"), (end, "run")])
    for device in devices.values():
        device.predict(*world.windows(400))
    settings = MonitoringSettings(interval_s=3600, accuracy_interval_s=0.1, accuracy_rows_max=1_000)
    watching = gateway(store, clock, settings=settings)
    watching.look()
    # The first window began before the label did.
    assert figure(watching, "model_accuracy", model=MODEL, release="1") == pytest.approx(50 / 99)
    assert figure(watching, "model_label_coverage", model=MODEL, release="1") == pytest.approx(99 / 1_900)


def test_a_gateway_asks_no_sql_itself(store, world, clock, monkeypatch):
    """DuckDB keeps something of every file it has looked at for as long as its process lives."""
    release(store, reference(world))
    devices = fleet(store, world)
    monkeypatch.setattr(Lake, "__init__", refuse)
    watching = gateway(store, clock, settings=ACCURATE)
    watching.look()  # there are no labels yet
    assert figure(watching, "model_accuracy", model=MODEL, release="1") is None
    begin, end = labelled_run(store, devices["watch-1"], 100)
    labelled(store, "watch-1", [(begin, "run"), (end, "run")])
    watching._judged_s = None
    watching.look()
    assert figure(watching, "model_accuracy", model=MODEL, release="1") is not None
    assert figure(watching, "monitoring_failures") == 0


def refuse(*_, **__):
    raise AssertionError("DuckDB is opened in the gateway")


def test_all_models_share_the_bound_of_devices(store, world, clock):
    release(store, reference(world))
    releases = Releases(store)
    other = msgspec.structs.replace(releases.look().get(MODEL).manifest, model="other")
    releases.publish(other, who="test", why="test")
    fleet(store, world, count=20)
    for name in ("pi-1", "pi-2"):
        Device(store, name, model="other").predict(*world.windows(20))
    watching = gateway(store, clock, settings=MonitoringSettings(interval_s=3600, devices_max=4))
    watching.look()
    assert figure(watching, "monitored") == 4
    assert figure(watching, "monitoring_forgotten") == 1
    assert {name: len(watch.observer) for name, watch in watching._watches.items()} == {MODEL: 2, "other": 2}


def test_a_label_that_is_no_number_is_none(store, world, clock):
    release(store, reference(world), recipe='[labels]\nstream = "exercise"\nfield = "kind"')
    devices = fleet(store, world)
    begin, end = labelled_run(store, devices["watch-1"], 100)
    moments = pa.array([begin, end], pa.int64()).view(TS_TYPE)
    kinds = pa.array([float("nan"), 1.0])
    commit(RawTable(store, "exercise"), "watch-1", 1, pa.record_batch({"ts": moments, "kind": kinds}))
    watching = gateway(store, clock, settings=ACCURATE)
    watching.look()
    assert figure(watching, "model_accuracy", model=MODEL, release="1") is None
    assert alerts(store) == []


def test_after_a_training_that_led_to_nothing_the_schedule_begins_anew(store, world, clock):
    release(store, reference(world), recipe="[policy.retrain]\nevery_s = 86400\npause_s = 60")
    watching = gateway(store, clock)
    clock.now_us += 24 * HOUR_US
    watching.look()
    trainer = triggers(store, clock)
    assert len(trainer.look()) == 1
    trainer.finish(trainer.claim(MODEL, 60).name, TriggerEvent.DONE, "worse", {})
    clock.now_us += 24 * HOUR_US - 1
    watching.look()
    assert len(trainer.look()) == 1
    clock.now_us += 1
    watching.look()
    assert len(trainer.look()) == 2


def test_after_a_training_that_led_to_nothing_volume_is_counted_anew(store, world, clock):
    release(store, reference(world), recipe="[policy.retrain]\nnew_rows = 50\npause_s = 60")
    watching = gateway(store, clock)
    trainer = triggers(store, clock)
    first = Releases(store).look().get(MODEL).manifest.dataset.streams
    assert first == {STREAM: 0}
    steps = [(49, 0), (1 + 100, 1), (49, 1), (1, 2)]
    for seq, (rows, asked) in enumerate(steps, 1):
        rows_of_stream(store, rows, seq)
        watching.look()
        assert len(trainer.look()) == asked
        claimed = trainer.claim(MODEL, 60)
        if claimed is not None:
            assert claimed.kind == "volume"
            trainer.finish(claimed.name, TriggerEvent.FAILED, "no convergence", {})
        clock.now_us += HOUR_US
    # A gateway that starts now counts from the same training.
    gateway(store, clock, "gateway-b").look()
    assert len(trainer.look()) == 2
