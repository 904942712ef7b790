"""A broker: does it do what the protocol needs? Real round trips with a client that cleans up behind itself."""

from __future__ import annotations

import os
import queue
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from contract.broker import BrokerAddress
from contract.errors import TemporaryError
from contract.limits import DEFAULT_LIMITS, ENVELOPE_BYTES_MAX
from contract.topics import ROOT
from headwater.checks.findings import Finding, failed, guarded, ok, warning

TIMEOUT_S = 10.0
KEEPALIVE_S = 30
TOPIC = f"{ROOT}/doctor"
"""Always the same topics: an embedded broker keeps a little memory for each that was ever subscribed to."""
RECEIVE_MAXIMUM_MIN = 16
"""Unacknowledged publishes that a broker should allow; with fewer, a device cannot fill a line with latency."""


class BrokerLogin(msgspec.Struct, frozen=True, kw_only=True):
    """Which broker, and who we are."""

    url: str
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None


class BrokerSilent(TemporaryError):
    """A step of a check did not come to its end in time, or was refused."""


class _Client:
    """One MQTT 5 connection, driven by the caller: nothing runs behind its back."""

    def __init__(self, login: BrokerLogin, name: str) -> None:
        address = BrokerAddress.parse(login.url)
        self._messages: queue.SimpleQueue[tuple[str, bytes, bool]] = queue.SimpleQueue()
        self._answers: dict[str, Any] = {}
        self.ended = ""
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
        client.connect_timeout = TIMEOUT_S
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = lambda c, u, mid, codes, p: self._answers.update(subscribed=codes)
        client.on_publish = lambda c, u, mid, code, p: self._answers.update({f"published {mid}": code})
        client.on_message = lambda c, u, m: self._messages.put((m.topic, bytes(m.payload), bool(m.retain)))
        if login.username:
            password = Path(login.password_file).read_text().strip() if login.password_file else None
            client.username_pw_set(login.username, password)
        if address.tls:
            client.tls_set_context(ssl.create_default_context(cafile=login.ca_file))
        self._client = client
        self._host, self._port = address.host, address.port
        self.limits: object = None
        """Properties of the CONNACK: the broker's limits as attributes, absent where it names none."""

    def connect(self) -> None:
        """Connect and be accepted.

        Raises:
            BrokerSilent: refused, or no answer.
            OSError: nobody listens there.
        """
        self._client.connect(self._host, self._port, keepalive=KEEPALIVE_S)
        self.wait("the connection to be accepted", lambda: "connected" in self._answers)
        code = self._answers["connected"]
        if code.is_failure:
            raise BrokerSilent(f"it refuses the connection: {code}")

    def subscribe(self, topic: str) -> None:
        """Subscribe with QoS 1.

        Raises:
            BrokerSilent: refused, or no answer.
        """
        self._answers.pop("subscribed", None)
        self._client.subscribe(topic, qos=1)
        self.wait(f"the subscription of {topic}", lambda: "subscribed" in self._answers)
        if any(code.is_failure for code in self._answers["subscribed"]):
            raise BrokerSilent(f"it refuses the subscription of {topic}: {self._answers['subscribed'][0]}")

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish with QoS 1 and wait for the PUBACK.

        Raises:
            BrokerSilent: refused, or no answer.
        """
        key = f"published {self._client.publish(topic, payload, qos=1, retain=retain).mid}"
        self.wait(f"the PUBACK of {len(payload):,} bytes on {topic}", lambda: key in self._answers)
        if (code := self._answers[key]) is not None and code.is_failure:
            raise BrokerSilent(f"it refuses {len(payload):,} bytes on {topic}: {code}")

    def receive(self, topic: str, payload: bytes) -> bool:
        """Wait for this message; whether it came as a retained one.

        Raises:
            BrokerSilent: it did not come.
        """
        found: list[bool] = []

        def came() -> bool:
            while not self._messages.empty():
                at, data, retained = self._messages.get_nowait()
                if at == topic and data == payload:
                    found.append(retained)
            return bool(found)

        self.wait(f"{len(payload):,} bytes on {topic} to come back", came)
        return found[0]

    def wait(self, what: str, done: Callable[[], bool]) -> None:
        """Let the connection work until `done`.

        Raises:
            BrokerSilent: the connection ended, or TIMEOUT_S passed.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while not done():
            if self.ended:
                raise BrokerSilent(f"it ended the connection ({self.ended}) instead of {what}")
            if time.monotonic() > deadline:
                raise BrokerSilent(f"waited {TIMEOUT_S:g} s for {what}")
            code = self._client.loop(0.1)
            if code != mqtt.MQTT_ERR_SUCCESS and not self.ended:
                self.ended = mqtt.error_string(code)

    def close(self) -> None:
        """Say goodbye."""
        self._client.disconnect()
        self._client.loop(0.1)

    def _on_connect(
        self, client: mqtt.Client, data: object, flags: object, code: ReasonCode, properties: Properties | None
    ) -> None:
        self._answers["connected"] = code
        if properties is not None:
            self.limits = properties

    def _on_disconnect(
        self, client: mqtt.Client, data: object, flags: object, code: ReasonCode, properties: Properties | None
    ) -> None:
        self.ended = str(code)


