"""The gateway's connections to real brokers: they come back after every loss, say why they are away, and never wait.

What both kinds promise is asked of both: paho's (`Session`), and the one that only listens (`Intake`).

Mutants tried, each found here: not asking for the subscriptions again after a reconnect; reading the password once;
leaving before the broker has what was handed over; a handler's error that ends the thread. Of `Intake`: no ping;
silence of the broker not noticed; the acknowledgement of a message forgotten; a buffer that does not grow.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mqtt5
import pytest
from structlog.testing import capture_logs

from gateway.intake import READ_BYTES, Intake
from gateway.mqtt import UNACKED_MAX, Link
from gateway.session import Session
from gateway.settings import BrokerSettings
from headwater.stack.broker import MosquittoSettings, MosquittoTls
from simulators.faults.proxy import FaultProxy
from tests.integration.servers import PATIENCE_S, MqttClient, wait_until
from tests.unit.gateway_parts import fresh_metrics, value


@pytest.fixture(autouse=True)
def logs():
    with capture_logs() as found:
        yield found


BOTH = pytest.mark.parametrize("connect", [Session, Intake])


class Connected:
    """A link with its ends in lists."""

    def __init__(self, url: str, filters: tuple[str, ...] = (), connect=Session, **settings) -> None:
        self.metrics = fresh_metrics()
        self.messages: list[tuple[str, bytes]] = []
        self.ready = 0
        broker = BrokerSettings(url=url, **{"reconnect_base_s": 0.05, "reconnect_max_s": 0.2, **settings})
        rng = random.Random(1)
        self.link = Link(connect, broker, "test", 0, filters, self.received, self.became_ready, self.metrics, rng)

    def received(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))

    def became_ready(self) -> None:
        self.ready += 1

    def wait(self, times: int = 1) -> None:
        wait_until(lambda: self.ready >= times and self.link.connected, PATIENCE_S, f"connected: {self.link.trouble}")

    def wait_trouble(self, words: str) -> str:
        return wait_until(
            lambda: words in (text := self.link.trouble) and text, PATIENCE_S, f"{words!r} in {self.link.trouble!r}"
        )


@contextmanager
def link(url: str, filters: tuple[str, ...] = (), connect=Session, **settings) -> Iterator[Connected]:
    made = Connected(url, filters, connect, **settings)
    made.link.start()
    try:
        yield made
    finally:
        assert made.link.close(PATIENCE_S)


@BOTH
def test_every_subscription_is_there_again_after_each_loss(any_broker, connect):
    topic = f"link-{connect.__name__}/{any_broker.name}"
    filters = (f"{topic}/+", f"{topic}/+/x")
    with FaultProxy(any_broker.port) as proxy, link(f"mqtt://{proxy.address}", filters, connect) as made:
        for life in range(1, 4):
            made.wait(life)
            with MqttClient(any_broker.url, f"speaker-{any_broker.name}") as speaker:
                speaker.publish(f"{topic}/a", b"%d" % life)
                speaker.publish(f"{topic}/a/x", b"%d" % life)
            wait_until(lambda life=life: len(made.messages) == 2 * life, PATIENCE_S, "both are heard")
            proxy.drop_connections()
            wait_until(lambda life=life: made.ready > life, PATIENCE_S, "it is back")
        assert value(made.metrics, "broker_losses_total", role="test") == 3
        assert value(made.metrics, "broker_connects_total", role="test") >= 4


def test_what_was_handed_over_is_with_the_broker_when_close_returns(any_broker):
    topic = f"link-close/{any_broker.name}"
    with MqttClient(any_broker.url, f"listener-{any_broker.name}") as listener:
        listener.subscribe(f"{topic}/#")
        with link(any_broker.url) as made:
            made.wait()
            for number in range(300):
                assert made.link.publish(f"{topic}/{number}", b"x")
        found = {listener.receive().topic for _ in range(300)}
    assert found == {f"{topic}/{number}" for number in range(300)}
    assert made.link.unacked == 0


def test_a_broker_that_takes_nothing_is_noticed_by_publish_and_never_waited_for(mosquitto):
    with FaultProxy(mosquitto.port) as proxy, link(f"mqtt://{proxy.address}", keepalive_s=5) as made:
        made.wait()
        proxy.stall()
        sent = 0
        while made.link.publish("link-stalled/x", b"y" * 1_000):
            sent += 1
            assert sent <= UNACKED_MAX
        assert sent == UNACKED_MAX
        assert value(made.metrics, "unpublished_total", role="test") == 1
        proxy.drop_connections()
        proxy.pass_through()
        made.wait(2)
        assert made.link.unacked == 0
        assert made.link.publish("link-stalled/x", b"y")


def test_without_a_connection_publish_says_no_at_once():
    with link("mqtt://127.0.0.1:1") as made:
        made.wait_trouble("refused")
        assert not made.link.publish("x", b"y")
        assert made.link.down_s > 0
        assert not made.link.was_connected


@BOTH
def test_who_takes_the_connection_and_says_nothing_is_left_after_the_timeout(mosquitto, connect):
    with FaultProxy(mosquitto.port) as proxy:
        proxy.hang()
        with link(f"mqtt://{proxy.address}", ("x",), connect, connect_timeout_s=0.5) as made:
            made.wait_trouble("did not answer")
            proxy.pass_through()
            made.wait()


def test_a_wrong_password_is_told_and_the_right_one_needs_no_restart(servers, tmp_path, logs):
    passwords, access, secret = tmp_path / "passwords", tmp_path / "acl", tmp_path / "secret"
    for index, (name, password) in enumerate({"stack": "stack", "gw": "right"}.items()):
        flags = ["-c"] if not index else []
        subprocess.run(["mosquitto_passwd", *flags, "-b", str(passwords), name, password], check=True, timeout=30)
    access.write_text("user stack\ntopic readwrite #\nuser gw\ntopic readwrite hw/#\n")
    settings = MosquittoSettings(password_file=passwords, acl_file=access, username="stack", password="stack")
    broker = servers.mosquitto(settings=settings)
    secret.write_text("wrong\n")
    for connect in (Session, Intake):
        secret.write_text("wrong\n")
        with link(broker.url, ("hw/x",), connect, username="gw", password_file=str(secret)) as made:
            assert "check username, password_file" in made.wait_trouble("uthori")
            secret.write_text("right\n")
            made.wait()
    with link(broker.url, username="gw", password_file=str(secret)) as made:
        made.wait()
        assert made.link.publish("forbidden/x", b"y")
        wait_until(
            lambda: value(made.metrics, "publishes_refused_total", role="test") == 1, PATIENCE_S, "a refusal is counted"
        )
    [told] = [entry for entry in logs if entry["event"] == "publish_refused"]
    assert "allow this gateway" in told["remedy"]
    secret.unlink()
    for connect in (Session, Intake):
        with link(broker.url, ("hw/x",), connect, username="gw", password_file=str(secret)) as made:
            made.wait_trouble("cannot be read")


def certificate(folder, name: str, subject: str, *extra: str, signer: str | None = None) -> None:
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", subject, *extra]
    if signer is not None:
        argv += ["-CA", str(folder / f"{signer}.pem"), "-CAkey", str(folder / f"{signer}.key")]
    argv += ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


@BOTH
def test_tls_is_spoken_and_a_stranger_is_not_trusted(servers, tmp_path, connect):
    certificate(tmp_path, "ca", "/CN=Test CA")
    certificate(tmp_path, "server", "/CN=broker", "-addext", "subjectAltName=IP:127.0.0.1", signer="ca")
    certificate(tmp_path, "other", "/CN=Other CA")
    tls = MosquittoTls(
        certificate=tmp_path / "server.pem",
        key=tmp_path / "server.key",
        ca=tmp_path / "ca.pem",
        require_certificate=False,
    )
    broker = servers.mosquitto(settings=MosquittoSettings(tls=tls))
    large = random.Random(1).randbytes(3_000_000)
    trusted = {"ca_file": str(tmp_path / "ca.pem")}
    with link(broker.url, ("tls/#",), connect, **trusted) as made, link(broker.url, **trusted) as speaker:
        made.wait()
        speaker.wait()
        # Several records of TLS in one read of the socket, and more than the socket holds.
        for number in range(5):
            assert speaker.link.publish(f"tls/{number}", large)
        wait_until(lambda: len(made.messages) == 5, PATIENCE_S, "all are heard")
        assert all(payload == large for _, payload in made.messages)
    with link(broker.url, ("tls/#",), connect, ca_file=str(tmp_path / "other.pem")) as made:
        assert "check ca_file" in made.wait_trouble("TLS")


@BOTH
def test_a_handler_that_fails_costs_the_connection_and_not_the_thread(mosquitto, logs, connect):
    topic = f"link-fault-{connect.__name__}/x"
    made = Connected(mosquitto.url, (topic,), connect)
    tripped = threading.Event()

    def trip(topic: str, payload: bytes) -> None:
        if not tripped.is_set():
            tripped.set()
            raise ZeroDivisionError("a bug")
        made.messages.append((topic, payload))

    made.link._on_message = trip
    made.link.start()
    try:
        made.wait()
        with MqttClient(mosquitto.url, "fault-speaker") as speaker:
            speaker.publish(topic, b"1")
            made.wait(2)
            speaker.publish(topic, b"2")
        wait_until(lambda: made.messages == [(topic, b"2")], PATIENCE_S, "it goes on")
        assert value(made.metrics, "faults_total", where="mqtt-test") == 1
        assert "mqtt_fault" in [entry["event"] for entry in logs]
    finally:
        assert made.link.close(PATIENCE_S)


def test_an_intake_pings_while_nothing_comes_and_leaves_a_broker_that_is_silent(mosquitto):
    """The broker ends a connection that says nothing for one and a half times its keepalive, 7.5 s."""
    with (
        FaultProxy(mosquitto.port) as proxy,
        link(f"mqtt://{proxy.address}", ("link-quiet/#",), Intake, keepalive_s=5) as made,
    ):
        made.wait()
        began_s = time.monotonic()
        wait_until(lambda: time.monotonic() - began_s > 9.0, PATIENCE_S, "longer than the broker waits")
        assert (made.ready, made.link.connected) == (1, True)
        proxy.stall()
        made.wait_trouble("nothing came from the broker")
        proxy.pass_through()
        made.wait(2)


def test_an_intake_acknowledges_each_message_once_it_was_handled(servers):
    """A broker that lets 20 messages wait for their acknowledgement sends no 21st before the first has come."""
    broker = servers.mosquitto(settings=MosquittoSettings(inflight_messages_max=20))
    with link(broker.url, ("link-many/#",), Intake) as made, link(broker.url) as speaker:
        made.wait()
        speaker.wait()
        for number in range(1_000):
            assert speaker.link.publish("link-many/x", b"%d" % number)
        wait_until(lambda: len(made.messages) == 1_000, PATIENCE_S, "all are heard")
    assert [int(payload) for _, payload in made.messages] == list(range(1_000))


def test_an_intake_takes_packets_of_every_size_whole(mosquitto):
    sizes = [0, 1, READ_BYTES - 20, READ_BYTES, 3 * READ_BYTES + 1, 5, 8 * 2**20, 100]
    payloads = [random.Random(size).randbytes(size) for size in sizes]
    with link(mosquitto.url, ("link-sizes/#",), Intake) as made, MqttClient(mosquitto.url, "sizes") as speaker:
        made.wait()
        for payload in payloads:
            speaker.publish("link-sizes/x", payload)
        wait_until(lambda: len(made.messages) == len(payloads), PATIENCE_S, "all are heard")
    assert [payload for _, payload in made.messages] == payloads


class Answering:
    """A broker that we play: it takes each connection, and answers a subscription with what it was given."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = b"".join(answers)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._server.getsockname()[1]}"
        self.heard: list[mqtt5.Packet] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Answering:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._server.accept()
            except OSError:
                return  # closed
            # A gateway may leave with bytes of ours unread, which resets the connection.
            with peer, contextlib.suppress(ConnectionError):
                self._converse(peer)

    def _converse(self, peer: socket.socket) -> None:
        data = b""
        while piece := peer.recv(65_536):
            data += piece
            while data:
                try:
                    packet, size = mqtt5.read(memoryview(data))
                except IndexError:
                    break
                data = data[size:]
                self.heard.append(packet)
                if isinstance(packet, mqtt5.ConnectPacket):
                    peer.sendall(mqtt5.ConnAckPacket().write())
                elif isinstance(packet, mqtt5.SubscribePacket):
                    peer.sendall(self._answers)


