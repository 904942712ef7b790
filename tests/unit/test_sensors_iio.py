"""Driver `iio` on a copy of what Linux shows: scales, units, scan layouts."""

from __future__ import annotations

import errno
import struct
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.sensors.columns import Columns
from edge_agent.sensors.iio import create
from edge_agent.sensors.iio_buffer import Element, ScanLayout, parse_element
from edge_agent.sensors.port import Reading, Sensor, SensorConfigError, SensorError
from tests.sensor_trees import iio_tree, write_tree

STOP = threading.Event()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return iio_tree(tmp_path)


def opened(root: Path, **options: Any) -> Sensor:
    sensor = create({"root": str(root), "type": "float64"} | options)
    sensor.open()
    return sensor


def values(sensor: Sensor) -> dict[str, Any]:
    handed = sensor.read(STOP)
    assert isinstance(handed, Reading)
    return dict(handed.values)


def test_raw_values_get_offset_scale_and_si_unit(root: Path) -> None:
    assert values(opened(root, device="adxl345")) == {
        "accel_x_m_s2": (-12 + 2) * 0.038245,
        "accel_y_m_s2": 3 * 0.038245,
        "accel_z_m_s2": 255 * 0.038245,
        "temp_c": (-2000 + 12000) * (2.5 * 1e-3),
    }


def test_scales_are_the_channels_own_or_shared_and_units_are_only_claimed_when_known(root: Path) -> None:
    assert values(opened(root, device="ads1115")) == {
        "humidityrelative_raw": 431.0,  # no scale: the kernel does not know the unit
        "illuminance_lx": 78.5,  # raw without a scale beside a processed value
        "pressure_pa": 101325.0,
        "proximity": 9.0,
        "voltage0_v": 16000 * (0.125 * 1e-3),
        "voltage0_voltage1_v": 1000 * (3 * 1e-3),
        "voltage1_v": 100 * (2 * 1e-3),
        "voltage10_v": 7 * (2 * 1e-3),
    }


def test_channels_are_chosen_in_order_and_the_type_is_declared(root: Path) -> None:
    sensor = opened(root, device="iio:device0", channels=["accel_z", "accel_x"], type="float32")
    assert sensor.schema == pa.schema([("accel_z_m_s2", pa.float32()), ("accel_x_m_s2", pa.float32())])
    handed = sensor.read(STOP)
    assert isinstance(handed, Reading)
    Columns(sensor.schema).reading(handed, 0)


def test_the_sampling_frequency_is_written_when_asked_for(root: Path) -> None:
    path = root / "bus/iio/devices/iio:device0/sampling_frequency"
    opened(root, device="accel-base", sampling_frequency_hz=12.5)
    assert path.read_text().startswith("12.5")
    with pytest.raises(SensorConfigError, match="no such setting"):
        opened(root, device="ads1115", sampling_frequency_hz=10.0)


