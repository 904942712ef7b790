"""The evaluation: the chosen model before windows that nothing in the search has seen, beside simpler ones.

`evaluation.json` holds every figure, `report.html` shows them. Baselines of a classification: always the most frequent
class, and the best family as it comes. Of anomalies: the best family as it comes, and a rolling z-score with a
threshold that the same share of training windows exceeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from contract.models import Window
from trainer.candidates import Candidate, Trained, find_scorer, judge
from trainer.errors import TrainingError
from trainer.evaluation import Baseline, CurvePoint, DeviceFigures, Drift, Evaluation, anomalies, metrics_of
from trainer.families import labels_of
from trainer.figures import (
    AlarmFigures,
    alarm_figures,
    classification_figures,
    population_stability,
    rolling_z,
)
from trainer.material import Material, load_material
from trainer.recipe import Recipe
from trainer.search import fit_candidate, load_result
from trainer.split import Fold, Split
from trainer.steps import Outputs, StepContext
from trainer.tracking import RUN_TAG, is_asked_for, log_run
from trainer.trials import SearchResult
from trainer.windowset import WindowSet

Bools = npt.NDArray[np.bool_]
Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"
CURVE_SHARES = (0.25, 0.5, 0.75, 1.0)
DRIFT_ROWS_MAX = 50_000


def evaluate(
    dataset: WindowSet,
    material: Material,
    split: Split,
    recipe: Recipe,
    result: SearchResult,
    trained: Trained,
    seed: int,
) -> Evaluation:
    """All figures of a chosen model.

    Args:
        dataset: the windows.
        material: their features.
        split: its test side judges.
        recipe: task, metric and what the report shall have.
        result: of the search.
        trained: the chosen model, fitted on the training side.
        seed: of what is trained for comparison.
    """
    test = split.test if material.labels is None else split.test[material.labels[split.test] >= 0]
    scores = trained.scores(material.features[test])
    try:
        metric_value = judge(material, trained, test, find_scorer(recipe.search.metric), recipe.search.metric)
    except TrainingError:
        metric_value = None  # a class that is not among the judged windows
    common: dict[str, Any] = {
        "recipe": recipe.name,
        "task": recipe.task,
        "family": trained.family,
        "split": split.description,
        "train_windows": len(split.train),
        "test_windows": len(test),
        "classes": material.classes,
        "metric": recipe.search.metric,
        "metric_value": metric_value,
        "devices": _by_device(dataset, material, test, scores, trained.threshold),
        "drift": _drift(material, trained, split),
        "curve": _learning_curve(dataset, material, split, test, recipe, result.best.candidate, seed),
    }
    untuned = _untuned(material, split, recipe, result, seed)
    if material.labels is not None:
        return Evaluation(
            classification=classification_figures(scores, material.labels[test], material.classes),
            baselines=_class_baselines(material, split, test, untuned),
            **common,
        )
    return Evaluation(**_alarm_figures(dataset, material, split, recipe, result, untuned, trained, seed), **common)


def _alarm_figures(
    dataset: WindowSet,
    material: Material,
    split: Split,
    recipe: Recipe,
    result: SearchResult,
    untuned: Trained | None,
    trained: Trained,
    seed: int,
) -> dict[str, Any]:
    """Alarms of the chosen detector and of simpler ones: over the judged windows, all that were unseen, and all."""
    detectors: list[tuple[str, _Detector]] = [
        ("chosen", _Fitted(material, recipe, seed, result.best.candidate, trained))
    ]
    if untuned is not None and result.baseline is not None:
        fitted = _Fitted(material, recipe, seed, result.baseline.candidate, untuned)
        detectors.append((f"{untuned.family} as it comes", fitted))
    detectors.append(("rolling z-score", _Rolling(dataset, recipe, split.train)))
    labelled = anomalies(dataset, recipe)
    told = []
    for name, detector in detectors:
        found, threshold = detector.final()
        flagged = np.asarray(labels_of(found, threshold) == 1)
        told.append(
            Baseline(
                name=name,
                alarms=_alarms(dataset, recipe.window, labelled, found, flagged, split.test),
                alarms_unseen=_unseen(dataset, split, recipe, labelled, detector, flagged),
                alarms_all=_alarms(dataset, recipe.window, labelled, found, flagged, np.arange(len(dataset))),
            )
        )
    first = told[0]
    return {
        "alarms": first.alarms,
        "alarms_unseen": first.alarms_unseen,
        "alarms_all": first.alarms_all,
        "baselines": told[1:],
    }


class _Detector(Protocol):
    """What gives scores and a threshold."""

    def final(self) -> tuple[Float32s, float]:
        """Scores of all windows, and the threshold that the training windows gave."""

    def of_fold(self, fold: Fold) -> npt.NDArray[np.bool_] | None:
        """Which judging windows of a fold are above the threshold of its training windows; None where it cannot be
        fitted there."""


class _Fitted:
    """A candidate of the search."""

    def __init__(self, material: Material, recipe: Recipe, seed: int, candidate: Candidate, trained: Trained) -> None:
        self._material, self._recipe, self._seed = material, recipe, seed
        self._candidate, self._trained = candidate, trained

    def final(self) -> tuple[Float32s, float]:
        return self._trained.scores(self._material.features), _threshold(self._trained)

    def of_fold(self, fold: Fold) -> Bools | None:
        try:
            trained = fit_candidate(self._material, fold.train, self._recipe, self._seed, self._candidate)
        except TrainingError:
            return None
        scores = trained.scores(self._material.features[fold.valid])
        return np.asarray(labels_of(scores, _threshold(trained)) == 1)


def _threshold(trained: Trained) -> float:
    assert trained.threshold is not None  # a detector has one
    return trained.threshold


class _Rolling:
    """The rolling z-score, with a threshold that as many training windows exceed."""

    def __init__(self, dataset: WindowSet, recipe: Recipe, train: Int64s) -> None:
        pieces = [rolling_z(dataset.windows[piece], recipe.window.stride) for piece in dataset.chunks()]
        self._scores = np.concatenate(pieces)
        self._share, self._train = recipe.search.contamination, train

    def _usual(self, rows: Int64s) -> float:
        return float(np.quantile(self._scores[rows], 1 - self._share, method="higher"))

    def final(self) -> tuple[Float32s, float]:
        return self._scores, self._usual(self._train)

    def of_fold(self, fold: Fold) -> Bools | None:
        return np.asarray(labels_of(self._scores[fold.valid], self._usual(fold.train)) == 1)


def _unseen(
    dataset: WindowSet, split: Split, recipe: Recipe, labelled: Bools, detector: _Detector, flagged: Bools
) -> AlarmFigures | None:
    """Over windows that no model was fitted with when it answered; None where a fold has none."""
    judged = flagged.copy()
    rows = [split.test]
    for fold in split.folds:
        found = detector.of_fold(fold)
        if found is None:
            return None
        judged[fold.valid] = found
        rows.append(fold.valid)
    unseen = np.unique(np.concatenate(rows))
    figures = _alarms(dataset, recipe.window, labelled, judged.astype(np.float32), judged, unseen)
    # Scores of several models do not stand in one order.
    return msgspec.structs.replace(figures, roc_auc=None, average_precision=None)


def _alarms(
    dataset: WindowSet, window: Window, labelled: Bools, scores: Float32s, flagged: Bools, rows: Int64s
) -> AlarmFigures:
    return alarm_figures(
        scores[rows],
        flagged[rows],
        labelled[rows],
        dataset.devices[rows],
        dataset.starts_us[rows],
        dataset.ends_us[rows],
        # From the last reading of a window to the first of the next, each step being a gap at most.
        apart_us=max(1, window.stride - window.rows + 1) * window.gap_us,
    )


def _untuned(material: Material, split: Split, recipe: Recipe, result: SearchResult, seed: int) -> Trained | None:
    if result.baseline is None:
        return None
    try:
        return fit_candidate(material, split.train, recipe, seed, result.baseline.candidate)
    except TrainingError:
        return None  # it could be fitted in the folds, and is only a comparison


def _class_baselines(material: Material, split: Split, test: Int64s, untuned: Trained | None) -> list[Baseline]:
    labels = material.labels
    assert labels is not None
    counts = np.bincount(labels[split.train], minlength=len(material.classes)).astype(np.float64)
    usual = np.tile((counts / counts.sum()).astype(np.float32), (len(test), 1))
    found = [
        Baseline(
            name="most frequent class",
            classification=classification_figures(usual, labels[test], material.classes),
        )
    ]
    if untuned is not None:
        scores = untuned.scores(material.features[test])
        figures = classification_figures(scores, labels[test], material.classes)
        found.append(Baseline(name=f"{untuned.family} as it comes", classification=figures))
    return found


def _learning_curve(
    dataset: WindowSet, material: Material, split: Split, test: Int64s, recipe: Recipe, candidate: Candidate, seed: int
) -> list[CurvePoint]:
    if not recipe.report.learning_curve:
        return []
    points = []
    for groups, rows in _lesser(dataset, split, recipe, seed):
        if material.labels is not None and len(np.unique(material.labels[rows])) < len(material.classes):
            continue  # too few groups for all classes: no point of the same curve
        try:
            trained = fit_candidate(material, rows, recipe, seed, candidate)
            points.append(_point(material, test, recipe, trained, groups, len(rows)))
        except TrainingError:
            continue
    return points


def _lesser(dataset: WindowSet, split: Split, recipe: Recipe, seed: int) -> Iterator[tuple[int, Int64s]]:
    """A quarter, a half and so on of what trains, with the number of its groups: of the groups, and where they are few
    or time divides, of the windows, the newest, which are what a younger lake would have."""
    mine = dataset.groups[split.train]
    groups = np.random.default_rng(seed).permutation(np.unique(mine))
    for share in CURVE_SHARES:
        if recipe.split.by == "time" or len(groups) < len(CURVE_SHARES):
            order = split.train[np.argsort(dataset.starts_us[split.train], kind="stable")]
            rows = np.sort(order[-max(1, round(share * len(order))) :])
            yield len(np.unique(dataset.groups[rows])), rows
        else:
            chosen = groups[: max(1, round(share * len(groups)))]
            yield len(chosen), split.train[np.isin(mine, chosen)]


def _point(material: Material, test: Int64s, recipe: Recipe, trained: Trained, groups: int, windows: int) -> CurvePoint:
    if material.labels is None:
        metric = recipe.search.metric
        value = judge(material, trained, test, find_scorer(metric), metric)
        return CurvePoint(groups=groups, windows=windows, metric_value=value)
    scores = trained.scores(material.features[test])
    figures = classification_figures(scores, material.labels[test], material.classes)
    return CurvePoint(groups=groups, windows=windows, accuracy=figures.accuracy, f1_macro=figures.f1_macro)


def _by_device(
    dataset: WindowSet, material: Material, test: Int64s, scores: Float32s, threshold: float | None
) -> list[DeviceFigures]:
    answers = labels_of(scores, threshold)
    found = []
    for device in np.unique(dataset.devices[test]):
        mine = dataset.devices[test] == device
        right = None if material.labels is None else float(np.mean(answers[mine] == material.labels[test][mine]))
        flagged = None if material.labels is not None else float(np.mean(answers[mine] == 1))
        found.append(DeviceFigures(device=str(device), windows=int(mine.sum()), accuracy=right, flagged_share=flagged))
    return found


def _drift(material: Material, trained: Trained, split: Split) -> list[Drift]:
    """Of every feature of the model, the most moved first."""
    sides = [rows[:: max(1, len(rows) // DRIFT_ROWS_MAX)] for rows in (split.train, split.test)]
    train, test = (material.features[np.ix_(rows, trained.columns)].astype(np.float64) for rows in sides)
    found = [
        Drift(
            feature=material.names[column],
            population_stability_index=population_stability(train[:, number], test[:, number]),
        )
        for number, column in enumerate(trained.columns)
    ]
    return sorted(found, key=lambda one: -one.population_stability_index)


def step(context: StepContext) -> Outputs:
    """Judge the chosen model: `evaluation.json`, and `report.html` unless the recipe leaves it out."""
    recipe, dataset, split = context.recipe, context.windows(), context.split()
    result, trained = load_result(context)
    material = load_material(dataset, recipe, context.folder("search"))
    with context.progress.track("evaluate", None) as done:
        found = evaluate(dataset, material, split, recipe, result, trained, context.seed)
        (context.into / EVALUATION_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(found)))
        files = {"evaluation": EVALUATION_FILE}
        if recipe.report.html:
            from trainer.report import write_report  # matplotlib costs most of a second

            write_report(context.into / REPORT_FILE, context, found, result, trained, material, split)
            files["report"] = REPORT_FILE
        done(1)
    return {
        "family": found.family,
        "metrics": metrics_of(found),
        "baselines": [_summary(baseline) for baseline in found.baselines],
        "alarms": msgspec.to_builtins(found.alarms),
        "alarms_unseen": msgspec.to_builtins(found.alarms_unseen),
        "alarms_all": msgspec.to_builtins(found.alarms_all),
        "files": files,
    }


def tell(context: StepContext) -> None:
    """Log a published evaluation in MLflow, where `trainer.tracking` is asked to.

    Raises:
        ConfigurationError: MLflow is not installed, or refuses the run.
        TemporaryError: its server does not answer.
    """
    if not is_asked_for():
        return
    record, dataset = context.record("evaluate"), context.windows()
    said = record.outputs
    result, _ = load_result(context)
    tags = {
        RUN_TAG: record.run,
        "headwater.code": record.code,
        "headwater.dataset": dataset.sha256(),
        "headwater.streams": ", ".join(f"{name}@{version}" for name, version in sorted(dataset.meta.streams.items())),
        "headwater.split": context.split().description,
    }
    files = [context.folder("evaluate") / name for name in said["files"].values()]
    log_run(context.recipe, result, said["metrics"], files, tags)


def _summary(baseline: Baseline) -> dict[str, Any]:
    if baseline.classification is not None:
        figures = baseline.classification
        return {"name": baseline.name, "accuracy": figures.accuracy, "f1_macro": figures.f1_macro}
    return {
        "name": baseline.name,
        "alarms": msgspec.to_builtins(baseline.alarms),
        "alarms_unseen": msgspec.to_builtins(baseline.alarms_unseen),
    }
