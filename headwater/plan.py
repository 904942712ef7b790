"""What a one-machine stack consists of, as values: the devices, their streams, and the configuration of each process.

Pure but for `write_recordings`, which puts the real recordings where agents can replay them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from contract.errors import ConfigurationError
from contract.names import is_name

DEVICES_MAX = 200
"""Each is a process of its own, of about 70 MB."""
WATCH, SYNTHETIC = "watch", "synthetic"
SYNTHETIC_RATE_HZ = 50.0
SYNTHETIC_POLL_HZ = 5.0
DRAIN_S = 10.0
"""How long a stopping agent goes on sending."""
GATEWAY_DRAIN_S = 20.0


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options that `up` and `demo` share."""

    data: Path
    devices: int = 8
    recordings: str = WATCH
    """`watch`, `synthetic` or the path of a CSV or Parquet file."""
    speed: float = 1.0
    broker: str = "embedded"
    """`embedded`, `mosquitto`, `mqtt://…` or `mqtts://…`."""
    lake: str = "embedded"
    """`embedded`, `file:///…` or `s3://…`."""
    port: int | None = None
    """Of the gateway's HTTP: this one or none; 0: a free one; None: the usual one, else the one of last time or another
    that is free."""
    seconds: float | None = None
    """How long to run, above 0; None: until told to stop."""
    models: bool = True
    """Whether devices may be given models: release keys are made, and the gateway signs orders."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything starts."""
        if not 1 <= self.devices <= DEVICES_MAX:
            raise ConfigurationError(
                f"--devices {self.devices} is outside 1..{DEVICES_MAX}, for each is a process; "
                "for more use: headwater simulate swarm"
            )
        if not 0 < self.speed <= 1000:
            raise ConfigurationError(f"--speed {self.speed:g} is outside 0..1000; 1 is as recorded, 2 twice as fast")
        if self.broker not in ("embedded", "mosquitto") and not re.match(r"mqtts?://", self.broker):
            raise ConfigurationError(
                f"--broker {self.broker!r} is none of embedded, mosquitto, mqtt://host:1883, mqtts://host:8883"
            )
        if self.lake != "embedded" and not re.match(r"(file|s3)://", self.lake):
            raise ConfigurationError(f"--lake {self.lake!r} is none of embedded, file:///folder, s3://bucket/prefix")
        if self.port is not None and not 0 <= self.port <= 65_535:
            raise ConfigurationError(f"--port {self.port} is outside 0..65535; 0 takes a free one")
        if self.recordings not in (WATCH, SYNTHETIC) and not Path(self.recordings).expanduser().is_file():
            raise ConfigurationError(
                f"--recordings {self.recordings!r} is neither watch nor synthetic, and there is no such file"
            )


class DevicePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One device and its streams, as they stand in its agent.toml."""

    name: str
    streams: Mapping[str, Mapping[str, Any]]
    recording: str = ""
    """Which recording it replays, where it does."""


def plan_devices(options: UpOptions, recordings: Path) -> list[DevicePlan]:
    """The devices of a stack.

    Args:
        options: how many, and what they replay.
        recordings: folder in which `write_recordings` puts what they need.
    """
    if options.recordings == WATCH:
        return [_watch_device(name, number, options, recordings) for number, name in _watch_names(options.devices)]
    if options.recordings == SYNTHETIC:
        return [_synthetic_device(number, options.speed) for number in range(1, options.devices + 1)]
    path = Path(options.recordings).expanduser().absolute()
    replayed = replay_options(path, float(options.speed))
    return [_file_device(number, path, replayed) for number in range(1, options.devices + 1)]


def _watch_names(count: int) -> list[tuple[int, str]]:
    """Persons and sides in an order that mixes both; from the 21st on the same again, as further devices."""
    known = [f"watch-s{subject:02}-{side}" for subject in range(1, 11) for side in "lr"]
    return [(1 + number // len(known), known[number % len(known)]) for number in range(count)]


def _watch_device(name: str, copy: int, options: UpOptions, recordings: Path) -> DevicePlan:
    replay = {"loop": True, "speed": float(options.speed)}
    return DevicePlan(
        name=name if copy == 1 else f"{name}-{copy}",
        recording=name,
        streams={
            "watch": {
                "driver": "replay",
                "sampling": {"mode": "stream"},
                "max_batch_rows": 500,
                "max_batch_age_s": 1.0,
                "options": {"path": str(watch_path(recordings, name)), **replay},
            },
            # The label of every row is read, and reported only when it changes.
            "exercise": {
                "driver": "replay",
                "sampling": {"mode": "on_change", "rate_hz": 0, "max_silence_s": 0.0},
                "max_batch_rows": 500,
                "max_batch_age_s": 1.0,
                "options": {"path": str(labels_path(recordings, name)), **replay},
            },
        },
    )


def _synthetic_device(number: int, speed: float) -> DevicePlan:
    return DevicePlan(
        name=f"machine-{number:03}",
        streams={
            "machine": {
                "driver": "callable",
                "sampling": {"mode": "interval", "rate_hz": SYNTHETIC_POLL_HZ},
                "max_batch_rows": 500,
                "max_batch_age_s": 1.0,
                "options": {
                    "function": "simulators.synthetic:machine",
                    "arguments": {"seed": number, "rate_hz": SYNTHETIC_RATE_HZ * speed},
                },
            }
        },
    )


def _file_device(number: int, path: Path, replayed: Mapping[str, Any]) -> DevicePlan:
    return DevicePlan(
        name=f"replay-{number:03}",
        recording=str(path),
        streams={
            stream_name(path): {
                "driver": "replay",
                "sampling": {"mode": "stream"},
                "max_batch_rows": 500,
                "max_batch_age_s": 1.0,
                "options": replayed,
            }
        },
    )


def replay_options(path: Path, speed: float) -> dict[str, Any]:
    """How a file of the user's is replayed, again and again.

    Raises:
        ConfigurationError: it cannot be, as far as its first rows show.
    """
    from headwater.file_check import FileRefused, check_file

    options = {"path": str(path), "time_column": find_time_column(path), "loop": True, "speed": speed}
    try:
        check_file(options)
    except FileRefused as error:
        raise ConfigurationError(f"--recordings: {error}. These options are of: headwater simulate replay") from error
    return options


def stream_name(path: Path) -> str:
    """A stream's name out of a file's: what is not allowed becomes `-`."""
    name = re.sub(r"[^a-z0-9._-]+", "-", path.name.partition(".")[0].lower()).strip("._-")[:63]
    return name if is_name(name) and not name.startswith("headwater.") else "replay"


TIME_COLUMNS = ("ts", "timestamp", "time", "datetime", "date_time", "date")


def find_time_column(path: Path) -> str:
    """The column of a file that tells the time: one of the usual names, else the first of a timestamp type.

    Raises:
        ConfigurationError: it cannot be read, or none does; the message lists the columns.
    """
    import pyarrow as pa

    from headwater.file_check import schema_of

    schema = schema_of(path)
    folded: dict[str, str] = {name.lower(): name for name in schema.names}
    for usual in TIME_COLUMNS:
        if usual in folded:
            return folded[usual]
    for field in schema:
        if pa.types.is_timestamp(field.type):
            return str(field.name)
    raise ConfigurationError(
        f"{path} has no column that looks like a time among {', '.join(schema.names)}; name it with: "
        "headwater simulate replay FILE --time-column …, and if these look like one column also --delimiter …"
    )


def watch_path(folder: Path, name: str) -> Path:
    """Where the watch rows of a device are."""
    return folder / f"{name}.parquet"


def labels_path(folder: Path, name: str) -> Path:
    """Where the labels of a device are."""
    return folder / f"{name}.labels.parquet"


def write_recordings(devices: Sequence[DevicePlan], folder: Path) -> None:
    """Put the watch recordings that these devices replay into the folder; what is there already is left alone.

    Raises:
        ConfigurationError: the recordings are not installed, or the folder cannot be written.
    """
    wanted = sorted({device.recording for device in devices if "exercise" in device.streams})
    try:
        todo = [name for name in wanted if not all(way(folder, name).exists() for way in (watch_path, labels_path))]
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be read: {error}; choose another --data") from error
    if not todo:
        return
    import pyarrow.parquet as pq

    from simulators.recordings import by_device, labels_table, load_watch, watch_table

    recordings = by_device(load_watch())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in todo:
            tables = (
                (watch_path(folder, name), watch_table(recordings[name])),
                (labels_path(folder, name), labels_table(recordings[name])),
            )
            for path, table in tables:
                draft = path.with_suffix(".part")
                pq.write_table(table, draft, compression="zstd")
                draft.replace(path)
    except OSError as error:
        raise ConfigurationError(f"recordings cannot be written to {folder}: {error}; choose another --data") from error


def agent_config(device: DevicePlan, broker: str, models: Mapping[str, Any] | None) -> dict[str, Any]:
    """The agent.toml of a device; paths in it are relative to its folder.

    Args:
        device: its name and streams.
        broker: URL.
        models: the table `[models]`; None for a device without.
    """
    return {
        **({} if models is None else {"models": models}),
        "device": device.name,
        "report_interval_s": 10.0,
        "broker": {"url": broker},
        "buffer": {"path": "buffer.db"},
        "uplink": {"drain_timeout_s": DRAIN_S, "reconnect_base_s": 0.2, "reconnect_max_s": 5.0},
        "status": {"socket": "agent.sock"},
        "log": {"level": "info"},
        "streams": device.streams,
    }


SOCKET_BYTES_MAX = 107
"""Longest path of a Unix socket, sun_path of unix(7)."""


def agent_models(http: str, root: str, socket: Path) -> dict[str, Any]:
    """The table `[models]` of every device of the stack.

    Args:
        http: of the gateway.
        root: path of the trust anchor.
        socket: of the inference endpoint; left out where the path is too long for one.
    """
    listen = f"unix:{socket}" if len(bytes(socket)) <= SOCKET_BYTES_MAX else ""
    return {
        "url": f"{http}/models/",
        "root": root,
        "retry_base_s": 0.5,
        "retry_max_s": 10.0,
        # A replay at many times its speed makes that many windows a second; one in three tells of its features.
        "features_every": 3,
        "endpoint": {"listen": listen},
    }


def gateway_models(online_key: str) -> dict[str, Any]:
    """The tables of the stack's gateway about models: one machine has no reason to wait.

    Args:
        online_key: path of the key that signs orders.
    """
    return {
        "models": {"online_key": online_key, "resign_interval_s": 1.0},
        "rollouts": {"interval_s": 1.0, "settle_s": 2.0, "republish_s": 10.0},
        "monitoring": {"interval_s": 3.0, "accuracy_interval_s": 15.0},
    }


def gateway_config(broker: str, lake: Mapping[str, Any], port: int, models: Mapping[str, Any] | None) -> dict[str, Any]:
    """The gateway.toml of the stack's gateway.

    Args:
        broker: URL.
        lake: the table `[lake]`.
        port: of its HTTP.
        models: its tables about models; None where it has none to do with them.
    """
    return {
        **({"monitoring": {"interval_s": 0.0}} if models is None else models),
        "drain_timeout_s": GATEWAY_DRAIN_S,
        "broker": {"url": broker},
        "lake": lake,
        "http": {"port": port},
        "log": {"level": "info"},
    }