def test_settings_that_the_service_may_not_write_end_with_the_remedy(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd's ProtectKernelTunables mounts /sys read-only: trying again each minute would not help."""
    real_open = Path.open

    def read_only(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "+" in mode:
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        return real_open(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", read_only)
    sensor = create({"device": "accel-base", "sampling_frequency_hz": 4, "root": str(root)})
    with pytest.raises(SensorConfigError, match=r"sampling_frequency is read-only.*ProtectKernelTunables=false"):
        sensor.open()


def test_what_is_missing_is_named_with_what_is_there(root: Path) -> None:
    with pytest.raises(SensorError, match=r"no device 'adxl'.*'adxl345'"):
        opened(root, device="adxl")
    with pytest.raises(SensorConfigError, match=r"no channel gyro_x; there are \['accel_x'"):
        opened(root, device="adxl345", channels=["gyro_x"])
    write_tree(root / "bus/iio/devices/iio:device1", {"name": "adxl345"})
    with pytest.raises(SensorConfigError, match=r"2 devices are called 'adxl345'; name one of \['iio:device0'"):
        opened(root, device="adxl345")


def test_a_channel_that_does_not_answer_is_null_and_none_answering_is_trouble(root: Path) -> None:
    sensor = opened(root, device="adxl345", channels=["accel_x", "temp"])
    folder = root / "bus/iio/devices/iio:device0"
    (folder / "in_temp_raw").unlink()
    assert values(sensor) == {"accel_x_m_s2": -10 * 0.038245, "temp_c": None}
    (folder / "in_accel_x_raw").unlink()
    with pytest.raises(SensorError, match="none of the channels"):
        sensor.read(STOP)


ELEMENTS = [
    ("le", "s", 12, 16, 4),
    ("be", "s", 12, 16, 4),
    ("le", "u", 8, 8, 0),
    ("be", "u", 24, 32, 8),
    ("le", "s", 24, 32, 0),
    ("le", "s", 64, 64, 0),
    ("be", "u", 48, 64, 2),
    ("le", "u", 64, 64, 0),
    ("le", "s", 48, 64, 2),
]


@given(data=st.data(), rows=st.integers(1, 5))
def test_scans_of_any_layout_are_taken_apart_as_the_kernel_documents(data: st.DataObject, rows: int) -> None:
    """The scan is built here byte by byte from the kernel's words: aligned to its own size, shifted, masked, signed.

    Mutants tried, each found: alignment left out; scan not padded to its largest channel; no mask; no sign extension;
    shift after the mask; byte order of the first channel for all.
    """
    chosen = data.draw(st.lists(st.sampled_from(ELEMENTS), min_size=1, max_size=5))
    elements, expected, scans = [], [], [bytearray() for _ in range(rows)]
    for position, (endian, sign, bits, storage, shift) in enumerate(chosen):
        elements.append(parse_element(f"c{position}", f"{endian}:{sign}{bits}/{storage}>>{shift}", position * 3))
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sign == "s" else (0, 2**bits - 1)
        column = [data.draw(st.integers(low, high)) for _ in range(rows)]
        expected.append(column)
        for scan, value in zip(scans, column, strict=True):
            scan.extend(bytes(-len(scan) % (storage // 8)))
            junk = data.draw(st.integers(0, 2**storage - 1))
            mask = (2**bits - 1) << shift
            word = ((value << shift) & mask) | (junk & ~mask)
            scan.extend(word.to_bytes(storage // 8, "little" if endian == "le" else "big"))
    largest = max(storage // 8 for _, _, _, storage, _ in chosen)
    layout = ScanLayout(elements[::-1])
    padded = [bytes(scan) + bytes(-len(scan) % largest) for scan in scans]
    assert all(len(scan) == layout.scan_bytes for scan in padded)
    decoded = layout.decode(b"".join(padded))
    assert [decoded[element.name].to_pylist() for element in elements] == expected


def test_float_elements_are_read_as_they_are() -> None:
    layout = ScanLayout([parse_element("f", "be:f32/32", 0), parse_element("d", "le:f64/64", 1)])
    scan = struct.pack(">f4x", 1.5) + struct.pack("<d", -0.25)
    assert {name: column.to_pylist() for name, column in layout.decode(scan * 2).items()} == {
        "f": [1.5, 1.5],
        "d": [-0.25, -0.25],
    }


@pytest.mark.parametrize("text", ["le:s16/24>>0", "le:s12/16X4>>0", "s16/16", "le:s17/16", "le:s0/8", "le:f8/8", ""])
def test_a_scan_type_that_is_not_understood_is_named(text: str) -> None:
    with pytest.raises(SensorConfigError, match="channel 'q' has the scan type"):
        parse_element("q", text, 0)


def test_a_scan_type_without_a_shift_has_none() -> None:
    assert parse_element("x", "be:s12/16", 4) == Element("x", 4, ">", "h", 12, 16, 0)


def test_an_unsigned_element_may_use_the_highest_bit_of_its_word() -> None:
    layout = ScanLayout([parse_element("c", "le:u48/64>>16", 0)])
    assert layout.decode(b"\xff" * 8)["c"].to_pylist() == [2**48 - 1]
