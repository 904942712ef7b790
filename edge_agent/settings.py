"""What an agent is told in its `agent.toml`: parsed and checked once at the rim, frozen, handed in.

Every key and its meaning for people: `docs/agent.md`. Paths are relative to the folder of the file.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec

from contract.errors import ConfigurationError
from contract.limits import DEFAULT_LIMITS
from contract.names import EVENTS_STREAM, is_name
from edge_agent.buffer.port import StreamCaps, WhenFull
from edge_agent.sampling.settings import Burst, Interval, OnChange, Sampling
from edge_agent.sender import SenderSettings

Secret: TypeAlias = Callable[[], str | None]
"""Gives the password when it is needed. It is never part of the settings, so it cannot be logged with them."""

STREAMS_MAX = 256
BATCH_AGE_S_MIN, BATCH_AGE_S_MAX = 0.05, 3600.0
_DAY_S = 86_400.0
_MIB = 1024 * 1024


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: unknown keys are refused."""


class BrokerSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is, and how to prove who we are."""

    url: str
    """`mqtt://host[:1883]` or `mqtts://host[:8883]`."""
    username: str = ""
    password_file: str = ""
    """Read again at each connection attempt, so that a new password needs no restart."""
    password_env: str = ""
    """Name of the environment variable that holds the password; read once at start."""
    ca_file: str = ""
    """Certificates that may have signed the broker's; empty takes those of the system."""
    cert_file: str = ""
    key_file: str = ""
    protocol: Literal["5", "3.1.1", 5] = "5"
    keepalive_s: int = 30
    connect_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        address = BrokerAddress.parse(self.url)
        _check_range("keepalive_s", self.keepalive_s, 5, 3600)
        _check_range("connect_timeout_s", self.connect_timeout_s, 1, 120)
        if self.password_file and self.password_env:
            raise ValueError("password_file and password_env are both given; keep one")
        if (self.password_file or self.password_env) and not self.username:
            raise ValueError("there is a password, but no username; add username")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError(f"cert_file = {self.cert_file!r} and key_file = {self.key_file!r}; give both, or neither")
        if not address.tls and (self.ca_file or self.cert_file):
            raise ValueError(f"url = {self.url!r} is without TLS, but ca_file or cert_file is given; write mqtts://")

    @property
    def mqtt5(self) -> bool:
        """Whether MQTT 5 is spoken, not 3.1.1."""
        return self.protocol != "3.1.1"


class BrokerAddress(NamedTuple):
    """A broker's URL, taken apart."""

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Read `mqtt://host[:port]` or `mqtts://host[:port]`.

        Raises:
            ValueError: naming the URL and the form.
        """
        form = "write mqtt://host:1883 or mqtts://host:8883"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"url = {url!r}: {error}; {form}") from error
        if parts.username is not None or parts.password is not None:
            # Not shown: it holds a secret.
            raise ValueError("url carries a username or password; use username and password_file")
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError(f"url = {url!r} is not the address of a broker; {form}")
        try:
            parts.hostname.encode("idna")
        except UnicodeError as error:
            raise ValueError(f"url = {url!r}: the host's name is not one; {form}") from error
        tls = parts.scheme == "mqtts"
        return cls(parts.hostname, port or (8883 if tls else 1883), tls)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


class CapsSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of one stream the buffer holds, and what gives way then."""

    bytes_max: int = 256 * _MIB
    age_max_s: float = 30 * _DAY_S
    when_full: WhenFull = WhenFull.DROP_OLDEST
    thin_keep_every: int = 10

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        _check_range("bytes_max", self.bytes_max, 64 * 1024, 2**50)
        _check_range("age_max_s", self.age_max_s, 1, 100 * 365 * _DAY_S)
        _check_range("thin_keep_every", self.thin_keep_every, 2, 1000)

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
        _check_range("bytes_max", self.bytes_max, _MIB, 2**50)


