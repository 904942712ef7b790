"""The model families: what each is built of, where the search looks, and how it is fitted and asked.

Every family is one entry of `FAMILIES`. A scaler stands before linear models, networks and the SVM, never before trees:
they need none, and a rounded threshold behind a rounded scaler moves windows to the other side of a split.

Everything is fitted and asked in float64 over the float32 features of the graph, which is what the exported graph does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from contract.errors import ConfigurationError
from trainer.errors import RecipeError, TrainingError
from trainer.recipe import Range, Scalar, Space, Task

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

JOBS_MAX = 2
"""Threads of a fit in families that divide the work by trees; all others have one."""
EXACT = 0.0
CLOSE = 1e-5
"""Tolerance of a score: of its magnitude, or absolute below 1."""


class NotConverged(TrainingError):
    """The fit stopped before it settled. More iterations, or scaled and fewer features, may help."""


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    name: str
    task: Task
    build: Callable[[Mapping[str, Any], int], Any]
    """(parameters, seed) to an estimator that is not fitted."""
    space: Mapping[str, Space] = field(default_factory=dict)
    tolerance: float = EXACT
    """Between the exported score and scikit-learn's, see `CLOSE`."""
    rows_max: int | None = None
    """Fitted on so many windows at most, evenly chosen: for what costs the square of their number."""
    extra: str = ""
    """Module that only `headwater[boosting]` brings."""
    weights: bool = True
    """Whether classes may be weighted."""


def _scaled(estimator: Any) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), estimator)


def _logistic_regression(params: Mapping[str, Any], seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return _scaled(LogisticRegression(**{"max_iter": 2_000, "random_state": seed, **params}))


def _random_forest(params: Mapping[str, Any], seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(**{"n_jobs": JOBS_MAX, "random_state": seed, **params})


def _extra_trees(params: Mapping[str, Any], seed: int) -> Any:
    from sklearn.ensemble import ExtraTreesClassifier

    return ExtraTreesClassifier(**{"n_jobs": JOBS_MAX, "random_state": seed, **params})


def _hist_gradient_boosting(params: Mapping[str, Any], seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    # Its own early stopping would draw a random validation set out of windows that overlap.
    return HistGradientBoostingClassifier(**{"early_stopping": False, "random_state": seed, **params})


def _mlp(params: Mapping[str, Any], seed: int) -> Any:
    from sklearn.neural_network import MLPClassifier

    given = {"max_iter": 400, "tol": 5e-4, "random_state": seed, **params}
    shape = (int(given.pop("units", 64)),) * int(given.pop("layers", 1))
    return _scaled(MLPClassifier(hidden_layer_sizes=shape, **given))


def _isolation_forest(params: Mapping[str, Any], seed: int) -> Any:
    from sklearn.ensemble import IsolationForest

    return IsolationForest(**{"random_state": seed, **params})


def _one_class_svm(params: Mapping[str, Any], seed: int) -> Any:
    from sklearn.svm import OneClassSVM

    return _scaled(OneClassSVM(**{"nu": 0.05, **params}))


def _robust_z_score(params: Mapping[str, Any], seed: int) -> Any:
    from trainer.detectors import RobustZScore

    return RobustZScore(**params)


def _lightgbm(params: Mapping[str, Any], seed: int) -> Any:
    module = _extra("lightgbm")
    fixed = {"n_jobs": 1, "verbosity": -1, "deterministic": True, "force_row_wise": True}
    return module.LGBMClassifier(**{**fixed, "random_state": seed, **params})


def _xgboost(params: Mapping[str, Any], seed: int) -> Any:
    module = _extra("xgboost")
    return module.XGBClassifier(**{"n_jobs": 1, "tree_method": "hist", "random_state": seed, **params})


def _extra(name: str) -> Any:
    try:
        import_module("onnxmltools")
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"the family {name} is not installed ({error}); run: pip install 'headwater[boosting]', or leave it out "
            "of [families]"
        ) from error


_FOREST_SPACE: dict[str, Space] = {
    "n_estimators": Range(low=50, high=250, step=50),
    "max_depth": Range(low=6, high=24),
    "min_samples_leaf": Range(low=1, high=10),
    "max_features": ["sqrt", 0.2, 0.5],
}
_BOOSTING_SPACE: dict[str, Space] = {
    "learning_rate": Range(low=0.02, high=0.3, log=True),
    "n_estimators": Range(low=50, high=200, step=50),
    "min_child_weight": Range(low=0.1, high=20.0, log=True),
    "reg_lambda": Range(low=1e-6, high=10.0, log=True),
}

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "logistic_regression",
            "classification",
            _logistic_regression,
            {"C": Range(low=1e-3, high=1e2, log=True)},
            tolerance=CLOSE,
        ),
        Family("random_forest", "classification", _random_forest, _FOREST_SPACE),
        Family("extra_trees", "classification", _extra_trees, _FOREST_SPACE),
        Family(
            "hist_gradient_boosting",
            "classification",
            _hist_gradient_boosting,
            {
                "learning_rate": Range(low=0.02, high=0.3, log=True),
                "max_iter": Range(low=50, high=200, step=50),
                "max_leaf_nodes": Range(low=7, high=63, log=True),
                "min_samples_leaf": Range(low=5, high=50, log=True),
                "l2_regularization": Range(low=1e-6, high=10.0, log=True),
            },
            # With weights, scikit-learn 1.9 finds the bins of a feature by 254 weighted percentiles, each by itself:
            # seconds for a small table, where the trees take a tenth of one.
            weights=False,
        ),
        Family(
            "mlp",
            "classification",
            _mlp,
            {
                "units": [32, 64, 128],
                "layers": Range(low=1, high=2),
                "alpha": Range(low=1e-6, high=1.0, log=True),
                "learning_rate_init": Range(low=3e-4, high=1e-2, log=True),
            },
            tolerance=CLOSE,
        ),
        Family(
            "lightgbm",
            "classification",
            _lightgbm,
            {**_BOOSTING_SPACE, "num_leaves": Range(low=7, high=63, log=True)},
            tolerance=CLOSE,
            extra="lightgbm",
        ),
        Family(
            "xgboost",
            "classification",
            _xgboost,
            {**_BOOSTING_SPACE, "max_depth": Range(low=3, high=8)},
            tolerance=CLOSE,
            extra="xgboost",
        ),
        Family(
            "isolation_forest",
            "anomaly",
            _isolation_forest,
            {
                "n_estimators": Range(low=50, high=300, step=50),
                "max_samples": [64, 128, 256, 512],
                "max_features": [0.3, 0.6, 1.0],
            },
        ),
        Family(
            "one_class_svm",
            "anomaly",
            _one_class_svm,
            {"nu": Range(low=1e-3, high=0.2, log=True), "gamma": Range(low=1e-4, high=1.0, log=True)},
            tolerance=CLOSE,
            rows_max=5_000,
        ),
        Family("robust_z_score", "anomaly", _robust_z_score, {"aggregate": ["max", "mean"]}, tolerance=CLOSE),
    )
}


