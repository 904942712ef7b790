"""Neighbouring windows that are alike: how many count as one, and that nothing is raised by them.

Mutants tried, each made a test here fail: labels not told apart; sums not divided; windows counted as independent where
they only overlap by half.
"""

from __future__ import annotations

import numpy as np
import pytest

from lake.monitoring.alerts import OPENED, Hysteresis, judge
from lake.monitoring.detector import LABEL_WINDOWS_MIN, Detector, make_baseline
from lake.monitoring.feed import Predictions
from lake.monitoring.observe import Bounds, Observer
from lake.monitoring.persistence import persistence
from lake.monitoring.reference import make_reference

FEATURES = 20


def wandering(rng, count: int, correlation: float, features: int = FEATURES):
    """First-order autoregression of mean 0 and variance 1: `[count, features]`."""
    noise = rng.normal(size=(count, features))
    values = np.empty_like(noise)
    values[0] = noise[0]
    for number in range(1, count):
        values[number] = correlation * values[number - 1] + np.sqrt(1 - correlation**2) * noise[number]
    return values


@pytest.mark.parametrize(("correlation", "count", "rel"), [(0.0, 2_000, 0.05), (0.5, 2_000, 0.1), (0.9, 5_000, 0.15)])
def test_it_is_that_of_the_process(correlation, count, rel):
    found = persistence(wandering(np.random.default_rng(1), count, correlation), ["a"] * count)
    assert np.mean(found) == pytest.approx((1 + correlation) / (1 - correlation), rel=rel)


def test_a_short_series_is_not_taken_for_an_independent_one():
    rng = np.random.default_rng(2)
    found = np.concatenate([persistence(wandering(rng, 60, 0.8), ["a"] * 60) for _ in range(30)])
    assert np.median(found) == pytest.approx(9, rel=0.25)
    assert (found > 3).mean() > 0.95


def test_a_change_of_label_is_no_trend_and_what_is_no_number_is_left_out():
    rng = np.random.default_rng(3)
    labels = np.repeat(["run", "walk"] * 10, 50)
    values = wandering(rng, 1_000, 0.0) + np.where(labels == "run", 30.0, 0.0)[:, None]
    assert persistence(values, labels).max() < 1.3
    values[rng.random(values.shape) < 0.3] = np.nan
    values[:, 3] = np.inf
    found = persistence(values, labels)
    assert found.max() < 1.4 and found[3] == 1.0
    assert persistence(values[:2], labels[:2]).tolist() == [1.0] * FEATURES


def test_a_feature_that_was_no_number_in_the_baseline_is_not_judged():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(60, 3))
    reference = make_reference(values[:, :2], values[:, 2])
    values[: 60 - LABEL_WINDOWS_MIN + 1, 0] = np.nan
    values[5, 1] = np.inf
    watching = Detector(make_baseline(values, ["a"] * 60, reference))
    for value in rng.normal([9.0, 0.0, 0.0], size=(500, 3)):
        watching.add(value, "a")
    assert watching.change().value < 10
    for value in rng.normal([0.0, 9.0, 0.0], size=(100, 3)):
        watching.add(value, "a")
    assert watching.change().changed and watching.change().feature == 1


def alerts_of(correlation: float, windows: int, baseline_windows: int, shift: float = 0.0) -> list[str]:
    """Kinds opened on two devices that wander, of which nothing changes but by `shift` in the end."""
    rng = np.random.default_rng(5)
    training = wandering(rng, 20_000, correlation)[::10]
    reference = make_reference(training, np.full(len(training), 0.9))
    observer, counting = Observer(Bounds(baseline_windows=baseline_windows)), Hysteresis()
    opened: list[str] = []
    is_open = set()
    series = {f"pi-{number}": wandering(rng, windows, correlation) for number in range(2)}
    for values in series.values():
        values[-600:, :5] += shift
    ones = np.ones(50, np.int64)
    for begin in range(0, windows, 50):
        ends = np.arange(begin, begin + 50) * 640_000
        for device, values in series.items():
            features = list(values[begin : begin + 50])
            rows = Predictions(
                [device] * 50, ones, ends - 1, ends, np.full(50, 0.9), ["a"] * 50, ones * 800, ones * 0, features
            )
            observer.add(rows)
        for key in observer.fresh():
            made = observer.candidate(key, reference)
            if made is not None:
                observer.set_baseline(key, made)
            for finding in judge("gait", observer.measure(key, reference, 0.25, 2.0), 30):
                event = counting.step(finding, finding.key in is_open, 3)
                if event == OPENED:
                    opened.append(finding.key.kind)
                    is_open.add(finding.key)
                elif event is not None:
                    is_open.discard(finding.key)
    return opened


@pytest.mark.parametrize(("correlation", "baseline_windows"), [(0.0, 60), (0.5, 60), (0.9, 600)])
def test_devices_that_only_wander_raise_nothing_and_a_change_is_found(correlation, baseline_windows):
    assert alerts_of(correlation, 3_000, baseline_windows) == []
    assert set(alerts_of(correlation, 3_000, baseline_windows, shift=4.0)) >= {"change"}
