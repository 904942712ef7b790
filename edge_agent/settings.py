"""What an agent is told in its `agent.toml`: parsed and checked once at the rim, frozen, handed in.

Every key and its meaning for people: `docs/agent.md`. Paths are relative to the folder of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from contract.broker import BrokerAccess
from contract.desired import check_batch_age, check_batch_rows
from contract.errors import ConfigurationError
from contract.names import EVENTS_STREAM, PREDICTIONS_PREFIX, is_name
from contract.settings import absolute, check_range, convert, read_toml
from edge_agent.buffer.port import StreamCaps, WhenFull
from edge_agent.models.settings import ModelsSettings, resolved
from edge_agent.sampling.settings import Burst, Interval, OnChange, Sampling
from edge_agent.sender import SenderSettings
from edge_agent.sensors.registry import with_absolute_paths

Secret: TypeAlias = Callable[[], str | None]
"""Gives the password when it is needed. It is never part of the settings, so it cannot be logged with them."""

STREAMS_MAX = 256
TAGS_MAX = 32
_DAY_S = 86_400.0
_MIB = 1024 * 1024


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: unknown keys are refused."""


class BrokerSettings(BrokerAccess, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is, and how the device proves there who it is."""

    password_env: str = ""
    """Name of the environment variable that holds the password; read once at start."""
    protocol: Literal["5", "3.1.1", 5] = "5"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        super().__post_init__()
        if self.password_file and self.password_env:
            raise ValueError("password_file and password_env are both given; keep one")
        if self.password_env and not self.username:
            raise ValueError(f"password_env = {self.password_env!r} stands without a username; add username")

    @property
    def mqtt5(self) -> bool:
        """Whether MQTT 5 is spoken, not 3.1.1."""
        return self.protocol != "3.1.1"


class CapsSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of one stream the buffer holds, and what gives way then."""

    bytes_max: int = 256 * _MIB
    age_max_s: float = 30 * _DAY_S
    when_full: WhenFull = WhenFull.DROP_OLDEST
    thin_keep_every: int = 10

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_range("bytes_max", self.bytes_max, 64 * 1024, 2**50)
        check_range("age_max_s", self.age_max_s, 1, 100 * 365 * _DAY_S)
        check_range("thin_keep_every", self.thin_keep_every, 2, 1000)

    def caps(self) -> StreamCaps:
        """The same for the buffer."""
        return StreamCaps(
            bytes_max=self.bytes_max,
            age_max_s=self.age_max_s,
            when_full=self.when_full,
            thin_keep_every=self.thin_keep_every,
        )


class BufferSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where batches wait, and for how long."""

    path: str = "buffer.db"
    bytes_max: int = 1024 * _MIB
    """Bodies of all streams together."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_range("bytes_max", self.bytes_max, _MIB, 2**50)


class UplinkSettings(SenderSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How eagerly batches are sent, and how patiently a connection is sought."""

    reconnect_base_s: float = 1.0
    reconnect_max_s: float = 60.0
    """Ceiling of the wait between attempts; each is drawn evenly from 0 to the present ceiling."""
    drain_timeout_s: float = 10.0
    """How long a stopping agent goes on sending what it holds; what is left stays in the buffer."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_range("window_batches_max", self.window_batches_max, 1, 10_000)
        check_range("window_bytes_max", self.window_bytes_max, 64 * 1024, 256 * _MIB)
        check_range("backlog_share", self.backlog_share, 0.01, 1)
        check_range("ack_timeout_s", self.ack_timeout_s, 0.1, 3600)
        check_range("ack_timeout_max_s", self.ack_timeout_max_s, self.ack_timeout_s, 86_400)
        check_range("rewind_holdoff_s", self.rewind_holdoff_s, 0, 60)
        check_range("backlog_bytes_max", self.backlog_bytes_max, 64 * 1024, 2**50)
        check_range("reconnect_base_s", self.reconnect_base_s, 0.01, 60)
        check_range("reconnect_max_s", self.reconnect_max_s, self.reconnect_base_s, 3600)
        check_range("drain_timeout_s", self.drain_timeout_s, 0, 600)


class StreamSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stream: where its readings come from, which are kept, how they are batched and buffered."""

    driver: str
    options: dict[str, Any] = {}
    sampling: Sampling = msgspec.field(default_factory=Interval)
    enabled: bool = True
    max_batch_rows: int = 500
    max_batch_age_s: float = 5.0
    caps: CapsSettings = msgspec.field(default_factory=CapsSettings)

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_batch_rows(self.max_batch_rows)
        check_batch_age(self.max_batch_age_s)

    @property
    def rate_hz(self) -> float | None:
        """Polls per second; None where the driver sets the pace."""
        if isinstance(self.sampling, Interval | OnChange | Burst) and self.sampling.rate_hz:
            return self.sampling.rate_hz
        return None


class StatusSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The local status socket."""

    socket: str = "agent.sock"


class MetricsSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prometheus exposition over HTTP."""

    listen: str = ""
    """`127.0.0.1:9464`; empty for none: the status socket has them all the same."""

    def __post_init__(self) -> None:
        """Refuse what is not an address."""
        if self.listen:
            self.address()

    def address(self) -> tuple[str, int]:
        """Host and port.

        Raises:
            ValueError: naming the text and the form.
        """
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
            raise ValueError(f"listen = {self.listen!r} is not host:port; write 127.0.0.1:9464")
        return host.strip("[]"), int(port)


class LogSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs, on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class ClockSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the wall clock is believed."""

    assume_synced: bool = False
    """For clocks that are right but unknown to the kernel, such as PTP or GPS without its discipline."""


class AgentSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything."""

    device: str
    broker: BrokerSettings
    buffer: BufferSettings = msgspec.field(default_factory=BufferSettings)
    uplink: UplinkSettings = msgspec.field(default_factory=UplinkSettings)
    streams: dict[str, StreamSettings] = {}
    status: StatusSettings = msgspec.field(default_factory=StatusSettings)
    metrics: MetricsSettings = msgspec.field(default_factory=MetricsSettings)
    log: LogSettings = msgspec.field(default_factory=LogSettings)
    clock: ClockSettings = msgspec.field(default_factory=ClockSettings)
    models: ModelsSettings | None = None
    """None: no model runs here."""
    tags: tuple[str, ...] = ()
    """What the device is, such as `site-a`; rollouts may choose by it."""
    report_interval_s: float = 60.0
    """How often the reported state is published when nothing changed."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not is_name(self.device):
            raise ValueError(
                f"device = {self.device!r} is not a device name; use 1 to 63 of a-z 0-9 . _ - beginning with a letter "
                "or digit"
            )
        check_range("report_interval_s", self.report_interval_s, 1, 86_400)
        if len(self.tags) > TAGS_MAX or not all(is_name(tag) for tag in self.tags):
            raise ValueError(
                f"tags = {list(self.tags)[:TAGS_MAX]} are more than {TAGS_MAX}, or one is not 1 to 63 of a-z 0-9 . _ "
                "-; rename or remove it"
            )

    @property
    def remote_config_path(self) -> Path:
        """Where the desired document in force is kept: next to the buffer."""
        return Path(self.buffer.path).with_suffix(".desired.json")


def load_settings(path: Path) -> AgentSettings:
    """Read and check an `agent.toml`.

    Raises:
        ConfigurationError: naming the file, the key, its value, and what to write instead.
    """
    return parse_settings(read_toml(path, "an agent.toml"), source=str(path), folder=path.resolve().parent)


def parse_settings(raw: Mapping[str, Any], *, source: str, folder: Path) -> AgentSettings:
    """Check what stands in an `agent.toml`.

    Args:
        raw: the parsed TOML.
        source: the file's name, for messages.
        folder: what relative paths are relative to.

    Raises:
        ConfigurationError: as `load_settings`.
    """
    tables = dict(raw)
    streams_raw = tables.pop("streams", {})
    settings = convert(tables, AgentSettings, f"{source}: ")
    if not isinstance(streams_raw, dict) or not all(isinstance(table, dict) for table in streams_raw.values()):
        raise ConfigurationError(f"{source}: streams is not a table of tables; write [streams.NAME] for each stream")
    if len(streams_raw) > STREAMS_MAX:
        raise ConfigurationError(
            f"{source}: {len(streams_raw)} streams, more than {STREAMS_MAX}; put fields that belong together into one"
        )
    streams = {name: _stream(name, table, source, folder) for name, table in streams_raw.items()}
    return msgspec.structs.replace(_resolved(settings, folder), streams=streams)


def secret_from(settings: BrokerSettings, environment: Mapping[str, str]) -> Secret:
    """How to get the broker's password.

    Args:
        settings: name the file or the variable.
        environment: the process environment, read here and not again.

    Raises:
        ConfigurationError: the variable or the file is missing.
    """
    if settings.password_env:
        value = environment.get(settings.password_env)
        if value is None:
            raise ConfigurationError(
                f"[broker] password_env = {settings.password_env!r}: there is no such environment variable; set it"
            )
        return lambda: value
    if not settings.password_file:
        return lambda: None

    settings.read_password()
    return settings.read_password


def _stream(name: str, table: Mapping[str, Any], source: str, folder: Path) -> StreamSettings:
    where = f"[streams.{name}] "
    if not is_name(name):
        raise ConfigurationError(
            f"{source}: {where}is not a stream name; use 1 to 63 of a-z 0-9 . _ - beginning with a letter or digit"
        )
    for reserved in (EVENTS_STREAM.partition(".")[0] + ".", PREDICTIONS_PREFIX):
        if name.startswith(reserved):
            raise ConfigurationError(f"{source}: {where}begins with {reserved!r}, which is reserved; rename the stream")
    completed = dict(table)
    sampling = completed.get("sampling")
    if isinstance(sampling, dict):
        completed["sampling"] = {"mode": "interval"} | sampling
    stream = convert(completed, StreamSettings, f"{source}: {where}")
    return msgspec.structs.replace(stream, options=with_absolute_paths(stream.driver, stream.options, folder))


def _resolved(settings: AgentSettings, folder: Path) -> AgentSettings:
    """The same with absolute paths."""

    broker = settings.broker
    return msgspec.structs.replace(
        settings,
        broker=msgspec.structs.replace(
            broker,
            password_file=absolute(folder, broker.password_file),
            ca_file=absolute(folder, broker.ca_file),
            cert_file=absolute(folder, broker.cert_file),
            key_file=absolute(folder, broker.key_file),
        ),
        buffer=msgspec.structs.replace(settings.buffer, path=absolute(folder, settings.buffer.path)),
        status=msgspec.structs.replace(settings.status, socket=absolute(folder, settings.status.socket)),
        models=None if settings.models is None else resolved(settings.models, folder),
    )