def check_broker(login: BrokerLogin, remedy: str = "") -> list[Finding]:
    """Everything that the protocol asks of a broker.

    Args:
        login: which broker.
        remedy: what to do where it does not answer; empty: start it.
    """
    name = f"headwater-doctor-{os.getpid()}"
    remedy = remedy or f"start the broker, or name another with --broker; asked was {login.url}"
    try:
        client = _Client(login, name)
    except (OSError, ValueError) as error:
        return [failed("broker.connect", str(error), "correct --broker, --password-file or --ca-file")]
    try:
        client.connect()
    except (BrokerSilent, OSError) as error:
        return [failed("broker.connect", f"{login.url}: {error}", remedy)]
    findings = [ok("broker.connect", f"{login.url} accepts MQTT 5"), *_announced(client.limits)]
    allow = f"allow this client to publish and subscribe {TOPIC}/#"
    try:
        findings += guarded("broker.qos1", allow, lambda: _round_trip(client))
        findings += guarded("broker.retained", allow, lambda: _retained(client))
        findings += guarded("broker.payload", "raise the broker's payload limit to 8.1 MB", lambda: _large(client))
        findings += guarded("broker.client_id", "give each device its own client id", lambda: _taken_over(login, name))
    finally:
        client.close()
    return findings


def _announced(limits: object) -> Sequence[Finding]:
    """What the broker says of itself (MQTT 5, 3.2.2.3); absent means no limit."""
    findings = []
    if not getattr(limits, "RetainAvailable", 1):
        findings.append(failed("broker.retain", "it keeps no retained messages", "turn retained messages on"))
    if getattr(limits, "MaximumQoS", 2) < 1:
        findings.append(failed("broker.qos", "it takes QoS 0 only", "use a broker with QoS 1"))
    receive = getattr(limits, "ReceiveMaximum", 65_535)
    if receive < RECEIVE_MAXIMUM_MIN:
        remedy = "raise the broker's limit of messages in flight (mosquitto: max_inflight_messages)"
        findings.append(warning("broker.receive_maximum", f"{receive} messages in flight per client", remedy))
    else:
        findings.append(ok("broker.receive_maximum", f"{receive} messages in flight per client"))
    return findings


def _round_trip(client: _Client) -> Finding:
    topic, token = f"{TOPIC}/qos1", os.urandom(16)
    client.subscribe(f"{TOPIC}/#")
    began = time.monotonic()
    client.publish(topic, token)
    client.receive(topic, token)
    return ok("broker.qos1", f"round trip in {(time.monotonic() - began) * 1000:.1f} ms")


def _retained(client: _Client) -> Finding:
    topic, token = f"{TOPIC}/retained", os.urandom(16)
    client.publish(topic, token, retain=True)
    client.receive(topic, token)
    try:
        client.subscribe(topic)
        if not client.receive(topic, token):
            raise BrokerSilent("a new subscription got the message, but not as a retained one")
    finally:
        client.publish(topic, b"", retain=True)
    return ok("broker.retained", "a new subscription gets the last message")


def _large(client: _Client) -> Finding:
    size = DEFAULT_LIMITS.payload_bytes_max
    announced = getattr(client.limits, "MaximumPacketSize", None)
    if announced is not None and announced < size + ENVELOPE_BYTES_MAX:
        detail = f"it takes packets of {announced:,} bytes at most; a payload may have {size:,}"
        remedy = "raise its packet limit (mosquitto: max_packet_size), or set max_batch_rows lower"
        return failed("broker.payload", detail, remedy)
    topic, payload = f"{TOPIC}/payload", os.urandom(64) * (size // 64)
    client.publish(topic, payload)
    client.receive(topic, payload)
    return ok("broker.payload", f"{size:,} bytes came back whole")


def _taken_over(login: BrokerLogin, name: str) -> Finding:
    """The id of a device is its MQTT client id: a second connection must end the first."""
    first, second = _Client(login, f"{name}-id"), _Client(login, f"{name}-id")
    first.connect()
    try:
        second.connect()
        try:
            first.wait("the first of two connections with one client id to be ended", lambda: bool(first.ended))
        finally:
            second.close()
    except BrokerSilent:
        first.close()
        raise
    return ok("broker.client_id", "a second connection with the same id ends the first")
