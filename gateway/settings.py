"""What a gateway is told in its `gateway.toml`: parsed and checked once at the rim, frozen, handed in.

Every key and its meaning for people: `docs/gateway.md`. Paths are relative to the folder of the file.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from contract import topics
from contract.broker import BrokerAccess
from contract.limits import SHARDS, Limits
from contract.models import WINDOW_CELLS_MAX
from contract.settings import absolute, check_range, convert, read_toml

_MIB = 1024 * 1024
_DAY_S = 86_400.0
UP_FILTER_ALL = f"{topics.ROOT}/up/+/+/+"
"""One subscription instead of 64, where one gateway owns every shard."""
_REPLICA = re.compile(r"([0-9]{1,2})/([0-9]{1,2})", re.ASCII)


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: unknown keys are refused."""


class BrokerSettings(BrokerAccess, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is, and how the gateway proves there who it is. MQTT 5."""

    client_id_prefix: str = "headwater-gateway"
    """Each connection adds its replica, a random part and its role: two gateways never throw each other out."""
    reconnect_base_s: float = 0.5
    reconnect_max_s: float = 15.0
    """Ceiling of the wait between attempts; each is drawn evenly from 0 to the present ceiling."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.client_id_prefix):
            raise ValueError(
                f"client_id_prefix = {self.client_id_prefix!r} is not allowed; use 1 to 64 of A-Z a-z 0-9 . _ -"
            )
        check_range("reconnect_base_s", self.reconnect_base_s, 0.01, 60)
        check_range("reconnect_max_s", self.reconnect_max_s, self.reconnect_base_s, 3600)


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
        check_range("port", self.port, 0, 65_535)
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
        check_range("devices_max", self.devices_max, 1, 10_000_000)
        check_range("write_interval_s", self.write_interval_s, 0.1, 3600)
        check_range("refresh_interval_s", self.refresh_interval_s, 0.1, 3600)
        check_range("queued_rows_max", self.queued_rows_max, 1, 1_000_000)


class ModelsSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Releases and orders to devices."""

    online_key: str = ""
    """File: the key that signs orders (TUF role `timestamp`), PEM. Empty: this gateway signs and drives nothing. The
    trust anchor `root.json` is looked for beside it."""
    resign_interval_s: float = 15.0
    """How often it is looked for approvals to publish, and for signatures to renew at half of their time."""
    snapshot_days: float = 30.0
    timestamp_days: float = 7.0
    """So long devices believe what no gateway signs again."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_range("resign_interval_s", self.resign_interval_s, 0.1, 3600)
        check_range("snapshot_days", self.snapshot_days, 0.01, 3650)
        check_range("timestamp_days", self.timestamp_days, 0.01, 3650)


class RolloutSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rollout controller."""

    interval_s: float = 3.0
    """How often control/rollouts is read, and the devices are judged."""
    settle_s: float = 10.0
    """After a connection to the broker nothing is decided for so long: what devices had reported has yet to arrive."""
    republish_s: float = 30.0
    """A device that is online and has not read its order is told again after so long."""
    sweep_s: float = 60.0
    """How often all devices are looked at, whether they have news or not."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_range("interval_s", self.interval_s, 0.1, 600)
        check_range("settle_s", self.settle_s, 0, 600)
        check_range("republish_s", self.republish_s, 0.1, 86_400)
        check_range("sweep_s", self.sweep_s, 0.1, 3600)


class InferenceSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prediction over HTTP (`/v2`): what it may take of a process whose work is committing batches."""

    workers: int = 2
    """Threads that read, load and score; each run of a model takes one core."""
    requests_max: int = 8
    """Requests at work or waiting for a thread; more are told 503. Each may hold its body, twice while it is read."""
    timeout_s: float = 10.0
    """A request that takes longer is answered 504, and its model ended."""
    body_bytes_max: int = 16 * _MIB
    cells_max: int = WINDOW_CELLS_MAX
    """Values of one request, and of its answer."""
    batch_max: int = 4_096
    """Windows of one request."""
    models_max: int = 8
    """Models in memory; beyond, the one used longest ago is given up."""
    models_bytes_max: int = 256 * _MIB
    """Of their ONNX files; in memory a model takes two to four times as much."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_range("workers", self.workers, 1, 64)
        check_range("requests_max", self.requests_max, 1, 64)
        check_range("timeout_s", self.timeout_s, 0.1, 600)
        check_range("body_bytes_max", self.body_bytes_max, 1_024, 2**30)
        check_range("cells_max", self.cells_max, 1, 2**28)
        check_range("batch_max", self.batch_max, 1, 2**20)
        check_range("models_max", self.models_max, 1, 10_000)
        check_range("models_bytes_max", self.models_bytes_max, _MIB, 2**40)


class MonitoringSettings(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Releases at work: drift, alerts, requests to learn again."""

    interval_s: float = 60.0
    """How often new predictions are looked at; 0: never."""
    windows_min: int = 30
    """A device with fewer windows is not judged; of features, fewer windows that carry them."""
    windows_max: int = 300
    """The latest windows of a device that figures are of."""
    baseline_windows: int = 60
    """The first windows with features of a release on a device, from which a change is measured."""
    devices_max: int = 1_000
    """Releases on devices in memory, each with up to `windows_max` windows."""
    rows_max: int = 200_000
    """Predictions of one model that one look reads; older ones are skipped and counted."""
    accuracy_interval_s: float = 300.0
    """How often predictions are joined with labels that came late."""
    accuracy_hours: float = 168.0
    """So old predictions are still joined."""
    accuracy_rows_max: int = 500_000
    """Predictions of one model that are joined, the latest."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_range("interval_s", self.interval_s, 0, 86_400)
        check_range("windows_min", self.windows_min, 10, 100_000)
        check_range("windows_max", self.windows_max, self.windows_min, 100_000)
        check_range("baseline_windows", self.baseline_windows, 10, 100_000)
        check_range("devices_max", self.devices_max, 1, 1_000_000)
        check_range("rows_max", self.rows_max, 1_000, 10_000_000)
        check_range("accuracy_interval_s", self.accuracy_interval_s, 0.1, 86_400)
        check_range("accuracy_hours", self.accuracy_hours, 0.01, 87_600)
        check_range("accuracy_rows_max", self.accuracy_rows_max, 1_000, 100_000_000)


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
    models: ModelsSettings = msgspec.field(default_factory=ModelsSettings)
    rollouts: RolloutSettings = msgspec.field(default_factory=RolloutSettings)
    inference: InferenceSettings = msgspec.field(default_factory=InferenceSettings)
    monitoring: MonitoringSettings = msgspec.field(default_factory=MonitoringSettings)
    log: LogSettings = msgspec.field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _replica(self.replica)
        check_range("flush_interval_s", self.flush_interval_s, 0.01, 600)
        check_range("flush_bytes", self.flush_bytes, 64 * 1024, 2**34)
        check_range("flush_workers", self.flush_workers, 1, 64)
        check_range("streams_max", self.streams_max, 1, 100_000)
        check_range("lanes_max", self.lanes_max, 1, 10_000_000)
        check_range("max_clock_skew_s", self.max_clock_skew_s, 1, 36_500 * _DAY_S)
        check_range("drain_timeout_s", self.drain_timeout_s, 0, 600)
        check_range("unready_after_s", self.unready_after_s, 0.1, 3600)
        check_range("stuck_after_s", self.stuck_after_s, 10, 86_400)
        least = 2 * (self.limits.payload_bytes_max + self.limits.body_bytes_max)
        if not least <= self.memory_bytes_max <= 2**40:
            raise ValueError(
                f"memory_bytes_max = {self.memory_bytes_max} is outside {least} .. {2**40}: two of the largest batches "
                "must fit; raise it, or lower payload_bytes_max and body_bytes_max in [limits]"
            )
        check_range("quarantine_bytes_max", self.quarantine_bytes_max, 2 * self.limits.payload_bytes_max, 2**34)

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
    settings = convert(raw, GatewaySettings, f"{source}: ")

    files = ("password_file", "ca_file", "cert_file", "key_file")
    broker = msgspec.structs.replace(
        settings.broker, **{key: absolute(folder, getattr(settings.broker, key)) for key in files}
    )
    lake = msgspec.structs.replace(settings.lake, credentials_file=absolute(folder, settings.lake.credentials_file))
    models = msgspec.structs.replace(settings.models, online_key=absolute(folder, settings.models.online_key))
    return msgspec.structs.replace(settings, broker=broker, lake=lake, models=models)


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
