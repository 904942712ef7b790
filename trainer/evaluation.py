"""What an evaluation says: the content of `evaluation.json`."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from trainer.figures import AlarmFigures, ClassificationFigures
from trainer.recipe import Recipe
from trainer.windowset import WindowSet

Bools = npt.NDArray[np.bool_]


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one device on the judged side."""

    device: str
    windows: int
    accuracy: float | None
    """Classification."""
    flagged_share: float | None
    """Anomaly."""


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """The chosen candidate, trained on less, before the same judged windows."""

    groups: int
    windows: int
    accuracy: float | None = None
    """Classification."""
    f1_macro: float | None = None
    """Classification."""
    metric_value: float | None = None
    """Anomaly: the search's metric."""


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """Something simpler, before the same windows."""

    name: str
    classification: ClassificationFigures | None = None
    alarms: AlarmFigures | None = None
    alarms_unseen: AlarmFigures | None = None
    alarms_all: AlarmFigures | None = None


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """How far a feature of the judged windows is from training."""

    feature: str
    population_stability_index: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `evaluation.json` says."""

    recipe: str
    task: str
    family: str
    split: str
    train_windows: int
    test_windows: int
    classes: tuple[str, ...]
    metric: str
    metric_value: float | None
    """The search's metric before the judged windows; None where it is not defined there."""
    classification: ClassificationFigures | None = None
    alarms: AlarmFigures | None = None
    """Over the judged windows."""
    alarms_unseen: AlarmFigures | None = None
    """Over the judged windows, and those of every fold that judged in the search: each answered by a model that was
    fitted without it. More stretches than the judged windows alone have, and none of them seen."""
    alarms_all: AlarmFigures | None = None
    """Over all windows; most of them the detector has seen, without their labels."""
    baselines: list[Baseline] = []
    devices: list[DeviceFigures] = []
    curve: list[CurvePoint] = []
    drift: list[Drift] = []


def metrics_of(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The figures that stand in the manifest: `{name, value, split}` each."""
    named: dict[str, float | None] = {}
    if (figures := evaluation.classification) is not None:
        for name in (
            "accuracy",
            "f1_macro",
            "balanced_accuracy",
            "log_loss",
            "roc_auc_macro",
            "average_precision_macro",
            "calibration_error",
        ):
            named[name] = getattr(figures, name)
    if (alarms := evaluation.alarms) is not None:
        named |= {
            "labelled": float(alarms.labelled),
            "found": float(alarms.found),
            "false_alarms_per_month": alarms.false_alarms_per_month,
            "labelled_roc_auc": alarms.roc_auc,
            "labelled_average_precision": alarms.average_precision,
        }
    split = evaluation.split
    # What a detector is chosen by says nothing of labelled anomalies, and must not be read so.
    of_metric = f"{split}, against the same with faults put in" if evaluation.task == "anomaly" else split
    told = [(evaluation.metric, evaluation.metric_value, of_metric)]
    known = evaluation.metric if evaluation.metric_value is not None else None
    told += [(name, value, split) for name, value in named.items() if name != known]
    return [{"name": name, "value": value, "split": of} for name, value, of in told if value is not None]


def anomalies(dataset: WindowSet, recipe: Recipe) -> Bools:
    """Windows that are labelled as anything but the usual: `[N]`."""
    if dataset.labels is None or recipe.labels is None:
        return np.zeros(len(dataset), dtype=np.bool_)
    usual = ("", recipe.labels.otherwise)
    return np.asarray(~np.isin(dataset.labels, usual), dtype=np.bool_)
