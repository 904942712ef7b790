"""A streaming detector of change: each device against itself, window by window.

Devices differ from one another for good (another wrist, another machine), so a device may be far from the training set
and not have changed at all; and it may change much and stay within what the training set has seen. So the first windows
of a release on a device become its baseline, by label, and from then on a two-sided CUSUM runs over every feature
(E. S. Page: Continuous inspection schemes, Biometrika 41, 1954):

    up = max(0, up + z - SLACK),  down = max(0, down - z - SLACK),  z = (x - mean[label]) / sd[label], at most Z_MAX

A feature has changed when one of the two passes `LIMIT`; a device, when at least `SHARE_MIN` of its features have. In
steady state a sum falls by about SLACK per window, and sums are capped, so that the detector also sees that a change is
over, `2 * LIMIT` windows later at most.

Chosen over the detectors of the library river (ADWIN, Page-Hinkley, KSWIN): those are one object and one Python call
per feature and value, know no labels, and their import costs 100 MB in each gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lake.monitoring.reference import Reference

Float64s = npt.NDArray[np.float64]

SLACK = 1.0
"""In standard deviations: a shift of the mean of less than this is not looked for."""
LIMIT = 50.0
Z_MAX = 4.0
SHARE_MIN = 0.05
LABEL_WINDOWS_MIN = 8
"""A label with fewer windows in the baseline is not judged."""
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
    mean, sd = {}, {}
    for label in np.unique(said):
        own = values[said == label]
        if len(own) >= LABEL_WINDOWS_MIN:
            spread = np.maximum(np.nanstd(own, axis=0, ddof=1), _FLOOR * _spread(reference, str(label)))
            mean[str(label)] = tuple(np.nan_to_num(np.nanmean(own, axis=0)).tolist())
            # What never moved, here or in training, has no scale: any move is as large as can be.
            sd[str(label)] = tuple(np.where(spread > 0, spread, 1e-12).tolist())
    return Baseline(windows=len(values), mean=mean, sd=sd)


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
        self._sd = {label: np.array(values) for label, values in baseline.sd.items()}
        width = len(next(iter(self._mean.values()))) if self._mean else 0
        self._up, self._down = np.zeros(width), np.zeros(width)

    def add(self, value: Float64s, label: str) -> None:
        """See one window: `[F + 1]`. A label without a baseline is passed over, a feature that is NaN left as it is."""
        mean = self._mean.get(label)
        if mean is None or len(mean) != len(value):
            return
        z = np.nan_to_num(np.clip((value - mean) / self._sd[label], -Z_MAX, Z_MAX))
        self._up = np.clip(self._up + z - SLACK, 0.0, 2 * LIMIT)
        self._down = np.clip(self._down - z - SLACK, 0.0, 2 * LIMIT)

    def change(self) -> Change:
        """As of the last window."""
        sums = np.maximum(self._up, self._down)
        if not len(sums):
            return Change(0.0, 0, False)
        needed = max(1, round(SHARE_MIN * len(sums)))
        value = float(np.sort(sums)[-needed])
        return Change(value, int(sums.argmax()), value > LIMIT)
