"""The streaming detector and the looks in a row: shifts are found, devices that are themselves stay quiet.

Mutants tried, each made a test here fail: no slack; sums without a cap; one baseline for all labels; the spread of
all labels for each; a look that finds nothing does not end the count.
"""

from __future__ import annotations

import numpy as np
import pytest

from lake.monitoring import alerts
from lake.monitoring.alerts import CLOSED, OPENED, Finding, Hysteresis, Key
from lake.monitoring.detector import LIMIT, SLACK, Z_MAX, Detector, make_baseline
from lake.monitoring.reference import make_reference

FEATURES = 20


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def windows(rng, count, shift=0.0, features=FEATURES):
    """Two labels whose windows are far apart, in turns of ten."""
    labels = np.where(np.arange(count) // 10 % 2, "run", "walk")
    values = rng.normal(size=(count, FEATURES + 1)) + np.where(labels == "run", 30.0, 0.0)[:, None]
    values[:, :features] += shift
    return values, labels


def detector(rng) -> Detector:
    values, labels = windows(rng, 2_000)
    reference = make_reference(values[:, :-1], values[:, -1], labels)
    first, said = windows(rng, 60)
    return Detector(make_baseline(first, said, reference))


def feed(watching: Detector, values, labels) -> int | None:
    """After how many windows it was found."""
    for number, (value, label) in enumerate(zip(values, labels, strict=True), 1):
        watching.add(value, str(label))
        if watching.change().changed:
            return number
    return None


@pytest.mark.parametrize("seed", range(5))
def test_a_device_that_stays_itself_is_quiet_for_thousands_of_windows(seed):
    rng = np.random.default_rng(seed)
    assert feed(detector(rng), *windows(rng, 3_000)) is None


@pytest.mark.parametrize(("shift", "most"), [(3.0, 35), (-3.0, 35), (2.0, 80)])
def test_a_shift_is_found_within_windows_that_can_be_counted(rng, shift, most):
    watching = detector(rng)
    assert feed(watching, *windows(rng, 100)) is None
    found = feed(watching, *windows(rng, 200, shift))
    # It cannot be faster than a sum can rise.
    assert LIMIT / (Z_MAX - SLACK) < found <= most


def test_one_feature_of_twenty_is_enough_and_is_named(rng):
    watching = detector(rng)
    values, labels = windows(rng, 60)
    values[:, 7] += 4.0
    assert feed(watching, values, labels) is not None
    assert watching.change().feature == 7


def test_a_change_that_is_over_is_seen_to_be_over(rng):
    watching = detector(rng)
    for value, label in zip(*windows(rng, 200, 6.0), strict=True):
        watching.add(value, str(label))
    assert watching.change().value == 2 * LIMIT
    for value, label in zip(*windows(rng, int(2 * LIMIT / SLACK) + 20), strict=True):
        watching.add(value, str(label))
    assert not watching.change().changed and watching.change().value < LIMIT / 2


def test_labels_without_a_baseline_and_values_that_are_no_numbers_change_nothing(rng):
    watching = detector(rng)
    values, _ = windows(rng, 300, 50.0)
    assert feed(watching, values, ["jump"] * 300) is None
    assert feed(watching, np.full((300, FEATURES + 1), np.nan), ["walk"] * 300) is None
    assert watching.change().value == 0.0


def finding(value: float, threshold: float = 1.0) -> Finding:
    key = Key("m", 1, "d", "change")
    return Finding(key, value > threshold, value <= 0.8 * threshold, "", value, threshold, "")


def steps(values, checks=3) -> list[str | None]:
    counting, is_open, found = Hysteresis(), False, []
    for value in values:
        event = counting.step(finding(value), is_open, checks)
        is_open = is_open if event is None else event == OPENED
        found.append(event)
    return found


def test_so_many_looks_in_a_row_open_and_close():
    assert steps([2, 2, 0, 2, 2, 2, 2]) == [None] * 5 + [OPENED, None]
    assert steps([2, 2, 2, 0, 0, 2, 0, 0, 0]) == [None, None, OPENED, *[None] * 5, CLOSED]


def test_a_value_that_swings_about_the_threshold_opens_one_alert_and_no_more():
    assert [event for event in steps([1.1, 0.9] * 50, checks=1) if event] == [OPENED]


def test_of_devices_that_are_gone_in_the_midst_of_a_count_not_all_are_remembered(monkeypatch):
    monkeypatch.setattr(alerts, "COUNTED_MAX", 3)
    counting = Hysteresis()

    def over(device: str) -> Finding:
        return finding(2)._replace(key=Key("m", 1, device, "change"))

    for number in range(100):
        counting.step(over("stays"), False, 1_000)
        counting.step(over(f"gone-{number}"), False, 1_000)
    assert len(counting._counts) == 3
    assert [counting.step(over("stays"), False, 102), counting.step(over("stays"), False, 102)] == [None, OPENED]