class UplinkSettings(SenderSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How eagerly batches are sent, and how patiently a connection is sought."""

    reconnect_base_s: float = 1.0
    reconnect_max_s: float = 60.0
    """Ceiling of the wait between attempts; each is drawn evenly from 0 to the present ceiling."""
    drain_timeout_s: float = 10.0
    """How long a stopping agent goes on sending what it holds; what is left stays in the buffer."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        _check_range("window_batches_max", self.window_batches_max, 1, 10_000)
        _check_range("window_bytes_max", self.window_bytes_max, 64 * 1024, 256 * _MIB)
        _check_range("backlog_share", self.backlog_share, 0.01, 1)
        _check_range("ack_timeout_s", self.ack_timeout_s, 0.1, 3600)
        _check_range("ack_timeout_max_s", self.ack_timeout_max_s, self.ack_timeout_s, 86_400)
        _check_range("rewind_holdoff_s", self.rewind_holdoff_s, 0, 60)
        _check_range("backlog_bytes_max", self.backlog_bytes_max, 64 * 1024, 2**50)
        _check_range("reconnect_base_s", self.reconnect_base_s, 0.01, 60)
        _check_range("reconnect_max_s", self.reconnect_max_s, self.reconnect_base_s, 3600)
        _check_range("drain_timeout_s", self.drain_timeout_s, 0, 600)


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
    report_interval_s: float = 60.0
    """How often the reported state is published when nothing changed."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not is_name(self.device):
            raise ValueError(
                f"device = {self.device!r} is not a device name; use 1 to 63 of a-z 0-9 . _ - beginning with a letter "
                "or digit"
            )
        _check_range("report_interval_s", self.report_interval_s, 1, 86_400)

    @property
    def remote_config_path(self) -> Path:
        """Where the desired document in force is kept: next to the buffer."""
        return Path(self.buffer.path).with_suffix(".desired.json")


def check_batch_rows(rows: int) -> None:
    """Accept a batch size.

    Raises:
        ValueError: naming the value and the range.
    """
    _check_range("max_batch_rows", rows, 1, DEFAULT_LIMITS.rows_max)


def check_batch_age(age_s: float) -> None:
    """Accept a batch age.

    Raises:
        ValueError: naming the value and the range.
    """
    _check_range("max_batch_age_s", age_s, BATCH_AGE_S_MIN, BATCH_AGE_S_MAX)


def load_settings(path: Path) -> AgentSettings:
    """Read and check an `agent.toml`.

    Raises:
        ConfigurationError: naming the file, the key, its value, and what to write instead.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); give the path of an agent.toml") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}; mend that line") from error
    return parse_settings(raw, source=str(path), folder=path.resolve().parent)


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
    settings = _convert(tables, AgentSettings, f"{source}: ", "")
    if not isinstance(streams_raw, dict) or not all(isinstance(table, dict) for table in streams_raw.values()):
        raise ConfigurationError(f"{source}: streams is not a table of tables; write [streams.NAME] for each stream")
    if len(streams_raw) > STREAMS_MAX:
        raise ConfigurationError(
            f"{source}: {len(streams_raw)} streams, more than {STREAMS_MAX}; put fields that belong together into one"
        )
    streams = {name: _stream(name, table, source) for name, table in streams_raw.items()}
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

    def read() -> str:
        try:
            return Path(settings.password_file).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"[broker] password_file = {settings.password_file!r} cannot be read ({error}); "
                "write the password into it, readable for the agent's user"
            ) from error

    read()
    return read


def _stream(name: str, table: Mapping[str, Any], source: str) -> StreamSettings:
    where = f"[streams.{name}] "
    if not is_name(name):
        raise ConfigurationError(
            f"{source}: {where}is not a stream name; use 1 to 63 of a-z 0-9 . _ - beginning with a letter or digit"
        )
    if name.startswith(EVENTS_STREAM.partition(".")[0] + "."):
        raise ConfigurationError(f"{source}: {where}begins with 'headwater.', which is reserved; rename the stream")
    completed = dict(table)
    sampling = completed.get("sampling")
    if isinstance(sampling, dict):
        completed["sampling"] = {"mode": "interval"} | sampling
    return _convert(completed, StreamSettings, f"{source}: {where}", f"streams.{name}")


def _resolved(settings: AgentSettings, folder: Path) -> AgentSettings:
    """The same with absolute paths."""

    def absolute(text: str) -> str:
        return str(folder / Path(text).expanduser()) if text else ""

    broker = settings.broker
    return msgspec.structs.replace(
        settings,
        broker=msgspec.structs.replace(
            broker,
            password_file=absolute(broker.password_file),
            ca_file=absolute(broker.ca_file),
            cert_file=absolute(broker.cert_file),
            key_file=absolute(broker.key_file),
        ),
        buffer=msgspec.structs.replace(settings.buffer, path=absolute(settings.buffer.path)),
        status=msgspec.structs.replace(settings.status, socket=absolute(settings.status.socket)),
    )


Table = TypeVar("Table", bound=msgspec.Struct)
_AT = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_SECRET = re.compile(r"pass|secret|token|credential", re.IGNORECASE)
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


def _convert(table: Mapping[str, Any], kind: type[Table], prefix: str, base: str) -> Table:
    try:
        return msgspec.convert(dict(table), kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(prefix + _explained(str(error), table, kind)) from error


def _explained(message: str, table: Mapping[str, Any], kind: type[msgspec.Struct]) -> str:
    """msgspec's message turned round: key and value first, then what is wrong, then what there is."""
    at = _AT.search(message)
    text = message[: at.start()] if at else message
    path = [part for part in at[1].split(".") if part] if at else []
    unknown, missing = _UNKNOWN.match(text), _MISSING.match(text)
    if unknown or missing:
        name = (unknown or missing)[1]  # type: ignore[index]
        where = f"[{'.'.join(path)}] " if path else ""
        if missing:
            return f"{where}{name} is missing; add it"
        value = _shown(name, _value_at(table, [*path, name]))
        return f"{where}{name} = {value} is an unknown key; remove it, or use one of: {_known_keys(kind, path)}"
    if not path:
        return text
    value = _value_at(table, path)
    if isinstance(value, Mapping):  # a rule over the whole table, which names the key itself
        return f"[{'.'.join(path)}] {text}"
    where = f"[{'.'.join(path[:-1])}] " if path[:-1] else ""
    return f"{where}{path[-1]} = {_shown(path[-1], value)}: {text}; correct it"


def _known_keys(kind: Any, path: list[str]) -> str:
    """Names of the keys of the table at `path`."""
    for name in path:
        kind = get_type_hints(kind).get(name) if isinstance(kind, type) else None
    kinds = get_args(kind) or (kind,)
    structs = [each for each in kinds if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    return ", ".join(dict.fromkeys(field.encode_name for each in structs for field in msgspec.structs.fields(each)))


def _value_at(table: Any, path: list[str]) -> Any:
    for name in path:
        table = table.get(name) if isinstance(table, Mapping) else None
    return table


def _shown(name: str, value: Any) -> str:
    """A value for a message; what may be a secret under a wrong name stays unshown."""
    if _SECRET.search(name) and not isinstance(value, bool | int | float):
        return "(not shown)"
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} = {value} is outside {low:g} .. {high:g}; choose a value in that range")