def spaces_of(task: Task, asked: Mapping[str, Mapping[str, Space]]) -> dict[str, dict[str, Space]]:
    """The families of a recipe with where to look.

    Args:
        task: of the recipe.
        asked: `[families]` of the recipe. A family without parameters has its own space; with none named at all, these
            are all families of the task that need no extra.

    Raises:
        ConfigurationError: unknown family, of another task, or not installed; naming it and the remedy.
    """
    names = list(asked) or [family.name for family in FAMILIES.values() if family.task == task and not family.extra]
    found = {}
    for name in names:
        family = FAMILIES.get(name)
        if family is None or family.task != task:
            known = ", ".join(other.name for other in FAMILIES.values() if other.task == task)
            raise RecipeError(f"[families.{name}] is no family for {task}; choose of {known}")
        space = dict(asked.get(name) or family.space)
        check_estimator(build(name, {key: first_of(part) for key, part in space.items()}, 0))
        found[name] = space
    return found


def first_of(space: Space) -> Scalar:
    """One value of a space."""
    if isinstance(space, Range):
        return space.low
    return space[0] if isinstance(space, list) else space


def build(name: str, params: Mapping[str, Any], seed: int) -> Any:
    """An estimator that is not fitted.

    Raises:
        RecipeError: the family has no such parameter.
        ConfigurationError: the family is not installed.
    """
    try:
        return FAMILIES[name].build(params, seed)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"[families.{name}] cannot be built with {dict(params)} ({error}); mend its keys") from error


def last_step(estimator: Any) -> Any:
    """The model itself, behind whatever stands before it."""
    return estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator


