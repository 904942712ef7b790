"""The agent's transport against real brokers."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

import pytest

from contract import topics
from contract.errors import ConfigurationError
from edge_agent.inbox import Inbox
from edge_agent.settings import BrokerSettings
from edge_agent.transport import (
    PUBLISHES_BYTES_MAX,
    Connection,
    LossCause,
    Lost,
    PahoTransport,
    PublishRefused,
    Ready,
    Received,
    Signal,
    Will,
)
from headwater.stack.broker import MosquittoSettings, MosquittoTls, find_mosquitto
from tests.integration.servers import PATIENCE_S, BrokerServer, MqttClient, Servers, free_port, wait_until

Kind = TypeVar("Kind", bound=Signal)


class Line:
    """A connection of a device, and everything it said."""

    def __init__(self, device: str, secret: Callable[[], str | None] = lambda: None, **settings: object) -> None:
        self.device = device
        self.inbox: Inbox[tuple[Connection, Signal]] = Inbox(64)
        self.transport = PahoTransport(BrokerSettings(**settings), device, secret)  # type: ignore[arg-type]
        self.said: list[Signal] = []
        self.connection: Connection | None = None

    def connect(self) -> Connection:
        names = [topics.ack(self.device), topics.rewind(self.device), topics.desired(self.device)]
        self.connection = self.transport.connect(Will(topics.status(self.device), b"lost"), names, self.inbox)
        return self.connection

    def wait(self, kind: type[Kind]) -> Kind:
        """The next signal of this kind; those before it are in `said`."""

        def found() -> Signal | None:
            item = self.inbox.take(0.1)
            if item is None:
                return None
            self.said.append(item[1])
            return item[1] if isinstance(item[1], kind) else None

        signal = wait_until(found, PATIENCE_S, f"{kind.__name__} for {self.device}, but {self.said}")
        assert isinstance(signal, kind)
        return signal


def test_what_the_broker_retained_is_received_before_the_connection_is_ready(any_broker: BrokerServer) -> None:
    """Otherwise a restored buffer would send before it learns that the lake is ahead.

    Mutants tried: one SUBSCRIBE with all three filters (iotcore answers it before it delivers what it retained).
    """
    with MqttClient(any_broker.url, "keeper") as keeper:
        keeper.publish(topics.ack("retained"), b"an ack", retain=True)
        line = Line("retained", url=any_broker.url)
        connection = line.connect()
        ready = line.wait(Ready)
        assert Received(topics.ack("retained"), b"an ack") in line.said
        assert ready.payload_bytes_max >= 8 * 1024 * 1024
        connection.close(PATIENCE_S)


def test_both_protocol_versions_carry_messages_both_ways(any_broker: BrokerServer) -> None:
    for protocol, url in (("5", any_broker.url), ("3.1.1", any_broker.url_mqtt311)):
        device = f"both-{protocol}"
        line = Line(device, url=url, protocol=protocol)
        connection = line.connect()
        line.wait(Ready)
        payload = os.urandom(8 * 1024 * 1024)
        with MqttClient(any_broker.url, f"peer-{protocol}") as peer:
            peer.subscribe(topics.up(device, "s"))
            assert connection.publish(topics.up(device, "s"), payload)
            assert peer.receive().payload == payload
            peer.publish(topics.rewind(device), b"back", qos=0)
            assert line.wait(Received) == Received(topics.rewind(device), b"back")
        connection.close(PATIENCE_S)
        assert connection.finished


def test_a_killed_device_leaves_its_will_and_one_that_says_goodbye_does_not(any_broker: BrokerServer) -> None:
    with MqttClient(any_broker.url, "mourner") as mourner:
        mourner.subscribe(topics.status("mortal"))
        line = Line("mortal", url=any_broker.url)
        connection = line.connect()
        line.wait(Ready)
        assert connection.publish(topics.status("mortal"), b"stopped", retain=True)
        connection.close(PATIENCE_S)
        assert connection.finished
        connection = line.connect()
        assert not connection.publish(topics.status("mortal"), b"too early")
        line.wait(Ready)
        connection.abandon()
        assert [message.payload for message in mourner.receive_until(b"lost")] == [b"stopped", b"lost"]


class ScriptedBroker:
    """Answers one client's packets with prepared bytes, one answer for each packet."""

    def __init__(self, *answers: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        self.packets: list[bytes] = []
        self._answers = answers
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE_S)
        self._listener.close()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        with client:
            client.settimeout(PATIENCE_S)
            for answer in self._answers:
                self.packets.append(client.recv(65_536))
                client.sendall(answer)
            with suppress(ConnectionResetError):
                while client.recv(65_536):
                    pass  # until the client has closed its side


