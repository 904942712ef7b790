"""One model that might be chosen: how it is trained on some windows, and judged by others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import get_scorer

from trainer.errors import RecipeError, TrainingError
from trainer.families import FAMILIES, build, fit, labels_of, score
from trainer.material import Material
from trainer.recipe import Recipe, Scalar

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Scorer = Callable[[Any, Any, Any], float]
_OF_NUMBERS = ("r2", "explained_variance", "_error", "_deviance")
"""Parts of the names of scorers for regression."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A family, its parameters, and how many of the ranked features it gets."""

    family: str
    params: dict[str, Scalar] = {}
    share: float = 1.0
    """Of the features that the selection left."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A fitted model over some columns of the features."""

    family: str
    estimator: Any
    columns: Int64s
    threshold: float | None
    """Anomaly: above it a window is one. A float32 value."""

    def scores(self, features: Float32s) -> Float32s:
        """`float32[N, K]` or `float32[N]` of `float32[N, F]`, all features in the order of the graph."""
        return score(self.estimator, features[:, self.columns])


def find_scorer(metric: str) -> Scorer:
    """A scorer of scikit-learn by its name.

    Raises:
        RecipeError: there is none, or it is one of regression.
    """
    if any(part in metric for part in _OF_NUMBERS):
        raise RecipeError(
            f"[search] metric = {metric!r} measures how far numbers are apart, and classes are none: it would depend "
            "on the order of their names; choose such as f1_macro, accuracy, neg_log_loss"
        )
    try:
        found: Scorer = get_scorer(metric)
    except ValueError as error:
        raise RecipeError(
            f"[search] metric = {metric!r} is no scorer of scikit-learn; choose such as f1_macro, accuracy, "
            "roc_auc_ovr, neg_log_loss, or for anomalies average_precision, roc_auc"
        ) from error
    return found


def train(
    material: Material, candidate: Candidate, rows: Int64s, ranking: Int64s, recipe: Recipe, seed: int
) -> Trained:
    """Fit a candidate.

    Args:
        material: features and labels.
        candidate: what to fit.
        rows: windows to learn from.
        ranking: columns, the best first, found in these windows.
        recipe: weights and contamination.
        seed: of the fit.

    Raises:
        TrainingError: it cannot be fitted.
    """
    family = FAMILIES[candidate.family]
    columns = ranking[: max(1, math.ceil(candidate.share * len(ranking)))]
    if recipe.features.count_max is not None:
        columns = columns[: recipe.features.count_max]
    # In the order of the graph: whether a column is first or last must not matter to a seeded forest.
    columns = np.sort(columns)
    features = material.features[np.ix_(rows, columns)]
    labels = None if material.labels is None else material.labels[rows]
    estimator = fit(
        family, build(candidate.family, candidate.params, seed), features, labels, recipe.search.class_weights
    )
    threshold = None
    if labels is None:
        usual = score(estimator, features)
        threshold = float(np.float32(np.quantile(usual, 1 - recipe.search.contamination, method="higher")))
    return Trained(candidate.family, estimator, columns, threshold)


def judge(material: Material, trained: Trained, rows: Int64s, scorer: Scorer, metric: str) -> float:
    """The metric over some windows: for anomalies, over these and the same with faults put in.

    Raises:
        TrainingError: the metric is not a number, or not defined here.
    """
    scores = trained.scores(material.features[rows])
    if material.labels is not None:
        truth = material.labels[rows]
    else:
        assert material.faulty is not None  # made with the material
        scores = np.concatenate([scores, trained.scores(material.faulty[rows])])
        truth = np.repeat([0, 1], len(rows))
    return metric_of(scores, truth, trained.threshold, scorer, metric, trained.family)


def metric_of(
    scores: Float32s, truth: Int64s, threshold: float | None, scorer: Scorer, metric: str, family: str
) -> float:
    """The metric of answers that are known.

    Args:
        scores: `[N, K]` of a classification, `[N]` of anomalies.
        truth: `[N]`: class indices; 1 for an anomaly.
        threshold: above it a window is an anomaly; None for a classification.
        scorer: what computes it.
        metric: its name, for messages.
        family: whose answers, for messages.

    Raises:
        TrainingError: the metric is not a number, or not defined here.
    """
    answers = _Classes(scores) if scores.ndim == 2 else _Detections(scores, threshold)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that are in no window of the fold
            value = float(scorer(answers, scores, truth))
    except (ValueError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"[search] metric = {metric!r} cannot be computed ({str(error)[:300]}); choose one that fits the task, or "
            "fewer [split] folds so that each has every class"
        ) from error
    if not math.isfinite(value):
        raise TrainingError(
            f"[search] metric = {metric!r} is {value} for {family}; choose one that is defined where a fold lacks a "
            "class, or fewer [split] folds"
        )
    return value


class _Classes(ClassifierMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """Answers that are known already, as the classifier that a scorer wants to ask."""

    def __init__(self, scores: Float32s) -> None:
        self.scores = scores
        self.classes_ = np.arange(scores.shape[1])

    def predict(self, X: object) -> Int64s:  # noqa: N803 (scikit-learn's name)
        return labels_of(self.scores, None)

    def predict_proba(self, X: object) -> Float64s:  # noqa: N803
        chances: Float64s = self.scores.astype(np.float64)
        chances /= chances.sum(axis=1, keepdims=True)
        return chances


class _Detections(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The same of a detector: class 1 is the anomaly."""

    def __init__(self, scores: Float32s, threshold: float | None) -> None:
        self.scores = scores
        self.threshold = threshold
        self.classes_ = np.arange(2)

    def predict(self, X: object) -> Int64s:  # noqa: N803
        return labels_of(self.scores, self.threshold)

    def decision_function(self, X: object) -> Float64s:  # noqa: N803
        return self.scores.astype(np.float64)
