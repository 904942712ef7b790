"""The doctor finds what is wrong with real servers, says what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from contract.limits import DEFAULT_LIMITS
from headwater.checks import host
from headwater.checks.broker import BrokerLogin, check_broker
from headwater.checks.findings import Finding, Verdict
from headwater.checks.store import check_store
from headwater.doctor import examine, verdict_of
from headwater.lake_access import store_settings
from headwater.place import DevicePlace, LakePlace, StackRecord, record_path
from headwater.stack.broker import MosquittoSettings
from headwater.stack.folder import DataFolder
from lake.store import StoreSettings
from tests.integration.servers import BrokerServer, MqttClient, Servers, StoreServer, free_port, wait_until
from tests.integration.stacks import Running, headwater


def verdicts(findings: list[Finding]) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in findings}


def bad(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.verdict is Verdict.FAILED}


def test_a_good_broker_passes_and_keeps_nothing_of_the_examination(any_broker: BrokerServer) -> None:
    findings = check_broker(BrokerLogin(url=any_broker.url))
    assert bad(findings) == {}
    assert {"broker.qos1", "broker.retained", "broker.payload", "broker.client_id"} <= set(verdicts(findings))
    with MqttClient(any_broker.url, "after-the-doctor") as reader:
        reader.subscribe("hw/v1/doctor/#")
        reader.publish("hw/v1/doctor/end", b"end")
        assert [message.payload for message in reader.receive_until(b"end")] == [b"end"]


def test_a_broker_that_takes_too_little_is_told(servers: Servers) -> None:
    small = servers.mosquitto(settings=MosquittoSettings(payload_bytes_max=1024 * 1024))
    found = bad(check_broker(BrokerLogin(url=small.url)))
    assert set(found) == {"broker.payload"}
    assert f"{DEFAULT_LIMITS.payload_bytes_max:,}" in found["broker.payload"].detail
    assert "max_packet_size" in found["broker.payload"].remedy


def test_a_broker_that_is_not_there_is_told(tmp_path: Path) -> None:
    port = free_port()
    done = headwater("doctor", "--broker", f"mqtt://127.0.0.1:{port}", "--data", str(tmp_path), "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["verdict"] == "failed"
    (finding,) = [one for one in report["findings"] if one["check"] == "broker.connect"]
    assert finding["verdict"] == "failed"
    assert "--broker" in finding["remedy"]
    text = headwater("doctor", "--broker", f"mqtt://127.0.0.1:{port}", "--data", str(tmp_path))
    assert text.returncode == 1
    assert finding["remedy"] in text.stdout.replace("\n", " ")


def test_a_good_store_passes_and_a_wrong_key_is_told(object_store: StoreServer, tmp_path: Path) -> None:
    good = store_settings(object_store.access)
    assert bad(check_store(good)) == {}
    wrong = msgspec.structs.replace(good, secret_key="wrong", timeout_s=5.0)
    found = bad(check_store(wrong))
    assert set(found) == {"store.put_get"}
    folder = check_store(StoreSettings(url=f"file://{tmp_path}/lake"))
    assert bad(folder) == {}
    assert list((tmp_path / "lake").iterdir()) == []
    assert [path for path in (tmp_path / "lake").rglob("*") if path.is_file()] == []


def test_a_store_that_is_not_there_is_told() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    keys = {"access_key": "a", "secret_key": "b"}
    away = StoreSettings(url="s3://b/lake", endpoint=endpoint, **keys, allow_http=True, timeout_s=2.0)
    findings = check_store(away)
    assert set(bad(findings)) == {"store.put_get"}
    assert "AWS_" in bad(findings)["store.put_get"].remedy
    # Its clock is none of the reasons, and setting it no remedy.
    assert verdicts(findings)["store.clock"] is Verdict.SKIPPED


def test_a_stopped_stack_is_told_to_be_started(tmp_path: Path) -> None:
    """Mutants tried: the remedies of a broker and a store of one's own."""
    port = free_port()
    place = LakePlace(url="s3://headwater/lake", endpoint=f"http://127.0.0.1:{port}", embedded=True)
    record = StackRecord(
        pid=1,
        broker=f"mqtt://127.0.0.1:{port}",
        broker_kind="iotcore",
        lake=place,
        http="http://127.0.0.1:8080",
        devices=(),
        logs=str(tmp_path),
    )
    record_path(tmp_path).write_bytes(msgspec.json.encode(record))
    asked = {"broker": None, "lake": None, "data": str(tmp_path), "environment": {}}
    login = {"username": None, "password_file": None, "ca_file": None}

    def remedies() -> dict[str, str]:
        found = bad(examine(**asked, **login))  # type: ignore[arg-type]
        return {name: finding.remedy for name, finding in found.items()}

    start = f"the stack over {tmp_path} is stopped; start it: headwater up --data {tmp_path}"
    assert remedies() == {"broker.connect": start, "store.put_get": start}
    with DataFolder(tmp_path):
        found = remedies()
    assert f"{tmp_path}/logs/broker.log" in found["broker.connect"]
    assert f"{tmp_path}/logs/store.log" in found["store.put_get"]


