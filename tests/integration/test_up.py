"""`headwater up`: one command, the whole road; it stops cleanly, comes back where it was, and survives kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

from headwater.lake_access import opened_store
from headwater.plan import UpOptions, plan_devices
from headwater.tally import moment
from headwater.values import compare
from lake.query import Lake
from lake.store import Store, StoreSettings
from tests.integration.servers import BrokerServer, free_port, wait_until
from tests.integration.stacks import Running, check_books, headwater, rows, wait_gone

SMALL = ("up", "--devices", "2", "--speed", "20")


def check_embedded(running: Running) -> int:
    """The books of a stopped stack with an embedded store."""
    with opened_store(None, str(running.data), {}) as store:
        return check_books(running.record(), store.settings)


@pytest.mark.timeout(300)
def test_up_answers_stops_on_ctrl_c_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """Mutants tried: devices stopped after the gateway (batches are left in the buffers)."""
    data = str(tmp_path / "data")
    with Running(tmp_path / "data", *SMALL) as running:
        said = running.up()
        record = running.record()
        assert said["stack"]["broker"] == record.broker
        assert [device.name for device in record.devices] == ["watch-s01-l", "watch-s01-r"]
        running.wait_for_rows("watch", 2_000)

        def connected() -> bool:
            return all(one["uplink"]["connected"] for one in rows("agent", "status", "--data", data))

        wait_until(connected, 30.0, "both devices are connected")
        status = rows("agent", "status", "--data", data)
        assert [one["device"] for one in status] == ["watch-s01-l", "watch-s01-r"]
        lanes = rows("agent", "buffer", "--data", data, "--device", "watch-s01-r")
        assert {lane["stream"] for lane in lanes[0]["lanes"]} == {"watch", "exercise", "headwater.events"}
        head = rows("lake", "head", "watch", "--data", data, "-n", "3")
        assert [set(row) >= {"ts", "ax", "_device", "_seq"} for row in head] == [True] * 3
        labels = running.rows("SELECT DISTINCT subject FROM exercise")
        assert labels == [{"subject": 1}]
        with urllib.request.urlopen(f"{record.http}/healthz", timeout=10) as answer:
            assert answer.status == 200
        doctor = headwater("doctor", "--data", data, "--json")
        assert doctor.returncode == 0, doctor.stdout
        verdicts = {one["check"]: one["verdict"] for one in json.loads(doctor.stdout)["findings"]}
        assert verdicts["broker.payload"] == verdicts["store.conditional_put"] == "ok"

        second = headwater("up", "--data", data)
        assert second.returncode == 2
        assert f"in use by process {running.pid}" in second.stderr

        children = list(running.children().values())
        assert len(children) == 5
        assert running.interrupt() == 0
        wait_gone(children)
        assert running.lines[-1] == {"event": "stopped", "restarts": {}}
        first_rows = check_embedded(running)

    with Running(tmp_path / "data", *SMALL, "--for", "4") as again:
        assert again.up()["stack"]["broker"] == record.broker
        assert again.end() == 0
        second_rows = check_embedded(again)
        # Both runs stand in one lake, whole; the devices did not become others.
        (found,) = again.rows(
            "SELECT count(*) AS n, count(DISTINCT (_device, _epoch, _seq, _row)) AS d, "
            "count(DISTINCT _device) AS devices FROM watch"
        )
        assert found["devices"] == 2
        assert found["n"] == found["d"] > second_rows * 0.9
        assert found["n"] > first_rows * 0.9
        assert again.rows("SELECT * FROM gaps") == []


@pytest.mark.timeout(300)
def test_whatever_process_is_killed_comes_back_and_nothing_is_lost(tmp_path: Path) -> None:
    with Running(tmp_path / "data", *SMALL) as running:
        running.up()
        running.wait_for_rows("watch", 1_000)
        for words in ("watch-s01-l/agent.toml", "gateway.toml", "iotcore", "mini"):
            pid = running.child(words)
            os.kill(pid, signal.SIGKILL)
            wait_gone([pid])
            wait_until(lambda: len(running.children()) == 5, 60.0, f"what had {words} is back")
        running.wait_for_rows("watch", 15_000)
        assert running.interrupt() == 0
        assert set(running.lines[-1]["restarts"]) == {"device watch-s01-l", "gateway", "broker", "store"}
        assert check_embedded(running) > 15_000


@pytest.mark.timeout(200)
def test_children_do_not_outlive_a_killed_parent_and_the_next_start_is_whole(tmp_path: Path) -> None:
    with Running(tmp_path / "data", *SMALL) as running:
        running.up()
        running.wait_for_rows("watch", 1_000)
        children = list(running.children().values())
        running.kill()
        wait_gone(children)
    with Running(tmp_path / "data", *SMALL, "--for", "3") as again:
        again.up()
        assert again.end() == 0
        assert check_embedded(again) > 1_000


@pytest.mark.timeout(200)
def test_stacks_that_start_at_the_same_moment_do_not_meet(tmp_path: Path) -> None:
    """Their devices have the same names: at one broker they would throw each other out.

    Mutants tried: no turns (both claim the usual ports; one fails, or talks to the other's servers).
    """
    with Running(tmp_path / "a", *SMALL) as first, Running(tmp_path / "b", *SMALL) as second:
        one, other = first.up()["stack"], second.up()["stack"]
        assert one["broker"] != other["broker"]
        assert one["http"] != other["http"]
        assert one["lake"]["endpoint"] != other["lake"]["endpoint"]
        for running in (first, second):
            running.wait_for_rows("watch", 1_000)
            assert running.interrupt() == 0
            assert running.lines[-1]["restarts"] == {}
            assert check_embedded(running) > 1_000


@pytest.mark.timeout(200)
def test_a_port_that_was_asked_for_is_that_one_or_an_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        refused = headwater("up", "--data", str(tmp_path / "data"), "--port", str(port))
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"error: --port {port} is taken by ")
        assert f"(process {os.getpid()}); stop that, or choose another (0 takes a free one)" in refused.stderr
    wanted = free_port()
    with Running(tmp_path / "data", *SMALL, "--port", str(wanted), "--for", "1") as running:
        assert running.up()["stack"]["http"] == f"http://127.0.0.1:{wanted}"
        assert running.end() == 0


@pytest.mark.timeout(200)
def test_a_broker_and_a_lake_of_yours_and_synthetic_machines(tmp_path: Path, mosquitto: BrokerServer) -> None:
    lake = f"file://{tmp_path}/lake"
    options = ("--recordings", "synthetic", "--broker", mosquitto.url, "--lake", lake)
    with Running(tmp_path / "data", *SMALL, *options) as running:
        running.up()
        # The devices and the gateway, and no server.
        assert all(words.strip().endswith(("agent.toml", "gateway.toml")) for words in running.children())
        assert len(running.children()) == 3
        running.wait_for_rows("machine", 2_000)
        assert running.interrupt() == 0
        assert check_books(running.record(), StoreSettings(url=lake)) > 2_000
    opened = Lake(Store(StoreSettings(url=lake)))
    try:
        planned = plan_devices(UpOptions(data=tmp_path, devices=2, recordings="synthetic", speed=20.0), tmp_path)
        values = compare(opened.sql, planned, {}, moment(0))
    finally:
        opened.close()
    assert values.rows_compared > 2_000
    assert (values.rows_changed, values.streams_skipped) == (0, ())
    # The data folder's stack tells where the lake is, running or not.
    assert running.rows("SELECT count(*) > 2000 AS many FROM machine") == [{"many": True}]


@pytest.mark.timeout(200)
def test_a_file_is_replayed_by_every_device_and_by_simulate_replay(tmp_path: Path, mosquitto: BrokerServer) -> None:
    path, lake = tmp_path / "pump.csv", f"file://{tmp_path}/lake"
    lines = [f"{1_700_000_000_000 + n * 10};{n}.5;{'on' if n % 3 else 'off'}" for n in range(2_000)]
    path.write_text("t;pressure;valve\n" + "\n".join(lines) + "\n")
    options = ("--recordings", "synthetic", "--devices", "1", "--broker", mosquitto.url, "--lake", lake)
    with Running(tmp_path / "data", "up", *options) as running:
        running.up()
        (result,) = rows(
            *("simulate", "replay", str(path), "--device", "pump-7", "--stream", "pump", "--time-column", "t"),
            *("--delimiter", ";", "--time-format", "ms", "--speed", "0", "--keep-timestamps"),
            *("--data", str(running.data)),
        )
        assert result == {
            "device": "pump-7",
            "stream": "pump",
            "rows_accepted": 2_000,
            "rows_waiting": 0,
            "rows_dropped": 0,
        }
        found = running.rows("SELECT epoch_ms(ts) AS t, pressure, valve FROM pump ORDER BY t")
        assert [f"{row['t']};{row['pressure']};{row['valve']}" for row in found] == lines
        assert running.interrupt() == 0


def test_an_external_broker_or_store_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    port = free_port()
    silent = headwater("up", "--data", str(tmp_path / "a"), "--broker", f"mqtt://127.0.0.1:{port}", "--devices", "1")
    assert silent.returncode == 3
    assert f"mqtt://127.0.0.1:{port}" in silent.stderr
    endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true"}
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    storeless = headwater(
        "up", "--data", str(tmp_path / "b"), "--lake", "s3://bucket/lake", "--devices", "1", **endpoint, **keys
    )
    assert storeless.returncode == 3
    assert f"--lake s3://bucket/lake at http://127.0.0.1:{port}: " in storeless.stderr
    assert storeless.stderr.endswith("start the store, or name another\n")
    login = headwater("up", "--data", str(tmp_path / "c"), "--broker", f"mqtt://ann:secret@127.0.0.1:{port}")
    assert login.returncode == 2
    assert "no username" in login.stderr
    assert "secret" not in login.stderr
    assert "Traceback" not in silent.stderr + storeless.stderr


def test_ctrl_c_before_it_is_up_stops_what_was_started(tmp_path: Path) -> None:
    """Mutants tried: the first Ctrl-C heard only once everything has started."""
    program = tmp_path / "bin" / "mosquitto"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 600\n")  # a broker that never answers
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    options = ("--broker", "mosquitto", "--lake", f"file://{tmp_path}/lake")
    for command in ("up", "demo"):
        with Running(tmp_path / "data", command, "--devices", "1", "--no-models", *options, PATH=path) as running:
            wait_until(lambda: any(words.startswith("600") for words in running.children()), 30.0, "the broker")
            children = list(running.children().values())
            running.signal(signal.SIGINT)
            assert running.end(20.0) == 130, running.complaints
            assert running.lines == ([{"event": "stopped", "restarts": {}}] if command == "up" else [])
            assert "Traceback" not in running.complaints
            wait_gone(children)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with Running(tmp_path / "data", *SMALL) as running:
        running.up()
        children = list(running.children().values())
        devices = [pid for words, pid in running.children().items() if "agent.toml" in words]
        os.kill(running.child("gateway.toml"), signal.SIGSTOP)  # so that a clean stop would take long
        running.signal(signal.SIGINT)
        wait_gone(devices)
        running.signal(signal.SIGTERM)
        assert running.end() == 130
        wait_gone(children)