CONNACK = bytes.fromhex("20 03 00 00 00")
CONNACK_RECEIVE_MAXIMUM_2 = bytes.fromhex("20 06 00 00 03 21 00 02")


def suback(number: int, code: int = 1) -> bytes:
    return bytes([0x90, 4, 0, number, 0, code])


def test_a_device_learns_that_another_one_took_its_name() -> None:
    """mosquitto 2.0.11 does not say so; this is what MQTT 5 asks for, and what newer ones do."""
    taken_over = bytes.fromhex("e0 02 8e 00")
    with ScriptedBroker(CONNACK, suback(1), suback(2), suback(3), suback(4) + taken_over) as broker:
        line = Line("twin", url=broker.url)
        line.connect()
        line.wait(Ready)
        assert line.wait(Lost).cause is LossCause.TAKEN_OVER


def test_a_refused_subscription_ends_the_attempt_unless_it_is_the_devices_own_status() -> None:
    with ScriptedBroker(CONNACK, suback(1), suback(2), suback(3, 0x87)) as broker:
        line = Line("blind", url=broker.url)
        line.connect()
        lost = line.wait(Lost)
        assert lost.cause is LossCause.NOT_AUTHORISED
        assert topics.rewind("blind") in lost.detail
    with ScriptedBroker(CONNACK, suback(1), suback(2, 0x87), suback(3), suback(4)) as broker:
        line = Line("blind", url=broker.url)
        connection = line.connect()
        line.wait(Ready)
        connection.abandon()


def test_no_more_messages_are_on_the_way_than_the_broker_allows() -> None:
    """Beyond its Receive Maximum a broker ends the connection (MQTT 5, 3.3.4); mosquitto's is 20 unless configured.

    Mutants tried: the limit of the broker ignored.
    """
    granted = (CONNACK_RECEIVE_MAXIMUM_2, suback(1), suback(2), suback(3), suback(4))
    with ScriptedBroker(*granted, bytes.fromhex("40 02 00 05")) as broker:
        line = Line("eager", url=broker.url)
        connection = line.connect()
        line.wait(Ready)
        assert connection.publish("t", b"1")
        assert connection.publish("t", b"2")
        assert wait_until(lambda: connection.publish("t", b"3"), PATIENCE_S, "the first PUBACK makes room")
        assert not connection.publish("t", b"4")
        connection.abandon()


def test_no_more_bytes_are_on_the_way_than_memory_and_a_slow_line_bear() -> None:
    """A broker that reads slowly, or not at all; one message of any size always may be on the way.

    Before: messages were counted, and not their bytes.
    """
    large = bytes(PUBLISHES_BYTES_MAX + 1)
    with ScriptedBroker(CONNACK, suback(1), suback(2), suback(3), suback(4)) as broker:
        line = Line("wide", url=broker.url)
        connection = line.connect()
        line.wait(Ready)
        assert connection.publish("t", large)
        assert not connection.publish("t", b"1")
        assert connection.unanswered == 1
        connection.abandon()
    piece = bytes(PUBLISHES_BYTES_MAX // 4)
    with ScriptedBroker(CONNACK, suback(1), suback(2), suback(3), suback(4), bytes.fromhex("40 02 00 05")) as broker:
        line = Line("wide", url=broker.url)
        connection = line.connect()
        line.wait(Ready)
        assert [connection.publish("t", piece) for _ in range(4)] == [True] * 4
        assert wait_until(lambda: connection.publish("t", piece), PATIENCE_S, "the first PUBACK makes room")
        assert connection.unanswered == 4
        assert not connection.publish("t", piece)
        connection.abandon()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 99],
)
def test_a_captive_portal_in_the_brokers_place_is_left_and_told_as_a_possibility(protocol: str, answer: bytes) -> None:
    with ScriptedBroker(answer) as portal:
        line = Line("guest", url=portal.url, protocol=protocol, keepalive_s=5)
        connection = line.connect()
        lost = line.wait(Lost)
        assert (lost.cause, "captive portal" in lost.detail) == (LossCause.REFUSED, True)
        wait_until(lambda: connection.finished, PATIENCE_S, "the thread ends")
        connection.abandon()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_unreachable_broker_is_told_as_such() -> None:
    line = Line("nowhere", url=f"mqtt://127.0.0.1:{free_port()}")
    connection = line.connect()
    assert line.wait(Lost).cause is LossCause.UNREACHABLE
    assert not connection.publish("t", b"")
    wait_until(lambda: connection.finished, PATIENCE_S, "the thread ends")