def test_what_asks_a_stopped_stack_says_that_it_is_stopped(tmp_path: Path) -> None:
    """Mutants tried: only that nobody answers, once for each device."""
    device = DevicePlace(name="d", config="none", socket=str(tmp_path / "d.sock"), buffer="none")
    record = StackRecord(
        pid=1,
        broker=f"mqtt://127.0.0.1:{free_port()}",
        broker_kind="iotcore",
        lake=LakePlace(url="s3://headwater/lake", embedded=True),
        http="http://127.0.0.1:8080",
        devices=(device, device),
        logs=str(tmp_path),
    )
    record_path(tmp_path).write_bytes(msgspec.json.encode(record))
    stopped = f"the stack over {tmp_path} is stopped; start it: headwater up --data {tmp_path}\n"
    status = headwater("agent", "status", "--data", str(tmp_path))
    assert (status.returncode, status.stdout, status.stderr) == (3, "", f"error: {stopped}")
    swarm = headwater("simulate", "swarm", "--devices", "1", "--rate", "1", "--data", str(tmp_path))
    assert (swarm.returncode, swarm.stdout) == (3, "")
    assert swarm.stderr.startswith(f"note: {stopped}error: ")
    with DataFolder(tmp_path):
        status = headwater("agent", "status", "--data", str(tmp_path))
    assert (status.returncode, status.stderr.count("no agent answers on")) == (3, 2)


@pytest.mark.timeout(200)
def test_a_running_stack_of_which_parts_hang_is_told_by_part_and_log(tmp_path: Path, mosquitto: BrokerServer) -> None:
    """Mutants tried: the devices not asked; a reading that fails taken for one that is well."""
    data = tmp_path / "data"
    broken = tmp_path / "pump.csv"
    broken.write_text("ts,pressure\n2026-01-01T00:00:00,1\n2026-01-01T00:00:01,2\n")
    options = ("--devices", "2", "--recordings", str(broken), "--no-models", "--lake", f"file://{tmp_path}/lake")
    with Running(data, "up", *options, "--broker", mosquitto.url) as running:
        running.up()

        def findings() -> dict[str, dict[str, str]]:
            report = json.loads(headwater("doctor", "--data", str(data), "--json").stdout)
            return {one["check"]: one for one in report["findings"] if one["check"].startswith("stack.")}

        def well() -> bool:
            return {one["verdict"] for one in findings().values()} == {"ok"}

        wait_until(well, 30.0, "both devices are connected")
        assert findings()["stack.devices"]["detail"] == "all 2 answer, measure and are connected"
        gateway, device = running.child("gateway.toml"), running.child("replay-002/agent.toml")
        os.kill(gateway, signal.SIGSTOP)
        os.kill(device, signal.SIGSTOP)
        found = findings()
        assert {name: one["verdict"] for name, one in found.items()} == {
            "stack.gateway": "failed",
            "stack.devices": "failed",
        }
        assert f"{data}/logs/gateway.log" in found["stack.gateway"]["remedy"]
        assert found["stack.devices"]["detail"] == "no answer from replay-002"
        assert found["stack.devices"]["remedy"] == f"see why: {data}/logs/replay-002.log"
        os.kill(gateway, signal.SIGCONT)
        os.kill(device, signal.SIGCONT)
        # The recording is played in a loop: at its next beginning it is no recording any more.
        broken.write_text("ts,pressure\nsoon,1\n")

        def stuck() -> bool:
            return "pressure" not in findings()["stack.devices"]["detail"] and "soon" in str(findings())

        wait_until(stuck, 30.0, "the devices cannot read it any more")
        assert findings()["stack.devices"]["verdict"] == "failed"
        running.interrupt()


def test_a_damaged_record_is_a_finding_and_hides_nothing(tmp_path: Path) -> None:
    """Mutants tried: the error raised, as it was."""
    record_path(tmp_path).write_text("{")
    done = headwater("doctor", "--data", str(tmp_path), "--json")
    found = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert (done.returncode, found["stack.record"]["verdict"]) == (1, "failed")
    assert found["stack.record"]["remedy"] == f"start it once more: headwater up --data {tmp_path}"
    assert (found["broker"]["verdict"], found["store"]["verdict"]) == ("skipped", "skipped")
    assert "cannot be read" in found["store"]["detail"]
    assert found["host.python"]["verdict"] == "ok"


def test_nothing_to_look_at_is_said_and_is_no_failure(tmp_path: Path) -> None:
    findings = examine(
        broker=None, lake=None, data=str(tmp_path), username=None, password_file=None, ca_file=None, environment={}
    )
    found = verdicts(findings)
    assert (found["broker"], found["store"]) == (Verdict.SKIPPED, Verdict.SKIPPED)
    assert verdict_of(findings) in (Verdict.OK, Verdict.WARNING)


def test_extensions_of_another_version_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"duckdb": "1.5.5", "duckdb-extension-delta": "1.5.4", "duckdb-extension-httpfs": "1.5.5"}
    monkeypatch.setattr(host, "version", versions.__getitem__)
    finding = host.check_duckdb()
    assert finding.verdict is Verdict.FAILED
    assert "duckdb-extension-delta 1.5.4" in finding.detail
    assert "duckdb-extension-delta==1.5.5" in finding.remedy


def test_a_full_or_closed_folder_and_few_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DISK_FREE_BYTES_MIN", 2**60)
    assert host.check_disk(tmp_path / "not" / "made").verdict is Verdict.WARNING
    monkeypatch.setattr(host.os, "access", lambda path, mode: False)
    assert host.check_disk(tmp_path).verdict is Verdict.FAILED
    monkeypatch.setattr(host.resource, "getrlimit", lambda which: (256, 4096))
    assert "ulimit -n" in host.check_open_files().remedy
