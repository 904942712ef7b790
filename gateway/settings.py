"""What a gateway is told in its `gateway.toml`: parsed and checked once at the rim, frozen, handed in.

Every key and its meaning for people: `docs/gateway.md`. Paths are relative to the folder of the file.
"""

from __future__ import annotations

import ipaddress
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec

from contract import topics
from contract.errors import ConfigurationError
from contract.limits import SHARDS, Limits

_MIB = 1024 * 1024
_DAY_S = 86_400.0
UP_FILTER_ALL = f"{topics.ROOT}/up/+/+/+"
"""One subscription instead of 64, where one gateway owns every shard."""
_REPLICA = re.compile(r"([0-9]{1,2})/([0-9]{1,2})", re.ASCII)


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: unknown keys are refused."""


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
        tls = parts.scheme == "mqtts"
        return cls(parts.hostname, port or (8883 if tls else 1883), tls)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


class BrokerSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is, and how to prove who we are."""

    url: str
    """`mqtt://host[:1883]` or `mqtts://host[:8883]`. MQTT 5."""
    client_id_prefix: str = "headwater-gateway"
    """Each connection adds its replica, a random part and its role: two gateways never throw each other out."""
    username: str = ""
    password_file: str = ""
    """Read again at each connection attempt, so that a new password needs no restart."""
    ca_file: str = ""
    """Certificates that may have signed the broker's; empty takes those of the system."""
    cert_file: str = ""
    key_file: str = ""
    keepalive_s: int = 30
    connect_timeout_s: float = 10.0
    reconnect_base_s: float = 0.5
    reconnect_max_s: float = 15.0
    """Ceiling of the wait between attempts; each is drawn evenly from 0 to the present ceiling."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        address = BrokerAddress.parse(self.url)
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.client_id_prefix):
            raise ValueError(
                f"client_id_prefix = {self.client_id_prefix!r} is not allowed; use 1 to 64 of A-Z a-z 0-9 . _ -"
            )
        _check_range("keepalive_s", self.keepalive_s, 5, 3600)
        _check_range("connect_timeout_s", self.connect_timeout_s, 0.5, 120)
        _check_range("reconnect_base_s", self.reconnect_base_s, 0.01, 60)
        _check_range("reconnect_max_s", self.reconnect_max_s, self.reconnect_base_s, 3600)
        if self.password_file and not self.username:
            raise ValueError(f"password_file = {self.password_file!r} stands without a username; add username")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError(f"cert_file = {self.cert_file!r} and key_file = {self.key_file!r}; give both, or neither")
        if not address.tls and (self.ca_file or self.cert_file):
            raise ValueError(f"url = {self.url!r} is without TLS, but ca_file or cert_file is given; write mqtts://")


class LakeSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the lake is. Keys come from the `AWS_…` environment, or from a file that may change while we run."""

    url: str
    """`file:///folder` or `s3://bucket/prefix`."""
    endpoint: str = ""
    """`http(s)://host:port` of an S3-compatible server; empty: AWS_ENDPOINT_URL, else Amazon's."""
    region: str = ""
    """Empty: AWS_REGION, else us-east-1."""
    allow_http: bool = False
    """Whether the endpoint may be plain http."""
    credentials_file: str = ""
    """TOML with `access_key`, `secret_key` and perhaps `session_token`; read again when it changes."""
    timeout_s: float = 30.0
    """Longest time one request may take, its retries included."""
    connect_timeout_s: float = 5.0
    fsync: bool = True
    """file:// only: whether a commit waits for the disk."""

    def __post_init__(self) -> None:
        """Refuse what cannot work; the rest is checked by `lake.store.StoreSettings`."""
        if self.credentials_file and not self.url.startswith("s3:"):
            raise ValueError(f"credentials_file is given, but url = {self.url!r} needs none; remove it")


class HttpSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP API. It has no access control of its own."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes any free port (logged as `http_listening`)."""
    allow_remote_http: bool = False
    """Whoever reaches the port can read and configure devices. True only behind a proxy or a network that checks."""

    def __post_init__(self) -> None:
        """Refuse an open door that was not asked for."""
        _check_range("port", self.port, 0, 65_535)
        if not self.allow_remote_http and not _is_loopback(self.host):
            raise ValueError(
                f"host = {self.host!r} is reachable from other machines, and the HTTP API asks nobody who they are; "
                'keep host = "127.0.0.1" behind a proxy that checks, or set allow_remote_http = true'
            )


class RegistrySettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The register of devices."""

    devices_max: int = 100_000
    """Devices in memory; beyond, the one seen longest ago is left out of the view (its rows stay in the lake)."""
    write_interval_s: float = 3.0
    """How often changes are written to control/devices."""
    refresh_interval_s: float = 15.0
    """How often control/devices is read for what other gateways wrote."""
    queued_rows_max: int = 10_000
    """Changes waiting to be written; more are dropped and counted. Desired documents never wait here."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        _check_range("devices_max", self.devices_max, 1, 10_000_000)
        _check_range("write_interval_s", self.write_interval_s, 0.1, 3600)
        _check_range("refresh_interval_s", self.refresh_interval_s, 0.1, 3600)
        _check_range("queued_rows_max", self.queued_rows_max, 1, 1_000_000)


class LogSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs, on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class LimitSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one payload may be: the protocol's own numbers, or lower."""

    payload_bytes_max: int = Limits().payload_bytes_max
    body_bytes_max: int = Limits().body_bytes_max
    rows_max: int = Limits().rows_max
    fields_max: int = Limits().fields_max

    def __post_init__(self) -> None:
        """Refuse what `contract.limits.Limits` refuses."""
        self.limits()

    def limits(self) -> Limits:
        """The same for the codec."""
        return Limits(**msgspec.structs.asdict(self))


class GatewaySettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything."""

    broker: BrokerSettings
    lake: LakeSettings
    replica: str = "0/1"
    """`i/N`: of N gateways this is number i (from 0); it owns the shards with `shard % N == i`."""
    flush_interval_s: float = 1.0
    """A batch waits at most this long before its commit begins."""
    flush_bytes: int = 16 * _MIB
    """A stream with this much pending is committed at once."""
    flush_workers: int = 2
    """Streams committed at the same time."""
    memory_bytes_max: int = 256 * _MIB
    """Batches between broker and lake, packed and unpacked; beyond, batches are shed and devices keep them."""
    quarantine_bytes_max: int = 32 * _MIB
    """Refused payloads waiting to be written to inbox/quarantine; beyond, they are dropped and counted."""
    streams_max: int = 1_000
    """Streams in memory; beyond, an idle one is forgotten, and where none is idle new streams are shed."""
    lanes_max: int = 100_000
    """(device, epoch)s remembered per stream; a forgotten one costs a look-up in the table."""
    max_clock_skew_s: float = 31 * _DAY_S
    """A `ts` further than this from its arrival is kept, but stands under the date of its arrival."""
    drain_timeout_s: float = 20.0
    """How long a stopping gateway goes on committing what it holds."""
    unready_after_s: float = 10.0
    """After so long without a lake that answers, or a broker, `/readyz` says no."""
    stuck_after_s: float = 600.0
    """A thread that made no progress for so long ends the process: it holds nothing that matters, and starts afresh."""
    limits: LimitSettings = msgspec.field(default_factory=LimitSettings)
    http: HttpSettings = msgspec.field(default_factory=HttpSettings)
    registry: RegistrySettings = msgspec.field(default_factory=RegistrySettings)
    log: LogSettings = msgspec.field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _replica(self.replica)
        _check_range("flush_interval_s", self.flush_interval_s, 0.01, 600)
        _check_range("flush_bytes", self.flush_bytes, 64 * 1024, 2**34)
        _check_range("flush_workers", self.flush_workers, 1, 64)
        _check_range("streams_max", self.streams_max, 1, 100_000)
        _check_range("lanes_max", self.lanes_max, 1, 10_000_000)
        _check_range("max_clock_skew_s", self.max_clock_skew_s, 1, 36_500 * _DAY_S)
        _check_range("drain_timeout_s", self.drain_timeout_s, 0, 600)
        _check_range("unready_after_s", self.unready_after_s, 0.1, 3600)
        _check_range("stuck_after_s", self.stuck_after_s, 10, 86_400)
        least = 2 * (self.limits.payload_bytes_max + self.limits.body_bytes_max)
        if not least <= self.memory_bytes_max <= 2**40:
            raise ValueError(
                f"memory_bytes_max = {self.memory_bytes_max} is outside {least} .. {2**40}: two of the largest batches "
                "must fit; raise it, or lower payload_bytes_max and body_bytes_max in [limits]"
            )
        _check_range("quarantine_bytes_max", self.quarantine_bytes_max, 2 * self.limits.payload_bytes_max, 2**34)

    @property
    def replica_number(self) -> int:
        """Which of the gateways this is, from 0."""
        return _replica(self.replica)[0]

    @property
    def shards(self) -> tuple[int, ...]:
        """The shards this gateway owns."""
        index, count = _replica(self.replica)
        return tuple(shard for shard in range(SHARDS) if shard % count == index)

    @property
    def up_filters(self) -> tuple[str, ...]:
        """What to subscribe to for the batches of these shards."""
        if len(self.shards) == SHARDS:
            return (UP_FILTER_ALL,)
        return tuple(topics.up_filter(shard) for shard in self.shards)


def load_settings(path: Path) -> GatewaySettings:
    """Read and check a `gateway.toml`.

    Raises:
        ConfigurationError: naming the file, the key, its value, and what to write instead.
    """
    return parse_settings(read_toml(path, "a gateway.toml"), source=str(path), folder=path.resolve().parent)


def parse_settings(raw: Mapping[str, Any], *, source: str, folder: Path) -> GatewaySettings:
    """Check what stands in a `gateway.toml`.

    Args:
        raw: the parsed TOML.
        source: the file's name, for messages.
        folder: what relative paths are relative to.

    Raises:
        ConfigurationError: as `load_settings`.
    """
    settings = convert(raw, GatewaySettings, source)

    def absolute(text: str) -> str:
        return str(folder / Path(text).expanduser()) if text else ""

    files = ("password_file", "ca_file", "cert_file", "key_file")
    broker = msgspec.structs.replace(settings.broker, **{key: absolute(getattr(settings.broker, key)) for key in files})
    lake = msgspec.structs.replace(settings.lake, credentials_file=absolute(settings.lake.credentials_file))
    return msgspec.structs.replace(settings, broker=broker, lake=lake)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigurationError: naming the file and what is wrong with it.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); give the path of {what}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}; mend that line") from error


Table = TypeVar("Table", bound=msgspec.Struct)
_AT = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_SECRET = re.compile(r"pass|secret|token|credential|key", re.IGNORECASE)


def convert(raw: Mapping[str, Any], kind: type[Table], source: str) -> Table:
    """Check a parsed file against a struct.

    Raises:
        ConfigurationError: naming the file, the key, its value, and what to write instead.
    """
    try:
        return msgspec.convert(dict(raw), kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{source}: {_explained(str(error), raw, kind)}") from error


def _explained(message: str, raw: Mapping[str, Any], kind: type[msgspec.Struct]) -> str:
    """msgspec's message turned round: key and value first, then what is wrong, then what there is."""
    at = _AT.search(message)
    text = message[: at.start()] if at else message
    path = [part for part in at[1].split(".") if part] if at else []
    if found := _MISSING.match(text):
        return f"{_table(path)}{found[1]} is missing; add it"
    if found := _UNKNOWN.match(text):
        value = _shown(found[1], _value_at(raw, [*path, found[1]]))
        return f"{_table(path)}{found[1]} = {value} is an unknown key; remove it, or use one of: {_known(kind, path)}"
    value = _value_at(raw, path)
    if isinstance(value, Mapping):  # a rule over the whole table, which names its key itself
        return f"{_table(path)}{text}"
    return f"{_table(path[:-1])}{path[-1]} = {_shown(path[-1], value)}: {text}; correct it"


def _table(path: list[str]) -> str:
    return f"[{'.'.join(path)}] " if path else ""


def _known(kind: Any, path: list[str]) -> str:
    for name in path:
        kind = next(field.type for field in msgspec.structs.fields(kind) if field.encode_name == name)
    return ", ".join(field.encode_name for field in msgspec.structs.fields(kind))


def _value_at(raw: Any, path: list[str]) -> Any:
    for name in path:
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return raw


def _shown(name: str, value: Any) -> str:
    """A value for a message; what may be a secret stays unshown."""
    if _SECRET.search(name) and not name.endswith("_file") and not isinstance(value, bool | int | float):
        return "(not shown)"
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"


def _replica(text: str) -> tuple[int, int]:
    found = _REPLICA.fullmatch(text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 <= index < count <= SHARDS:
        raise ValueError(
            f'replica = {text!r} is not i/N with 0 <= i < N <= {SHARDS}; write "0/1" for a single gateway, '
            '"0/2" and "1/2" for two that share the work'
        )
    return index, count


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} = {value} is outside {low:g} .. {high:g}; choose a value in that range")