def test_a_connection_given_up_leaves_no_files_open(mosquitto: BrokerServer) -> None:
    """Days without a network are thousands of attempts. Mutants tried: the callbacks left on the client."""

    def attempt() -> None:
        connection = line.connect()
        line.wait(Ready)
        connection.abandon()
        wait_until(lambda: connection.finished, PATIENCE_S, "the thread ends")
        line.said.clear()
        while line.inbox.take(0.0) is not None:
            pass

    line = Line("restless", url=mosquitto.url)
    attempt()
    gc.collect()
    before = open_files()
    gc.disable()
    try:
        for _ in range(5):
            attempt()
        assert open_files() <= before + 3  # the last one is still held by `line`
    finally:
        gc.enable()


def test_a_broker_that_accepts_and_says_nothing_can_be_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = Line("patient", url=f"mqtt://127.0.0.1:{silent.getsockname()[1]}")
        connection = line.connect()
        accepted, _ = silent.accept()
        with accepted:
            assert accepted.recv(1024)
            connection.abandon()
            wait_until(lambda: connection.finished, PATIENCE_S, "the thread ends")


def password_file(folder: Path, **passwords: str) -> Path:
    path = folder / "passwords"
    path.touch(mode=0o600)
    for name, password in passwords.items():
        subprocess.run(["mosquitto_passwd", "-b", str(path), name, password], check=True, capture_output=True)
    return path


def test_refusals_say_what_to_do_and_a_changed_password_is_used_at_the_next_attempt(
    servers: Servers, tmp_path: Path
) -> None:
    passwords = password_file(tmp_path, stack="stack", pi="right")
    access = tmp_path / "acl"
    access.write_text("user stack\ntopic readwrite #\nuser pi\ntopic write hw/v1/up/#\ntopic read hw/v1/ack/pi\n")
    settings = MosquittoSettings(password_file=passwords, acl_file=access, username="stack", password="stack")
    broker = servers.mosquitto(settings=settings)
    current = ["wrong"]
    line = Line("pi", lambda: current[0], url=broker.url, username="pi")
    line.connect()
    lost = line.wait(Lost)
    assert lost.cause in (LossCause.CREDENTIALS, LossCause.NOT_AUTHORISED)
    assert "broker says" in lost.detail
    current[0] = "right"
    connection = line.connect()
    line.wait(Ready)
    assert connection.publish(topics.reported("pi"), b"not allowed")
    refused = line.wait(PublishRefused)
    assert refused.messages == 1
    assert "uthor" in refused.reason
    assert connection.publish(topics.up("pi", "s"), b"allowed")
    connection.close(PATIENCE_S)

    def missing() -> str | None:
        raise ConfigurationError("[broker] password_file is gone")

    line = Line("pi", missing, url=broker.url, username="pi")
    line.connect()
    assert line.wait(Lost) == Lost(LossCause.CREDENTIALS, "[broker] password_file is gone")