def check_estimator(estimator: Any) -> None:
    """Whether it can be exported: asked before anything is trained.

    Raises:
        ConfigurationError: naming the estimator and the remedy.
    """
    from trainer.convert import is_supported, is_tree

    model = last_step(estimator)
    kind = type(model).__name__
    if is_tree(model) and model is not estimator:
        before = type(estimator.steps[0][1]).__name__
        raise ConfigurationError(
            f"{before} stands before {kind}: rounded twice, windows fall on the other side of a threshold, and the "
            "labels on a device are not those of training; give trees the features as they are"
        )
    unsupported = [
        type(part).__name__ for _, part in getattr(estimator, "steps", [("", estimator)]) if not is_supported(part)
    ]
    if unsupported:
        raise ConfigurationError(
            f"{', '.join(unsupported)} cannot be written as ONNX, so no device could run it; choose a family of "
            f"{', '.join(FAMILIES)}"
        )


def fit(family: Family, estimator: Any, features: Float32s, labels: Int64s | None, weighted: bool) -> Any:
    """Fit an estimator.

    Args:
        family: which kind it is.
        estimator: from `build`.
        features: `float32[N, F]` of the graph.
        labels: `int64[N]`, or None for anomalies.
        weighted: whether each class counts the same.

    Returns:
        The same estimator, fitted.

    Raises:
        NotConverged: it ran out of iterations.
        TrainingError: it cannot be fitted with these parameters or this data.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils.class_weight import compute_sample_weight

    if family.rows_max is not None and len(features) > family.rows_max:
        chosen = np.linspace(0, len(features) - 1, family.rows_max).astype(np.int64)
        features, labels = features[chosen], None if labels is None else labels[chosen]
    given: dict[str, Any] = {}
    if weighted and family.weights and labels is not None:
        # Of a pipeline, the last step takes the weights.
        prefix = f"{estimator.steps[-1][0]}__" if hasattr(estimator, "steps") else ""
        given[f"{prefix}sample_weight"] = compute_sample_weight("balanced", labels)
    values = features.astype(np.float64)
    try:
        # Threads of OpenMP and BLAS that wait for each other on a busy machine cost more than they give.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", ConvergenceWarning)
            return estimator.fit(values, labels, **given) if labels is not None else estimator.fit(values)
    except ConvergenceWarning as error:
        raise NotConverged(
            f"{family.name} did not converge ({_first_line(error)}); raise max_iter in [families.{family.name}], widen "
            "its regularisation, or leave the family out"
        ) from error
    except _errors_of(family) as error:
        raise TrainingError(
            f"{family.name} cannot be fitted ({_first_line(error)}); change its space in [families.{family.name}]"
        ) from error


def _errors_of(family: Family) -> tuple[type[Exception], ...]:
    """What a fit raises that cannot be. XGBoost's own error is a ValueError, LightGBM's is none of Python's."""
    usual = (ValueError, TypeError, ArithmeticError, np.linalg.LinAlgError)
    return (*usual, _extra("lightgbm").basic.LightGBMError) if family.extra == "lightgbm" else usual


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def score(estimator: Any, features: Float32s) -> Float32s:
    """What a fitted estimator says of windows, as the exported graph will.

    Args:
        estimator: fitted.
        features: `float32[N, F]`.

    Returns:
        Probabilities `float32[N, K]`; of an anomaly detector `float32[N]`, higher is more abnormal. Computed in
        float64 and rounded once.
    """
    values = features.astype(np.float64)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # about names of features, which lightgbm misses
        if hasattr(estimator, "predict_proba"):
            # Boosting gives its probabilities column by column; their bytes are compared row by row.
            return np.ascontiguousarray(estimator.predict_proba(values), dtype=np.float32)
        model = last_step(estimator)
        # The SVM's score_samples is only its decision function moved by a constant.
        ask = estimator.decision_function if type(model).__name__ == "OneClassSVM" else estimator.score_samples
        return np.asarray(-ask(values), dtype=np.float32)


def labels_of(scores: Float32s, threshold: float | None) -> Int64s:
    """What the graph answers as `label`: the first class of the highest score, or 1 above the threshold.

    Args:
        scores: `float32[N, K]`, or `float32[N]` with a threshold.
        threshold: of an anomaly; None for classes.
    """
    found = np.argmax(scores, axis=1) if threshold is None else scores > np.float32(threshold)
    return np.asarray(found, dtype=np.int64)
