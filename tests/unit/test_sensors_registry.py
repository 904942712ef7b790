"""Drivers are found by name, and options are checked strictly."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from edge_agent.sensors.options import parse_fields
from edge_agent.sensors.port import Sensor, SensorConfigError
from edge_agent.sensors.registry import BUILT_IN, create_sensor, drivers

MINIMAL: dict[str, dict[str, Any]] = {
    "callable": {"function": "time:time"},
    "host": {},
    "hwmon": {},
    "iio": {"device": "x"},
    "replay": {"path": "x.csv"},
}


@pytest.mark.parametrize("driver", sorted(BUILT_IN))
def test_a_built_in_driver_is_made_closed_from_its_options(driver: str) -> None:
    assert isinstance(create_sensor(driver, MINIMAL[driver]), Sensor)
    assert drivers()[driver] == "built in"


@pytest.mark.parametrize("driver", sorted(BUILT_IN))
def test_an_unknown_option_is_named_with_those_there_are(driver: str) -> None:
    with pytest.raises(
        SensorConfigError, match=rf"driver '{driver}' has no option 'rat_hz' \(= 5\); its options are: \w"
    ):
        create_sensor(driver, MINIMAL[driver] | {"rat_hz": 5})


@pytest.mark.parametrize(
    ("driver", "options", "message"),
    [
        ("host", {"disk": 7}, r"option 'disk' = 7: Expected `str`, got `int`"),
        ("replay", {"path": "x", "speed": "2"}, r"option 'speed' = '2': Expected `float`, got `str`"),
        ("replay", {}, "missing required field `path`"),
        ("replay", {"path": "x", "speed": -1.0}, r"speed = -1\.0"),
        ("replay", {"path": "x", "block_rows": 0}, "block_rows = 0"),
        ("replay", {"path": "x", "start_s": -1}, "start_s = -1"),
        ("iio", {}, "missing required field `device`"),
        ("iio", {"device": "x", "type": "int8"}, "option 'type' = 'int8'"),
        ("iio", {"device": "x", "buffered": True, "watermark_rows": 0}, "watermark_rows = 0"),
        ("callable", {"function": "time"}, "not 'module:function'"),
        (
            "callable",
            {"function": "a:b", "fields": {"x": "real"}},
            "field 'x' has the unknown type 'real'",
        ),
    ],
)
def test_a_wrong_option_is_named_with_its_value(driver: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SensorConfigError, match=message):
        create_sensor(driver, options)


def test_an_unknown_driver_is_answered_with_those_there_are() -> None:
    with pytest.raises(SensorConfigError, match=r"'hots'; known drivers: .*callable, host, hwmon, iio, replay"):
        create_sensor("hots", {})


def test_types_are_written_as_arrow_writes_them() -> None:
    fields = {"a": "float16", "b": "timestamp[us]", "c": "timestamp[ms, tz=UTC]", "d": "binary", "e": "uint64"}
    kinds = [pa.float16(), pa.timestamp("us"), pa.timestamp("ms", tz="UTC"), pa.binary(), pa.uint64()]
    assert parse_fields(fields, "x") == pa.schema(list(zip(fields, kinds, strict=True)))
