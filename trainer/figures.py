"""The figures of an evaluation, from scores and truths. Pure: arrays in, numbers out."""

from __future__ import annotations

import math
import warnings
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn import metrics

from lake.monitoring.drift import BINS, psi_of
from trainer.families import labels_of

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CALIBRATION_BINS = 10
MONTH_US = 30.436875 * 86_400e6
"""A twelfth of the Gregorian year."""


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one class."""

    name: str
    windows: int
    precision: float
    recall: float
    f1: float
    roc_auc: float | None
    """None where the windows are all of this class, or none is."""
    average_precision: float | None


class CalibrationBin(msgspec.Struct, frozen=True, kw_only=True):
    """Windows whose highest probability lies in one tenth of 0 to 1."""

    windows: int
    confidence: float
    accuracy: float


class ClassificationFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How well windows are told apart."""

    windows: int
    accuracy: float
    f1_macro: float
    """Over the classes that occur in the truth or in the answers."""
    balanced_accuracy: float
    log_loss: float
    roc_auc_macro: float | None
    """Mean over the classes that have one: one against the rest."""
    average_precision_macro: float | None
    calibration_error: float
    """Expected calibration error: mean distance of confidence and accuracy over ten bins, weighted by windows
    (Guo and others, 2017)."""
    classes: list[ClassFigures]
    confusion: list[list[int]]
    """Row: truth; column: answer."""
    calibration: list[CalibrationBin]


class AlarmFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How a detector did over the time of some windows."""

    windows: int
    labelled: int
    """Stretches that are labelled as anomalies."""
    found: int
    """Of these, with at least one alarm."""
    alarms: int
    """Stretches of windows above the threshold; those that overlap, or follow upon each other, are one."""
    false_alarms: int
    """Of these, without one labelled window."""
    months: float
    """Time observed."""
    false_alarms_per_month: float
    false_alarms_per_month_95: tuple[float, float]
    """Where the true rate lies with 95 % confidence, if false alarms come independently of each other."""
    roc_auc: float | None
    """Over windows; None where none or all are labelled."""
    average_precision: float | None


def classification_figures(scores: Float32s, truth: Int64s, classes: tuple[str, ...]) -> ClassificationFigures:
    """Figures of a classification.

    Args:
        scores: probabilities `[N, K]`.
        truth: class indices `[N]`.
        classes: the names of all `K`.
    """
    answers = labels_of(scores, None)
    chances = scores.astype(np.float64)
    chances /= chances.sum(axis=1, keepdims=True)
    indices = np.arange(len(classes))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        truth, answers, labels=indices, zero_division=0.0
    )
    per_class = [
        ClassFigures(
            name=name,
            windows=int(support[number]),
            precision=float(precision[number]),
            recall=float(recall[number]),
            f1=float(f1[number]),
            roc_auc=_ranking(metrics.roc_auc_score, truth == number, chances[:, number]),
            average_precision=_ranking(metrics.average_precision_score, truth == number, chances[:, number]),
        )
        for number, name in enumerate(classes)
    ]
    bins, error = calibration(chances, truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are answered but never true
        balanced = float(metrics.balanced_accuracy_score(truth, answers))
    return ClassificationFigures(
        windows=len(truth),
        accuracy=float(np.mean(answers == truth)),
        f1_macro=float(metrics.f1_score(truth, answers, average="macro", zero_division=0.0)),
        balanced_accuracy=balanced,
        log_loss=float(metrics.log_loss(truth, chances, labels=indices)),
        roc_auc_macro=_mean([figures.roc_auc for figures in per_class]),
        average_precision_macro=_mean([figures.average_precision for figures in per_class]),
        calibration_error=error,
        classes=per_class,
        confusion=metrics.confusion_matrix(truth, answers, labels=indices).tolist(),
        calibration=bins,
    )


def calibration(chances: Float64s, truth: Int64s) -> tuple[list[CalibrationBin], float]:
    """Confidence against accuracy by tenths of confidence, and the expected calibration error."""
    confidence = chances.max(axis=1)
    right = chances.argmax(axis=1) == truth
    place = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    bins = []
    for number in range(CALIBRATION_BINS):
        inside = place == number
        if inside.any():
            bins.append(
                CalibrationBin(
                    windows=int(inside.sum()),
                    confidence=float(confidence[inside].mean()),
                    accuracy=float(right[inside].mean()),
                )
            )
    error = sum(one.windows * abs(one.confidence - one.accuracy) for one in bins) / max(1, len(truth))
    return bins, error


def alarm_figures(
    scores: Float32s,
    flagged: Bools,
    labelled: Bools,
    devices: npt.NDArray[np.str_],
    starts_us: Int64s,
    ends_us: Int64s,
    apart_us: int = 0,
) -> AlarmFigures:
    """Figures of a detector.

    Args:
        scores: `[N]`, higher is more abnormal.
        flagged: `[N]`, above the threshold.
        labelled: `[N]`, windows of labelled anomalies.
        devices: `[N]`; windows of a device in the order of time.
        starts_us: `[N]`, of the first reading.
        ends_us: `[N]`, of the last.
        apart_us: as of `stretches`.
    """
    events = found = alarms = false = 0
    observed = 0
    for device in np.unique(devices):
        mine = np.flatnonzero(devices == device)
        starts, ends = starts_us[mine], ends_us[mine]
        for stretch in stretches(labelled[mine], starts, ends, apart_us):
            events += 1
            found += bool(flagged[mine[stretch]].any())
        for stretch in stretches(flagged[mine], starts, ends, apart_us):
            alarms += 1
            false += not labelled[mine[stretch]].any()
        observed += _covered_us(starts, ends)
    months = observed / MONTH_US
    low, high = poisson_interval(false)
    return AlarmFigures(
        windows=len(scores),
        labelled=events,
        found=found,
        alarms=alarms,
        false_alarms=false,
        months=months,
        false_alarms_per_month=false / months if months > 0 else 0.0,
        false_alarms_per_month_95=(low / months, high / months) if months > 0 else (0.0, 0.0),
        roc_auc=_ranking(metrics.roc_auc_score, labelled, scores.astype(np.float64)),
        average_precision=_ranking(metrics.average_precision_score, labelled, scores.astype(np.float64)),
    )


def poisson_interval(count: int) -> tuple[float, float]:
    """Between which means a Poisson count lies with 95 % confidence (Garwood, 1936)."""

    def at_most(most: int, mean: float) -> float:
        """Probability of a count of at most `most`."""
        if mean <= 0:
            return 1.0
        return math.fsum(math.exp(one * math.log(mean) - mean - math.lgamma(one + 1)) for one in range(most + 1))

    def mean_at(most: int, chance: float) -> float:
        low, high = 0.0, count + 10.0 * math.sqrt(count + 1.0) + 10.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(most, middle) > chance else (low, middle)
        return high

    return (mean_at(count - 1, 0.975) if count else 0.0), mean_at(count, 0.025)


def stretches(marked: Bools, starts_us: Int64s, ends_us: Int64s, apart_us: int = 0) -> list[Int64s]:
    """Indices of marked windows of one device, put together where they overlap or follow upon each other.

    Args:
        marked: `[N]`, in the order of time.
        starts_us: `[N]`, of the first reading.
        ends_us: `[N]`, of the last.
        apart_us: how far the next window may begin after the end of one without a gap in between. Windows that do not
            overlap share no reading: they are one reading's step apart, or several where the stride leaves some out.
    """
    found: list[list[int]] = []
    for index in np.flatnonzero(marked).tolist():
        before = found[-1][-1] if found else None
        # Over a window that is not marked, only an overlap counts.
        if before is not None and starts_us[index] - ends_us[before] <= (apart_us if index == before + 1 else 0):
            found[-1].append(index)
        else:
            found.append([index])
    return [np.array(stretch, dtype=np.int64) for stretch in found]


def _covered_us(starts_us: Int64s, ends_us: Int64s) -> int:
    """Time in at least one window."""
    covered = 0
    until = -(1 << 62)
    for start, end in zip(starts_us.tolist(), ends_us.tolist(), strict=True):
        covered += max(0, end - max(start, until))
        until = max(until, end)
    return covered


def rolling_z(windows: Float32s, stride: int) -> Float32s:
    """The usual baseline: the newest readings of a window against mean and deviation of those before them.

    Args:
        windows: `float32[N, W, C]`.
        stride: readings that are new in each window; at most all but two count as new.

    Returns:
        `float32[N]`: the largest distance of a new reading in standard deviations, over channels; 0 where there is
        nothing to compare.
    """
    new = min(stride, windows.shape[1] - 2)
    if new < 1:
        return np.zeros(len(windows), dtype=np.float32)
    values = windows.astype(np.float64)
    values[~np.isfinite(values)] = np.nan
    before, recent = values[:, :-new], values[:, -new:]
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")  # of windows with nothing but NaN
        mean, deviation = np.nanmean(before, axis=1, keepdims=True), np.nanstd(before, axis=1, keepdims=True)
        # A channel that stood still before: any move of it is far, but not infinitely so.
        away = np.abs(recent - mean) / np.maximum(deviation, 1e-9 * np.maximum(1.0, np.abs(mean)))
        found = np.nanmax(away.reshape(len(windows), -1), axis=1)
    return np.asarray(np.nan_to_num(found, nan=0.0, posinf=0.0), dtype=np.float32)


def population_stability(expected: Float64s, found: Float64s) -> float:
    """Population stability index of a feature between two sets of windows, as monitoring reckons it.

    Args:
        expected: `[N]`, in any order; its deciles are the bins.
        found: `[M]`, M above 0.
    """
    ordered = np.sort(expected)
    edges = np.quantile(ordered, np.arange(1, BINS) / BINS)
    upto = np.searchsorted(ordered, edges, side="right")
    shares = np.diff(upto, prepend=0, append=len(ordered)) / len(ordered)
    return psi_of(np.sort(found), edges, shares)


def _ranking(measure: Any, truth: Bools, scores: Float64s) -> float | None:
    if truth.all() or not truth.any():
        return None
    return float(measure(truth, scores))


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None