GRANTED = mqtt5.SubAckPacket(1, [mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE]).write()


@BOTH
def test_a_subscription_that_is_refused_is_told(connect):
    """mosquitto grants what its access rules forbid."""
    refusal = mqtt5.SubAckPacket(1, [mqtt5.SubAckReasonCode.NOT_AUTHORIZED]).write()
    with Answering(refusal) as broker, link(broker.url, ("hw/x",), connect) as made:
        made.wait_trouble("refuses the subscription of hw/x; allow this gateway to read it")
        assert not made.ready


@BOTH
def test_why_a_broker_says_goodbye_is_told(connect):
    goodbye = mqtt5.DisconnectPacket(reason_code=mqtt5.DisconnectReasonCode.SERVER_SHUTTING_DOWN).write()
    with Answering(GRANTED, goodbye) as broker, link(broker.url, ("hw/x",), connect) as made:
        made.wait_trouble("the broker says: Server shutting down")
        assert made.ready >= 1


@BOTH
def test_a_topic_that_is_no_text_is_handed_on_and_harms_nothing(connect):
    """Brokers should refuse it, and not all do."""
    odd = mqtt5.PublishPacket("hw/??", b"1", qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=7).write()
    plain = mqtt5.PublishPacket("hw/x", b"2", qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=8).write()
    answers = GRANTED, odd.replace(b"??", b"\xff\xfe"), plain
    with Answering(*answers) as broker, link(broker.url, ("hw/#",), connect) as made:
        wait_until(lambda: len(made.messages) == 2, PATIENCE_S, "both are heard")
        wait_until(
            lambda: [each.packet_id for each in broker.heard if isinstance(each, mqtt5.PubAckPacket)] == [7, 8],
            PATIENCE_S,
            "both are acknowledged",
        )
        assert made.messages == [("hw/\ufffd\ufffd", b"1"), ("hw/x", b"2")]


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (b"\x30\xff\xff\xff\xff\x01", "a length of more than four bytes"),
        (b"\x30\xff\xff\xff\x7f", "a packet of 268435455 bytes"),
        (b"\x32\x03\x00\x09x", "ends before its payload begins"),
        (b"\x00\x00", "what is not MQTT 5"),
    ],
)
def test_an_intake_leaves_a_broker_that_does_not_speak_mqtt(packet: bytes, words: str) -> None:
    with Answering(GRANTED, packet) as broker, link(broker.url, ("hw/x",), Intake) as made:
        made.wait_trouble(words)
        assert made.messages == []
