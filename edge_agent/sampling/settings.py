"""How a stream is sampled: the settings of the four modes, as they stand in the agent's TOML under `sampling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from contract.desired import check_rate
from contract.settings import check_range
from edge_agent.sensors.port import SensorConfigError

QUEUE_WAIT_S_MAX = 60.0
BURST_ROWS_MAX = 1_000_000


def check_queue_wait(queue_wait_s: float) -> None:
    """Accept a waiting time.

    Raises:
        ValueError: naming the time and the range.
    """
    check_range("queue_wait_s", queue_wait_s, 0, QUEUE_WAIT_S_MAX)


class Interval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="interval"):
    """Every reading, at a fixed rate."""

    rate_hz: float = 1.0
    queue_wait_s: float = 1.0
    """Longest wait for room in the queue before the rows in hand are dropped and counted."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_rate(self.rate_hz)
        check_queue_wait(self.queue_wait_s)


class Stream(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="stream"):
    """Every reading, at the driver's own pace: its `read` waits for data."""

    queue_wait_s: float = 30.0
    """Longest wait for room in the queue; the driver has to hold its data that long."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_queue_wait(self.queue_wait_s)


class OnChange(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="on_change"
):
    """Readings that differ enough from the last one reported (report by exception)."""

    rate_hz: float = 1.0
    """How often the sensor is asked; 0 leaves the pace to the driver."""
    deadband: dict[str, float | str] = {}
    """Field to the difference that does not matter: a number in the field's unit, or a text such as `"2%"` of the
    value last reported. A field that is not named here is reported on any change."""
    watch: tuple[str, ...] | None = None
    """Fields whose change matters; None for all."""
    max_silence_s: float = 3600.0
    """After this long without a report, by the rows' own time, the next reading is reported in any case; 0 is never."""
    queue_wait_s: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.rate_hz != 0:
            check_rate(self.rate_hz)
        check_queue_wait(self.queue_wait_s)
        for name, width in self.deadband.items():
            parse_deadband(name, width)
            if self.watch is not None and name not in self.watch:
                raise ValueError(
                    f"deadband names field {name!r}, which is not in watch; add it there, or remove it here"
                )
        if self.watch is not None and not self.watch:
            raise ValueError("watch is empty, so nothing would ever be reported; name a field, or leave watch out")
        if not 0 <= self.max_silence_s < math.inf:
            raise ValueError(f"max_silence_s = {self.max_silence_s} is not a time; give seconds, or 0 for no limit")


class Trigger(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One condition on one field. Exactly one of `above`, `below`, `outside`, `rate_above` is given."""

    field: str
    above: float | None = None
    below: float | None = None
    outside: tuple[float, float] | None = None
    """Lowest and highest normal value."""
    rate_above: float | None = None
    """Change per second, up or down, against the reading before."""
    hysteresis: float = 0.0
    """How far the value has to come back before the condition ends; in the unit of the condition."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        given = [name for name in ("above", "below", "outside", "rate_above") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"the trigger on {self.field!r} has {' and '.join(given) or 'no condition'}; "
                "give exactly one of above, below, outside, rate_above"
            )
        limits = self.outside if self.outside is not None else (getattr(self, given[0]),)
        if not all(math.isfinite(limit) for limit in limits):
            raise ValueError(f"the trigger on {self.field!r} has a limit that is not a finite number; give one")
        if not (math.isfinite(self.hysteresis) and self.hysteresis >= 0):
            raise ValueError(f"hysteresis = {self.hysteresis} of {self.field!r} is not 0 or more; choose such a number")
        if self.outside is not None and not self.outside[0] + self.hysteresis <= self.outside[1] - self.hysteresis:
            raise ValueError(
                f"outside = {list(self.outside)} of {self.field!r} leaves no normal range with hysteresis "
                f"{self.hysteresis}; widen it, or lessen the hysteresis"
            )
        if self.rate_above is not None and not self.rate_above - self.hysteresis >= 0:
            raise ValueError(
                f"rate_above = {self.rate_above} of {self.field!r} never ends with hysteresis {self.hysteresis}; "
                "give a rate of at least the hysteresis"
            )


class Burst(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="burst"):
    """Readings around an event: some from before it, all while it lasts, some from after it."""

    trigger: tuple[Trigger, ...]
    """Any of them starts a burst."""
    pre_rows: int = 0
    """Rows kept from before the event."""
    post_rows: int = 0
    """Rows kept from after its end."""
    rows_max: int = 100_000
    """Longest burst, history included. A longer event is cut there, and the next burst waits until the condition ended
    once."""
    rate_hz: float = 1.0
    """How often the sensor is asked; 0 leaves the pace to the driver."""
    queue_wait_s: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.rate_hz != 0:
            check_rate(self.rate_hz)
        check_queue_wait(self.queue_wait_s)
        if not self.trigger:
            raise ValueError("burst has no trigger, so nothing would ever be reported; give at least one")
        if self.pre_rows < 0 or self.post_rows < 0:
            raise ValueError(
                f"pre_rows = {self.pre_rows}, post_rows = {self.post_rows}: give numbers of rows, 0 or more"
            )
        least = self.pre_rows + 1 + self.post_rows
        if not least <= self.rows_max <= BURST_ROWS_MAX:
            raise ValueError(
                f"rows_max = {self.rows_max} is outside {least} (pre_rows + 1 + post_rows) .. {BURST_ROWS_MAX}; "
                "choose a number in that range"
            )


Sampling: TypeAlias = Interval | OnChange | Burst | Stream
"""The settings of one stream; in TOML told apart by `mode`."""


def parse_sampling(table: Mapping[str, Any]) -> Sampling:
    """The settings in a table such as `{mode = "interval", rate_hz = 5}`; without `mode`, interval is meant.

    Raises:
        SensorConfigError: naming what is wrong.
    """
    try:
        settings: Sampling = msgspec.convert({"mode": "interval"} | dict(table), Sampling)
    except msgspec.ValidationError as error:
        raise SensorConfigError(f"sampling {dict(table)!r:.200}: {error}") from error
    return settings


def with_rate(settings: Sampling, rate_hz: float | None) -> Sampling:
    """The same settings at another polling rate; None leaves them as they are.

    Raises:
        SensorConfigError: the rate is out of range, or the driver sets the pace.
    """
    if rate_hz is None:
        return settings
    if isinstance(settings, Stream) or not settings.rate_hz:
        raise SensorConfigError(
            f"rate_hz = {rate_hz} does not apply: the driver of this stream sets the pace; leave rate_hz out"
        )
    try:
        check_rate(rate_hz)
    except ValueError as error:
        raise SensorConfigError(str(error)) from error
    return msgspec.structs.replace(settings, rate_hz=rate_hz)


def parse_deadband(name: str, width: float | str) -> tuple[float, float]:
    """Absolute width and share of the last reported value (0.02 for `"2%"`); one of them is 0.

    Raises:
        ValueError: naming the field and the text.
    """
    number: float | None = None
    if isinstance(width, str):
        if width.endswith("%"):
            try:
                number = float(width[:-1])
            except ValueError:
                number = None
    else:
        number = float(width)
    if number is None or not (math.isfinite(number) and number >= 0):
        raise ValueError(f'deadband of {name!r} = {width!r}; give a number of 0 or more, or a text such as "2%"')
    return (0.0, number / 100) if isinstance(width, str) else (number, 0.0)
