"""The MQTT brokers that a stack can start itself: iotcore, which comes with pip, and mosquitto, where it is installed.

Both are used the same way: claim the ports of `PORTS`, make the broker, give its `spec()` to the supervisor. Nothing in
Headwater relies on a broker keeping anything: what is lost with it is sent again (see `contract`).
"""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Protocol

import msgspec

from contract.errors import ConfigurationError
from contract.limits import DEFAULT_LIMITS
from headwater.stack.errors import ProgramMissing
from headwater.stack.lifecycle import Policy
from headwater.stack.ports import HOST, write_whole
from headwater.stack.probes import MqttProbe
from headwater.stack.supervisor import ChildSpec

PACKET_SPARE_BYTES = 64 * 1024
"""What a packet may be larger than its payload: topic and properties."""
TIER = 10
"""Of a broker: above the object store, below gateways and devices."""

# A broker that hangs is found within about 20 s and ended; SIGSTOP for less than that is survived.
POLICY = Policy(alive_interval_s=5.0, alive_failures_max=3, ready_timeout_s=20.0)


class Broker(Protocol):
    """A broker process that a supervisor can run."""

    @property
    def url(self) -> str:
        """Where MQTT 5 clients connect: `mqtt://host:port`, or `mqtts://…` with TLS."""
        ...

    @property
    def url_mqtt311(self) -> str:
        """Where MQTT 3.1.1 clients connect."""
        ...

    def spec(self) -> ChildSpec:
        """What the supervisor runs."""
        ...


class IotcoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the embedded broker.

    It keeps the last messages of every topic filter that was ever subscribed to, read or not, until they make
    `segment_bytes_max * segments_max`: memory is bounded by that times the number of filters, and a reader that falls
    further behind misses messages without a sign. One filter `hw/v1/up/+/+/+` therefore costs a 64th of one per shard.
    """

    payload_bytes_max: int = DEFAULT_LIMITS.payload_bytes_max
    """A larger packet closes the connection it comes from."""
    connections_max: int = 10_010
    segment_bytes_max: int = 8 * 1024 * 1024
    segments_max: int = 4
    inflight_max: int = 500


class Iotcore:
    """The embedded broker, rumqttd inside a Python process: loopback only, no access control, forgets all at its end.

    Args:
        folder: where its configuration is written.
        log: where its output goes.
        ports: what was claimed for `PORTS`.
        settings: its bounds.

    Raises:
        ProgramMissing: when the package `iotcore` is not installed.
    """

    PORTS: ClassVar[dict[str, int | None]] = {"mqtt": 1883, "mqtt311": 1884}
    # It serves MQTT 5 and 3.1.1 on separate ports; the usual one goes to 5, which Headwater speaks.

    def __init__(
        self, folder: Path, *, log: Path, ports: Mapping[str, int], settings: IotcoreSettings | None = None
    ) -> None:
        if find_spec("iotcore") is None:
            raise ProgramMissing("the embedded broker is not installed; run: pip install 'headwater[simulators]'")
        self._config = folder.absolute() / "iotcore.toml"
        self._log = log
        self._ports = dict(ports)
        self._settings = settings or IotcoreSettings()

    @property
    def url(self) -> str:
        """Where MQTT 5 clients connect."""
        return f"mqtt://{HOST}:{self._ports['mqtt']}"

    @property
    def url_mqtt311(self) -> str:
        """Where MQTT 3.1.1 clients connect."""
        return f"mqtt://{HOST}:{self._ports['mqtt311']}"

    def spec(self) -> ChildSpec:
        """What the supervisor runs."""
        return ChildSpec(
            name="broker",
            # -P: a folder of that name where the stack was started must not be taken for the package.
            argv=(sys.executable, "-P", "-m", "iotcore", "--config", str(self._config), "--log-level", "CRITICAL"),
            log=self._log,
            cwd=self._config.parent,
            tier=TIER,
            prepare=lambda: write_whole(self._config, self.config().encode(), 0o644),
            ready=MqttProbe(host=HOST, port=self._ports["mqtt"]),
            # A topic that begins with a non-ASCII letter, or a damaged packet, can end one of its threads; the process
            # lives on and serves nobody. It says so on its output, long before a probe would notice.
            fatal_output=b" panicked at ",
            policy=POLICY,
            open_files_max=2 * self._settings.connections_max,
        )

    def config(self) -> str:
        """Its configuration file, TOML."""
        settings = self._settings
        lines = [
            "id = 0",
            "[router]",
            "id = 0",
            f"max_connections = {settings.connections_max}",
            "max_outgoing_packet_count = 200",
            f"max_segment_size = {settings.segment_bytes_max}",
            f"max_segment_count = {settings.segments_max}",
        ]
        for table, port in (("v5", self._ports["mqtt"]), ("v4", self._ports["mqtt311"])):
            lines += [
                f"[{table}.1]",
                f'name = "{table}"',
                f'listen = "{HOST}:{port}"',
                "next_connection_delay_ms = 1",
                f"[{table}.1.connections]",
                "connection_timeout_ms = 60000",
                f"max_payload_size = {settings.payload_bytes_max + PACKET_SPARE_BYTES}",
                f"max_inflight_count = {settings.inflight_max}",
                "dynamic_filters = true",
            ]
        return "\n".join(lines) + "\n"


class MosquittoTls(msgspec.Struct, frozen=True, kw_only=True):
    """Files for a TLS listener, PEM."""

    certificate: Path
    key: Path
    ca: Path
    """Signs the clients' certificates, and the broker's own, so that the stack can check that it is ready."""
    require_certificate: bool = True
    """A client must show a certificate; its CN becomes the user name that the ACL file speaks of."""


class MosquittoSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and access rules of mosquitto.

    For a reader that does not read, it holds at most about two times `inflight_bytes_max` plus `queued_bytes_max`, then
    drops. Both bounds are needed: one alone, or numbers of messages alone, leave it growing.
    """

    payload_bytes_max: int = DEFAULT_LIMITS.payload_bytes_max
    inflight_messages_max: int = 1_000
    inflight_bytes_max: int = 64 * 1024 * 1024
    queued_messages_max: int = 10_000
    queued_bytes_max: int = 64 * 1024 * 1024
    durable: bool = False
    """Save sessions, retained and queued messages after every change, so that a kill loses only those of the last
    moment: a PUBACK may be up to 0.1 s ahead of the disk. For foreign devices that count on their PUBACK. The whole
    database is written each time: with 200 MB queued for a client that is away, 8 messages of 1 MB a second were left
    of 2,000."""
    password_file: Path | None = None
    acl_file: Path | None = None
    tls: MosquittoTls | None = None
    username: str | None = None
    password: str | None = None
    """Who the stack is when it asks whether the broker is ready; needed where `password_file` is set."""