def certificate(folder: Path, name: str, subject: str, *extra: str, signer: str | None = None) -> None:
    """An RSA key and certificate `<name>.key`, `<name>.pem` in `folder`, made with the openssl program."""
    key, pem = folder / f"{name}.key", folder / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", subject]
    command += ["-keyout", str(key), "-out", str(pem)]
    if signer is not None:
        command += ["-CA", str(folder / f"{signer}.pem"), "-CAkey", str(folder / f"{signer}.key")]
    subprocess.run([*command, *extra], check=True, capture_output=True)


def test_tls_checks_the_servers_name_and_chain_and_shows_the_devices_certificate(
    servers: Servers, tmp_path: Path
) -> None:
    try:
        certificate(tmp_path, "ca", "/CN=Test CA")
        certificate(tmp_path, "server", "/CN=broker", "-addext", "subjectAltName=IP:127.0.0.1", signer="ca")
        certificate(tmp_path, "other", "/CN=Other CA")
    except subprocess.CalledProcessError as error:
        pytest.fail(f"openssl: {error.stderr.decode()}")
    tls = MosquittoTls(
        certificate=tmp_path / "server.pem",
        key=tmp_path / "server.key",
        ca=tmp_path / "ca.pem",
        require_certificate=False,
    )
    broker = servers.mosquitto(settings=MosquittoSettings(tls=tls))
    line = Line("tls", url=broker.url, ca_file=str(tmp_path / "ca.pem"))
    connection = line.connect()
    line.wait(Ready)
    connection.close(PATIENCE_S)
    for url, ca, cause in (
        (broker.url, "other.pem", LossCause.TLS),
        (broker.url.replace("127.0.0.1", "localhost"), "ca.pem", LossCause.TLS),
        (broker.url, "server.key", LossCause.CREDENTIALS),
    ):
        line = Line("tls", url=url, ca_file=str(tmp_path / ca))
        line.connect()
        assert line.wait(Lost).cause is cause


@contextmanager
def mosquitto_with(folder: Path, *lines: str) -> Iterator[int]:
    """A mosquitto with this configuration; gives its port. The stack's own cannot ask a broker that asks it back."""
    port = free_port()
    config = folder / "mosquitto.conf"
    config.write_text("\n".join(["user root", f"listener {port} 127.0.0.1", *lines]) + "\n")
    with (folder / "mosquitto.log").open("wb") as log:
        process = subprocess.Popen([find_mosquitto(), "-c", str(config)], stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or accepts(port), PATIENCE_S, "mosquitto listens")
        assert process.poll() is None, (folder / "mosquitto.log").read_text()
        yield port
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_broker_that_asks_for_certificates_lets_in_those_who_have_one(tmp_path: Path) -> None:
    certificate(tmp_path, "ca", "/CN=Test CA")
    certificate(tmp_path, "server", "/CN=broker", "-addext", "subjectAltName=IP:127.0.0.1", signer="ca")
    certificate(tmp_path, "pi", "/CN=pi", signer="ca")
    certificate(tmp_path, "foreign-ca", "/CN=Another CA")
    certificate(tmp_path, "foreign", "/CN=pi", signer="foreign-ca")
    ca, own, foreign = (str(tmp_path / name) for name in ("ca.pem", "pi", "foreign"))
    asks = [f"cafile {ca}", f"certfile {tmp_path}/server.pem", f"keyfile {tmp_path}/server.key"]
    with mosquitto_with(tmp_path, *asks, "require_certificate true", "use_identity_as_username true") as port:
        url = f"mqtts://127.0.0.1:{port}"
        line = Line("pi", url=url, ca_file=ca, cert_file=f"{own}.pem", key_file=f"{own}.key")
        connection = line.connect()
        line.wait(Ready)
        connection.close(PATIENCE_S)
        without = Line("pi", url=url, ca_file=ca)
        stranger = Line("pi", url=url, ca_file=ca, cert_file=f"{foreign}.pem", key_file=f"{foreign}.key")
        for uninvited in (without, stranger):
            uninvited.connect()
            assert uninvited.wait(Lost).cause in (LossCause.TLS, LossCause.REFUSED, LossCause.UNREACHABLE)
            assert Ready not in map(type, uninvited.said)
