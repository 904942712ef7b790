"""The gateway's connection to real brokers: it comes back after every loss, says why it is away, and never waits.

Mutants tried, each found here: not asking for the subscriptions again after a reconnect; reading the password once;
leaving before the broker has what was handed over; a handler's error that ends the thread.
"""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from structlog.testing import capture_logs

from gateway.mqtt import UNACKED_MAX, Link
from gateway.settings import BrokerSettings
from headwater.stack.broker import MosquittoSettings, MosquittoTls
from simulators.faults.proxy import FaultProxy
from tests.integration.servers import PATIENCE_S, MqttClient, wait_until
from tests.unit.gateway_parts import fresh_metrics, value


@pytest.fixture(autouse=True)
def logs():
    with capture_logs() as found:
        yield found


class Connected:
    """A link with its ends in lists."""

    def __init__(self, url: str, filters: tuple[str, ...] = (), **settings) -> None:
        self.metrics = fresh_metrics()
        self.messages: list[tuple[str, bytes]] = []
        self.ready = 0
        broker = BrokerSettings(url=url, **{"reconnect_base_s": 0.05, "reconnect_max_s": 0.2, **settings})
        self.link = Link(broker, "test", 0, filters, self.received, self.became_ready, self.metrics, random.Random(1))

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
def link(url: str, filters: tuple[str, ...] = (), **settings) -> Iterator[Connected]:
    made = Connected(url, filters, **settings)
    made.link.start()
    try:
        yield made
    finally:
        assert made.link.close(PATIENCE_S)


def test_every_subscription_is_there_again_after_each_loss(any_broker):
    topic = f"link/{any_broker.name}"
    with FaultProxy(any_broker.port) as proxy, link(f"mqtt://{proxy.address}", (f"{topic}/+", f"{topic}/+/x")) as made:
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


def test_who_takes_the_connection_and_says_nothing_is_left_after_the_timeout(mosquitto):
    with FaultProxy(mosquitto.port) as proxy:
        proxy.hang()
        with link(f"mqtt://{proxy.address}", connect_timeout_s=0.5) as made:
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
    with link(broker.url, username="gw", password_file=str(secret)) as made:
        assert "check username, password_file" in made.wait_trouble("uthori")
        secret.write_text("right\n")
        made.wait()
        assert made.link.publish("forbidden/x", b"y")
        wait_until(
            lambda: value(made.metrics, "publishes_refused_total", role="test") == 1, PATIENCE_S, "a refusal is counted"
        )
    [told] = [entry for entry in logs if entry["event"] == "publish_refused"]
    assert "allow this gateway" in told["remedy"]
    secret.unlink()
    with link(broker.url, username="gw", password_file=str(secret)) as made:
        made.wait_trouble("cannot be read")


def certificate(folder, name: str, subject: str, *extra: str, signer: str | None = None) -> None:
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", subject, *extra]
    if signer is not None:
        argv += ["-CA", str(folder / f"{signer}.pem"), "-CAkey", str(folder / f"{signer}.key")]
    argv += ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


def test_tls_is_spoken_and_a_stranger_is_not_trusted(servers, tmp_path):
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
    with link(broker.url, ("tls/#",), ca_file=str(tmp_path / "ca.pem")) as made:
        made.wait()
        # Several records of TLS in one read of the socket, and more than the socket holds.
        for number in range(5):
            assert made.link.publish(f"tls/{number}", large)
        wait_until(lambda: len(made.messages) == 5, PATIENCE_S, "all are heard")
        assert all(payload == large for _, payload in made.messages)
    with link(broker.url, ca_file=str(tmp_path / "other.pem")) as made:
        assert "check ca_file" in made.wait_trouble("TLS")


def test_a_handler_that_fails_costs_the_connection_and_not_the_thread(mosquitto, logs):
    made = Connected(mosquitto.url, ("link-fault/#",))
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
            speaker.publish("link-fault/x", b"1")
            made.wait(2)
            speaker.publish("link-fault/x", b"2")
        wait_until(lambda: made.messages == [("link-fault/x", b"2")], PATIENCE_S, "it goes on")
        assert value(made.metrics, "faults_total", where="mqtt-test") == 1
        assert "mqtt_fault" in [entry["event"] for entry in logs]
    finally:
        assert made.link.close(PATIENCE_S)