class Mosquitto:
    """Eclipse mosquitto as a child process, on loopback, MQTT 5 and 3.1.1 on one port.

    Args:
        folder: where its configuration and database are.
        log: where its output goes.
        ports: what was claimed for `PORTS`.
        settings: bounds and access rules.

    Raises:
        ProgramMissing: when mosquitto is not installed.
        ConfigurationError: when settings contradict each other.
    """

    PORTS: ClassVar[dict[str, int | None]] = {"mqtt": 1883}

    def __init__(
        self, folder: Path, *, log: Path, ports: Mapping[str, int], settings: MosquittoSettings | None = None
    ) -> None:
        self._program = find_mosquitto()
        self._folder = folder.absolute()
        self._log = log
        self._port = ports["mqtt"]
        self._settings = settings or MosquittoSettings()
        if self._settings.password_file is not None and self._settings.username is None:
            raise ConfigurationError(
                "mosquitto has a password_file but the stack has no username to ask it whether it is ready; set one"
            )

    @property
    def url(self) -> str:
        """Where MQTT clients connect."""
        return f"{'mqtts' if self._settings.tls else 'mqtt'}://{HOST}:{self._port}"

    @property
    def url_mqtt311(self) -> str:
        """The same: mosquitto tells the versions apart by itself."""
        return self.url

    def spec(self) -> ChildSpec:
        """What the supervisor runs."""
        settings = self._settings
        config = self._folder / "mosquitto.conf"
        probe = MqttProbe(
            host=HOST,
            port=self._port,
            username=settings.username,
            password=settings.password,
            ca_file=str(settings.tls.ca) if settings.tls else None,
        )
        return ChildSpec(
            name="broker",
            argv=(self._program, "-c", str(config)),
            log=self._log,
            cwd=self._folder,
            tier=TIER,
            prepare=lambda: write_whole(config, self.config().encode(), 0o600),
            ready=probe,
            policy=POLICY,
            open_files_max=20_000,
        )

    def config(self) -> str:
        """Its configuration file."""
        settings = self._settings
        lines = [
            # As root it would become the user `mosquitto`, who may not read this folder; and a process that changes its
            # user is no longer ended with its parent.
            f"user {_user()}",
            "per_listener_settings false",
            f"persistence {'true' if settings.durable else 'false'}",
            f"max_packet_size {settings.payload_bytes_max + PACKET_SPARE_BYTES}",
            f"max_inflight_messages {settings.inflight_messages_max}",
            f"max_inflight_bytes {settings.inflight_bytes_max}",
            f"max_queued_messages {settings.queued_messages_max}",
            f"max_queued_bytes {settings.queued_bytes_max}",
            "set_tcp_nodelay true",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "connection_messages false",
            f"allow_anonymous {'false' if settings.password_file else 'true'}",
        ]
        if settings.durable:
            lines += [f"persistence_location {self._folder}/", "autosave_on_changes true", "autosave_interval 1"]
        if settings.password_file is not None:
            lines.append(f"password_file {settings.password_file}")
        if settings.acl_file is not None:
            lines.append(f"acl_file {settings.acl_file}")
        lines.append(f"listener {self._port} {HOST}")
        if (tls := settings.tls) is not None:
            lines += [
                f"cafile {tls.ca}",
                f"certfile {tls.certificate}",
                f"keyfile {tls.key}",
                "tls_version tlsv1.2",
                f"require_certificate {'true' if tls.require_certificate else 'false'}",
                f"use_identity_as_username {'true' if tls.require_certificate else 'false'}",
            ]
        return "\n".join(lines) + "\n"


def find_mosquitto() -> str:
    """The path of the mosquitto program.

    Raises:
        ProgramMissing: when it is not installed.
    """
    # Debian puts it where only root's PATH leads.
    found = shutil.which(
        "mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    )
    if found is None:
        raise ProgramMissing("mosquitto is not installed; run: apt-get install mosquitto")
    return found


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        # A user without a name, as in some containers, is not root; mosquitto then ignores the setting.
        return "root"
