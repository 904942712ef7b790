"""The evaluation: the chosen model before windows that nothing in the search has seen, beside simpler ones.

`evaluation.json` holds every figure, `report.html` shows them. Baselines of a classification: always the most frequent
class, and the best family as it comes. Of anomalies: the best family as it comes, and a rolling z-score with a
threshold that the same share of training windows exceeds.
"""

from __future__ import annotations

from typing import Any

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
from trainer.search import SearchResult, fit_candidate, load_result
from trainer.split import Split
from trainer.steps import Outputs, StepContext
from trainer.tracking import is_asked_for, log_run
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
    }
    untuned = _untuned(material, split, recipe, result, seed)
    if material.labels is not None:
        return Evaluation(
            classification=classification_figures(scores, material.labels[test], material.classes),
            baselines=_class_baselines(material, split, test, untuned),
            curve=_learning_curve(dataset, material, split, test, recipe, result.best.candidate, seed),
            **common,
        )
    labelled = anomalies(dataset, recipe)
    everything = np.arange(len(dataset))
    detectors = [("chosen", trained.scores(material.features), trained.threshold)]
    if untuned is not None:
        detectors.append((f"{untuned.family} as it comes", untuned.scores(material.features), untuned.threshold))
    rolling = _rolling(dataset, recipe)
    usual = float(np.quantile(rolling[split.train], 1 - recipe.search.contamination, method="higher"))
    detectors.append(("rolling z-score", rolling, usual))
    told = [
        Baseline(
            name=name,
            alarms=_alarms(dataset, recipe.window, labelled, found, threshold, test),
            alarms_all=_alarms(dataset, recipe.window, labelled, found, threshold, everything),
        )
        for name, found, threshold in detectors
    ]
    return Evaluation(alarms=told[0].alarms, alarms_all=told[0].alarms_all, baselines=told[1:], **common)


def _alarms(
    dataset: WindowSet, window: Window, labelled: Bools, scores: Float32s, threshold: float | None, rows: Int64s
) -> AlarmFigures:
    flagged = np.asarray(labels_of(scores[rows], threshold or 0.0) == 1)
    return alarm_figures(
        scores[rows],
        flagged,
        labelled[rows],
        dataset.devices[rows],
        dataset.starts_us[rows],
        dataset.ends_us[rows],
        # From the last reading of a window to the first of the next, each step being a gap at most.
        apart_us=max(1, window.stride - window.rows + 1) * window.gap_us,
    )


def _rolling(dataset: WindowSet, recipe: Recipe) -> Float32s:
    return np.concatenate([rolling_z(dataset.windows[piece], recipe.window.stride) for piece in dataset.chunks()])


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
    if not recipe.report.learning_curve or material.labels is None:
        return []
    groups = np.random.default_rng(seed).permutation(np.unique(dataset.groups[split.train]))
    points = []
    for share in CURVE_SHARES:
        chosen = groups[: max(1, round(share * len(groups)))]
        rows = split.train[np.isin(dataset.groups[split.train], chosen)]
        if len(np.unique(material.labels[rows])) < len(material.classes):
            continue  # too few groups for all classes: no point of the same curve
        try:
            trained = fit_candidate(material, rows, recipe, seed, candidate)
        except TrainingError:
            continue
        figures = classification_figures(
            trained.scores(material.features[test]), material.labels[test], material.classes
        )
        points.append(
            CurvePoint(groups=len(chosen), windows=len(rows), accuracy=figures.accuracy, f1_macro=figures.f1_macro)
        )
    return points


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
        "alarms_all": msgspec.to_builtins(found.alarms_all),
        "files": files,
    }


def tell(context: StepContext) -> None:
    """Log a published evaluation in MLflow, where `trainer.tracking` is asked to.

    Raises:
        ConfigurationError: MLflow is not installed.
        TemporaryError: its server does not take the run.
    """
    if not is_asked_for():
        return
    said = context.outputs("evaluate")
    result, _ = load_result(context)
    log_run(
        context.recipe, result, said["metrics"], [context.folder("evaluate") / name for name in said["files"].values()]
    )


def _summary(baseline: Baseline) -> dict[str, Any]:
    if baseline.classification is not None:
        figures = baseline.classification
        return {"name": baseline.name, "accuracy": figures.accuracy, "f1_macro": figures.f1_macro}
    return {"name": baseline.name, "alarms": msgspec.to_builtins(baseline.alarms)}
