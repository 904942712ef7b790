"""Questions that tell whether a server really works: not "is the port open" but "does it do its job".

A server that accepts connections may still be reading its files (SeaweedFS), or may have lost the thread that does the
work (iotcore after a panic). Each probe does one small piece of the real work, within its timeout.
"""

from __future__ import annotations

import http.client
import os
import ssl
import time
from urllib.parse import urlsplit

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from headwater.stack.errors import NotReady

LOOP_S = 0.1
KEEPALIVE_S = 30
"""Never 0: iotcore closes such a connection without an answer."""


class MqttProbe(msgspec.Struct, frozen=True, kw_only=True):
    """Connect, subscribe, publish with QoS 1, and receive what was published.

    Client id and topic (`headwater/probe/<process id>`) are the same at every call: iotcore keeps a little memory for
    every topic that was ever subscribed to.
    """

    host: str
    port: int
    mqtt5: bool = True
    timeout_s: float = 5.0
    username: str | None = None
    password: str | None = None
    ca_file: str | None = None
    """The broker's certificate authority; None for a connection without TLS."""

    def __call__(self) -> None:
        """Ask once.

        Raises:
            NotReady: when the round trip was not complete after `timeout_s`; the message names the step that failed.
            OSError: when the connection is refused or lost.
        """
        trip = _RoundTrip(f"headwater-probe-{os.getpid()}", mqtt5=self.mqtt5)
        client = trip.client
        client.connect_timeout = self.timeout_s
        if self.username is not None:
            client.username_pw_set(self.username, self.password)
        if self.ca_file is not None:
            client.tls_set_context(ssl.create_default_context(cafile=self.ca_file))
        deadline = time.monotonic() + self.timeout_s
        try:
            client.connect(self.host, self.port, keepalive=KEEPALIVE_S)
            while not trip.done and not trip.refused and time.monotonic() < deadline:
                if (code := client.loop(LOOP_S)) != mqtt.MQTT_ERR_SUCCESS:
                    trip.refuse(mqtt.error_string(code))
        finally:
            client.disconnect()
            client.loop(0.0)
        if not trip.done:
            why = trip.refused or f"no answer within {self.timeout_s:g} s"
            raise NotReady(f"MQTT broker {self.host}:{self.port}: {trip.waiting_for}: {why}")


class _RoundTrip:
    """The steps of one probe, driven by the client's callbacks."""

    def __init__(self, name: str, *, mqtt5: bool) -> None:
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            protocol=mqtt.MQTTv5 if mqtt5 else mqtt.MQTTv311,
            reconnect_on_failure=False,
        )
        self.waiting_for = "CONNACK"
        self.refused = ""
        self._topic = f"headwater/probe/{name}"
        self._token = os.urandom(16)
        self._returned = self._acknowledged = False
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_publish = self._on_publish
        self.client.on_message = self._on_message

    @property
    def done(self) -> bool:
        return self._returned and self._acknowledged

    def refuse(self, reason: str) -> None:
        """Keep the first reason: what follows is mostly its consequence."""
        self.refused = self.refused or reason

    def _on_connect(
        self, client: mqtt.Client, _data: object, _flags: mqtt.ConnectFlags, code: ReasonCode, _p: Properties | None
    ) -> None:
        if code.is_failure:
            self.refuse(str(code))
            return
        self.waiting_for = "SUBACK"
        client.subscribe(self._topic, qos=1)

    def _on_subscribe(
        self, client: mqtt.Client, _data: object, _mid: int, codes: list[ReasonCode], _p: Properties | None
    ) -> None:
        if any(code.is_failure for code in codes):
            self.refuse(", ".join(str(code) for code in codes))
            return
        self.waiting_for = "PUBACK and the message itself"
        client.publish(self._topic, self._token, qos=1)

    def _on_publish(
        self, _client: mqtt.Client, _data: object, _mid: int, code: ReasonCode, _p: Properties | None
    ) -> None:
        if code.packetType == PacketTypes.PUBACK and code.is_failure:
            self.refuse(str(code))
            return
        self._acknowledged = True

    def _on_message(self, _client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        self._returned = self._returned or message.payload == self._token


class HttpProbe(msgspec.Struct, frozen=True, kw_only=True):
    """GET `url` and expect a status of 200 to 299."""

    url: str
    timeout_s: float = 3.0

    def __call__(self) -> None:
        """Ask once.

        Raises:
            NotReady: when the answer has another status, or is no HTTP.
            OSError: when the connection is refused, lost or silent for `timeout_s`.
        """
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=self.timeout_s)
        try:
            connection.request("GET", parts.path or "/")
            answer = connection.getresponse()
            said = answer.read(500).decode("utf-8", "replace").strip()
        except http.client.HTTPException as error:
            raise NotReady(f"{self.url} does not speak HTTP: {error!r}") from error
        finally:
            connection.close()
        if not 200 <= answer.status < 300:
            raise NotReady(f"{self.url} answers {answer.status}: {said}")
