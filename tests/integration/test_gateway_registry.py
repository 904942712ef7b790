"""The register of devices over a real broker and lake: presence, reports, desired documents, a broker that forgets."""

from __future__ import annotations

import json

from contract import topics
from contract.messages import Desired, DesiredStream, Presence, Reported, ReportedStream, decode, encode
from tests.integration.gateway_parts import BOOT, Devices, GatewayProcess, Lake, s3_environ, s3_lake
from tests.integration.servers import PATIENCE_S, MqttClient, wait_until


def presence(online: bool = True, reason: str = "started") -> bytes:
    return encode(Presence(online=online, reason=reason, at_us=1, agent="test/1", boot=BOOT))


def report(revision: int = 0) -> bytes:
    stream = ReportedStream(
        enabled=True,
        rate_hz=10.0,
        max_batch_rows=500,
        max_batch_age_s=5.0,
        readings=7,
        overruns=0,
        waiting_batches=1,
        waiting_rows=2,
        waiting_bytes=3,
        evicted_rows=0,
    )
    return encode(
        Reported(
            revision=revision,
            agent="test/1",
            boot=BOOT,
            clock_synced=True,
            started_at_us=1,
            streams={"vibration": stream},
        )
    )


def events(lake: Lake, device: str) -> list[str]:
    table = lake.read("control/devices")
    rows = [] if table is None else [row for row in table.to_pylist() if row["device"] == device]
    return [row["event"] for row in sorted(rows, key=lambda row: (row["at"], row["event"]))]


def test_a_device_is_known_by_what_it_says_and_by_what_it_sends(any_broker, tmp_path):
    lake = Lake.local(tmp_path / "lake")
    name = f"known-{any_broker.name}"
    will = {"topic": topics.status(name), "payload": presence(False, "lost"), "qos": 1, "retain": True}
    with GatewayProcess(tmp_path, any_broker.url, {"url": f"file://{tmp_path}/lake"}) as gateway:
        assert gateway.get(f"/v1/devices/{name}")[0] == 404
        device = MqttClient(any_broker.url, name, will=will)
        device.publish(topics.status(name), presence(), retain=True)
        device.publish(topics.reported(name), report(), retain=True)
        found = wait_until(
            lambda: (answer := gateway.get(f"/v1/devices/{name}")[1]).get("reported") and answer, PATIENCE_S, "reported"
        )
        assert found["online"] is True
        assert found["agent"] == "test/1"
        assert found["reported"]["streams"]["vibration"]["readings"] == 7
        with Devices(any_broker.url, [name]) as sending:
            sending.append_all(3)
            sending.wait_drained()
            [mark] = gateway.get(f"/v1/devices/{name}")[1]["watermarks"]
            assert (mark["stream"], mark["seq"]) == ("vibration", 3)
        device.vanish()
        wait_until(lambda: gateway.get(f"/v1/devices/{name}")[1]["online"] is False, PATIENCE_S, "the will is heard")
        wait_until(
            lambda: events(lake, name) == ["first_seen", "online", "offline"], PATIENCE_S, f"rows: {events(lake, name)}"
        )
        listed = gateway.get("/v1/devices?limit=10000")[1]["devices"]
        assert name in [each["device"] for each in listed]
        # A restart learns nothing new from what the broker had retained.
        assert gateway.stop() == 0
        gateway.start()
        wait_until(lambda: gateway.get(f"/v1/devices/{name}")[0] == 200, PATIENCE_S, "it is known again")
        assert gateway.get(f"/v1/devices/{name}")[1]["online"] is False
        assert gateway.stop() == 0
        assert events(lake, name) == ["first_seen", "online", "offline"]


def test_a_desired_document_reaches_its_device_and_survives_broker_and_gateway(servers, tmp_path):
    broker = servers.iotcore()  # forgets all that was retained
    with GatewayProcess(tmp_path, broker.url, {"url": f"file://{tmp_path}/lake"}) as gateway:
        with MqttClient(broker.url, "told-1") as device:
            device.subscribe(topics.desired("told-1"))
            status, found = gateway.put("/v1/devices/told-1/desired", {"streams": {"vibration": {"rate_hz": 50}}})
            assert (status, found["revision"]) == (202, 1)
            message = device.receive()
            assert decode(message.payload, Desired) == Desired(
                revision=1, streams={"vibration": DesiredStream(rate_hz=50)}
            )
        broker.kill()
        with MqttClient(broker.url, "told-1") as device:
            device.subscribe(topics.desired("told-1"))
            assert decode(device.receive().payload, Desired).revision == 1
        gateway.kill()
        gateway.start()
        status, found = gateway.put("/v1/devices/told-1/desired", {"streams": {}, "replaces": 1})
        assert (status, found["revision"]) == (202, 2)
        status, found = gateway.put("/v1/devices/told-1/desired", {"streams": {}, "replaces": 1})
        assert (status, found["error"]["code"]) == (409, "conflict")


def test_gateways_share_one_register(mosquitto, object_store, tmp_path):
    lake, environ = s3_lake(object_store.access, "register"), s3_environ(object_store.access)
    with (
        GatewayProcess(tmp_path, mosquitto.url, lake, name="one", environ=environ, replica="0/2") as one,
        GatewayProcess(tmp_path, mosquitto.url, lake, name="two", environ=environ, replica="1/2") as two,
    ):
        for number in range(6):
            name = f"shared-register-{number}"
            gateway = (one, two)[number % 2]
            assert gateway.put(f"/v1/devices/{name}/desired", {"streams": {}})[0] == 202
        for gateway in (one, two):
            for number in range(6):
                path = f"/v1/devices/shared-register-{number}"
                wait_until(
                    lambda gateway=gateway, path=path: (gateway.get(path)[1] or {}).get("desired_revision") == 1,
                    PATIENCE_S,
                    "both know it",
                )
        answers = [one.put("/v1/devices/shared-register-0/desired", {"streams": {}, "replaces": 1})]
        answers.append(two.put("/v1/devices/shared-register-0/desired", {"streams": {}, "replaces": 1}))
        assert sorted(status for status, _ in answers) == [202, 409]


def test_documents_that_are_none_are_counted_and_disturb_nobody(mosquitto, tmp_path):
    with (
        GatewayProcess(tmp_path, mosquitto.url, {"url": f"file://{tmp_path}/lake"}) as gateway,
        MqttClient(mosquitto.url, "rude-1") as device,
    ):
        before = gateway.metrics()
        for junk in (b"junk", b"{}", b"\xff\xfe", json.dumps({"v": 9}).encode(), b"[" * 5_000, b"x" * 300_000):
            device.publish(topics.status("rude-1"), junk, qos=1)
            device.publish(topics.reported("rude-1"), junk, qos=1)
        device.publish("hw/v1/status/Not A Name", presence(), qos=1)
        device.publish(topics.status("rude-2"), presence(), qos=1)
        wait_until(lambda: gateway.get("/v1/devices/rude-2")[0] == 200, PATIENCE_S, "the good one is known")
        after = gateway.metrics()
        refused = 'documents_refused_total{kind="%s"}'
        assert after[refused % "status"] - before.get(refused % "status", 0) == 7
        assert after[refused % "reported"] - before.get(refused % "reported", 0) == 6
        assert gateway.get("/v1/devices/rude-1")[0] == 404
        assert not [name for name, count in after.items() if name.startswith("faults_total") and count]
        assert gateway.get("/readyz")[0] == 200
