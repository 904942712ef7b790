"""A streaming detector of change: each device against itself, window by window.

Devices differ from one another for good (another wrist, another machine), so a device may be far from the training set
and not have changed at all; and it may change much and stay within what the training set has seen. So the first windows
of a release on a device become its baseline, by label, and from then on a two-sided CUSUM runs over every feature
(E. S. Page: Continuous inspection schemes, Biometrika 41, 1954):

    up = max(0, up + (z - slack) / p),  down = max(0, down + (-z - slack) / p),  z = (x - mean[label]) / sd[label]

with z at most Z_MAX. A feature has changed when one of the two passes `LIMIT`; a device, when at least `SHARE_MIN` of
its features have. In steady state a sum falls by about SLACK / p per window, and sums are capped, so that the detector
also sees that a change is over, `2 * LIMIT * p` windows later at most.

`p` is how many neighbouring windows count as one (`lake.monitoring.persistence`), as measured in the baseline: a
feature that wanders slowly is away from its mean for many windows on end, and has not changed. It also says how well
the baseline knows mean and spread: the slack is at least `MEAN_MARGIN` standard errors of the mean, and the fewer
windows count, the more of the spread is that of training.

Chosen over the detectors of the library river (ADWIN, Page-Hinkley, KSWIN): those are one object and one Python call
per feature and value, know no labels, and their import costs 100 MB in each gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lake.monitoring.persistence import persistence
from lake.monitoring.reference import Reference

Float64s = npt.NDArray[np.float64]

SLACK = 1.0
"""In standard deviations: a shift of the mean of less than this is not looked for."""
LIMIT = 50.0
Z_MAX = 4.0
SHARE_MIN = 0.05
LABEL_WINDOWS_MIN = 8
"""A label with fewer windows in the baseline is not judged."""
MEAN_MARGIN = 3.0
_FLOOR = 0.1
"""Smallest standard deviation, as part of that in training: few windows underestimate it."""


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """The first windows of a release on a device. An immutable JSON object in the lake, so that every gateway, and one
    that starts while the device has long changed, measures from the same."""

    v: int = 1
    windows: int
    mean: dict[str, tuple[float, ...]]
    """By label: of each feature, the score last."""
    sd: dict[str, tuple[float, ...]]
    """0 where the feature is not judged: too few of its values were numbers."""
    slack: dict[str, tuple[float, ...]] = {}
    """None: SLACK for each, as in baselines of earlier versions."""
    persistence: tuple[float, ...] = ()
    """Of each feature, the score last; none: 1 for each."""


class Change(NamedTuple):
    """How far a device has come from its baseline."""

    value: float
    """The sum that the `SHARE_MIN` most changed features pass."""
    feature: int
    """Number of the most changed one."""
    changed: bool


def make_baseline(values: Float64s, labels: Sequence[str], reference: Reference) -> Baseline:
    """Measure the first windows.

    Args:
        values: `[N, F + 1]`, the score last.
        labels: `[N]`.
        reference: of the release, for how far features spread in training.
    """
    said = np.asarray(labels, dtype=np.str_)
    values = np.where(np.isfinite(values), values, np.nan)
    alike = persistence(values, said)
    mean, sd, slack = {}, {}, {}
    for label in np.unique(said):
        own = values[said == label]
        if len(own) < LABEL_WINDOWS_MIN:
            continue
        counts = np.isfinite(own).sum(axis=0)
        judged = counts >= LABEL_WINDOWS_MIN
        own = np.where(judged, own, 0.0)
        independent = np.maximum(counts, 1) / alike
        floor = np.clip(2 / independent, _FLOOR, 1.0) * _spread(reference, str(label))
        spread = np.maximum(np.nanstd(own, axis=0, ddof=1), floor)
        # What never moved, here or in training, has no scale: any move is as large as can be.
        spread = np.where(spread > 0, spread, 1e-12)
        mean[str(label)] = tuple(np.nanmean(own, axis=0).tolist())
        sd[str(label)] = tuple(np.where(judged, spread, 0.0).tolist())
        slack[str(label)] = tuple(np.maximum(SLACK, MEAN_MARGIN / np.sqrt(independent)).tolist())
    return Baseline(windows=len(values), mean=mean, sd=sd, slack=slack, persistence=tuple(alike.tolist()))


def _spread(reference: Reference, label: str) -> Float64s:
    """Standard deviations in training: of this label where it is known, else of all windows."""
    known = reference.by_label.get(label)
    if known is not None:
        quantiles = [*known.features, known.scores]
    else:
        quantiles = [*(feature.quantiles for feature in reference.features), reference.scores.quantiles]
    # Of a normal distribution, half the way from its 16 % to its 84 % quantile.
    return np.array([(points[84] - points[16]) / 2 for points in quantiles])


class Detector:
    """The sums of one release on one device.

    Args:
        baseline: what it was.
    """

    def __init__(self, baseline: Baseline) -> None:
        self._mean = {label: np.array(values) for label, values in baseline.mean.items()}
        self._sd = {label: _judged_only(np.array(values)) for label, values in baseline.sd.items()}
        width = len(next(iter(self._mean.values()))) if self._mean else 0
        self._slack = {label: np.array(baseline.slack.get(label) or [SLACK] * width) for label in baseline.mean}
        self._persistence = np.array(baseline.persistence or [1.0] * width)
        self._up, self._down = np.zeros(width), np.zeros(width)

    def add(self, value: Float64s, label: str) -> None:
        """See one window: `[F + 1]`. A label without a baseline is passed over, a feature that is no number left as it
        is."""
        mean = self._mean.get(label)
        if mean is None or len(mean) != len(value):
            return
        known = np.isfinite(value)
        z = np.clip((np.where(known, value, mean) - mean) / self._sd[label], -Z_MAX, Z_MAX)
        slack = self._slack[label]
        up = np.clip(self._up + (z - slack) / self._persistence, 0.0, 2 * LIMIT)
        down = np.clip(self._down + (-z - slack) / self._persistence, 0.0, 2 * LIMIT)
        self._up, self._down = np.where(known, up, self._up), np.where(known, down, self._down)

    def change(self) -> Change:
        """As of the last window."""
        sums = np.maximum(self._up, self._down)
        if not len(sums):
            return Change(0.0, 0, False)
        needed = max(1, round(SHARE_MIN * len(sums)))
        value = float(np.sort(sums)[-needed])
        return Change(value, int(sums.argmax()), value > LIMIT)


def _judged_only(sd: Float64s) -> Float64s:
    """Of what is not judged no distance is one."""
    return np.where(sd > 0, sd, np.inf)
