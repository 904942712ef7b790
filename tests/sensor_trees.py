"""Small copies of what Linux shows under /sys, for the drivers that take a `root`."""

from __future__ import annotations

from pathlib import Path


def write_tree(base: Path, files: dict[str, str]) -> None:
    """Files by relative path, each with a newline at its end as sysfs has it."""
    for name, text in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def hwmon_tree(root: Path) -> Path:
    """A Raspberry Pi's `cpu_thermal`, a power monitor with labels, and two disks of one kind."""
    base = root / "class" / "hwmon"
    write_tree(base / "hwmon0", {"name": "cpu_thermal", "temp1_input": "48686", "temp1_crit": "110000"})
    write_tree(
        base / "hwmon1",
        {
            "name": "ina219",
            "in0_input": "13",
            "in1_input": "5052",
            "in1_label": "Bus Voltage",
            "curr1_input": "-412",
            "power1_input": "2060000",
            "fan1_input": "1200",
            "energy1_input": "7200000123",
            "humidity1_input": "45300",
        },
    )
    for number, place, temperature in ((2, "0000:02:00.0", "35850"), (3, "0000:01:00.0", "41850")):
        write_tree(base / f"hwmon{number}", {"name": "nvme", "temp1_input": temperature})
        device = root / "devices" / place
        device.mkdir(parents=True)
        (base / f"hwmon{number}" / "device").symlink_to(device)
    return root


def iio_tree(root: Path) -> Path:
    """An accelerometer that can be buffered, and a converter with shared, own and missing scales."""
    base = root / "bus" / "iio" / "devices"
    write_tree(
        base / "iio:device0",
        {
            "name": "adxl345",
            "label": "accel-base",
            "in_accel_x_raw": "-12",
            "in_accel_y_raw": "3",
            "in_accel_z_raw": "255",
            "in_accel_scale": "0.038245",
            "in_accel_x_offset": "2",
            "in_temp_raw": "-2000",
            "in_temp_scale": "2.5",
            "in_temp_offset": "12000",
            "sampling_frequency": "100",
            "current_timestamp_clock": "monotonic",
            "trigger/current_trigger": "",
            "buffer0/enable": "0",
            "buffer0/length": "2",
            "buffer0/watermark": "1",
        },
    )
    for index, (name, kind) in enumerate(
        [
            ("accel_x", "le:s13/16>>0"),
            ("accel_y", "be:s12/16>>4"),
            ("accel_z", "le:s16/16>>0"),
            ("timestamp", "le:s64/64>>0"),
        ]
    ):
        write_tree(
            base / "iio:device0" / "buffer0",
            {f"in_{name}_en": "0", f"in_{name}_type": kind, f"in_{name}_index": str(index)},
        )
    write_tree(
        base / "iio:device1",
        {
            "name": "ads1115",
            "in_voltage0_raw": "16000",
            "in_voltage1_raw": "100",
            "in_voltage10_raw": "7",
            "in_voltage0-voltage1_raw": "1000",
            "in_voltage0_scale": "0.125",
            "in_voltage_scale": "2",
            "in_voltage-voltage_scale": "3",
            "in_pressure_input": "101.325",
            "in_humidityrelative_raw": "431",
            "in_illuminance_raw": "77",
            "in_illuminance_input": "78.5",
            "in_proximity_raw": "9",
            "in_proximity_scale": "1",
        },
    )
    return root
