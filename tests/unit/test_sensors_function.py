"""Driver `callable`: a Python function as a sensor."""

from __future__ import annotations

import datetime
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from edge_agent.sensors.columns import Columns, infer_fields
from edge_agent.sensors.function import create
from edge_agent.sensors.port import (
    Block,
    Reading,
    Sensor,
    SensorConfigError,
    SensorError,
    SensorExhausted,
    SensorValueError,
)

STOP = threading.Event()
RESULTS: list[Any] = []


def give(**arguments: Any) -> Any:
    result = RESULTS.pop(0)
    if isinstance(result, Exception):
        raise result
    return result(**arguments) if callable(result) else result


class Board:
    @staticmethod
    def temperature() -> dict[str, float]:
        return {"temperature": 21.5}


def opened(**options: Any) -> Sensor:
    sensor = create({"function": f"{__name__}:give"} | options)
    sensor.open()
    return sensor


def test_a_dict_is_a_reading_with_or_without_its_time() -> None:
    moment = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    RESULTS[:] = [{"a": 1}, {"a": 2, "ts": 5}, {"ts": moment, "a": 3}, None, Reading({"a": 4}, 6)]
    sensor = opened()
    assert sensor.read(STOP) == Reading({"a": 1})
    assert sensor.read(STOP) == Reading({"a": 2}, 5)
    third = sensor.read(STOP)
    assert isinstance(third, Reading) and third.ts_us == 1_714_972_089_123_456
    assert sensor.read(STOP) is None
    assert sensor.read(STOP) == Reading({"a": 4}, 6)


def test_a_list_of_dicts_is_a_block() -> None:
    RESULTS[:] = [[{"a": 1, "ts": 5}, {"a": 2, "b": "x", "ts": 7}], [{"a": 3}, {"a": 4}], []]
    sensor = opened(fields={"a": "int8", "b": "string"})
    assert sensor.schema is not None
    columns = Columns(sensor.schema)
    first, second = sensor.read(STOP), sensor.read(STOP)
    assert isinstance(first, Block) and isinstance(second, Block)
    assert columns.block(first, 0).drop_columns(["ts"]).to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    assert columns.block(first, 0).column("ts").view(pa.int64()).to_pylist() == [5, 7]
    assert columns.block(second, 9).column("ts").view(pa.int64()).to_pylist() == [9, 9]
    assert sensor.read(STOP) is None


def test_without_declared_fields_the_first_reading_decides() -> None:
    RESULTS[:] = [{"a": 1, "b": 2.5}]
    sensor = opened()
    assert sensor.schema is None
    handed = sensor.read(STOP)
    assert isinstance(handed, Reading)
    assert infer_fields(handed) == pa.schema([("a", pa.int64()), ("b", pa.float64())])


def test_arguments_are_handed_to_every_call() -> None:
    RESULTS[:] = [lambda pin, scale: {"v": pin * scale}] * 2
    sensor = opened(arguments={"pin": 4, "scale": 0.5})
    assert [sensor.read(STOP), sensor.read(STOP)] == [Reading({"v": 2.0})] * 2


def test_what_the_function_raises_is_told_apart() -> None:
    RESULTS[:] = [
        ZeroDivisionError("bus"),
        SensorExhausted("end"),
        SensorConfigError("pin 99"),
        7,
        [1],
        [{"ts": 1}, {}],
    ]
    sensor = opened()
    with pytest.raises(SensorError, match="give raised ZeroDivisionError: bus"):
        sensor.read(STOP)
    with pytest.raises(SensorExhausted, match="end"):
        sensor.read(STOP)
    with pytest.raises(SensorConfigError, match="pin 99"):
        sensor.read(STOP)
    for message in ("returned a int", "list with a int", "all or none"):
        with pytest.raises(SensorValueError, match=message):
            sensor.read(STOP)


@pytest.mark.parametrize("ts", ["2024-05-06", 1.5, True, datetime.datetime(2024, 5, 6)])
def test_a_time_that_is_not_clear_is_refused(ts: Any) -> None:
    RESULTS[:] = [{"a": 1, "ts": ts}]
    with pytest.raises(SensorValueError, match="'ts' of a reading is"):
        opened().read(STOP)


def test_a_module_is_found_in_the_search_path_and_a_method_by_its_dotted_name(tmp_path: Path) -> None:
    (tmp_path / "my_thermometer_7f3a.py").write_text("def read():\n    return {'t': 20.5}\n")
    sensor = create({"function": "my_thermometer_7f3a:read", "search_path": str(tmp_path)})
    sensor.open()
    assert sensor.read(STOP) == Reading({"t": 20.5})
    method = create({"function": f"{__name__}:Board.temperature"})
    method.open()
    assert method.read(STOP) == Reading({"temperature": 21.5})


@pytest.mark.parametrize("function", ["no_such_module_7f3a:read", f"{__name__}:nothing", f"{__name__}:RESULTS"])
def test_a_function_that_cannot_be_loaded_is_named(function: str) -> None:
    with pytest.raises(SensorConfigError, match=function):
        create({"function": function}).open()
