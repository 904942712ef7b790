"""Figures of an evaluation, counted by hand.

Mutants tried, each seen to fail here: alarms that overlap counted twice; alarms of neighbours that do not overlap; an
alarm that goes on over a window without one; an alarm that touches a labelled window counted as false; months of
overlapping windows counted twice; calibration without weights.
"""

from __future__ import annotations

import numpy as np
import pytest

from contract.models import Window
from trainer.figures import (
    MONTH_US,
    alarm_figures,
    calibration,
    classification_figures,
    poisson_interval,
    population_stability,
    rolling_z,
    stretches,
)
from trainer.windows import window_starts


def test_classes_are_counted_as_by_hand() -> None:
    chances = np.array([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [0.1, 0.2, 0.7]], dtype=np.float32)
    truth = np.array([0, 1, 1, 2])
    found = classification_figures(chances, truth, ("a", "b", "c"))
    assert found.accuracy == 0.75
    assert found.confusion == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert [one.recall for one in found.classes] == [1.0, 0.5, 1.0]
    assert [one.precision for one in found.classes] == [0.5, 1.0, 1.0]
    assert found.f1_macro == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found.balanced_accuracy == pytest.approx(2.5 / 3)
    assert found.log_loss == pytest.approx(-np.mean(np.log([0.8, 0.4, 0.7, 0.7])), rel=1e-5)
    assert found.classes[0].roc_auc == pytest.approx(1.0)
    assert found.roc_auc_macro == pytest.approx(1.0)


def test_a_class_that_is_not_judged_has_no_ranking_and_spoils_no_mean() -> None:
    chances = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]], dtype=np.float32)
    found = classification_figures(chances, np.array([0, 1]), ("a", "b", "c"))
    assert found.classes[2].roc_auc is None
    assert found.classes[2].windows == 0
    assert found.f1_macro == 1.0
    assert found.roc_auc_macro == 1.0


def test_calibration_error_weighs_bins_by_their_windows() -> None:
    chances = np.array([[0.95, 0.05]] * 3 + [[0.55, 0.45]])
    bins, error = calibration(chances, np.array([0, 0, 1, 1]))
    assert [(one.windows, one.accuracy) for one in bins] == [(1, 0.0), (3, pytest.approx(2 / 3))]
    assert error == pytest.approx(0.25 * 0.55 + 0.75 * abs(0.95 - 2 / 3))


def test_windows_that_touch_are_one_stretch() -> None:
    starts, ends = np.array([0, 5, 20, 40, 50]), np.array([10, 15, 30, 50, 60])
    marked = np.array([True, True, True, True, True])
    assert [part.tolist() for part in stretches(marked, starts, ends)] == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize(("rows", "stride"), [(4, 4), (4, 6), (4, 2)])
def test_neighbouring_windows_of_a_run_are_one_stretch_whatever_the_stride(rows: int, stride: int) -> None:
    window = Window(rows=rows, stride=stride, gap_s=8.0)
    ts = np.concatenate([np.arange(60), 100 + np.arange(30)]) * 1_000_000  # a gap of 40 s
    first = window_starts(ts, window)
    starts, ends = ts[first], ts[first + rows - 1]
    apart_us = max(1, stride - rows + 1) * window.gap_us
    runs = [part.tolist() for part in stretches(np.ones(len(first), bool), starts, ends, apart_us)]
    assert [len(run) for run in runs] == [(60 - rows) // stride + 1, (30 - rows) // stride + 1]
    marked = np.ones(len(first), bool)
    marked[3] = False
    if stride >= rows:  # else the windows before and after it overlap
        assert len(stretches(marked, starts, ends, apart_us)) == 3


def test_alarms_and_labelled_stretches_are_counted_as_by_hand() -> None:
    day = 86_400_000_000
    starts = np.concatenate([np.arange(30), np.arange(10)]) * day
    devices = np.array(["a"] * 30 + ["b"] * 10)
    labelled, flagged = np.zeros(40, bool), np.zeros(40, bool)
    labelled[[4, 5, 6, 20]] = True
    flagged[[6, 7, 12, 13, 25, 33]] = True  # one finds 4 to 6; 12 with 13, 25 and 33 are false
    # Windows of a day and a half: neighbours overlap, and what they cover is counted once.
    found = alarm_figures(flagged.astype(np.float32), flagged, labelled, devices, starts, starts + day * 3 // 2)
    assert (found.labelled, found.found) == (2, 1)
    assert (found.alarms, found.false_alarms) == (4, 3)
    assert found.months == pytest.approx((30.5 + 10.5) * day / MONTH_US)
    assert found.false_alarms_per_month == pytest.approx(3 / found.months)


@pytest.mark.parametrize(
    ("count", "low", "high"), [(0, 0.0, 3.6889), (1, 0.0253, 5.5716), (5, 1.6235, 11.6683), (100, 81.3640, 121.6268)]
)
def test_the_interval_of_a_count_is_that_of_the_tables(count: int, low: float, high: float) -> None:
    assert poisson_interval(count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_rate_of_false_alarms_is_told_with_its_interval() -> None:
    flagged, nobody = np.array([True, False, True, False]), np.zeros(4, bool)
    starts = np.arange(4) * 1_000_000_000_000
    ends = starts + int(MONTH_US / 4)  # a month in all
    found = alarm_figures(flagged.astype(np.float32), flagged, nobody, np.array(["a"] * 4), starts, ends)
    assert found.months == pytest.approx(1.0, abs=0.6)
    low, high = (bound * found.months for bound in found.false_alarms_per_month_95)
    assert (low, high) == (pytest.approx(0.2422, abs=1e-4), pytest.approx(7.2247, abs=1e-4))


def test_a_rolling_z_score_sees_a_leap_of_the_newest_readings() -> None:
    random = np.random.default_rng(1)
    windows = random.normal(size=(3, 50, 2)).astype(np.float32)
    windows[1, -1, 1] = 30.0
    windows[2] = np.nan
    found = rolling_z(windows, 5)
    assert found.dtype == np.float32
    before = windows[1, :-5, 1].astype(np.float64)
    assert found[1] == pytest.approx((30.0 - before.mean()) / before.std(), rel=1e-5)
    assert found[0] < 5
    assert found[2] == 0
    assert np.isfinite(rolling_z(np.ones((2, 10, 1), np.float32), 3)).all()
    assert rolling_z(np.ones((2, 2, 1), np.float32), 5).tolist() == [0.0, 0.0]


def test_population_stability_is_small_for_the_same_and_large_for_another_distribution() -> None:
    random = np.random.default_rng(2)
    first, second = random.normal(size=5_000), random.normal(size=5_000)
    assert population_stability(first, second) < 0.02
    assert population_stability(first, second + 1) > 0.5
    assert population_stability(np.zeros(10), np.zeros(10)) == 0
