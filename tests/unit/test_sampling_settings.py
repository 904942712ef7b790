"""Settings of the sampling modes: what is out of range or contradicts itself is refused with a remedy."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from edge_agent.sampling.settings import Burst, Interval, OnChange, Stream, Trigger, parse_sampling, with_rate
from edge_agent.sensors.port import SensorConfigError


def test_modes_are_told_apart_in_toml() -> None:
    text = """
    a = { rate_hz = 5 }
    b = { mode = "interval", rate_hz = 0.1 }
    c = { mode = "on_change", rate_hz = 10, deadband = { t = 0.5, p = "2%" }, max_silence_s = 60, watch = ["t", "p"] }
    d = { mode = "stream" }
    [e]
    mode = "burst"
    rate_hz = 0
    pre_rows = 10
    post_rows = 20
    trigger = [{ field = "x", above = 3, hysteresis = 0.5 }, { field = "y", outside = [-1, 1] }]
    """
    tables = tomllib.loads(text)
    assert parse_sampling(tables["a"]) == Interval(rate_hz=5.0)
    assert parse_sampling(tables["b"]) == Interval(rate_hz=0.1)
    assert parse_sampling(tables["c"]) == OnChange(
        rate_hz=10.0, deadband={"t": 0.5, "p": "2%"}, max_silence_s=60.0, watch=("t", "p")
    )
    assert parse_sampling(tables["d"]) == Stream()
    assert parse_sampling(tables["e"]) == Burst(
        rate_hz=0.0,
        pre_rows=10,
        post_rows=20,
        trigger=(Trigger(field="x", above=3.0, hysteresis=0.5), Trigger(field="y", outside=(-1.0, 1.0))),
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"mode": "sometimes"}, "sometimes"),
        ({"rat_hz": 5}, "rat_hz"),
        ({"rate_hz": 0}, r"rate_hz = 0 is outside"),
        ({"rate_hz": -1}, r"rate_hz = -1 is outside"),
        ({"rate_hz": 20_000}, "hand over blocks"),
        ({"rate_hz": float("nan")}, "rate_hz = nan"),
        ({"rate_hz": "5"}, "Expected `float`, got `str`"),
        ({"queue_wait_s": 61}, r"queue_wait_s = 61 is outside 0 .. 60 s"),
        ({"mode": "stream", "rate_hz": 5}, "rate_hz"),
        ({"mode": "on_change", "deadband": {"t": -1}}, "deadband of 't' = -1"),
        ({"mode": "on_change", "deadband": {"t": "2"}}, '"2%"'),
        ({"mode": "on_change", "deadband": {"t": "x%"}}, "deadband of 't' = 'x%'"),
        ({"mode": "on_change", "deadband": {"t": "nan%"}}, "deadband of 't' = 'nan%'"),
        ({"mode": "on_change", "deadband": {"t": 1}, "watch": ["u"]}, "not in watch"),
        ({"mode": "on_change", "watch": []}, "watch is empty"),
        ({"mode": "on_change", "max_silence_s": -1}, r"max_silence_s = -1\.0"),
        ({"mode": "burst"}, "missing required field `trigger`"),
        ({"mode": "burst", "trigger": []}, "no trigger"),
        ({"mode": "burst", "trigger": [{"field": "x"}]}, "'x' has no condition"),
        ({"mode": "burst", "trigger": [{"field": "x", "above": 1, "below": 2}]}, "above and below"),
        ({"mode": "burst", "trigger": [{"field": "x", "above": float("inf")}]}, "not a finite number"),
        ({"mode": "burst", "trigger": [{"field": "x", "above": 1, "hysteresis": -1}]}, r"hysteresis = -1\.0"),
        ({"mode": "burst", "trigger": [{"field": "x", "outside": [0, 1], "hysteresis": 0.6}]}, "no normal range"),
        ({"mode": "burst", "trigger": [{"field": "x", "outside": [1, 0]}]}, "no normal range"),
        ({"mode": "burst", "trigger": [{"field": "x", "rate_above": 1, "hysteresis": 2}]}, "never ends"),
        ({"mode": "burst", "trigger": [{"field": "x", "above": 1}], "pre_rows": -1}, "pre_rows = -1"),
        (
            {"mode": "burst", "trigger": [{"field": "x", "above": 1}], "pre_rows": 5, "post_rows": 5, "rows_max": 10},
            r"rows_max = 10 is outside 11 \(pre_rows \+ 1 \+ post_rows\)",
        ),
    ],
)
def test_what_cannot_work_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(SensorConfigError, match=message):
        parse_sampling(table)


def test_a_rate_from_far_away_applies_where_the_agent_sets_the_pace() -> None:
    assert with_rate(Interval(rate_hz=1), 5.0) == Interval(rate_hz=5)
    assert with_rate(OnChange(rate_hz=1, max_silence_s=7), 5.0) == OnChange(rate_hz=5, max_silence_s=7)
    assert with_rate(Interval(rate_hz=2), None) == Interval(rate_hz=2)
    assert with_rate(Stream(), None) == Stream()
    for settings in (Stream(), OnChange(rate_hz=0), Burst(rate_hz=0, trigger=(Trigger(field="x", above=1),))):
        with pytest.raises(SensorConfigError, match="sets the pace"):
            with_rate(settings, 5.0)
    with pytest.raises(SensorConfigError, match=r"rate_hz = 0 is outside"):
        with_rate(Interval(), 0.0)
