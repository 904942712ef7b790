"""How far values are from where they were in training: population stability index, two-sample Kolmogorov-Smirnov.

Both compare a sample with weighted points that stand for the reference (`lake.monitoring.reference.mixed`). Both are
above 0 for any sample, however like the reference: with n values in B bins, m in the reference, the PSI of equal
distributions is about chi-square with B - 1 degrees of freedom, times 1/n + 1/m (Yurdakul, Naranjo: Statistical
properties of the population stability index, Journal of Risk Model Validation 14, 2020). `psi_noise` and `ks_noise` are
what chance exceeds once in a thousand; nothing below them is drift, whatever threshold was chosen.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Float64s = npt.NDArray[np.float64]

BINS = 10
"""Of the PSI: deciles of the reference."""
PSI_MAX = 0.25
"""The field's rule of thumb: below 0.1 nothing, above 0.25 a shift worth acting on."""
_CHI_SQUARE = 27.877
"""0.999 quantile with BINS - 1 degrees of freedom."""
_KOLMOGOROV = 1.9495
"""0.999 quantile of the Kolmogorov distribution: sqrt(-ln(0.001 / 2) / 2)."""
_ATOM_REACH = 1e-5
"""Of the reference's width, within which values are the same where one value holds several deciles."""
_EMPTY_BIN = 0.5
"""Values that an empty bin is counted as, so that one missing value does not decide."""


class Mixture(NamedTuple):
    """Weighted points that stand for a distribution of each feature and, as the last, the score."""

    points: Float64s
    """`[F, P]`: rising in each row."""
    above: Float64s
    """`[F, P]`: weight of this point and all after it; the first is 1."""


class Distance(NamedTuple):
    """Of a sample from the reference, by feature."""

    psi: Float64s
    """`[F]`; 0 where the sample has no number."""
    ks: Float64s
    """`[F]`: largest difference of the distribution functions, 0 to 1."""
    counted: npt.NDArray[np.int64]
    """`[F]`: values of the sample that are numbers."""


def compare(mixture: Mixture, values: Floats) -> Distance:
    """Measure a sample.

    Args:
        mixture: the reference.
        values: `[N, F]`, NaN and infinities left out.
    """
    edges, expected = _deciles(mixture)
    sample = values.T.astype(np.float64)
    finite = np.isfinite(sample)
    counted = finite.sum(axis=1)
    psi, ks = np.zeros(len(sample)), np.zeros(len(sample))
    for number in np.flatnonzero(counted):
        column = np.sort(sample[number][finite[number]])
        psi[number] = psi_of(column, edges[number], expected[number])
        ks[number] = _ks(column, mixture.points[number], mixture.above[number])
    return Distance(psi, ks, counted)


def psi_of(column: Float64s, edges: Float64s, expected: Float64s) -> float:
    """The index: sum of (actual - expected) * ln(actual / expected) over the bins.

    Args:
        column: `[N]`, rising, N above 0.
        edges: `[B - 1]`, rising; a bin holds what is above its lower edge and not above its upper.
        expected: `[B]`: shares of the reference. A bin that both leave empty counts nothing.
    """
    upto = np.searchsorted(column, edges, side="right")
    found = np.diff(upto, prepend=0, append=len(column)) / len(column)
    counts = (found > 0) | (expected > 0)
    floor = _EMPTY_BIN / len(column)
    actual, wanted = np.maximum(found[counts], floor), np.maximum(expected[counts], floor)
    return float(np.sum((actual - wanted) * np.log(actual / wanted)))


def psi_noise(sample: float, reference: float) -> float:
    """The PSI that two samples of one distribution exceed once in a thousand.

    Args:
        sample: independent values looked at. Windows that overlap count as `stride / rows` each.
        reference: those of the reference.
    """
    return _CHI_SQUARE * (1 / max(sample, 1e-9) + 1 / max(reference, 1e-9))


def ks_noise(sample: float, reference: float) -> float:
    """Likewise for KS; not above 1."""
    return min(1.0, _KOLMOGOROV * math.sqrt(1 / max(sample, 1e-9) + 1 / max(reference, 1e-9)))


def _deciles(mixture: Mixture) -> tuple[Float64s, Float64s]:
    """Edges `[F, BINS - 1]` at the deciles, and the share of the reference in each bin, `[F, BINS]`.

    A value that holds several deciles, such as a probability of 1 or a count of 0, is a bin of its own, and what lies
    between it and its neighbours another: else a score that falls from 1 to 0.97 in every window would change nothing.
    """
    features = len(mixture.points)
    edges = np.empty((features, BINS - 1))
    expected = np.empty((features, BINS))
    for number, (points, above) in enumerate(zip(mixture.points, mixture.above, strict=True)):
        # `above` falls, so its negative rises; the weight below a point is 1 minus that above it.
        below = np.append(1.0 - above, 1.0)
        below[0] = 0.0  # whatever the sum of the weights came to
        at = np.searchsorted(below[:-1], np.arange(1, BINS) / BINS, side="right") - 1
        edges[number] = _apart(points[at], points)
        upto = np.searchsorted(points, edges[number], side="right")
        # Half of what a point stands for lies behind it, unless it stands for itself.
        last = np.maximum(upto - 1, 0)
        alone = (upto > 0) & (points[last] == edges[number]) & (points[np.maximum(last - 1, 0)] != edges[number])
        half = np.where(alone, below[upto] - below[last], 0.0) / 2
        expected[number] = np.diff(below[upto] - half, prepend=0.0, append=1.0)
    return edges, expected


def _apart(edges: Float64s, points: Float64s) -> Float64s:
    """Where an edge stands more than once: the first just below the value, the others just above."""
    width = points[-1] - points[0]
    # Processors differ in the last bits of an exponential: these must not decide.
    reach = _ATOM_REACH * width if width > 0 else _ATOM_REACH * abs(points[0])
    again = np.append(False, edges[1:] == edges[:-1])
    first = np.append(again[1:], False) & ~again
    found = np.where(first, edges - reach, np.where(again, edges + reach, edges))
    # Of a constant 0, and where the reach is lost in rounding.
    return np.where(first & (found == edges), np.nextafter(edges, -np.inf), found)


def _ks(column: Float64s, points: Float64s, above: Float64s) -> float:
    """Largest difference between the sample's steps and the reference's line through its points."""
    # Values that repeat are a jump of the reference too, so both sides of each step are compared on their own.
    below = np.append(1.0 - above, 1.0)
    right = _line(column, points, below, "right")
    left = _line(column, points, below, "left")
    steps = np.arange(len(column) + 1) / len(column)
    last = np.append(column[1:] != column[:-1], True)
    first = np.append(True, column[1:] != column[:-1])
    over = np.abs(steps[1:][last] - right[last]).max()
    under = np.abs(steps[:-1][first] - left[first]).max()
    return float(max(over, under))


def _line(column: Float64s, points: Float64s, below: Float64s, side: Any) -> Float64s:
    """The reference's distribution function at each value: up to and with it (`right`), or without (`left`)."""
    at = np.searchsorted(points, column, side=side)
    low, high = np.maximum(at - 1, 0), np.minimum(at, len(points) - 1)
    gap = points[high] - points[low]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(gap > 0, (column - points[low]) / gap, 0.0)
    middle = (below[low] + below[low + 1]) / 2
    middle_high = (below[high] + below[high + 1]) / 2
    inside = middle + np.clip(part, 0.0, 1.0) * (middle_high - middle)
    inside = np.where(gap > 0, inside, below[at])
    return np.where(at == 0, 0.0, np.where(at == len(points), 1.0, inside))
