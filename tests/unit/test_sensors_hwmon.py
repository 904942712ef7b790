"""Driver `hwmon` on a copy of what Linux shows."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from edge_agent.sensors.hwmon import create
from edge_agent.sensors.port import Reading, Sensor, SensorConfigError, SensorError
from tests.sensor_trees import hwmon_tree, write_tree

STOP = threading.Event()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return hwmon_tree(tmp_path)


def opened(root: Path, **options: Any) -> Sensor:
    sensor = create({"root": str(root)} | options)
    sensor.open()
    return sensor


def values(sensor: Sensor) -> dict[str, Any]:
    handed = sensor.read(STOP)
    assert isinstance(handed, Reading)
    return dict(handed.values)


def test_all_kinds_of_channels_are_read_in_si_units(root: Path) -> None:
    sensor = opened(root)
    assert values(sensor) == {
        "cpu_thermal_temp1_c": 48.686,
        "ina219_curr1_a": -0.412,
        "ina219_energy1_j": 7200.000123,
        "ina219_fan1_rpm": 1200.0,
        "ina219_humidity1_percent": 45.3,
        "ina219_in0_v": 0.013,
        "ina219_in1_v": 5.052,
        "ina219_power1_w": 2.06,
        "nvme_temp1_c": 41.85,
        "nvme_2_temp1_c": 35.85,
    }
    assert sensor.schema is not None and sensor.schema.names == list(values(sensor))


def test_chips_alike_keep_their_names_when_the_kernel_numbers_them_anew(root: Path) -> None:
    before = values(opened(root))
    base = root / "class" / "hwmon"
    (base / "hwmon2").rename(base / "hwmon9")
    (base / "hwmon3").rename(base / "hwmon2")
    assert values(opened(root)) == before


def test_fields_can_be_chosen_and_named_after_labels(root: Path) -> None:
    assert values(opened(root, chips=["ina219"], fields=["ina219_in1_v"])) == {"ina219_in1_v": 5.052}
    labelled = values(opened(root, chips=["ina219"], labels=True))
    assert labelled["ina219_bus_voltage_v"] == 5.052 and "ina219_in0_v" in labelled


def test_an_average_stands_in_only_for_a_missing_momentary_value(root: Path) -> None:
    base = root / "class" / "hwmon" / "hwmon1"
    write_tree(base, {"power1_average": "1", "power2_average": "3000000"})
    powers = {name: value for name, value in values(opened(root)).items() if "power" in name}
    assert powers == {"ina219_power1_w": 2.06, "ina219_power2_average_w": 3.0}


def test_a_channel_that_does_not_answer_or_says_it_is_faulty_is_null(root: Path) -> None:
    base = root / "class" / "hwmon"
    write_tree(base, {"hwmon0/temp1_fault": "0"})
    sensor = opened(root, fields=["cpu_thermal_temp1_c", "ina219_in1_v", "ina219_fan1_rpm"])
    write_tree(base, {"hwmon0/temp1_fault": "1", "hwmon1/fan1_input": "n/a"})
    (base / "hwmon1" / "in1_input").unlink()
    with pytest.raises(SensorError, match="none of 3 channels answers"):
        sensor.read(STOP)
    write_tree(base, {"hwmon1/fan1_input": "900"})
    assert values(sensor) == {"cpu_thermal_temp1_c": None, "ina219_in1_v": None, "ina219_fan1_rpm": 900.0}


def test_what_is_not_there_is_named_with_what_is(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SensorConfigError, match=r"no chip 'ina220'; there are \['cpu_thermal', 'ina219', 'nvme', 'nvme_2'"
    ):
        opened(root, chips=["ina220"])
    with pytest.raises(SensorConfigError, match=r"no field 'x'; there are \['cpu_thermal_temp1_c'"):
        opened(root, fields=["x"])
    # A module may be loaded later, so this is tried again.
    with pytest.raises(SensorError, match="load the kernel module"):
        opened(tmp_path / "empty")
