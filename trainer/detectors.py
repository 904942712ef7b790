"""Detectors that the usual converters have not, or only in float32: the robust z-score and the one-class SVM."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from trainer.errors import TrainingError
from trainer.forest import ESTIMATOR_INPUT, ESTIMATOR_SCORE, estimator_model

Float64s = npt.NDArray[np.float64]
_NORMAL = 1.4826
"""Standard deviations in one median absolute deviation of a normal distribution."""


class RobustZScore(OutlierMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """Median and MAD of every feature (Iglewicz, Hoaglin: How to detect and handle outliers, 1993).

    A feature that never changed in training has the spread 1: any change of it then counts in its own unit.

    Args:
        aggregate: `max` over all features finds what one of them shows; `mean` finds what moves many a little.
    """

    def __init__(self, aggregate: Literal["max", "mean"] = "max") -> None:
        self.aggregate = aggregate

    def fit(self, X: npt.ArrayLike, y: object = None) -> Self:  # noqa: N803 (scikit-learn's names)
        """Learn the usual values of `X`, `float64[N, F]`.

        Raises:
            ValueError: unknown `aggregate`, as scikit-learn's own estimators do.
        """
        if self.aggregate not in ("max", "mean"):
            raise ValueError(f"aggregate = {self.aggregate!r} is not known; choose max or mean")
        values: Float64s = np.asarray(X, dtype=np.float64)
        self.n_features_in_ = values.shape[1]
        self.center_ = np.median(values, axis=0)
        away = np.abs(values - self.center_)
        spread = _NORMAL * np.median(away, axis=0)
        # More than half of the values are equal: the mean deviation still sees the others.
        spread = np.where(spread > 0, spread, np.sqrt(np.pi / 2) * away.mean(axis=0))
        self.scale_ = np.where(spread > 0, spread, 1.0)
        return self

    def score_samples(self, X: npt.ArrayLike) -> Float64s:  # noqa: N803
        """`float64[N]`, lower is more abnormal, as in all of scikit-learn."""
        away = np.abs(np.asarray(X, dtype=np.float64) - self.center_) / self.scale_
        found: Float64s = away.max(axis=1) if self.aggregate == "max" else away.mean(axis=1)
        return -found


def convert_detector(estimator: Any) -> onnx.ModelProto | None:
    """A fitted detector as ONNX from `x` to `score`; None for any other estimator."""
    if isinstance(estimator, RobustZScore):
        return _robust(estimator)
    if isinstance(estimator, Pipeline) and isinstance(estimator.steps[-1][1], OneClassSVM):
        return _one_class(estimator)
    return None


def _robust(estimator: RobustZScore) -> onnx.ModelProto:
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    center = numpy_helper.from_array(estimator.center_, "center")
    scale = numpy_helper.from_array(estimator.scale_, "scale")
    reduce = "ReduceMax" if estimator.aggregate == "max" else "ReduceMean"
    nodes = [
        helper.make_node("Sub", [ESTIMATOR_INPUT, "center"], ["moved"]),
        helper.make_node("Abs", ["moved"], ["away"]),
        helper.make_node("Div", ["away", "scale"], ["z"]),
        helper.make_node(reduce, ["z", "axis"], ["all"], keepdims=0),
        helper.make_node("Cast", ["all"], [ESTIMATOR_SCORE], to=TensorProto.FLOAT),
    ]
    return estimator_model(nodes, [center, scale, axis], estimator.n_features_in_, None)


def _one_class(pipeline: Any) -> onnx.ModelProto:
    """The decision function turned round: `b - sum_i a_i exp(-g |z - s_i|^2)`, `|z - s|^2 = |z|^2 + |s|^2 - 2 z s`.

    onnxruntime has SVMRegressor in float32 only, and misses the decision function by 1e-5.
    """
    (_, scaler), (_, svm) = pipeline.steps
    if not isinstance(scaler, StandardScaler) or svm.kernel != "rbf":
        raise TrainingError("the one-class SVM is exported with kernel rbf behind a StandardScaler; use these")
    vectors = svm.support_vectors_
    gamma = float(svm._gamma)
    values = {
        "center": scaler.mean_,
        "scale": scaler.scale_,
        "vectors": 2.0 * gamma * vectors.T,
        "norms": gamma * np.sum(vectors * vectors, axis=1)[np.newaxis],
        "gamma": np.asarray(gamma),
        "weights": -svm.dual_coef_.reshape(-1, 1),
        "offset": -np.asarray(svm.intercept_, np.float64).reshape(1),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Sub", [ESTIMATOR_INPUT, "center"], ["moved"]),
        helper.make_node("Div", ["moved", "scale"], ["z"]),
        helper.make_node("ReduceSumSquare", ["z", "axis"], ["square"], keepdims=1),
        helper.make_node("Mul", ["square", "gamma"], ["own"]),
        helper.make_node("MatMul", ["z", "vectors"], ["shared"]),
        helper.make_node("Sub", ["shared", "own"], ["nearer"]),
        helper.make_node("Sub", ["nearer", "norms"], ["exponent"]),
        helper.make_node("Exp", ["exponent"], ["kernel"]),
        helper.make_node("MatMul", ["kernel", "weights"], ["sum"]),
        helper.make_node("Add", ["sum", "offset"], ["raw"]),
        helper.make_node("Squeeze", ["raw", "axis"], ["flat"]),
        helper.make_node("Cast", ["flat"], [ESTIMATOR_SCORE], to=TensorProto.FLOAT),
    ]
    constants = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in values.items()]
    return estimator_model(nodes, constants, pipeline.n_features_in_, None)
