"""Driver `callable`: a Python function of yours is the sensor.

The function is called once per reading, without arguments other than those of the option `arguments`. It returns a
dict, a list of dicts, a `Block`, a `Reading`, or None when there is nothing new. A dict may carry `ts`: microseconds
since 1970-01-01 UTC, or a datetime with a time zone.
"""

from __future__ import annotations

import datetime
import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from contract.errors import HeadwaterError
from contract.names import TS
from edge_agent.sensors.options import parse_fields, parse_options
from edge_agent.sensors.port import Block, Reading, Sensor, SensorConfigError, SensorError, SensorValueError

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


class FunctionOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `callable`."""

    function: str
    """`module:function`; `module:Class.method` and other dotted attributes work too."""
    fields: dict[str, str] = {}
    """Field name to type name; empty takes names and types from the first reading."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of every call."""
    search_path: str = ""
    """A folder that is searched for the module first; empty leaves Python's own search path."""


def create(options: Mapping[str, Any]) -> Sensor:
    """The factory of driver `callable`."""
    return FunctionSensor(parse_options(FunctionOptions, options, "callable"))


class FunctionSensor:
    """Calls one Python function. The module is imported when the sensor is opened first."""

    def __init__(self, options: FunctionOptions) -> None:
        self._options = options
        self._schema = parse_fields(options.fields, "callable") if options.fields else None
        self._function: Callable[..., Any] | None = None
        module, _, attribute = options.function.partition(":")
        if not module or not attribute:
            raise SensorConfigError(
                f"driver 'callable': option 'function' = {options.function!r} is not 'module:function'; write it so"
            )

    @property
    def schema(self) -> pa.Schema | None:
        """The declared fields; None lets the first reading decide."""
        return self._schema

    def open(self) -> None:
        """Import the module and find the function."""
        if self._function is None:
            self._function = self._load()

    def read(self, stop: threading.Event) -> Reading | Block | None:
        """Call the function once. It should return soon; one that waits for its device delays a stop by that long."""
        if self._function is None:
            raise SensorError("driver 'callable' was read before it was opened")
        try:
            result = self._function(**self._options.arguments)
        except HeadwaterError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise SensorError(f"{self._options.function} raised {type(error).__name__}: {error}") from error
        return self._taken(result)

    def close(self) -> None:
        """The function stays loaded; what it holds is its own affair."""

    def _load(self) -> Callable[..., Any]:
        module_name, _, attribute = self._options.function.partition(":")
        if self._options.search_path:
            folder = str(Path(self._options.search_path).expanduser().resolve())
            if folder not in sys.path:
                sys.path.insert(0, folder)
        try:
            found: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:  # importing a user's module may raise anything
            raise SensorConfigError(
                f"driver 'callable': {self._options.function!r} cannot be loaded ({type(error).__name__}: {error}); "
                "check the name, or set search_path to the folder of the module"
            ) from error
        if not callable(found):
            raise SensorConfigError(f"driver 'callable': {self._options.function!r} is not callable; name a function")
        return found  # type: ignore[no-any-return]

    def _taken(self, result: Any) -> Reading | Block | None:
        if result is None or isinstance(result, Reading | Block):
            return result
        if isinstance(result, Mapping):
            return self._reading(result)
        if isinstance(result, list | tuple):
            return self._block(result)
        raise SensorValueError(
            f"{self._options.function} returned a {type(result).__name__}; "
            "return a dict, a list of dicts, a Block or None"
        )

    def _reading(self, row: Mapping[str, Any]) -> Reading:
        if not isinstance(row, Mapping):
            raise SensorValueError(
                f"{self._options.function} returned a list with a {type(row).__name__}; put dicts in it"
            )
        values = dict(row)
        ts = values.pop(TS, None)
        return Reading(values, ts_us=None if ts is None else _microseconds(ts))

    def _block(self, rows: list[Any] | tuple[Any, ...]) -> Block | None:
        """Rows as columns. Rows without a time all get the moment the call returned."""
        if not rows:
            return None
        readings = [self._reading(row) for row in rows]
        names = dict.fromkeys(name for reading in readings for name in reading.values)
        columns = {name: [reading.values.get(name) for reading in readings] for name in names}
        times = [reading.ts_us for reading in readings]
        if all(ts is None for ts in times):
            return Block(columns, interval_ns=0)
        if any(ts is None for ts in times):
            raise SensorValueError(
                f"{self._options.function} gave some rows a {TS!r} and others none; give all or none"
            )
        return Block(columns, ts_us=times)


def _microseconds(ts: Any) -> int:
    """Raises SensorValueError when it is neither int64 microseconds nor a datetime with a zone."""
    if isinstance(ts, datetime.datetime) and ts.tzinfo is not None:
        return (ts - _EPOCH) // _MICROSECOND
    if isinstance(ts, int) and not isinstance(ts, bool):
        return ts
    raise SensorValueError(
        f"{TS!r} of a reading is {ts!r:.80}; give int microseconds since 1970-01-01 UTC, or a datetime with a time zone"
    )
