"""What the devices' buffers accepted, asked of the devices themselves: running ones by socket, stopped ones by file.

Each agent counts the rows that its buffer accepted since it started. A buffer's file says, after any death, how many
batches it ever gave a number. The second proves that the first is complete: when both agree on the batches, no row that
was accepted is missing from the count.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog
from prometheus_client.parser import text_string_to_metric_families

from contract.errors import TemporaryError
from edge_agent.buffer.port import LaneInfo
from edge_agent.offline import read_buffer
from edge_agent.status import fetch_metrics, fetch_status
from headwater.place import DevicePlace

_log = structlog.get_logger()

LOOK_S = 1.0
LOOK_CLOSELY_S = 0.03
"""While devices stop: the last batches are stored right before an agent ends."""
PREFIX = "headwater_agent_"


class Key(NamedTuple):
    """One stream of one device."""

    device: str
    stream: str


class LaneKey(NamedTuple):
    """One epoch of one stream of one device."""

    device: str
    stream: str
    epoch: str


class Life(NamedTuple):
    """One run of one agent, as it was last seen."""

    rows: Mapping[str, int]
    """Rows accepted, by stream."""
    batches: Mapping[str, int]
    wire_bytes: int
    """Payloads handed to the broker, repeats among them."""
    acks: Mapping[float, int]
    """Acknowledgements that took at most so many seconds: cumulative, as in the histogram."""
    waiting_rows: int
    resident_bytes: int
    lost_before_buffer: int
    """Readings that never reached the buffer: overruns, refused rows, rows the disk did not take."""


class Totals(NamedTuple):
    """All lives of all devices together."""

    rows: Mapping[Key, int]
    batches: Mapping[Key, int]
    wire_bytes: int
    acks: Mapping[float, int]
    waiting_rows: int
    resident_bytes_max: int
    lost_before_buffer: int
    lives: Mapping[str, int]
    """Runs seen of each device."""


class Ledger:
    """Asks all devices again and again, from a thread of its own.

    Args:
        devices: where they are.
    """

    def __init__(self, devices: Sequence[DevicePlace]) -> None:
        self._devices = devices
        self._lock = threading.Lock()
        self._lives: dict[tuple[str, int], Life] = {}
        self._stop, self._closely = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def look_closely(self, closely: bool = True) -> None:
        """Devices are about to stop: ask as often as possible from now on; with False, now and then again."""
        (self._closely.set if closely else self._closely.clear)()

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()
        self._closely.set()
        self._thread.join()

    def totals(self) -> Totals:
        """What is known now."""
        with self._lock:
            lives = dict(self._lives)
        rows, batches, acks = Counter[Key](), Counter[Key](), Counter[float]()
        for (device, _), life in lives.items():
            for stream, number in life.rows.items():
                rows[Key(device, stream)] += number
            for stream, number in life.batches.items():
                batches[Key(device, stream)] += number
            acks.update(life.acks)
        newest = {device: life for (device, _), life in sorted(lives.items())}
        return Totals(
            rows=rows,
            batches=batches,
            wire_bytes=sum(life.wire_bytes for life in lives.values()),
            acks=acks,
            waiting_rows=sum(life.waiting_rows for life in newest.values()),
            resident_bytes_max=max((life.resident_bytes for life in lives.values()), default=0),
            lost_before_buffer=sum(life.lost_before_buffer for life in lives.values()),
            lives=Counter(device for device, _ in lives),
        )

    def _run(self) -> None:
        while not self._stop.is_set():
            for device in self._devices:
                self._look(device)
            if self._closely.is_set():
                self._stop.wait(LOOK_CLOSELY_S)
            else:
                self._closely.wait(LOOK_S)

    def _look(self, device: DevicePlace) -> None:
        socket = Path(device.socket)
        try:
            status = fetch_status(socket)
            metrics = fetch_metrics(socket)
            if fetch_status(socket)["started_at_us"] != status["started_at_us"]:
                return  # it died and came back in between; the next look sees the new one
        except TemporaryError:
            return  # it is starting, or gone
        streams = status["streams"].values()
        lost = sum(stream["overruns"] + stream["refused_rows"] + stream["dropped_rows"] for stream in streams)
        life = read_metrics(metrics, status["buffer"]["rows"], lost)
        with self._lock:
            self._lives[device.name, status["started_at_us"]] = life


def read_metrics(text: str, waiting_rows: int, lost_before_buffer: int) -> Life:
    """One agent's figures out of its metrics in Prometheus' text format."""
    rows: dict[str, int] = {}
    batches: dict[str, int] = {}
    acks: dict[float, int] = {}
    plain: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX)
            if name == "rows_total":
                rows[sample.labels["stream"]] = int(sample.value)
            elif name == "batches_total":
                batches[sample.labels["stream"]] = int(sample.value)
            elif name == "ack_seconds_bucket":
                acks[float(sample.labels["le"])] = int(sample.value)
            elif not sample.labels:
                plain[name] = sample.value
    return Life(
        rows,
        batches,
        int(plain.get("wire_bytes_total", 0)),
        acks,
        waiting_rows,
        int(plain.get("resident_bytes", 0)),
        lost_before_buffer,
    )


def lanes_of(devices: Iterable[DevicePlace]) -> dict[LaneKey, LaneInfo]:
    """What stands in the buffers of devices that do not run; a device without a buffer has nothing.

    Raises:
        BufferUnreadableError: a file is damaged, or not ours to read.
    """
    found: dict[LaneKey, LaneInfo] = {}
    for device in devices:
        path = Path(device.buffer)
        if path.exists():
            found |= {LaneKey(device.name, lane.stream, lane.epoch): lane for lane in read_buffer(path)}
    return found


def quantile_s(acks: Mapping[float, int], q: float) -> float | None:
    """A quantile out of a cumulative histogram, seconds; as Prometheus' histogram_quantile, even within a bucket."""
    bounds = sorted(acks)
    if not bounds or not (total := acks[bounds[-1]]):
        return None
    wanted, low_s, below = q * total, 0.0, 0
    for high_s in bounds:
        if acks[high_s] >= wanted and acks[high_s] > below:
            if high_s == float("inf"):
                return low_s
            return low_s + (high_s - low_s) * (wanted - below) / (acks[high_s] - below)
        low_s, below = high_s, acks[high_s]
    return low_s
