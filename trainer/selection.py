"""Which features a model gets: those that say something, and something that others do not say.

A selection is always made from the training windows alone, of a fold or of the whole; the features of windows that
judge have no part in it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Method = Literal["none", "variance", "importance"]

CORRELATION_MAX = 0.995
"""Of two features closer than this the later is left out."""
ROWS_MAX = 20_000
"""Windows from which a ranking is made, evenly chosen."""
_TREES = 60
_DEPTH_MAX = 12


def rank(features: Float32s, labels: Int64s | None, method: Method, seed: int) -> Int64s:
    """Columns worth keeping, the best first.

    Args:
        features: `float32[N, F]` of training windows.
        labels: `int64[N]`; None for anomalies.
        method: `none` keeps all in their order. `variance` leaves out what never changes and what is the copy of an
            earlier column. `importance` also puts the rest in the order of their impurity importance in extremely
            randomised trees (Geurts, Ernst, Wehenkel, 2006); without labels, each next column is the one that those
            before it say least about, so that the first few are of all channels and not all of the first one.
        seed: of the trees.

    Returns:
        Indices of columns; at least one.
    """
    count = features.shape[1]
    if method == "none":
        return np.arange(count)
    if len(features) > ROWS_MAX:
        chosen = np.linspace(0, len(features) - 1, ROWS_MAX).astype(np.int64)
        features, labels = features[chosen], None if labels is None else labels[chosen]
    kept, correlation = _independent(features)
    if method == "variance":
        return kept
    if labels is None:
        return kept[_least_alike_first(correlation)]
    from sklearn.ensemble import ExtraTreesClassifier

    trees = ExtraTreesClassifier(
        _TREES, max_depth=_DEPTH_MAX, class_weight="balanced", n_jobs=2, random_state=seed
    ).fit(features[:, kept], labels)
    order = np.argsort(-trees.feature_importances_, kind="stable")
    return kept[order]


def _independent(features: Float32s) -> tuple[Int64s, Float64s]:
    """Columns that change, without those that follow an earlier one, and the magnitudes of their correlations."""
    values = features.astype(np.float64)
    values -= values.mean(axis=0)
    spread = np.sqrt(np.mean(values * values, axis=0))
    changing = np.flatnonzero((spread > 0) & (np.ptp(features, axis=0) > 0))
    if not len(changing):
        return np.array([0], dtype=np.int64), np.ones((1, 1))
    scaled = values[:, changing] / spread[changing]
    correlation = np.abs(scaled.T @ scaled) / len(scaled)
    kept: list[int] = []
    for column in range(len(changing)):
        if not kept or correlation[column, kept].max() < CORRELATION_MAX:
            kept.append(column)
    return changing[kept].astype(np.int64), correlation[np.ix_(kept, kept)]


def _least_alike_first(correlation: Float64s) -> Int64s:
    """An order of columns: the one that is most like all others, then always the one that is least like the chosen."""
    order = [int(correlation.sum(axis=0).argmax())]
    nearest = correlation[order[0]].copy()
    while len(order) < len(correlation):
        nearest[order] = np.inf
        order.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, correlation[order[-1]])
    return np.array(order, dtype=np.int64)
