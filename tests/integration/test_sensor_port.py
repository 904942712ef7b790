"""One suite for every driver: what the port promises, kept by all of them, on the real clock.

Built-in drivers run on small copies of what Linux shows; the buffered one reads a FIFO in place of the device node; the
third-party one is an installed distribution (test_sensor_entry_points.py).
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.sensors.columns import Columns, infer_fields
from edge_agent.sensors.port import Block, Reading, Sensor, SensorConfigError, SensorError
from edge_agent.sensors.registry import create_sensor
from tests.sensor_trees import hwmon_tree, iio_tree

DEADLINE_S = 30.0


class Source:
    """A driver, its options, and what has to happen so that it has something to say."""

    def __init__(self, driver: str, options: dict[str, Any], feed: Callable[[], None] = lambda: None) -> None:
        self.driver, self.options, self.feed = driver, options, feed


def thermometer() -> dict[str, float]:
    return {"temperature": 20.5}


def _csv(path: Path) -> Source:
    file = path / "a.csv"
    file.write_text("ts,x\n" + "".join(f"{n * 3600},{n * 0.5}\n" for n in range(5)))
    return Source("replay", {"path": str(file), "time_format": "s"})


def _parquet(path: Path) -> Source:
    file = path / "a.parquet"
    times = pa.array([n * 3_600_000_000 for n in range(5)], pa.timestamp("us"))
    pq.write_table(pa.table({"ts": times, "x": [0.5] * 5}), file)
    return Source("replay", {"path": str(file)})


def _iio_buffer(path: Path) -> Source:
    node = path / "dev" / "iio:device0"
    node.parent.mkdir()
    os.mkfifo(node)
    # Held open for reading and writing, so that the FIFO outlives the driver's opening and closing, as a device does.
    keeper = os.open(node, os.O_RDWR | os.O_NONBLOCK)
    options = {"root": str(iio_tree(path)), "dev": str(path / "dev"), "device": "adxl345", "buffered": True}
    return Source("iio", options, lambda: _write_scans(keeper, [scan(1, 2, 3, 4)]))


SOURCES: dict[str, Callable[[Path], Source]] = {
    "host": lambda path: Source("host", {}),
    "hwmon": lambda path: Source("hwmon", {"root": str(hwmon_tree(path))}),
    "iio": lambda path: Source("iio", {"root": str(iio_tree(path)), "device": "ads1115"}),
    "iio buffered": _iio_buffer,
    "replay csv": _csv,
    "replay parquet": _parquet,
    "callable": lambda path: Source("callable", {"function": f"{__name__}:thermometer"}),
}


WAITING = ("iio buffered", "replay csv", "replay parquet")
"""Drivers whose read waits for data; the others answer at once."""


@pytest.fixture(params=sorted(SOURCES))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return SOURCES[request.param](tmp_path)


def first_rows(sensor: Sensor) -> pa.RecordBatch:
    stop = threading.Event()
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        handed = sensor.read(stop)
        if handed is not None:
            columns = Columns(sensor.schema if sensor.schema is not None else infer_fields(handed))
            if isinstance(handed, Reading):
                return columns.assemble([columns.reading(handed, 1)])
            return columns.block(handed, 1)
    raise AssertionError(f"nothing was read in {DEADLINE_S} s")


def test_rows_fit_the_schema_that_is_known_once_open(source: Source) -> None:
    sensor = create_sensor(source.driver, source.options)
    sensor.open()
    source.feed()
    batch = first_rows(sensor)
    assert batch.num_rows >= 1
    if sensor.schema is not None:
        assert batch.schema.names == ["ts", *sensor.schema.names]
    sensor.close()


def test_a_sensor_can_be_closed_twice_and_opened_again(source: Source) -> None:
    sensor = create_sensor(source.driver, source.options)
    sensor.close()
    for _ in range(2):
        sensor.open()
        source.feed()
        assert first_rows(sensor).num_rows >= 1
        sensor.close()
        sensor.close()


@pytest.mark.parametrize("name", WAITING)
def test_a_waiting_read_returns_soon_after_a_stop(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    sensor = create_sensor(source.driver, source.options)
    sensor.open()
    source.feed()
    first_rows(sensor)
    stop, results = threading.Event(), list[Any]()
    thread = threading.Thread(target=lambda: results.append(sensor.read(stop)), daemon=True)
    thread.start()
    stop.set()
    thread.join(DEADLINE_S)
    assert results == [None]
    sensor.close()


def scan(x: int, y: int, z: int, ts_us: int) -> bytes:
    """accel_x le:s13/16, accel_y be:s12/16>>4, accel_z le:s16/16, padding, timestamp le:s64/64 in ns."""
    return (
        struct.pack("<h", x) + struct.pack(">h", y << 4) + struct.pack("<h2x", z) + struct.pack("<q", ts_us * 1000 + 7)
    )


def _write_scans(node: int, scans: list[bytes]) -> None:
    data = b"".join(scans)
    assert os.write(node, data) == len(data)


@pytest.fixture
def captured(tmp_path: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """The sysfs folder of a device, the writing end of its node, and options."""
    source = _iio_buffer(tmp_path)
    keeper = os.open(tmp_path / "dev" / "iio:device0", os.O_RDWR | os.O_NONBLOCK)
    yield tmp_path / "bus/iio/devices/iio:device0", keeper, source.options
    os.close(keeper)


def test_scans_become_scaled_blocks_with_the_kernels_times(captured: tuple[Path, int, dict[str, Any]]) -> None:
    folder, node, options = captured
    sensor = create_sensor("iio", options | {"watermark_rows": 8, "buffer_rows": 100, "type": "float64"})
    sensor.open()
    buffer = folder / "buffer0"
    written = {name: (buffer / name).read_text().strip() for name in ("enable", "length", "watermark")}
    assert written == {"enable": "1", "length": "100", "watermark": "8"}
    assert {(buffer / f"in_{name}_en").read_text()[0] for name in ("accel_x", "accel_y", "timestamp")} == {"1"}
    assert (folder / "current_timestamp_clock").read_text().startswith("realtime")

    scans = [scan(n, -n, 100 * n, 1_700_000_000_000_000 + 10 * n) for n in range(50)]
    data = b"".join(scans)
    # A read may end within a scan.
    os.write(node, data[:403])
    rows = [first_rows(sensor)]
    os.write(node, data[403:])
    while sum(batch.num_rows for batch in rows) < 50:
        rows.append(first_rows(sensor))
    table = pa.Table.from_batches(rows)
    assert table["ts"].combine_chunks().view(pa.int64()).to_pylist() == [
        1_700_000_000_000_000 + 10 * n for n in range(50)
    ]
    assert table["accel_x_m_s2"].to_pylist() == [(n + 2) * 0.038245 for n in range(50)]
    assert table["accel_y_m_s2"].to_pylist() == [-n * 0.038245 for n in range(50)]
    assert table["accel_z_m_s2"].to_pylist() == [100 * n * 0.038245 for n in range(50)]
    sensor.close()
    assert (buffer / "enable").read_text().strip() == "0"


def test_without_a_timestamp_channel_the_sampling_frequency_gives_the_times(
    captured: tuple[Path, int, dict[str, Any]],
) -> None:
    folder, node, options = captured
    for path in (folder / "buffer0").glob("in_timestamp_*"):
        path.unlink()
    sensor = create_sensor("iio", options | {"channels": ["accel_z", "accel_x"], "sampling_frequency_hz": 200.0})
    sensor.open()
    os.write(node, struct.pack("<4h", 1, 10, 2, 20))
    handed = sensor.read(threading.Event())
    assert isinstance(handed, Block) and handed.interval_ns == 5_000_000
    assert sensor.schema is not None and sensor.schema.names == ["accel_z_m_s2", "accel_x_m_s2"]
    assert handed.columns["accel_x_m_s2"].to_pylist() == pytest.approx([3 * 0.038245, 4 * 0.038245])
    (folder / "sampling_frequency").unlink()
    sensor.close()
    with pytest.raises(SensorConfigError, match="no such setting"):
        sensor.open()


def test_what_cannot_be_captured_is_said(captured: tuple[Path, int, dict[str, Any]], tmp_path: Path) -> None:
    _, _, options = captured
    with pytest.raises(SensorConfigError, match="iio:device1 has no buffer"):
        create_sensor("iio", options | {"device": "ads1115"}).open()
    with pytest.raises(SensorConfigError, match=r"cannot buffer \['temp'\]; it can buffer \['accel_x'"):
        create_sensor("iio", options | {"channels": ["temp"]}).open()
    with pytest.raises(SensorError, match=r"nodev/iio:device0 cannot be opened now"):
        create_sensor("iio", options | {"dev": str(tmp_path / "nodev")}).open()
