"""docs/sensors.md says what the drivers do: its examples work, and no option is left out."""

from __future__ import annotations

import re
import threading
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from edge_agent.sampling.burst import BurstMode
from edge_agent.sampling.metrics import _COUNTERS
from edge_agent.sampling.settings import Burst, Interval, OnChange, Stream, Trigger, parse_sampling
from edge_agent.sampling.status import SamplingStatus
from edge_agent.sensors.columns import Columns
from edge_agent.sensors.function import FunctionOptions
from edge_agent.sensors.host import SCHEMA, HostOptions
from edge_agent.sensors.hwmon import HwmonOptions
from edge_agent.sensors.iio_channels import IioOptions
from edge_agent.sensors.port import Reading, Sensor, SensorConfigError
from edge_agent.sensors.registry import BUILT_IN, create_sensor
from edge_agent.sensors.replay import ReplayOptions

TEXT = (Path(__file__).parents[2] / "docs" / "sensors.md").read_text()
OPTIONS = {
    "callable": FunctionOptions,
    "host": HostOptions,
    "hwmon": HwmonOptions,
    "iio": IioOptions,
    "replay": ReplayOptions,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert match, f"no section {title!r}"
    return match[1]


STREAMS = [(name, table) for block in blocks("toml") for name, table in tomllib.loads(block)["streams"].items()]


@pytest.mark.parametrize(("name", "stream"), STREAMS, ids=[name for name, _ in STREAMS])
def test_every_toml_example_is_accepted(name: str, stream: dict[str, Any]) -> None:
    assert set(stream) <= {"driver", "options", "sampling"}
    parse_sampling(stream.get("sampling", {}))
    assert isinstance(create_sensor(stream["driver"], stream.get("options", {})), Sensor)


def test_every_driver_has_examples_and_every_option_a_row() -> None:
    assert set(OPTIONS) == set(BUILT_IN) == {stream["driver"] for _, stream in STREAMS}
    for driver, kind in OPTIONS.items():
        named = re.findall(r"^\| (`[^|]*) \|", section(driver), re.MULTILINE)
        documented = {option for row in named for option in re.findall(r"`(\w+)`", row)}
        options = {field.encode_name for field in msgspec.structs.fields(kind)}
        assert options - documented == set(), f"options of {driver} that are not documented"


def test_every_field_of_host_has_a_row() -> None:
    named = "".join(re.findall(r"^\| (`[^|]*) \|", section("host"), re.MULTILINE))
    assert set(SCHEMA.names) <= set(re.findall(r"`(\w+)`", named))


def test_every_setting_of_the_modes_is_named() -> None:
    common = set(re.findall(r"`(\w+)`", section("Sampling")))
    for title, kind in (("interval", Interval), ("on_change", OnChange), ("burst", Burst), ("stream", Stream)):
        named = common | set(re.findall(r"`(\w+)", section(title)))
        assert set(kind.__struct_fields__) - named == set(), f"settings of {title} that are not documented"
    assert set(Trigger.__struct_fields__) - {"field"} <= set(re.findall(r"`(\w+)", section("burst")))


def test_every_counter_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", section("What is counted")))
    assert set(_COUNTERS) <= named and set(_COUNTERS) <= set(SamplingStatus.__struct_fields__)


def test_the_example_driver_works(tmp_path: Path) -> None:
    example = next(block for block in blocks("python") if "class Scale" in block)
    namespace: dict[str, Any] = {}
    exec(compile(example, "docs/sensors.md", "exec"), namespace)
    with pytest.raises(SensorConfigError, match="'port' is missing"):
        namespace["create"]({})
    port = tmp_path / "ttyUSB0"
    port.write_text("1.25,S\n2.5,M\n")
    sensor = namespace["create"]({"port": str(port)})
    assert isinstance(sensor, Sensor) and sensor.schema is not None
    sensor.open()
    columns, stop = Columns(sensor.schema), threading.Event()
    handed = [sensor.read(stop) for _ in range(3)]
    assert handed[2] is None
    rows = [columns.reading(each, 0).values for each in handed if isinstance(each, Reading)]
    assert rows == [{"mass_kg": 1.25, "stable": True}, {"mass_kg": 2.5, "stable": False}]
    sensor.close()
    sensor.close()


def test_the_burst_example_names_fields_that_its_sensor_can_have() -> None:
    bearing = dict(STREAMS)["bearing"]
    settings = parse_sampling(bearing["sampling"])
    assert isinstance(settings, Burst)
    BurstMode(settings, Columns(pa.schema([("accel_z_m_s2", pa.float32()), ("temp_c", pa.float32())])).schema)
