"""What Headwater relies on in a broker, asked of each broker that a stack can start; and what it must not rely on.

The second half writes down where the embedded broker differs from the standard. Those tests say what it does, so that a
new version of it that behaves differently is noticed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
from pathlib import Path

import psutil
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from contract.limits import DEFAULT_LIMITS
from headwater.stack.broker import IotcoreSettings, MosquittoSettings
from headwater.stack.errors import NotReady
from headwater.stack.lifecycle import Policy
from headwater.stack.probes import MqttProbe
from simulators.faults.proxy import FaultProxy
from tests.integration.servers import (
    PATIENCE_S,
    BrokerServer,
    MqttClient,
    Servers,
    connect_properties,
    free_port,
    wait_until,
)

MIB = 1024 * 1024
END = b"end"


def watch(broker: BrokerServer, name: str, topic: str, **options: object) -> MqttClient:
    client = MqttClient(broker.url, name, **options)  # type: ignore[arg-type]
    client.subscribe(topic)
    return client


@pytest.mark.parametrize("mqtt5", [True, False])
def test_qos_1_messages_arrive_in_order_with_their_payload(any_broker: BrokerServer, mqtt5: bool) -> None:
    url, name = any_broker.url if mqtt5 else any_broker.url_mqtt311, f"order-{mqtt5}"
    with MqttClient(url, f"{name}-in", mqtt5=mqtt5) as reader, MqttClient(url, f"{name}-out", mqtt5=mqtt5) as writer:
        reader.subscribe(f"order/{mqtt5}")
        for number in range(200):
            writer.client.publish(f"order/{mqtt5}", number.to_bytes(2), qos=1)
        writer.publish(f"order/{mqtt5}", END)
        found = reader.receive_until(END)
    assert [message.payload for message in found[:-1]] == [number.to_bytes(2) for number in range(200)]
    assert {message.qos for message in found} == {1}


def test_the_largest_payload_of_the_protocol_arrives_whole(any_broker: BrokerServer) -> None:
    payload = os.urandom(DEFAULT_LIMITS.payload_bytes_max)
    with watch(any_broker, "large-in", "large/#") as reader, MqttClient(any_broker.url, "large-out") as writer:
        writer.publish("large/x", payload)
        assert reader.receive().payload == payload


def test_a_payload_beyond_the_limit_ends_the_connection_of_its_sender_only(any_broker: BrokerServer) -> None:
    with watch(any_broker, "huge-in", "huge/#") as reader, MqttClient(any_broker.url, "huge-fair") as fair:
        with MqttClient(any_broker.url, "huge-out") as writer:
            writer.client.publish("huge/x", bytes(DEFAULT_LIMITS.payload_bytes_max + MIB), qos=1)
            assert writer.disconnected.wait(PATIENCE_S)
        fair.publish("huge/y", b"fair")
        assert reader.receive().payload == b"fair"


def test_properties_of_mqtt_5_travel_along(any_broker: BrokerServer) -> None:
    sent = Properties(PacketTypes.PUBLISH)
    sent.UserProperty = [("kind", "test")]
    sent.ContentType = "application/x"
    sent.ResponseTopic = "back/here"
    sent.CorrelationData = b"\x01\x02"
    with watch(any_broker, "prop-in", "prop/#") as reader, MqttClient(any_broker.url, "prop-out") as writer:
        writer.publish("prop/x", b"1", properties=sent)
        got = reader.receive().properties
    assert got is not None
    assert got.UserProperty == [("kind", "test")]
    assert (got.ContentType, got.ResponseTopic, got.CorrelationData) == ("application/x", "back/here", b"\x01\x02")


@pytest.mark.parametrize("mqtt5", [True, False])
def test_a_retained_message_meets_whoever_subscribes_later_until_it_is_cleared(
    any_broker: BrokerServer, mqtt5: bool
) -> None:
    """An ack, a presence and a desired state reach a device that was away."""
    url, topic = any_broker.url if mqtt5 else any_broker.url_mqtt311, f"kept/{mqtt5}/d1"
    with MqttClient(url, f"kept-out-{mqtt5}", mqtt5=mqtt5) as writer:
        writer.publish(topic, b"old", retain=True)
        writer.publish(topic, b"new", retain=True)
    for name in (f"kept-in-{mqtt5}", f"kept-again-{mqtt5}"):
        with MqttClient(url, name, mqtt5=mqtt5) as reader:
            reader.subscribe(topic)
            message = reader.receive()
            assert (message.payload, message.retain) == (b"new", True)
    with (
        MqttClient(url, f"kept-once-more-{mqtt5}", mqtt5=mqtt5) as writer,
        MqttClient(url, f"kept-live-{mqtt5}", mqtt5=mqtt5) as reader,
    ):
        reader.subscribe(topic)
        assert reader.receive().retain
        writer.publish(topic, b"live", retain=True)
        message = reader.receive()
        assert (message.payload, message.retain) == (b"live", False), "live messages do not look retained"
        writer.publish(topic, b"", retain=True)
        assert reader.receive().payload == b""
        with MqttClient(url, f"kept-late-{mqtt5}", mqtt5=mqtt5) as late:
            late.subscribe(topic)
            writer.publish(topic, END)
            assert [message.payload for message in late.receive_until(END)] == [END]


WILL = {"topic": "will/d1", "payload": b"gone", "qos": 1, "retain": True}


def test_the_last_will_of_a_device_that_vanished_is_delivered_and_retained(any_broker: BrokerServer) -> None:
    with watch(any_broker, "will-in", "will/+") as reader:
        device = MqttClient(any_broker.url, "will-d1", will=WILL)
        device.publish("will/d1", b"here", retain=True)
        assert reader.receive().payload == b"here"
        device.vanish()
        assert reader.receive().payload == b"gone"
    with watch(any_broker, "will-late", "will/d1") as late:
        assert late.receive().payload == b"gone"


def test_a_device_that_says_goodbye_leaves_no_will(any_broker: BrokerServer) -> None:
    will = {**WILL, "topic": "bye/d1"}
    with watch(any_broker, "bye-in", "bye/+") as reader:
        device = MqttClient(any_broker.url, "bye-d1", will=will)
        device.publish("bye/d1", b"here", retain=True)
        device.close()
        with MqttClient(any_broker.url, "bye-out") as writer:
            writer.publish("bye/d2", END)
        assert [message.payload for message in reader.receive_until(END)] == [b"here", END]


def test_a_silent_connection_is_ended_after_its_keepalive_and_its_will_delivered(any_broker: BrokerServer) -> None:
    with watch(any_broker, "mute-in", "mute/+") as reader, FaultProxy(any_broker.port) as proxy:
        will = {**WILL, "topic": "mute/d1"}
        device = MqttClient(f"mqtt://{proxy.address}", "mute-d1", will=will, keepalive=2)
        proxy.stall()
        assert reader.receive().payload == b"gone"
        device.client.loop_stop()


def test_the_same_client_id_again_takes_over_the_session(any_broker: BrokerServer) -> None:
    """Two boards with one id push each other out; the newer one works."""
    first = MqttClient(any_broker.url, "twin")
    with watch(any_broker, "twin", "twin/#") as second:
        assert first.disconnected.wait(PATIENCE_S)
        second.publish("twin/x", b"mine")
        assert second.receive().payload == b"mine"
    first.client.loop_stop()


def test_a_persistent_session_gets_what_came_while_it_was_away(any_broker: BrokerServer) -> None:
    options = {"clean_start": False, "properties": connect_properties(SessionExpiryInterval=300)}
    watch(any_broker, "away-in", "away/#", **options).close()
    with MqttClient(any_broker.url, "away-out") as writer:
        for number in range(5):
            writer.publish("away/x", str(number).encode())
        writer.publish("away/x", END)
    with MqttClient(any_broker.url, "away-in", **options) as reader:  # type: ignore[arg-type]
        assert reader.session_present
        assert [message.payload for message in reader.receive_until(END)] == [b"0", b"1", b"2", b"3", b"4", END]
    # A clean start ends the session; it would collect messages for ever.
    MqttClient(any_broker.url, "away-in").close()


def test_what_was_not_acknowledged_by_hand_comes_again(any_broker: BrokerServer) -> None:
    """At-least-once for foreign devices: PUBACK after the commit, the rest comes again at the next connection."""
    options = {
        "manual_ack": True,
        "clean_start": False,
        "properties": connect_properties(SessionExpiryInterval=300, ReceiveMaximum=50),
    }
    with MqttClient(any_broker.url, "hand-out") as writer:
        reader = watch(any_broker, "hand-in", "hand/#", **options)
        for number in range(6):
            writer.publish("hand/x", str(number).encode())
        found = [reader.receive() for _ in range(6)]
        for message in found[:2]:
            reader.client.ack(message.mid, message.qos)
        # Acknowledgements leave in order: once the broker answered this, it has read them.
        reader.publish("other/x", b"")
        reader.vanish()
    with MqttClient(any_broker.url, "hand-in", **options) as reader:  # type: ignore[arg-type]
        again = [reader.receive() for _ in range(4)]
        assert [message.payload for message in again] == [b"2", b"3", b"4", b"5"]
        for message in again:
            reader.client.ack(message.mid, message.qos)
        reader.publish("other/x", b"")
    MqttClient(any_broker.url, "hand-in").close()


def test_shared_subscriptions_divide_the_messages(any_broker: BrokerServer) -> None:
    with MqttClient(any_broker.url, "share-out") as writer:
        readers = [watch(any_broker, f"share-{name}", "$share/g/share/#") for name in "ab"]
        for number in range(40):
            writer.publish(f"share/{number}", str(number).encode())
        wait_until(lambda: sum(r.messages.qsize() for r in readers) >= 40, PATIENCE_S, "forty messages")
        counts = [reader.messages.qsize() for reader in readers]
        payloads = {
            reader.receive().payload for reader, count in zip(readers, counts, strict=True) for _ in range(count)
        }
        assert sum(counts) == len(payloads) == 40
        assert min(counts) > 0
        for reader in readers:
            reader.close()


@pytest.mark.parametrize("kind", ["iotcore", "mosquitto"])
def test_a_broker_that_is_killed_is_back_on_its_port_and_serves(servers: Servers, kind: str) -> None:
    broker = servers.broker(kind)
    url, first = broker.url, broker.pid
    for _ in range(3):
        broker.kill()
        with MqttClient(url, "again") as client:
            client.subscribe("again/#")
            client.publish("again/x", b"1")
            assert client.receive().payload == b"1"
    assert broker.pid != first


@pytest.mark.parametrize("kind", ["iotcore", "mosquitto"])
def test_a_broker_keeps_nothing_over_its_death_and_nothing_relies_on_that(servers: Servers, kind: str) -> None:
    """Whoever publishes retained messages publishes them again after every connection that follows a lost one."""
    broker = servers.broker(kind)
    with MqttClient(broker.url, "out") as writer:
        writer.publish("kept/x", b"1", retain=True)
    broker.kill()
    with MqttClient(broker.url, "out") as writer, watch(broker, "in", "kept/#") as reader:
        writer.publish("kept/y", END)
        assert [message.payload for message in reader.receive_until(END)] == [END]


def test_durable_mosquitto_keeps_retained_and_queued_messages_over_its_death(servers: Servers) -> None:
    """A PUBACK is up to 0.1 s ahead of the file, and a kill in between loses the message: so the test looks there."""
    broker = servers.mosquitto(settings=MosquittoSettings(durable=True))
    options = {"clean_start": False, "properties": connect_properties(SessionExpiryInterval=300)}
    watch(broker, "away", "q/#", **options).close()
    with MqttClient(broker.url, "out") as writer:
        writer.publish("kept/x", b"1", retain=True)
        writer.publish("q/x", b"2")
        writer.publish("q/x", b"the last one")
    database = servers.folder / "mosquitto" / "mosquitto.db"
    wait_until(lambda: b"the last one" in database.read_bytes(), PATIENCE_S, "the last message is saved")
    broker.kill()
    with watch(broker, "in", "kept/#") as reader:
        assert reader.receive().payload == b"1"
    with MqttClient(broker.url, "away", **options) as reader:  # type: ignore[arg-type]
        assert [message.payload for message in reader.receive_until(b"the last one")] == [b"2", b"the last one"]


@pytest.mark.parametrize("kind", ["iotcore", "mosquitto"])
def test_only_loopback_is_listened_on(servers: Servers, kind: str) -> None:
    broker = servers.broker(kind)
    listening = [c.laddr for c in psutil.Process(broker.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert broker.port in {address.port for address in listening}


@pytest.mark.parametrize("kind", ["iotcore", "mosquitto"])
def test_memory_stays_bounded_behind_a_reader_that_does_not_read(servers: Servers, kind: str) -> None:
    """Messages are dropped, which the uplink repairs; others are served meanwhile.

    Mutants tried: mosquitto with `max_inflight_bytes 0`, and iotcore with segments of 100 MiB, both exceed the bound.
    """
    broker = servers.broker(kind)
    stuck = watch(broker, "stuck", "up/#", properties=connect_properties(ReceiveMaximum=1000))
    stuck.client.loop_stop()
    with MqttClient(broker.url, "out") as writer, watch(broker, "other", "ack/#") as other:
        for _ in range(600):
            writer.publish("up/x", bytes(MIB))
        writer.publish("ack/x", b"1")
        assert other.receive().payload == b"1"
        assert psutil.Process(broker.pid).memory_info().rss < 400 * MIB


def test_mosquitto_with_passwords_is_asked_with_the_right_one(servers: Servers, tmp_path: Path) -> None:
    passwords, acl = tmp_path / "passwords", tmp_path / "acl"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "stack", "secret"], check=True, timeout=PATIENCE_S)
    acl.write_text("user stack\ntopic readwrite headwater/probe/#\n")
    settings = MosquittoSettings(password_file=passwords, acl_file=acl, username="stack", password="secret")
    broker = servers.mosquitto("closed", settings)
    for wrong in (None, "wrong"):
        with pytest.raises(NotReady, match="CONNACK: Not authorized"):
            MqttProbe(host="127.0.0.1", port=broker.port, username="stack", password=wrong)()


def test_a_broker_that_delivers_nothing_is_not_ready(servers: Servers, tmp_path: Path) -> None:
    """mosquitto answers "granted" to a subscription that its ACL forbids; only the message tells."""
    passwords, acl = tmp_path / "passwords", tmp_path / "acl"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "stack", "secret"], check=True, timeout=PATIENCE_S)
    acl.write_text("user stack\ntopic readwrite headwater/probe/#\n")
    settings = MosquittoSettings(password_file=passwords, acl_file=acl, username="stack", password="secret")
    broker = servers.mosquitto("closed", settings)
    acl.write_text("user stack\ntopic readwrite elsewhere/#\n")
    os.kill(broker.pid, signal.SIGHUP)

    def forbidden() -> bool:
        probe = MqttProbe(
            host="127.0.0.1", port=broker.port, username="stack", password="secret", mqtt5=False, timeout_s=1.0
        )
        try:
            probe()
        except NotReady:
            return True
        return False

    wait_until(forbidden, PATIENCE_S, "the probe notices that nothing comes back")


def test_a_port_where_nobody_or_somebody_else_answers_is_not_ready() -> None:
    with pytest.raises(OSError, match="refused"):
        MqttProbe(host="127.0.0.1", port=free_port())()
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(NotReady, match="CONNACK"):
        MqttProbe(host="127.0.0.1", port=mute.getsockname()[1], timeout_s=0.5)()


# Where the embedded broker differs from the standard.


@pytest.mark.parametrize(("retain", "subscribed"), [(False, True), (True, False)], ids=["to a subscriber", "retained"])
def test_iotcore_dies_of_a_topic_that_begins_with_a_foreign_letter_and_is_started_again(
    servers: Servers, retain: bool, subscribed: bool
) -> None:
    """Its router thread panics and the process lives on, serving nobody. The words on its output give it away."""
    broker = servers.iotcore()
    before = broker.status.restarts_total
    with contextlib.ExitStack() as stack:
        if subscribed:
            stack.enter_context(watch(broker, "in", "#"))
        writer = stack.enter_context(MqttClient(broker.url, "out"))
        writer.client.publish("ü/x", b"1", qos=1, retain=retain)
        broker.wait_restarted(before)
    assert b"panicked at" in broker.log.read_bytes()
    with watch(broker, "in", "#") as reader:
        reader.publish("hw/ü", b"fine")
        assert reader.receive().payload == b"fine"


def test_iotcore_that_hangs_without_a_word_is_found_and_started_again(servers: Servers) -> None:
    policy = Policy(alive_interval_s=0.2, alive_failures_max=3)
    broker = servers.iotcore(policy=policy)
    # The same broker on the same port again, asked by a probe with less patience.
    probe = MqttProbe(host="127.0.0.1", port=broker.port, timeout_s=1.0)
    broker.stop()
    broker = servers.iotcore(policy=policy, ready=probe)
    before, pid = broker.status.restarts_total, broker.pid
    os.kill(pid, signal.SIGSTOP)
    broker.wait_restarted(before)
    assert broker.status.last_exit == "SIGKILL"


def test_iotcore_gives_a_wildcard_subscription_at_most_100_retained_messages(iotcore: BrokerServer) -> None:
    """So a gateway must not learn about its devices from retained presence alone."""
    with MqttClient(iotcore.url, "crowd-out") as writer:
        for number in range(150):
            writer.publish(f"crowd/{number}", b"1", retain=True)
        with watch(iotcore, "crowd-in", "crowd/+") as reader:
            writer.publish("crowd/end", END)
            assert len(reader.receive_until(END)) == 101
        with MqttClient(iotcore.url, "crowd-one-by-one") as reader:
            for number in range(150):
                reader.subscribe(f"crowd/{number}")
            assert len([reader.receive() for _ in range(150)]) == 150


def test_iotcore_repeats_retained_messages_only_to_a_new_subscription(iotcore: BrokerServer) -> None:
    """A device with a persistent session sees what it missed, not what is retained: so agents start clean."""
    with watch(iotcore, "repeat-in", "repeat/x") as reader:
        reader.publish("repeat/x", b"1", retain=True)
        assert reader.receive().payload == b"1"
        reader.subscribe("repeat/x")
        reader.publish("repeat/x", END)
        assert [message.payload for message in reader.receive_until(END)] == [END]


def test_iotcore_does_not_keep_to_receive_maximum(iotcore: BrokerServer) -> None:
    """Nor does mosquitto 2.0.11 after the first PUBACK: a gateway has to bound itself."""
    options = {"manual_ack": True, "properties": connect_properties(ReceiveMaximum=10)}
    with watch(iotcore, "rm-in", "rm/#", **options) as reader, MqttClient(iotcore.url, "rm-out") as writer:
        for _ in range(60):
            writer.publish("rm/x", b"1")
        wait_until(lambda: reader.messages.qsize() > 10, PATIENCE_S, "more than ten at once")


def test_iotcore_refuses_keepalive_0_without_a_word(iotcore: BrokerServer) -> None:
    head = b"\x00\x04MQTT\x05\x02" + struct.pack(">H", 0) + b"\x00" + b"\x00\x01k"
    with socket.create_connection(("127.0.0.1", iotcore.port), timeout=PATIENCE_S) as connection:
        connection.sendall(bytes([0x10, len(head)]) + head)
        assert connection.recv(10) == b""


def test_iotcore_reader_that_falls_behind_misses_messages_without_a_sign(servers: Servers) -> None:
    """Order is kept, so what is missing shows as a hole in the sequence, and the gateway asks for it again."""
    broker = servers.iotcore(settings=IotcoreSettings(segment_bytes_max=MIB, segments_max=2))
    reader = watch(broker, "slow", "up/#")
    reader.client.loop_stop()
    with MqttClient(broker.url, "out") as writer:
        for number in range(400):
            writer.publish("up/x", struct.pack(">I", number) + bytes(MIB // 4))
        reader.client.loop_start()
        writer.publish("up/x", END)
        numbers = [struct.unpack(">I", message.payload[:4])[0] for message in reader.receive_until(END)[:-1]]
    reader.close()
    assert numbers == sorted(set(numbers))
    assert len(numbers) < 400


def test_iotcore_dies_of_a_packet_that_only_brokers_send_and_is_started_again(servers: Servers) -> None:
    """Found by flipping bytes: a CONNACK from a client makes the listener's thread panic."""
    broker = servers.iotcore()
    before = broker.status.restarts_total
    with socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_S) as raw:
        raw.sendall(b"\x10\x0f\x00\x04MQTT\x05\x02\x00<\x00\x00\x02fz" + b"#\n\x00\x01\x00\x00\x04fz/#\x01")
        broker.wait_restarted(before)
    with watch(broker, "in", "fz/#") as reader:
        reader.publish("fz/x", b"fine")
        assert reader.receive().payload == b"fine"
