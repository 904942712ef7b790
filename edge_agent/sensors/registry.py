"""How a driver is found by its name: built-in drivers first, then the entry points of installed distributions.

A distribution offers drivers under the entry-point group `headwater.sensors`; each entry point names a factory that
takes the options table and returns a closed `Sensor`. Modules are imported only when their driver is asked for, so that
a device pays in memory for nothing it does not use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from contract.errors import HeadwaterError
from contract.settings import absolute
from edge_agent.sensors.port import Sensor, SensorConfigError, SensorFactory

ENTRY_POINT_GROUP = "headwater.sensors"

BUILT_IN: Mapping[str, str] = {
    "callable": "edge_agent.sensors.function:create",
    "host": "edge_agent.sensors.host:create",
    "hwmon": "edge_agent.sensors.hwmon:create",
    "iio": "edge_agent.sensors.iio:create",
    "replay": "edge_agent.sensors.replay:create",
}
"""Driver name to `module:factory`. A built-in name cannot be taken over by an entry point."""

PATH_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "callable": ("search_path",),
    "host": ("disk",),
    "hwmon": ("root",),
    "iio": ("root", "dev"),
    "replay": ("path",),
}
"""Options of built-in drivers that are paths: relative ones count from the folder of the configuration file."""

_MEMBERS = ("open", "read", "close")


def drivers() -> dict[str, str]:
    """Every driver there is: its name, and where it comes from (`built in`, or distribution and version)."""
    found = {entry.name: _origin(entry) for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return dict(sorted(found.items())) | dict.fromkeys(BUILT_IN, "built in")


def with_absolute_paths(driver: str, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options of a driver, relative paths counted from `folder`.

    Only the driver of a package knows which of its options are paths; it gets them as they are written.
    """
    paths = PATH_OPTIONS.get(driver, ())
    return {
        name: absolute(folder, value) if name in paths and isinstance(value, str) else value
        for name, value in options.items()
    }


def create_sensor(driver: str, options: Mapping[str, Any]) -> Sensor:
    """A closed sensor of the named driver. Call it once at start: wrong options show here, before anything runs.

    Raises:
        SensorConfigError: unknown driver, two distributions that claim it, a factory that cannot be imported or fails,
            options it refuses, or something that is not a sensor.
    """
    factory = _factory(driver)
    try:
        sensor = factory(options)
    except HeadwaterError:
        raise
    except Exception as error:  # a third party's code may raise anything
        raise SensorConfigError(
            f"driver {driver!r} could not be made from its options ({type(error).__name__}: {error}); check them"
        ) from error
    missing = [member for member in _MEMBERS if not callable(getattr(sensor, member, None))]
    if missing or not hasattr(sensor, "schema"):
        raise SensorConfigError(
            f"driver {driver!r} made a {type(sensor).__name__} without {', '.join(missing) or 'schema'}; "
            "a sensor has schema, open(), read(stop) and close() (docs/sensors.md)"
        )
    return sensor


def _factory(driver: str) -> SensorFactory:
    if driver in BUILT_IN:
        module, _, attribute = BUILT_IN[driver].partition(":")
        return cast(SensorFactory, getattr(importlib.import_module(module), attribute))
    claims = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == driver]
    if not claims:
        raise SensorConfigError(
            f"there is no sensor driver {driver!r}; known drivers: {', '.join(sorted(drivers()))}. "
            f"Install the distribution that has it in the entry-point group {ENTRY_POINT_GROUP!r}"
        )
    if len({entry.value for entry in claims}) > 1:
        raise SensorConfigError(
            f"driver {driver!r} is offered by {' and '.join(sorted(_origin(entry) for entry in claims))}; "
            "uninstall one of them"
        )
    try:
        loaded = claims[0].load()
    except Exception as error:  # importing a third party's module may raise anything
        raise SensorConfigError(
            f"driver {driver!r} of {_origin(claims[0])} cannot be imported from {claims[0].value!r} "
            f"({type(error).__name__}: {error}); reinstall it, or report it to its author"
        ) from error
    if not callable(loaded):
        raise SensorConfigError(
            f"driver {driver!r} of {_origin(claims[0])} is not callable; {claims[0].value!r} must be a factory"
        )
    return cast(SensorFactory, loaded)


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"
